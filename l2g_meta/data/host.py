"""Where images lie: on the device, if they fit there; else on the host, from where those of each update are copied."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from l2g_meta.data.dataset import ClassDataset

SHARE = 2 / 3  # of a device's free memory that images may take; the rest is the model's, its graphs' and a validation's


def placed(dataset: ClassDataset, device: torch.device | str | None) -> ClassDataset:
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
    return replace(dataset, gathered_on=device)


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
