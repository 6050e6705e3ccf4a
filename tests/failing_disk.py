"""A disk in memory that loses, tears and refuses, under the files of a store and its SQLite alike.

What is written is in the page cache, and on the disk only after an fsync that succeeded; a name
only after one of its directory. A crash of the process leaves the page cache. A power loss keeps of
each file any of the sectors, and of each directory any of the names, that were not synced. An fsync
that fails brings some of them to the disk, and no later one knows of the others: so does Linux. The
names of the index and of the store itself stay to be synced: a journal that fails takes the file
system with it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw

from wetware.base.files import Files

SECTOR = 512
SITES = ("index's name", "root", "rewritten log", "log", "database")
"""Where a store has an fsync: of the names of its database and of itself; of a log before it is
read; those of SQLite, of its two files. What else is synced has the sites "file", "names" of files
in a directory, and "directory", its own name."""


class File:
    """`data` is the page cache, `disk` what lies under it."""

    def __init__(self) -> None:
        self.data, self.disk = bytearray(), bytearray()
        self.dirty: set[int] = set()
        self.forgotten: set[int] = set()

    def write(self, data: bytes, at: int) -> None:
        self._resize(max(len(self.data), at + len(data)))
        self.data[at : at + len(data)] = data
        self.dirty.update(range(at // SECTOR, (at + len(data) - 1) // SECTOR + 1))

    def truncate(self, size: int) -> None:
        self._resize(size)
        self.dirty.add(size // SECTOR)

    def _resize(self, size: int) -> None:
        if size > len(self.data):
            self.data.extend(bytes(size - len(self.data)))
        del self.data[size:]

    def keep(self, sectors: set[int]) -> None:
        """Some of what is dirty reaches the disk; no later sync knows of the rest."""
        if sectors == self.dirty and not self.forgotten:
            self.disk[:] = self.data
        elif sectors:
            # The new size is on the disk with all of it, or with any of it.
            size = len(self.data)
            if sectors != self.dirty and len(sectors) % 2:
                size = max(size, len(self.disk))
            new = bytearray(self.disk.ljust(size, b"\0")[:size])
            for sector in sectors:
                part = self.data[sector * SECTOR : (sector + 1) * SECTOR]
                new[sector * SECTOR : sector * SECTOR + len(part)] = part
            self.disk[:] = new
        self.forgotten = (self.forgotten | self.dirty) - sectors
        self.dirty.clear()


class Directory:
    def __init__(self) -> None:
        self.names: dict[str, File | Directory] = {}
        self.forgotten: set[tuple[str, int]] = set()
        self.disk: dict[str, File | Directory] = {}

    @property
    def dirty(self) -> set[str]:
        both = self.names.keys() | self.disk.keys()
        changed = {n for n in both if self.names.get(n) is not self.disk.get(n)}
        return {n for n in changed if (n, id(self.names.get(n))) not in self.forgotten}

    def forget(self) -> None:
        self.forgotten |= {(n, id(self.names.get(n))) for n in self.dirty}

    def keep(self, names: set[str]) -> None:
        for name in sorted(names):  # a seed says all
            if name in self.names:
                self.disk[name] = self.names[name]
            else:
                self.disk.pop(name, None)


class Disk(Files):
    """In the place of `base.files.Files`.

    Attributes:
        dropped: The site whose fsync does nothing.
        faults: How likely a call fails: kind of call → probability.
        calls_left: The power goes at this call; None: it does not.
        dead: Every call fails, and changes nothing.
        full: What makes a file larger fails, but while the reserve is open.
        dies_in_commit: How likely it dies when a log is synced.
        died_in_commit: It did.
        calls: So many were made.
    """

    def __init__(self, rng: random.Random, dropped: str = "") -> None:
        self.rng, self.dropped = rng, dropped
        self.faults: dict[str, float] = {}
        self.calls_left: int | None = None
        self.dead = self.full = False
        self.dies_in_commit, self.died_in_commit = 0.0, False
        self.calls = 0
        self.top = Directory()
        self._fds: dict[int, tuple[str, File]] = {}
        self._numbers = itertools.count(3)
        self._lock = threading.RLock()
        self.id = _register(self)

    # --- what happens to it -----------------------------------------------------------------------

    def crash(self, *, power: bool) -> None:
        """The process has died, and nothing of it runs any more; with `power` the machine, too."""
        self.dead, self.full, self.calls_left, self.faults = False, False, None, {}
        self.dies_in_commit, self.died_in_commit = 0.0, False
        self._fds.clear()
        if power:
            self._lose(self.top)

    def _lose(self, directory: Directory) -> None:
        directory.keep(self._some(directory.dirty))
        directory.names = dict(directory.disk)
        directory.forgotten.clear()
        for entry in directory.names.values():
            if isinstance(entry, Directory):
                self._lose(entry)
            else:
                entry.keep(self._some(entry.dirty))
                entry.data[:] = entry.disk
                entry.forgotten.clear()

    def _some(self, items: set[Any]) -> set[Any]:
        """All, none, or any of them."""
        how = self.rng.random()
        if how < 0.3:
            return set()
        if how < 0.5:
            return set(items)
        return {item for item in sorted(items) if self.rng.random() < 0.5}

    def _call(self, kind: str, *, grows: bool = False) -> None:
        self.calls += 1
        if self.calls_left is not None:
            self.calls_left -= 1
            self.dead = self.dead or self.calls_left <= 0
        if self.dead:
            raise OSError(errno.EIO, "the power has gone")
        if grows and self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.rng.random() < self.faults.get(kind, 0):
            code = errno.ENOSPC if grows and self.rng.random() < 0.5 else errno.EIO
            raise OSError(code, os.strerror(code))

    def _sync(self, what: File | Directory, site: str) -> None:
        if site == "log" and self.dies_in_commit and self.rng.random() < self.dies_in_commit:
            self.dead = self.died_in_commit = True
        try:
            self._call(site if site in ("log", "log's name") else "sync")
        except OSError:
            if not self.dead:
                what.keep(self._some(what.dirty))
                if isinstance(what, Directory) and site in ("names", "directory"):
                    what.forget()
            raise
        if site != self.dropped:
            what.keep(set(what.dirty))

    def _entry(self, path: str) -> File | Directory:
        """Of "..", "" (the root), or a path below that."""
        entry: File | Directory = self.top
        for part in [] if path == ".." else ["store", *path.split("/")]:
            if not part:
                continue
            if not isinstance(entry, Directory) or part not in entry.names:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            entry = entry.names[part]
        return entry

    def _parent(self, path: str) -> tuple[Directory, str]:
        if not path:
            return self.top, "store"
        parent, _, name = path.rpartition("/")
        entry = self._entry(parent)
        assert isinstance(entry, Directory)
        return entry, name

    # --- Files ------------------------------------------------------------------------------------

    def create(self, name: str, size: int) -> int:
        with self._lock:
            self._call("write", grows=True)
            parent, last = self._parent(name)
            if last in parent.names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            parent.names[last] = File()
            return self._open(name)

    def open(self, name: str) -> int:
        with self._lock:
            self._call("read")
            return self._open(name)

    def _open(self, name: str) -> int:
        entry = self._entry(name)
        assert isinstance(entry, File)
        fd = next(self._numbers)
        self._fds[fd] = name, entry
        return fd

    def read(self, name: str, bytes_max: int) -> bytes:
        with self._lock:
            self._call("read")
            entry = self._entry(name)
            assert isinstance(entry, File)
            return bytes(entry.data[:bytes_max])

    def write(self, fd: int, data: bytes) -> None:
        with self._lock:
            self._write(self._fds[fd][1], data, 0)

    def _write(self, file: File, data: bytes, at: int) -> None:
        was_dead = self.dead
        try:
            self._call("write", grows=at + len(data) > len(file.data))
        except OSError:
            if not was_dead and data:
                file.write(data[: self.rng.randrange(len(data))], at)
            raise
        if data:
            file.write(data, at)

    def sync(self, fd: int) -> None:
        with self._lock:
            name, file = self._fds[fd]
            self._sync(file, "rewritten log" if name.endswith("-wal") else "file")

    def copy(self, source: Path, name: str) -> None:
        data = self.read(str(source), 1 << 40)
        fd = self.create(name, 0)
        self.write(fd, data)
        self.close(fd)

    def close(self, fd: int) -> None:
        self._fds.pop(fd, None)

    def remove(self, name: str) -> None:
        with self._lock:
            self._call("write")
            self._entry(name)
            parent, last = self._parent(name)
            del parent.names[last]

    def rename(self, name: str, new: str) -> None:
        self.link(name, new)
        parent, last = self._parent(name)
        del parent.names[last]

    def link(self, name: str, new: str) -> None:
        with self._lock:
            self._call("write")
            parent, last = self._parent(new)
            parent.names[last] = self._entry(name)

    def size(self, name: str) -> int:
        entry = self._entry(name)
        assert isinstance(entry, File)
        return len(entry.data)

    def names(self, directory: str) -> list[str]:
        with self._lock:
            self._call("read")
            entry = self._entry(directory)
            assert isinstance(entry, Directory)
            return list(entry.names)

    def make_directory(self, name: str) -> None:
        with self._lock:
            self._call("write", grows=True)
            parent, last = self._parent(name)
            if last in parent.names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            parent.names[last] = Directory()

    def remove_directory(self, name: str) -> None:
        with self._lock:
            self._call("write")
            parent, last = self._parent(name)
            entry = parent.names[last]
            if not isinstance(entry, Directory) or entry.names:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)
            del parent.names[last]

    def sync_directory(self, name: str) -> None:
        with self._lock:
            entry = self._entry(name)
            assert isinstance(entry, Directory)
            site = {"": "index's name", "..": "root"}.get(name, "names")
            if not name and any(isinstance(entry.names.get(n), Directory) for n in entry.dirty):
                site = "directory"
            self._sync(entry, site)

    def free_bytes(self) -> int:
        return 1 << 40

    def path(self, name: str) -> str:
        return f"/{self.id}/{name}"

    def connect(self, name: str) -> Any:
        return Connection(apsw.Connection(self.path(name), vfs=VFS_NAME))

    def reserve(self) -> Any:
        return Reserve(self)


class Reserve:
    """Space on this disk."""

    missing = ""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._opened = disk, False

    def fill(self) -> bool:
        return True

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        assert not self._opened, "the real one waits for ever"
        self._opened = True
        full, self._disk.full = self._disk.full, False
        try:
            yield
        finally:
            self._disk.full, self._opened = full, False


class Connection:
    """`apsw` as a store wants it."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, params: Sequence[Any] = ()) -> Any:
        name, _, pages = sql.partition("=")
        if name == "PRAGMA wal_autocheckpoint":
            # SQLite's own takes no notice of its errors; what a file here raises would go through.
            self._connection.set_wal_hook(lambda *args: self._checkpoint(int(pages), args[-1]))
            return self._connection.cursor()
        return self._connection.cursor().execute(sql, params)

    def _checkpoint(self, pages_max: int, pages: int) -> int:
        if pages >= pages_max:
            with contextlib.suppress(apsw.Error):
                self._connection.wal_checkpoint()
        return int(apsw.SQLITE_OK)

    def close(self) -> None:
        with contextlib.suppress(apsw.Error):  # as Python's own
            self._connection.close(True)


# --- SQLite on it ---------------------------------------------------------------------------------

VFS_NAME = "wetware-test"
_disks: dict[int, Disk] = {}
_ids = itertools.count(1)


def _register(disk: Disk) -> int:
    number = next(_ids)
    _disks[number] = disk
    return number


def forget(disk: Disk) -> None:
    _disks.pop(disk.id, None)


def _split(path: str) -> tuple[Disk, str]:
    _, number, name = path.split("/", 2)
    return _disks[int(number)], name


def _code(error: OSError, code: int) -> Exception:
    return apsw.exception_for(apsw.SQLITE_FULL if error.errno == errno.ENOSPC else code)


class _File:
    """As SQLite's unix VFS: the first sync of a new log or journal syncs its directory."""

    def __init__(self, disk: Disk, name: str, *, new: bool) -> None:
        self._disk, self._name = disk, name
        entry = disk._entry(name)
        assert isinstance(entry, File)
        self._file = entry
        self._log = name.endswith(("-wal", "-journal"))
        self._unnamed = new and self._log

    def xRead(self, amount: int, offset: int) -> bytes:
        with self._disk._lock:
            try:
                self._disk._call("read")
            except OSError as exc:
                raise _code(exc, apsw.SQLITE_IOERR_READ) from None
            return bytes(self._file.data[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:
        with self._disk._lock:
            try:
                self._disk._write(self._file, bytes(data), offset)
            except OSError as exc:
                raise _code(exc, apsw.SQLITE_IOERR_WRITE) from None

    def xTruncate(self, size: int) -> None:
        with self._disk._lock:
            try:
                self._disk._call("write")
            except OSError as exc:
                if self._log and size:  # of `journal_size_limit`: SQLite takes no notice
                    return
                raise _code(exc, apsw.SQLITE_IOERR_TRUNCATE) from None
            self._file.truncate(size)

    def xSync(self, flags: int) -> None:
        with self._disk._lock:
            try:
                self._disk._sync(self._file, "log" if self._log else "database")
                if self._unnamed:
                    self._unnamed = False
                    with contextlib.suppress(OSError):  # as SQLite does
                        self._disk._sync(self._disk._entry(""), "log's name")
            except OSError as exc:
                raise _code(exc, apsw.SQLITE_IOERR_FSYNC) from None

    def xFileSize(self) -> int:
        return len(self._file.data)

    def xClose(self) -> None:
        pass

    def xLock(self, level: int) -> None:
        pass

    def xUnlock(self, level: int) -> None:
        pass

    def xCheckReservedLock(self) -> bool:
        return False

    def xFileControl(self, op: int, pointer: int) -> bool:
        return False

    def xSectorSize(self) -> int:
        return 4096

    def xDeviceCharacteristics(self) -> int:
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE


class _Vfs(apsw.VFS):
    def __init__(self) -> None:
        super().__init__(VFS_NAME, "")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        disk, name = _split(path)
        with disk._lock:
            new = False
            try:
                try:
                    disk._call("read")
                    disk._entry(name)
                except FileNotFoundError:
                    if not flags[0] & apsw.SQLITE_OPEN_CREATE:
                        raise
                    disk.close(disk.create(name, 0))
                    new = True
            except OSError as exc:
                raise _code(exc, apsw.SQLITE_CANTOPEN) from None
            return _File(disk, name, new=new)

    def xAccess(self, path: str, flags: int) -> bool:
        disk, name = _split(path)
        try:
            disk._entry(name)
        except FileNotFoundError:
            return False
        return True

    def xDelete(self, path: str, sync: int) -> None:
        try:
            disk, name = _split(path)
            disk.remove(name)
            if sync:
                disk.sync_directory("")
        except (FileNotFoundError, KeyError):  # also of a disk that is forgotten
            raise apsw.exception_for(apsw.SQLITE_IOERR_DELETE_NOENT) from None
        except OSError as exc:
            raise _code(exc, apsw.SQLITE_IOERR_DELETE) from None

    def xFullPathname(self, name: str) -> str:
        return name


_vfs = _Vfs()
