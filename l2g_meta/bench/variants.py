"""The rows of the bench: ways to compute a (meta-)gradient, each from a model and a case to ``step(pairs)``.

A step adds the gradient of the mean loss over the pairs to ``.grad``. Except for ``episodic``, the mix and first order,
all compute the same gradient. learn2learn runs on PyTorch's own layers, as its users do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.bench.case import OURS, Case, Layers, build
from l2g_meta.errors import L2GError, did_you_mean
from l2g_meta.inner.clone import require_learn2learn
from l2g_meta.models.metric import MetricModel
from l2g_meta.task import Task
from l2g_meta.training.objectives import Objective, episodic, l2g, meta_gradient

Pairs = Sequence[tuple[Task, Task]]
Step = Callable[[Pairs], None]
Make = Callable[[Any, Case], Step]


class Variant(NamedTuple):
    """One row of the bench."""

    make: Make
    layers: Layers = "stock"
    channels_last: bool = False  # the memory format of the weights
    needs: str | None = None  # package
    base: str = "episodic, own network"  # two plain episodes on the same layers


def ours(objective: Objective, **options: Any) -> Make:
    """``L2GWrapper`` under an objective: on pairs, or on each task of theirs by itself."""

    def make(model: nn.Module, case: Case) -> Step:
        autocast = torch.bfloat16 if case.precision == "bf16" else None
        wrapper = L2GWrapper(model, case.inner_lr, inner_steps=case.inner_steps, autocast=autocast, **options)

        def step(pairs: Pairs) -> None:
            alone = [(task,) for pair in pairs for task in pair]
            meta_gradient(objective, wrapper, pairs if objective is l2g else alone)

        return step

    return make


def each_pair(backward: Callable[[Task, Task, int], object]) -> Step:
    """A step that takes the pairs one after the other: T_i, T_j, and how many pairs their mean is over."""

    def step(pairs: Pairs) -> None:
        for task_i, task_j in pairs:
            backward(task_i, task_j, len(pairs))

    return step


def learn2learn(model: MetricModel, case: Case) -> Step:
    """learn2learn's own ``MAML``, as its examples use it."""
    maml = require_learn2learn().algorithms.MAML(model, lr=case.inner_lr)

    def backward(task_i: Task, task_j: Task, n: int) -> None:
        learner = maml.clone()
        for _ in range(case.inner_steps):
            learner.adapt(model.loss_fn(learner(task_i), task_i.query_y))
        (model.loss_fn(learner(task_j), task_j.query_y) / n).backward()

    return each_pair(backward)


_fused = partial(Variant, layers="fused", base="episodic")
_channels_last = partial(Variant, channels_last=True, base="episodic, own network, channels-last")
VARIANTS: dict[str, Variant] = {
    "episodic": _fused(ours(episodic)),
    "episodic, own network": Variant(ours(episodic)),
    "episodic, own network, channels-last": _channels_last(ours(episodic)),
    "l2g": _fused(ours(l2g)),
    "l2g, mix 0.5": _fused(ours(l2g, mix=0.5)),
    "l2g, first order": _fused(ours(l2g, first_order=True)),
    "l2g, own network": Variant(ours(l2g)),
    "l2g, own network, channels-last": _channels_last(ours(l2g)),
    "l2g, own network, stock operators": Variant(ours(l2g, fast=False)),
    "learn2learn": Variant(learn2learn, needs="learn2learn"),
}


def available(
    case: Case, names: Sequence[str] | None = None, *, say: Callable[[str], object] = print
) -> dict[str, Variant]:
    """The rows of these names, or all; those that cannot run here are left out, with a line, if they were not named.

    Raises:
        L2GError: for an unknown name, or a named row whose package or device is missing.
    """
    chosen = {}
    for name in names or VARIANTS:
        if name not in VARIANTS:
            raise L2GError(f"need variants of {'; '.join(VARIANTS)}; got {name!r}{did_you_mean(name, VARIANTS)}")
        row, missing = VARIANTS[name], None
        if row.needs is not None and importlib.util.find_spec(row.needs) is None:
            missing = f"the package {row.needs}; pip install l2g-meta[learn2learn]"
        elif row.layers == "fused" and case.backbone not in OURS:
            missing = "fused layers, which only conv4 and resnet12 have; leave it out"
        if missing is None:
            chosen[name] = row
        elif names:
            raise L2GError(f"the variant {name!r} needs {missing}")
        elif row.needs:
            say(f"left out: {name}: it needs {missing}")
    return chosen


def prepare(name: str, case: Case, model: MetricModel | None = None) -> Step:
    """A row's step on the case's model, or on another one that has the row's layers."""
    variant = VARIANTS[name]
    model = build(case, layers=variant.layers) if model is None else model
    return variant.make(model.to(memory_format=torch.channels_last) if variant.channels_last else model, case)
