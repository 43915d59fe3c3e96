"""Tasks and class-disjoint task pairs, each a function of (seed, position) alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from l2g_meta.data.augment import Augment, Draws
from l2g_meta.data.classes import ClassDataset, MapDataset, draw_classes
from l2g_meta.data.placement import placed
from l2g_meta.errors import DataError
from l2g_meta.task import Task

Shapes = Sequence[tuple[int, int, int]]  # (ways, shots, queries) of tasks without a common class
Choice = int | Collection[int]  # a number, or a set of them to draw from for each task


class ClassIndexed(Protocol):
    """What tasks are drawn from: rows by class, and inputs by row. ``ClassDataset`` is one."""

    @property
    def index(self) -> Sequence[np.ndarray]:
        """Rows of each class."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Inputs of the rows, (len(rows), ...)."""
        ...


class TaskRows(NamedTuple):
    """A task as rows of a data set: (n_support,), (n_support,), (n_query,), (n_query,), and the classes drawn."""

    support: np.ndarray
    support_y: np.ndarray
    query: np.ndarray
    query_y: np.ndarray
    classes: np.ndarray


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


class TaskPairs:
    """Pairs (T_i, T_j) of tasks without a common class, the input of L2G.

    ``pairs[k]`` depends on (seed, k) alone: resuming, the order of access and the number of workers change nothing, and
    no global generator is used. Both tasks' classes are drawn as one set of distinct classes, then split.

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
        augment: vary the images (crop, flip, colours), supports and queries alike; for uint8 ``ClassDataset``.
        device: where the tasks are wanted; a ``ClassDataset`` is moved there once, if it fits (see
            ``l2g_meta.data.placement``). By default, where the data is.

    Raises:
        DataError: if the data set has too few classes or images, with what would fit.

    Example:
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
        augment: Augment | None = None,
        device: torch.device | str | None = None,
    ):
        self.inner = TaskShape(ways, shots, queries).checked("")
        self.outer = TaskShape(
            ways if outer_ways is None else outer_ways,
            shots if outer_shots is None else outer_shots,
            queries if outer_queries is None else outer_queries,
        ).checked("outer_")
        self.source = task_source(dataset, device, augment)
        self.seed, self.device = checked_seed(seed), device
        check_enough(self.source, self.inner, self.outer)

    def __getitem__(self, k: int) -> tuple[Task, Task]:
        """The pair at position k ≥ 0 of the stream."""
        (pair,) = self.batch([k])
        return pair

    def batch(self, positions: Sequence[int]) -> list[tuple[Task, Task]]:
        """The pairs at these positions; their images in one gather, where the data is class-indexed."""
        if isinstance(self.source, IndexedSource):
            drawn = self.source.load(*self.draw(positions))
        else:
            drawn = [t for rng, own in self._shapes(positions) for t in self.source.draw(rng, own)]
        tasks = [task.to(self.device) for task in drawn]
        return list(zip(tasks[0::2], tasks[1::2], strict=True))

    def draw(self, positions: Sequence[int]) -> tuple[list[TaskRows], Draws | None]:
        """T_i, T_j, T_i, … of these positions as rows of a class-indexed data set, and how their images are varied."""
        return indexed(self.source).draw_all(self._shapes(positions))

    @property
    def fixed(self) -> bool:
        """Whether all pairs have tasks of the same shapes."""
        return all(len(values(choice)) == 1 for shape in (self.inner, self.outer) for choice in shape)

    def _shapes(self, positions: Sequence[int]) -> list[tuple[np.random.Generator, Shapes]]:
        generators = [generator(self.seed, k) for k in positions]
        return [(rng, (self.inner.draw(rng), self.outer.draw(rng))) for rng in generators]


class Episodes:
    """Single tasks, for evaluation and episodic training; ``episodes[k]`` depends on (seed, k) alone.

    Args:
        dataset: as for ``TaskPairs``.
        ways: classes; a number, or a set to draw from. So for the next two.
        shots: supports per class.
        queries: queries per class.
        seed: an integer or several (for example episode seed and run), of the stream.
        device: as for ``TaskPairs``.

    Raises:
        DataError: if the data set has too few classes or images, with what would fit.

    Example:
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
        device: torch.device | str | None = None,
    ):
        self.shape = TaskShape(ways, shots, queries).checked("")
        self.source = task_source(dataset, device)
        self.seed, self.device = checked_seed(seed), device
        check_enough(self.source, self.shape)

    def __getitem__(self, k: int) -> Task:
        """The task at position k ≥ 0 of the stream."""
        rng = generator(self.seed, k)
        (task,) = self.source.draw(rng, (self.shape.draw(rng),))
        return task.to(self.device)

    def rows(self, k: int) -> TaskRows:
        """The rows of ``self[k]``, for a class-indexed data set."""
        rng = generator(self.seed, k)
        (rows,) = indexed(self.source).rows(rng, (self.shape.draw(rng),))
        return rows


class TaskSource(Protocol):
    """Draws tasks without a common class."""

    def draw(self, rng: np.random.Generator, shapes: Shapes) -> Sequence[Task]:
        """One task for each (ways, shots, queries)."""
        ...

    def class_sizes(self) -> np.ndarray | None:
        """Examples of each class (n_classes,), or ``None`` where only drawing can tell."""
        ...


class IndexedSource:
    """Tasks from a class-indexed data set: rows first, then one gather for all tasks."""

    def __init__(self, dataset: Any, augment: Augment | None = None):
        self.dataset, self.augment = dataset, augment

    def classes(self, rng: np.random.Generator, shapes: Shapes) -> list[np.ndarray]:
        """Classes of each task, drawn as one set of distinct ones, then split."""
        return draw_classes(rng, len(self.dataset.index), [ways for ways, _, _ in shapes])

    def rows(self, rng: np.random.Generator, shapes: Shapes) -> tuple[TaskRows, ...]:
        """Rows of tasks without a common class, one for each (ways, shots, queries)."""
        index = self.dataset.index
        tasks = []
        for chosen, (n, shots, queries) in zip(self.classes(rng, shapes), shapes, strict=True):
            drawn = np.stack([rng.choice(index[c], shots + queries, replace=False) for c in chosen])
            tasks.append(
                TaskRows(
                    drawn[:, :shots].reshape(-1),
                    np.repeat(np.arange(n), shots),
                    drawn[:, shots:].reshape(-1),
                    np.repeat(np.arange(n), queries),
                    chosen,
                )
            )
        return tuple(tasks)

    def draw_all(self, shapes: Sequence[tuple[np.random.Generator, Shapes]]) -> tuple[list[TaskRows], Draws | None]:
        """From each generator one task for each of its (ways, shots, queries), and how their images are varied."""
        drawn: list[TaskRows] = []
        draws: list[Draws] = []
        for rng, own in shapes:
            rows = self.rows(rng, own)
            drawn += rows
            if self.augment is not None:  # after the rows, which are the same with and without
                draws.append(self.augment.draw(rng, sum(len(r.support) + len(r.query) for r in rows)))
        return drawn, Draws(*map(np.concatenate, zip(*draws, strict=True))) if draws else None

    def draw(self, rng: np.random.Generator, shapes: Shapes) -> list[Task]:
        """One task for each (ways, shots, queries)."""
        return self.load(*self.draw_all([(rng, shapes)]))

    def class_sizes(self) -> np.ndarray:
        """Examples of each class, (n_classes,)."""
        return np.array([len(rows) for rows in self.dataset.index])

    def load(self, drawn: Sequence[TaskRows], draws: Draws | None = None) -> list[Task]:
        """The tasks of these rows, all images in one gather, varied by ``draws``."""
        options = {} if draws is None else {"draws": draws}
        x = self.dataset.gather(torch.from_numpy(self.concatenated(drawn)), **options)
        return TaskLayout.of(drawn, x.device).tasks(x)

    @staticmethod
    def concatenated(drawn: Sequence[TaskRows]) -> np.ndarray:
        """Supports' and queries' rows of one task after the other, (n,)."""
        return np.concatenate([part for rows in drawn for part in (rows.support, rows.query)])


class TaskLayout(NamedTuple):
    """How the inputs of tasks, one after the other, become tasks again."""

    sizes: list[int]  # of supports, queries, supports, …
    labels: list[Tensor]  # (size,) each
    ways: list[int]

    @classmethod
    def of(cls, drawn: Sequence[TaskRows], device: torch.device) -> TaskLayout:
        """The layout of ``IndexedSource.concatenated(drawn)``."""
        labels = [y for rows in drawn for y in (rows.support_y, rows.query_y)]
        return cls(
            [len(y) for y in labels],
            [torch.from_numpy(y).to(device) for y in labels],
            [len(rows.classes) for rows in drawn],
        )

    def tasks(self, x: Tensor) -> list[Task]:  # (n, ...)
        """The tasks."""
        x, y = x.split(self.sizes), self.labels
        parts = zip(x[0::2], y[0::2], x[1::2], y[1::2], self.ways, strict=True)
        return [Task(*part) for part in parts]


def task_source(dataset: Any, device: torch.device | str | None = None, augment: Augment | None = None) -> TaskSource:
    """The way to draw tasks from any supported data set.

    Raises:
        DataError: if images are to be augmented that are not a ``ClassDataset``'s.
    """
    if augment is not None and not (isinstance(dataset, ClassDataset) and dataset.images.dtype == torch.uint8):
        raise DataError(
            f"need a ClassDataset of uint8 images to augment, got {type(dataset).__name__}; convert them, or vary "
            "them in your data set's own transform"
        )
    if isinstance(dataset, ClassDataset):
        return IndexedSource(placed(dataset, device), augment)
    if hasattr(dataset, "index") and hasattr(dataset, "gather"):
        return IndexedSource(dataset)
    if hasattr(dataset, "labels_to_indices") or hasattr(dataset, "sample_task_description"):
        from l2g_meta.data.learn2learn import learn2learn_source

        return learn2learn_source(dataset)
    return IndexedSource(MapDataset(dataset))


def indexed(source: TaskSource) -> IndexedSource:
    """The source itself, if it draws rows.

    Raises:
        DataError: if it does not.
    """
    if not isinstance(source, IndexedSource):
        raise DataError("need a class-indexed data set to give rows, got learn2learn's")
    return source


def check_enough(source: TaskSource, *shapes: TaskShape) -> None:
    """That the largest tasks of these shapes fit together.

    Raises:
        DataError: with the counts, and what would fit.
    """
    sizes = source.class_sizes()
    if sizes is None:
        return
    ways = [shape.largest[0] for shape in shapes]
    kind = "a disjoint pair" if len(shapes) > 1 else "a task"
    if sum(ways) > len(sizes):
        raise DataError(
            f"{kind} needs {sum(ways)} classes, the split has {len(sizes)}; "
            + (f"lower ways to {len(sizes) // len(shapes)}" if len(sizes) >= len(shapes) else "take a larger split")
            + (" each" if len(sizes) >= len(shapes) > 1 else "")
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


def generator(seed: int | Sequence[int], k: int) -> np.random.Generator:
    """The generator of position k of a stream."""
    if k < 0:
        raise IndexError(f"need a position of at least 0, got {k}")
    return np.random.default_rng([*values(seed), k])


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
