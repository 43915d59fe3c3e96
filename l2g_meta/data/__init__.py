"""Data sets, and tasks drawn from them. A new data set is one file with ``SPLITS``, ``DEFAULTS`` and ``load``."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from l2g_meta.data.dataset import ClassDataset as ClassDataset
from l2g_meta.data.dataset import MapDataset as MapDataset
from l2g_meta.data.pairs import Episodes as Episodes
from l2g_meta.data.pairs import TaskPairs as TaskPairs
from l2g_meta.errors import DataError

DATASETS = ("glyphs", "mini-imagenet", "tiered-imagenet", "folder")


def dataset_module(name: str) -> ModuleType:
    """The file of a built-in data set.

    Raises:
        DataError: for an unknown name.
    """
    if name not in DATASETS:
        raise DataError(f"need a data set of {', '.join(DATASETS)}; got {name!r}")
    return importlib.import_module(f"l2g_meta.data.sets.{name.replace('-', '_')}")


def load(
    name: str,
    split: str,
    *,
    root: Path | str | None = None,
    image_size: int | None = None,
    download: bool = False,
    **options: Any,
) -> ClassDataset:
    """One split of a built-in data set, converted once to a memory-mapped array.

    Args:
        name: ``"glyphs"`` (embedded), ``"mini-imagenet"``, ``"tiered-imagenet"`` or ``"folder"``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: folder that holds the data; not needed for glyphs.
        image_size: height and width in pixels; the data set's own by default. Another size is another benchmark.
        download: get missing files from where learn2learn gets them.
        options: arguments of one data set, such as ``split_seed`` of ``folder``.

    Raises:
        DataError: if the data is missing or damaged, saying what layout is expected.

    Example:
        >>> load("glyphs", "validation").image_shape
        (1, 28, 28)
    """
    return dataset_module(name).load(split, root=root, image_size=image_size, download=download, **options)
