"""Batches of labelled images for supervised training, each a function of (seed, position) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from l2g_meta.data.augment import Augment
from l2g_meta.data.pairs import checked_seed
from l2g_meta.data.sources import indexed, task_source
from l2g_meta.data.stream import generator
from l2g_meta.errors import DataError
from l2g_meta.task import Task


class LabelledBatch(Task):
    """Labelled images as a task of all base classes without supports: its queries are to be told apart."""

    def check(self, labels: bool | None = None) -> LabelledBatch:
        """The batch itself; its labels come from the data set's index, and are right by construction."""
        return self


class Batches:
    """Batches of a data set's images with their classes 0 … n_classes − 1, the input of supervised training.

    Each epoch is one order of all images, cut into batches; what is left over at its end is left out. ``batches[k]``
    depends on (seed, k) alone.

    Args:
        dataset: a ``ClassDataset``, or any map-style data set with ``targets`` or ``labels``.
        size: images of a batch.
        seed: of the orders and of the augmentation.
        augment: vary the images, as of ``TaskPairs``.
        device: as of ``TaskPairs``.

    Raises:
        DataError: if the data set has fewer images than a batch, or fewer than two classes.

    Example:
        >>> from l2g_meta.data import ClassDataset
        >>> batches = Batches(ClassDataset(torch.randn(12, 1, 8, 8), torch.arange(12) // 4), 6)
        >>> (batch,) = batches[0]
        >>> batch.query_x.shape, batch.n_way, len(batch.support_x), batches.per_epoch
        (torch.Size([6, 1, 8, 8]), 3, 0, 2)
    """

    def __init__(
        self,
        dataset: Any,
        size: int,
        *,
        seed: int = 0,
        augment: Augment | None = None,
        device: torch.device | str | None = None,
    ):
        self.source = indexed(task_source(dataset, device, augment))
        index = self.source.dataset.index
        self.n_classes, self.size = len(index), size
        self.rows = np.concatenate(index)  # (n_images,), by class
        self.labels = np.repeat(np.arange(self.n_classes), [len(rows) for rows in index])
        self.seed, self.device = checked_seed(seed), device
        if len(self.rows) < size or self.n_classes < 2:
            raise DataError(
                f"need at least 2 classes and {size} images for a batch, got {self.n_classes} classes and "
                f"{len(self.rows)} images; lower --batch"
            )
        self.per_epoch = len(self.rows) // size
        self.order: tuple[int, np.ndarray] = (-1, self.rows)  # of the epoch last asked for

    def __getitem__(self, k: int) -> tuple[Task]:
        """The batch at position k ≥ 0 of the stream."""
        (batch,) = self.batch([k])
        return batch

    def batch(self, positions: Sequence[int]) -> list[tuple[Task]]:
        """The batches at these positions; their images in one gather."""
        chosen = [self._chosen(k) for k in positions]
        # Another stream than the orders'.
        draws = self.source.variations([(generator([*self.seed, 1], k), self.size) for k in positions])
        x = self.source.gather(torch.from_numpy(self.rows[np.concatenate(chosen)]), draws).to(self.device)
        y = [torch.from_numpy(self.labels[c]).to(x.device) for c in chosen]
        return [
            (LabelledBatch(part[:0], labels[:0], part, labels, self.n_classes),)
            for part, labels in zip(x.split(self.size), y, strict=True)
        ]

    def _chosen(self, k: int) -> np.ndarray:
        epoch, place = divmod(k, self.per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, generator([*self.seed, 0], epoch).permutation(len(self.rows))
        return self.order[1][place * self.size : (place + 1) * self.size]
