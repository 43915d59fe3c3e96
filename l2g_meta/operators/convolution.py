r"""Convolution whose double backward runs convolution's own kernels.

With y = w * x, the backward pass gives gx = wᵀ * g and gw = x ⋆ g; for cotangents (vx, vw) of those two, its own
backward is more convolutions of the same kind,

.. math:: \bar g = w * v_x + v_w * x, \qquad \bar x = v_w^T * g, \qquad \bar w = v_x \star g.

PyTorch computes the last by a convolution with a kernel as large as the feature map, and always copies channels-last
tensors to the other layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2g_meta.operators import Operator


class Geometry(NamedTuple):
    """How the kernel moves over the image."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


def conv2d(
    x: Tensor,  # (n, c, H, W)
    w: Tensor,  # (d, c // groups, k, l)
    b: Tensor | None = None,  # (d,)
    geometry: Geometry = Geometry(),  # noqa: B008 (immutable)
) -> Tensor:  # (n, d, H', W')
    """``torch.conv2d`` with a fast double backward; stride 1 and no padding by default. Complex: PyTorch's own.

    Example:
        >>> conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item()
        9.0
    """
    if x.is_complex() or w.is_complex():  # whose gradients are conjugated
        return torch.conv2d(x, w, b, *geometry)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # casts are differentiated outside
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
    return _Conv.apply(x, w, b, geometry)


class _Conv(Operator):
    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        return torch.conv2d(x, w, b, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, b, ctx.geometry = inputs
        ctx.save_for_backward(x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        return *_ConvBackward.apply(g, x, w, ctx.geometry, ctx.needs_input_grad[:3]), None


class _ConvBackward(Operator):
    @staticmethod
    def forward(
        g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.aten.convolution_backward(
            g, x, w, [w.shape[0]], *geometry[:3], False, [0, 0], geometry.groups, list(wanted)
        )
        return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        g, x, w, ctx.geometry, _ = inputs
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> tuple[Any, ...]:
        g, x, w = ctx.saved_tensors
        need_g, need_x, need_w = ctx.needs_input_grad[:3]
        bar_g = bar_x = bar_w = None
        if need_g:
            parts = [] if vx is None else [conv2d(vx, w, None, ctx.geometry)]
            parts += [] if vw is None else [conv2d(x, vw, vb, ctx.geometry)]
            parts += [] if vb is None or vw is not None else [vb[:, None, None].expand_as(g)]
            bar_g = parts[0].add_(parts[1]) if len(parts) > 1 else parts[0] if parts else None
        wanted = (need_x and vw is not None, need_w and vx is not None, False)
        if any(wanted):
            at = g, x if vx is None else vx, w if vw is None else vw
            bar_x, bar_w, _ = _ConvBackward.apply(*at, ctx.geometry, wanted)
        return bar_g, bar_x, bar_w, None, None
