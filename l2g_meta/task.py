"""A few-shot task: labelled supports, and queries to classify."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from l2g_meta.errors import DataError


class Task(NamedTuple):
    """One n-way classification task (an episode).

    Args:
        support_x: inputs to learn the classes from, (n_support, ...).
        support_y: their labels, integers in 0 … n_way − 1, (n_support,).
        query_x: inputs to classify, (n_query, ...).
        query_y: their labels, (n_query,). Counts may differ from the supports' and from class to class.
        n_way: number of classes, a Python int: reading it off the labels would synchronise with the device.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    n_way: int

    @classmethod
    def from_batch(cls, x: Tensor, y: Tensor, *, shots: int, n_way: int) -> Task:
        """A task from learn2learn's batch: the first ``shots`` examples of each class are its supports.

        Args:
            x: inputs, (n, ...), in any order.
            y: labels in 0 … n_way − 1, (n,), as learn2learn's ``RemapLabels`` gives them.
            shots: supports per class.
            n_way: number of classes.

        Raises:
            DataError: if a label is out of range or a class has no example left for a query.

        Example:
            >>> x, y = torch.arange(6.0).view(6, 1), torch.tensor([1, 0, 1, 0, 0, 1])
            >>> task = Task.from_batch(x, y, shots=1, n_way=2)
            >>> task.support_x.flatten().tolist(), task.query_y.tolist()
            ([1.0, 0.0], [0, 0, 1, 1])
        """
        y = torch.as_tensor(y)
        if y.is_floating_point() and y.isfinite().all() and torch.equal(y, y.round()):
            y = y.long()
        if y.is_floating_point() or y.is_complex():
            raise DataError(f"need integer labels, got {y.dtype}; y.long() makes them")
        y = y.long()  # uint8 would index as a mask
        if y.ndim != 1 or len(x) != len(y):
            raise DataError(f"need one label per input, got x {tuple(x.shape)} and y {tuple(y.shape)}")
        if len(y) and (int(y.min()) < 0 or int(y.max()) >= n_way):
            raise DataError(
                f"need labels 0 … {n_way - 1} for n_way={n_way}, got {int(y.min())} … {int(y.max())}; "
                "renumber them (learn2learn: RemapLabels) or pass the number of classes that the batch has"
            )
        order = torch.argsort(y, stable=True)
        counts = torch.bincount(y, minlength=n_way)
        if shots < 1 or int(counts.min()) <= shots:
            raise DataError(
                f"need more than shots={shots} ≥ 1 examples of each of the {n_way} classes, got {counts.tolist()} "
                "per class; lower shots or load more (learn2learn: KShots(k=shots + queries))"
            )
        first = torch.cumsum(counts, 0) - counts  # (n_way,) where each class starts in `order`
        rank = torch.arange(len(y), device=y.device) - first[y[order]]  # position within its class
        support, query = order[rank < shots], order[rank >= shots]
        return cls(x[support], y[support].long(), x[query], y[query].long(), n_way)

    def to(self, device: torch.device | str | None) -> Task:
        """The same task on ``device``."""
        support_x, support_y, query_x, query_y = (t.to(device) for t in self[:4])
        return Task(support_x, support_y, query_x, query_y, self.n_way)

    def check(self) -> Task:
        """The task itself, if its shapes and labels are as stated above.

        Raises:
            DataError: naming the field that is wrong. Reads the labels, so it synchronises with the device.
        """
        for part, x, y in (("support", self.support_x, self.support_y), ("query", self.query_x, self.query_y)):
            if y.ndim != 1 or len(x) != len(y) or y.dtype != torch.int64:
                raise DataError(
                    f"need {part}_y of dtype int64 and shape ({len(x)},), one label per {part}, "
                    f"got {y.dtype} of shape {tuple(y.shape)}"
                )
            if len(y) == 0 or int(y.min()) < 0 or int(y.max()) >= self.n_way:
                raise DataError(f"need {part} labels in 0 … {self.n_way - 1}, got {sorted(set(y.tolist()))}")
        missing = sorted(set(range(self.n_way)) - set(self.support_y.tolist()))
        if missing:
            raise DataError(f"need a support for each of the {self.n_way} classes, got none for {missing}")
        return self


def split_queries(task: Task) -> tuple[Task, Task]:
    """Two tasks with the same supports and alternate queries of each class: fresh queries for the outer loss of MAML.

    Queries must be grouped by class in even numbers, as ``TaskPairs`` draws them.

    Raises:
        DataError: if they are not.

    Example:
        >>> x, y = torch.arange(4.0).view(4, 1), torch.tensor([0, 0, 1, 1])
        >>> a, b = split_queries(Task(x, y, x, y, 2))
        >>> a.query_x.flatten().tolist(), b.query_x.flatten().tolist()
        ([0.0, 2.0], [1.0, 3.0])
    """
    if not torch.equal(task.query_y[0::2], task.query_y[1::2]):
        raise DataError("need an even number of queries of each class, grouped by class, to split them in halves")
    inner = task._replace(query_x=task.query_x[0::2], query_y=task.query_y[0::2])
    outer = task._replace(query_x=task.query_x[1::2], query_y=task.query_y[1::2])
    return inner, outer
