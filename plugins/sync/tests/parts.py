"""What the tests of engines are made of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio

from wetware.base.files import Files
from wetware.base.threads import Threads
from wetware_sync.embedded.engine import EmbeddedEngine
from wetware_sync.engine import (
    Batch,
    Compare,
    Delete,
    Engine,
    Event,
    Get,
    KeyValue,
    Limits,
    Put,
    Txn,
    Watch,
)

from .etcds import EtcdProcess

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

ADA, BOB = "local:ada", "local:bob"


class Clock:
    """Time that tests set, in s.

    Attributes:
        ttl_s: Of the leases that tests look at.
        almost: The part of it after which a lease certainly lives.
    """

    ttl_s, almost = 10.0, 0.99

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def ends(self) -> None:
        """The whole time of a lease, and no more."""
        self.now += self.ttl_s

    async def passes(self, part: float) -> None:
        """So much of a lease's time, and some for who looks at the clock now and then."""
        self.now += part * self.ttl_s
        await asyncio.sleep(0.6)


class WallClock(Clock):
    """Real time, for engines whose leases end elsewhere."""

    ttl_s, almost = 5.0, 0.6

    async def ends(self) -> None:
        await asyncio.sleep(self.ttl_s)

    async def passes(self, part: float) -> None:
        await asyncio.sleep(part * self.ttl_s)


@contextlib.asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    async with anyio.create_task_group() as tasks:
        await tasks.start(lambda task_status: engine.run(task_status=task_status))
        try:
            yield engine
        finally:
            tasks.cancel_scope.cancel()


def embedded(path: Path, clock: Clock, limits: Limits | None = None) -> Engine:
    return EmbeddedEngine(Files(path / "store"), run_sync=Threads().run, limits=limits, now=clock)


class OwnEtcd:
    """An etcd engine whose etcd runs as long as it does, as if both were one."""

    def __init__(self, path: Path, limits: Limits | None) -> None:
        from wetware_sync.etcd.engine import EtcdEngine
        from wetware_sync.etcd.wire import Etcd

        self._process = EtcdProcess(path / "etcd")
        self._engine = EtcdEngine(Etcd([self._process.endpoint]), limits=limits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        threads = Threads()
        await threads.run(self._process.start)
        try:
            await self._engine.run(task_status=task_status)
        finally:
            with anyio.CancelScope(shield=True):
                await threads.run(self._process.stop)


def etcd(path: Path, clock: Clock, limits: Limits | None = None) -> Engine:
    return cast("Engine", OwnEtcd(path, limits))


FACTORIES: dict[str, Any] = {"embedded": (embedded, Clock), "etcd": (etcd, WallClock)}
"""(directory, clock, limits) → an engine that is not running yet; the same directory, the same
store. Its leases end by the clock, one of this kind."""


async def put(engine: Engine, key: bytes, value: bytes = b"", **terms: Any) -> int:
    """Returns the revision."""
    owner = terms.pop("owner", ADA)
    return (await engine.txn(Txn((Put(key, value, **terms),)), owner)).revision


async def delete(engine: Engine, key: bytes, *, prefix: bool = False, owner: str = ADA) -> int:
    """Returns how many keys."""
    outcome = await engine.txn(Txn((Delete(key, prefix),)), owner)
    assert isinstance(outcome.results[0], int)
    return outcome.results[0]


async def get(engine: Engine, key: bytes) -> KeyValue | None:
    page = await engine.read(Get(key))
    return page.items[0] if page.items else None


async def told(watch: Watch, revision: int) -> list[Event]:
    """What a watch tells up to a revision that has an event for it."""
    events: list[Event] = []
    async with asyncio.timeout(60):
        while not events or events[-1].revision < revision:
            batch: Batch = await watch.next()
            assert batch.events
            assert all(event.revision <= batch.revision for event in batch.events)
            events += batch.events
    return events


def absent(key: bytes) -> Compare:
    return Compare(key, "version", 0)
