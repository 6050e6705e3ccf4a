"""A file that is handed to another process of this machine, instead of its bytes."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import Final

FILES_MAX: Final = 64
"""Handed over in one system call, and of a connection those of which no frame has told yet."""
_KINDS: Final = (os.O_RDONLY, os.O_RDWR)


class Handed:
    """A descriptor, which belongs to this and is closed with the last one that refers to it.

    Attributes:
        fd: The descriptor.
        at: How many bytes have been read.
        length: How many are to be.
    """

    def __init__(self, fd: int, length: int = 0) -> None:
        self.fd, self.at, self.length = fd, 0, length

    def __del__(self) -> None:
        os.close(self.fd)

    def read_into(self, buffer: memoryview) -> int:
        """The next bytes; returns how many, fewer where the file has no more. Raises OSError."""
        return os.preadv(self.fd, [buffer], self.at) if buffer else 0


def readable(fd: int) -> bool:
    """Whether it is a regular file on a disk, open for reading: a read waits for nobody."""
    try:
        found, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError:
        return False
    opened = flags & (os.O_ACCMODE | os.O_PATH) in _KINDS
    return opened and stat.S_ISREG(found.st_mode) and _on_disk(found)


def _on_disk(found: os.stat_result) -> bool:
    """What a program or another machine serves (FUSE, NFS), maybe never, is of no device."""
    return os.major(found.st_dev) != 0
