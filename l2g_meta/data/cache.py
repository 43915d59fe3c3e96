"""Converted data sets on disk: built once, renamed into place, read through a memory map."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from l2g_meta.data.classes import ClassDataset
from l2g_meta.data.pages import RESIDENT, Pages
from l2g_meta.errors import CheckpointError, DataError
from l2g_meta.files.locks import claim, turn


def cache_root() -> Path:
    """Folder of converted data: ``$L2G_CACHE``, else ``$XDG_CACHE_HOME/l2g-meta``, else ``~/.cache/l2g-meta``."""
    if "L2G_CACHE" in os.environ:
        return Path(os.environ["L2G_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "l2g-meta"


def cached(name: str, fingerprint: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Folder ``name-<digest>`` under ``cache_root()``, built by ``build(folder)`` the first time.

    Args:
        name: readable prefix of the folder.
        fingerprint: JSON values; whatever changes the result (source paths, sizes, times, versions, options).
        build: fills an empty folder; it is renamed into place only when this returns.

    Returns:
        The finished folder.

    Raises:
        DataError: if the folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    root = cache_root()
    folder = root / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    partial = root / f".{folder.name}.partial"
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(turn(partial.with_suffix(".lock"), f"converts {name}"))
            if folder.is_dir():  # somebody else was faster
                return folder
            _remove_left(root)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        except (CheckpointError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(
                f"need a writable folder for converted data, got {root} ({reason}); set L2G_CACHE to one"
            ) from error
        try:
            build(partial)
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(f"need room for converted data, {root} is full; make some, or set L2G_CACHE") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _remove_left(root: Path) -> None:
    """What killed processes left of other conversions; they may be of many gigabytes and of data that is gone."""
    for partial in root.glob(".*.partial"):
        with claim(partial.with_suffix(".lock"), remove=True) as ours:
            if ours:
                shutil.rmtree(partial, ignore_errors=True)


def file_fingerprint(path: Path) -> list[Any]:
    """Path, size in bytes and modification time in ns: changes when the file does."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def create_images(folder: Path, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Writable uint8 memory map (n, H, W, C) that ``open_dataset`` will find in ``folder``.

    Raises:
        DataError: if the disk has no room for it; writing to a map would end the process instead.
    """
    if (need := math.prod(shape)) > (free := shutil.disk_usage(folder).free):
        raise DataError(f"need {need:,} bytes for converted data, {folder.parent} has {free:,} left; set L2G_CACHE")
    return np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)


def reserve(folder: Path) -> None:
    """Takes the disk space of the images now: a map on a disk that fills up later would end the process."""
    if hasattr(os, "posix_fallocate"):
        with open(folder / "images.npy", "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def write_classes(folder: Path, labels: Sequence[int] | np.ndarray, class_names: Sequence[str]) -> None:
    """The labels (n,) and class names that belong to the images in ``folder``."""
    np.save(folder / "labels.npy", np.asarray(labels, dtype=np.int64), allow_pickle=False)
    (folder / "classes.json").write_text(json.dumps(list(class_names)), encoding="utf-8")


def open_dataset(
    folder: Path, *, name: str, split: str, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)
) -> ClassDataset:
    """The data set in a finished cache folder, its images memory-mapped.

    Raises:
        DataError: if a file is missing or damaged.
    """
    try:
        # Copy-on-write: PyTorch wants writable memory, the file stays as it is. A map is never larger than its file.
        images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(folder / "labels.npy", mmap_mode="r", allow_pickle=False)
        names = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        if not isinstance(images, np.memmap) or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError("its images are not uint8 (n, H, W, C)")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its class names are no list of texts")
        pages = Pages(images) if images.nbytes > RESIDENT else None
        return ClassDataset(
            images, np.array(labels), tuple(names), name=name, split=split, mean=mean, std=std, pages=pages
        )
    except Exception as error:  # a damaged header or JSON text can fail in many ways
        raise DataError(
            f"need converted data in {folder}, got {type(error).__name__}: {str(error)[:200]}; delete that folder, it "
            "is made again"
        ) from error
