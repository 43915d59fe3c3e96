"""The T_i of several pairs in one pass through the encoder, exactly: statistics and gradients are each task's own.

All tasks have the same θ, so that a convolution's forward pass and its gradient with respect to its input are one call
for all images, and so is the double backward of the latter. Statistics, the gradient with respect to the weight, and
its double backward belong to one task each. Layers are given the weights T times over; that they are equal is what
makes the shared calls right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from l2g_meta.convert import convert
from l2g_meta.models.batchnorm_policy import BatchNorm2d, BatchNormReLU2d
from l2g_meta.operators.batch_norm import batch_norm
from l2g_meta.operators.convolution import Conv2d, Geometry, conv2d_backward
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
    own = [{name: p[t] for name, p in _of("head", stacked).items()} for t in range(len(tasks))]
    loss = summed_loss(
        model,
        tasks,
        encoder=lambda images: torch.func.functional_call(encoder, _of("encoder", stacked), (images,)),
        heads=[lambda *given, p=p: torch.func.functional_call(model.head, p, given) for p in own],
    )
    gradients = torch.autograd.grad(loss, list(stacked.values()), create_graph=True)
    return dict(zip(stacked, gradients, strict=True))


def summed_loss(
    model: Any, tasks: Sequence[Task], *, encoder: Callable[..., Any], heads: Sequence[Callable[..., Any]]
) -> Tensor:  # ()
    """The tasks' losses, all images in one pass through the encoder, each task's features to its head."""
    images = [torch.cat([task.support_x, task.query_x]) for task in tasks]
    features = encoder(torch.cat(images)).split([len(x) for x in images])
    losses = []
    for task, z, head in zip(tasks, features, heads, strict=True):
        n = len(task.support_y)
        losses.append(model.loss_fn(head(z[:n], task.support_y, z[n:], task.n_way), task.query_y))
    return torch.stack(losses).sum()


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
        gx = None
        if ctx.needs_input_grad[0]:
            gx = conv2d_backward(g, x, w[0], ctx.geometry, (True, False, False))[0]
        tasks = zip(g.chunk(len(w)), x.chunk(len(w)), w, strict=True)
        gw = [conv2d_backward(g_t, x_t, w_t, ctx.geometry, (False, True, False))[1] for g_t, x_t, w_t in tasks]
        return gx, torch.stack(gw), None  # type: ignore[arg-type]
