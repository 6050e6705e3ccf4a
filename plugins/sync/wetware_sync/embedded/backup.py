"""A copy of a store that runs, and a store of such a copy.

A copy is whole by itself: one file, with the store's key in it, for its owner alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from wetware.base.disk import remedy
from wetware.errors import Busy, InvalidArgument, WetwareError
from wetware_sync.embedded.store import FILE, SCHEMA_VERSION, is_sound

if TYPE_CHECKING:
    from wetware.base.files import Database

RESTORED = "restored.db"
"""A copy, before it is the store."""


def write(db: Database, path: Path) -> int:
    """Copy the store to a new file, between two commits; returns its bytes, on the disk."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            db.execute("VACUUM INTO ?", (str(path),))  # into a file that is there, if it is empty
            os.fsync(fd)
            size = os.fstat(fd).st_size
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        _sync_directory(path.parent)
    except (OSError, sqlite3.Error) as exc:
        raise WetwareError(
            f"the backup {path} cannot be written: {exc}",
            hint=remedy(exc) or "name a file that is not there yet, in a directory that is",
            code="sync.backup",
        ) from exc
    return size


def restore(directory: Path, source: Path) -> int:
    """Put a copy in the place of the store in a directory, if there is one; returns its epoch.

    The epoch is above that of both, so what was held of either counts no more. After a crash the
    old store is there, or the new one. Raises Busy where the store is open, and InvalidArgument.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        epoch = _epoch_of_closed(directory / FILE)
        new = directory / RESTORED
        new.unlink(missing_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as to, source.open("rb") as copy:
            shutil.copyfileobj(copy, to)
        try:
            epoch = _prepare(new, epoch)
        except (sqlite3.Error, ValueError) as exc:
            new.unlink()
            raise InvalidArgument(f"{source} is no backup of a store: {exc}") from exc
        # Of a store that could be closed there is none, and that of another is of no use.
        Path(f"{directory / FILE}-wal").unlink(missing_ok=True)
        new.replace(directory / FILE)
        _sync_directory(directory)
    except OSError as exc:
        raise WetwareError(
            f"the backup {source} cannot be restored: {exc}", hint=remedy(exc), code="sync.backup"
        ) from exc
    return epoch


def _epoch_of_closed(path: Path) -> int:
    """Of a store, which is closed cleanly; 0 where there is none, or none that can be read."""
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=1)) as db:
        try:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
            db.execute("BEGIN IMMEDIATE")
            ((epoch,),) = db.execute("SELECT epoch FROM store").fetchall()
            db.execute("ROLLBACK")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise Busy(f"the store {path} is open", hint="stop the node first") from None
            return 0
        except sqlite3.DatabaseError:
            return 0
        return int(epoch)


def _prepare(path: Path, epoch: int) -> int:
    """Check a copy, raise its epoch, and bring it to the disk as the store wants it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous=FULL")
        ((version,),) = db.execute("PRAGMA user_version").fetchall()
        if version != SCHEMA_VERSION or not is_sound(db):
            raise ValueError(f"of version {version}; this release knows {SCHEMA_VERSION}")
        ((found,),) = db.execute("PRAGMA quick_check(1)").fetchall()
        if found != "ok":
            raise ValueError(f"it is damaged: {found}")
        db.execute("PRAGMA journal_mode=WAL").fetchall()
        ((before,),) = db.execute("SELECT epoch FROM store").fetchall()
        epoch = max(int(before), epoch) + 1
        db.execute("UPDATE store SET epoch = ?", (epoch,))
        ((busy, *_),) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if busy:
            raise ValueError("it is open")
    return epoch


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
