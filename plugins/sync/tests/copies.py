"""Random histories of a store that is copied, and replaced by a copy, while the power goes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from tests.failing_disk import Disk, forget

from wetware.errors import ConfigError, WetwareError
from wetware_sync.embedded import backup
from wetware_sync.embedded.store import FILE, Damaged, Store
from wetware_sync.engine import Limits

from .histories import History, Lost, Unsynced
from .model import Model

COPIES = "copies"
RESTORED_DATABASE = "restored database"
SITES = ("backup 1", "backup 2", "restore 1", "restore 3", RESTORED_DATABASE)
"""Most fsyncs of a backup and of a restore, in their order; and SQLite's of the new store."""
OF_UNCLOSED = "restore 2"
"""It matters where the disk fails under the old store: as `Unclosed` has it."""


class CopyDisk(Unsynced):
    """Attributes:
    outside: A copy on another disk, which nothing happens to.
    copying: SQLite syncs nothing: it promises nothing of what VACUUM INTO writes.
    broken: The store's database cannot be written.
    """

    outside, copying, broken = b"", False, False

    def _write(self, file: Any, data: bytes, at: int) -> None:
        if self.broken and file is self._entry(FILE):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super()._write(file, data, at)

    def _sync(self, what: Any, site: str) -> None:
        entries = self.top.names["store"].names.items() if "store" in self.top.names else ()
        name = next((name for name, entry in entries if entry is what), "")
        if name == backup.RESTORED:
            site = RESTORED_DATABASE
        if not self.copying or site in ("file", "names"):
            super()._sync(what, site)

    def copy(self, source: Path, name: str) -> None:
        if source.name != "outside":
            super().copy(source, name)
            return
        fd = self.create(name, 0)
        self.write(fd, self.outside)
        self.close(fd)


class Ours:
    """The files of one backup or restore: each of its fsyncs has a number, and may be left out.

    Args:
        dies_at: The power goes before the fsync of this number; 0: of none.
        under: The directory, from that of the store.
    """

    def __init__(
        self, disk: Disk, stage: str, seen: set[str], *, dies_at: int = 0, under: str = ""
    ) -> None:
        self._disk, self._stage, self._seen, self._dies_at = disk, stage, seen, dies_at
        self._under, self._count = under, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def create(self, name: str, size: int) -> int:
        return self._disk.create(self._under + name, size)

    def path(self, name: str) -> str:
        return self._disk.path(self._under + name)

    def size(self, name: str) -> int:
        return self._disk.size(self._under + name)

    def remove(self, name: str) -> None:
        self._disk.remove(self._under + name)

    def sync(self, fd: int) -> None:
        if self._is_made():
            self._disk.sync(fd)

    def sync_directory(self, name: str) -> None:
        if self._is_made():
            self._disk.sync_directory(name or self._under.rstrip("/"))

    def _is_made(self) -> bool:
        self._count += 1
        self._disk.dead = self._disk.dead or self._count == self._dies_at
        site = f"{self._stage} {self._count}"
        self._seen.add(site)
        return site != self._disk.dropped


class Copies(History):
    """Attributes:
    copies: Those that were acknowledged, and what they have.
    sites: The fsyncs that there were.
    """

    def __init__(self, seed: int, dropped: str = "") -> None:
        super().__init__(seed, dropped)
        forget(self.disk)
        self.disk: CopyDisk = CopyDisk(self.rng, dropped)
        self.copies: dict[str, Model] = {}
        self.sites: set[str] = set()
        self._begun = 0
        self._epoch = 1
        self._instead: Model | None = None  # it may be this one by now
        self._past = [self.model.copy()]
        self._lossy = False  # or an earlier one

    def run(self) -> None:
        try:
            for _ in range(self.rng.randrange(2, 4)):
                self._live()
                disk = self.disk
                self._lossy, disk.broken = disk.broken and self._instead is not None, False
                disk.crash(power=self._lossy or self.rng.random() < 0.7)
            self._compare(self._opened())
            for name, model in self.copies.items():
                self._is_whole(name, model)
        except Damaged as damaged:
            raise Lost(str(damaged)) from damaged
        finally:
            forget(self.disk)

    def _opened(self) -> Store:
        try:
            return Store(self.disk, Limits())
        except ConfigError as refused:
            raise Lost(f"all of it: {refused}") from refused

    def _live(self) -> None:
        rng, disk = self.rng, self.disk
        store = self._opened()
        self._compare(store)
        for _ in range(2):
            for _ in range(rng.choice([0, 1, 2])):
                self._commit(store, [self._step() for _ in range(rng.choice([1, 1, 2, 4]))])
                self._past.append(self.model.copy())
            if rng.random() < 0.4:
                self._backup(store)
            if disk.dead:
                break
        disk.broken = rng.random() < 0.2
        dead = disk.dead
        disk.dead = dead or rng.random() < 0.5  # it is killed
        store.close()
        disk.dead = dead
        if not dead and self.copies and rng.random() < 0.7:
            self._restore()

    def _files(self, stage: str, under: str = "") -> Any:
        """As a backup or a restore has them, in which the power may go."""
        if self.rng.random() < 0.3:
            self.disk.calls_left = int(self.rng.expovariate(1 / 30)) + 1
        dies_at = self.rng.choice([0, 1, 2, 3, 3])
        return Ours(self.disk, stage, self.sites, dies_at=dies_at, under=under)

    def _backup(self, store: Store) -> None:
        disk = self.disk
        self._begun += 1
        name = f"copy{self._begun}"
        if COPIES not in disk.names(""):
            disk.make_directory(COPIES)
            disk.sync_directory("")
        disk.copying = True
        try:
            backup.write(store.db, self._files("backup", f"{COPIES}/"), name)
        except WetwareError as refused:
            if not disk.dead:
                raise Lost(f"{name}: {refused}") from refused
        else:
            disk.calls_left = None
            self.copies[f"{COPIES}/{name}"] = self.model.copy()
        finally:
            disk.copying = False

    def _restore(self) -> None:
        name = self.rng.choice(sorted(self.copies))
        self._instead = self.copies[name].copy()
        try:
            epoch = backup.restore(self._files("restore"), Path(name))
        except WetwareError as refused:
            if not self.disk.dead:
                raise Lost(f"{name}: {refused}") from refused
        else:
            if epoch <= self._epoch:
                raise Lost(f"epoch {epoch} after {self._epoch}")
            self._it_is_another(epoch)

    def _it_is_another(self, epoch: int) -> None:
        assert self._instead is not None
        self.model, self.unsure, self.seen, self._epoch = self._instead, [], {}, epoch
        self._instead, self._past = None, [self.model.copy()]

    def _compare(self, store: Store) -> None:
        if store.epoch > self._epoch and self._instead is not None:
            self._it_is_another(store.epoch)
        if store.epoch != self._epoch:
            raise Lost(f"epoch {store.epoch}, not {self._epoch}")
        if self._lossy and self._instead is not None:
            self.unsure, self.seen = self._past[::-1], {}
        self._instead = None
        super()._compare(store)

    def _is_whole(self, name: str, model: Model) -> None:
        """A copy makes a store on another disk, where there was none, and that stays there."""
        disk = CopyDisk(self.rng, self.disk.dropped)
        files: Any = Ours(disk, "restore", self.sites)
        try:
            disk.outside = self.disk.read(name, 1 << 30)
            backup.restore(files, Path("outside"))
            disk.crash(power=True)
            store = Store(disk, Limits())
            self._check(store, model)
            store.close()
        except (OSError, WetwareError) as refused:
            raise Lost(f"{name}: {refused}") from refused
        finally:
            forget(disk)


class Unclosed(Copies):
    """The disk fails under the old store, whose log is there, and the power goes at the end."""

    def _live(self) -> None:
        store = self._opened()
        self._compare(store)
        for many in (2, 8):
            for _ in range(many):
                self._commit(store, [self._step()])
                self._past.append(self.model.copy())
            if not self.copies:
                self._backup(store)
        self.disk.broken, self.disk.dead = True, True
        store.close()
        self.disk.dead = False
        if self.copies:
            self._restore()

    def _files(self, stage: str, under: str = "") -> Any:
        dies_at = 3 if stage == "restore" else 0
        return Ours(self.disk, stage, self.sites, dies_at=dies_at, under=under)
