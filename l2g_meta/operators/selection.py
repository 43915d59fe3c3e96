"""Max-pooling as an operator: it selects values, and its second derivative selects the same ones.

PyTorch's double backward also hands back a map of zeros for the input, which is written, read and added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from l2g_meta.operators.norm_passes import take

aten = torch.ops.aten


def max_pool2d(
    x: Tensor,  # (n, c, H, W)
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool = False,
) -> Tensor:  # (n, c, H', W')
    """``torch.max_pool2d`` of a batch of maps.

    Example:
        >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1]).flatten().tolist()
        [5.0, 7.0, 13.0, 15.0]
    """
    return _MaxPool.apply(x, (size, stride, padding, dilation, ceil_mode))[0]


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        y, where = _pooled(x, window)
        ctx.mark_non_differentiable(where)
        ctx.set_materialize_grads(False)
        ctx.window = window
        ctx.save_for_backward(x, where)
        return y, where

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        return None if g is None else _Spread.apply(g, *ctx.saved_tensors, ctx.window), None


def _pooled(x: Tensor, window: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Maxima and where they are. On a CPU the pass over contiguous maps is slower than copies around it."""
    if x.device.type != "cpu" or not x.is_contiguous():
        return aten.max_pool2d_with_indices(x, *window)
    y, where = aten.max_pool2d_with_indices(x.contiguous(memory_format=torch.channels_last), *window)
    return y.contiguous(), where.contiguous()


class _Spread(Function):
    """Each value of g added to where its maximum was; linear in g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, where: Tensor, window: tuple[Any, ...]) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(x, where)
        return aten.max_pool2d_with_indices_backward(g, x, *window, where)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None, None]:
        x, where = ctx.saved_tensors
        return _Taken.apply(v, x, where, ctx.window), None, None, None


class _Taken(Function):
    """The values of v at the maxima; linear in v."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor, where: Tensor, window: tuple[Any, ...]) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(x, where)
        return take(v, where)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _Spread.apply(g, *ctx.saved_tensors, ctx.window), None, None, None
