"""Class-indexed data: images grouped by class, ready to be gathered into tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from l2g_meta.errors import DataError


@dataclass(frozen=True, eq=False)
class ClassDataset:
    """Images and their class labels, in memory or memory-mapped.

    Args:
        images: uint8 array or tensor (n, H, W, C), scaled to [0, 1] and normalised when gathered; or a float tensor
            (n, ...) of inputs that are used as they are.
        labels: integers (n,), the class of each image, 0 … n_classes − 1, in any order; every class occurs.
        class_names: one name per class; ``"0"``, ``"1"``, … by default.
        name: what the data set is called in tables, for example ``"mini-imagenet"``.
        split: ``"train"``, ``"validation"``, ``"test"`` or ``""``.
        mean: per channel, on the [0, 1] scale; subtracted from uint8 images.
        std: per channel, on the [0, 1] scale; uint8 images are divided by it.
        gathered_on: device that the images of each gather are copied to first; by default they stay where they lie.

    Raises:
        DataError: if lengths disagree, a class has no image, or the labels are not 0 … n_classes − 1.

    Example:
        >>> data = ClassDataset(torch.randn(6, 3, 8, 8), [0, 0, 0, 1, 1, 1])
        >>> data.n_classes, data.image_shape, data.gather([5, 0]).shape
        (2, (3, 8, 8), torch.Size([2, 3, 8, 8]))
    """

    images: np.ndarray | Tensor
    labels: Sequence[int] | np.ndarray | Tensor
    class_names: tuple[str, ...] = ()
    name: str = ""
    split: str = ""
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)
    gathered_on: torch.device | None = None
    index: tuple[np.ndarray, ...] = field(init=False, repr=False)  # rows of each class, ascending
    normalisation: tuple[Tensor, ...] = field(init=False, repr=False)  # mean and std beside the inputs, (C, 1, 1)

    def __post_init__(self) -> None:
        images = self.images if isinstance(self.images, Tensor) else torch.from_numpy(np.asarray(self.images))
        labels = np.asarray(self.labels.cpu() if isinstance(self.labels, Tensor) else self.labels)
        if labels.shape != (len(images),):
            raise DataError(f"need one label per image ({len(images)}), got labels of shape {labels.shape}")
        if images.dtype == torch.uint8 and (images.ndim != 4 or images.shape[3] not in (1, 3)):
            raise DataError(
                f"need uint8 images of shape (n, H, W, 1 or 3), got {tuple(images.shape)}; permute them, or pass "
                "floats, which are used as they are"
            )
        object.__setattr__(self, "images", images)
        device = self.gathered_on or images.device
        constants = (torch.tensor(t, device=device).view(-1, 1, 1) for t in (self.mean, self.std))
        object.__setattr__(self, "normalisation", tuple(constants))
        object.__setattr__(self, "index", index_by_class(labels))
        object.__setattr__(self, "labels", labels.astype(np.int64))
        names = self.class_names or tuple(str(c) for c in range(self.n_classes))
        if len(names) != self.n_classes:
            raise DataError(f"need one name per class ({self.n_classes}), got {len(names)} names")
        object.__setattr__(self, "class_names", tuple(names))

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.index)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one gathered input, (C, H, W) for images."""
        shape = tuple(self.images.shape[1:])
        return (shape[2], shape[0], shape[1]) if self._is_uint8 else shape

    @property
    def _is_uint8(self) -> bool:
        return self.images.dtype == torch.uint8

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: Sequence[int] | np.ndarray | Tensor, *, vary: Vary | None = None) -> Tensor:
        """Inputs of the given rows, normalised, on the device of the images: float (len(rows), C, H, W), contiguous.

        Images are read through ``vary``, if given.
        """
        images: Tensor = self.images  # type: ignore[assignment]
        rows = torch.as_tensor(rows, device=images.device)
        if self.gathered_on is not None:
            shape, pinned = (len(rows), *images.shape[1:]), self.gathered_on.type == "cuda"
            chosen = torch.index_select(images, 0, rows, out=torch.empty(shape, dtype=images.dtype, pin_memory=pinned))
            images = chosen.to(self.gathered_on, non_blocking=True)  # PyTorch keeps pinned memory until it is copied
            rows = torch.arange(len(rows), device=images.device)
        return prepared(images, rows, self.normalisation, vary)

    def of_classes(self, classes: Sequence[int]) -> ClassDataset:
        """A copy of the data of these classes, which become classes 0, 1, … in this order."""
        rows = np.concatenate([self.index[c] for c in classes])
        labels = np.repeat(np.arange(len(classes)), [len(self.index[c]) for c in classes])
        names = tuple(self.class_names[c] for c in classes)
        return replace(self, images=self.images[rows], labels=labels, class_names=names)

    def to(self, device: torch.device | str | None) -> ClassDataset:
        """The same data with the images resident on ``device``."""
        images: Tensor = self.images  # type: ignore[assignment]
        if device is None or torch.device(device) == images.device:
            return self
        return replace(self, images=images.to(device))


Vary = Callable[[Tensor, Tensor], Tensor]  # (N, H, W, C) uint8 and rows (n,) -> (n, H, W, C), float in 0 … 1


def prepared(
    images: Tensor,  # (N, H, W, C) uint8, or (N, ...) float
    rows: Tensor,  # (n,)
    normalisation: Sequence[Tensor],  # mean and std, (C, 1, 1) each
    vary: Vary | None = None,
) -> Tensor:  # (n, C, H, W), or (n, ...)
    """Inputs from images on one device, contiguous: uint8 is scaled to [0, 1], varied if asked for, and normalised.

    Example:
        >>> mean = std = torch.tensor([[[0.5]]])
        >>> prepared(torch.tensor([[[[0]]], [[[255]]]], dtype=torch.uint8), torch.tensor([1, 0]), (mean, std)).flatten()
        tensor([ 1., -1.])
    """
    if images.dtype != torch.uint8:
        return contiguous(images[rows])
    mean, std = normalisation
    x = images[rows] if vary is None else vary(images, rows)
    x = contiguous(x.permute(0, 3, 1, 2))  # of bytes, where there is nothing to vary: the least to move
    return ((x.float() / 255 if vary is None else x) - mean) / std


def contiguous(x: Tensor) -> Tensor:
    """The tensor with the strides of a new one.

    One channel alone is contiguous in any order, and PyTorch goes by its strides: ``view`` would fail behind a network.

    Example:
        >>> contiguous(torch.zeros(2, 5, 5, 1).permute(0, 3, 1, 2)).stride()
        (25, 25, 5, 1)
    """
    return x.contiguous().view(-1).view(x.shape)


@dataclass(frozen=True, eq=False)
class MapDataset:
    """Any map-style data set (``dataset[i] -> (x, label)``) by class; labels come from its label list.

    Reads ``dataset.targets`` or ``dataset.labels`` (the convention of torchvision and most), also through ``Subset``,
    or the second tensor of a ``TensorDataset``, unless ``labels`` is given: no image is decoded to learn its class.

    Args:
        dataset: items (x, label) with x a tensor, all of one shape.
        labels: class of each item, (n,), any hashable values; sorted, they become classes 0, 1, ….

    Raises:
        DataError: if there is no label list.

    Example:
        >>> data = MapDataset(TensorDataset(torch.randn(4, 3), torch.tensor([7, 9, 7, 9])))
        >>> data.class_names, [rows.tolist() for rows in data.index]
        (('7', '9'), [[0, 2], [1, 3]])
    """

    dataset: Any
    labels: Any = None
    class_names: tuple[str, ...] = field(init=False)
    index: tuple[np.ndarray, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        labels = label_list(self.dataset) if self.labels is None else self.labels
        if labels is None:
            raise DataError(
                f"need a label list to index {type(self.dataset).__name__} by class, got neither `targets` nor "
                "`labels` on it; pass MapDataset(dataset, labels=[...])"
            )
        names, rows = np.unique(np.asarray(labels), return_inverse=True)
        object.__setattr__(self, "labels", rows.reshape(-1))
        object.__setattr__(self, "index", index_by_class(rows.reshape(-1)))
        object.__setattr__(self, "class_names", tuple(str(n) for n in names))

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.index)

    def gather(self, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Inputs of the given rows, stacked: (len(rows), ...)."""
        try:
            return contiguous(torch.stack([torch.as_tensor(self.dataset[int(row)][0]) for row in rows]))
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"need items (x, label) with tensors x of one shape, got: {error}; give the data set a transform "
                "(torchvision: Resize, CenterCrop, ToTensor)"
            ) from error


def label_list(dataset: Any) -> Any:
    """The labels of a map-style data set, (n,), without loading its items; ``None`` where it has no list of them."""
    if isinstance(dataset, Subset):
        labels = label_list(dataset.dataset)
        return None if labels is None else [labels[i] for i in dataset.indices]
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return dataset.tensors[1]
    return getattr(dataset, "targets", getattr(dataset, "labels", None))


def index_by_class(labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows of each class, ascending, for labels 0 … n_classes − 1.

    Example:
        >>> [rows.tolist() for rows in index_by_class(np.array([1, 0, 1]))]
        [[1], [0, 2]]
    """
    if labels.size == 0 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(f"need integer labels from 0, at least one, got {labels.dtype} labels of shape {labels.shape}")
    # Below the largest label of more classes than labels there is a gap; numbers too large to count are cut off.
    counts = np.bincount(np.minimum(labels, labels.size).astype(np.int64))
    if (counts == 0).any():
        raise DataError(
            f"need an image of every class 0 … {labels.max()}, got none of class {int(np.argmin(counts))}; "
            "number the classes without gaps (np.unique(labels, return_inverse=True))"
        )
    order = np.argsort(labels, kind="stable")
    return tuple(np.split(order, np.cumsum(counts)[:-1]))


def integers(value: Any) -> np.ndarray | None:
    """A list or array of integers as an array (n,), ``None`` for anything else.

    NumPy alone would unfold nested lists, of which a short pickle can describe astronomically many. An array comes
    back as it is, which may be a read-only view of a file.

    Example:
        >>> integers([3, 1]), integers([[3], [1]]), integers([0.5])
        (array([3, 1]), None, None)
    """
    if isinstance(value, list) and all(isinstance(n, int | np.integer) for n in value):
        try:
            value = np.array(value, dtype=np.int64)
        except OverflowError:
            return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.ndim != 1:
        return None
    return value
