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

from l2g_meta.operators.norm_passes import take

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
    return _MaxPool.apply(x, (size, stride, padding, dilation, ceil_mode))[0]


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
            y = x.relu_() if slope == 0 else torch.nn.functional.leaky_relu_(x, slope)
        else:
            y = x.relu() if slope == 0 else torch.nn.functional.leaky_relu(x, slope)
        ctx.slope = slope
        ctx.save_for_backward(y)
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
