"""What runs on the CUDA device: the programs that ``kernels.triton`` starts, each on a block of windows and channels.

A window is a pixel, or the 2×2 pixels of a pooling; see there.
"""

import triton
import triton.language as tl


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
def statistics_kernel(
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
def forward_kernel(
    x, y, where, scale, shift, sign, windows, height, width, C,
    RELU: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes y = S(scale x + shift), and with POOL which pixel of each window it is."""
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
def sums_kernel(
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
def apply_kernel(
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
