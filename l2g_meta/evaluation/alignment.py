r"""How much what one task teaches helps another: what L2G rewards, measured on any classes.

To first order (eq. 3 and 4)

.. math:: L(\theta - \alpha g_i; T_j) = L(\theta; T_j) - \alpha\, g_i \cdot g_j + O(\alpha^2)

so that descending it also makes the gradients of disjoint tasks more alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.models.batchnorm_policy import batchnorm_policy
from l2g_meta.task import Task


class Alignment(NamedTuple):
    """Means over pairs of tasks, at θ, BatchNorm by running statistics.

    Args:
        cosine: of the angle between g_i and g_j.
        slope: g_i · g_j / L(θ; T_j): by how much a step of size α on T_i lowers the loss of T_j, relative and per α.
        loss: L(θ; T_j).
    """

    cosine: float
    slope: float
    loss: float


def alignment(wrapper: L2GWrapper, pairs: TaskPairs, n: int) -> Alignment:
    """The alignment of the gradients of the first n pairs; the model is left as it was.

    Args:
        wrapper: holds the model and its loss.
        pairs: of tasks, on the model's device.
        n: how many of them.

    Example:
        >>> from l2g_meta import Conv4, MetricModel, PrototypicalHead
        >>> from l2g_meta.data import load
        >>> wrapper = L2GWrapper(MetricModel(Conv4(1, 8), PrototypicalHead()), 0.01)
        >>> found = alignment(wrapper, TaskPairs(load("glyphs", "validation"), ways=5, shots=1, queries=2), 2)
        >>> -1 <= found.cosine <= 1, found.loss > 0
        (True, True)
    """
    with batchnorm_policy(wrapper.module, "running"):
        found = [_of_pair(wrapper, *pairs[k]) for k in range(n)]
    return Alignment(*torch.stack(found).mean(0).tolist())


def task_gradient(wrapper: L2GWrapper, task: Task) -> tuple[Tensor, Tensor]:  # (), (n_parameters,)
    """L(θ; T), and its gradient with respect to all trainable parameters of the model in a row."""
    loss = wrapper.loss(task)
    parameters = [p for p in wrapper.module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([g.flatten() for g in found])


def _of_pair(wrapper: L2GWrapper, task_i: Task, task_j: Task) -> Tensor:  # (3,)
    (_, g_i), (loss, g_j) = (task_gradient(wrapper, task) for task in (task_i, task_j))
    product = g_i @ g_j
    return torch.stack([product / (g_i.norm() * g_j.norm()), product / loss, loss])
