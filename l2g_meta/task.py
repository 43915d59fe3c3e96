"""A few-shot task: labelled supports, and queries to classify."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias

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
    def of(cls, value: TaskLike) -> Task:
        """A task from what people have: a ``Task``, which is returned as it is, or a plain tuple or list.

        Args:
            value: a task, or ``(support_x, support_y, query_x, query_y)``. A fifth element that is an int is n_way;
                any other, such as easyfsl's list of class ids, is ignored. Without n_way the labels may be any
                integers: the classes of ``support_y`` are numbered in sorted order, which synchronises with the device.
                Each tensor may have the leading 1 of a ``DataLoader``, or be an array or a list of numbers.

        Raises:
            DataError: for anything else, or a query of a class without support.

        Example:
            >>> x, y = torch.randn(2, 3), torch.tensor([4, 7])
            >>> task = Task.of((x, y, x, y))
            >>> task.support_y.tolist(), task.n_way, Task.of(task) is task
            ([0, 1], 2, True)
        """
        if isinstance(value, Task) and all(isinstance(t, Tensor) for t in value[:4]) and value.support_y.ndim == 1:
            return value
        if not isinstance(value, tuple | list) or len(value) not in (4, 5):
            got = f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__
            raise DataError(
                f"need a Task or a tuple (support_x, support_y, query_x, query_y), got a {got}; "
                "Task.from_batch(x, y, shots=...) splits one labelled batch"
            )
        batched = getattr(value[1], "ndim", 1) == 2  # then a DataLoader made a tensor of n_way, too
        support_x, support_y = _labelled(value[0], value[1], "support")
        query_x, query_y = _labelled(value[2], value[3], "query")
        n_way = value[4] if len(value) == 5 else None
        if batched and isinstance(n_way, Tensor) and n_way.numel() == 1 and not n_way.is_floating_point():
            n_way = int(n_way)
        if isinstance(n_way, Integral) and not isinstance(n_way, bool):
            return cls(support_x, support_y, query_x, query_y, int(n_way))
        classes, support_y = torch.unique(support_y, return_inverse=True)
        known = torch.isin(query_y, classes)
        if not known.all():
            raise DataError(
                f"need queries of the classes that have a support, {classes.tolist()}, got a query of class "
                f"{int(query_y[~known][0])}; add a support of it, or leave its queries out"
            )
        return cls(support_x, support_y, query_x, torch.searchsorted(classes, query_y), len(classes))

    @classmethod
    def from_batch(
        cls,
        x: Tensor,
        y: Tensor,
        *,
        shots: int,
        n_way: int | None = None,
        split: Literal["first", "even-odd"] = "first",
    ) -> Task:
        """A task from one labelled batch, as learn2learn's and torchvision's loaders give it.

        Args:
            x: inputs, (n, ...), in any order; (1, n, ...) from a ``DataLoader``.
            y: any integer labels, (n,) or (1, n); the classes are numbered 0 … n_way − 1 in sorted order.
            shots: supports per class.
            n_way: number of classes; by default that of different labels.
            split: which examples of a class are its supports: the ``"first"`` ``shots``, as in learn2learn's ProtoNet
                example, or the first ``shots`` at even positions, ``"even-odd"``, as in its MAML examples. All others
                are queries.

        Raises:
            DataError: if there are not n_way different labels, or a class has too few examples for the split.

        Example:
            >>> x, y = torch.arange(6.0).view(6, 1), torch.tensor([9, 3, 9, 3, 3, 9])
            >>> task = Task.from_batch(x, y, shots=1)
            >>> task.support_x.flatten().tolist(), task.query_y.tolist(), task.n_way
            ([1.0, 0.0], [0, 0, 1, 1], 2)
        """
        x, y = _labelled(x, y, "input")
        classes, y = torch.unique(y, return_inverse=True)
        if n_way is not None and len(classes) != n_way:
            raise DataError(
                f"need {n_way} different labels for n_way={n_way!r}, got {classes.tolist()}; pass the number of "
                "classes that the batch has, or leave n_way out"
            )
        if split not in ("first", "even-odd"):
            raise DataError(f"need split to be 'first' or 'even-odd', got {split!r}")
        if not isinstance(shots, Integral) or shots < 1:
            raise DataError(f"need shots to be an integer of at least 1, got {shots!r}")
        step, needed = (1, shots + 1) if split == "first" else (2, 2 * shots)
        counts = torch.bincount(y)
        if not len(counts) or int(counts.min()) < needed:
            raise DataError(
                f"need at least {needed} examples of each class for shots={shots}, split={split!r}, got "
                f"{counts.tolist()} per class; lower shots or load more (learn2learn: KShots(k=shots + queries))"
            )
        order = torch.argsort(y, stable=True)
        first = torch.cumsum(counts, 0) - counts  # (n_way,) where each class starts in `order`
        rank = torch.arange(len(y), device=y.device) - first[y[order]]  # position within its class
        chosen = (rank < step * shots) & (rank % step == 0)
        support, query = order[chosen], order[~chosen]
        return cls(x[support], y[support], x[query], y[query], len(classes))

    def to(self, device: torch.device | str | None) -> Task:
        """The same task on ``device``."""
        support_x, support_y, query_x, query_y = (t.to(device) for t in self[:4])
        return Task(support_x, support_y, query_x, query_y, self.n_way)

    def split_classes(self) -> tuple[Task, Task]:
        """A disjoint pair (T_i, T_j) of one 2N-way episode: its first N classes, and its last N, numbered from 0.

        Raises:
            DataError: for an odd number of classes.

        Example:
            >>> x, y = torch.arange(4.0).view(4, 1), torch.arange(4)
            >>> task_i, task_j = Task(x, y, x, y, 4).split_classes()
            >>> task_j.query_x.flatten().tolist(), task_j.query_y.tolist(), task_j.n_way
            ([2.0, 3.0], [0, 1], 2)
        """
        n = self.n_way // 2
        if self.n_way % 2 or not n:
            raise DataError(
                f"need an even number of classes to split them into a pair, got {self.n_way}; draw an episode of "
                f"{2 * n or 2} or {2 * n + 2} ways"
            )
        s, q = self.support_y < n, self.query_y < n
        return (
            Task(self.support_x[s], self.support_y[s], self.query_x[q], self.query_y[q], n),
            Task(self.support_x[~s], self.support_y[~s] - n, self.query_x[~q], self.query_y[~q] - n, n),
        )

    def check(self, labels: bool | None = None) -> Task:
        """The task itself, if it is as stated above; cheap enough for every call.

        Args:
            labels: whether to read the labels, which synchronises with a device; by default on the CPU only. Shapes,
                types and n_way are always checked.

        Raises:
            DataError: naming the field that is wrong.

        Example:
            >>> x, y = torch.randn(2, 3), torch.arange(2)
            >>> Task(x, y, x, y, 3).check()
            Traceback (most recent call last):
            l2g_meta.errors.DataError: need a support of each of the 3 classes, got none of [2]; add some, or lower ...
        """
        support_x, support_y, query_x, query_y, n_way = self
        _check_labelled(support_x, support_y, "support")
        _check_labelled(query_x, query_y, "query")
        if support_x.shape[1:] != query_x.shape[1:]:
            raise DataError(
                f"need supports and queries of one shape, got {tuple(support_x.shape[1:])} and "
                f"{tuple(query_x.shape[1:])}; resize the images"
            )
        if type(n_way) is not int or n_way < 1:
            raise DataError(f"need n_way to be a Python int of at least 1, got {n_way!r}; int(n_way) makes one")
        if labels or (labels is None and support_y.device.type == "cpu"):
            _check_range(support_y, n_way, "support")
            _check_range(query_y, n_way, "query")
            counts = torch.bincount(support_y, minlength=n_way)
            if not counts.all():
                missing = (counts == 0).nonzero().flatten().tolist()
                raise DataError(
                    f"need a support of each of the {n_way} classes, got none of {missing}; add some, or lower n_way "
                    "and number the classes without gaps"
                )
        return self


TaskLike: TypeAlias = Task | Sequence[Any]  # a task, or (support_x, support_y, query_x, query_y)


def _labelled(x: Any, y: Any, part: str) -> tuple[Tensor, Tensor]:  # (n, ...), (n,)
    """Inputs and their int64 labels as tensors, without a DataLoader's leading 1."""
    try:
        x, y = torch.as_tensor(x), torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"need tensors or arrays of {part} inputs (n, ...) and of their labels (n,), got {type(x).__name__} and "
            f"{type(y).__name__}: {error}; torch.stack joins a list of tensors"
        ) from error
    if y.is_floating_point() and y.isfinite().all() and torch.equal(y, y.round()):
        y = y.long()
    if y.is_floating_point() or y.is_complex():
        raise DataError(f"need integer labels, got {y.dtype}; y.long() makes them")
    if y.ndim == 2 and x.shape[:2] == y.shape:
        if len(y) != 1:
            raise DataError(f"need one task, got a batch of {len(y)}; DataLoader(..., batch_size=None) gives one")
        x, y = x[0], y[0]
    if y.ndim != 1 or not x.ndim or len(x) != len(y):
        raise DataError(
            f"need one label per {part}, x (n, ...) and y (n,), got x {tuple(x.shape)} and y {tuple(y.shape)}; "
            "a task is (support_x, support_y, query_x, query_y)"
        )
    return x, y.long()  # uint8 would index as a mask


def _check_labelled(x: Any, y: Any, part: str) -> None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        got = f"{type(x).__name__} and {type(y).__name__}"
        raise DataError(f"need {part}_x and {part}_y as tensors, got {got}; Task.of(tuple(task)) converts them")
    if y.ndim != 1 or not x.ndim or len(x) != len(y) or y.dtype != torch.int64:
        raise DataError(
            f"need {part}_y of dtype int64 and shape (n,), one label per {part}, got {y.dtype} of shape "
            f"{tuple(y.shape)} for {part}_x of shape {tuple(x.shape)}; Task.of(tuple(task)) converts them"
        )
    if not len(y):
        raise DataError(f"need at least one {part}, got none; draw more examples per class")


def _check_range(y: Tensor, n_way: int, part: str) -> None:
    low, high = map(int, y.aminmax())
    if low < 0 or high >= n_way:
        raise DataError(
            f"need {part} labels in 0 … {n_way - 1}, got {y.unique().tolist()}; give n_way as the number of "
            "classes, and number them from 0 (Task.from_batch does)"
        )
