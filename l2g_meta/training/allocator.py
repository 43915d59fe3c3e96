"""Memory of feature maps on the CPU: reused from step to step instead of returned to the system and fetched again."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory for the next step; returns whether it could be told.

    By default glibc maps every block above 32 MB anew and hands it back when it is freed, so that the kernel clears
    each feature map of each step page by page: a fifth of an 84-pixel step. The whole process is changed: it stays as
    large as its largest step was. The commands of ``l2g`` do this; a script may. Linux with glibc; no effect elsewhere.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
