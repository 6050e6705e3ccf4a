"""A copy of a store that runs, and what is made of it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from wetware.base.files import Files
from wetware.base.threads import Threads
from wetware.errors import Busy, InvalidArgument, WetwareError
from wetware_sync.embedded.backup import restore
from wetware_sync.embedded.engine import EmbeddedEngine
from wetware_sync.embedded.store import FILE
from wetware_sync.engine import Get, LeaseEnded

from .parts import ADA, BOB, Clock, get, put, running, told

pytestmark = pytest.mark.anyio


def engine_in(path: Path, clock: Clock) -> EmbeddedEngine:
    return EmbeddedEngine(Files(path), run_sync=Threads().run, now=clock)


async def test_of_a_store_that_runs(tmp_path: Path) -> None:
    clock, copy = Clock(), tmp_path / "copy"
    engine = engine_in(tmp_path / "a", clock)
    async with running(engine):
        lease = await engine.grant(10.0, ADA)
        await put(engine, b"held", b"x", lease=lease)
        stop = False

        async def writes(number: int) -> int:
            last = 0
            while not stop:
                last = await put(engine, b"%d" % number, b"%d" % last)
            return last

        writers = [asyncio.ensure_future(writes(number)) for number in range(8)]
        await asyncio.sleep(0.05)
        before = (await engine.status()).revision
        assert await engine.backup(copy) == copy.stat().st_size
        after = (await engine.status()).revision
        stop = True
        await asyncio.gather(*writers)
        events = await told(engine.watch(b"", 1, BOB, prefix=True), after)
        authority, epoch = engine.authority, engine.epoch
    assert copy.stat().st_mode & 0o777 == 0o600

    assert restore(Files(tmp_path / "b"), copy) == epoch + 1
    clock.now += 9.0
    restored = engine_in(tmp_path / "b", clock)
    async with running(restored):
        status = await restored.status()
        assert before <= status.revision <= after
        assert (restored.epoch, status.epoch) == (epoch + 1, epoch + 1)
        assert restored.authority.seed == authority.seed
        kept = [e for e in events if e.revision <= status.revision]
        assert await told(restored.watch(b"", 1, BOB, prefix=True), status.revision) == kept
        present = {e.key: e.now for e in kept}
        page = await restored.read(Get(b"", prefix=True))
        assert {kv.key: kv for kv in page.items} == present
        clock.now += 9.0  # its full time again
        assert await restored.keep(lease, ADA) == 10.0
        assert await put(restored, b"new") == status.revision + 1


async def test_in_the_place_of_a_store_that_was_killed(tmp_path: Path) -> None:
    """What its log has does not come into the new one, and its epoch counts."""
    clock, copy = Clock(), tmp_path / "copy"
    engine = engine_in(tmp_path / "a", clock)
    async with running(engine):
        await put(engine, b"a", b"of the copy")
        await engine.backup(copy)
        lease = await engine.grant(10.0, ADA)
        with pytest.raises(Busy):
            restore(Files(tmp_path / "a"), copy)
        await put(engine, b"a", b"later", lease=lease)
        shutil.copytree(tmp_path / "a", tmp_path / "killed")
        assert (tmp_path / "killed" / f"{FILE}-wal").stat().st_size
    assert restore(Files(tmp_path / "killed"), copy) == 2
    assert restore(Files(tmp_path / "killed"), copy) == 3
    engine = engine_in(tmp_path / "killed", clock)
    async with running(engine):
        kept = await get(engine, b"a")
        assert kept is not None
        assert kept.value == b"of the copy"
        with pytest.raises(LeaseEnded):
            await engine.keep(lease, ADA)


async def test_what_is_no_backup_is_refused_and_all_stays(tmp_path: Path) -> None:
    clock, bad = Clock(), tmp_path / "bad"
    engine = engine_in(tmp_path / "a", clock)
    async with running(engine):
        await put(engine, b"a", bytes(100_000))
        await engine.backup(bad)
        with pytest.raises(WetwareError, match="cannot be written"):
            await engine.backup(bad)
        with pytest.raises(WetwareError, match="cannot be written"):
            await engine.backup(tmp_path / "no" / "copy")
    whole = bad.read_bytes()
    for data in (b"", b"x" * 8192, whole[:50_000], whole[:8192] + bytes(8192) + whole[16384:]):
        bad.write_bytes(data)
        with pytest.raises(InvalidArgument, match="no backup"):
            restore(Files(tmp_path / "a"), bad)
    with pytest.raises(WetwareError, match="cannot be restored"):
        restore(Files(tmp_path / "a"), tmp_path / "none")
    async with running(engine_in(tmp_path / "a", clock)) as engine:  # type: ignore[assignment]
        assert engine.epoch == 1
        assert await get(engine, b"a") is not None
