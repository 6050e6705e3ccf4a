"""The store: one SQLite database, its transactions, its history, and who is charged for it.

Synchronous, and of one thread. `log` has a row for every write, in the order of revisions, and
`keys` says which rows are the present. A row that is not present any more is history, for those who
watch; compaction goes through the log from its beginning and deletes what each row has replaced.

What a transaction may not do is found before it writes anything, so those that wait together share
one commit. A commit that fails is rolled back, and the connection stays open: opened again, it
would read what is left of it from the page cache, where that looks whole though an fsync has
failed. But until something is written over its remains in SQLite's log a crash would bring it back.
So that is done at once, and only then it is known that it has not happened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from zlib import crc32

from wetware.base.disk import remedy
from wetware.base.log import get_logger
from wetware.errors import ConfigError, InvalidArgument, WetwareError
from wetware.identity import Key
from wetware_sync.charges import Added, Room, Used, charge, check_leases, limit
from wetware_sync.engine import (
    KEY_BYTES_MAX,
    PAGE_BYTES_MAX,
    ROW_BYTES,
    WRITES_MAX,
    Batch,
    Compare,
    Event,
    Get,
    KeyValue,
    Limits,
    Operation,
    Order,
    Outcome,
    Page,
    Put,
    Txn,
    Unknown,
    Unwritten,
    compacted,
    lease_ended,
    prefix_end,
)

if TYPE_CHECKING:
    from wetware.base.files import Database, Files

log = get_logger("sync.store")

FILE: Final = "store.db"
NEW: Final = "new.db"
"""A store while it is made."""
SCHEMA_VERSION: Final = 1
WAL_PAGES: Final = 256
"""Pages of 4 KiB in SQLite's log before they go into the database: what that grows by then fits
into the reserve."""
CACHE_KIB: Final = 32 << 10
HISTORY_ROWS_MAX: Final = 100_000
HISTORY_BYTES_MAX: Final = 64 << 20
"""Of values that were replaced or deleted. What is older is compacted as new rows come."""
SWEPT_ROWS: Final = 256
"""At least this many are compacted at a time: more than one revision has."""
SCANNED_ROWS: Final = 2048
"""Rows that one watcher's step through the history looks at."""
_SEQ_BITS: Final = 8  # a row's ID is its revision, and which write of that it was
_TOP: Final = b"\xff" * (KEY_BYTES_MAX + 1)
_NEVER: Final = 1 << 62
_NUMBERS: Final = struct.Struct("<5q?")

_SCHEMA = """
CREATE TABLE log (
  id INTEGER PRIMARY KEY, key BLOB NOT NULL, value BLOB, created INTEGER NOT NULL,
  version INTEGER NOT NULL, lease INTEGER NOT NULL, owner TEXT NOT NULL,
  before INTEGER NOT NULL, checksum INTEGER NOT NULL
);
CREATE TABLE keys (key BLOB PRIMARY KEY, id INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE attached (lease INTEGER, key BLOB, PRIMARY KEY (lease, key)) WITHOUT ROWID;
CREATE TABLE leases (id INTEGER PRIMARY KEY, owner TEXT NOT NULL, ttl_s REAL NOT NULL);
CREATE TABLE owners (
  name TEXT PRIMARY KEY, keys INTEGER NOT NULL, nbytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE store (
  epoch INTEGER NOT NULL, authority BLOB NOT NULL, revision INTEGER NOT NULL,
  swept INTEGER NOT NULL, compacted INTEGER NOT NULL, garbage INTEGER NOT NULL,
  failures INTEGER NOT NULL
);
"""
_STATEMENTS: Final = [s.strip() for s in _SCHEMA.split(";") if s.strip()]
_PRESENT: Final = "FROM keys k JOIN log l ON l.id = k.id"
_ROW: Final = "l.id, l.created, l.version, l.lease, l.owner, length(l.value)"
_ROW_OF: Final = f"SELECT {_ROW} {_PRESENT} WHERE k.key = ?"
_FULL: Final = "l.id, l.key, l.value, l.created, l.version, l.lease, l.owner, l.before, l.checksum"
_ORDER_BY: Final = {
    Order.KEY: "k.key",
    Order.OLDEST: "l.created, k.key",
    Order.NEWEST: "l.created DESC, k.key DESC",
}


class Damaged(WetwareError):
    """What is on the disk is not what was written; it is not given out."""

    code = "sync.damaged"


@dataclass(slots=True)
class LeaseRow:
    """A lease as it is kept; `keys`: how many it has."""

    id: int
    owner: str
    ttl_s: float
    keys: int = 0


class Row(NamedTuple):
    """A key that is there: of its row in the log, but for the value."""

    id: int
    created: int
    version: int
    lease: int
    owner: str
    value_bytes: int


class Change(NamedTuple):
    """A part of a commit.

    Attributes:
        apply: Called in a transaction; what it raises (WetwareError) it raises before it writes.
        must: It gives something up: on a full disk it takes the reserve.
        size: Bytes that it writes.
        reads: It changes nothing, and comes between two commits.
    """

    apply: Callable[[Store], Any]
    must: bool = False
    size: int = 0
    reads: bool = False


@dataclass(slots=True)
class Commit:
    """What a commit has done.

    Attributes:
        results: Of each change what it returned, or why it was not made.
        events: In the order of their revisions.
        granted: Leases that are new.
        ended: IDs of leases that have ended.
        compacted: As in `engine.Status`, after it; 0 if nothing was written.
    """

    results: list[Any] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    granted: list[LeaseRow] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    compacted: int = 0

    def add(self, later: Commit) -> None:
        self.results += later.results
        self.events += later.events
        self.granted += later.granted
        self.ended += later.ended
        self.compacted = later.compacted


class Failed(NamedTuple):
    """Why a commit failed, whether it is certain that it has not happened, and was it begun."""

    error: Exception
    certain: bool
    committing: bool


class Store:
    """The database, open. Raises ConfigError if it cannot be used.

    Attributes:
        authority: The store's own key, in the database.
        failing: Why nothing but deletions is written; "" while all is.
        revision, compacted, epoch: As in `engine.Status`.
        used: Of all owners.
        leases: By their IDs.
    """

    def __init__(self, files: Files, limits: Limits) -> None:
        self._files, self._limits = files, limits
        self.failing = ""
        self._written = False  # since SQLite's log was emptied
        try:
            with contextlib.suppress(FileExistsError):
                files.make_directory("")
            files.sync_directory("..")
            self.reserve = files.reserve()
            try:
                self._open()
            except Exception:
                with self.reserve.open():
                    self._open()
        except Exception as exc:
            raise ConfigError(
                f"the store of sync cannot be used: {exc}",
                hint=remedy(exc) or "restore it from a backup, or move it away",
                code="config.store",
            ) from exc
        self.reserve.fill()

    def _open(self) -> None:
        if FILE not in self._files.names(""):
            _create(self._files)
        self._files.rewrite(f"{FILE}-wal")  # what a crash left may be whole in the page cache alone
        self.db = db = self._files.connect(FILE)
        try:
            db.execute("PRAGMA busy_timeout=500").fetchall()
            db.execute("PRAGMA locking_mode=EXCLUSIVE")  # without a file for other processes
            db.execute("PRAGMA synchronous=FULL")  # a commit is on the disk when it returns
            ((version,),) = db.execute("PRAGMA user_version").fetchall()
            if version != SCHEMA_VERSION or not is_sound(db):
                raise ValueError(  # noqa: TRY301 the connection is closed below
                    f"it is damaged, or of version {version}; this release knows {SCHEMA_VERSION}"
                )
            db.execute("PRAGMA journal_mode=WAL").fetchall()
            db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}").fetchall()
            db.execute(f"PRAGMA journal_size_limit={WAL_PAGES * 4096 * 2}").fetchall()
            db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
            db.execute("PRAGMA temp_store=MEMORY")  # a full disk has no room for files of its own
            self._load()
            self._files.sync_directory("")  # SQLite does so, and takes no notice if it fails
        except BaseException:
            db.close()
            raise

    def _load(self) -> None:
        """Read what is also kept in memory."""
        self._loaded = False
        db = self.db
        rows = db.execute(
            "SELECT epoch, authority, revision, swept, compacted, garbage FROM store"
        ).fetchall()
        ((self.epoch, seed, self.revision, self._swept, self.compacted, self._garbage),) = rows
        self.authority = Key.from_seed(bytes(seed))
        ((self._history,),) = db.execute(
            "SELECT COUNT(*) FROM log WHERE id > ?", (self._swept,)
        ).fetchall()
        rows = db.execute("SELECT name, keys, nbytes FROM owners").fetchall()
        self._owners = {name: Used(keys, nbytes) for name, keys, nbytes in rows}
        self.used = Used(sum(row[1] for row in rows), sum(row[2] for row in rows))
        rows = db.execute(
            "SELECT l.id, l.owner, l.ttl_s, COUNT(a.key) FROM leases l"
            " LEFT JOIN attached a ON a.lease = l.id GROUP BY l.id"
        ).fetchall()
        self.leases = {row[0]: LeaseRow(*row) for row in rows}
        self._done, self._charged = Commit(), set[str]()
        self._loaded = True

    def close(self) -> None:
        """SQLite's log is emptied. Never raises."""
        with contextlib.suppress(Exception):
            self.db.close()

    # --- reading ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            if not self._loaded:
                self._load()
            yield
        except WetwareError:
            raise
        except Exception as exc:  # of whichever SQLite
            raise Damaged(
                f"the store of sync cannot be read: {exc}",
                hint="look at the node's disk (`dmesg`); or restore the store from a backup",
            ) from exc

    def read(self, get: Get) -> Page:
        """Between two commits."""
        with self._reading():
            return self._get(get, Room())

    def _get(self, get: Get, room: Room) -> Page:
        low, high = _bounds(get.key, prefix=get.prefix)
        cursor = self.db.execute(
            f"SELECT {_FULL} {_PRESENT} WHERE k.key >= ? AND k.key < ? AND l.created < ?"
            f" ORDER BY {_ORDER_BY[get.order]} LIMIT ?",
            (
                max(low, get.after + b"\0") if get.after else low,
                high,
                get.created_before or _NEVER,
                get.limit + 1,
            ),
        )
        with contextlib.closing(cursor):
            found = _present(cursor)
            items = room.take(found, get.limit)
            return Page(tuple(items), self.revision, next(found, None) is not None)

    def events(self, key: bytes, revision: int, *, prefix: bool) -> Batch:
        """A step through the history: those of SCANNED_ROWS rows, or of fewer, from `revision` on.

        Raises Compacted.
        """
        low, high = _bounds(key, prefix=prefix)
        events: list[Event] = []
        with self._reading():
            if revision <= self.compacted:
                raise compacted(self.compacted)
            ids = self.db.execute(
                "SELECT id FROM log WHERE id >= ? ORDER BY id LIMIT ?",
                (revision << _SEQ_BITS, SCANNED_ROWS),
            ).fetchall()
            last = self.revision
            if len(ids) == SCANNED_ROWS:  # the last revision may go on
                last = (ids[-1][0] >> _SEQ_BITS) - 1
            room = PAGE_BYTES_MAX
            cursor = self.db.execute(
                f"SELECT {_FULL} FROM log l WHERE id >= ? AND id < ? AND key >= ? AND key < ?"  # noqa: S608 constants
                " ORDER BY id",
                (revision << _SEQ_BITS, (last + 1) << _SEQ_BITS, low, high),
            )
            try:
                for row in cursor:
                    event = _event(row)
                    if room <= 0 and event.revision != events[-1].revision:
                        last = event.revision - 1
                        break
                    events.append(event)
                    room -= len(event.key) + (len(event.now.value) if event.now else 0)
            finally:
                cursor.close()
        return Batch(tuple(events), last)

    # --- committing -------------------------------------------------------------------------------

    def commit(self, changes: Sequence[Change]) -> Commit:
        """Make changes in one transaction; where that fails, what can be, one by one.

        Those are deletions that a full disk has refused, and all where one of them cannot be made,
        as what it reads is damaged. Nothing is tried again whose commit has failed otherwise.
        Nothing is seen, and no result returned, before it is on the disk.
        """
        failed = Failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True, False)
        if not self.reserve.missing or self.reserve.fill():
            found = self._attempt(changes)
            if isinstance(found, Commit):
                self.failing = ""
                return found
            failed = found
        if not self.failing:
            log.error("sync.not_written", why=repr(failed.error), certain=failed.certain)
        self.failing = str(failed.error) or repr(failed.error)
        full, apart = _is_full(failed.error), not failed.committing and len(changes) > 1
        certain = failed.certain
        done = Commit()
        for change in changes:
            again: Commit | Failed = failed
            if certain and full and change.must:
                with self.reserve.open():
                    again = self._attempt([change], giving_up=True)
                    self.empty_log("RESTART")  # the next one needs no room
            elif certain and apart and not full:
                again = self._attempt([change])
            if isinstance(again, Commit):
                done.add(again)
            else:
                certain = certain and again.certain
                done.results.append(_refusal(again))
        return done

    def _attempt(self, changes: Sequence[Change], *, giving_up: bool = False) -> Commit | Failed:
        """One transaction. Where it is `giving_up` room the reserve is open, and history goes."""
        db = self.db
        committing = False
        try:
            if not self._loaded:
                self._load()
            self._done = done = Commit()
            before = self._state
            db.execute("BEGIN IMMEDIATE")
            for change in changes:
                try:
                    done.results.append(change.apply(self))
                except Damaged:  # it may have written something
                    raise
                except WetwareError as exc:
                    done.results.append(exc)
            self._sweep(before[0], 2 * len(done.events), giving_up=giving_up)
            self._note(before)
            committing = True
            db.execute("COMMIT")
        except Exception as exc:  # of whichever SQLite
            with contextlib.suppress(Exception):
                db.execute("ROLLBACK")
            certain = not committing or self._erase(opened=giving_up)
            self._loaded = False
            with contextlib.suppress(Exception):  # else before it is looked at
                self._load()
            return Failed(exc, certain, committing)
        self._written = True
        done.compacted = self.compacted
        return done

    def _erase(self, *, opened: bool) -> bool:
        """Write over the remains of a commit that failed; returns whether that is on the disk."""
        with contextlib.nullcontext() if opened else self.reserve.open():
            try:
                self.db.execute("BEGIN IMMEDIATE")
                self.db.execute("UPDATE store SET failures = failures + 1")
                self.db.execute("COMMIT")
            except Exception:
                log.exception("sync.unknown")
                with contextlib.suppress(Exception):
                    self.db.execute("ROLLBACK")
                return False
        return True

    @property
    def _state(self) -> tuple[int, int, int, int]:
        return self.revision, self._swept, self.compacted, self._garbage

    def _note(self, before: tuple[int, int, int, int]) -> None:
        """Write what the transaction has changed in memory."""
        db = self.db
        while self._charged:
            owner = self._charged.pop()
            used = self._owners[owner]
            if used.keys:
                sql = "INSERT OR REPLACE INTO owners VALUES (?, ?, ?)"
                db.execute(sql, (owner, used.keys, used.nbytes))
            else:
                db.execute("DELETE FROM owners WHERE name = ?", (owner,))
                del self._owners[owner]
        if self._state != before:
            db.execute(
                "UPDATE store SET revision = ?, swept = ?, compacted = ?, garbage = ?", self._state
            )

    def _sweep(self, revision: int, rows: int, *, giving_up: bool) -> None:
        """Delete a part of the history that is not kept; none that is younger than `revision`."""
        if self._history > HISTORY_ROWS_MAX or self._garbage > HISTORY_BYTES_MAX or giving_up:
            last = revision
        else:
            last = self.compacted
        many = max(SWEPT_ROWS, rows)
        end = (last + 1) << _SEQ_BITS
        if self._swept + 1 >= end:
            return
        found = self.db.execute(
            "SELECT l.id, l.before, l.value IS NULL, length(b.value) FROM log l"
            " LEFT JOIN log b ON b.id = l.before WHERE l.id > ? AND l.id < ? ORDER BY l.id LIMIT ?",
            (self._swept, end, many),
        ).fetchall()
        if len(found) == many:  # the last revision may go on
            last = (found[-1][0] >> _SEQ_BITS) - 1
            end = (last + 1) << _SEQ_BITS
        for id_, before, deleted, nbytes in found:
            if id_ >= end:
                break
            self._history -= 1
            if before:
                self.db.execute("DELETE FROM log WHERE id = ?", (before,))
                self._garbage -= nbytes + ROW_BYTES
            if deleted:
                self.db.execute("DELETE FROM log WHERE id = ?", (id_,))
        self._swept = end - 1
        self.compacted = max(self.compacted, last)

    def idle(self) -> None:
        """For when nothing is to be written: go on with what can wait."""
        if self._swept + 1 < (self.compacted + 1) << _SEQ_BITS:
            self.commit(())
        elif self._written:
            self._written = False
            # With a flipped bit in the log a crash would bring older pages back. On a full disk
            # somebody else would take its room, and the next write the reserve's.
            self.empty_log("RESTART" if self.failing or self.reserve.missing else "TRUNCATE")

    @property
    def waits(self) -> bool:
        """Something is there for `idle`."""
        return self._written or self._swept + 1 < (self.compacted + 1) << _SEQ_BITS

    def empty_log(self, how: str) -> None:
        with contextlib.suppress(Exception):
            self.db.execute(f"PRAGMA wal_checkpoint({how})").fetchall()

    # --- what changes are made of -----------------------------------------------------------------

    def txn(self, txn: Txn, owner: str) -> Outcome:
        """As `Engine.txn`; in a commit."""
        rows: dict[bytes, Row | None] = {}
        succeeded = all(self._holds(compare, rows) for compare in txn.compares)
        branch = txn.then if succeeded else txn.otherwise
        targets = [self._targets(operation, rows) for operation in branch]
        writes = sum(map(len, targets))
        self._check(branch, targets, owner)
        if writes:
            self.revision += 1
        id_ = self.revision << _SEQ_BITS
        room = Room()
        results: list[Page | int] = []
        for operation, found in zip(branch, targets, strict=True):
            if type(operation) is Get:
                results.append(self._get(operation, room))
                continue
            for key, row in found:
                put = operation if type(operation) is Put else None
                self._write(id_, key, put, row, owner)
                id_ += 1
            results.append(len(found))
        return Outcome(succeeded, self.revision, tuple(results))

    def grant(self, id_: int, ttl_s: float, owner: str) -> LeaseRow:
        """A new lease; in a commit."""
        check_leases(self._limits, self.leases.values(), owner)
        if id_ in self.leases:
            raise Unwritten("a lease has that ID", hint="try again")
        self.db.execute("INSERT INTO leases VALUES (?, ?, ?)", (id_, owner, ttl_s))
        self.leases[id_] = lease = LeaseRow(id_, owner, ttl_s)
        self._done.granted.append(lease)
        return lease

    def end(self, id_: int) -> None:
        """End a lease, with its keys; in a commit. Raises LeaseEnded."""
        lease = self.leases.get(id_)
        if lease is None:
            raise lease_ended(id_)
        sql = f"SELECT k.key, {_ROW} {_PRESENT} JOIN attached a ON a.key = k.key WHERE a.lease = ?"
        found = self.db.execute(sql, (id_,)).fetchall()
        if found:
            self.revision += 1
        for number, (key, *row) in enumerate(found):
            id_of_row = (self.revision << _SEQ_BITS) + number
            self._write(id_of_row, bytes(key), None, Row._make(row), lease.owner)
        self.db.execute("DELETE FROM leases WHERE id = ?", (id_,))
        del self.leases[id_]
        self._done.ended.append(id_)

    def compact(self, revision: int) -> None:
        """Nobody watches from `revision` or below any more; in a commit."""
        if not 0 <= revision <= self.revision:
            raise InvalidArgument(f"revision {revision} is not from 0 to {self.revision}")
        self.compacted = max(self.compacted, revision)

    def _row(self, key: bytes, rows: dict[bytes, Row | None]) -> Row | None:
        if key not in rows:
            found = self.db.execute(_ROW_OF, (key,)).fetchall()
            rows[key] = Row._make(found[0]) if found else None
        return rows[key]

    def _holds(self, compare: Compare, rows: dict[bytes, Row | None]) -> bool:
        row = self._row(compare.key, rows)
        found: bytes | int = 0
        if compare.target == "value":
            if row is None:
                return False
            sql = "SELECT value FROM log WHERE id = ?"
            ((found,),) = self.db.execute(sql, (row.id,)).fetchall()
        elif row is not None:
            revision = row.id >> _SEQ_BITS
            numbers = {"mod_revision": revision, "create_revision": row.created}
            found = numbers.get(compare.target, row.version)
        return found == compare.operand

    def _targets(
        self, operation: Operation, rows: dict[bytes, Row | None]
    ) -> list[tuple[bytes, Row | None]]:
        """The keys that it writes, and what is there."""
        if isinstance(operation, Put):
            return [(operation.key, self._row(operation.key, rows))]
        if isinstance(operation, Get):
            return []
        if not operation.prefix:
            row = self._row(operation.key, rows)
            return [(operation.key, row)] if row else []
        sql = f"SELECT k.key, {_ROW} {_PRESENT} WHERE k.key >= ? AND k.key < ? LIMIT ?"
        bounds = _bounds(operation.key, prefix=True)
        found = self.db.execute(sql, (*bounds, WRITES_MAX + 1)).fetchall()
        return [(bytes(key), Row._make(row)) for key, *row in found]

    def _check(
        self,
        branch: Sequence[Operation],
        targets: Sequence[Sequence[tuple[bytes, Row | None]]],
        owner: str,
    ) -> None:
        """Raises LimitExceeded and LeaseEnded."""
        limit("keys written by one transaction", sum(map(len, targets)), WRITES_MAX)
        added = Added(owner)
        for put, found in zip(branch, targets, strict=True):
            if type(put) is not Put:
                continue
            if put.lease and self.leases.get(put.lease, _NOBODYS).owner != owner:
                raise lease_ended(put.lease)
            if row := found[0][1]:
                added.put(put, row.owner, row.lease, row.value_bytes)
            else:
                added.put(put)
        mine = self._owners.get(owner) or Used()
        added.check(self._limits, mine, self.used, lambda lease: self.leases[lease].keys)

    def _write(self, id_: int, key: bytes, put: Put | None, row: Row | None, owner: str) -> None:
        """Put a key, or delete it. What `row` says is history then, and nobody's charge."""
        db, revision = self.db, id_ >> _SEQ_BITS
        before, created, version = (row.id, row.created, row.version) if row else (0, revision, 0)
        now = None
        if put is not None:
            now = KeyValue(key, put.value, created, revision, version + 1, put.lease)
        numbers = (now.create_revision, now.version, now.lease) if now else (0, 0, 0)
        value = now.value if now else None
        checksum = _checksum(key, value, owner, id_, *numbers, before)
        sql = "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        db.execute(sql, (id_, key, value, *numbers, owner, before, checksum))
        self._history += 1
        if row is not None:
            self._garbage += row.value_bytes + ROW_BYTES
            self._charge(row.owner, -1, -charge(key, row.value_bytes))
            if row.lease:
                db.execute("DELETE FROM attached WHERE lease = ? AND key = ?", (row.lease, key))
                self.leases[row.lease].keys -= 1
        if now is None:
            db.execute("DELETE FROM keys WHERE key = ?", (key,))
        else:
            db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (key, id_))
            self._charge(owner, 1, charge(key, len(now.value)))
            if now.lease:
                db.execute("INSERT INTO attached VALUES (?, ?)", (now.lease, key))
                self.leases[now.lease].keys += 1
        self._done.events.append(Event(key, revision, now))

    def _charge(self, owner: str, keys: int, nbytes: int) -> None:
        if (mine := self._owners.get(owner)) is None:
            mine = self._owners[owner] = Used()
        mine.add(keys, nbytes)
        self._charged.add(owner)
        self.used.add(keys, nbytes)


_NOBODYS: Final = LeaseRow(0, "", 0.0)


def _bounds(key: bytes, *, prefix: bool) -> tuple[bytes, bytes]:
    return key, (prefix_end(key) or _TOP) if prefix else key + b"\0"


def _present(rows: Iterable[Sequence[Any]]) -> Iterator[KeyValue]:
    """Of the columns _FULL of keys that there are. Raises Damaged."""
    for row in rows:
        now = _event(row).now
        if now is None:
            raise Damaged(f"a deleted key is there: {row[1]!r}")
        yield now


def _event(row: Sequence[Any]) -> Event:
    """Of the columns _FULL. Raises Damaged."""
    id_, key, value, created, version, lease, owner, before, checksum = row
    if _checksum(key, value, owner, id_, created, version, lease, before) != checksum:
        raise Damaged(
            f"what was written at revision {id_ >> _SEQ_BITS} is damaged",
            hint="look at the node's disk (`dmesg`), and restore the store from a backup",
        )
    revision = id_ >> _SEQ_BITS
    now = None if value is None else KeyValue(key, value, created, revision, version, lease)
    return Event(key, revision, now)


def _checksum(key: bytes, value: bytes | None, owner: str, *numbers: int) -> int:
    first = crc32(_NUMBERS.pack(*numbers, value is None))
    return crc32(value or b"", crc32(key, crc32(owner.encode(), first)))


def _is_full(error: Exception) -> bool:
    """Whether it is a disk's without room, of whichever SQLite."""
    code = getattr(error, "sqlite_errorcode", getattr(error, "result", 0)) & 0xFF
    return code == sqlite3.SQLITE_FULL or getattr(error, "errno", 0) in (
        errno.ENOSPC,
        errno.EDQUOT,
    )


def _refusal(failed: Failed) -> WetwareError:
    if not failed.certain:
        return Unknown(
            f"the disk failed as it was written, and again: {failed.error}",
            hint="read what is there once the disk works again; look at the node's disk (`dmesg`)",
        )
    if isinstance(failed.error, WetwareError):
        return failed.error
    return Unwritten(
        f"the store of sync cannot be written: {failed.error}",
        hint=remedy(failed.error) or "look at the node's disk (`dmesg`); nothing else is affected",
    )


def _create(files: Files) -> None:
    """An empty store, whole or not at all."""
    for name in files.names(""):
        if name.startswith(NEW):
            files.remove(name)
    files.close(files.create(NEW, 0))
    db = files.connect(NEW)
    try:
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA page_size=4096")
        db.execute("PRAGMA journal_mode=WAL").fetchall()
        db.execute("BEGIN IMMEDIATE")
        for statement in _STATEMENTS:
            db.execute(statement)
        db.execute("INSERT INTO store VALUES (1, ?, 0, 0, 0, 0, 0)", (Key.generate().seed,))
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        db.close()
    files.rename(NEW, FILE)


def contents(db: Database) -> Iterator[tuple[bytes, bytes, str]]:
    """Each key that is there and goes with no lease: with its value, and whose it is.

    In the order in which they were made. Raises Damaged.
    """
    rows = db.execute(f"SELECT {_FULL} {_PRESENT} WHERE l.lease = 0 ORDER BY l.created, l.key")
    for row in rows:
        now = _event(row).now
        if now is not None:
            yield now.key, now.value, row[6]


def is_sound(db: Database) -> bool:
    """Whether the tables are those of this release."""
    found = db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
    return [sql for (sql,) in found] == _STATEMENTS
