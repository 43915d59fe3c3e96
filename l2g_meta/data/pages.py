"""Resident memory of mapped arrays: what was read is given back from time to time, so that it stays bounded.

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
    while isinstance(view, np.ndarray | memoryview):
        view = view.base if isinstance(view, np.ndarray) else view.obj
    if isinstance(view, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        view.madvise(mmap.MADV_DONTNEED)


class Pages:
    """Keeps the resident part of a mapped array below a limit, as long as its rows are read by this count.

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

    def __init__(self, array: np.ndarray, *, limit: int = RESIDENT):
        self.array, self.limit, self.resident = array, limit, 0
        self.row = array[0].nbytes + 2 * AROUND  # at most, of one that is read

    def read(self, images: Tensor, rows: int) -> None:
        """Notes that so many rows of the array, as a tensor, were read."""
        self.resident += rows * self.row
        if self.resident > self.limit and not images._version:  # changed ones are this process's own and would be lost
            give_back(self.array)
            self.resident = 0

    def copied(self, images: Tensor, device: torch.device) -> Tensor:
        """The images on another device, copied part by part."""
        out = torch.empty(images.shape, dtype=images.dtype, device=device)
        step = max(1, self.limit // self.row)
        for first in range(0, len(images), step):
            part = images[first : first + step]
            out[first : first + step] = part
            self.read(images, len(part))
        return out
