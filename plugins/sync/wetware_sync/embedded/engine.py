"""The embedded engine: `Store` on a thread of its own, with group commit; watches and leases here.

Everything that waits while a commit is under way shares the next one. What is read is read between
two commits, so nobody sees what is not on the disk.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base.files import Files
from wetware.base.log import get_logger
from wetware.base.writer import Write, Writer, groups
from wetware.errors import WetwareError
from wetware_sync.charges import Waiting
from wetware_sync.embedded import backup
from wetware_sync.embedded.store import Change, Commit, LeaseRow, Store
from wetware_sync.engine import (
    Batch,
    Get,
    Limits,
    Outcome,
    Page,
    Status,
    Txn,
    Unknown,
    Watch,
    check_get,
    check_ttl,
    check_watch,
    closed,
    lease_ended,
)
from wetware_sync.hub import Hub

if TYPE_CHECKING:
    from pathlib import Path

    from anyio.abc import TaskStatus

    from wetware.identity import Key

log = get_logger("sync.engine")

COMMIT_BYTES_MAX: Final = 1 << 20
IDLE_S: Final = 1.0
TICK_S: Final = 0.25
"""How long after its time a lease ends, at most. A timer of the loop stands still while the machine
sleeps, so the clock is looked at this often."""
RETRY_S: Final = 1.0
"""Between two tries to end a lease that the disk refused."""


def boottime() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class _Held:
    """A lease that is kept. `ending`: nobody keeps it any more, though it is not off the disk."""

    row: LeaseRow
    deadline: float
    ending: bool = False


class EmbeddedEngine:
    """Implements `Engine`.

    Args:
        files: The directory of the store, its own.
        run_sync: Runs a blocking function in a thread.
        now: Seconds, by which leases end.
    """

    authority: Key
    epoch: int

    def __init__(
        self,
        files: Files,
        *,
        run_sync: Callable[..., Awaitable[Any]],
        limits: Limits | None = None,
        now: Callable[[], float] = boottime,
    ) -> None:
        self._files, self._run_sync, self._now = files, run_sync, now
        self._limits = limits or Limits()
        self._closed = True
        self._leases: dict[int, _Held] = {}
        self._waiting = Waiting("try again later; the disk is slow (`ww doctor`), or it is busy")

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        self._store = store = await self._run_sync(Store, self._files, self._limits)
        self.authority, self.epoch = store.authority, store.epoch
        self._hub = Hub(store.revision, self._limits, self._from_disk)
        self._leases.clear()
        for row in store.leases.values():
            self._hold(row)
        self._writer: Writer[Change] = Writer(
            "sync store",
            self._commit,
            lambda _: IDLE_S if store.waits else None,
            unavailable=Unknown,  # of a defect
        )
        self._writer.start()
        self._closed = False
        try:
            task_status.started()
            while True:
                await anyio.sleep(TICK_S)
                self._expire()
        finally:
            self._closed = True
            with anyio.CancelScope(shield=True):
                await self._run_sync(self._writer.close)
            self._hub.close(closed())

    # --- the verbs --------------------------------------------------------------------------------

    async def read(self, get: Get) -> Page:
        check_get(get)
        page: Page = await self._wait(Change(partial(Store.read, get=get), reads=True))
        return page

    async def txn(self, txn: Txn, owner: str) -> Outcome:
        size = txn.check()
        apply = partial(Store.txn, txn=txn, owner=owner)
        outcome: Outcome = await self._wait(Change(apply, txn.only_deletes, size))
        return outcome

    def watch(self, key: bytes, revision: int, owner: str, *, prefix: bool = False) -> Watch:
        check_watch(key, revision, prefix=prefix)
        self._check_open()
        return self._hub.watch(key, revision, owner, prefix=prefix)

    async def grant(self, ttl_s: float, owner: str) -> int:
        check_ttl(ttl_s)
        id_ = secrets.randbelow((1 << 62) - 1) + 1
        apply = partial(Store.grant, id_=id_, ttl_s=ttl_s, owner=owner)
        await self._wait(Change(apply))
        return id_

    async def keep(self, lease: int, owner: str) -> float:
        held = self._mine(lease, owner)
        now = self._now()
        if now >= held.deadline:  # it will be ended in a moment
            raise lease_ended(lease)
        held.deadline = now + held.row.ttl_s
        return held.row.ttl_s

    async def end(self, lease: int, owner: str) -> None:
        self._end(self._mine(lease, owner))
        await self._wait(Change(partial(Store.end, id_=lease), must=True))

    async def compact(self, revision: int) -> None:
        await self._wait(Change(partial(Store.compact, revision=revision)))

    async def backup(self, path: Path) -> int:
        """Copy the store to a new file, and return its bytes; what is to be written waits."""
        files = Files(path.parent)
        copy = Change(lambda store: backup.write(store.db, files, path.name), reads=True)
        size: int = await self._wait(copy)
        return size

    async def status(self) -> Status:
        status: Status = await self._wait(Change(self._status, reads=True))
        return status

    def _status(self, store: Store) -> Status:
        return Status(
            engine="embedded",
            epoch=store.epoch,
            revision=store.revision,
            compacted=store.compacted,
            keys=store.used.keys,
            nbytes=store.used.nbytes,
            leases=len(store.leases),
            watches=len(self._hub),
            failing=store.failing,
            failover="none: while the home of the store is down nothing can be read or written",
        )

    # --- leases -----------------------------------------------------------------------------------

    def _hold(self, row: LeaseRow) -> None:
        self._leases[row.id] = _Held(row, self._now() + row.ttl_s)

    def _mine(self, lease: int, owner: str) -> _Held:
        self._check_open()
        held = self._leases.get(lease)
        if held is None or held.ending or held.row.owner != owner:
            raise lease_ended(lease)
        return held

    def _end(self, held: _Held) -> None:
        """Nobody keeps it from now on; it is tried again if the disk refuses."""
        held.ending, held.deadline = True, self._now() + RETRY_S

    def _expire(self) -> None:
        now = self._now()
        for id_, held in self._leases.items():
            if held.deadline <= now:
                self._end(held)
                self._writer.write_soon(Change(partial(Store.end, id_=id_), must=True))

    # --- the thread -------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise closed()

    async def _wait(self, what: Change) -> Any:
        self._check_open()
        self._waiting.begin(what.size)
        return await self._writer.write(what)

    async def _from_disk(self, key: bytes, revision: int, prefix: bool) -> Batch:
        read = partial(Store.events, key=key, revision=revision, prefix=prefix)
        batch: Batch = await self._wait(Change(read, reads=True))
        return batch

    def _commit(self, batch: list[Write[Change]], last: bool) -> list[Any]:
        store, writer = self._store, self._writer
        reads = [write for write in batch if write.what.reads]
        if reads:
            writer.call_soon(self._answer, reads, [_read(store, each.what) for each in reads])
        writes = [write for write in batch if not write.what.reads]
        for group in groups(writes, lambda change: change.size, COMMIT_BYTES_MAX):
            done = store.commit([write.what for write in group])
            writer.call_soon(self._publish, done, group)
        if not batch and not last:
            store.idle()
        if last:
            store.close()
        return []

    def _publish(self, done: Commit, group: list[Write[Change]]) -> None:
        """On the loop, before who waits is answered."""
        for row in done.granted:
            self._hold(row)
        for id_ in done.ended:
            self._leases.pop(id_, None)
        self._hub.publish(done.events, done.compacted)
        self._answer(group, done.results)

    def _answer(self, batch: list[Write[Change]], results: list[Any]) -> None:
        """On the loop, all at once: to wake it costs more than to answer."""
        for write, result in zip(batch, results, strict=True):
            if write.future is not None:
                self._waiting.end(write.what.size)
            error = result if isinstance(result, WetwareError) else None
            self._writer.settle(write, result, error)


def _read(store: Store, what: Change) -> Any:
    """What was read, or the error."""
    try:
        return what.apply(store)
    except WetwareError as exc:
        return exc
