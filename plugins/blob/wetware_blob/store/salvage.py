"""A new index from what can be read of a damaged one, and from the files of blocks.

The old one stays where it is until the new one is on the disk, and beside it from then on: a crash
meanwhile makes the next start do all of it again. Whatever is taken over is checked: a block by its
hash, a pin by its checksum. What is lost is named by the indexes of SQLite, which are copies of the
keys: a block as damaged, so that it is fetched again; a pin as one whose row is damaged. Of
downloads that were interrupted nothing is known any more: what they have is garbage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from operator import gt, lt
from typing import TYPE_CHECKING, Any, Final

from wetware.base.log import get_logger
from wetware.errors import WetwareError
from wetware_blob.format.cid import BLOCK_BYTES_MAX
from wetware_blob.store.index import (
    FILE,
    FILES_PER_DIRECTORY,
    STORE_ID_BYTES,
    Row,
    create,
    file_name,
    is_damage,
)
from wetware_blob.store.pins import Pin, read_pin

if TYPE_CHECKING:
    from wetware.base.files import Database, Files

log = get_logger("blob.store")

NEW: Final = "salvaged.db"
ASIDE: Final = f"{FILE}.damaged-"
_ROWS: Final = 256
"""Of one query."""


def aside(names: Collection[str]) -> list[str]:
    """The damaged index that was kept, if any."""
    return [name for name in names if name.startswith(ASIDE)]


def salvage(files: Files, at: float) -> None:
    """Put a new index in the place of a damaged one, which is kept under a name with the date.

    Its log is in it then, and its first page a new one. Raises what the disk raises.
    """
    names = files.names("")
    for name in [*aside(names), NEW]:
        if name in names:
            files.remove(name)
    new = files.connect(NEW)
    try:
        new.execute("PRAGMA synchronous=OFF")  # it is synced below, and until then made anew
        create(new, "OFF")
        _replace_first_page(files)
        old = files.connect(FILE)
        try:
            old.execute("PRAGMA locking_mode=EXCLUSIVE")
            _read(old, "PRAGMA wal_checkpoint(TRUNCATE)")
            new.execute("BEGIN")
            _blocks(old, new)
            _adopt_files(files, new)
            _pins(old, new)
            _id(old, new)
            new.execute("COMMIT")
        finally:
            old.close()
        ((lost,),) = new.execute("SELECT COUNT(*) FROM blocks WHERE damaged").fetchall()
    finally:
        new.close()
    fd = files.open(NEW)
    try:
        files.sync(fd)
    finally:
        files.close(fd)
    kept = f"{ASIDE}{datetime.fromtimestamp(at, UTC):%Y%m%dT%H%M%SZ}"
    files.link(FILE, kept)
    files.sync_directory("")
    if (wal := f"{FILE}-wal") in files.names(""):  # it is not of the new one
        files.rename(wal, f"{kept}-wal")
        files.sync_directory("")
    files.rename(NEW, FILE)  # brought to the disk as it is opened, before anything is written
    log.error("blob.index_salvaged", kept=kept, blocks_lost=lost)


def _replace_first_page(files: Files) -> None:
    """By that of an empty index: where the tables are is the same in each."""
    files.rewrite(f"{FILE}-wal")
    page = bytearray(files.read(NEW, 4096))
    page[18:20] = b"\2\2"  # with a log
    page[28:32] = (files.size(FILE) // 4096).to_bytes(4, "big")
    fd = files.open(FILE)
    try:
        files.write(fd, bytes(page))  # where it is lost, the index is damaged as before
    finally:
        files.close(fd)


def _read(old: Database, sql: str, *params: Any) -> list[Any] | None:
    """None where it cannot be read."""
    try:
        return old.execute(sql, params).fetchall()
    except Exception as exc:
        if not is_damage(exc):
            raise
        return None


def _walk(old: Database, source: str, key: str, more: str = "") -> Iterator[tuple[Any, ...]]:
    """Rows along a key, from both ends until what cannot be read: the key, and further columns."""
    columns = key.split(", ")
    for compare, order in ((gt, "ASC"), (lt, "DESC")):
        last: tuple[Any, ...] | None = None
        many = _ROWS
        by = ", ".join(f"{column} {order}" for column in columns)
        beyond = ">" if compare is gt else "<"
        while True:
            where = f"WHERE ({key}) {beyond} ({', '.join('?' * len(columns))})" if last else ""
            sql = f"SELECT {key}{more} FROM {source} {where} ORDER BY {by} LIMIT {many}"  # noqa: S608 constants
            rows = _read(old, sql, *(last or ()))
            if rows is None and many > 1:
                many = 1
                continue
            if rows == []:
                return
            with suppress(TypeError):  # of another type: it goes in circles as what is not beyond
                rows = [row for row in rows or () if not last or compare(row[: len(last)], last)]
                if rows:
                    yield from rows
                    last = tuple(rows[-1][: len(columns)])
                    continue
            break


def _blocks(old: Database, new: Database) -> None:
    for digest, id_ in _walk(
        old, "blocks INDEXED BY sqlite_autoindex_blocks_1", "digest", ", rowid"
    ):
        _block(new, id_, digest, 0, None, 1)
    lacking = "SELECT id FROM blocks WHERE id > ? AND size = 0"
    _rows(old, new, "blocks", "digest, size, file, damaged", _block, lacking)
    lacking = (
        "SELECT id FROM blocks WHERE id > ? AND file IS NULL AND id NOT IN (SELECT id FROM small)"
    )
    _rows(old, new, "small", "data", _small, lacking)
    sql = lacking.replace("id > ?", "1")
    new.execute(f"UPDATE blocks SET damaged = 1 WHERE id IN ({sql})")  # noqa: S608 constant


def _rows(
    old: Database,
    new: Database,
    table: str,
    columns: str,
    take: Callable[..., None],
    lacking: str,
) -> None:
    """`take` the rows of a table, along it and one by one by the IDs that lack then."""
    source = f"{table} NOT INDEXED"
    for row in _walk(old, source, "rowid", f", {columns}"):
        take(new, *row)
    last = 0
    while ids := new.execute(f"{lacking} ORDER BY id LIMIT {_ROWS}", (last,)).fetchall():
        for (last,) in ids:
            sql = f"SELECT rowid, {columns} FROM {source} WHERE rowid = ?"  # noqa: S608 constants
            for row in _read(old, sql, last) or ():
                take(new, *row)


def _block(new: Database, *columns: Any) -> None:
    """A row of which the types are right; a flipped size is found when it is read."""
    with suppress(WetwareError):
        row = Row(*columns)
        if len(row.digest) == 32 and row.id > 0 and 0 <= row.size <= BLOCK_BYTES_MAX:
            new.execute("INSERT OR IGNORE INTO blocks VALUES (?, ?, ?, ?, ?)", columns)
            sql = "UPDATE blocks SET size = ?, file = ?, damaged = ? WHERE id = ? AND digest = ?"
            new.execute(sql, (row.size, row.file, row.damaged, row.id, row.digest))


def _found(new: Database, digest: bytes, id_: int | None = None) -> tuple[int, int | None]:
    """The row of a block that was read: its ID and file."""
    sql = "INSERT OR IGNORE INTO blocks VALUES (?, ?, 0, NULL, 1)"
    new.execute(sql, (id_, digest))
    sql = "SELECT id, file FROM blocks WHERE digest = ?"
    if not (rows := new.execute(sql, (digest,)).fetchall()):  # another one has its ID
        return _found(new, digest)
    return rows[0][0], rows[0][1]


def _small(new: Database, id_: int, data: Any) -> None:
    if type(data) is bytes:
        id_, file = _found(new, hashlib.sha256(data).digest(), id_)
        if file is None:
            new.execute("UPDATE blocks SET size = ?, damaged = 0 WHERE id = ?", (len(data), id_))
            new.execute("INSERT OR REPLACE INTO small VALUES (?, ?)", (id_, data))


def _adopt_files(files: Files, new: Database) -> None:
    """Blocks that have a file, and no row that is whole."""
    for directory in filter(str.isdecimal, files.names("")):
        for name in files.names(directory):
            with suppress(ValueError, IsADirectoryError):
                number, _, text = name.partition("-")
                file = int(directory) * FILES_PER_DIRECTORY + int(number)
                _adopt_file(files, new, f"{directory}/{name}", file, bytes.fromhex(text))
        files.sync_directory(directory)


def _adopt_file(files: Files, new: Database, name: str, file: int, digest: bytes) -> None:
    sql = "SELECT file FROM blocks WHERE digest = ? AND NOT damaged AND file IS NOT NULL"
    for (other,) in new.execute(sql, (digest,)).fetchall():
        with suppress(FileNotFoundError):
            if files.size(file_name(other, digest)):
                return
    data = files.read(name, BLOCK_BYTES_MAX)
    if hashlib.sha256(data).digest() == digest:
        files.rewrite(name)  # its put may not have come to its end
        id_, _ = _found(new, digest)
        new.execute("DELETE FROM small WHERE id = ?", (id_,))
        sql = "UPDATE blocks SET size = ?, file = ?, damaged = 0 WHERE id = ?"
        new.execute(sql, (len(data), file, id_))


def _pins(old: Database, new: Database) -> None:
    named = "pins INDEXED BY sqlite_autoindex_pins_1"
    for owner, root, name, id_ in _walk(old, named, "owner, root, name", ", rowid"):
        _pin(new, id_, owner, root, name, 0, "", b"")
    lacking = "SELECT rowid AS id FROM pins WHERE rowid > ? AND checksum = x''"
    _rows(old, new, "pins", "owner, root, name, charged, pin, checksum", _pin, lacking)


def _pin(new: Database, id_: int, *columns: Any) -> None:
    owner, root, name, *_ = columns
    whole = isinstance(read_pin(columns), Pin)
    if whole or (type(owner), type(root), type(name)) == (str, bytes, str):
        key = (owner, root, name)
        if whole:
            new.execute("DELETE FROM pins WHERE owner = ? AND root = ? AND name = ?", key)
        else:
            columns = (*key, 0, "", b"")
        sql = "INSERT OR IGNORE INTO pins (rowid, owner, root, name, charged, pin, checksum)"
        for each in (id_, None) if whole else (id_,):  # another one may have its ID
            new.execute(f"{sql} VALUES (?, ?, ?, ?, ?, ?, ?)", (each, *columns))


def _id(old: Database, new: Database) -> None:
    """Where it is lost the new one stays: what others keep for this store is not given up then."""
    for (id_,) in _read(old, "SELECT id FROM store") or ():
        if type(id_) is bytes and len(id_) == STORE_ID_BYTES:
            new.execute("UPDATE store SET id = ?", (id_,))
