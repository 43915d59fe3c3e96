"""What pairs and episodes are: streams of tasks by position, of a length if wanted, and PyTorch's loader of them."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from l2g_meta.data.augment import Draws
from l2g_meta.data.sources import IndexedSource, Shapes, TaskRows, TaskSource, indexed
from l2g_meta.errors import DataError
from l2g_meta.task import Task

if TYPE_CHECKING:
    from l2g_meta.data.pairs import TaskShape

T_co = TypeVar("T_co", covariant=True)


class Stream(ABC, Generic[T_co]):
    """A stream of tasks, or of pairs of them, each a function of its position; a sequence where it has a length."""

    source: TaskSource
    device: torch.device | str | None
    length: int | None
    seed: list[int]
    shapes: Sequence[TaskShape]  # of the tasks of an item, which have no common class

    @abstractmethod
    def batch(self, positions: Sequence[int]) -> list[T_co]:
        """The items at these positions of the stream, whatever its length; class-indexed images in one gather."""

    def _shapes(self, positions: Sequence[int]) -> list[tuple[np.random.Generator, Shapes]]:
        """The generator of each position, and the shapes of its tasks."""
        generators = [generator(self.seed, k) for k in positions]
        return [(rng, tuple(shape.draw(rng) for shape in self.shapes)) for rng in generators]

    def draw(self, positions: Sequence[int]) -> tuple[list[TaskRows], Draws | None]:
        """The tasks of these positions as rows of a class-indexed data set, and how their images are varied."""
        return indexed(self.source).draw_all(self._shapes(positions))

    def _tasks(self, positions: Sequence[int]) -> list[Task]:
        if isinstance(self.source, IndexedSource):
            drawn: Sequence[Task] = self.source.load(*self.draw(positions))
        else:
            drawn = [task for rng, shapes in self._shapes(positions) for task in self.source.draw(rng, shapes)]
        return [task.to(self.device) for task in drawn]

    @overload
    def __getitem__(self, k: int) -> T_co: ...
    @overload
    def __getitem__(self, k: slice) -> list[T_co]: ...
    def __getitem__(self, k: int | slice) -> T_co | list[T_co]:
        """The item at position k of the stream, k ≥ 0; with a length also slices, and negative k from its end."""
        if isinstance(k, slice):
            positions = range(*k.indices(len(self)))
            return self.batch(positions) if positions else []
        k = operator.index(k)
        if self.length is not None:
            if not -self.length <= k < self.length:
                raise IndexError(f"need a position in {-self.length} … {self.length - 1}, got {k}; raise length")
            k %= self.length
        (item,) = self.batch([k])
        return item

    def __len__(self) -> int:
        if self.length is None:
            name = type(self).__name__
            raise TypeError(
                f"need a length to iterate over {name}, to slice or to load it, got a stream without end; give "
                f"{name}(..., length=N), or take single positions k ≥ 0 by [k]"
            )
        return self.length

    def __bool__(self) -> bool:
        return True  # without a length, too

    def __iter__(self) -> Iterator[T_co]:
        return map(self.__getitem__, range(len(self)))

    def loader(self, workers: int = 0, **options: Any) -> DataLoader[T_co]:
        """PyTorch's loader of the stream, an item at a time and unbatched.

        Epoch e gives positions e · length … (e + 1) · length − 1 of the stream, so that no epoch repeats another's
        tasks: call ``loader.sampler.set_epoch(e)`` before it, as with PyTorch's ``DistributedSampler``; PyTorch
        Lightning does so by itself. Until then, e is 0. Workers change nothing but the speed.

        Args:
            workers: processes that draw the tasks; 0 draws them in this one.
            options: of ``torch.utils.data.DataLoader``, such as ``persistent_workers`` or ``pin_memory``.

        Raises:
            TypeError: without a length, or for options that would change which items come, or how many at once;
                ``ValueError`` for some of these, as PyTorch has it.
            DataError: for workers that would put tasks on a device other than the CPU.
        """
        if workers and torch.device(self.device or "cpu").type != "cpu":
            raise DataError(
                f"need tasks on the CPU from workers, got device={self.device}; leave device out and move each task "
                "by task.to(device), or take workers=0"
            )
        dataset: Dataset[T_co] = _Positions(self)
        return _Loader(
            dataset, batch_size=None, sampler=Epochs(len(self)), num_workers=workers, collate_fn=_same, **options
        )


class _Loader(DataLoader[T_co]):
    """A loader that looks at its sampler's epoch when the first item is wanted.

    PyTorch's looks when the iterator is made. PyTorch Lightning 2.6 makes the first one before it sets the epoch: a
    resumed training would begin with the tasks of epoch 0 again (Lightning-AI/pytorch-lightning#21938).
    """

    def __iter__(self) -> Any:
        yield from super().__iter__()


class Epochs(Sampler[int]):
    """Positions of one epoch after the other: those of epoch e are e · length … (e + 1) · length − 1.

    Args:
        length: positions of an epoch.

    Example:
        >>> sampler = Epochs(3)
        >>> sampler.set_epoch(2)
        >>> list(sampler)
        [6, 7, 8]
    """

    def __init__(self, length: int):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch, from 0, whose positions come next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))

    def __len__(self) -> int:
        return self.length


class _Positions(Dataset[T_co]):
    """All positions of a stream, beyond its length: later epochs lie there."""

    def __init__(self, stream: Stream[T_co]):
        self.stream = stream

    def __getitem__(self, k: int) -> T_co:
        (item,) = self.stream.batch([k])
        return item


def generator(seed: Sequence[int], k: int) -> np.random.Generator:
    """The generator of position k of a stream."""
    if k < 0:
        raise IndexError(f"need a position of at least 0, got {k}")
    return np.random.default_rng([*seed, k])


def checked_length(length: int | None) -> int | None:
    """The length itself, if it is ``None`` or a positive integer.

    Raises:
        DataError: if it is not.
    """
    if length is not None and (not isinstance(length, int | np.integer) or length < 1):
        raise DataError(f"need length to be a positive integer or None, got {length!r}")
    return length if length is None else int(length)


def _same(item: Any) -> Any:
    return item
