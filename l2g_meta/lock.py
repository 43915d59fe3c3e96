"""A claim on a folder that ends with the process that holds it, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from l2g_meta.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Tries to lock a file, made if need be; yields whether it is ours.

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
        yield _lock(file, path)


def _lock(file: IO[str], path: Path) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise CheckpointError(
            f"cannot lock {path}: {error.strerror}; choose a folder on a file system with locks (a local one)"
        ) from error
