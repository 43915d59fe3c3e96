r"""Layer normalisation as an operator with a closed-form double backward.

Per row of d values, with M the mean over the row, x̂ = r (x − m), y = w x̂ + b, and the projection
P(t) = r (t − M(t) − x̂ M(t x̂)), the backward pass is

.. math:: g_x = P(w g), \qquad g_w = \Sigma\, g \hat x, \qquad g_b = \Sigma\, g

with sums over rows, and its own, for cotangents (v, v_w, v_b) of these three,

.. math::
    \bar g &= w P(v) + v_w \hat x + v_b, \qquad \bar w = \Sigma\, g P(v) \\
    \bar x &= P(v_w g) - r \left( M(w g \hat x)\, P(v) + M(v \hat x)\, g_x + M(v g_x)\, \hat x \right)

P with a weight is PyTorch's backward pass, and v_w x̂ + v_b its forward pass, with other arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def layer_norm(
    x: Tensor,  # (..., *shape)
    shape: Sequence[int],
    w: Tensor | None = None,  # shape
    b: Tensor | None = None,  # shape
    *,
    eps: float = 1e-5,
) -> Tensor:  # (..., *shape)
    """Layer normalisation over the last dimensions, those of ``shape``, then scale and shift element by element.

    Example:
        >>> layer_norm(torch.tensor([[0.0, 2.0], [5.0, 9.0]]), (2,), torch.tensor([1.0, 3.0]), eps=0.0).tolist()
        [[-1.0, 3.0], [-1.0, 3.0]]
    """
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, torch.Size(shape).numel())  # (n, d)
    w = rows.new_ones(rows.shape[1]) if w is None else w.to(rows.dtype).flatten()
    b = rows.new_zeros(rows.shape[1]) if b is None else b.to(rows.dtype).flatten()
    return _LayerNorm.apply(rows, w, b, eps)[0].view(x.shape).to(x.dtype)


class _LayerNorm(Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, (x.shape[1],), w, b, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        x, w, _, ctx.eps = inputs
        _, mean, rstd = outputs
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, mean, rstd)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 4
        return *_LayerNormBackward.apply(g, *ctx.saved_tensors, ctx.eps), None


class _LayerNormBackward(Function):
    @staticmethod
    def forward(
        g: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(g, x, w, mean, rstd, (True, True, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor, vw: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        g, x, w, mean, rstd = ctx.saved_tensors
        return *double_backward(v, vw, vb, g, x, w, mean, rstd, ctx.eps), None, None, None


def double_backward(
    v: Tensor,  # cotangent of g_x, (n, d)
    vw: Tensor,  # cotangent of g_w, (d,)
    vb: Tensor,  # cotangent of g_b, (d,)
    g: Tensor,  # cotangent of y, (n, d)
    x: Tensor,  # (n, d)
    w: Tensor,  # (d,)
    mean: Tensor,  # (n, 1)
    r: Tensor,  # (n, 1)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents (ḡ, x̄, w̄): the closed form above as it is written."""
    only_x = (True, False, False)
    pv, gx, gx_of_vw = (_backward(t, x, c, mean, r, only_x)[0] for t, c in ((v, None), (g, w), (g, vw)))  # P(c t)
    shifted = torch.native_layer_norm(x, (x.shape[1],), vw, vb, eps)[0]  # v_w x̂ + v_b
    if torch.is_grad_enabled():  # to be differentiated again: these two depend on x
        mean = _mean(x)
        r = (_mean((x - mean).square()) + eps).rsqrt()
    xh = r * (x - mean)
    bar_x = gx_of_vw - r * (_mean(w * g * xh) * pv + _mean(v * xh) * gx + _mean(v * gx) * xh)
    return w * pv + shifted, bar_x, (g * pv).sum(0)


def _backward(
    g: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_layer_norm_backward(g.contiguous(), x, (x.shape[1],), mean, r, w, w, wanted)


def _mean(t: Tensor) -> Tensor:  # (n, d) -> (n, 1)
    return t.mean(1, keepdim=True)
