"""What a training descends: L2G, and what it is compared with, as functions from (wrapper, tasks) to an ``Outcome``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l2g_meta.algorithm import L2GWrapper, Learner, Outcome
from l2g_meta.task import Task

Objective = Callable[..., Outcome]


def l2g(wrapper: L2GWrapper, task_i: Task, task_j: Task) -> Outcome:
    """Algorithm 1, T_i and T_j without a common class; see ``L2GWrapper.outcome``."""
    return wrapper.outcome(task_i, task_j)


def maml(wrapper: L2GWrapper, task: Task) -> Outcome:
    r"""MAML + X of the paper's tables: :math:`L(\theta - \alpha \nabla L(\theta; T); T)`, both losses on one task.

    The inner loss uses queries, as Algorithm 1 does (on 1-shot supports alone a metric loss is degenerate).
    """
    return wrapper.outcome(task, task)


def episodic(wrapper: L2GWrapper, *tasks: Task) -> Outcome:
    r"""Episodic training (Vinyals et al. 2016; Snell et al. 2017): the mean of :math:`L(\theta; T)` over the tasks."""
    losses = [wrapper.loss(task) for task in tasks]
    return Outcome(torch.stack(losses).mean())


OBJECTIVES: dict[str, Objective] = {"episodic": episodic, "maml": maml, "l2g": l2g}


class UpdateStats(NamedTuple):
    """Means over the pairs of one update; NaN where a method has no such thing."""

    loss: float
    inner_loss: float
    alignment: float


def meta_gradient(objective: Objective, wrapper: L2GWrapper, batch: Sequence[Sequence[Task]]) -> UpdateStats:
    r"""Adds the gradient of the mean outer loss to ``.grad``, one pair's graph at a time.

    Args:
        objective: one of the functions above.
        wrapper: holds the model and the step sizes.
        batch: the tasks of each of the B pairs (or of each task, for ``maml`` and ``episodic``).

    Returns:
        Mean losses, and the alignment :math:`\sum_k \alpha_k g_{i,k} g_{j,k} / L(\theta'; T_j)`. Near 0 the inner step
        does nothing for T_j, above about 1 it is unstable, below 0 it went too far or the wrong way.

    Example:
        >>> from l2g_meta import Conv4, MetricModel, PrototypicalHead
        >>> wrapper = L2GWrapper(MetricModel(Conv4(1, 8), PrototypicalHead()), 0.01)
        >>> x, y = torch.randn(2, 10, 1, 16, 16), torch.arange(10) % 5
        >>> pair = [Task(x[k, :5], y[:5], x[k, 5:], y[5:], 5) for k in (0, 1)]
        >>> stats = meta_gradient(l2g, wrapper, [pair])
        >>> stats.loss > 0, all(p.grad is not None for p in wrapper.parameters())
        (True, True)
    """
    return UpdateStats(*accumulate(objective, wrapper, batch).tolist())


def accumulate(
    objective: Objective, wrapper: L2GWrapper, batch: Sequence[Sequence[Task]], *, of: int | None = None
) -> Tensor:  # (3,)
    """``meta_gradient`` without waiting for the device: its means, as ``UpdateStats`` orders them.

    ``of`` is the number of pairs of the update, where ``batch`` is a part of them: gradients and means then are its
    share, to be summed over the parts.
    """
    of, totals = of or len(batch), [] if batch else [next(wrapper.parameters()).new_zeros(3)]
    for tasks in batch:
        loss, inner, outer, learner = objective(wrapper, *tasks)
        products = _watch_alignment(learner)
        (loss / of).backward()
        unknown = torch.full_like(loss, torch.nan)
        inner = unknown if inner is None else inner
        there = loss if outer is None else (1 - wrapper.mix) * outer  # what has a gradient at θ'
        alignment = sum(products) * of / there if products else unknown
        totals.append(torch.stack([loss, inner, alignment]).detach())
    return torch.stack(totals).sum(0) / of


def _watch_alignment(learner: Learner | None) -> list[Tensor]:
    """Filled by the backward pass with −(θ' − θ)·g_j of each parameter, g_j at θ'."""
    products: list[Tensor] = []
    if learner is None:
        return products
    adapted = dict(learner.module.named_parameters())
    for name, update in learner.updates.items():
        step = update.detach()
        adapted[name].register_hook(lambda g, step=step: products.append(-(step * g).sum()))
    return products
