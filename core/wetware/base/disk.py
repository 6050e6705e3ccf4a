"""What a node's writers share: space on a full disk for what ends things.

What gives something waits for the disk and is refused while that is full. What takes something away
has taken effect already and must be written. So each writer keeps some space that only such writes
may take: a *reserve*. It is open for one write at a time, and what that leaves is taken back at
once, so that nobody else fills it. While a reserve is not whole its writer makes no other writes.

The first block of a reserve is written in place, which needs no space: where even the reserve is
used up it is marked. The mark says after a crash that something which has ended may be back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from wetware.base.log import get_logger
from wetware.identity import replace_private_file

log = get_logger("disk")

RESERVED_FILE: Final = "reserved"
RESERVED_BYTES: Final = 2 << 20
"""Twice what the broker's store can need for one write with its checkpoint."""
MARK_BYTES: Final = 4096


class Reserve:
    """The reserve of one writer, in its directory. Safe to use from several threads.

    Args:
        directory: Exists.

    Attributes:
        missing: Why it was not whole when it was last filled; "" if it was.
        marked: What the mark says; "" where there is none.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / RESERVED_FILE
        self._lock = threading.Lock()
        self.missing = ""
        self.marked = self._read_mark()

    def fill(self) -> bool:
        """Take the space that it lacks, as far as there is some; returns whether it is whole."""
        with self._lock:
            return self._take()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Give the space up for one write that ends something; what it leaves is taken back."""
        with self._lock:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                yield  # there was never any space for it
                return
            try:
                if os.fstat(fd).st_size > MARK_BYTES:
                    os.ftruncate(fd, MARK_BYTES)
                    os.fsync(fd)  # some file systems free it only then
            finally:
                os.close(fd)
            try:
                yield
            finally:
                self._take()

    def replace(self, path: Path, data: bytes, *, must: bool = False) -> None:
        """As `replace_private_file`; raises OSError.

        What `must` be written may take the reserve: it ends something, or no user can cause it.
        """
        if not must and self.missing and not self.fill():
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} beside the reserve")
        try:
            replace_private_file(path, data)
        except OSError:
            if not must:
                raise
            with self.open():
                replace_private_file(path, data)

    def mark(self, what: str) -> None:
        """Say that `what` has ended and may not be on the disk. Idempotent; never raises."""
        if self.marked != what:
            self.marked = what
            log.error("disk.not_durable", what=what, file=self._path, on_disk=self._write_mark())

    def unmark(self) -> None:
        """It is on the disk, or an operator has looked. Idempotent; never raises."""
        if self.marked:
            self.marked = ""
            self._write_mark()

    def _read_mark(self) -> str:
        try:
            with self._path.open("rb") as file:
                return file.read(MARK_BYTES).rstrip(b"\0").decode(errors="replace")
        except OSError:
            return ""

    def _write_mark(self) -> bool:
        """In the block that is there; whether it is on the disk."""
        block = self.marked.encode(errors="replace")[:MARK_BYTES].ljust(MARK_BYTES, b"\0")
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(fd, block, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError:
            return False
        return True

    def _take(self) -> bool:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(fd).st_size
                if size < MARK_BYTES:
                    os.pwrite(fd, bytes(MARK_BYTES - size), size)
                _allocate(fd)
                os.fsync(fd)
            except OSError:
                if os.fstat(fd).st_size < MARK_BYTES:
                    self._path.unlink()  # an empty file would look like a reserve
                raise
            finally:
                os.close(fd)
        except OSError as exc:
            why = exc.strerror or str(exc)
            if not self.missing:
                log.warning("disk.reserve_missing", file=self._path, why=why)
            self.missing = why
            return False
        self.missing = ""
        return True


def remedy(error: BaseException) -> str:
    """What to do about an error that is a disk's without room; "" for any other."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
        return "free some disk space, as `df -h` shows it, and run it again"
    return ""


def _allocate(fd: int) -> None:
    """Take all space of a reserve, to the last block that there is; raises OSError if some lacks.

    Also where the file is as long as that: a copy of the directory may have left holes.
    """
    at, step = MARK_BYTES, RESERVED_BYTES - MARK_BYTES
    while at < RESERVED_BYTES:
        step = min(step, RESERVED_BYTES - at)
        try:
            os.posix_fallocate(fd, at, step)
        except OSError:
            if step <= MARK_BYTES:
                raise
            step = max(MARK_BYTES, step // 2 // MARK_BYTES * MARK_BYTES)
        else:
            at += step


def write_all(fd: int, data: bytes | bytearray) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
