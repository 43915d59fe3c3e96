r"""Batch normalisation as an operator with a closed-form double backward.

Per channel, over the N = batch · height · width values, x̂ = r (x − m) with m the mean and r = (variance + ε)^−½, and
y = w x̂ + b. Sums are over the N values: Sg = Σg, Sh = Σg x̂, Sv = Σv, Svh = Σv x̂, Svg = Σv g. The backward pass is

.. math:: g_x = w r (g - S_g / N - \hat x S_h / N), \qquad g_w = S_h, \qquad g_b = S_g

and its own, for cotangents (v, v_w, v_b) of these three, with a = w r,

.. math::
    \bar g &= a (v - S_v / N - \hat x S_{vh} / N) + v_w \hat x + v_b \\
    h &= -(a / N) (v S_h + g S_{vh}) + v_w g                                   && (\partial / \partial \hat x) \\
    \bar w &= r (S_{vg} - S_v S_g / N - S_{vh} S_h / N) \\
    \bar x &= r (h - \Sigma h / N - \hat x \, \Sigma(h \hat x) / N) - (r w \bar w / N) \hat x

where Σh and Σ(h x̂) follow from the sums above. PyTorch evaluates the same by some fifty element-wise passes, which is
most of what an exact meta-step costs; ``norm_passes`` does it in a few. ReLU and 2×2 max-pooling after the norm only
select values, y = S(w x̂ + b), so that g above becomes Sᵀg, and ḡ becomes S ḡ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from l2g_meta.operators import norm_passes
from l2g_meta.operators.norm_passes import per_channel


def batch_norm(
    x: Tensor,  # (n, c, ...)
    w: Tensor | None = None,  # (c,)
    b: Tensor | None = None,  # (c,)
    *,
    running_mean: Tensor | None = None,  # (c,)
    running_var: Tensor | None = None,  # (c,)
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    pool: bool = False,
) -> Tensor:  # (n, c, ...)
    """Batch normalisation by the batch's own statistics, then ReLU and 2×2 max-pooling if asked for.

    Running statistics that are given are updated in place. Empty batches are PyTorch's own.

    Raises:
        ValueError: for one value per channel, inputs of integers, or pooling of what is no map.
        RuntimeError: for scales or statistics of another number of channels; both as PyTorch does.

    Example:
        >>> batch_norm(torch.tensor([[0.0], [2.0]]), eps=0.0).tolist()
        [[-1.0], [1.0]]
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"need floating-point inputs (n, c, ...), got {x.dtype} of shape {tuple(x.shape)}")
    if pool and x.ndim != 4:
        raise ValueError(f"need maps (n, c, height, width) to pool, got shape {tuple(x.shape)}")
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    given = [t for t in (w, b, running_mean, running_var) if t is not None]
    if x.numel() == 0 or any(len(t) != x.shape[1] for t in given):  # a special case of PyTorch's, or its error
        y = F.batch_norm(x, running_mean, running_var, w, b, True, momentum, eps)
        return relu_and_pool(y, relu=relu, pool=pool)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    w = x.new_ones(x.shape[1]) if w is None else w.to(wide)
    b = x.new_zeros(x.shape[1]) if b is None else b.to(wide)
    with torch.no_grad():
        mean, variance = _statistics(x, running_mean, running_var, momentum)
        rstd = (variance + eps).rsqrt()
    return _Norm.apply(x, w, b, mean, rstd, eps, relu, pool)[0].to(dtype)


def relu_and_pool(y: Tensor, *, relu: bool, pool: bool) -> Tensor:
    """ReLU and 2×2 max-pooling, those that are asked for, by PyTorch's own operators."""
    y = y.relu() if relu else y
    return F.max_pool2d(y, 2) if pool else y


def _statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in the precision of x, whatever that of the running statistics, updated in place."""
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    wide = [t.to(x.dtype) for t in running or ()]  # themselves, if of that precision
    found = torch.ops.aten.batch_norm_update_stats(x, *(wide or (None, None)), momentum)
    for t, value in zip(running or (), wide, strict=True):
        t.copy_(value)
    return found


class _Norm(Function):
    @staticmethod
    def forward(
        x: Tensor, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, eps: float, relu: bool, pool: bool
    ) -> tuple[Tensor, Tensor | None]:
        return norm_passes.forward(x, w, b, mean, rstd, relu, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor | None]) -> None:
        x, w, _, mean, rstd, ctx.eps, relu, _ = inputs
        y, where = outputs
        if where is not None:
            ctx.mark_non_differentiable(where)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, mean, rstd, y if relu else None, where)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 8
        return *_NormBackward.apply(g, *ctx.saved_tensors, ctx.eps), None, None, None, None, None


class _NormBackward(Function):
    @staticmethod
    def forward(
        g: Tensor,
        x: Tensor,
        w: Tensor,
        mean: Tensor,
        rstd: Tensor,
        out: Tensor | None,
        where: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return norm_passes.backward(in_format_of(x, g), x, w, mean, rstd, out, where)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *(t.clone() for t in outputs[1:]))  # users may write to what they get

    @staticmethod
    def backward(ctx: Any, v: Tensor, vw: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        g, x, w, mean, rstd, out, where, *sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            cotangents = double_backward(v, vw, vb, g, x, w, out, where, ctx.eps)
        else:
            cotangents = norm_passes.double_backward(
                in_format_of(x, v), vw, vb, in_format_of(x, g), x, w, mean, rstd, out, where, *sums
            )
        return *cotangents, None, None, None, None, None


def double_backward(
    v: Tensor,  # cotangent of g_x, (n, c, ...)
    vw: Tensor,  # cotangent of g_w, (c,)
    vb: Tensor,  # cotangent of g_b, (c,)
    g: Tensor,  # cotangent of y, of y's shape
    x: Tensor,  # (n, c, ...)
    w: Tensor,  # (c,)
    out: Tensor | None,  # y, where S has ReLU: that was active where y > 0
    where: Tensor | None,  # in each map, where the pooling found its maxima, of y's shape
    eps: float,
) -> tuple[Tensor, ...]:
    """Cotangents (ḡ, x̄, w̄): the definition, differentiated by PyTorch, slow and to any order; the passes' oracle."""
    dims = [d for d in range(x.ndim) if d != 1]

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        centred = x - x.mean(dims, keepdim=True)
        xh = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
        y = per_channel(w, x) * xh + per_channel(b, x)
        y = y if where is None else y.flatten(2).gather(2, where.flatten(2)).view(where.shape)
        return y if out is None else y * (out > 0).to(y.dtype)

    return differentiated_twice(norm, v, vw, vb, g, x, w)


def differentiated_twice(
    norm: Callable[[Tensor, Tensor, Tensor], Tensor], v: Tensor, vw: Tensor, vb: Tensor, g: Tensor, x: Tensor, w: Tensor
) -> tuple[Tensor, ...]:
    """Cotangents (ḡ, x̄, w̄) of a norm (x, w, b) that is linear in w and b, by PyTorch's automatic differentiation."""
    with torch.enable_grad():
        # Under other names, so that only this use of them counts: g itself may depend on x.
        g, x, w = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, x, w))
        b = torch.zeros_like(w, requires_grad=True)  # which moves none of the derivatives
        first = torch.autograd.grad(norm(x, w, b), (x, w, b), g, create_graph=True)
        return torch.autograd.grad(first, (g, x, w), (v, vw, vb), create_graph=True)


def in_format_of(x: Tensor, t: Tensor) -> Tensor:
    """T in the memory format of x, both maps or both not."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
