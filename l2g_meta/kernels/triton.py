r"""The passes of ``kernels.aten`` as fused Triton kernels, for float32 channels-last maps on a CUDA device.

Each pass reads its maps once and writes its results once, whatever S is; sums are taken per block of windows and added
in a fixed order, so that a step has the same bits every time. A window is a pixel, or the 2×2 pixels of a pooling; of
the latter, ``where`` stores which of the four was the largest.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2g_meta.kernels.coefficients import of_backward, of_double_backward

BLOCK = 32  # windows a program holds at once
LOOPS = 8  # times it does so, for sums


@triton.jit
def _window(ids, height, width, POOL: tl.constexpr):
    """First pixel of each window, whether it has a right and a lower neighbour, and its place in the output."""
    if POOL:
        down = (height + 1) // 2
        across = (width + 1) // 2
        image = ids // (down * across)
        i = (ids // across) % down
        j = ids % across
        pixel = (image * height + 2 * i) * width + 2 * j
        place = (image * (height // 2) + i) * (width // 2) + j
        return pixel, 2 * j + 1 < width, 2 * i + 1 < height, place
    else:
        return ids, ids < 0, ids < 0, ids


@triton.jit
def _pixel(pixel, right, below, valid, width, k: tl.constexpr):
    """Place of a window's k-th pixel, and whether it exists."""
    exists = valid
    if k % 2 == 1:
        exists = exists & right
    if k // 2 == 1:
        exists = exists & below
    return pixel + (k // 2) * width + k % 2, exists


@triton.jit
def _cotangent(g, y, at, mask, RELU: tl.constexpr):
    """Sᵀg without the pooling: g where ReLU was active."""
    values = tl.load(g + at, mask=mask, other=0.0)
    if RELU:
        values = tl.where(tl.load(y + at, mask=mask, other=0.0) <= 0, 0.0, values)
    return values


@triton.jit
def _statistics_kernel(
    x, means, squares, counts, rows, C, LOOPS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and sum of squared deviations of a program's rows."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(0) * LOOPS * BLOCK
    total = tl.zeros([CHANNELS], tl.float32)
    count = tl.minimum(rows - first, LOOPS * BLOCK).to(tl.float32)
    for loop in range(LOOPS):
        ids = first + loop * BLOCK + tl.arange(0, BLOCK)
        mask = (ids < rows)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(x + ids[:, None] * C + c[None, :], mask=mask, other=0.0), 0)
    mean = total / count
    square = tl.zeros([CHANNELS], tl.float32)
    for loop in range(LOOPS):
        ids = first + loop * BLOCK + tl.arange(0, BLOCK)
        mask = (ids < rows)[:, None] & (c < C)[None, :]
        centred = tl.load(x + ids[:, None] * C + c[None, :], mask=mask, other=0.0) - mean[None, :]
        centred = tl.where(mask, centred, 0.0)
        square += tl.sum(centred * centred, 0)
    tl.store(means + tl.program_id(0) * C + c, mean, mask=c < C)
    tl.store(squares + tl.program_id(0) * C + c, square, mask=c < C)
    tl.store(counts + tl.program_id(0), count)


@triton.jit
def _forward_kernel(
    x, y, where, scale, shift, sign, windows, height, width, C,
    RELU: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid, channel = ids < windows, c < C
    pixel, right, below, place = _window(ids, height, width, POOL)
    best = tl.load(x + pixel[:, None] * C + c[None, :], mask=valid[:, None] & channel[None, :], other=0.0)
    written = valid
    if POOL:
        written = valid & right & below
        s = tl.load(sign + c, mask=channel, other=1.0)[None, :]
        code = tl.zeros([BLOCK, CHANNELS], tl.int8)
        for k in tl.static_range(1, 4):
            at, exists = _pixel(pixel, right, below, valid, width, k)
            value = tl.load(x + at[:, None] * C + c[None, :], mask=exists[:, None] & channel[None, :], other=0.0)
            larger = (value * s > best * s) | (value != value)  # NaN wins, as in PyTorch
            code = tl.where(larger, k, code).to(tl.int8)
            best = tl.where(larger, value, best)
        mask = written[:, None] & channel[None, :]
        tl.store(where + place[:, None] * C + c[None, :], code, mask=mask)
    mask = written[:, None] & channel[None, :]
    a = tl.load(scale + c, mask=channel, other=0.0)[None, :]
    b = tl.load(shift + c, mask=channel, other=0.0)[None, :]
    value = a * best + b
    if RELU:
        value = tl.where(value <= 0, 0.0, value)  # NaN stays NaN
    tl.store(y + place[:, None] * C + c[None, :], value, mask=mask)


@triton.jit
def _sums_kernel(
    v, g, x, y, where, mean, rstd, sums, windows, height, width, C, programs,
    DOUBLE: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    LOOPS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Σ G and Σ G x̂, and for the double backward Σ v, Σ v x̂ and Σ v G, of a program's windows."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = c < C
    m = tl.load(mean + c, mask=channel, other=0.0)[None, :]
    r = tl.load(rstd + c, mask=channel, other=0.0)[None, :]
    sg = tl.zeros([CHANNELS], tl.float32)
    sh = tl.zeros([CHANNELS], tl.float32)
    sv = tl.zeros([CHANNELS], tl.float32)
    svh = tl.zeros([CHANNELS], tl.float32)
    svg = tl.zeros([CHANNELS], tl.float32)
    for loop in range(LOOPS):
        ids = (tl.program_id(0) * LOOPS + loop) * BLOCK + tl.arange(0, BLOCK)
        valid = ids < windows
        pixel, right, below, place = _window(ids, height, width, POOL)
        written = valid
        if POOL:
            written = valid & right & below
        at = place[:, None] * C + c[None, :]
        mask = written[:, None] & channel[None, :]
        spread = _cotangent(g, y, at, mask, RELU)
        if POOL:
            code = tl.load(where + at, mask=mask, other=0)
        for k in tl.static_range(4 if POOL else 1):
            at, exists = _pixel(pixel, right, below, valid, width, k)
            at = at[:, None] * C + c[None, :]
            mask = exists[:, None] & channel[None, :]
            xh = tl.where(mask, (tl.load(x + at, mask=mask, other=0.0) - m) * r, 0.0)
            here = spread
            if POOL:
                here = tl.where(code == k, spread, 0.0)
            sg += tl.sum(here, 0)
            sh += tl.sum(here * xh, 0)
            if DOUBLE:
                u = tl.load(v + at, mask=mask, other=0.0)
                sv += tl.sum(u, 0)
                svh += tl.sum(u * xh, 0)
                svg += tl.sum(u * here, 0)
    out = sums + tl.program_id(0) * C + c
    tl.store(out, sg, mask=channel)
    tl.store(out + programs * C, sh, mask=channel)
    if DOUBLE:
        tl.store(out + 2 * programs * C, sv, mask=channel)
        tl.store(out + 3 * programs * C, svh, mask=channel)
        tl.store(out + 4 * programs * C, svg, mask=channel)


@triton.jit
def _apply_kernel(
    v, g, x, y, where, bar_g, bar_x, coefficients, windows, height, width, C,
    DOUBLE: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x̄ = of_g G + of_v v + slope x + shift, and for the double backward ḡ = S(of_v v + slope x + shift)."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid, channel = ids < windows, c < C
    pixel, right, below, place = _window(ids, height, width, POOL)
    written = valid
    if POOL:
        written = valid & right & below
    out = place[:, None] * C + c[None, :]
    out_mask = written[:, None] & channel[None, :]
    spread = _cotangent(g, y, out, out_mask, RELU)
    of_g = tl.load(coefficients + c, mask=channel, other=0.0)[None, :]
    slope = tl.load(coefficients + C + c, mask=channel, other=0.0)[None, :]
    shift = tl.load(coefficients + 2 * C + c, mask=channel, other=0.0)[None, :]
    if DOUBLE:
        of_v = tl.load(coefficients + 3 * C + c, mask=channel, other=0.0)[None, :]
        g_of_v = tl.load(coefficients + 4 * C + c, mask=channel, other=0.0)[None, :]
        g_slope = tl.load(coefficients + 5 * C + c, mask=channel, other=0.0)[None, :]
        g_shift = tl.load(coefficients + 6 * C + c, mask=channel, other=0.0)[None, :]
        selected = tl.zeros([BLOCK, CHANNELS], tl.float32)
    if POOL:
        code = tl.load(where + out, mask=out_mask, other=0)
    for k in tl.static_range(4 if POOL else 1):
        at, exists = _pixel(pixel, right, below, valid, width, k)
        at = at[:, None] * C + c[None, :]
        mask = exists[:, None] & channel[None, :]
        value = tl.load(x + at, mask=mask, other=0.0)
        here = spread
        if POOL:
            here = tl.where(code == k, spread, 0.0)
        result = of_g * here + slope * value + shift
        if DOUBLE:
            u = tl.load(v + at, mask=mask, other=0.0)
            result += of_v * u
            candidate = g_of_v * u + g_slope * value + g_shift
            if POOL:
                selected = tl.where(code == k, candidate, selected)
            else:
                selected = candidate
        tl.store(bar_x + at, result, mask=mask)
    if DOUBLE:
        if RELU:
            selected = tl.where(tl.load(y + out, mask=out_mask, other=0.0) > 0, selected, 0.0)
        tl.store(bar_g + out, selected, mask=out_mask)


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
    _statistics_kernel[grid](x, means, squares, counts, n, c, LOOPS=LOOPS, BLOCK=BLOCK, CHANNELS=channels)
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
    _forward_kernel[grid](
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
    _sums_kernel[grid](
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
    _apply_kernel[grid](
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
