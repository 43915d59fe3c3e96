r"""The passes of ``kernels.aten`` as fused Triton kernels, for float32 channels-last maps on a CUDA device.

Each pass reads its maps once and writes its results once, whatever S is; sums are taken per block of windows and added
in a fixed order, so that a step has the same bits every time. A window is a pixel, or the 2×2 pixels of a pooling; of
the latter, ``where`` stores which of the four was the largest.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from l2g_meta.operators.kernels.coefficients import of_backward, of_double_backward
from l2g_meta.operators.kernels.programs import apply_kernel, forward_kernel, statistics_kernel, sums_kernel

BLOCK = 32  # windows a program holds at once
LOOPS = 8  # times it does so, for sums


def takes(x: Tensor) -> bool:
    """Whether these kernels handle such maps."""
    return (
        x.dtype == torch.float32
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() < 2**31
    )


def statistics(
    x: Tensor,  # (n, c, H, W), and so below
    running_mean: Tensor | None,  # (c,)
    running_var: Tensor | None,  # (c,)
    momentum: float,
) -> tuple[Tensor, Tensor]:  # (c,), (c,)
    """Mean and biased variance of each channel; running statistics are updated in place."""
    n, c = x.numel() // x.shape[1], x.shape[1]
    grid, channels = _grid(n, c, LOOPS)
    means, squares = x.new_empty(2, grid[0], c)
    counts = x.new_empty(grid[0], 1)
    statistics_kernel[grid](x, means, squares, counts, n, c, LOOPS=LOOPS, BLOCK=BLOCK, CHANNELS=channels)
    mean = (means * counts).sum(0) / n
    var = (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / n
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * n / (n - 1), momentum)
    return mean, var


def forward(
    x: Tensor, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, relu: bool, pool: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and which pixel of each window the pooling chose."""
    y = _output(x, pool)
    where = torch.empty_like(y, dtype=torch.int8) if pool else None
    a = w * rstd
    sign = torch.where(w < 0, -1.0, 1.0)
    windows, shape = _windows(x, pool)
    grid, channels = _grid(windows, x.shape[1])
    forward_kernel[grid](
        x, y, where, a, b - mean * a, sign, windows, *shape, x.shape[1],
        RELU=relu, POOL=pool, BLOCK=BLOCK, CHANNELS=channels,
    )  # fmt: skip
    return y, where


def backward(
    g: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, out: Tensor | None, where: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of x, w and b."""
    sum_g, sum_h = _sums(None, g, x, mean, rstd, out, where)
    coefficients = of_backward(w, mean, rstd, sum_g, sum_h, x.numel() // x.shape[1])
    _, bar_x = _apply(None, g, x, out, where, torch.stack(coefficients))
    return bar_x, sum_h, sum_g


def double_backward(
    v: Tensor,
    vw: Tensor,
    vb: Tensor,
    g: Tensor,
    x: Tensor,
    w: Tensor,
    mean: Tensor,
    rstd: Tensor,
    out: Tensor | None,
    where: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of g, x and w."""
    sums = _sums(v, g, x, mean, rstd, out, where)
    bar_w, of_x, of_g = of_double_backward(vw, vb, w, mean, rstd, *sums, n=x.numel() // x.shape[1])
    bar_g, bar_x = _apply(v, g, x, out, where, torch.stack([*of_x, *of_g]))
    assert bar_g is not None  # noqa: S101  # for the type checker
    return bar_g, bar_x, bar_w


def index(where: Tensor, x: Tensor) -> Tensor:
    """Where in each map, flat, the pooling found its maxima."""
    width = x.shape[3]
    rows = torch.arange(where.shape[2], device=x.device)[:, None] * 2 + where // 2
    return rows * width + torch.arange(where.shape[3], device=x.device) * 2 + where % 2


def _sums(v: Tensor | None, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, out: Any, where: Any) -> Tensor:
    windows, shape = _windows(x, where is not None)
    grid, channels = _grid(windows, x.shape[1], LOOPS)
    sums = x.new_empty(2 if v is None else 5, grid[0], x.shape[1])
    sums_kernel[grid](
        v, g, x, out, where, mean, rstd, sums, windows, *shape, x.shape[1], grid[0],
        DOUBLE=v is not None, RELU=out is not None, POOL=where is not None,
        LOOPS=LOOPS, BLOCK=BLOCK, CHANNELS=channels,
    )  # fmt: skip
    return sums.sum(1)


def _apply(
    v: Tensor | None, g: Tensor, x: Tensor, out: Tensor | None, where: Tensor | None, coefficients: Tensor
) -> tuple[Tensor | None, Tensor]:
    bar_g, bar_x = None if v is None else torch.empty_like(g), torch.empty_like(x)
    windows, shape = _windows(x, where is not None)
    grid, channels = _grid(windows, x.shape[1])
    apply_kernel[grid](
        v, g, x, out, where, bar_g, bar_x, coefficients, windows, *shape, x.shape[1],
        DOUBLE=v is not None, RELU=out is not None, POOL=where is not None, BLOCK=BLOCK, CHANNELS=channels,
    )  # fmt: skip
    return bar_g, bar_x


def _output(x: Tensor, pool: bool) -> Tensor:
    if not pool:
        return torch.empty_like(x)
    n, c, height, width = x.shape
    shape = (n, c, height // 2, width // 2)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _windows(x: Tensor, pool: bool) -> tuple[int, tuple[int, int]]:
    n, _, height, width = x.shape
    return n * (((height + 1) // 2) * ((width + 1) // 2) if pool else height * width), (height, width)


def _grid(windows: int, c: int, loops: int = 1) -> tuple[tuple[int, int], int]:
    channels = min(triton.next_power_of_2(c), 64)
    return (triton.cdiv(windows, BLOCK * loops), triton.cdiv(c, channels)), channels
