"""What the tests of engines are made of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

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

ADA, BOB = "local:ada", "local:bob"


class Clock:
    """Time that tests set, in s."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


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


FACTORIES: dict[str, Any] = {"embedded": embedded}
"""(directory, clock, limits) → an engine that is not running yet; the same directory, the same
store. Its leases end by the clock."""


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
    async with asyncio.timeout(10):
        while not events or events[-1].revision < revision:
            batch: Batch = await watch.next()
            assert batch.events
            assert all(event.revision <= batch.revision for event in batch.events)
            events += batch.events
    return events


def absent(key: bytes) -> Compare:
    return Compare(key, "version", "=", 0)
