"""Where tasks are drawn from: any supported data set as rows of classes, and rows as tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from l2g_meta.data.augment import Augment, Draws
from l2g_meta.data.dataset import ClassDataset, MapDataset
from l2g_meta.data.host import placed
from l2g_meta.errors import DataError
from l2g_meta.task import Task

if TYPE_CHECKING:
    from l2g_meta.data.learn2learn import MetaDatasetSource, TasksetSource

Shapes = Sequence[tuple[int, int, int]]  # (ways, shots, queries) of tasks without a common class


class TaskRows(NamedTuple):
    """A task as rows of a data set: (n_support,), (n_support,), (n_query,), (n_query,), and the classes drawn."""

    support: np.ndarray
    support_y: np.ndarray
    query: np.ndarray
    query_y: np.ndarray
    classes: np.ndarray


def disjoint_classes(rng: np.random.Generator, n_classes: int, ways: Sequence[int]) -> list[np.ndarray]:
    """Classes of tasks without a common one, (ways,) each: drawn as one set of distinct classes, then split.

    Example:
        >>> first, second = disjoint_classes(np.random.default_rng(0), 10, [5, 5])
        >>> len({*first.tolist(), *second.tolist()})
        10
    """
    return np.split(rng.choice(n_classes, sum(ways), replace=False), np.cumsum(ways)[:-1])


class IndexedSource:
    """Tasks from a class-indexed data set: rows first, then one gather for all tasks."""

    def __init__(self, dataset: Any, augment: Augment | None = None):
        self.dataset, self.augment = dataset, augment

    def rows(self, rng: np.random.Generator, shapes: Shapes) -> tuple[TaskRows, ...]:
        """Rows of tasks without a common image, one for each (ways, shots, queries)."""
        index, tasks = self.dataset.index, []
        chosen_classes = disjoint_classes(rng, len(index), [ways for ways, _, _ in shapes])
        for chosen, (n, shots, queries) in zip(chosen_classes, shapes, strict=True):
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
        images = []
        for rng, own in shapes:
            rows = self.rows(rng, own)
            drawn += rows
            images.append((rng, sum(len(r.support) + len(r.query) for r in rows)))
        return drawn, self.variations(images)  # after the rows, which are the same with and without

    def variations(self, images: Sequence[tuple[np.random.Generator, int]]) -> Draws | None:
        """How images are varied, from each generator so many; ``None`` if they are not."""
        if self.augment is None:
            return None
        size = self.dataset.image_shape[1:]
        drawn = [self.augment.draw(rng, n, size) for rng, n in images]
        return Draws(*map(np.concatenate, zip(*drawn, strict=True)))

    def class_sizes(self) -> np.ndarray:
        """Examples of each class, (n_classes,)."""
        return np.array([len(rows) for rows in self.dataset.index])

    def load(self, drawn: Sequence[TaskRows], draws: Draws | None = None) -> list[Task]:
        """The tasks of these rows, all images in one gather, varied by ``draws``."""
        parts = [part for rows in drawn for part in (rows.support, rows.query)]
        labels = [y for rows in drawn for y in (rows.support_y, rows.query_y)]
        x = self.gather(torch.from_numpy(np.concatenate(parts)), draws)
        xs = x.split([len(part) for part in parts])
        ys = [torch.from_numpy(y).to(x.device) for y in labels]
        ways = [len(rows.classes) for rows in drawn]
        return [Task(*part) for part in zip(xs[0::2], ys[0::2], xs[1::2], ys[1::2], ways, strict=True)]

    def gather(self, rows: Tensor, draws: Draws | None = None) -> Tensor:
        """Inputs of the rows (n,), varied by ``draws``: (n, ...)."""
        if self.augment is None or draws is None:
            return self.dataset.gather(rows)
        return self.dataset.gather(rows, vary=partial(self.augment.gather, draws=draws))


TaskSource: TypeAlias = "IndexedSource | MetaDatasetSource | TasksetSource"


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
