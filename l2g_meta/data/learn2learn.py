"""Tasks from learn2learn's ``MetaDataset`` and ``Taskset``, its global ``random`` isolated.

Any benchmark or task set of learn2learn plugs into ``TaskPairs``:

- from a ``MetaDataset`` the classes are ours to split; its ``NWays``, ``KShots`` and ``LoadData`` load them;
- from a ready ``Taskset`` (``TaskDataset``) the classes are read from the sampled task description, before any label is
  renamed, and T_j is drawn again until it shares none with T_i.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from l2g_meta.data.dataset import contiguous
from l2g_meta.data.sources import disjoint_classes
from l2g_meta.errors import DataError
from l2g_meta.inner.clone import require_learn2learn
from l2g_meta.task import Task

MAX_REDRAWS = 1000


def learn2learn_source(dataset: Any) -> MetaDatasetSource | TasksetSource:
    """The task source for one of learn2learn's data sets or task sets."""
    return TasksetSource(dataset) if hasattr(dataset, "sample_task_description") else MetaDatasetSource(dataset)


class MetaDatasetSource:
    """Tasks of chosen classes of a ``MetaDataset``, through learn2learn's own transforms."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.labels = list(dataset.labels)

    def class_sizes(self) -> np.ndarray:
        """Examples of each class, (n_classes,)."""
        return np.array([len(self.dataset.labels_to_indices[label]) for label in self.labels])

    def draw(self, rng: np.random.Generator, shapes: Sequence[tuple[int, int, int]]) -> tuple[Task, ...]:
        """One task for each (ways, shots, queries), without a common class."""
        data = require_learn2learn().data
        tasks = []
        chosen = disjoint_classes(rng, len(self.labels), [ways for ways, _, _ in shapes])
        for picks, (n, shots, queries) in zip(chosen, shapes, strict=True):
            subset = self._subset([self.labels[pick] for pick in picks])
            taskset = data.Taskset(
                subset,
                [
                    data.transforms.NWays(subset, n=n),
                    data.transforms.KShots(subset, k=shots + queries),
                    data.transforms.LoadData(subset),
                ],
            )
            with isolated_random(int(rng.integers(2**32))):
                tasks.append(_load(taskset, taskset.sample_task_description(), subset.labels, shots))
        return tuple(tasks)

    def _subset(self, labels: list[Any]) -> Any:
        """A view of the data set that holds these classes alone."""
        subset = copy.copy(self.dataset)
        subset.labels = labels
        subset.labels_to_indices = {label: list(self.dataset.labels_to_indices[label]) for label in labels}
        subset.indices_to_labels = {i: label for label, rows in subset.labels_to_indices.items() for i in rows}
        return subset


class TasksetSource:
    """Tasks of a ready ``Taskset``, drawn again until they share no class."""

    def __init__(self, taskset: Any):
        self.taskset = taskset

    def class_sizes(self) -> None:
        """Unknown: a task set says only what it draws."""

    def draw(self, rng: np.random.Generator, shapes: Sequence[tuple[int, int, int]]) -> tuple[Task, ...]:
        """One task for each (ways, shots, queries), without a common class."""
        tasks: list[Task] = []
        taken: set[Any] = set()
        for n, shots, queries in shapes:
            for _ in range(MAX_REDRAWS):
                seed = int(rng.integers(2**32))
                with isolated_random(seed):
                    description = self._describe(rng)
                    counts = Counter(self._label(d) for d in description)
                    self._check(counts, n, shots, queries)
                    if taken.isdisjoint(counts):
                        tasks.append(_load(self.taskset, description, list(counts), shots))
                        break
            else:
                raise DataError(
                    f"need two tasks without a common class, got none in {MAX_REDRAWS} draws from this task set; pass "
                    "the MetaDataset it is made from, whose classes TaskPairs can split"
                )
            taken.update(counts)
        return tuple(tasks)

    def _label(self, description: Any) -> Any:
        return self.taskset.dataset.indices_to_labels[description.index]

    def _describe(self, rng: np.random.Generator) -> Any:
        if self.taskset.num_tasks == -1:
            return self.taskset.sample_task_description()
        # A finite set: its task i must be the same whenever it is first asked for.
        i = int(rng.integers(self.taskset.num_tasks))
        if i not in self.taskset.sampled_descriptions:
            with isolated_random(i):
                self.taskset.sampled_descriptions[i] = self.taskset.sample_task_description()
        return self.taskset.sampled_descriptions[i]

    @staticmethod
    def _check(counts: Counter[Any], ways: int, shots: int, queries: int) -> None:
        per_class = sorted(set(counts.values()))
        if len(counts) != ways or per_class != [shots + queries]:
            raise DataError(
                f"need tasks of {ways} classes × {shots + queries} examples (shots + queries), this task set gives "
                f"{len(counts)} × {'/'.join(map(str, per_class))}; change ways, shots and queries here or NWays and "
                "KShots there"
            )


@contextmanager
def isolated_random(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's (CPU) global generators seeded inside, as before outside.

    Example:
        >>> with isolated_random(0):
        ...     a = random.random()
        >>> with isolated_random(0):
        ...     a == random.random()
        True
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _load(taskset: Any, description: Any, labels: Sequence[Any], shots: int) -> Task:
    """The described task; labels are numbered by their position in ``labels``, whatever its transforms make of them."""
    try:
        x = contiguous(taskset.get_task(description)[0])
    except TypeError as error:
        raise DataError(
            f"need items that collate to tensors, got {error}; give the data set "
            "transform=torchvision.transforms.ToTensor()"
        ) from error
    number = {label: k for k, label in enumerate(labels)}
    y = torch.tensor([number[taskset.dataset.indices_to_labels[d.index]] for d in description])
    return Task.from_batch(x, y, shots=shots, n_way=len(labels))
