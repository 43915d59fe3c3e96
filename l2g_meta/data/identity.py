"""Which data a run was trained on: a few numbers and digests that change when the data do."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.sources import task_source

SAMPLE = 2**26  # values of images that are digested


def identity(dataset: Any) -> dict[str, Any]:
    """Numbers of classes and images, and digests of class names, labels and pixels, as JSON values.

    Of more than ``SAMPLE`` values an even sample of each image is taken, so that 0.8 GB take less than a second.
    Another image in the place of one is noticed, a single other pixel need not be. Images of data that are no
    ``ClassDataset`` are not looked at, since a transform may draw them anew.

    Args:
        dataset: anything that ``TaskPairs`` takes.

    Example:
        >>> data = ClassDataset(torch.zeros(4, 1), [0, 0, 1, 1])
        >>> {name: value for name, value in identity(data).items() if isinstance(value, int)}
        {'classes': 2, 'images': 4}
        >>> changes({"train": identity(data)}, {"train": identity(ClassDataset(torch.ones(4, 1), [0, 0, 1, 1]))})
        'train: other pixels'
    """
    if not isinstance(dataset, ClassDataset):
        sizes = task_source(dataset).class_sizes()
        return {"kind": type(dataset).__name__, "class sizes": None if sizes is None else _digest(sizes.tolist())}
    images: Tensor = dataset.images  # type: ignore[assignment]
    return {
        "classes": dataset.n_classes,
        "images": len(dataset),
        "names": _digest(dataset.class_names),
        "labels": _digest(np.asarray(dataset.labels).tolist()),
        "pixels": _pixels(images.reshape(len(images), -1)),
    }


def changes(before: Any, now: Mapping[str, Mapping[str, Any]]) -> str:
    """How data differ from those of a run's header, in words, or ""; ``before`` may be of an older version, or no such.

    Example:
        >>> changes({"train": {"classes": 64, "names": "a"}}, {"train": {"classes": 63, "names": "b"}})
        'train: 63 classes instead of 64, other names'
    """
    words = []
    for split, own in now.items():
        old = before.get(split) if isinstance(before, dict) else None
        if not isinstance(old, dict):
            continue
        texts = [
            f"{value} {name} instead of {old[name]}" if type(value) is type(old.get(name)) is int else f"other {name}"
            for name, value in own.items()
            if old.get(name) != value
        ]
        words += [f"{split}: {', '.join(texts)}"] if texts else []
    return "; ".join(words)


def _pixels(images: Tensor) -> str:  # (n, values)
    """A digest of type, shape and values, or of as many of each image as there is time for."""
    n, size = images.shape
    step = max(1, math.ceil(images.numel() / SAMPLE))
    step = next(k for k in itertools.count(step) if math.gcd(k, size) == 1)  # of all columns and channels
    digest = hashlib.sha256(f"{images.dtype} {n} {size}".encode())
    for part in images.split(1024):
        digest.update(part[:, ::step].contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()
