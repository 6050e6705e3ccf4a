"""The checkers find each defect that is planted into a store, and nothing in one without any.

Many clients in one process, some of whose answers are lost, and a restart; without a defect of
each engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from wetware.base.tasks import Tasks
from wetware_sync.embedded.engine import boottime
from wetware_sync.engine import (
    Batch,
    Compacted,
    Engine,
    Get,
    Outcome,
    Page,
    Txn,
    Unwritten,
    Watch,
)
from wetware_sync.locks import Lock

from . import ports
from .parts import FACTORIES, running
from .ports import EnginePort
from .watching import Wrong
from .workload import Client, History, Record, check, ends

pytestmark = pytest.mark.anyio

CLIENTS = 64
ACTS = 900
SEED = int(os.environ.get("WW_SEED", "1"))  # a defect is to be found each time


class Planted:
    """An engine; what is not here is the real one's."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.engine, self.rng = engine, rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class StaleReads(Planted):
    """Reads are answered from a snapshot that is renewed now and then."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        super().__init__(engine, rng)
        self._pages: dict[Get, Page] = {}

    async def read(self, get: Get) -> Page:
        if self.rng.random() < 0.2 or get not in self._pages:
            self._pages[get] = await self.engine.read(get)
        return self._pages[get]


class LosesAWrite(Planted):
    """Some writes are acknowledged, and never made."""

    async def txn(self, txn: Txn, owner: str) -> Outcome:
        if self.rng.random() < 0.03:
            revision = (await self.engine.status()).revision
            return Outcome(True, revision + 1, (1,))
        return await self.engine.txn(txn, owner)


class IgnoresCompares(Planted):
    """Some transactions are made whatever they depend on."""

    async def txn(self, txn: Txn, owner: str) -> Outcome:
        if self.rng.random() < 0.3:
            txn = txn._replace(compares=())
        return await self.engine.txn(txn, owner)


class ComparesBefore(Planted):
    """It compares, and writes afterwards: two may find the same."""

    async def txn(self, txn: Txn, owner: str) -> Outcome:
        if txn.compares:
            if not (await self.engine.txn(Txn((), txn.compares), owner)).succeeded:
                return Outcome(False, (await self.engine.status()).revision)
            txn = txn._replace(compares=())
        return await self.engine.txn(txn, owner)


class Repeats(Planted):
    """A write whose answer is late is sent again."""

    async def txn(self, txn: Txn, owner: str) -> Outcome:
        outcome = await self.engine.txn(txn, owner)
        if self.rng.random() < 0.05:
            await asyncio.sleep(self.rng.uniform(0, 0.05))
            return await self.engine.txn(txn, owner)
        return outcome


class AnswersBefore(Planted):
    """A write is answered before it is made."""

    async def txn(self, txn: Txn, owner: str) -> Outcome:
        if txn.compares or self.rng.random() < 0.9:
            return await self.engine.txn(txn, owner)
        later = asyncio.ensure_future(self.engine.txn(txn, owner))
        later.add_done_callback(lambda done: done.cancelled() or done.exception())
        return Outcome(True, (await self.engine.status()).revision + 1, (1,))


class TearsTransactions(Planted):
    """What one transaction writes is written one after the other."""

    async def txn(self, txn: Txn, owner: str) -> Outcome:
        if len(txn.then) == 1 or txn.compares:
            return await self.engine.txn(txn, owner)
        outcome = Outcome(True, 0)
        for operation in txn.then:
            outcome = await self.engine.txn(Txn((operation,)), owner)
        return outcome


class PlantedWatch:
    def __init__(self, watch: Watch, defects: type[Watches], rng: random.Random) -> None:
        self._watch, self._defects, self._rng = watch, defects, rng

    async def next(self) -> Batch:
        while True:
            batch = await self._watch.next()
            events = batch.events
            if self._rng.random() < 0.05:
                events = self._defects.of(events)
            if events:
                return Batch(events, batch.revision)

    def close(self) -> None:
        self._watch.close()


class Watches(Planted):
    """Some of what a watch tells is wrong."""

    @staticmethod
    def of(events: Any) -> Any:
        raise NotImplementedError

    def watch(self, key: bytes, revision: int, owner: str, *, prefix: bool = False) -> Watch:
        watch = self.engine.watch(key, revision, owner, prefix=prefix)
        return PlantedWatch(watch, type(self), self.rng)


class Gap(Watches):
    @staticmethod
    def of(events: Any) -> Any:
        return events[1:]


class Duplicate(Watches):
    @staticmethod
    def of(events: Any) -> Any:
        return (*events, events[-1])


class WrongOrder(Watches):
    @staticmethod
    def of(events: Any) -> Any:
        return tuple(reversed(events))


class WrongRevision(Watches):
    """The event of a watch says a revision that comes later."""

    @staticmethod
    def of(events: Any) -> Any:
        return (*events[:-1], events[-1]._replace(revision=events[-1].revision + 3))


class TimeTravel(Planted):
    """A watch begins before what was asked for."""

    def watch(self, key: bytes, revision: int, owner: str, *, prefix: bool = False) -> Watch:
        return self.engine.watch(key, max(1, revision - 2), owner, prefix=prefix)


class SkipsWhatIsCompacted(Planted):
    """A watch goes on behind what is forgotten, and does not say so."""

    def watch(self, key: bytes, revision: int, owner: str, *, prefix: bool = False) -> Watch:
        return _Skipping(self.engine, key, revision, owner, prefix)


class _Skipping:
    def __init__(self, engine: Engine, key: bytes, revision: int, owner: str, prefix: bool) -> None:
        self._begin = lambda at: engine.watch(key, at, owner, prefix=prefix)
        self._watch = self._begin(revision)

    async def next(self) -> Batch:
        while True:
            try:
                return await self._watch.next()
            except Compacted as refused:
                self._watch.close()
                self._watch = self._begin(refused.revision)

    def close(self) -> None:
        self._watch.close()


STORES = [StaleReads, LosesAWrite, IgnoresCompares, ComparesBefore, Repeats, AnswersBefore]
STORES += [TearsTransactions, Gap, Duplicate, WrongOrder, WrongRevision, TimeTravel]
STORES += [SkipsWhatIsCompacted]


class Running:
    """An engine that is started again."""

    def __init__(self, factory: Any, planted: Any) -> None:
        self._factory, self._planted = factory, planted
        self._engine: Engine | None = None

    def __call__(self) -> Engine:
        if self._engine is None:
            raise Unwritten("it is being started")
        return self._engine

    @contextlib.asynccontextmanager
    async def once(self) -> AsyncIterator[Engine]:
        async with running(self._factory()) as engine:
            self._engine = self._planted(engine)
            try:
                yield engine
            finally:
                self._engine = None


async def history_of(
    factory: Any, planted: Any, *, seed: int, locks: bool = False, ends_s: float = 60
) -> tuple[History, int]:
    """Of 64 clients: a restart in the middle, and history that is compacted under the watchers.

    Watchers are told of the end within `ends_s`, if they are told. Returns its first revision, too.
    """
    records: list[Record] = []
    returned = 0

    def note(record: Record) -> None:
        nonlocal returned
        returned += "returned" in record
        records.append(record)

    store, stop, tasks = Running(factory, planted), asyncio.Event(), Tasks()
    port = EnginePort(store, tasks, random.Random(seed))
    clients = [
        Client(
            port,
            note,
            random.Random(seed + number),
            f"c{number}",
            stop=stop,
            pause_s=0.02,
            locks=locks,
        )
        for number in range(CLIENTS)
    ]

    async def until(many: int) -> None:
        while returned < many:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async with asyncio.timeout(100), asyncio.TaskGroup() as group:
        async with store.once() as engine:
            since = (await engine.status()).revision + 1
            running_clients = [group.create_task(client.run()) for client in clients]
            await until(ACTS // 3)
            revision = (await engine.status()).revision - 5
            records.append({"compacted": revision})
            await engine.compact(revision)
            await until(ACTS // 2)
        async with store.once():
            await until(ACTS)
            stop.set()
            for client in clients:
                await client.stopped.wait()
            await port.txn(ends(), None, None)
            with anyio.move_on_after(ends_s):
                while not all(client.ended for client in clients):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            for task in running_clients:
                task.cancel()
    await tasks.end()
    return History.of(records), since


@contextlib.contextmanager
def made(name: str, tmp_path: Path) -> Iterator[Any]:
    """Of an engine, on no disk: whose fsyncs are slow is not asked here."""
    make, _ = FACTORIES[name]
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as path:
        yield lambda: make(Path(path), boottime)


@pytest.fixture
def factory(tmp_path: Path) -> Iterator[Any]:
    with made("embedded", tmp_path) as factory:
        yield factory


def plant(kind: type[Planted], seed: int) -> Any:
    return lambda engine: kind(engine, random.Random(seed))


@pytest.mark.parametrize("locks", [False, True])
@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=pytest.mark.long if name == "etcd" else ()) for name in FACTORIES],
)
async def test_a_store_without_a_defect_is_right(engine: str, locks: bool, tmp_path: Path) -> None:
    with made(engine, tmp_path) as factory:
        history, since = await history_of(factory, plant(Planted, 0), seed=SEED, locks=locks)
    sys.stdout.write(f"seed {SEED}: {history.summary()}\n")
    try:
        check(history, since=0 if locks else since)
    except Wrong as wrong:
        raise AssertionError(f"WW_SEED={SEED}: {wrong}") from wrong
    assert history.lost_part >= 0.05, history.summary()
    assert history.contended_part >= 0.2, history.summary()


@pytest.mark.parametrize("kind", STORES)
async def test_each_defect_of_a_store_is_found(factory: Any, kind: type[Planted]) -> None:
    history, since = await history_of(factory, plant(kind, SEED), seed=SEED, ends_s=1)
    with pytest.raises(Wrong) as found:
        check(history, since=since)
    sys.stdout.write(f"seed {SEED}: {str(found.value)[:150]}\n")


async def test_a_lock_that_is_given_to_two_is_found(
    factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ahead(self: Lock, places: int, revision: int = 0) -> Get:
        return Get(self.scope + b"nobody", prefix=True, limit=places)

    monkeypatch.setattr(Lock, "ahead", ahead)
    history, _ = await history_of(factory, plant(Planted, 0), seed=SEED, locks=True)
    with pytest.raises(Wrong, match="after"):
        check(history)


async def test_a_fence_that_keeps_nobody_out_is_found(
    factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has lost a lock and does not know goes on writing."""

    async def guarded_by(engine: Engine, fence: bytes, txn: Txn, owner: str) -> Outcome:
        return await engine.txn(txn, owner)

    monkeypatch.setattr(ports, "guarded_by", guarded_by)
    history, _ = await history_of(factory, plant(Planted, 0), seed=SEED, locks=True)
    with pytest.raises(Wrong, match="after"):
        check(history)
