"""Flipped bits: nothing wrong is served, and what is damaged is named."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import sqlite3
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from wetware.errors import ConfigError, WetwareError
from wetware_blob.format.cid import Block
from wetware_blob.store.errors import Damaged, StoreFailed
from wetware_blob.store.index import FILE, charge
from wetware_blob.store.pins import BadPin, Pin
from wetware_blob.store.salvage import aside
from wetware_blob.store.store import Store

from .parts import ADA, node, raw, running

pytestmark = pytest.mark.anyio

LARGE = raw(random.Random(1).randbytes(50_000))
SMALL = raw(random.Random(2).randbytes(1000))
TREE = [LARGE, SMALL, node([LARGE.cid, SMALL.cid])]


@pytest.fixture
async def directory(tmp_path: Path) -> Path:
    async with running(tmp_path / "s") as store, store.hold(ADA) as hold:
        await store.put(hold, TREE)
        await store.pin(hold, Pin(ADA, TREE[-1].cid, "photos of 2026"))
    return tmp_path / "s"


def block_files(directory: Path) -> list[Path]:
    return list(directory.glob("*/*-*"))


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


async def scrubbed(store: Store) -> list[bytes | BadPin]:
    return [damage async for damage in store.scrub(None)]


@pytest.mark.parametrize("block", [LARGE, SMALL], ids=["a block's file", "a block's row"])
async def test_a_bit_of_a_block(directory: Path, block: Block) -> None:
    (path,) = block_files(directory)
    at = 40_000
    if block is SMALL:
        path = directory / FILE
        at = path.read_bytes().index(block.data[-50:])
    flip(path, at)
    async with running(directory) as store:
        with pytest.raises(Damaged) as damaged:
            await store.get(block.cid.digest)
        assert block.cid.digest.hex() in str(damaged.value)
        assert await scrubbed(store) == [block.cid.digest]
    async with running(directory) as store:  # it is kept that it is damaged
        assert block.cid.digest not in await store.have([b.cid.digest for b in TREE])
        before = await store.usage()
        async with store.hold(ADA) as hold:  # another node had it
            await store.put(hold, [block])
        assert await store.get(block.cid.digest) == block.data
        assert await scrubbed(store) == []
        assert await store.usage() == before
    assert len(block_files(directory)) == 1


async def test_a_file_that_is_gone_or_longer_or_cannot_be_read(directory: Path) -> None:
    (path,) = block_files(directory)
    path.write_bytes(LARGE.data + b"x")
    async with running(directory) as store:
        assert await scrubbed(store) == [LARGE.cid.digest]
    path.unlink()
    path.mkdir()
    async with running(directory) as store:
        assert await scrubbed(store) == [LARGE.cid.digest]
    path.rmdir()
    async with running(directory) as store:
        assert await scrubbed(store) == [LARGE.cid.digest]
        with pytest.raises(Damaged):
            await store.get(LARGE.cid.digest)


async def test_a_bit_of_a_pin(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = directory / FILE
    at = path.read_bytes().index(b'["", 0, 0.0, 1')  # what it says of the pin
    flip(path, at + 5)
    with caplog.at_level(logging.ERROR, logger="wetware.blob.store"):
        async with running(directory) as store:
            (damage,) = await scrubbed(store)
            assert isinstance(damage, BadPin)
            assert damage.name == "photos of 2026"
            assert await store.pins() == []
            with pytest.raises(Damaged, match="photos of 2026"):  # it is unknown what it keeps
                await store.collect()
            assert await store.have([b.cid.digest for b in TREE]) == {b.cid.digest for b in TREE}
            assert await store.unpin(ADA, damage.root, damage.name) == 1
            assert (await store.collect()).blocks == 3
            assert (await store.usage(ADA)).charged == 0
    assert "blob.pin_damaged" in caplog.text


@pytest.mark.parametrize("column", ["owner", "root", "name", "charged", "pin", "checksum"])
async def test_pins_that_are_damaged_can_be_given_up(directory: Path, column: str) -> None:
    """Whatever of them is: what names them, too."""
    other = raw(b"other")
    async with running(directory) as store:
        async with store.hold(ADA) as hold:
            await store.put(hold, [other])
            await store.pin(hold, Pin(ADA, other.cid))
        sql = f"UPDATE pins SET {column} = 0 WHERE name != ''"  # noqa: S608 constants
        await store._index.write(lambda db: db.execute(sql))
        with pytest.raises(Damaged):
            await store.collect()
        (pin,) = await store.drop_damaged()
        assert pin.name == ("0" if column == "name" else "photos of 2026")
        assert (await store.collect()).blocks == 3
        assert [pin.root for pin in await store.pins()] == [other.cid]
        assert await store.drop_damaged() == []
        if column not in ("owner", "charged"):
            assert (await store.usage(ADA)).charged == charge(5)


async def test_an_inner_block_that_is_damaged_keeps_what_is_below_it(directory: Path) -> None:
    inner = TREE[-1]
    path = directory / FILE
    flip(path, path.read_bytes().index(inner.data[-20:]))
    async with running(directory) as store:
        with pytest.raises(Damaged):
            await store.collect()
        assert len(await store.have([b.cid.digest for b in TREE])) == 2
        async with store.hold(ADA) as hold:
            await store.put(hold, [inner])
        assert not (await store.collect()).blocks


async def test_two_pins_that_have_one_row_id(directory: Path) -> None:
    """A bit of a key of the table: each of them is there still."""
    async with running(directory) as store:
        for name in ("b", "c"):
            async with store.hold(ADA) as hold:
                await store.pin(hold, Pin(ADA, TREE[-1].cid, name))
    path = directory / FILE
    db = sqlite3.connect(path)
    ((page,),) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'pins'").fetchall()
    db.close()
    start = (page - 1) * 4096
    data = path.read_bytes()
    third = start + int.from_bytes(data[start + 12 : start + 14])
    at = third + (2 if data[third] & 0x80 else 1)  # behind the size of the row
    assert data[at] == 3
    flip(path, at)
    async with running(directory) as store:
        assert {pin.name for pin in await store.pins()} == {"photos of 2026", "b", "c"}


FLIPS = int(os.environ.get("WW_FLIPS", "150"))


async def test_any_bit_of_the_index(directory: Path, tmp_path: Path) -> None:
    """The store is open, what is there is right, and what is not there is named."""
    rng = random.Random(3)
    used = [at for at, byte in enumerate((directory / FILE).read_bytes()) if byte]
    salvaged = 0
    for _ in range(FLIPS):
        shutil.copytree(directory, copy := tmp_path / "copy")
        at, bit = rng.choice(used), 1 << rng.randrange(8)
        flip(copy / FILE, at, bit)
        try:
            await _nothing_wrong(copy, f"bit {bit} of byte {at}")
            salvaged += bool(aside(os.listdir(copy)))
        finally:
            shutil.rmtree(copy)
    assert salvaged > FLIPS / 10


async def _nothing_wrong(directory: Path, where: str) -> None:
    async with running(directory) as store:
        with contextlib.suppress(WetwareError):  # what is found only once it is used
            await _use(store)
        await salvaged(store)
        assert not store._index.malformed.is_set(), where
        named = await scrubbed(store)
        await salvaged(store)
        named += await scrubbed(store)
        for block in TREE:
            try:
                assert await store.get(block.cid.digest) == block.data, where
            except WetwareError:
                assert block.cid.digest in named, where
                assert block is not LARGE, where
        pins = await store.pins()
        assert all(pin.root == TREE[-1].cid for pin in pins), where
        assert pins or any(isinstance(name, BadPin) for name in named), where


async def _use(store: Store) -> None:
    await scrubbed(store)
    other = raw(b"other")
    async with store.hold(ADA) as hold:
        await store.put(hold, [other, raw(random.Random(5).randbytes(40_000))])
        await store.pin(hold, Pin(ADA, other.cid))
    await store.pins(ADA)
    await store.unpin(ADA, other.cid, None)
    await store.collect()


async def salvaged(store: Store) -> None:
    """If it is found by now that the index is damaged, that is over."""
    await anyio.lowlevel.checkpoint()
    with anyio.fail_after(60):
        while store._index.malformed.is_set():
            await anyio.lowlevel.checkpoint()


async def test_a_bit_of_the_log_that_a_crash_left(directory: Path, tmp_path: Path) -> None:
    """It looks like one that a crash cut short: what was in it may be gone, nothing is wrong."""
    more = [raw(bytes([n]) * 1000) for n in range(10)]
    async with running(directory) as store:
        for block in more:
            async with store.hold(ADA) as hold:
                await store.put(hold, [block])
        shutil.copytree(directory, tmp_path / "crashed")
    log = f"{FILE}-wal"
    size = (tmp_path / "crashed" / log).stat().st_size
    assert size > 10_000
    rng = random.Random(4)
    for _ in range(30):
        shutil.copytree(tmp_path / "crashed", copy := tmp_path / "copy")
        flip(copy / log, rng.randrange(size))
        async with running(copy) as store:
            for block in TREE:
                assert await store.get(block.cid.digest) == block.data
            assert [pin.root for pin in await store.pins()] == [TREE[-1].cid]
            for digest in await store.have([b.cid.digest for b in more]):
                assert await store.get(digest) in [b.data for b in more]
        shutil.rmtree(copy)


async def test_damage_of_the_index_that_is_found_while_it_serves(directory: Path) -> None:
    """Uploads and pins go on with the new index, and are charged the same."""
    more = [raw(bytes([n]) * 40_000) for n in range(3)]
    async with running(directory) as store, store.hold(ADA) as hold:
        await store.put(hold, more[:1])
        before = await store.usage(), await store.usage(ADA)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.put, hold, more[1:2])
            await anyio.lowlevel.checkpoint()
            store._index.suspect()
        await salvaged(store)
        (kept,) = aside(os.listdir(directory))
        (finding,) = store.findings()
        assert kept in finding.text
        await store.collect()
        for block in (*TREE, *more[:2]):
            assert await store.get(block.cid.digest) == block.data
        await store.put(hold, [*more, node([block.cid for block in more])])
        charged = 2 * charge(40_000) + charge(len(node([b.cid for b in more]).data))
        assert (await store.usage()).charged == before[0].charged + charged
        assert (await store.usage(ADA)).charged == before[1].charged + charged
        store._index.suspect()
        await salvaged(store)
        assert len(aside(os.listdir(directory))) == 1
        await store.pin(hold, Pin(ADA, node([block.cid for block in more]).cid))
    async with running(directory) as store:
        assert len(await store.pins()) == 2
        assert (await store.usage(ADA)).charged == before[1].charged + charged
        assert not (await store.collect()).blocks
        assert await scrubbed(store) == []


async def test_a_store_that_was_salvaged_says_of_no_pin_that_it_is_over(directory: Path) -> None:
    """Until somebody has looked; it has the ID of before."""
    async with running(directory) as store:
        await store.check_pins()
        before = store.id
        store._index.suspect()
        await salvaged(store)
        assert store.id == before
        with pytest.raises(StoreFailed, match="kept as"):
            await store.check_pins()
    (kept,) = aside(os.listdir(directory))
    (directory / kept).unlink()
    async with running(directory) as store:
        await store.check_pins()
        assert store.id == before
    with contextlib.closing(sqlite3.connect(directory / FILE)) as db:
        db.execute("UPDATE store SET id = 'none'")
        db.commit()
    async with running(directory) as store:  # it was salvaged
        assert len(store.id) == len(before)
        assert store.id != before
        assert len(await store.pins()) == 1


async def test_a_pin_that_is_gone_without_a_trace_is_missed(directory: Path) -> None:
    """What SQLite has as a key beside its row is there still."""
    async with running(directory) as store:
        with store._index.reading() as db:
            sql = "SELECT rootpage FROM sqlite_schema WHERE name = 'pins'"
            ((page,),) = db.execute(sql).fetchall()
            flip(directory / FILE, (page - 1) * 4096 + 4)  # a row fewer
            db.execute("PRAGMA shrink_memory")
        assert await store.pins() == []
        with pytest.raises(StoreFailed):
            await store.check_pins()
        await salvaged(store)
        assert len(await store.pins()) + len((await store.damage())[1]) == 1


async def test_an_index_of_a_later_release_is_left_alone(directory: Path) -> None:
    """It has other tables, and is not taken for damaged."""
    db = sqlite3.connect(directory / FILE)
    db.execute("CREATE TABLE more (id)")
    db.execute("PRAGMA user_version=2")
    db.commit()
    db.close()
    before = (directory / FILE).read_bytes()
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="of version 2")):
        async with running(directory):
            pass
    assert (directory / FILE).read_bytes() == before
    assert aside(os.listdir(directory)) == []


async def test_what_lacks_of_a_pin_is_named_block_by_block(directory: Path) -> None:
    """Rows of blocks are gone with all that names them."""
    db = sqlite3.connect(directory / FILE)
    db.execute("DELETE FROM blocks")
    db.execute("DELETE FROM small")
    db.commit()
    db.close()
    (path,) = block_files(directory)
    path.unlink()
    async with running(directory) as store, store.hold(ADA) as hold:
        by_digest = {block.cid.digest: block for block in TREE}
        assert await scrubbed(store) == [TREE[-1].cid.digest]
        named = []
        async for damage in store.scrub(None):
            assert isinstance(damage, bytes)
            named.append(damage)
            await store.put(hold, [by_digest[damage]])  # another node had it
        assert named[0] == TREE[-1].cid.digest
        assert sorted(named) == sorted(by_digest)
        assert await scrubbed(store) == []
