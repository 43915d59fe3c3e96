"""Tasks and class-disjoint task pairs, each a function of (seed, position) alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch

from l2g_meta.data.augment import Augment
from l2g_meta.data.sources import TaskRows, TaskSource, task_source
from l2g_meta.data.stream import Stream, checked_length
from l2g_meta.errors import DataError
from l2g_meta.task import Task

Choice = int | Collection[int]  # a number, or a set of them to draw from for each task


class TaskShape(NamedTuple):
    """Ways, shots and queries per class of a task: numbers, or sets to draw from."""

    ways: Choice
    shots: Choice
    queries: Choice

    def checked(self, name: str) -> TaskShape:
        """The shape itself, if its numbers are positive."""
        for field, choice in zip(self._fields, self, strict=True):
            numbers = values(choice) if isinstance(choice, int | np.integer | np.ndarray | Collection) else []
            if not numbers or not all(isinstance(v, int | np.integer) and v >= 1 for v in numbers):
                raise DataError(f"need {name}{field} to be a positive integer or a set of them, got {choice!r}")
        return self

    @property
    def largest(self) -> tuple[int, int]:
        """Most ways, and most examples per class."""
        return max(values(self.ways)), max(values(self.shots)) + max(values(self.queries))

    def draw(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """One (ways, shots, queries)."""
        ways, shots, queries = (v[0] if len(v) == 1 else v[rng.integers(len(v))] for v in map(values, self))
        return ways, shots, queries


class TaskPairs(Stream[tuple[Task, Task]]):
    """Pairs (T_i, T_j) of tasks without a common class, the input of L2G.

    ``pairs[k]`` depends on (seed, k) alone: resuming, the order of access and the number of workers change nothing, and
    no global generator is used. Both tasks' classes are drawn as one set of distinct classes, then split. Without a
    length, every k ≥ 0 is a position; with one, pairs are a sequence, and ``loader`` makes a ``DataLoader`` of them.

    Args:
        dataset: a ``ClassDataset``, any map-style data set with ``targets`` or ``labels``, or learn2learn's
            ``MetaDataset``, ``Taskset`` or ``TaskDataset`` (see ``l2g_meta.data.learn2learn``).
        ways: classes of T_i; a number, or a set to draw from for each task. So for all six numbers.
        shots: supports per class of T_i.
        queries: queries per class of T_i.
        outer_ways: classes of T_j; as T_i's by default. So for the next two.
        outer_shots: supports per class of T_j.
        outer_queries: queries per class of T_j.
        seed: of the stream of pairs.
        length: pairs of an epoch; by default there is no end. ``pairs[k]`` is the same with and without.
        augment: vary the images, supports and queries alike (crop, flip, colours); for uint8 ``ClassDataset``.
        device: where the tasks are wanted; a ``ClassDataset`` is moved there once, if it fits (see
            ``l2g_meta.data.host``). By default, where the data is.

    Raises:
        DataError: if the data set has too few classes or images, with what would fit.

    Example:
        >>> from l2g_meta.data import ClassDataset
        >>> data = ClassDataset(torch.randn(40, 1, 8, 8), torch.arange(40) // 4)
        >>> task_i, task_j = TaskPairs(data, ways=5, shots=1, queries=3)[7]
        >>> task_i.support_x.shape, task_j.query_y.tolist()
        (torch.Size([5, 1, 8, 8]), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4])
    """

    def __init__(
        self,
        dataset: Any,
        *,
        ways: Choice,
        shots: Choice,
        queries: Choice,
        outer_ways: Choice | None = None,
        outer_shots: Choice | None = None,
        outer_queries: Choice | None = None,
        seed: int = 0,
        length: int | None = None,
        augment: Augment | None = None,
        device: torch.device | str | None = None,
    ):
        inner = TaskShape(ways, shots, queries).checked("")
        outer = TaskShape(
            ways if outer_ways is None else outer_ways,
            shots if outer_shots is None else outer_shots,
            queries if outer_queries is None else outer_queries,
        ).checked("outer_")
        self.shapes, self.source = (inner, outer), task_source(dataset, device, augment)
        self.seed, self.length, self.device = checked_seed(seed), checked_length(length), device
        check_enough(self.source, inner, outer)

    def batch(self, positions: Sequence[int]) -> list[tuple[Task, Task]]:
        """The pairs at these positions; their images in one gather, where the data is class-indexed."""
        tasks = self._tasks(positions)
        return list(zip(tasks[0::2], tasks[1::2], strict=True))


class Episodes(Stream[Task]):
    """Single tasks, for evaluation and episodic training; ``episodes[k]`` depends on (seed, k) alone.

    Args:
        dataset: as for ``TaskPairs``.
        ways: classes; a number, or a set to draw from. So for the next two.
        shots: supports per class.
        queries: queries per class.
        seed: an integer or several (for example episode seed and run), of the stream.
        length: as for ``TaskPairs``.
        device: as for ``TaskPairs``.

    Raises:
        DataError: if the data set has too few classes or images, with what would fit.

    Example:
        >>> from l2g_meta.data import ClassDataset
        >>> data = ClassDataset(torch.randn(20, 1, 8, 8), torch.arange(20) // 4)
        >>> Episodes(data, ways=5, shots=1, queries=3)[0].n_way
        5
    """

    def __init__(
        self,
        dataset: Any,
        *,
        ways: Choice,
        shots: Choice,
        queries: Choice,
        seed: int | Sequence[int] = 0,
        length: int | None = None,
        device: torch.device | str | None = None,
    ):
        self.shapes, self.source = (TaskShape(ways, shots, queries).checked(""),), task_source(dataset, device)
        self.seed, self.length, self.device = checked_seed(seed), checked_length(length), device
        check_enough(self.source, *self.shapes)

    def batch(self, positions: Sequence[int]) -> list[Task]:
        """The tasks at these positions; their images in one gather, where the data is class-indexed."""
        return self._tasks(positions)

    def rows(self, k: int) -> TaskRows:
        """The rows of the task at position k, for a class-indexed data set."""
        ((rows,), _) = self.draw([k])
        return rows


def check_enough(source: TaskSource, *shapes: TaskShape) -> None:
    """That the largest tasks of these shapes fit together.

    Raises:
        DataError: with the counts, and what would fit.
    """
    sizes = source.class_sizes()
    if sizes is None:
        return
    kind = "a disjoint pair" if len(shapes) > 1 else "a task"
    if (needed := sum(shape.largest[0] for shape in shapes)) > len(sizes):
        split = getattr(getattr(source, "dataset", None), "split", "")
        fit = len(sizes) // len(shapes)
        raise DataError(
            f"{kind} needs {needed} classes, the {split + ' ' if split else ''}split has {len(sizes)}; "
            + (f"lower ways to {fit}{' each' if len(shapes) > 1 else ''}, or add classes" if fit > 1 else "add classes")
        )
    examples = max(shape.largest[1] for shape in shapes)
    if sizes.min() < examples:
        small = int((sizes < examples).sum())
        raise DataError(
            f"shots + queries needs {examples} examples of every class, {small} of {len(sizes)} classes have fewer "
            f"(the smallest has {sizes.min()}); "
            + (f"lower shots + queries to {sizes.min()} or " if sizes.min() > 1 else "")
            + "leave those classes out"
        )


def checked_seed(seed: int | Sequence[int]) -> list[int]:
    """The seed as a list of integers of at least 0."""
    seeds = values(seed)
    if not seeds or not all(isinstance(s, int | np.integer) and s >= 0 for s in seeds):
        raise DataError(f"need a seed of integers of at least 0, got {seed!r}")
    return seeds


def values(choice: Choice) -> list[int]:
    """The numbers of a choice.

    Example:
        >>> values(5), values({10, 5})
        ([5], [5, 10])
    """
    if isinstance(choice, int | np.integer):
        return [int(choice)]
    return sorted(choice) if isinstance(choice, Set) else list(choice)


def listed(choice: Choice) -> str:
    """A choice in words.

    Example:
        >>> listed(5), listed((5, 10))
        ('5', '5/10')
    """
    return "/".join(map(str, values(choice)))
