"""The store on a disk that works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from wetware.base.disk import RESERVED_FILE
from wetware.base.files import Files
from wetware.base.threads import Threads
from wetware.errors import ConfigError, LimitExceeded, NotFound
from wetware_blob.format.cid import RAW, Block, Cid
from wetware_blob.store import quota
from wetware_blob.store.index import FILE, INDEX_BYTES, SMALL_BYTES_MAX, charge
from wetware_blob.store.pins import Pin
from wetware_blob.store.store import Store

from .parts import ADA, BOB, MIB, Clock, node, raw, running

pytestmark = pytest.mark.anyio


def tree(leaves: int, size: int) -> list[Block]:
    """Leaves, and the node above them last."""
    blocks = [raw(os.urandom(size)) for _ in range(leaves)]
    return [*blocks, node([block.cid for block in blocks])]


async def put_pinned(store: Store, blocks: list[Block], owner: str = ADA, name: str = "") -> Pin:
    pin = Pin(owner, blocks[-1].cid, name)
    async with store.hold(owner) as hold:
        await store.put(hold, blocks)
        await store.pin(hold, pin)
    return pin


async def all_there(store: Store, blocks: list[Block]) -> bool:
    return await store.have([block.cid.digest for block in blocks]) == {
        block.cid.digest for block in blocks
    }


@pytest.mark.parametrize("size", [0, 1, 4096, SMALL_BYTES_MAX, SMALL_BYTES_MAX + 1, MIB])
async def test_what_was_put_is_there_after_a_restart(tmp_path: Path, size: int) -> None:
    blocks = tree(3 if size else 1, size)
    async with running(tmp_path / "s") as store:
        pin = await put_pinned(store, blocks, name="photos")
        assert await store.have([b"?" * 32]) == set()
        with pytest.raises(NotFound):
            await store.get(b"?" * 32)
    async with running(tmp_path / "s") as store:
        for block in blocks:
            assert await store.get(block.cid.digest) == block.data
        (found,) = await store.pins(ADA)
        assert (found.owner, found.root, found.name) == (ADA, pin.root, "photos")
        assert found.charged == sum(charge(len(block.data)) for block in blocks)
        assert (await store.usage(ADA)).charged == found.charged
        assert (await store.usage()).charged == found.charged
        assert await store.pins(BOB) == []


async def test_more_than_one_part_and_more_files_than_a_directory_has(tmp_path: Path) -> None:
    blocks = tree(1100, SMALL_BYTES_MAX + 1)
    async with running(tmp_path / "s") as store:
        await put_pinned(store, blocks)
        for block in blocks:
            assert await store.get(block.cid.digest) == block.data
    directories = [path for path in (tmp_path / "s").iterdir() if path.is_dir()]
    assert len(directories) > 1
    assert all(len(list(path.iterdir())) <= 1024 for path in directories)


async def test_garbage_is_collected_and_what_is_kept_is_not(tmp_path: Path) -> None:
    kept, dropped, held = tree(3, MIB), tree(3, MIB), tree(2, 5000)
    async with running(tmp_path / "s") as store:
        await put_pinned(store, kept)
        pin = await put_pinned(store, dropped)
        assert await store.unpin(ADA, pin.root, None) == 1
        async with store.hold(BOB) as hold:
            await store.put(hold, held)
            before = await store.collect(dry_run=True)
            assert await all_there(store, dropped)
            assert await store.collect(dry_run=False) == before
            assert before.blocks == len(dropped)
            assert await store.have([block.cid.digest for block in dropped]) == set()
            assert await all_there(store, kept)
            assert await all_there(store, held)
        assert (await store.collect(dry_run=False)).blocks == len(held)
        assert await all_there(store, kept)
        files = [path for path in (tmp_path / "s").rglob("*-*") if path.parent.name.isdecimal()]
        assert len(files) == 3
        assert (await store.usage()).charged == sum(charge(len(b.data)) for b in kept)


async def test_what_was_found_to_be_there_under_a_hold_is_kept(tmp_path: Path) -> None:
    """It was garbage when it was put again."""
    blocks = tree(3, 1000)
    async with running(tmp_path / "s") as store:
        async with store.hold(ADA) as hold:
            await store.put(hold, blocks)
        async with store.hold(ADA) as hold:
            await store.put(hold, blocks)
            assert not (await store.collect()).blocks
        assert (await store.collect()).blocks == 4


async def test_what_is_read_under_a_hold_stays_though_it_is_unpinned(tmp_path: Path) -> None:
    blocks = tree(20, 40_000)
    async with running(tmp_path / "s") as store:
        pin = await put_pinned(store, blocks)
        async with store.hold(BOB, pin.root):
            await store.unpin(ADA, pin.root, None)
            for block in blocks:
                await store.collect(dry_run=False)
                assert await store.get(block.cid.digest) == block.data
        assert (await store.collect(dry_run=False)).blocks == len(blocks)


async def test_a_hold_that_begins_while_garbage_is_collected_is_kept(tmp_path: Path) -> None:
    """What its root reaches when it has begun is there until it ends."""
    async with running(tmp_path / "s") as store:
        trees = [tree(30, 100) for _ in range(20)]
        for blocks in trees:
            async with store.hold(ADA) as hold:
                await store.put(hold, blocks)
        async with contextlib.AsyncExitStack() as holds:
            held: list[Block] = []
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: store.collect(dry_run=False))
                for blocks in reversed(trees):
                    await holds.enter_async_context(store.hold(BOB, blocks[-1].cid))
                    there = await store.have([block.cid.digest for block in blocks])
                    if blocks[-1].cid.digest in there:
                        held += [block for block in blocks if block.cid.digest in there]
            assert len(held) > 31, "it was over before anything was held"
            assert await all_there(store, held)
            assert (await store.usage()).blocks == len(held)


async def test_a_thousand_puts_and_pins_while_garbage_is_collected(tmp_path: Path) -> None:
    """Half of the blocks are there already, unpinned, when they are put."""
    async with running(tmp_path / "s") as store:
        shared = [raw(bytes([n]) * 100) for n in range(50)]
        runs = 0
        done = anyio.Event()

        async def collect() -> None:
            nonlocal runs
            while not done.is_set():
                await store.collect(dry_run=False)
                runs += 1

        async def put(worker: int) -> None:
            for n in range(125):
                some = [shared[(worker * 7 + n + i) % 50] for i in range(3)]
                own = raw(f"{worker} {n}".encode())
                blocks = [*some, own, node([b.cid for b in (*some, own)])]
                pin = await put_pinned(store, blocks, name=f"{worker}")
                assert await all_there(store, blocks)
                if n % 2:
                    await store.unpin(ADA, pin.root, None)
                else:
                    pinned.append(blocks)

        pinned: list[list[Block]] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(collect)
            async with anyio.create_task_group() as writers:
                for worker in range(8):
                    writers.start_soon(put, worker)
            done.set()
        assert runs > 3
        for blocks in pinned:
            for block in blocks:
                assert await store.get(block.cid.digest) == block.data
        await store.collect(dry_run=False)
        distinct = {block.cid.digest for blocks in pinned for block in blocks}
        assert (await store.usage()).blocks == len(distinct)


async def test_two_writers_of_one_blob(tmp_path: Path) -> None:
    blocks = tree(12, 100_000)
    async with running(tmp_path / "s") as store:
        async with anyio.create_task_group() as tasks:
            for owner in (ADA, BOB):
                tasks.start_soon(put_pinned, store, blocks, owner)
        assert (await store.usage()).charged == sum(charge(len(b.data)) for b in blocks)
        assert len([path for path in (tmp_path / "s").glob("[0-9]*/*-*")]) == 12
        await store.unpin(ADA, blocks[-1].cid, None)
        await store.collect(dry_run=False)
        assert await all_there(store, blocks)
        assert (await store.usage(BOB)).charged == (await store.usage()).charged


async def test_an_owner_takes_no_more_than_they_may(tmp_path: Path) -> None:
    most = 10 * MIB
    async with running(tmp_path / "s", owner_bytes_max=most) as store:
        blocks = tree(11, MIB)
        async with store.hold(ADA) as hold:
            for block in blocks[:9]:
                await store.put(hold, [block])
            with pytest.raises(LimitExceeded) as refused:
                await store.put(hold, blocks[9:])
            assert (await store.usage(ADA)).charged <= most
            assert refused.value.code == "limit.blob_quota"
            assert len(await store.have([block.cid.digest for block in blocks])) == 9
        assert (await store.usage(ADA)).charged == 0
        await put_pinned(store, tree(5, MIB), BOB)  # nobody else's
        # What is there already counts as well, and once in each pin.
        pin = await put_pinned(store, same := tree(6, MIB))
        with pytest.raises(LimitExceeded):
            await put_pinned(store, same, name="again")
        assert (await store.usage(ADA)).charged == (await store.pins(ADA))[0].charged
        await store.unpin(ADA, pin.root, "")
        await put_pinned(store, same, name="again")


async def test_who_is_cancelled_is_charged_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a task is cancelled, of which a shielded scope knows nothing."""
    loop, go = asyncio.get_running_loop(), threading.Event()
    blocks = tree(2, 40_000)
    async with running(tmp_path / "s") as store:
        execute = store._index._execute
        reached = asyncio.Event()

        def commit(writes: Any) -> Exception | None:
            loop.call_soon_threadsafe(reached.set)
            assert go.wait(60)
            return execute(writes)

        async def cut(work: Coroutine[Any, Any, None]) -> None:
            reached.clear()
            go.clear()
            task = asyncio.ensure_future(work)
            await reached.wait()
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0)
            go.set()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        monkeypatch.setattr(store._index, "_execute", commit)
        async with store.hold(ADA) as hold:
            await cut(store.put(hold, blocks))
            await cut(store.pin(hold, Pin(ADA, blocks[-1].cid)))
        go.set()
        (pin,) = await store.pins(ADA)
        assert (await store.usage()).charged == store._quota.stored == pin.charged
        assert (await store.usage(ADA)).charged == pin.charged
        assert store._quota._promised == 0


async def test_cache_is_collected_where_the_node_has_no_room(tmp_path: Path) -> None:
    async with running(tmp_path / "s", node_bytes_max=8 * MIB + INDEX_BYTES) as store:
        await put_pinned(store, pinned := tree(2, MIB))
        for _ in range(4):
            cached = tree(4, MIB)
            async with store.hold("", cached[-1].cid) as hold:
                await store.put(hold, cached)
            assert (await store.usage()).charged <= 8 * MIB
        async with store.hold(ADA) as hold:
            with pytest.raises(LimitExceeded) as refused:
                await store.put(hold, tree(8, MIB))
        assert refused.value.code == "limit.blob_node"
        assert await all_there(store, pinned)


async def test_an_interrupted_download_does_not_keep_others_from_writing(tmp_path: Path) -> None:
    """Else who may only read fills a node for days, by giving up what they read."""
    async with running(tmp_path / "s", node_bytes_max=8 * MIB + INDEX_BYTES) as store:
        blocks = tree(6, MIB)
        with contextlib.suppress(NotFound):
            async with store.hold(BOB, blocks[-1].cid) as hold:
                await store.put(hold, blocks)
                raise NotFound("the rest")
        assert not (await store.collect()).blocks
        await put_pinned(store, pinned := tree(5, MIB))
        assert await all_there(store, pinned)


async def test_puts_at_once_wait_for_what_one_of_them_collects(tmp_path: Path) -> None:
    async with running(tmp_path / "s", node_bytes_max=8 * MIB + INDEX_BYTES) as store:
        async with store.hold(ADA) as hold:
            await store.put(hold, tree(6, MIB))
        async with store.hold(ADA) as hold:
            await asyncio.gather(*(store.put(hold, [block]) for block in tree(6, MIB)))
            assert (await store.usage()).charged <= store._quota.node_bytes_max


async def test_a_pin_promises_all_that_it_reaches(tmp_path: Path) -> None:
    blocks = tree(3, 1000)
    async with running(tmp_path / "s") as store, store.hold(ADA) as hold:
        await store.put(hold, blocks[1:])
        with pytest.raises(NotFound):
            await store.pin(hold, Pin(ADA, blocks[-1].cid))
        assert await store.pins() == []
        await store.put(hold, blocks)
        await store.pin(hold, Pin(ADA, blocks[-1].cid))
        assert (await store.usage(ADA)).charged == sum(charge(len(b.data)) for b in blocks)


async def test_a_download_that_was_interrupted_keeps_what_it_has_for_a_while(
    tmp_path: Path,
) -> None:
    clock = Clock()
    blocks = tree(3, 1000)
    here = [blocks[-1], blocks[0]]
    async with running(tmp_path / "s", clock=clock) as store:
        with contextlib.suppress(ZeroDivisionError):
            async with store.hold(ADA, blocks[-1].cid) as hold:
                await store.put(hold, here)
                raise ZeroDivisionError
        assert (await store.usage(ADA)).charged == 0, "a download is charged once it is pinned"
    async with running(tmp_path / "s", clock=clock) as store:
        assert not (await store.collect(dry_run=False)).blocks
        clock.now += 4 * 24 * 3600
        assert (await store.collect(dry_run=False)).blocks == 2


async def test_only_the_last_downloads_that_were_interrupted_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wetware_blob.store.store.DOWNLOADS_MAX", 3)
    clock = Clock()
    blocks = [raw(bytes([n])) for n in range(5)]
    async with running(tmp_path / "s", clock=clock) as store:
        for block in blocks:
            clock.now += 1
            with contextlib.suppress(NotFound):
                async with store.hold(BOB, block.cid) as hold:
                    await store.put(hold, [block])
                    raise NotFound("the rest")
        assert (await store.collect()).blocks == 2
        assert await all_there(store, blocks[2:])


async def test_a_finished_download_is_cache(tmp_path: Path) -> None:
    blocks = tree(3, 1000)
    async with running(tmp_path / "s") as store:
        async with store.hold(ADA, blocks[-1].cid) as hold:
            await store.put(hold, blocks)
            assert not (await store.collect(dry_run=False)).blocks
        assert (await store.collect(dry_run=False)).blocks == 4


async def test_files_without_a_row_are_removed_at_the_start(tmp_path: Path) -> None:
    blocks = tree(1, 100_000)
    async with running(tmp_path / "s") as store:
        await put_pinned(store, blocks)
    (directory,) = [path for path in (tmp_path / "s").iterdir() if path.is_dir()]
    (directory / f"7-{'ab' * 32}").write_bytes(b"half")
    (tmp_path / "s" / "99").mkdir()
    (tmp_path / "s" / "99" / f"1-{'ab' * 32}").write_bytes(b"half")
    async with running(tmp_path / "s") as store:
        assert await all_there(store, blocks)
    assert len(list(directory.iterdir())) == 1
    assert not (tmp_path / "s" / "99").exists()


@pytest.mark.parametrize("how", ["gone", "empty"])
async def test_without_its_index_no_file_of_it_is_removed(tmp_path: Path, how: str) -> None:
    async with running(tmp_path / "s") as store:
        await put_pinned(store, tree(1, 100_000))
    files = list((tmp_path / "s").glob("*/*"))
    (tmp_path / "s" / FILE).unlink()
    if how == "empty":
        (tmp_path / "s" / FILE).touch()
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=FILE)):
        async with running(tmp_path / "s"):
            pass
    assert files
    assert list((tmp_path / "s").glob("*/*")) == files


@pytest.mark.parametrize(("size", "many"), [(10, 3000), (3000, 800), (20_000, 300), (33_000, 60)])
async def test_no_more_is_on_the_disk_than_was_charged(
    tmp_path: Path, size: int, many: int
) -> None:
    async with running(tmp_path / "s") as store:
        await put_pinned(store, tree(many, size))
        charged = (await store.usage()).charged
    paths = [path for path in (tmp_path / "s").rglob("*") if path.name != RESERVED_FILE]
    taken = sum(path.stat().st_blocks * 512 for path in paths if path.is_file())
    assert taken <= charged + 65_536, "beside the tables themselves, which INDEX_BYTES has"


async def test_the_loop_never_waits_for_the_disk(tmp_path: Path) -> None:
    """Not for a slow one: what is called on the loop's thread is none of its files."""
    loop = threading.get_ident()

    class Slow(Files):
        def __getattribute__(self, name: str) -> object:
            assert name.startswith("_") or threading.get_ident() != loop, name
            return super().__getattribute__(name)

    async with running(Slow(tmp_path / "s")) as store:
        pin = await put_pinned(store, blocks := tree(3, 40_000))
        assert await store.get(blocks[0].cid.digest)
        assert [damage async for damage in store.scrub(None)] == []
        await store.unpin(ADA, pin.root, None)
        await store.collect()
        await store.usage()


async def test_many_pins_are_marked_in_few_calls(tmp_path: Path) -> None:
    calls, threads = 0, Threads()

    async def run_sync(*call: Any) -> Any:
        nonlocal calls
        calls += 1
        return await threads.run(*call)

    blocks = [raw(b"%d" % n) for n in range(1000)]
    async with running(tmp_path / "s", run_sync=run_sync) as store:
        async with store.hold(ADA) as hold:
            await store.put(hold, blocks)
            async with anyio.create_task_group() as tasks:
                for block in blocks:
                    tasks.start_soon(store.pin, hold, Pin(ADA, block.cid))
        calls = 0
        assert not (await store.collect()).blocks
        assert calls < 100
        assert await all_there(store, blocks)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
async def test_scrubbing_reads_all_once_wherever_it_begins(tmp_path: Path, share: float) -> None:
    paused: list[float] = []

    async def sleep(seconds: float) -> None:
        paused.append(seconds)

    async with running(tmp_path / "s", sleep=sleep) as store:
        await put_pinned(store, blocks := tree(9, MIB))
        (tmp_path / "s").joinpath("0").rename(tmp_path / "gone")
        found = [damage async for damage in store.scrub(1.0, share)]
        large = {block.cid.digest for block in blocks if len(block.data) == MIB}
        assert large <= set(found)
    assert sum(paused) == sum(len(block.data) for block in blocks)


async def test_scrubbing_keeps_to_its_pace(tmp_path: Path) -> None:
    paused: list[float] = []

    async def sleep(seconds: float) -> None:
        paused.append(seconds)

    async with running(tmp_path / "s", sleep=sleep) as store:
        await put_pinned(store, blocks := tree(9, MIB))
        assert [damage async for damage in store.scrub(MIB)] == []
    assert sum(paused) == sum(len(block.data) for block in blocks) / MIB
    assert max(paused) <= 5, "SCRUBBED_MAX"


async def test_a_pin_is_amended_only_while_it_is_there(tmp_path: Path) -> None:
    blocks = tree(2, 100)
    async with running(tmp_path / "s") as store:
        pin = await put_pinned(store, blocks, name="photos")
        assert await store.amend(pin, lease_until=5.0, copies=3)
        assert not await store.amend(replace(pin, name="other"), copies=2)
        async with store.hold(ADA) as hold:
            await store.pin(hold, replace(pin, copies=4, public=True))
        assert await store.amend(pin, lease_until=6.0), "of one that was pinned anew meanwhile"
    async with running(tmp_path / "s") as store:
        (found,) = await store.pins(ADA)
        assert (found.lease_until, found.copies, found.public) == (6.0, 4, True)
        assert found.charged == (await store.usage(ADA)).charged > 0
        await store.unpin(ADA, pin.root, "photos")
        assert not await store.amend(pin), "who gave it up has it no more"
        assert await store.pins() == []
        await store.collect()
        with pytest.raises(NotFound):
            await store.amend(pin)


async def test_pins_come_page_by_page_the_oldest_first(tmp_path: Path) -> None:
    blocks = tree(2, 100)
    async with running(tmp_path / "s") as store:
        pins = [await put_pinned(store, blocks, name=str(n)) for n in range(7)]
        await put_pinned(store, other := tree(1, 100), BOB)
        await store.amend(pins[2], copies=3)
        async with store.hold(ADA) as hold:
            await store.pin(hold, pins[4])  # anew
        names, after = [], 0
        while len(names) < 3:
            page, after = await store.page(ADA, None, after, 3)
            names.append("".join(pin.name for pin in page))
        assert (names, after) == (["012", "356", "4"], 0)
        assert "".join(pin.name for pin in await store.pins(ADA)) == "4653210"
        assert await store.page(ADA, other[-1].cid, 0, 9) == ([], 0)
        (page, _) = await store.page(None, other[-1].cid, 0, 9)
        assert page[0].owner == BOB
        assert (await store.usage()).pins == 8


async def test_what_goes_between_two_pages_makes_no_other_pin_lack(tmp_path: Path) -> None:
    blocks = tree(2, 100)
    async with running(tmp_path / "s") as store:
        pins = [await put_pinned(store, blocks, name=str(n)) for n in range(7)]
        page, after = await store.page(ADA, None, 0, 3)
        seen = [pin.name for pin in page]
        for pin in pins[1:3]:
            await store.unpin(ADA, pin.root, pin.name)
        async with store.hold(ADA) as hold:
            await store.pin(hold, pins[3])  # anew
        while after:
            page, after = await store.page(ADA, None, after, 3)
            seen += [pin.name for pin in page]
        assert sorted(seen) == list("0123456")


async def test_an_owner_has_no_more_pins_than_they_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "PINS_PER_OWNER_MAX", 3)
    blocks = tree(1, 100)
    async with running(tmp_path / "s") as store:
        for name in "abc":
            await put_pinned(store, blocks, name=name)
        with pytest.raises(LimitExceeded) as refused:
            await put_pinned(store, blocks, name="d")
        assert refused.value.code == "limit.blob_pins"
        await put_pinned(store, blocks, BOB)
        assert (await store.usage(ADA)).pins == 3
    async with running(tmp_path / "s") as store:
        with pytest.raises(LimitExceeded):
            await put_pinned(store, blocks, name="d")
        await store.unpin(ADA, blocks[-1].cid, "a")
        await put_pinned(store, blocks, name="d")
        await put_pinned(store, blocks, BOB)  # in place of the same
        assert [(await store.usage(owner)).pins for owner in (ADA, BOB)] == [3, 1]
        assert await store.unpin(ADA, blocks[-1].cid, None) == 3
        assert await store.usage(ADA) == replace(await store.usage(ADA), charged=0, pins=0)


@pytest.mark.parametrize("order", [(ADA, BOB), (BOB, ADA)])
async def test_a_node_that_is_also_pinned_as_bytes_keeps_what_it_links_to(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    """A block has a CID for each codec: who pins one as raw bytes takes nothing from others."""
    blocks = tree(3, 1000)
    as_bytes = Block(Cid(1, RAW, blocks[-1].cid.digest), blocks[-1].data)
    both = node([as_bytes.cid, blocks[-1].cid])
    async with running(tmp_path / "s") as store:
        for owner in order:
            await put_pinned(store, blocks if owner == BOB else [as_bytes], owner)
        assert not (await store.collect()).blocks
        assert await all_there(store, blocks)
        await put_pinned(store, [*blocks, both])
        for owner, block in ((BOB, blocks[-1]), (ADA, as_bytes)):
            await store.unpin(owner, block.cid, None)
        assert not (await store.collect()).blocks
        (pin,) = await store.pins()
        assert pin.charged == (await store.usage()).charged
