"""Where images lie: on the device, if they fit there; else on the host, from where those of each update are copied."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from l2g_meta.data.dataset import ClassDataset, Vary, prepared

SHARE = 2 / 3  # of a device's free memory that images may take; the rest is the model's, its graphs' and a validation's


@dataclass(frozen=True, eq=False)
class HostDataset:
    """A ``ClassDataset`` that stays on the host, in memory or memory-mapped, and is gathered to a device.

    The chosen images are collected in pinned memory and copied while the host goes on; they are normalised and varied
    on the device, so that inputs are those of the resident data set.

    Args:
        dataset: images on the host.
        device: where inputs are wanted.

    Example:
        >>> data = ClassDataset(torch.arange(4.0).view(4, 1), [0, 0, 1, 1])
        >>> HostDataset(data, torch.device("cpu")).gather([3, 1]).tolist()
        [[3.0], [1.0]]
    """

    dataset: ClassDataset
    device: torch.device
    normalisation: tuple[Tensor, ...] = field(init=False, repr=False)  # mean and std on the device, (C, 1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "normalisation", tuple(t.to(self.device) for t in self.dataset.normalisation))

    @property
    def index(self) -> tuple[np.ndarray, ...]:
        """Rows of each class, ascending."""
        return self.dataset.index

    @property
    def split(self) -> str:
        """The data set's split."""
        return self.dataset.split

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one gathered input, (C, H, W)."""
        return self.dataset.image_shape

    def gather(self, rows: Sequence[int] | np.ndarray | Tensor, *, vary: Vary | None = None) -> Tensor:
        """Inputs of the given rows as of ``ClassDataset.gather``, on the device: (len(rows), ...)."""
        images: Tensor = self.dataset.images  # type: ignore[assignment]
        rows = torch.as_tensor(rows).cpu()
        shape = (len(rows), *images.shape[1:])
        chosen = torch.empty(shape, dtype=images.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(images, 0, rows, out=chosen)
        moved = chosen.to(self.device, non_blocking=True)  # PyTorch keeps the pinned memory until the copy is done
        return prepared(moved, torch.arange(len(rows), device=self.device), self.normalisation, vary)


def placed(dataset: ClassDataset, device: torch.device | str | None) -> ClassDataset | HostDataset:
    """The data set resident on ``device``, or gathered to it where its images do not fit; a warning says so once.

    Example:
        >>> data = ClassDataset(torch.randn(4, 1), [0, 0, 1, 1])
        >>> placed(data, "cpu") is data or placed(data, "cpu").images is data.images
        True
    """
    if device is None:
        return dataset
    device = torch.device(device)
    images: Tensor = dataset.images  # type: ignore[assignment]
    if images.device.type != "cpu" or fits(images.nbytes, free_memory(device)):
        return dataset.to(device)
    _say_once(" ".join(filter(None, (dataset.name, dataset.split))) or "this data set", images.nbytes, device)
    return HostDataset(dataset, device)


def fits(size: int, free: int | None) -> bool:
    """Whether images of that many bytes leave enough of the free bytes to a model; ``None`` is without a limit.

    Example:
        >>> fits(10, 12), fits(8, 12), fits(10, None)
        (False, True, True)
    """
    return free is None or size <= SHARE * free


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a CUDA device, PyTorch's own reserve included; elsewhere ``None``."""
    if device.type != "cuda":
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


@functools.cache
def _say_once(what: str, size: int, device: torch.device) -> None:
    free = free_memory(device) or 0
    warnings.warn(
        f"need {size / 1e9:.1f} GB on {device} for the images of {what}, which may take two thirds of its "
        f"{free / 1e9:.1f} GB that are free; they stay on the host, and those of each update are copied over: the "
        "same tasks, more slowly (a smaller --image-size may fit)",
        stacklevel=3,
    )
