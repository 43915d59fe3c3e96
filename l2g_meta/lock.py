"""A claim on a folder that ends with the process that holds it, however that ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from l2g_meta.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def claim(path: Path, *, remove: bool = False) -> Iterator[bool]:
    """Tries to lock a file, made if need be and at the end removed if wanted; yields whether it is ours.

    The operating system gives the lock up when the process ends, so a killed process leaves none behind. Machines that
    share a folder see each other's locks where its file system passes them on (NFS, Lustre with ``flock``).

    Raises:
        CheckpointError: if the file system has no locks or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with claim(Path(tempfile.mkdtemp()) / "lock") as ours:
        ...     print(ours)
        True
    """
    try:
        file = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(f"need to write {path}, got: {error.strerror}; choose another folder") from error
    with file:
        ours = _lock(file, path)
        try:
            yield ours
        finally:
            if ours and remove:
                with suppress(OSError):  # Windows removes no open file
                    path.unlink()


@contextmanager
def turn(path: Path, what: str) -> Iterator[None]:
    """As ``claim``, but waits until the lock is ours, and removes it afterwards.

    Standard error is told once, with ``what`` the other process does.
    """
    waits = False
    while True:
        with claim(path, remove=True) as ours:
            if ours:
                yield
                return
        if not waits:
            print(f"l2g: waits for another process that {what} (it has {path})", file=sys.stderr)
        waits = True
        time.sleep(0.5)


def _lock(file: IO[str], path: Path) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # else it was removed meanwhile
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        raise CheckpointError(
            f"cannot lock {path}: {error.strerror}; choose a folder on a file system with locks (a local one)"
        ) from error
