"""The index: which blocks, pins and unfinished downloads there are. Its rows are what is true.

One SQLite database. One thread writes: what waits together is one transaction (`base.writer`). Who
reads waits for the transaction that runs, so that nobody sees what is not on the disk yet.

A transaction that failed is rolled back and what it was for is refused. SQLite then writes the next
one over its remains in the log, so the connection stays open: reopening would read the remains
from the page cache, where they look whole, though an fsync has failed to bring them to the disk.
For the same reason the log that a crash left is written once more before it is read, and what comes
after a transaction that failed always writes something.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from wetware.base.disk import remedy
from wetware.base.log import get_logger
from wetware.base.writer import Write, Writer, groups
from wetware.errors import WetwareError
from wetware_blob.store.errors import DiskFull, StoreFailed

if TYPE_CHECKING:
    from wetware.base.files import Database, Files
    from wetware_blob.store.bits import Bits

log = get_logger("blob.store")
T = TypeVar("T")

FILE: Final = "index.db"
SCHEMA_VERSION: Final = 1
SMALL_BYTES_MAX: Final = 32 << 10
"""Blocks up to this size lie in rows: a file and its fsync cost more than writing the bytes twice
(docs/adr/0019)."""
FILES_PER_DIRECTORY: Final = 1024
ROW_BYTES: Final = 512
"""What a block is charged beside its bytes, rounded up to 4 KiB: its row in the index."""
INDEX_BYTES: Final = 5 << 20
"""What the store takes of the node's limit beside blocks: the reserve, the log, tables."""
WAL_PAGES: Final = 256
"""Pages of 4 KiB in the log before they go into the database: 1 MiB, so that the reserve has room
for what the database grows by then."""
COMMIT_BYTES_MAX: Final = 1 << 20
"""Bytes of blocks in one transaction."""
CACHE_KIB: Final = 8192
IDLE_S: Final = 1.0
"""After so long without a write the log is emptied: with a flipped bit in it a crash would bring
older pages back."""
STORE_ID_BYTES: Final = 8
_MANY: Final = 256
"""Parameters of one query."""

_SCHEMA = """
CREATE TABLE blocks (
  id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, file INTEGER,
  damaged INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX files ON blocks (file) WHERE file IS NOT NULL;
CREATE TABLE small (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE pins (
  owner TEXT NOT NULL, root BLOB NOT NULL, name TEXT NOT NULL, charged INTEGER NOT NULL,
  pin TEXT NOT NULL, checksum BLOB NOT NULL, PRIMARY KEY (owner, root, name)
);
CREATE INDEX owners ON pins (owner);
CREATE TABLE downloads (root BLOB PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE store (id BLOB NOT NULL, failures INTEGER NOT NULL);
INSERT INTO store VALUES (randomblob(8), 0);
"""


_MALFORMED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_OF_THE_DISK: Final = frozenset(
    {
        sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)  # fmt: skip


class Malformed(StoreFailed):
    """What the index says cannot be."""


class UnknownVersion(Exception):
    """The index is of a later release."""


@dataclass(frozen=True, slots=True)
class Row:
    """A block: the columns of the table. Where `file` is None its bytes are in `small`."""

    id: int
    digest: bytes
    size: int
    file: int | None
    damaged: int

    def __post_init__(self) -> None:
        numbers = (self.id, self.size, self.file or 0, self.damaged)
        if not all(type(number) is int for number in numbers) or type(self.digest) is not bytes:
            raise Malformed("a row of the index is damaged")

    @property
    def name(self) -> str:
        """Of its file."""
        return file_name(self.file or 0, self.digest)

    @property
    def charged(self) -> int:
        return charge(self.size)


_COLUMNS = "id, digest, size, file, damaged"


def charge(size: int) -> int:
    """The bytes of a disk that a block of this size takes, at most."""
    return -(-size // 4096) * 4096 + ROW_BYTES


def file_name(number: int, digest: bytes) -> str:
    """No two files ever have the same, also two of the same block that are written at once."""
    return f"{number // FILES_PER_DIRECTORY}/{number % FILES_PER_DIRECTORY}-{digest.hex()}"


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """A part of a transaction; see `Index.write`."""

    apply: Callable[[Database], Any]
    must: bool
    size: int


class Index:
    """The database. Everything but `write` blocks: call it in a thread.

    Attributes:
        spoiled: Digests of blocks that were found to be damaged since the start: before their rows
            say so, and where those could not be written.
        marking: What the collection that runs will not delete: whatever a hold is given, too.
        malformed: Set on the loop once SQLite has found that the index is damaged.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._refused = False  # something, and no block was written since
        self._remains = False  # of a transaction that failed: a crash would bring it back
        self.spoiled: set[bytes] = set()
        self.marking: Bits | None = None
        self.malformed = asyncio.Event()
        self.reserve = files.reserve()
        try:
            self._open()
        except Exception:
            with self.reserve.open():
                self._open()
        self.reserve.fill()
        self._written = False
        self._writer: Writer[Change] = Writer(
            "blob index",
            self._commit,
            lambda _: IDLE_S if self._written else None,
            unavailable=StoreFailed,
        )

    def _open(self) -> None:
        # A log that a crash left may be whole in the page cache alone.
        self._files.rewrite(f"{FILE}-wal")
        self._db = db = self._files.connect(FILE)
        try:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")  # without a file for other processes
            db.execute("PRAGMA synchronous=FULL")  # a commit is on the disk when it returns
            ((version,),) = db.execute("PRAGMA user_version").fetchall()
            schema = db.execute("SELECT * FROM sqlite_schema").fetchall()
            if version == 0 and not schema:
                create(db, "WAL")
            elif schema != _schema() and version > SCHEMA_VERSION:
                raise UnknownVersion(  # noqa: TRY301 the connection is closed below
                    f"the index is of version {version}; this release knows {SCHEMA_VERSION}"
                )
            elif schema != _schema() or version != SCHEMA_VERSION:
                raise Malformed("its first page is damaged")  # noqa: TRY301 as above
            db.execute("PRAGMA journal_mode=WAL").fetchall()
            db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}").fetchall()
            db.execute(f"PRAGMA journal_size_limit={WAL_PAGES * 4096 * 2}").fetchall()
            db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
            db.execute("PRAGMA temp_store=MEMORY")  # a full disk has no room for files of its own
            db.execute("BEGIN IMMEDIATE")  # some damage leaves it readable alone
            db.execute("ROLLBACK")
            self._files.sync_directory("")  # SQLite does so, and takes no notice if it fails
        except BaseException:
            db.close()
            raise

    def start(self) -> None:
        self._writer.start()

    def close(self) -> None:
        """Write what waits, and empty the log."""
        self._writer.close()

    def abandon(self) -> None:
        """Close what was not started."""
        with contextlib.suppress(Exception):
            self._db.close()

    def _judge(self, error: Exception) -> None:
        if isinstance(error, Malformed) or _code(error) in _MALFORMED:
            self.suspect()

    def suspect(self) -> None:
        """Something in it cannot be: it is to be salvaged."""
        self._writer.call_soon(self.malformed.set)

    # --- reading ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self) -> Iterator[Database]:
        """The database between two transactions; raises StoreFailed where it cannot be read."""
        with self._lock:
            try:
                yield self._db
            except WetwareError as exc:
                self._judge(exc)
                raise
            except Exception as exc:  # of whichever SQLite
                self._judge(exc)
                raise StoreFailed(
                    f"the index of the blob store cannot be read: {exc}",
                    hint="look at the node's disk (`dmesg`); `ww blob verify` reads all of it",
                ) from exc

    def find(self, digests: Collection[bytes], keep: Bits | None = None) -> dict[bytes, Row]:
        """The rows that there are; they are added to `keep` before any can be deleted."""
        with self.reading() as db:
            found = self.find_in(db, digests)
            if keep is not None:
                for row in found.values():
                    self.keep(row.id, keep)
        return found

    def keep(self, id_: int, keep: Bits) -> bool:
        """Between two transactions, or in one: a row is not deleted; whether it was not there."""
        if self.marking is not None:
            self.marking.add(id_)
        return keep.add(id_)

    def find_in(self, db: Database, digests: Collection[bytes]) -> dict[bytes, Row]:
        """The rows that a transaction sees."""
        found: dict[bytes, Row] = {}
        for some in batches(digests):
            marks = ",".join("?" * len(some))
            for columns in db.execute(
                f"SELECT {_COLUMNS} FROM blocks WHERE digest IN ({marks})",  # noqa: S608 question marks
                some,
            ).fetchall():
                row = Row(*columns)
                if row.digest in self.spoiled:
                    row = replace(row, damaged=1)
                found[row.digest] = row
        return found

    def small(self, row: Row) -> bytes | None:
        """The bytes of a block that lies in the index; None where it has gone."""
        with self.reading() as db:
            found = db.execute("SELECT data FROM small WHERE id = ?", (row.id,)).fetchall()
        return bytes(found[0][0]) if found else None

    def after(self, id_: int, many: int) -> list[Row]:
        """The next rows after this ID, by their IDs."""
        with self.reading() as db:
            found = db.execute(
                f"SELECT {_COLUMNS} FROM blocks WHERE id > ? ORDER BY id LIMIT ?",  # noqa: S608 constant
                (id_, many),
            ).fetchall()
            return [Row(*columns) for columns in found]

    def last(self) -> int:
        """The highest ID of a block; 0 where there is none."""
        with self.reading() as db:
            ((id_,),) = db.execute("SELECT COALESCE(MAX(id), 0) FROM blocks").fetchall()
        return int(id_)

    def check_pins(self) -> bytes:
        """Check that all pins can be found; returns the ID of the store. Raises Malformed."""
        with self.reading() as db:
            check(db, "pins")
            found = db.execute("SELECT id FROM store").fetchall()
            if [[type(id_), len(id_)] for (id_,) in found] != [[bytes, STORE_ID_BYTES]]:
                raise Malformed("the ID of the store is damaged")
            return bytes(found[0][0])

    def totals(self) -> tuple[int, int]:
        """How many blocks there are, and what they are charged in all."""
        with self.reading() as db:
            sql = "SELECT COUNT(*), COALESCE(SUM((size + 4095) / 4096 * 4096), 0) FROM blocks"
            ((count, charged),) = db.execute(sql).fetchall()
        return count, charged + count * ROW_BYTES

    # --- writing ----------------------------------------------------------------------------------

    async def write(
        self, apply: Callable[[Database], T], *, must: bool = False, size: int = 0
    ) -> T:
        """What `apply` returned, when its transaction is on the disk.

        Raises StoreFailed where it is not. One who stops waiting does not take it back.

        Args:
            apply: Called with the database in a transaction, which others may share.
            must: It makes room or ends something: on a full disk it takes the reserve.
            size: Bytes of blocks that it writes, with their rows.
        """
        result: T = await self._writer.write(Change(apply, must, size))
        return result

    def write_soon(self, apply: Callable[[Database], object], *, must: bool = False) -> None:
        """For what may be lost: nobody waits for it."""
        self._writer.write_soon(Change(apply, must, 0))

    def spoil(self, row: Row) -> None:
        """From now on a block is damaged: it counts as absent, and can be written anew."""
        self.spoiled.add(row.digest)
        sql = "UPDATE blocks SET damaged = 1 WHERE id = ?"
        self.write_soon(lambda db: db.execute(sql, (row.id,)))

    def _commit(self, batch: list[Write[Change]], last: bool) -> list[Write[Change]]:
        for writes in groups(batch, lambda change: change.size, COMMIT_BYTES_MAX):
            results = self._execute(writes)
            if not isinstance(results, Exception):
                for write, result in zip(writes, results, strict=True):
                    self._writer.answer(write, result)
                continue
            self._refused = True
            log.error("blob.not_written", why=str(results), writes=len(writes))
            for write in writes:
                again: list[Any] | Exception = results
                if write.what.must:
                    with self.reserve.open():
                        again = self._execute([write])
                        if not isinstance(again, Exception):
                            self._empty_log("RESTART")  # the next one needs no room
                # Only now, with the reserve closed: who waits may fill the disk.
                if isinstance(again, Exception):
                    self._writer.answer(write, error=refusal(again))
                else:
                    self._writer.answer(write, again[0])
        if not batch and self._written:
            self._written = False
            # On a full disk somebody else would take its room, and the next write the reserve's.
            short = self._refused or self.reserve.missing
            self._empty_log("RESTART" if short else "TRUNCATE")
        if last:
            with self._lock, contextlib.suppress(Exception):
                self._db.close()  # it empties the log
        return []

    def _execute(self, writes: list[Write[Change]]) -> list[Any] | Exception:
        """One transaction: its results, or why nothing of it is on the disk."""
        db = self._db
        with self._lock:
            try:
                db.execute("BEGIN IMMEDIATE")
                if self._remains:  # also where the rest of it changes nothing
                    db.execute("UPDATE store SET failures = failures + 1")
                results = [write.what.apply(db) for write in writes]
                db.execute("COMMIT")
            except Exception as exc:
                with contextlib.suppress(Exception):
                    db.execute("ROLLBACK")
                self._remains = True
                self._judge(exc)
                return exc
            self._remains = False
        self._written = True
        self._refused = self._refused and not any(write.what.size for write in writes)
        return results

    def _empty_log(self, how: str) -> None:
        with self._lock, contextlib.suppress(Exception):
            self._db.execute(f"PRAGMA wal_checkpoint({how})").fetchall()


def create(db: Database, journal: str) -> None:
    """Make the tables of an empty database."""
    db.execute("PRAGMA page_size=4096")
    db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # so that room goes back to the disk
    db.execute(f"PRAGMA journal_mode={journal}").fetchall()
    db.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA.split(";"):
        if statement.strip():
            db.execute(statement)
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    db.execute("COMMIT")


@functools.cache
def _schema() -> list[Any]:
    """What SQLite says of the tables of an index that is sound: their pages, too."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        create(db, "OFF")
        return db.execute("SELECT * FROM sqlite_schema").fetchall()
    finally:
        db.close()


def check(db: Database, table: str) -> None:
    """Whether a table and its keys say the same; raises Malformed."""
    ((found, *_), *_) = db.execute(f"PRAGMA integrity_check({table})").fetchall()
    if found != "ok":
        raise Malformed(f"the index is damaged: {found}")


def is_damage(error: BaseException) -> bool:
    """Whether the index is to blame, and not the disk: for what is read and has to be readable."""
    error = error.__cause__ or error
    others = (OSError, MemoryError, UnknownVersion)
    return _code(error) not in _OF_THE_DISK and not isinstance(error, others)


def _code(error: BaseException) -> int:
    """Of SQLite; 0 if there is none."""
    code: int = getattr(error, "sqlite_errorcode", getattr(error, "result", 0))
    return code & 0xFF


def refusal(error: Exception) -> WetwareError:
    """What a caller is told about an error of the disk."""
    if isinstance(error, WetwareError):
        return error
    if hint := remedy(error):
        return DiskFull(f"the disk of the blob store is full: {error}", hint=hint)
    return StoreFailed(
        f"the blob store cannot be written: {error}",
        hint="look at the node's disk (`dmesg`); what was acknowledged before is not affected",
    )


def batches(items: Iterable[T], many: int = _MANY) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == many:
            yield batch
            batch = []
    if batch:
        yield batch
