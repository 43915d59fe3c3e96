"""Whole updates, each with its own way to the data: tasks are drawn, the meta-gradient taken, Adam steps.

This is what a training loop pays for, where ``variants`` times the gradient on tasks that are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import TensorDataset

from l2g_meta.bench.case import Case
from l2g_meta.bench.variants import Layers, Pairs, Step, wrapped
from l2g_meta.bench.variants import learn2learn as learn2learn_step
from l2g_meta.data.learn2learn import isolated_random
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.data.sources import indexed
from l2g_meta.inner.clone import require_learn2learn
from l2g_meta.task import Task

LR = 1e-3  # β, Adam's step size
LEARN2LEARN = "learn2learn, own data path"


class Update(NamedTuple):
    """One row of the bench: ``make(model, case, stream)`` gives a function that does one update."""

    make: Callable[[Any, Case, TaskPairs], Callable[[], Any]]
    layers: Layers = "stock"
    exact: bool = True  # the exact meta-gradient
    needs: str | None = None  # package
    cuda: bool = False  # runs on CUDA devices only
    base: str = ""  # no episodes: a whole update stands against learn2learn's


def eager(model: Any, case: Case, stream: TaskPairs, *, fast: bool = True) -> Callable[[], None]:
    """Algorithm 1 as ``l2g train --mix 0`` runs it; not ``fast``: on PyTorch's own double backward."""
    count, step = itertools.count(), wrapped(fast=fast)(model, case.inner_lr, case.inner_steps)
    return _with_adam(model, step, lambda: stream.batch(_positions(case, next(count))))


def learn2learn(model: Any, case: Case, stream: TaskPairs) -> Callable[[], None]:
    """learn2learn's loop as in its examples: each task from its ``Taskset``, moved to the device, then ``MAML``.

    The images are in memory as float32, normalised, which is more than its own data sets offer. T_i and T_j are two
    draws; that they may share a class changes no cost.
    """
    library, data = require_learn2learn().data, indexed(stream.source).dataset
    images = data.gather(torch.arange(len(data))).cpu()  # (n, C, H, W)
    dataset = library.MetaDataset(TensorDataset(images, torch.from_numpy(data.labels)))
    transforms = library.transforms
    taskset = library.Taskset(
        dataset,
        [
            transforms.FusedNWaysKShots(dataset, n=case.ways, k=case.shots + case.queries),
            transforms.LoadData(dataset),
            transforms.RemapLabels(dataset),
        ],
    )
    seeds = itertools.count()

    def task() -> Task:
        x, y = taskset.sample()
        return Task.from_batch(x, y, shots=case.shots, n_way=case.ways).to(case.device)

    def draw() -> Pairs:
        with isolated_random(next(seeds)):  # it draws from the global generators
            return [(task(), task()) for _ in range(case.pairs)]

    return _with_adam(model, learn2learn_step(model, case.inner_lr, case.inner_steps), draw)


def _positions(case: Case, k: int) -> range:
    """The pairs of the stream that update k takes."""
    return range(k * case.pairs, (k + 1) * case.pairs)


def _with_adam(model: Any, step: Step, draw: Callable[[], Pairs]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), LR)

    def update() -> None:
        optimizer.zero_grad()
        step(draw())
        optimizer.step()

    return update


UPDATES: dict[str, Update] = {
    LEARN2LEARN: Update(learn2learn, needs="learn2learn"),
    "l2g, data included": Update(eager, layers="fused"),
    "l2g, own network, stock operators, data included": Update(partial(eager, fast=False)),
}
