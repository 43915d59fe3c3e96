r"""Group normalisation as an operator with a closed-form double backward.

A row is a group of channels of one input. Per row, with M the mean over it, x̂ = r (x − m), y = w x̂ + b, and the
projection P(t) = r (t − M(t) − x̂ M(t x̂)), the formulas are those of layer norm, with sums over inputs and places:

.. math:: g_x = P(w g), \qquad g_w = \Sigma\, g \hat x, \qquad g_b = \Sigma\, g

and for cotangents (v, v_w, v_b) of these three,

.. math::
    \bar g &= w P(v) + v_w \hat x + v_b, \qquad \bar w = \Sigma\, g P(v) \\
    \bar x &= P(v_w g) - r \left( M(w g \hat x)\, P(v) + M(v \hat x)\, g_x + M(v g_x)\, \hat x \right)

Weights are constant on a map, so that all means follow from five sums over each map, Sg = Σg, Sh = Σg x̂, Sv = Σv,
Svh = Σv x̂ and Svg = Σv g, and ḡ and x̄ are linear combinations of v, g and x, with four numbers for each map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2g_meta.operators import Operator
from l2g_meta.operators.batch_norm import differentiated_twice
from l2g_meta.operators.norm_passes import affine, channel_sums, in_format_of


def group_norm(
    x: Tensor,  # (n, c, ...)
    groups: int,
    w: Tensor | None = None,  # (c,)
    b: Tensor | None = None,  # (c,)
    *,
    eps: float = 1e-5,
) -> Tensor:  # (n, c, ...)
    """Normalisation of each group of consecutive channels of each input, then scale and shift channel by channel.

    Example:
        >>> group_norm(torch.tensor([[0.0, 2.0, 5.0, 9.0]]), 2, eps=0.0).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """
    maps = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], -1).contiguous()  # (n, c, s)
    w = maps.new_ones(x.shape[1]) if w is None else w.to(maps.dtype)
    b = maps.new_zeros(x.shape[1]) if b is None else b.to(maps.dtype)
    y = _GroupNorm.apply(maps, w, b, groups, eps)[0].view(x.shape).to(x.dtype)
    return in_format_of(x, y)  # as PyTorch gives it back


class _GroupNorm(Operator):
    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        n, c, size = x.shape
        return torch.native_group_norm(x, w, b, n, c, size, groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        x, w, _, ctx.groups, ctx.eps = inputs
        _, mean, rstd = outputs
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, mean, rstd)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        return *_GroupNormBackward.apply(g, *ctx.saved_tensors, ctx.groups, ctx.eps), None, None


class _GroupNormBackward(Operator):
    @staticmethod
    def forward(
        g: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        g, wanted = g.contiguous(), (True, True, True)
        return torch.ops.aten.native_group_norm_backward(g, x, mean, r, w, *x.shape, groups, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        *tensors, ctx.groups, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor, vw: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        g, x, w, mean, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again

            def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # the definition
                rows = x.reshape(len(x), ctx.groups, -1)
                centred = rows - rows.mean(2, keepdim=True)
                xh = centred * (centred.square().mean(2, keepdim=True) + ctx.eps).rsqrt()
                return w[:, None] * xh.view(x.shape) + b[:, None]

            cotangents = differentiated_twice(norm, v, vw, vb, g, x, w)
        else:
            cotangents = _double_backward(v.contiguous(), vw, vb, g.contiguous(), x, w, mean, r)
        return *cotangents, None, None, None, None


def _double_backward(
    v: Tensor, vw: Tensor, vb: Tensor, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents (ḡ, x̄, w̄) by the closed form above, in three passes of sums and two of output."""
    n, c, size = x.shape
    groups = mean.shape[1]
    x, v, g = (t.view(1, n * c, size) for t in (x, v, g))  # maps as channels of one input

    def each(t: Tensor) -> Tensor:  # (n, groups) -> (n, c)
        return t.repeat_interleave(c // groups, 1)

    def m(t: Tensor) -> Tensor:  # M, from sums over maps: (n, c) -> (n, c)
        return each(t.view(n, groups, -1).sum(2)) / (c // groups * size)

    mean, r = each(mean), each(r)
    at = mean.flatten(), r.flatten()
    nothing = torch.zeros_like(at[0]), torch.ones_like(at[1])
    found = *channel_sums(g, x, *at), *channel_sums(v, x, *at), channel_sums(v, g, *nothing)[1]
    sum_g, sum_h, sum_v, sum_vh, sum_vg = (t.view(n, c) for t in found)
    mv, mvh, mg, mh = m(sum_v), m(sum_vh), m(w * sum_g), m(w * sum_h)
    bar_w = (r * (sum_vg - mv * sum_g - mvh * sum_h)).sum(0)

    slope = r * (vw - r * w * mvh)
    bar_g = affine(x, slope.flatten(), (vb - r * w * mv - mean * slope).flatten())
    bar_g.addcmul_(v, (r * w).view(1, -1, 1))

    of_xh = -r * m(vw * sum_h) + r * r * (3 * mh * mvh + mv * mg - m(w * sum_vg))  # M(v g_x) = r (M(w v g) − …)
    slope = r * of_xh
    bar_x = affine(x, slope.flatten(), (r * r * (mh * mv + mvh * mg) - r * m(vw * sum_g) - mean * slope).flatten())
    bar_x.addcmul_(v, (-r * r * mh).view(1, -1, 1)).addcmul_(g, (r * vw - r * r * w * mvh).view(1, -1, 1))
    return bar_g.view(n, c, size), bar_x.view(n, c, size), bar_w
