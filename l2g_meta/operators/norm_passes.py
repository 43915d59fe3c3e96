r"""Passes over feature maps that batch normalisation, ReLU and pooling are made of, in ATen: for any device.

Notation: x̂ = r (x − m) per channel, over N = batch · height · width values; y = S(w x̂ + b), where S
is nothing, ReLU, or ReLU and 2×2 max-pooling (in either order, both being monotone), g the cotangent of y and G = Sᵀg.
Allocating a feature map costs more than a pass over it (the system maps and clears its pages), so sums are taken
without intermediate maps, by the kernel of batch normalisation's own backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def statistics(
    x: Tensor,  # (n, c, ...)
    running_mean: Tensor | None,  # (c,)
    running_var: Tensor | None,  # (c,)
    momentum: float,
) -> tuple[Tensor, Tensor]:  # (c,), (c,)
    """Mean and biased variance of each channel; running statistics are updated in place."""
    return aten.batch_norm_update_stats(x, running_mean, running_var, momentum)


def forward(
    x: Tensor,  # (n, c, ...)
    w: Tensor,  # (c,)
    b: Tensor,  # (c,)
    mean: Tensor,  # (c,)
    rstd: Tensor,  # (c,)
    relu: bool,
    pool: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and where in each map the pooling found its maxima (of y's shape)."""
    where = None
    if pool:  # before the scale, on which a negative one turns the largest into the smallest
        if x.is_cuda or (w < 0).any():  # not asked where the answer would have to travel
            sign = torch.where(w < 0, -1.0, 1.0).to(x.dtype)
            chosen, where = F.max_pool2d_with_indices(x * per_channel(sign, x), [2, 2])
            x = chosen * per_channel(sign, x)
        else:
            x, where = F.max_pool2d_with_indices(x, [2, 2])
    y = affine(x, w * rstd, b - mean * w * rstd)
    return (y.relu_() if relu else y), where


def backward(
    g: Tensor,  # of y's shape
    x: Tensor,  # (n, c, ...)
    w: Tensor,  # (c,)
    mean: Tensor,  # (c,)
    rstd: Tensor,  # (c,)
    out: Tensor | None,  # y, where S has ReLU: that was active where y > 0
    where: Tensor | None,  # from the forward pass, of y's shape
) -> tuple[Tensor, Tensor, Tensor]:  # (n, c, ...), (c,), (c,)
    """Cotangents of x, w and b: gx = w r (G − Sg/N − x̂ Sh/N), gw = Sh, gb = Sg."""
    g = g if out is None else aten.threshold_backward(g, out, 0)
    if where is None:
        return aten.native_batch_norm_backward(g, x, w, None, None, mean, rstd, True, 0.0, [True, True, True])
    sum_g, sum_h = channel_sums(g, take(x, where), mean, rstd)
    of_g, slope, shift = backward_coefficients(w, mean, rstd, sum_g, sum_h, x.numel() // x.shape[1])
    return _add_at(affine(x, slope, shift), where, g * per_channel(of_g, g)), sum_h, sum_g


def double_backward(
    v: Tensor,  # cotangent of gx, (n, c, ...)
    vw: Tensor,  # cotangent of gw, (c,)
    vb: Tensor,  # cotangent of gb, (c,)
    g: Tensor,  # of y's shape
    x: Tensor,  # (n, c, ...)
    w: Tensor,  # (c,)
    mean: Tensor,  # (c,)
    rstd: Tensor,  # (c,)
    out: Tensor | None,
    where: Tensor | None,
    sum_h: Tensor,  # gw, as ``backward`` gave it, (c,)
    sum_g: Tensor,  # gb, (c,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of g, x and w: the closed form of ``batch_norm.py``, in two passes of sums and two of output."""
    g = g if out is None else aten.threshold_backward(g, out, 0)
    chosen, v_at = (x, v) if where is None else (take(x, where), take(v, where))
    sum_v, sum_vh = channel_sums(v, x, mean, rstd)
    _, sum_vg = channel_sums(v_at, g, torch.zeros_like(mean), torch.ones_like(mean))
    sums = sum_g, sum_h, sum_v, sum_vh, sum_vg
    bar_w, of_x, of_g = double_backward_coefficients(vw, vb, w, mean, rstd, *sums, n=x.numel() // x.shape[1])

    of_v, slope, shift = of_g
    bar_g = affine(chosen, slope, shift).addcmul_(v_at, per_channel(of_v, v))
    bar_g = bar_g if out is None else aten.threshold_backward(bar_g, out, 0)

    times_g, slope, shift, of_v = of_x
    bar_x = affine(x, slope, shift).addcmul_(v, per_channel(of_v, v))
    times_g = per_channel(times_g, g)
    return bar_g, bar_x.addcmul_(g, times_g) if where is None else _add_at(bar_x, where, g * times_g), bar_w


def backward_coefficients(
    w: Tensor, mean: Tensor, rstd: Tensor, sum_g: Tensor, sum_h: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(of_g, slope, shift), each (c,), of gx = of_g G + slope x + shift: a pass over maps is one such combination."""
    a = w * rstd
    slope = -a * rstd * sum_h / n
    return a, slope, -a * sum_g / n - mean * slope


def double_backward_coefficients(
    vw: Tensor,
    vb: Tensor,
    w: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sum_g: Tensor,
    sum_h: Tensor,
    sum_v: Tensor,
    sum_vh: Tensor,
    sum_vg: Tensor,
    *,
    n: int,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """w̄; (of_g, slope, shift, of_v) of x̄ = of_g G + slope x + shift + of_v v; (of_v, slope, shift) of ḡ = S(…)."""
    a = w * rstd
    bar_w = rstd * (sum_vg - sum_v * sum_g / n - sum_vh * sum_h / n)

    of_v, of_g = -a / n * sum_h, vw - a / n * sum_vh  # h = of_v v + of_g G
    of_xhat = -(of_v * sum_vh + of_g * sum_h) / n - w * bar_w / n  # −Σ(h x̂)/N and −q r/N
    slope = rstd * rstd * of_xhat
    shift = -rstd * (of_v * sum_v + of_g * sum_g) / n - mean * slope
    of_x = (rstd * of_g, slope, shift, rstd * of_v)

    slope = (vw - a * sum_vh / n) * rstd  # ḡ = S(a v + (vw − a Svh/N) x̂ + vb − a Sv/N)
    return bar_w, of_x, (a, slope, vb - a * sum_v / n - mean * slope)


def channel_sums(t: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σ t and Σ t x̂ per channel, in one pass without an intermediate map."""
    ones = torch.ones_like(mean)  # CUDA's kernels take the type of the sums from a scale; they do not depend on it
    _, with_x, alone = aten.native_batch_norm_backward(
        t, x, ones, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return alone, with_x


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale x + shift`` per channel, in one pass: what batch normalisation does with mean 0 and variance 1."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0)[0]


def per_channel(t: Tensor, like: Tensor) -> Tensor:
    """(c,) as it broadcasts against ``like`` (n, c, ...)."""
    return t.view(-1, *[1] * (like.ndim - 2))


def take(x: Tensor, where: Tensor) -> Tensor:
    """Values of x (n, c, H, W) at the pooling's indices, (n, c, H // 2, W // 2)."""
    if x.is_contiguous():
        return x.flatten(2).gather(2, where.flatten(2)).view_as(where)
    taken = _rows(x).gather(1, _rows(where))
    return taken.unflatten(1, where.shape[2:]).permute(0, 3, 1, 2)


def _add_at(x: Tensor, where: Tensor, t: Tensor) -> Tensor:
    """Adds t (n, c, H // 2, W // 2) to x (n, c, H, W) at the pooling's indices, in place."""
    if x.is_contiguous():
        x.flatten(2).scatter_add_(2, where.flatten(2), t.flatten(2))
    else:
        _rows(x).scatter_add_(1, _rows(where), _rows(t))
    return x


def _rows(x: Tensor) -> Tensor:
    """A channels-last (n, c, H, W) as (n, H W, c), the same memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
