"""Watchers of a busy store, each of which is told exactly what is for it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from wetware.base.files import Files
from wetware.base.threads import Threads
from wetware_sync import hub
from wetware_sync.embedded import store
from wetware_sync.embedded.engine import EmbeddedEngine
from wetware_sync.engine import (
    Compacted,
    Delete,
    Engine,
    Event,
    Limits,
    Operation,
    Put,
    Txn,
)

from .parts import ADA, running, told

pytestmark = pytest.mark.anyio

KEYS = [b"%s/%d" % (stem, n) for stem in (b"a", b"a/b", b"c") for n in range(4)]
LAST = b"last"
WATCHERS, WRITERS, TXNS = 24, 6, 25


async def writes(engine: Engine, rng: random.Random) -> None:
    for _ in range(TXNS):
        keys = rng.sample(KEYS, rng.randrange(1, 4))
        operations: list[Operation] = [
            Delete(key) if rng.random() < 0.3 else Put(key, rng.randbytes(rng.choice((1, 300))))
            for key in keys
        ]
        await engine.txn(Txn(tuple(operations)), ADA)


async def watches(engine: Engine, rng: random.Random) -> tuple[bytes, bool, int, list[Event]]:
    """Watch until the last write; be slow, give up waiting, begin again where it was."""
    prefix = rng.random() < 0.6
    key = rng.choice([b"", b"a/", b"a/b/", b"c/1"] if prefix else KEYS)
    first = revision = rng.randrange(1, 60)
    events: list[Event] = []
    watch = engine.watch(key, revision, ADA, prefix=prefix)
    while not events or events[-1].now is None or events[-1].now.value != LAST:
        waits = asyncio.ensure_future(watch.next())
        await asyncio.wait([waits], timeout=rng.choice([0, 0.001, 0.02, 1]))
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        if not waits.cancelled():
            batch = waits.result()
            assert batch.events
            events += batch.events
            revision = batch.revision + 1
        if rng.random() < 0.1:
            watch.close()
            watch = engine.watch(key, revision, ADA, prefix=prefix)
        await asyncio.sleep(rng.choice([0, 0.001, 0.02]))
    watch.close()
    return key, prefix, first, events


@pytest.mark.parametrize("seed", range(3))
async def test_no_gap_no_duplicate_no_reordering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(hub, "TAIL_EVENTS_MAX", 25)
    monkeypatch.setattr(hub, "TAIL_BYTES_MAX", 4000)
    monkeypatch.setattr(hub, "PAGE_BYTES_MAX", 700)
    monkeypatch.setattr(store, "PAGE_BYTES_MAX", 700)
    monkeypatch.setattr(store, "SCANNED_ROWS", 10)
    rng = random.Random(seed)
    engine = EmbeddedEngine(Files(tmp_path / "s"), run_sync=Threads().run)
    async with running(engine):
        watchers = [
            asyncio.ensure_future(watches(engine, random.Random(rng.random())))
            for _ in range(WATCHERS)
        ]
        await asyncio.gather(*(writes(engine, random.Random(rng.random())) for _ in range(WRITERS)))
        outcome = await engine.txn(Txn(tuple(Put(key, LAST) for key in KEYS)), ADA)
        found = await asyncio.gather(*watchers)
        all_of_it = await told(engine.watch(b"", 1, ADA, prefix=True), outcome.revision)
    assert [e.revision for e in all_of_it] == sorted(e.revision for e in all_of_it)
    assert {e.revision for e in all_of_it} == set(range(1, outcome.revision + 1))
    for key, prefix, first, events in found:
        assert events == [
            e
            for e in all_of_it
            if e.revision >= first and (e.key.startswith(key) if prefix else e.key == key)
        ]


async def test_who_lags_behind_compaction_is_told_where_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody asked for it: the history is bounded."""
    monkeypatch.setattr(store, "HISTORY_ROWS_MAX", 50)
    monkeypatch.setattr(store, "SWEPT_ROWS", 130)
    engine = EmbeddedEngine(
        Files(tmp_path / "s"), run_sync=Threads().run, limits=Limits(owner_watches=2)
    )
    async with running(engine):
        lags = engine.watch(b"", 1, ADA, prefix=True)
        follows = engine.watch(b"", 1, ADA, prefix=True)
        for n in range(1, 151):
            await engine.txn(Txn((Put(b"a", b"%d" % n),)), ADA)
            assert [e.revision for e in (await follows.next()).events] == [n]
        with pytest.raises(Compacted) as refused:
            await lags.next()
        lags.close()
        revision = refused.value.revision
        assert 1 < revision <= 150
        watch = engine.watch(b"", revision, ADA, prefix=True)
        assert [e.revision for e in await told(watch, 150)] == list(range(revision, 151))
