"""The disk begins to write before a sync waits for it, while the processor does what comes next."""

from __future__ import annotations

import ctypes
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_WRITE: Final = 2
"""SYNC_FILE_RANGE_WRITE: begin, and wait for nothing."""


def begin(fd: int) -> None:
    """Write what the page cache has of a file. Promises nothing: a sync still says what failed."""
    _LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE)
