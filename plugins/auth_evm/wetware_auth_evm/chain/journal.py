"""A key-value store in memory that outlives its process: an append-only file of whole blocks.

What the try-out chain writes for one block becomes one record with a checksum, on disk before the
block is acknowledged. A start reads the records again and executes nothing: it takes milliseconds
where running the transactions anew takes 10 ms each, and every block has the hash that it had,
whichever release of the EVM reads it. The last record may be torn by a crash; nobody was told of
its block, and it is cut off. Any other damage is reported.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Final

import cbor2

from wetware.errors import ConfigError

MAGIC: Final = b"wetware try-out chain 1\n"
RECORD_BYTES_MAX: Final = 16 << 20
"""Of one block, which has some 5 KiB."""
JOURNAL_BYTES_MAX: Final = 256 << 20
"""Of the file, and about as much memory: some 50,000 changes. Then the chain is full."""
ZEROS: Final = 8
"""At its end they say of the last record that the power failed before all of it was on disk."""
_HEAD: Final = struct.Struct(">I32s")


class ChainFull(Exception):
    """JOURNAL_BYTES_MAX is reached."""


class Journal:
    """The file. One process at a time has it: the caller sees to that.

    Args:
        path: Made (0600) if it is not there.

    Raises ConfigError for a file that is damaged, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.store: dict[bytes, bytes] = {}
        self._undo: dict[bytes, bytes | None] = {}
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as exc:
            raise ConfigError(f"cannot use {path}: {exc.strerror}", code="config.dev") from exc
        try:
            self._size = self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def _read(self) -> int:
        """Fill `store`; returns where the good records end, and cuts off what a crash tore."""
        size = os.fstat(self._fd).st_size
        if size > JOURNAL_BYTES_MAX + RECORD_BYTES_MAX:
            raise self._damaged("it is too long")
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read()
        if not data.startswith(MAGIC):
            if MAGIC.startswith(data.rstrip(b"\0")):  # a crash at its very beginning
                os.ftruncate(self._fd, 0)
                self._append(0, MAGIC)
                _sync(self._path.parent)
                return len(MAGIC)
            raise self._damaged("it is something else, or of another release")
        at = len(MAGIC)
        while (end := self._record(data, at)) is not None:
            at = end
        if at < len(data):
            os.ftruncate(self._fd, at)
            os.fsync(self._fd)
        return at

    def _record(self, data: bytes, at: int) -> int | None:
        """Take one record; returns its end, or None where the file ends, torn or not."""
        if at + _HEAD.size > len(data) or not any(data[at:]):
            return None
        length: int
        length, digest = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + _HEAD.size + length]
        end = at + _HEAD.size + length
        if len(body) < length <= RECORD_BYTES_MAX:
            return None
        if hashlib.sha256(body).digest() != digest:
            if not any(data[end - ZEROS :]):
                return None
            raise self._damaged(f"a record at byte {at} has a wrong checksum")
        for key, value in cbor2.loads(body).items():
            if value is None:
                self.store.pop(key, None)
            else:
                self.store[key] = value
        return end

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(
            f"the try-out chain in {self._path} is damaged: {why}",
            hint="restore the file; or begin anew with another --data-dir",
            code="config.dev_damaged",
        )

    # --- as a database ----------------------------------------------------------------------------

    def put(self, key: bytes, value: bytes | None) -> None:
        """Change a value in memory; None deletes it. `commit` keeps it, `rollback` undoes it."""
        if key not in self._undo:
            self._undo[key] = self.store.get(key)
        if value is None:
            del self.store[key]
        else:
            self.store[key] = value

    def commit(self) -> None:
        """Put what was changed on disk, as one; raises OSError or ChainFull with all undone."""
        body = cbor2.dumps({key: self.store.get(key) for key in self._undo})
        if len(body) > RECORD_BYTES_MAX or self._size + len(body) > JOURNAL_BYTES_MAX:
            self.rollback()
            raise ChainFull
        head = _HEAD.pack(len(body), hashlib.sha256(body).digest())
        try:
            self._size = self._append(self._size, head + body)
        except BaseException:
            self.rollback()
            raise
        self._undo.clear()

    def rollback(self) -> None:
        """Undo what was changed since the last commit."""
        for key, value in self._undo.items():
            if value is None:
                self.store.pop(key, None)
            else:
                self.store[key] = value
        self._undo.clear()

    def _append(self, at: int, data: bytes) -> int:
        try:
            view = memoryview(data)
            while view:
                view = view[os.pwrite(self._fd, view, at + len(data) - len(view)) :]
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, at)
            raise
        return at + len(data)

    def close(self) -> None:
        os.close(self._fd)


def _sync(directory: Path) -> None:
    """Put a new file's name on disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
