"""Whatever a disk does, nothing acknowledged is lost, and nothing wrong is served.

`WW_SEEDS=10000 pytest -m '' -n4 plugins/blob/tests/store/test_crashes.py` for more; `WW_SEED=N`
for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import threading

import pytest
from tests.failing_disk import SITES, Disk, forget

from wetware.errors import NotFound
from wetware_blob.format.cid import Block
from wetware_blob.store.errors import StoreFailed
from wetware_blob.store.pins import Pin
from wetware_blob.store.salvage import aside
from wetware_blob.store.store import Store

from .histories import History, Lost, damage, inline
from .parts import ADA, node, raw, running

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1200)]

LARGE = random.Random(5).randbytes(50_000)
PARTS = 4
SEEDS = int(os.environ.get("WW_SEEDS", "1000"))


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 3))])
async def test_nothing_acknowledged_is_lost(part: int) -> None:
    one = os.environ.get("WW_SEED")
    for seed in [int(one)] if one else range(part, SEEDS, PARTS):
        assert not await loses(seed), f"WW_SEED={seed}"


@pytest.mark.parametrize("site", [*SITES, "file", "names", "directory"])
async def test_no_fsync_can_be_left_out(site: str) -> None:
    """Without it the same histories lose something."""
    for seed in range(SEEDS):
        if await loses(seed, site):
            return
    pytest.fail(f"nothing was lost in {SEEDS} histories without the fsync of {site}")


async def loses(seed: int, dropped: str = "") -> str:
    """What a history loses; "" if nothing."""
    lost = ""
    try:
        await History(seed, dropped).run()
    except* Lost as group:
        lost = str(group.exceptions)
    return lost


async def test_what_was_refused_does_not_come_back_once_it_was_given_up() -> None:
    """The commit of a pin fails, and its remains in the log are whole; unpin finds nothing."""
    disk = Disk(random.Random(1))
    tree = [leaf := raw(b"leaf"), node([leaf.cid])]
    async with running(disk, run_sync=inline) as store:  # type: ignore[arg-type]
        async with store.hold(ADA) as hold:
            await store.put(hold, tree)
            disk.faults = {"log": 1.0}
            with pytest.raises(StoreFailed):
                await store.pin(hold, Pin(ADA, tree[-1].cid))
            disk.faults = {}
        assert await store.unpin(ADA, tree[-1].cid, None) == 0
        disk.dead = True
    disk.crash(power=False)
    async with running(disk, run_sync=inline) as store:  # type: ignore[arg-type]
        assert await store.pins() == []
    forget(disk)


class OneNameSyncFails(Disk):
    """The first sync of the names of files: it begins once `files` of them are on the disk."""

    def __init__(self, seed: int, files: int) -> None:
        super().__init__(random.Random(seed))
        self._files, self._first, self._synced = files, True, threading.Event()

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self._files -= 1
        if not self._files:
            self._synced.set()

    def sync_directory(self, name: str) -> None:
        if not (name.isdecimal() and self._first):
            return super().sync_directory(name)
        self._first = False
        assert self._synced.wait(60)
        self.faults = {"sync": 1.0}
        try:
            super().sync_directory(name)
        finally:
            self.faults = {}


@pytest.mark.parametrize("seed", range(3))
async def test_a_sync_that_failed_is_made_good_by_no_later_one(seed: int) -> None:
    """It was of both names, so the second writer's sync has nothing left to do, and succeeds."""
    disk = OneNameSyncFails(seed, 2)
    blocks = [raw(bytes([n]) * 50_000) for n in range(3)]

    async def put(store: Store, block: Block) -> None:
        async with store.hold(ADA) as hold:
            await store.put(hold, [block])

    async with running(disk) as store:
        both = (put(store, block) for block in blocks[:2])
        results = await asyncio.gather(*both, return_exceptions=True)
        assert [type(result) for result in results] == [StoreFailed] * 2
        await put(store, blocks[2])
        disk.dead = True
    disk.crash(power=True)
    async with running(disk) as store:
        assert await store.get(blocks[2].cid.digest) == blocks[2].data
        for block in blocks[:2]:
            with pytest.raises(NotFound):
                await store.get(block.cid.digest)
    forget(disk)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_salvage_that_is_cut_short_is_made_again(seed: int) -> None:
    """The power goes at each call of a salvage; the next start has all of it."""
    tree = [small := raw(b"small"), large := raw(LARGE), node([small.cid, large.cid])]
    for calls in itertools.count(1):
        disk = Disk(random.Random(calls + 1000 * seed))
        async with (
            running(disk, run_sync=inline) as store,  # type: ignore[arg-type]
            store.hold(ADA) as hold,
        ):
            await store.put(hold, tree)
            await store.pin(hold, Pin(ADA, tree[-1].cid, "photos"))
        disk.sync_directory("")  # its log is gone for good: that would mend it
        damage(disk)
        disk.calls_left = calls
        whole = False
        with contextlib.suppress(BaseExceptionGroup):
            async with running(disk, run_sync=inline):  # type: ignore[arg-type]
                whole = True
        disk.crash(power=True)
        for _ in range(2):
            async with running(disk, run_sync=inline) as store:  # type: ignore[arg-type]
                assert [pin.name for pin in await store.pins()] == ["photos"]
                for block in tree:
                    assert await store.get(block.cid.digest) == block.data
        assert len(aside(disk.names(""))) == 1
        forget(disk)
        if whole:
            break
    assert calls > 50


@pytest.mark.parametrize("seed", range(6))
async def test_what_a_put_left_that_a_salvage_finds_is_on_the_disk(seed: int) -> None:
    """The process ends at each call of the put; whoever puts it again is told that it is there."""
    tree = [small := raw(b"small"), node([small.cid])]
    large, salvaged = raw(LARGE), 0
    for calls in itertools.count(1):
        disk = Disk(random.Random(calls + 1000 * seed))
        async with (
            running(disk, run_sync=inline) as store,  # type: ignore[arg-type]
            store.hold(ADA) as hold,
        ):
            await store.put(hold, tree)
            await store.pin(hold, Pin(ADA, tree[-1].cid))
        whole = False
        with contextlib.suppress(BaseExceptionGroup):
            async with running(disk, run_sync=inline) as store, store.hold(ADA) as hold:  # type: ignore[arg-type]
                disk.calls_left = calls
                await store.put(hold, [large])
                disk.dead = whole = True
        disk.crash(power=False)
        damage(disk)
        async with running(disk, run_sync=inline) as store, store.hold(ADA) as hold:  # type: ignore[arg-type]
            salvaged += len(aside(disk.names("")))
            await store.put(hold, [large])
            disk.dead = True
        disk.crash(power=True)
        async with running(disk, run_sync=inline) as store:  # type: ignore[arg-type]
            for block in (*tree, large):
                assert await store.get(block.cid.digest) == block.data
        forget(disk)
        if whole:
            break
    assert salvaged == calls > 10
