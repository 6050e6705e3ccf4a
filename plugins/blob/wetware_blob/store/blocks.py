"""Blocks: their bytes, in files of their own or in rows of the index.

A block exists once its row is on the disk, and the row is written after its bytes: the file, then
the directory that names it. What has no row is no block and is removed at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wetware.base.log import get_logger
from wetware.errors import NotFound
from wetware_blob.store.errors import Damaged
from wetware_blob.store.index import (
    FILES_PER_DIRECTORY,
    SMALL_BYTES_MAX,
    Change,
    Row,
    batches,
    charge,
    check,
    file_name,
)

if TYPE_CHECKING:
    from wetware_blob.store.bits import Bits
    from wetware_blob.store.files import Database, Files
    from wetware_blob.store.index import Index

log = get_logger("blob.store")

OPEN_MAX: Final = 16
"""Files that one thread writes before it syncs them."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What the start of a store found: files without a row, and rows without a file."""

    orphans: int = 0
    lost: tuple[bytes, ...] = ()


class Blocks:
    """All of it blocks: call it in a thread."""

    def __init__(self, files: Files, index: Index) -> None:
        self._files, self._index = files, index
        self.next_directory = 0
        self._naming = threading.Lock()
        self._unsure: set[int] = set()

    def sweep(self) -> Swept:
        """Make files and rows agree; what has no row is removed. Raises Malformed."""
        files, orphans, lost = self._files, list[str](), list[bytes]()
        empty: list[int] = []
        found = {int(name) for name in files.names("") if name.isdecimal()}
        with self._index.reading() as db:
            sql = f"SELECT DISTINCT file / {FILES_PER_DIRECTORY} FROM blocks WHERE file NOT NULL"  # noqa: S608 constant
            known = {number for (number,) in db.execute(sql).fetchall()}
            for directory in sorted(found | known):
                first = directory * FILES_PER_DIRECTORY
                rows = db.execute(
                    "SELECT file, digest, damaged FROM blocks WHERE file BETWEEN ? AND ?",
                    (first, first + FILES_PER_DIRECTORY - 1),
                ).fetchall()
                names = {file_name(number, digest): digest for number, digest, _ in rows}
                there = set()
                if directory in found:
                    there = {f"{directory}/{name}" for name in files.names(str(directory))}
                orphans += there - names.keys()
                whole = {digest for _, digest, damaged in rows if not damaged}
                lost += [names[n] for n in names.keys() - there if names[n] in whole]
                if directory in found and not names:
                    empty.append(directory)
            if orphans:  # a row may be there that one key does not lead to
                check(db, "blocks")
        for name in orphans:
            files.remove(name)
        for directory in empty:
            files.remove_directory(str(directory))
        self.next_directory = max(found | known, default=-1) + 1
        return Swept(len(orphans), tuple(lost))

    def make_directory(self) -> int:
        """The number of a new directory's first file."""
        number, self.next_directory = self.next_directory, self.next_directory + 1
        self._files.make_directory(str(number))
        self._files.sync_directory("")
        return number * FILES_PER_DIRECTORY

    def write_files(self, first: int, blocks: Sequence[tuple[bytes, bytes]]) -> None:
        """Write the bytes of some blocks (digest, bytes), numbered from `first`. Raises OSError."""
        for some in batches(enumerate(blocks, first), OPEN_MAX):
            fds: list[int] = []
            try:
                for number, (digest, data) in some:
                    fds.append(self._files.create(file_name(number, digest), len(data)))
                    self._files.write(fds[-1], data)
                for fd in fds:  # all are on their way by then
                    self._files.sync(fd)
            finally:
                for fd in fds:
                    self._files.close(fd)

    def name_files(self, first: int) -> None:
        """Bring the names of the files in the directory of this one to the disk.

        Once that has failed no later sync of the directory is believed: the names of others that
        wait may be lost with it, and it would have nothing to do.
        """
        directory = first // FILES_PER_DIRECTORY
        with self._naming:
            if directory in self._unsure:
                raise OSError(errno.EIO, "a sync of its directory has failed")
            try:
                self._files.sync_directory(str(directory))
            except OSError:
                self._unsure.add(directory)
                raise

    def usable(self, number: int) -> bool:
        """Whether further files may be named in the directory of this one."""
        return number // FILES_PER_DIRECTORY not in self._unsure

    def remove_files(self, names: Sequence[str]) -> None:
        """Of what was not written: as far as they are there."""
        for name in names:
            with contextlib.suppress(OSError):
                self._files.remove(name)

    def read(self, digest: bytes) -> bytes:
        """The bytes of a block. Raises NotFound "not_found.blob", and Damaged."""
        before: Row | None = None
        while True:
            row = self._index.find([digest]).get(digest)
            if row is None:
                raise NotFound(f"block {digest.hex()} is not here", code="not_found.blob")
            why = "its bytes have another hash"
            try:
                if row.file is None:
                    data = self._index.small(row)
                else:
                    data = self._files.read(row.name, row.size + 1)
            except Exception as exc:  # also what SQLite says of a page
                data, why = None, str(exc)
            if data is not None and hashlib.sha256(data).digest() == digest:
                return data
            if row == before or row.damaged:
                break
            before = row  # it may have been deleted or written anew meanwhile
        error = Damaged(
            f"block {digest.hex()} is damaged on this node's disk: {why}",
            hint="fetch it from another node that has it, or put it again",
        )
        error.digest = digest
        if not row.damaged:
            log.error("blob.damaged", block=digest.hex(), why=why)
            self._index.spoil(row)
        raise error


def added(
    blocks: Mapping[bytes, bytes], files: Mapping[bytes, int], keep: Bits, spoiled: Set[bytes]
) -> Change[int]:
    """Rows for some blocks (digest: bytes), the larger ones in these files.

    Its result is what the store is charged more than before. All are added to `keep`. What is there
    already stays as it is, unless it is damaged.
    """

    def apply(db: Database, trash: list[str]) -> int:
        more = 0
        for digest, data in blocks.items():
            file = files.get(digest)
            found = db.execute(
                "SELECT id, digest, size, file, damaged FROM blocks WHERE digest = ?", (digest,)
            ).fetchall()
            row = Row(*found[0]) if found else None
            if row and not row.damaged and digest not in spoiled:
                keep.add(row.id)  # another writer was first
                if file is not None:
                    trash.append(file_name(file, digest))
                continue
            if row:
                id_ = row.id
                more -= row.charged
                if row.file is not None:
                    trash.append(row.name)
                db.execute(
                    "UPDATE blocks SET size = ?, file = ?, damaged = 0 WHERE id = ?",
                    (len(data), file, id_),
                )
            else:
                ((id_,),) = db.execute("SELECT COALESCE(MAX(id), 0) + 1 FROM blocks").fetchall()
                db.execute(
                    "INSERT INTO blocks (id, digest, size, file) VALUES (?, ?, ?, ?)",
                    (id_, digest, len(data), file),
                )
            more += charge(len(data))
            keep.add(id_)
            if file is None:
                db.execute("INSERT OR REPLACE INTO small VALUES (?, ?)", (id_, data))
        return more

    names = [file_name(number, digest) for digest, number in files.items()]
    size = sum(len(data) for data in blocks.values() if len(data) <= SMALL_BYTES_MAX)
    return Change(apply, size=size, files=names)
