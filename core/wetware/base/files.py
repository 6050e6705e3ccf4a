"""The one layer under which all files of a durable store lie.

Each method but `rewrite` is about one call of the operating system and decides nothing: what is
written, synced or removed, and in which order, is decided above. So tests put a disk of their own
in its place that loses, tears and refuses, and find a sync that lacks above.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path
from typing import Final

from wetware.base import writeback
from wetware.base.disk import Reserve

_PIECE_BYTES: Final = 256 << 10

Database = sqlite3.Connection
"""One that begins no transaction by itself; of it `execute`, `fetchall` and `close` are used."""


class Files:
    """Files below a directory, by their relative names. Raises OSError. Safe in several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, name: str, size: int) -> int:
        """A descriptor of a new file that has room for so many bytes; raises FileExistsError.

        With its room known an fsync need not wait for the file system to find some: 3 to 6 times as
        many bytes a second were written.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(self._root / name, flags, 0o600)
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
        except OSError:
            os.close(fd)
            raise
        return fd

    def open(self, name: str) -> int:
        return os.open(self._root / name, os.O_RDWR | os.O_CLOEXEC)

    def read(self, name: str, bytes_max: int) -> bytes:
        """At most so many bytes, from the file's beginning."""
        with open(self._root / name, "rb", buffering=0) as file:
            data = file.read(bytes_max) or b""
            while len(data) < bytes_max and (more := file.read(bytes_max - len(data))):
                data += more
            return data

    def write(self, fd: int, data: bytes) -> None:
        """Over the file's beginning, in pieces as `cp` has them.

        A page cache takes a longer one into a long run of pages: in a virtual machine those are the
        ones that its host has to find first, which took five times as long as all the rest.
        """
        view, at = memoryview(data), 0
        while at < len(view):
            at += os.pwrite(fd, view[at : at + _PIECE_BYTES], at)
        writeback.begin(fd)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def rewrite(self, name: str) -> None:
        """Bring a file to the disk, if there is one, that may be whole in the page cache alone."""
        try:
            fd = self.open(name)
        except FileNotFoundError:
            return
        try:
            self.write(fd, self.read(name, 1 << 30))
            self.sync(fd)
        finally:
            self.close(fd)

    def copy(self, source: Path, name: str) -> None:
        """A new file, for its owner alone, with what another one has, which may lie anywhere."""
        with (
            (self._root / source).open("rb") as data,
            os.fdopen(self.create(name, 0), "wb") as file,
        ):
            shutil.copyfileobj(data, file)

    def close(self, fd: int) -> None:
        os.close(fd)

    def remove(self, name: str) -> None:
        os.unlink(self._root / name)

    def rename(self, name: str, new: str) -> None:
        """In the place of `new`, if that is there."""
        os.rename(self._root / name, self._root / new)

    def link(self, name: str, new: str) -> None:
        os.link(self._root / name, self._root / new)

    def size(self, name: str) -> int:
        return os.stat(self._root / name).st_size

    def names(self, directory: str) -> list[str]:
        return os.listdir(self._root / directory)

    def make_directory(self, name: str) -> None:
        os.mkdir(self._root / name, 0o700)

    def remove_directory(self, name: str) -> None:
        os.rmdir(self._root / name)

    def sync_directory(self, name: str) -> None:
        fd = os.open(self._root / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self) -> int:
        found = os.statvfs(self._root)
        return found.f_bavail * found.f_frsize

    def path(self, name: str) -> str:
        """As a statement of SQLite names it."""
        return str(self._root / name)

    def connect(self, name: str) -> Database:
        return sqlite3.connect(self._root / name, isolation_level=None, check_same_thread=False)

    def reserve(self) -> Reserve:
        return Reserve(self._root)
