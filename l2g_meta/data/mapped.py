"""A file from which long parts are taken as views of its memory map instead of copies."""

from __future__ import annotations

import mmap
from typing import BinaryIO

VIEWED = 1024  # bytes from which a part is a view


class MappedFile:
    """An open file that gives no more than it has: a claimed length is checked before memory is taken.

    All but the views is read from the file itself, so that a file that is cut off meanwhile raises here. A view keeps
    the map, which outlives the file's closing, renaming and deletion. What another process writes into the file shows
    in the views; if it makes the file shorter, reading a view behind the new end ends this process (SIGBUS), as with
    every mapped array.

    Args:
        file: as ``open(path, "rb")`` gives it.
        size: bytes of it that are mapped; a shorter file raises ``ValueError``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as temporary:
        ...     _ = temporary.write(b"ab" + bytes(2000))
        ...     _ = temporary.seek(0)
        ...     file = MappedFile(temporary, 2002)
        ...     file.read(2), file.view(2000).nbytes
        (b'ab', 2000)
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.readline = file, size, file.readline
        # Python would take a length of 0 as the whole file
        self.map = memoryview(mmap.mmap(file.fileno(), max(size, 1), access=mmap.ACCESS_READ))

    def read(self, n: int) -> bytes:
        """The next n bytes.

        Raises:
            EOFError: if there are fewer.
        """
        if n > 65536:
            self.check(n)
        data = self.file.read(n)
        if len(data) < n:
            raise EOFError(f"{n} bytes are claimed, the file ends before")
        return data

    def view(self, n: int) -> bytes | memoryview:
        """As ``read``, but of what is long a read-only view."""
        if n < VIEWED:
            return self.read(n)
        self.check(n)
        start = self.file.tell()
        self.file.seek(n, 1)
        return self.map[start : start + n]

    def check(self, n: int) -> None:
        """Raises ``EOFError`` if fewer than n bytes are left."""
        if n > self.size - self.file.tell():
            raise EOFError(f"{n} bytes are claimed, the file ends before")
