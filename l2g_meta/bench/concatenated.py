"""The T_i of several pairs in one pass through the encoder, exactly: statistics and gradients are each task's own.

All tasks have the same θ, so that a convolution's forward pass and its gradient with respect to its input are one call
for all images. Statistics, the gradient with respect to the weight, and what a cotangent of that gradient brings in the
double backward belong to one task each. Layers are given the weights T times over; that they are equal is what makes
the shared calls right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from l2g_meta.batch_norm import batch_norm
from l2g_meta.conv import Conv2d, Geometry
from l2g_meta.convert import convert
from l2g_meta.norm import BatchNorm2d, BatchNormReLU2d
from l2g_meta.task import Task


class TaskwiseConv2d(Conv2d):
    """Without bias, on the images of T tasks after each other, (T n, c, H, W); the weight is (T, d, c, k, l)."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _Conv.apply(input, weight, Geometry(self.stride, self.padding, self.dilation, self.groups))  # type: ignore[arg-type]


class TaskwiseBatchNorm2d(BatchNorm2d):
    """By the statistics of each task; weight and bias are (T, c). Running statistics stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised maps of all tasks."""
        return _each_task(x, self, relu=False, pool=False)


class TaskwiseBatchNormReLU2d(BatchNormReLU2d):
    """The same with ReLU and, if asked for, pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, rectified, pooled maps of all tasks."""
        return _each_task(x, self, relu=True, pool=self.pool)


def _each_task(x: Tensor, norm: nn.BatchNorm2d, *, relu: bool, pool: bool) -> Tensor:
    tasks = zip(x.chunk(len(norm.weight)), norm.weight, norm.bias, strict=True)
    return torch.cat([batch_norm(part, w, b, eps=norm.eps, relu=relu, pool=pool) for part, w, b in tasks])


TASKWISE: dict[type[nn.Module], type[nn.Module]] = {
    Conv2d: TaskwiseConv2d,
    BatchNorm2d: TaskwiseBatchNorm2d,
    BatchNormReLU2d: TaskwiseBatchNormReLU2d,
}


def task_gradients(model: Any, tasks: Sequence[Task]) -> dict[str, Tensor]:
    """The gradient of each task's loss, ``(T, *shape)`` for each parameter, to be differentiated once more.

    Args:
        model: a ``MetricModel`` of fused layers; its encoder's become taskwise, and from then on take such weights.
        tasks: of one shape.
    """
    encoder = convert(model.encoder, TASKWISE)
    stacked = {name: p.expand(len(tasks), *p.shape) for name, p in model.named_parameters()}
    images = torch.cat([torch.cat([task.support_x, task.query_x]) for task in tasks])
    features = torch.func.functional_call(encoder, _of("encoder", stacked), (images,)).chunk(len(tasks))
    losses = []
    for t, (task, z) in enumerate(zip(tasks, features, strict=True)):
        n, own = len(task.support_y), {name: p[t] for name, p in _of("head", stacked).items()}
        scores = torch.func.functional_call(model.head, own, (z[:n], task.support_y, z[n:], task.n_way))
        losses.append(model.loss_fn(scores, task.query_y))
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(stacked.values()), create_graph=True)
    return dict(zip(stacked, gradients, strict=True))


def _of(part: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): p for name, p in parameters.items() if name.startswith(f"{part}.")}


class _Conv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return torch.conv2d(x, w[0], None, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return *_ConvBackward.apply(g, x, w, ctx.geometry, ctx.needs_input_grad[0]), None


class _ConvBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, images: bool
    ) -> tuple[Tensor | None, Tensor]:
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        return _wrt_input(g, x, w[0], geometry) if images else None, _wrt_weights(g, x, w, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor) -> tuple[Tensor | None, ...]:
        g, x, w = ctx.saved_tensors
        chunks = list(zip(g.chunk(len(w)), x.chunk(len(w)), vw, strict=True))
        bar_g = torch.cat([torch.conv2d(x_t, v, None, *ctx.geometry) for _, x_t, v in chunks])
        bar_x = bar_w = None
        if ctx.needs_input_grad[1]:
            bar_x = torch.cat([_wrt_input(g_t, x_t, v, ctx.geometry) for g_t, x_t, v in chunks])
        if vx is not None:
            bar_g = bar_g + torch.conv2d(vx, w[0], None, *ctx.geometry)
            bar_w = _wrt_weights(g, vx, w, ctx.geometry)
        return bar_g, bar_x, bar_w, None, None


def _wrt_input(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    return _backward(g, x, w, geometry, 0)


def _wrt_weights(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    tasks = zip(g.chunk(len(w)), x.chunk(len(w)), w, strict=True)
    return torch.stack([_backward(g_t, x_t, w_t, geometry, 1) for g_t, x_t, w_t in tasks])


def _backward(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: int) -> Tensor:
    stride, padding, dilation, groups = geometry
    mask = [i == wanted for i in range(3)]
    return torch.ops.aten.convolution_backward(g, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask)[
        wanted
    ]
