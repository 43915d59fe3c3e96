"""Reading files that somebody else may have made: regular ones alone, of bounded size."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_TEXT = 2**26  # bytes of a JSON file


def open_regular(path: Path | str) -> BinaryIO:
    """A regular file to read; links to one are followed.

    A named pipe would keep its reader waiting for ever, a device may never end.

    Raises:
        OSError: if it is something else, or cannot be opened.

    Example:
        >>> open_regular("/dev/zero")
        Traceback (most recent call last):
            ...
        OSError: [Errno 22] it is no regular file: '/dev/zero'
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(22, "it is no regular file", os.fspath(path))
    return os.fdopen(descriptor, "rb")


def pass_over_matplotlibrc() -> None:
    """Has Matplotlib imported without the ``matplotlibrc`` of the current folder, which may be anybody's.

    Matplotlib reads that file first, whatever the environment says; it may never end, or have LaTeX run.
    """
    if os.path.lexists("matplotlibrc"):
        here = os.getcwd()
        os.chdir(os.sep)
        try:
            import matplotlib  # noqa: F401
        finally:
            os.chdir(here)


def read_text(path: Path, *, errors: str = "strict", most: int = MAX_TEXT) -> str:
    """The text in a regular file of at most so many bytes, in UTF-8.

    Raises:
        OSError: as ``open_regular``, or if it is larger.
        UnicodeDecodeError: if it is no UTF-8, unless ``errors`` allows that.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(27, f"it has {size} bytes, more than {most}", os.fspath(path))
        return file.read().decode("utf-8", errors)
