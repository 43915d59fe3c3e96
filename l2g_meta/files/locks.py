"""A claim on a folder that ends with the process that holds it, however that ends."""

from __future__ import annotations

import itertools
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from l2g_meta.errors import CheckpointError
from l2g_meta.files.names import shown


@contextmanager
def claim(path: Path, *, remove: bool = False) -> Iterator[bool]:
    """Tries to lock a file, made if need be and at the end removed if wanted; yields whether it is ours.

    The operating system gives the lock up when the process ends, so a killed process leaves none behind. Machines that
    share a folder see each other's locks where its file system passes them on (NFS, Lustre with ``flock``).

    Raises:
        CheckpointError: if the file system has no locks, the folder cannot be written, or the file is a link.

    Example:
        >>> import tempfile
        >>> with claim(Path(tempfile.mkdtemp()) / "lock") as ours:
        ...     print(ours)
        True
    """
    lock = FileLock(path, timeout=0)
    try:
        _refuse_links(path)
        with suppress(Timeout):
            lock.acquire()
    except (NotImplementedError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"need to lock {path}, got: {reason}; choose another folder, a local one") from error
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            if remove:
                with suppress(OSError):  # Windows removes no open file
                    path.unlink()
            lock.release()


@contextmanager
def turn(path: Path, what: str) -> Iterator[None]:
    """As ``claim``, but waits until the lock is ours, and removes it afterwards.

    Standard error is told once, with ``what`` the other process does.
    """
    for tries in itertools.count():
        with claim(path, remove=True) as ours:
            if ours:
                yield
                return
        if not tries:
            print(shown(f"l2g: waits for another process that {what} (it has {path})"), file=sys.stderr)
        time.sleep(0.5)


def _refuse_links(path: Path) -> None:
    """A link, symbolic or hard, would have the lock made or emptied elsewhere."""
    os.stat(path.parent)  # which the lock would make
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or (found.st_nlink > 1 and found.st_size):
            raise OSError("it is a link or no regular file; remove it")
