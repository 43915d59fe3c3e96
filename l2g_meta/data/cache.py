"""Converted data sets on disk: built once, synced, renamed into place, checked, read through a memory map.

A finished folder holds ``checksums.json``: of each file its SHA-256, and the size, times and inode that it had when the
digest was taken. While these are the same, the file is not read again; else its digest decides.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from l2g_meta.data.dataset import ClassDataset
from l2g_meta.errors import CheckpointError, DataError
from l2g_meta.files.locks import claim, turn
from l2g_meta.files.names import shown
from l2g_meta.files.reading import open_regular, read_text
from l2g_meta.files.writing import replaced, sync

FILES = ("images.npy", "labels.npy", "classes.json")  # of a finished folder; no other is read
CHECKSUMS = "checksums.json"
_sound: dict[Path, dict[str, list[int]]] = {}  # stamps of folders that this process found as they were


def cache_root() -> Path:
    """Folder of converted data: ``$L2G_CACHE``, else ``$XDG_CACHE_HOME/l2g-meta``, else ``~/.cache/l2g-meta``.

    A variable without a text counts as none: it would name the current folder.
    """
    own, base = os.environ.get("L2G_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else Path(base or "~/.cache").expanduser() / "l2g-meta"


def cached(name: str, fingerprint: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Folder ``name-<digest>`` under ``cache_root()``, built by ``build(folder)`` the first time.

    A folder of which a file is torn or changed is built again, and standard error is told so.

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
    if folder.is_dir() and not changed(folder):
        return folder
    partial = root / f".{folder.name}.partial"
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(turn(partial.with_suffix(".lock"), f"converts {name}"))
            if os.path.lexists(folder):
                if not (what := changed(folder)):  # somebody else was faster
                    return folder
                print(f"l2g: {shown(str(folder))} is made again: {what}", file=sys.stderr)
            shutil.rmtree(partial, ignore_errors=True)
            _remove_left(root)
            partial.mkdir()
        except (CheckpointError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"need a writable folder for data, got {root} ({reason}); set L2G_CACHE to one") from error
        try:
            build(partial)
            seal(partial)
            with suppress(OSError):  # a file, link or pipe
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            sync(root)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(f"need room for converted data, {root} is full; make some, or set L2G_CACHE") from error
            if error.filename is not None:
                raise
            raise DataError(f"cannot write converted data to {root}: {error.strerror}; set L2G_CACHE") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _remove_left(root: Path) -> None:
    """What killed processes left of other conversions; they may be of many gigabytes and of data that is gone."""
    for partial in root.glob(".*.partial"):
        with claim(partial.with_suffix(".lock"), remove=True) as ours:
            if ours:
                shutil.rmtree(partial, ignore_errors=True)


def seal(folder: Path) -> None:
    """Syncs the files of a folder and writes their checksums beside them."""
    for path in (*(folder / name for name in FILES), folder):
        sync(path)
    _write_checksums(folder, {name: [file_digest(folder / name), *_stamp(f"{folder}/{name}")] for name in FILES})


def changed(folder: Path) -> str:
    """What of a sealed folder is not as it was, in words, or ""; files are read only if they were touched since."""
    try:
        base = str(folder)
        stamps = {name: _stamp(f"{base}/{name}") for name in (CHECKSUMS, *FILES)}
        if stamps == _sound.get(folder):
            return ""
        sealed = json.loads(read_text(folder / CHECKSUMS))
        touched = [name for name in FILES if sealed[name][1:] != stamps[name]]
        for name in touched:
            if file_digest(folder / name) != sealed[name][0]:
                return f"{name} does not fit its checksum"
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        return f"it cannot be checked ({type(error).__name__})"
    if touched:
        with suppress(OSError):  # a cache that may only be read
            _write_checksums(folder, {name: [sealed[name][0], *stamps[name]] for name in FILES})
    _sound[folder] = stamps  # from before the digests: what changed meanwhile is looked at again
    return ""


def _stamp(path: str) -> list[int]:
    """What changes with a file: size, times of content and of attributes, inode."""
    s = os.stat(path)
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def _write_checksums(folder: Path, checksums: Mapping[str, Any]) -> None:
    with replaced(folder / CHECKSUMS) as file:
        file.write(json.dumps(checksums).encode())


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


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
    images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # takes the room now: a map on a disk that fills up later would end the process
        with open(folder / "images.npy", "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return images


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
        return ClassDataset(images, np.array(labels), tuple(names), name=name, split=split, mean=mean, std=std)
    except Exception as error:  # a damaged header or JSON text can fail in many ways
        raise DataError(
            f"need converted data in {folder}, got {type(error).__name__}: {str(error)[:200]}; delete that folder, it "
            "is made again"
        ) from error
