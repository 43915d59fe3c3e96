"""ReLU and max-pooling as operators: they select values, and their second derivative selects the same ones.

PyTorch's double backward of both also hands back a map of zeros for the input, which is written, read and added.

Shapes:
    (n, c, H, W) -> (n, c, H', W') for pooling, any shape -> the same for ReLU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from l2g_meta.operators import is_plain, watched
from l2g_meta.operators.batch_norm import pooled_norm
from l2g_meta.operators.norm_passes import add_at, is_channels_last, positions, take

aten = torch.ops.aten


def relu(x: Tensor, slope: float = 0.0, *, inplace: bool = False) -> Tensor:
    """The input where it is positive, elsewhere ``slope`` times it, with a slope of at least 0; of the same shape.

    Example:
        >>> relu(torch.tensor([-2.0, 3.0])).tolist(), relu(torch.tensor([-2.0, 3.0]), 0.5).tolist()
        ([0.0, 3.0], [-1.0, 3.0])
    """
    return _ReLU.apply(x, slope, inplace)


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
    y, where = _maxima(x.detach(), (size, stride, padding, dilation, ceil_mode))
    is_relu = is_plain(x.grad_fn, _ReLU) and not x.retains_grad and torch.is_grad_enabled()
    pooled = pooled_norm(x, y, where) if is_relu else None
    return _Taken.apply(x, positions(where, x), (y,)) if pooled is None else pooled


@watched
class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
            y = aten.relu_(x) if slope == 0 else aten.leaky_relu_(x, slope)
        else:
            y = aten.relu(x) if slope == 0 else aten.leaky_relu(x, slope)
        ctx.slope, ctx.plain = slope, slope == 0
        ctx.save_for_backward(x if slope and not inplace else y)  # of one sign; as PyTorch's, which may be written to
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Selected.apply(g, *ctx.saved_tensors, ctx.slope), None, None


class _Selected(Function):
    """g where y is positive, elsewhere ``slope`` g: linear in g, and its derivative by y is 0."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(y)
        return aten.threshold_backward(g, y, 0) if slope == 0 else aten.leaky_relu_backward(g, y, slope, True)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        return _Selected.apply(v, *ctx.saved_tensors, ctx.slope), None, None


def _maxima(x: Tensor, window: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What pooling gives, and where it was. On a CPU the pass over contiguous maps is slower than copies around it."""
    if x.device.type != "cpu" or not x.is_contiguous():
        return aten.max_pool2d_with_indices(x, *window)
    y, where = aten.max_pool2d_with_indices(x.contiguous(memory_format=torch.channels_last), *window)
    return y.new_empty(y.shape).copy_(y), where.new_empty(y.shape).copy_(where)  # strides of maps of 1 × 1 as well


class _Taken(Function):
    """The values of maps at positions in their memory, or as they are known: linear in the maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, known: tuple[Tensor, ...]) -> Tensor:
        ctx.kind = x.shape, torch.channels_last if is_channels_last(x) else torch.contiguous_format
        ctx.save_for_backward(at)
        return known[0] if known else take(x, at)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(g, *ctx.saved_tensors, *ctx.kind), None, None


class _Spread(Function):
    """Each value added to where it was taken, in maps of zeros; linear in the values."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, at: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(at)
        zeros = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout).zero_()
        return add_at(zeros, at, g)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None, None]:
        return _Taken.apply(v.contiguous(memory_format=ctx.layout), *ctx.saved_tensors, ()), None, None, None
