"""The one way in which this package writes a file: new, beside its place, to the disk, then renamed."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from l2g_meta.errors import CheckpointError

PARTIAL = ".l2g-"  # how files begin that are not yet in their place


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is in its place when the block ends, and never in part.

    It is made under a random name and exclusively, so that no link is followed. A link at ``path`` is replaced, what it
    points to stays as it is. Several processes may write one path; the last one stays.

    Raises:
        CheckpointError: if the disk is full, the folder cannot be written, or ``path`` is no regular file; what was
            there is untouched.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with new_file(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_text()
        'whole'
    """
    try:
        with replaced(path) as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; what was there before is untouched; make room or choose "
            "another path"
        ) from error


@contextmanager
def replaced(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """What ``new_file`` does, with the system's own errors; under the name ``partial`` until then, if given.

    Raises:
        OSError: as ``new_file``, or if ``partial`` is there.
    """
    partial = partial or path.with_name(PARTIAL + secrets.token_hex(8))
    try:
        _check_place(path)
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)  # the new name, too, survives a power failure
    finally:  # also when interrupted
        _remove(partial)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file as ``new_file`` does.

    Raises:
        CheckpointError: as ``new_file``.
    """
    with new_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8 as ``new_file`` does; what it lacks (of names that are no UTF-8) by its escape in Python.

    Raises:
        CheckpointError: as ``new_file``.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def open_to_append(path: Path) -> IO[str]:
    """A text file that ``new_file`` has made, to go on writing; a link is not followed.

    Raises:
        OSError: if it is a link, or cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, (flags | getattr(os, "O_NOFOLLOW", 0)) & ~os.O_CREAT)

    return open(path, "a", newline="", encoding="utf-8", opener=opener)


def check_writable(path: Path) -> None:
    """That ``new_file`` can write a path, before hours of work.

    Raises:
        OSError: if not.
    """
    _check_place(path)
    trial = path.with_name(PARTIAL + secrets.token_hex(8))
    open(trial, "xb").close()
    trial.unlink()


def remove_partial(folder: Path) -> None:
    """Removes what processes that were killed left of files in a folder that nobody else writes."""
    for left in folder.glob(f"{PARTIAL}*"):
        _remove(left)


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    with suppress(OSError):  # a folder that cannot be written has no such file; one of that name is none of ours
        path.unlink()


def _check_place(path: Path) -> None:
    """That renaming a file into ``path`` replaces a file, not a folder, ``/dev/null``, or what ``/dev/stdout`` is."""
    hops = [path]
    while hops[-1].is_symlink() and len(hops) < 40:  # as many as Linux follows
        hops.append(hops[-1].parent / os.readlink(hops[-1]))
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode) or any(os.path.realpath(p.parent).startswith("/proc/") for p in hops):
            raise OSError(f"{path} is no regular file")
