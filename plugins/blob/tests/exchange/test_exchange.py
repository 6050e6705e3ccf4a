"""Whole DAGs between two members whose stores are on disk."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from wetware.errors import LimitExceeded, NotFound
from wetware.testing.overlay import overlays
from wetware_blob.exchange import exchange as exchanging
from wetware_blob.exchange.exchange import Exchange, pull
from wetware_blob.format.build import V1_2025, FileTree, leaf
from wetware_blob.format.cid import RAW, BadBlock, Block, Cid
from wetware_blob.format.read import read
from wetware_blob.store.index import charge
from wetware_blob.store.store import Hold, Store

from ..store.parts import node, running
from .parts import exchange_on, found, until

pytestmark = pytest.mark.anyio

OWNER = "local:ada"
DATA = random.Random(3).randbytes(3_000_000)
CHUNK_BYTES = 1000  # so that there are two levels above the leaves


def file_of(data: bytes) -> tuple[Cid, list[Block]]:
    """The blocks of a file."""
    tree, blocks = FileTree(V1_2025), []
    for at in range(0, len(data), CHUNK_BYTES):
        chunk = data[at : at + CHUNK_BYTES]
        block = leaf(V1_2025, chunk)
        blocks += [block, *tree.add(block.cid, len(chunk), len(block.data))]
    root, last = tree.finish()
    return root.cid, [*blocks, *last]


ROOT, BLOCKS = file_of(DATA)


@contextlib.asynccontextmanager
async def two(path: Path, blocks: list[Block]) -> AsyncIterator[tuple[Exchange, Store, Store]]:
    """Who fetches: its exchange and store; and the store of who has the blocks."""
    async with (
        overlays(2) as (reader, other),
        running(path / "reader") as store,
        running(path / "other") as full,
        exchange_on(other, full),
        exchange_on(reader, store, found(other.peer_id)) as made,
        full.hold(OWNER) as hold,
    ):
        await full.put(hold, blocks)
        yield made, store, full


async def test_a_file_is_read_from_another_member_and_kept(tmp_path: Path) -> None:
    async with two(tmp_path, BLOCKS) as (made, store, _):
        async with made.open(ROOT, OWNER) as source:
            got = [piece async for piece in read(ROOT, 0, None, source.get, source.ahead)]
            assert b"".join(got) == DATA
            await source.kept()
        digests = {block.cid.digest for block in BLOCKS}
        assert await store.have(digests) == digests


async def test_of_a_range_what_is_in_it_is_fetched(tmp_path: Path) -> None:
    async with two(tmp_path, BLOCKS) as (made, store, _):
        async with made.open(ROOT, OWNER) as source:
            start, end = 1_500_123, 1_504_567
            got = [piece async for piece in read(ROOT, start, end, source.get, source.ahead)]
            assert b"".join(got) == DATA[start:end]
            await source.kept()
        assert len(await store.have({block.cid.digest for block in BLOCKS})) < 10


async def test_pull_brings_every_block_and_fetches_none_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two(tmp_path, BLOCKS) as (made, store, _), store.hold(OWNER) as hold:
        await store.put(hold, BLOCKS[::2])
        put, written = store.put, []

        async def counted(hold: Hold, blocks: Sequence[Block]) -> None:
            written.extend(block.cid for block in blocks)
            await put(hold, blocks)

        monkeypatch.setattr(store, "put", counted)
        async with made.open(ROOT, OWNER) as source:
            await pull(source, ROOT)
        assert sorted(map(str, written)) == sorted(str(block.cid) for block in BLOCKS[1::2])
        digests = {block.cid.digest for block in BLOCKS}
        assert await store.have(digests) == digests


async def test_pull_counts_each_block_once_that_came(tmp_path: Path) -> None:
    """What it is charged, wherever it is linked to, and however often."""
    one, two_ = (Block(Cid.of(RAW, data), data) for data in (b"a", b"b"))
    inner = node([one.cid, two_.cid])
    root = node([inner.cid, one.cid, one.cid, two_.cid])
    async with two(tmp_path, [one, two_, inner, root]) as (made, *_):
        for there, came in ((False, 4), (True, 0)):
            counts: list[int] = []
            async with made.open(root.cid, OWNER) as source:
                await pull(source, root.cid, counts.append)
            assert counts[-1] == came * charge(1), there
            assert counts == sorted(counts)


async def test_pull_of_one_leaf(tmp_path: Path) -> None:
    (one,) = [Block(Cid.of(RAW, b"a"), b"a")]
    async with two(tmp_path, [one]) as (made, store, _):
        async with made.open(one.cid, OWNER) as source:
            await pull(source, one.cid)
        assert await store.get(one.cid.digest) == b"a"


async def test_a_pull_ends_when_all_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = [Block(Cid.of(RAW, b"a"), b"a")]
    async with two(tmp_path, [one]) as (made, store, _):
        put, writable = store.put, asyncio.Event()

        async def later(hold: Hold, blocks: Sequence[Block]) -> None:
            await writable.wait()
            await put(hold, blocks)

        monkeypatch.setattr(store, "put", later)
        async with made.open(one.cid, OWNER) as source:
            pulling = asyncio.create_task(pull(source, one.cid))
            await until(lambda: any(wanted.taken for wanted in source._wanted.values()))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not pulling.done()
            writable.set()
            await pulling
            assert await store.get(one.cid.digest) == b"a"


async def test_a_damaged_block_is_fetched_again(tmp_path: Path) -> None:
    big = Block(Cid.of(RAW, DATA[:500_000]), DATA[:500_000])
    async with two(tmp_path, [big]) as (made, store, _):
        async with made.open(big.cid, OWNER) as source:
            await pull(source, big.cid)
        (file,) = [p for p in (tmp_path / "reader").rglob("*") if p.stat().st_size == 500_000]
        with file.open("r+b") as opened:
            opened.write(b"?")
        async with made.open(big.cid, OWNER) as source:
            assert await source.get(big.cid) == big.data
            await source.kept()
        assert await store.get(big.cid.digest) == big.data


async def test_dags_that_claim_much_cost_what_their_blocks_cost(tmp_path: Path) -> None:
    bomb = [node([])]
    for _ in range(40):
        bomb.append(node([bomb[-1].cid] * 2))
    async with two(tmp_path, bomb) as (made, store, _):
        async with made.open(bomb[-1].cid, OWNER) as source:
            await pull(source, bomb[-1].cid)
        assert len(await store.have({block.cid.digest for block in bomb})) == 41


async def test_the_links_that_wait_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanging, "LINKS_MAX", 50)
    async with two(tmp_path, BLOCKS) as (made, _, _full):
        with pytest.raises(LimitExceeded, match="LINKS_MAX"):
            async with made.open(ROOT, OWNER) as source:
                await pull(source, ROOT)


async def test_what_is_no_dag_pb_ends_a_pull(tmp_path: Path) -> None:
    bad = Block(Cid(1, 0x70, Cid.of(RAW, b"junk").digest), b"junk")
    async with two(tmp_path, [bad]) as (made, _, _full):
        with pytest.raises(BadBlock):
            async with made.open(bad.cid, OWNER) as source:
                await pull(source, bad.cid)


async def test_a_download_that_failed_survives_a_collection(tmp_path: Path) -> None:
    lacking = [block for block in BLOCKS if block.cid != BLOCKS[-2].cid]
    async with two(tmp_path, lacking) as (made, store, _):
        with pytest.raises(NotFound):
            async with made.open(ROOT, OWNER) as source:
                await pull(source, ROOT)
        before = await store.have({block.cid.digest for block in BLOCKS})
        assert len(before) > 500
        await store.collect(dry_run=False)
        assert await store.have(before) == before


async def test_blocks_of_an_open_download_are_not_collected(tmp_path: Path) -> None:
    async with two(tmp_path, BLOCKS) as (made, store, _):
        collecting = True

        async def collect() -> None:
            while collecting:
                await store.collect(dry_run=False)

        async with made.open(ROOT, OWNER) as source:
            collector = asyncio.create_task(collect())
            await pull(source, ROOT)
            collecting = False
            await collector
            digests = {block.cid.digest for block in BLOCKS}
            assert await store.have(digests) == digests
        async with asyncio.timeout(60):
            while await store.have(digests):  # until it is written that the download is over
                await store.collect(dry_run=False)
