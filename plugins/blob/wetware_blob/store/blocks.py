"""Blocks: their bytes, in files of their own or in rows of the index.

A block exists once its row is on the disk, and the row is written after its bytes: the file, then
the directory that names it. What has no row is no block and is removed at the next start.
"""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from wetware.base.log import get_logger
from wetware.errors import NotFound
from wetware_blob.store.errors import Damaged
from wetware_blob.store.index import FILES_PER_DIRECTORY, Row, batches, charge, check, file_name

if TYPE_CHECKING:
    from wetware.base.files import Database, Files
    from wetware_blob.store.bits import Bits
    from wetware_blob.store.index import Index

log = get_logger("blob.store")

OPEN_MAX: Final = 16
"""Files that one thread writes before it syncs them."""


class Blocks:
    """All of it blocks: call it in a thread."""

    def __init__(self, files: Files, index: Index) -> None:
        self._files, self._index = files, index
        self._next_file = 0
        self._numbering, self._naming = threading.Lock(), threading.Lock()
        self._unsure: set[int] = set()

    def sweep(self) -> None:
        """Make files and rows agree: what has no row is removed, what has no file is damaged.

        Raises Malformed.
        """
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
        self._next_file = (max(found | known, default=-1) + 1) * FILES_PER_DIRECTORY
        if orphans or lost:
            log.info("blob.swept", orphans=len(orphans), lost=len(lost))
        for row in self._index.find(lost).values():
            self._spoil(row, "its file is gone")

    def _spoil(self, row: Row, why: str) -> None:
        log.error("blob.damaged", block=row.digest.hex(), why=why)
        self._index.spoil(row)

    def _number(self, many: int) -> int:
        """The first of so many numbers of new files, at most FILES_PER_DIRECTORY, in a directory.

        Raises OSError; where one could not be made, or named, another one is next.
        """
        with self._numbering:
            directory, used = divmod(self._next_file, FILES_PER_DIRECTORY)
            if not used or used + many > FILES_PER_DIRECTORY or directory in self._unsure:
                directory += used > 0
                self._next_file = (directory + 1) * FILES_PER_DIRECTORY
                self._files.make_directory(str(directory))
                self._files.sync_directory("")
                self._next_file = directory * FILES_PER_DIRECTORY
            self._next_file += many
            return self._next_file - many

    def write(self, blocks: Sequence[tuple[bytes, bytes]]) -> dict[bytes, int]:
        """Bring blocks (digest, bytes) to files, and these to the disk; the number of each one's.

        Raises OSError: none is left.
        """
        first = self._number(len(blocks))
        numbers = {digest: number for number, (digest, _) in enumerate(blocks, first)}
        try:
            self._write_files(first, blocks)
            self._name_files(first)
        except OSError:
            self.remove_files([file_name(number, digest) for digest, number in numbers.items()])
            raise
        return numbers

    def _write_files(self, first: int, blocks: Sequence[tuple[bytes, bytes]]) -> None:
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

    def _name_files(self, first: int) -> None:
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

    def remove_files(self, names: Collection[str]) -> None:
        """Of which no row is there; what stays is removed at the next start."""
        for name in names:
            try:
                self._files.remove(name)
            except FileNotFoundError:
                pass
            except OSError as exc:
                log.warning("blob.not_removed", file=name, why=exc.strerror)

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
        if not row.damaged:
            self._spoil(row, why)
        raise Damaged(
            f"block {digest.hex()} is damaged on this node's disk: {why}",
            hint="fetch it from another node that has it, or put it again",
        )

    def damaged(self, rows: Collection[Row]) -> list[bytes]:
        """Read these blocks; returns the digests of those that are damaged."""
        found: list[bytes] = []
        for row in rows:
            try:
                self.read(row.digest)
            except Damaged:
                found.append(row.digest)
            except NotFound:
                if row in self._index.after(row.id - 1, 1):  # not deleted meanwhile
                    self._index.suspect()  # its hash is damaged
                    found.append(row.digest)
        return found

    # --- in a transaction -------------------------------------------------------------------------

    def add(
        self, db: Database, blocks: Mapping[bytes, bytes], files: Mapping[bytes, int], keep: Bits
    ) -> tuple[int, list[str]]:
        """Rows for some blocks (digest: bytes), the larger ones in these files; `keep` has them.

        What is there already stays as it is, unless it is damaged. Returns what the store is
        charged more than before, and the files that no row names.
        """
        more = 0
        trash: list[str] = []
        there = self._index.find_in(db, blocks)
        ((last,),) = db.execute("SELECT COALESCE(MAX(id), 0) FROM blocks").fetchall()
        for digest, data in blocks.items():
            file, row = files.get(digest), there.get(digest)
            if row and not row.damaged:  # another writer was first
                self._index.keep(row.id, keep)
                if file is not None:
                    trash.append(file_name(file, digest))
                continue
            if row:
                id_ = row.id
                more -= row.charged
                if row.file is not None:
                    trash.append(row.name)
                sql = "UPDATE blocks SET size = ?, file = ?, damaged = 0 WHERE id = ?"
                db.execute(sql, (len(data), file, id_))
            else:
                id_ = last = last + 1
                sql = "INSERT INTO blocks (id, digest, size, file) VALUES (?, ?, ?, ?)"
                db.execute(sql, (id_, digest, len(data), file))
            more += charge(len(data))
            self._index.keep(id_, keep)
            if file is None:
                db.execute("INSERT OR REPLACE INTO small VALUES (?, ?)", (id_, data))
        return more, trash

    def delete(self, db: Database, rows: Collection[Row], keep: Bits) -> list[Row]:
        """Those of some rows that are not in `keep`; returns them. Their files stay."""
        gone = [row for row in rows if row.id not in keep]
        for row in gone:
            db.execute("DELETE FROM blocks WHERE id = ?", (row.id,))
            if row.file is None:
                db.execute("DELETE FROM small WHERE id = ?", (row.id,))
        return gone
