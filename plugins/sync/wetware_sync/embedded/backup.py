"""A copy of a store that runs, and a store of such a copy.

A copy is whole by itself: one file, with the store's key in it, for its owner alone.
"""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from wetware.base.disk import remedy
from wetware.errors import Busy, InvalidArgument, WetwareError
from wetware_sync.embedded.store import FILE, SCHEMA_VERSION, is_sound

if TYPE_CHECKING:
    from pathlib import Path

    from wetware.base.files import Database, Files

RESTORED = "restored.db"
"""A copy, before it is the store."""


def write(db: Database, files: Files, name: str) -> int:
    """Copy the store to a new file, between two commits; returns its bytes, on the disk."""
    try:
        fd = files.create(name, 0)
        try:
            db.execute("VACUUM INTO ?", (files.path(name),))  # a file that is there may be empty
            files.sync(fd)  # SQLite promises none
            size = files.size(name)
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove(name)
            raise
        finally:
            files.close(fd)
        files.sync_directory("")
    except Exception as exc:  # of whichever SQLite
        raise WetwareError(
            f"the backup {files.path(name)} cannot be written: {exc}",
            hint=remedy(exc) or "name a file that is not there yet, in a directory that is",
            code="sync.backup",
        ) from exc
    return size


def restore(files: Files, source: Path) -> int:
    """Put a copy in the place of the store in a directory, if there is one; returns its epoch.

    The epoch is above that of both, so what was held of either counts no more. After a crash the
    old store is there, or the new one; of an old one that could not be closed, as its disk fails,
    the last writes may be missing. Raises Busy where the store is open, and InvalidArgument.
    """
    try:
        with contextlib.suppress(FileExistsError):
            files.make_directory("")
        files.sync_directory("..")
        epoch = _epoch_of_closed(files)
        _remove(files, RESTORED)
        files.copy(source, RESTORED)
        try:
            epoch = _prepare(files, epoch)
        except OSError:
            raise
        except Exception as exc:  # of whichever SQLite
            _remove(files, RESTORED)
            raise InvalidArgument(f"{source} is no backup of a store: {exc}") from exc
        # Of a store that could be closed there is no log, and that of another would be taken for
        # one of the new store: it is gone from the disk before that is there.
        _remove(files, f"{FILE}-wal")
        files.sync_directory("")
        files.rename(RESTORED, FILE)
        files.sync_directory("")
    except OSError as exc:
        raise WetwareError(
            f"the backup {source} cannot be restored: {exc}", hint=remedy(exc), code="sync.backup"
        ) from exc
    return epoch


def _remove(files: Files, stem: str) -> None:
    """A file, and those that SQLite has beside it."""
    for name in files.names(""):
        if name.startswith(stem):
            files.remove(name)


def _epoch_of_closed(files: Files) -> int:
    """Of a store, which is closed cleanly; 0 where there is none, or none that can be read."""
    if FILE not in files.names(""):
        return 0
    try:
        with contextlib.closing(files.connect(FILE)) as db:
            db.execute("PRAGMA busy_timeout=1000").fetchall()
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
            db.execute("BEGIN IMMEDIATE")
            ((epoch,),) = db.execute("SELECT epoch FROM store").fetchall()
            db.execute("ROLLBACK")
    except Exception as exc:  # of whichever SQLite
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise Busy(
                f"the store {files.path(FILE)} is open", hint="stop the node first"
            ) from None
        return 0
    return int(epoch)


def _prepare(files: Files, epoch: int) -> int:
    """Check a copy, raise its epoch, and bring it to the disk as the store wants it."""
    with contextlib.closing(files.connect(RESTORED)) as db:
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA synchronous=FULL")
        before, _ = check(db)
        db.execute("PRAGMA journal_mode=WAL").fetchall()
        epoch = max(before, epoch) + 1
        db.execute("UPDATE store SET epoch = ?", (epoch,))
        ((busy, *_),) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if busy:
            raise ValueError("it is open")
    return epoch


def check(db: Database) -> tuple[int, bytes]:
    """The epoch of a copy, and the seed of its key; raises ValueError where it is none."""
    ((version,),) = db.execute("PRAGMA user_version").fetchall()
    if version != SCHEMA_VERSION or not is_sound(db):
        raise ValueError(f"of version {version}; this release knows {SCHEMA_VERSION}")
    ((found,),) = db.execute("PRAGMA quick_check(1)").fetchall()
    if found != "ok":
        raise ValueError(f"it is damaged: {found}")
    ((epoch, seed),) = db.execute("SELECT epoch, authority FROM store").fetchall()
    return int(epoch), bytes(seed)
