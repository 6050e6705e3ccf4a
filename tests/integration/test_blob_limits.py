"""What a user can do to a node through `blob`: bounded, told why, and nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware import rpc
from wetware.errors import Denied, InvalidArgument, LimitExceeded, NotFound, Revoked, WetwareError
from wetware.testing import Home, NodeProcess
from wetware_blob.format import car, dagpb, unixfs
from wetware_blob.format.build import V1_2025, Entry, directory, leaf
from wetware_blob.format.cid import DAG_PB, RAW, Block, Cid
from wetware_blob.format.unixfs import Type, UnixFs
from wetware_blob.service import READ_PER_OWNER_MAX
from wetware_blob.transfers import TRANSFERS_PER_OWNER_MAX

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

MIB = 1 << 20
CALL_S_MAX = 2.5
GROWTH_BYTES_MAX = 192 * MIB
NO_TERMS = {"name": "", "copies": 0, "where": "", "ack": 0, "public": False}
NOBODYS = "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"


@pytest.fixture(scope="module")
def node(shared_home: Home) -> Iterator[NodeProcess]:
    """A node whose principals may have 256 MiB."""
    env = {"WW_PLUGINS_BLOB_OWNER_BYTES_MAX": str(256 * MIB)}
    made = shared_home.start_node("n", env=env).wait_ready()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def small(shared_home: Home) -> Iterator[NodeProcess]:
    """A node whose principals may have 10 MiB."""
    env = {"WW_PLUGINS_BLOB_OWNER_BYTES_MAX": str(10 * MIB)}
    made = shared_home.start_node("small", env=env).wait_ready()
    yield made
    made.stop()


@pytest.fixture
async def session(node: NodeProcess) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        yield session


def rss(node: NodeProcess) -> int:
    return int(Path(f"/proc/{node.process.pid}/statm").read_text().split()[1]) * 4096


def processor_s(node: NodeProcess) -> float:
    """What it has used: on a loaded machine it takes no more, but longer."""
    fields = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def unharmed(node: NodeProcess, session: wetware.Session) -> AsyncIterator[None]:
    """Calls are answered meanwhile, memory is bounded, and afterwards as much is charged."""
    before, at_rest = (await session.blob.usage()).charged_bytes, rss(node)
    peak, longest_s = at_rest, 0.0

    async def watch() -> None:
        nonlocal peak, longest_s
        async with wetware.connect(node.addr, key=node.home.key()) as other:
            while True:
                began = time.monotonic()
                await other.blob.usage()
                longest_s = max(longest_s, time.monotonic() - began)
                peak = max(peak, rss(node))
                await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    grown = peak - at_rest
    print(f"grown {grown / MIB:.1f} MiB, longest call {longest_s:.2f} s")  # noqa: T201 - with -s
    assert grown < GROWTH_BYTES_MAX
    assert longest_s < CALL_S_MAX
    async with asyncio.timeout(60):
        while (await session.blob.usage()).charged_bytes != before:
            await asyncio.sleep(0.05)


async def begun(
    session: wetware.Session, form: str = "file", bytes_max: int = 1 << 40
) -> tuple[rpc.ByteStream, rpc.Ref]:
    """A put whose stream and transfer are the test's."""
    ref = session.blob._ref
    reply = await ref.call("put", pin=NO_TERMS, form=form, profile="", bytes_max=bytes_max)
    return rpc.ByteStream(reply["stream"]), reply["transfer"]


async def ended(transfer: rpc.Ref) -> None:
    while not (await transfer.call("progress", wait_s=5.0))["state"]["done"]:
        pass


async def endless(stream: rpc.ByteStream) -> None:
    with contextlib.suppress(WetwareError):
        while True:
            await stream.send(os.urandom(MIB // 4))


# --- puts -----------------------------------------------------------------------------------------


async def test_a_stream_without_an_end_is_ended_by_the_quota_or_bytes_max(
    node: NodeProcess, session: wetware.Session
) -> None:
    for bytes_max, code in ((2 * MIB, "limit.blob_bytes"), (1 << 40, "limit.blob_quota")):
        async with unharmed(node, session):
            stream, transfer = await begun(session, bytes_max=bytes_max)
            sending = asyncio.create_task(endless(stream))
            with pytest.raises(LimitExceeded) as refused:
                await ended(transfer)
            assert refused.value.code == code
            assert refused.value.hint
            await asyncio.wait_for(sending, 60)
            transfer.close()


async def test_a_stream_that_stalls_reserves_nothing_once_it_is_released(
    node: NodeProcess, session: wetware.Session
) -> None:
    async with unharmed(node, session):
        stream, transfer = await begun(session)
        await stream.send(os.urandom(9 * MIB))
        async with asyncio.timeout(60):
            while not (await session.blob.usage()).charged_bytes > MIB:
                await asyncio.sleep(0.05)
        state = (await transfer.call("progress", wait_s=0.2))["state"]
        assert not state["done"], "it waits for more"
        transfer.close()
        with pytest.raises(WetwareError):
            await asyncio.wait_for(stream.receive(), 60)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        car.header(None),
        car.header(None)[:-1],
        car.header(None) + car.section(Block(Cid.of(RAW, b"x"), b"x"))[:-1],
        car.header(None) + car.section(Block(Cid.of(RAW, b"x"), b"y")),
        car.header(Cid.of(RAW, b"x")),
        car.header(None) + b"\xff" * 10,
    ],
    ids=["nothing", "no block", "in a head", "in a block", "another hash", "no root", "a length"],
)
async def test_a_car_that_is_cut_or_lies_is_refused(
    node: NodeProcess, session: wetware.Session, data: bytes
) -> None:
    async with unharmed(node, session):
        stream, transfer = await begun(session, "car")
        with contextlib.suppress(WetwareError):
            await stream.send(data)
            await stream.send_eof()
        with pytest.raises(WetwareError) as refused:
            await ended(transfer)
        assert refused.value.code in ("blob.bad_block", "not_found.blob")
        transfer.close()


async def test_a_hundred_transfers_at_once(node: NodeProcess, session: wetware.Session) -> None:
    async with unharmed(node, session):
        kept = []
        for _ in range(TRANSFERS_PER_OWNER_MAX):
            kept.append(await begun(session))
            await kept[-1][0].send(bytes(MIB // 2))
        for _ in range(100 - TRANSFERS_PER_OWNER_MAX):
            with pytest.raises(LimitExceeded, match="TRANSFERS_PER_OWNER_MAX"):
                await begun(session)
        with pytest.raises(LimitExceeded):
            await session.blob.pin(NOBODYS)
        for _, transfer in kept:
            transfer.close()
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(LimitExceeded):
                    await session.blob.put(b"there is room again")
                    break
        for stream, _ in kept:
            await stream.aclose()
        await session.blob.rm((await session.blob.pins())[0].root)


async def test_blobs_that_are_kept(node: NodeProcess, session: wetware.Session) -> None:
    """A reference costs nothing; what was read and is held is bounded for each principal."""
    async with unharmed(node, session):
        refs = []
        for number in range(READ_PER_OWNER_MAX + 1):
            cid = str(Cid.of(RAW, str(number).encode()))
            ref = (await session.blob._ref.call("open", cid=cid, local=True))["blob"]
            refs.append(ref)
            with pytest.raises(LimitExceeded if number == READ_PER_OWNER_MAX else NotFound):
                await ref.call("stat")
        refs[0].close()
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(LimitExceeded):
                    with pytest.raises(NotFound):
                        await refs[-1].call("stat")
                    break
        for ref in refs:
            ref.close()


@pytest.mark.long
async def test_a_directory_of_100_000_entries(node: NodeProcess, session: wetware.Session) -> None:
    names = [f"entry number {number}" for number in range(100_000)]
    empty = leaf(V1_2025, b"")
    _, blocks = directory([Entry(name, empty.cid, 0) for name in names], V1_2025)
    async with unharmed(node, session):
        stream, transfer = await begun(session, "car")
        await stream.send(car.header(None) + b"".join(map(car.section, [empty, *blocks])))
        await stream.send_eof()
        await ended(transfer)
        (pin,) = await session.blob.pins()
        async with session.blob.open(pin.root) as blob:
            found = {entry.name async for entry in blob.ls()}
            assert found == set(names)
            async with blob.at("entry number 99999") as entry:
                assert await entry.read() == b""
        await session.blob.rm(pin.root)
        await stream.aclose()


# --- what others built ----------------------------------------------------------------------------


def node_of(links: list[tuple[Cid, str, int]], said: UnixFs) -> Block:
    made = tuple(dagpb.Link(bytes(cid), name.encode(), size) for cid, name, size in links)
    data = dagpb.encode(dagpb.Node(made, unixfs.encode(said)))
    return Block(Cid.of(DAG_PB, data), data)


def file_bomb() -> list[Block]:
    """2**40 bytes, in blocks each of which links twice to the one below; the root last."""
    blocks, size = [Block(Cid.of(RAW, bytes(1024)), bytes(1024))], 1024
    while size < 1 << 40:
        below = blocks[-1].cid
        said = UnixFs(Type.FILE, None, 2 * size, (size, size))
        blocks.append(node_of([(below, "", size), (below, "", size)], said))
        size *= 2
    return blocks


def tree_bomb(depth: int = 40) -> list[Block]:
    """2**40 directories."""
    blocks = [node_of([], UnixFs(Type.DIRECTORY))]
    for level in range(depth):
        below = blocks[-1].cid
        size = len(blocks[-1].data) << level
        said = UnixFs(Type.DIRECTORY)
        blocks.append(node_of([(below, "a", size), (below, "b", size)], said))
    return blocks


def chain(depth: int = 10_000) -> list[Block]:
    blocks = [node_of([], UnixFs(Type.DIRECTORY))]
    for _ in range(depth):
        blocks.append(node_of([(blocks[-1].cid, "d", 1)], UnixFs(Type.DIRECTORY)))
    return blocks


def wide() -> list[Block]:
    """One block of 2 MiB with as many links as fit."""
    leaf = Cid.of(RAW, b"")
    entries = [(leaf, f"{number:05}", 0) for number in range(39_000)]
    return [Block(leaf, b""), node_of(entries, UnixFs(Type.DIRECTORY))]


def car_of(blocks: list[Block]) -> bytes:
    return car.header(blocks[-1].cid) + b"".join(map(car.section, blocks))


@pytest.mark.parametrize("bomb", [file_bomb, tree_bomb, chain, wide])
async def test_bombs_cost_what_their_blocks_cost(
    node: NodeProcess, session: wetware.Session, bomb: Any, tmp_path: Path
) -> None:
    blocks = bomb()
    async with unharmed(node, session):
        began_s, began = processor_s(node), time.monotonic()
        put = await session.blob.put(car_of(blocks), car=True)
        (pin,) = await session.blob.pins(put.cid)
        assert pin.charged_bytes <= sum(len(block.data) + 8192 for block in blocks)
        async with session.blob.open(put.cid) as blob:
            info = await blob.info()
            if info.kind == "file":
                assert await blob.stat() == 1 << 40
                assert await blob.read((1 << 39) - 5, (1 << 39) + 5) == bytes(10)
            else:
                assert len([entry async for entry in blob.ls()]) in (1, 2, 39_000)
                async with blob.at("/".join("a" * 30) if bomb is tree_bomb else "") as below:
                    await below.info()
                if bomb is chain:
                    with pytest.raises(InvalidArgument):
                        await session.blob.get(put.cid, tmp_path / "got")
                    assert not (tmp_path / "got").exists()
        await session.blob.pin(put.cid, name="again")
        removed = await session.blob.rm(put.cid)
        assert removed.pins == 2
        assert removed.freed_bytes > 0
        await session.blob.gc()
        used_s, took_s = processor_s(node) - began_s, time.monotonic() - began
        print(f"{bomb.__name__}: {len(blocks)} blocks, {used_s:.1f} of {took_s:.1f} s")  # noqa: T201 - with -s
        assert used_s < 60


# --- quota ----------------------------------------------------------------------------------------


async def test_eleven_mebibytes_of_ten(small: NodeProcess, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(11 * MIB))
    async with (
        wetware.connect(small.addr, key=small.home.key()) as session,
        unharmed(small, session),
    ):
        done = small.ww("blob", "put", str(tmp_path / "file"))
        assert done.returncode, done.stdout
        assert "owner_bytes_max" in done.stderr, done.stderr
        assert "remove what is not needed" in done.stderr
        assert "blob rm" in done.stderr
        assert not await session.blob.pins()


async def test_two_puts_that_exceed_it_together(small: NodeProcess) -> None:
    async with (
        wetware.connect(small.addr, key=small.home.key()) as session,
        unharmed(small, session),
    ):
        results = await asyncio.gather(
            *(session.blob.put(os.urandom(6 * MIB)) for _ in range(2)), return_exceptions=True
        )
        failed = [each for each in results if isinstance(each, BaseException)]
        assert failed
        assert all(isinstance(each, LimitExceeded) for each in failed), failed
        pins = await session.blob.pins()
        assert len(pins) == 2 - len(failed)
        assert (await session.blob.usage()).charged_bytes <= 10 * MIB
        for pin in pins:
            await session.blob.rm(pin.root)


async def test_shares_are_no_further_quota(small: NodeProcess) -> None:
    async with (
        wetware.connect(small.addr, key=small.home.key()) as session,
        unharmed(small, session),
    ):
        ref, _ = await session.share({"blob": []})
        async with wetware.connect(ref) as bearer:
            put = await bearer.blob.put(os.urandom(6 * MIB), name="theirs")
            with pytest.raises(LimitExceeded):
                await bearer.blob.put(os.urandom(6 * MIB))
        with pytest.raises(LimitExceeded):
            await session.blob.put(os.urandom(6 * MIB))
        assert [pin.name for pin in await session.blob.pins()] == ["theirs"]
        await session.blob.rm(put.cid)


# --- grants ---------------------------------------------------------------------------------------


async def test_a_revoked_share_ends_a_put_and_gives_back_what_it_had(
    node: NodeProcess, session: wetware.Session
) -> None:
    async with unharmed(node, session):
        ref, grant = await session.share({"blob": []})
        async with wetware.connect(ref) as stranger:
            stream, transfer = await begun(stranger)
            pinning = (await stranger.blob._ref.call("pin", root=NOBODYS, pin=NO_TERMS))["transfer"]
            sending = asyncio.create_task(stream.send(os.urandom(9 * MIB)))
            async with asyncio.timeout(60):
                while not (await session.blob.usage()).charged_bytes > MIB:
                    await asyncio.sleep(0.05)
            await session.revoke(grant.id)
            for each in (transfer, pinning):
                with pytest.raises(Revoked):
                    await ended(each)
            sending.cancel()


async def test_who_may_read_may_not_put(node: NodeProcess, session: wetware.Session) -> None:
    ref, _ = await session.share({"blob": ["Store.open", "Blob.*", "ByteStream.*"]})
    before = await session.blob.usage()
    async with wetware.connect(ref) as reader:
        for beyond in (
            reader.blob.put(b"x"),
            reader.blob.pin(NOBODYS),
            reader.blob.put(b"", car=True),
            reader.blob.rm(NOBODYS),
            reader.blob.unpin(NOBODYS),
            reader.blob.usage(),
        ):
            with pytest.raises(Denied):
                await beyond
    assert await session.blob.usage() == before


async def test_below_a_blob_nothing_leads_out(
    node: NodeProcess, session: wetware.Session, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "link").symlink_to("..")
    (tree / "sub" / "file").write_bytes(b"")
    whole = await session.blob.put(tree)
    other = await session.blob.put(b"other")
    async with session.blob.open(whole.cid) as blob, blob.at("sub") as sub:
        ref, _ = await session.share({f"blob:{sub.cid}": []})
    async with wetware.connect(ref) as stranger, stranger.blob.open(sub.cid) as below:
        errors = set()
        for path in ("..", "../..", f"../{other.cid}", other.cid, "/etc", "link/x", "file/x"):
            with pytest.raises(WetwareError) as refused:
                await below.at(path).__aenter__()
            errors.add((type(refused.value), refused.value.code))
        assert len(errors) <= 2, errors  # no such name, and no directory
    for pin in await session.blob.pins():
        await session.blob.rm(pin.root)


async def test_the_time_of_a_refusal_says_nothing(
    node: NodeProcess, session: wetware.Session
) -> None:
    """A CID of another blob that is here, and one that nobody has: the same class of time."""
    mine, other = await session.blob.put(b"mine"), await session.blob.put(b"another")
    ref, _ = await session.share({f"blob:{mine.cid}": []})
    async with wetware.connect(ref) as stranger:

        async def refused_s(cid: str) -> float:
            began = time.perf_counter()
            with pytest.raises(Denied):
                await stranger.blob.open(cid).__aenter__()
            return time.perf_counter() - began

        times = [(await refused_s(other.cid), await refused_s(NOBODYS)) for _ in range(50)]
    for pin in await session.blob.pins():
        await session.blob.rm(pin.root)
    here, nowhere = (sorted(each)[25] for each in zip(*times, strict=True))
    assert max(here, nowhere) < 20 * min(here, nowhere) + 0.005, "nothing is looked up"
