"""What the broker keeps on disk: durable grants with their ancestors, their budgets, and fences.

One SQLite database in the node's data directory, written by one thread: a write is acknowledged
when it is on disk (WAL, synchronous=FULL), and writes that wait meanwhile share the next commit.

A revocation never waits for the disk and must reach it: it is tried again until it has, on a full
disk with the space of a reserve (`base.disk`). Such a write makes nothing larger: the rows that
it removes leave more room than it needs, and the WAL is used anew after each. So no holder uses the
reserve up by ending what is their own. Where not even that could be written the reserve is marked,
and after a crash no share works until an operator has looked.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from wetware.base import disk
from wetware.base.log import get_logger
from wetware.base.writer import RETRY_S, Write, Writer
from wetware.broker.clock import SteadyClock
from wetware.errors import ConfigError, WetwareError

if TYPE_CHECKING:
    from wetware.base.clock import Clock

log = get_logger("broker")

FILE: Final = "grants.db"
SCHEMA_VERSION: Final = 1
ENDED_KEPT_MAX: Final = 4096
"""Ended shares that are remembered, so that their holders are told why."""
ENDS_PER_WRITE: Final = 64
"""Grants that are forgotten in one write: each may be in a page of its own."""
ENDED_BYTES_MAX: Final = 256
"""Of why it ended: fewer than its grant's row, which makes room for it."""
WAL_PAGES: Final = 256
"""1 MiB: the database has to grow by no more than that when the WAL is put into it, and half of the
reserve is enough."""
NOT_DURABLE: Final = "an end of grants may not be on the disk"

Statement: TypeAlias = tuple[str, Sequence[Any]]

_KEEP_CLOCK: Final = "INSERT OR REPLACE INTO meta VALUES ('clock', ?)"
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE grants (
  id TEXT PRIMARY KEY, parents TEXT NOT NULL, kind TEXT NOT NULL, principal TEXT NOT NULL,
  label TEXT NOT NULL, service TEXT, services TEXT NOT NULL, terms TEXT NOT NULL,
  durable INTEGER NOT NULL, created_at REAL NOT NULL,
  calls_spent INTEGER NOT NULL DEFAULT 0, bytes_spent INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE shares (
  id TEXT PRIMARY KEY, secret_hash BLOB NOT NULL, uses INTEGER, redeemed INTEGER NOT NULL DEFAULT 0,
  ended TEXT, ended_at REAL
) WITHOUT ROWID;
CREATE TABLE fences (
  authority TEXT, lock TEXT, epoch INTEGER NOT NULL, counter INTEGER NOT NULL,
  PRIMARY KEY (authority, lock)
) WITHOUT ROWID;
"""


class StoreUnavailable(WetwareError):
    """The broker's store cannot be written: what has to be on disk first is refused."""

    code = "store"


@dataclass(frozen=True, slots=True)
class GrantRow:
    """A grant as it is kept: the columns of the table, in their order.

    Attributes:
        services: Service name → patterns, resolved; for a root its profile's.
        terms: `Terms.plain()`.
        calls_spent: Of its quota, reserved blocks included.
        bytes_spent: Likewise.
    """

    id: str
    parents: tuple[str, ...]
    kind: str
    principal: str
    label: str
    service: str | None
    services: Mapping[str, Sequence[str]]
    terms: Mapping[str, Any]
    durable: bool
    created_at: float
    calls_spent: int = 0
    bytes_spent: int = 0

    def statement(self) -> Statement:
        """Keeps it; what is known already stays as it is."""
        values = [getattr(self, column.name) for column in fields(self)]
        kept = [json.dumps(v) if isinstance(v, tuple | Mapping) else v for v in values]
        return "INSERT OR IGNORE INTO grants VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", kept

    @classmethod
    def of(cls, columns: Sequence[Any]) -> GrantRow:
        """The inverse of `statement`."""
        row = dict(zip((column.name for column in fields(cls)), columns, strict=True))
        row |= {name: json.loads(row[name]) for name in ("parents", "services", "terms")}
        return cls(**row | {"parents": tuple(row["parents"]), "durable": bool(row["durable"])})


@dataclass(frozen=True, slots=True)
class ShareRow:
    """What a durable share has beside its grant.

    Attributes:
        secret_hash: SHA-256 of the 32 random bytes in the sturdy ref.
        uses: How often it may be redeemed in all; None: no limit.
        redeemed: How often it was.
        ended: Why it ended; "" while it lives.
        ended_at: Unix time, s; 0 while it lives.
    """

    id: str
    secret_hash: bytes = field(repr=False)
    uses: int | None
    redeemed: int
    ended: str = ""
    ended_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Kept:
    """All that a store had when it was opened."""

    grants: tuple[GrantRow, ...] = ()
    shares: tuple[ShareRow, ...] = ()
    fences: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    clock: float = 0.0


@dataclass(frozen=True, slots=True)
class _Change:
    """Statements that are committed together; what `must` be is tried again until it is."""

    statements: tuple[Statement, ...]
    must: bool = False


class GrantStore:
    """The database. Open it before the loop serves; close it after the broker.

    Args:
        directory: Created (0700).
        clock: The machine's. What time it was is kept with each write.

    Attributes:
        clock: Goes on from the latest time that was kept.
        kept: All that was in the database.
        reserve: Space for ends.
        unsure: Why what was kept may be more than there was: a crash, after an end that the disk
            did not take. "" if it was not so, or once an operator has looked (`confirm`).
        failing: Why nothing but ends is written; "" while all is.

    Raises ConfigError if it cannot be opened, is damaged, or of a later release.
    """

    def __init__(self, directory: Path, clock: Clock) -> None:
        self._directory = directory
        file = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.reserve = disk.Reserve(directory)
            self.unsure = self.reserve.marked
            try:
                self.kept = self._open(file)
            except sqlite3.OperationalError:
                with self.reserve.open():
                    self.kept = self._open(file)
            self.clock = SteadyClock(clock, self.kept.clock)
        except (sqlite3.Error, OSError, ValueError, TypeError, KeyError) as exc:
            raise ConfigError(
                f"the broker's store {file} cannot be used: {exc}",
                hint=disk.remedy(exc)
                or "restore it from a backup; or move it away: then every shared reference that "
                "this node issued is void",
                code="config.store",
            ) from exc
        self.failing = ""
        if not self.reserve.fill():
            self._fails(f"there is no room for the reserve: {self.reserve.missing}")
        self._writer = Writer(
            "broker store",
            self._commit,
            lambda owed: RETRY_S if owed or self.failing else None,
            unavailable=StoreUnavailable,
        )
        self._writer.start()

    # --- opening ----------------------------------------------------------------------------------

    def _open(self, file: Path) -> Kept:
        self._db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        try:
            file.chmod(0o600)
            self._prepare()
            return self._load()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode=EXCLUSIVE")  # without a file for other processes' readers
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
        db.execute("PRAGMA busy_timeout=2000")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
        elif version != SCHEMA_VERSION:
            raise ValueError(f"it is of version {version}, and this release knows {SCHEMA_VERSION}")
        if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise ValueError(f"it is damaged: {found}")

    def _load(self) -> Kept:
        db = self._db
        db.execute(
            "DELETE FROM shares WHERE ended IS NOT NULL AND id NOT IN "
            "(SELECT id FROM shares WHERE ended IS NOT NULL ORDER BY ended_at DESC LIMIT ?)",
            (ENDED_KEPT_MAX,),
        )
        db.execute(  # a share that ended while it was made
            "DELETE FROM shares WHERE ended IS NULL AND id NOT IN (SELECT id FROM grants)"
        )
        grants = tuple(map(GrantRow.of, db.execute("SELECT * FROM grants ORDER BY created_at")))
        shares = tuple(
            ShareRow(id_, bytes(hashed), uses, redeemed, ended or "", ended_at or 0.0)
            for id_, hashed, uses, redeemed, ended, ended_at in db.execute("SELECT * FROM shares")
        )
        fences = {
            (authority, lock): (epoch, counter)
            for authority, lock, epoch, counter in db.execute("SELECT * FROM fences")
        }
        clock = db.execute("SELECT value FROM meta WHERE key = 'clock'").fetchone()
        return Kept(grants, shares, fences, float(clock[0]) if clock else 0.0)

    # --- writing ----------------------------------------------------------------------------------

    async def write(self, statements: Iterable[Statement]) -> None:
        """Commit; returns when it is on disk. Raises StoreUnavailable: then nothing is written."""
        await self._writer.write(_Change(tuple(statements)))

    def write_soon(self, statements: Iterable[Statement]) -> None:
        """Commit as soon as the disk allows; for what has taken effect already. Never raises."""
        self._writer.write_soon(_Change(tuple(statements), must=True))

    async def written(self) -> None:
        """When every end that was handed in before is on disk; raises StoreUnavailable."""
        await self.write(())

    def confirm(self) -> None:
        """An operator has looked at what was kept, after a crash that made it `unsure`."""
        self.unsure = ""
        self.reserve.unmark()

    def close(self) -> None:
        """Write what waits, within CLOSE_S. Idempotent."""
        if not self._writer.close():
            log.error("store.not_written", hint="the last revocations may be undone at a restart")

    # --- the thread -------------------------------------------------------------------------------

    def _commit(self, batch: list[Write[_Change]], last: bool) -> list[Write[_Change]]:
        """Commit; returns what must be tried again."""
        owed = self._commit_all(batch)
        if last:
            if owed:
                log.error("store.write_lost", writes=len(owed), error=self.failing)
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()
        return owed

    def _commit_all(self, batch: list[Write[_Change]]) -> list[Write[_Change]]:
        if not batch and not self.failing:
            return []
        if not self.failing or self.reserve.fill():
            try:
                self._execute(batch)
            except Exception as exc:
                if not _hopeless(exc):
                    self._fails(str(exc))
            else:
                self._works()
                for write in batch:
                    self._writer.answer(write)
                return []
        return self._commit_apart(batch)

    def _commit_apart(self, batch: list[Write[_Change]]) -> list[Write[_Change]]:
        """Each by itself: one of them is refused, or the disk fails and takes ends only."""
        owed: list[Write[_Change]] = []
        for write in batch:  # in their order: what is forgotten must not be kept afterwards
            error = self._write_apart(write, owed=bool(owed))
            if error is not None and write.what.must and not _hopeless(error):
                owed.append(write)
                self.reserve.mark(NOT_DURABLE)
                continue
            if error is not None and _hopeless(error):  # it must not stop the rest
                log.error("store.refused", exc_info=error)
                error = StoreUnavailable(f"the broker's store refused it: {error}")
            self._writer.answer(write, error=error)
        if not owed and not self.unsure:
            self.reserve.unmark()
        return owed

    def _write_apart(self, write: Write[_Change], *, owed: bool) -> Exception | None:
        """One write; returns why it is not on the disk. `owed`: others are not, which must be."""
        if not write.what.must:
            if owed and not write.what.statements:  # `written`, and not all of it is
                return StoreUnavailable(
                    f"it has ended, and that is not on the disk yet: {self.failing}",
                    hint="free some disk space on the node, which goes on trying; should it crash "
                    "before, all its shares are suspended until an operator has looked",
                )
            if self.failing and write.what.statements:
                return StoreUnavailable(f"the broker's store cannot be written: {self.failing}")
        try:
            self._execute([write])
            if write.what.must:
                self._reuse_wal()
        except Exception as exc:
            if _hopeless(exc):
                return exc
            self._fails(str(exc))
            if not write.what.must:
                return StoreUnavailable(f"the broker's store cannot be written: {exc}")
        else:
            return None
        try:
            with self.reserve.open():
                self._execute([write])
                self._reuse_wal()
        except Exception as exc:
            return exc
        return None

    def _reuse_wal(self) -> None:
        """Put it into the database, so that the next write begins it anew and needs no room."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(RESTART)")

    def _fails(self, why: str) -> None:
        if not self.failing:
            log.error("store.failing", error=why, hint="free some disk space")
        self.failing = why or "an error without a message"

    def _works(self) -> None:
        if self.failing:
            self.failing = ""
            log.info("store.writes_again")
        if not self.unsure:
            self.reserve.unmark()

    def _execute(self, batch: list[Write[_Change]]) -> None:
        db = self._db
        before = db.total_changes
        db.execute("BEGIN IMMEDIATE")
        try:
            for write in batch:
                for sql, values in write.what.statements:
                    db.execute(sql, values)
            # What ends nothing that is kept writes nothing: it needs no room, also on a full disk.
            if db.total_changes != before or (self.failing and not batch):
                db.execute(_KEEP_CLOCK, (str(self.clock.time()),))
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise

    # --- what is written --------------------------------------------------------------------------

    async def save_clock(self) -> None:
        """What time it is now, though it was later before."""
        await self.write([(_KEEP_CLOCK, (str(self.clock.time()),))])

    async def save_share(self, grants: Iterable[GrantRow], share: ShareRow) -> None:
        """A new share with all its ancestors."""
        await self.write(
            (
                *(row.statement() for row in grants),
                (
                    "INSERT INTO shares (id, secret_hash, uses) VALUES (?,?,?)",
                    (share.id, share.secret_hash, share.uses),
                ),
            )
        )

    async def save_redeemed(self, share_id: str, redeemed: int) -> None:
        """A use of a share; never fewer than before."""
        await self.write(
            (("UPDATE shares SET redeemed = MAX(redeemed, ?) WHERE id = ?", (redeemed, share_id)),)
        )

    async def save_spent(self, grant_id: str, calls: int, nbytes: int) -> None:
        """What a budget has spent or reserved; never less than before."""
        await self.write(
            (
                (
                    "UPDATE grants SET calls_spent = MAX(calls_spent, ?), "
                    "bytes_spent = MAX(bytes_spent, ?) WHERE id = ?",
                    (calls, nbytes, grant_id),
                ),
            )
        )

    def settle(self, spent: Iterable[tuple[str, int, int]]) -> None:
        """What budgets (grant, calls, bytes) have spent, when nothing is spent any more."""
        statements = [
            ("UPDATE grants SET calls_spent = ?, bytes_spent = ? WHERE id = ?", (calls, size, id_))
            for id_, calls, size in spent
        ]
        if statements:  # it gives back: nothing is lost but that without room
            self._writer.write_soon(_Change(tuple(statements)))

    async def save_fence(self, name: tuple[str, str], mark: tuple[int, int]) -> None:
        await self.write((("INSERT OR REPLACE INTO fences VALUES (?,?,?,?)", (*name, *mark)),))

    def forget(self, grants: Iterable[str], ended: Iterable[tuple[str, str, float]]) -> None:
        """Grants are over; of the shares among them it is kept why (id, reason, Unix time)."""
        statements: list[Statement] = [
            ("DELETE FROM grants WHERE id = ?", (grant_id,)) for grant_id in grants
        ]
        statements += [
            (
                "UPDATE shares SET ended = ?, ended_at = ? WHERE id = ?",
                (_kept_reason(reason), at, share_id),
            )
            for share_id, reason, at in ended
        ]
        # In parts, each of which needs little room; what is left of a subtree is void by itself.
        for at in range(0, len(statements), ENDS_PER_WRITE):
            self.write_soon(statements[at : at + ENDS_PER_WRITE])


def _kept_reason(reason: str) -> str:
    """As much of it as has room. No half of a surrogate pair may keep an end from the disk."""
    return reason.encode(errors="replace")[:ENDED_BYTES_MAX].decode(errors="ignore")


def _hopeless(error: Exception) -> bool:
    """Whether no further try can write it."""
    if isinstance(error, StoreUnavailable):
        return False
    return isinstance(error, sqlite3.IntegrityError) or not isinstance(error, sqlite3.Error)
