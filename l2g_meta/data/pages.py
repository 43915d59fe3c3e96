"""Mapped arrays larger than memory: rows are read from the disk at once, and given back from time to time.

The system would take such pages back by itself, but only when memory is short: until then a training run on
tieredImageNet comes to hold all of its 9.5 GB. What is given back stays in the system's file cache, if there is room.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESIDENT = 2**30  # bytes of an array that may be resident
AROUND = 2**16  # Linux maps so many bytes around one that is read


def give_back(view: Any) -> None:
    """Takes the pages of a map, or of an array that is a view of one, out of this process; of others nothing."""
    _advise(view, "DONTNEED")


def _advise(view: Any, what: str, *part: int) -> None:
    while isinstance(view, np.ndarray | memoryview):
        view = view.base if isinstance(view, np.ndarray) else view.obj
    if isinstance(view, mmap.mmap) and hasattr(mmap, f"MADV_{what}"):  # not on Windows
        view.madvise(getattr(mmap, f"MADV_{what}"), *part)


class Pages:
    """Reads rows of a mapped array, and keeps its resident part below a limit.

    Call ``expect`` before rows are read, and ``read`` after.

    Args:
        array: mapped, (n, ...).
        limit: bytes.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/x.npy"
        >>> np.save(path, np.arange(6, dtype=np.uint8).reshape(3, 2))
        >>> array = np.load(path, mmap_mode="c")
        >>> pages, images = Pages(array, limit=10), torch.from_numpy(array)
        >>> pages.read(images, 2)
        >>> images[1]
        tensor([2, 3], dtype=torch.uint8)
    """

    def __init__(self, array: np.memmap, *, limit: int = RESIDENT):
        self.array, self.limit, self.resident = array, limit, 0
        self.row = array[0].nbytes + 2 * AROUND  # at most, of one that is read
        _advise(array, "RANDOM")  # else the system reads some 100 kB around each row

    def expect(self, rows: Tensor) -> None:  # (n,)
        """Lets the disk read these rows side by side, where they would be read page by page."""
        size, first = self.array[0].nbytes, self.array.offset % mmap.ALLOCATIONGRANULARITY
        for start in (first + rows % len(self.array) * size).tolist():
            page = start - start % mmap.PAGESIZE
            _advise(self.array, "WILLNEED", page, start + size - page)

    def read(self, images: Tensor, rows: int) -> None:
        """Notes that so many rows of the array, as a tensor, were read."""
        self.resident += rows * self.row
        if self.resident > self.limit and not images._version:  # changed ones are this process's own and would be lost
            give_back(self.array)
            self.resident = 0

    def copied(self, images: Tensor, device: torch.device) -> Tensor:
        """The images on another device, copied part by part."""
        _advise(self.array, "SEQUENTIAL")
        out = torch.empty(images.shape, dtype=images.dtype, device=device)
        step = max(1, self.limit // self.row)
        for first in range(0, len(images), step):
            part = images[first : first + step]
            out[first : first + step] = part
            self.read(images, len(part))
        _advise(self.array, "RANDOM")
        return out
