"""Per-channel numbers of the backward passes, all of shape (c,), from the sums over the maps.

The notation is that of ``batch_norm.py``. A pass over maps then is one linear combination per channel.
"""

from __future__ import annotations

from torch import Tensor


def of_backward(
    w: Tensor, mean: Tensor, rstd: Tensor, sum_g: Tensor, sum_h: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(of_g, slope, shift) of gx = of_g G + slope x + shift."""
    a = w * rstd
    slope = -a * rstd * sum_h / n
    return a, slope, -a * sum_g / n - mean * slope


def of_double_backward(
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
