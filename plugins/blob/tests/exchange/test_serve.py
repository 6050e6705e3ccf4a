"""The provider's end: in order, bounded, and no worse for what a peer does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from wetware.errors import StreamReset, WetwareError
from wetware.overlay.link import Stream
from wetware.testing import FakeOverlay
from wetware.testing.overlay import overlays
from wetware_blob.exchange import serve as serving
from wetware_blob.exchange import wire
from wetware_blob.format.cid import BLOCK_BYTES_MAX, RAW, Block, Cid

from .parts import MemoryStore, blocks_of, framed, until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def pair() -> AsyncIterator[tuple[FakeOverlay, FakeOverlay]]:
    """Who asks, and who serves."""
    async with overlays(2) as (one, two):
        yield one, two


async def opened(pair: tuple[FakeOverlay, FakeOverlay], store: MemoryStore) -> Stream:
    asks, serves = pair
    serving.serve(serves, store.get)
    return await asks.open_stream(serves.peer_id, wire.PROTOCOL)


async def test_blocks_come_in_the_order_of_the_wants(
    pair: tuple[FakeOverlay, FakeOverlay],
) -> None:
    one, two, three = blocks_of(3)
    empty = Block(Cid.of(RAW, b""), b"")
    async with await opened(pair, MemoryStore([one, three, empty])) as stream:
        first = [block.cid.digest for block in (three, two, one)]
        await stream.write(wire.want_frame(first) + wire.want_frame([empty.cid.digest, *first]))
        stream.close()
        once = framed(three.data) + wire.ABSENT_FRAME + framed(one.data)
        expected = once + framed(b"") + once
        assert await stream.read_exactly(len(expected)) == expected
        assert await stream.read() == b""


async def test_a_block_that_the_store_cannot_read_is_absent(
    pair: tuple[FakeOverlay, FakeOverlay],
) -> None:
    class Damaged(MemoryStore):
        async def get(self, digest: bytes) -> bytes:
            raise WetwareError("its bytes are not what they were")

    async with await opened(pair, Damaged()) as stream:
        await stream.write(wire.want_frame([bytes(32)]))
        assert await stream.read_exactly(4) == wire.ABSENT_FRAME


async def test_a_block_that_nobody_would_take_is_absent(
    pair: tuple[FakeOverlay, FakeOverlay],
) -> None:
    data = bytes(BLOCK_BYTES_MAX + 1)
    large = Block(Cid.of(RAW, data), data)
    async with await opened(pair, MemoryStore([large])) as stream:
        await stream.write(wire.want_frame([large.cid.digest]))
        assert await stream.read_exactly(4) == wire.ABSENT_FRAME


@pytest.mark.parametrize("sent", [b"\0\0", b"\xff\xff" + bytes(64), b"\0\1half"])
async def test_what_is_no_frame_costs_the_stream(
    pair: tuple[FakeOverlay, FakeOverlay], sent: bytes
) -> None:
    stream = await opened(pair, MemoryStore())
    await stream.write(sent)
    stream.close()
    with pytest.raises(StreamReset):
        await stream.read()


async def test_no_more_is_read_than_the_peer_takes(
    pair: tuple[FakeOverlay, FakeOverlay], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "STALL_S", 0.05)
    blocks = blocks_of(20, BLOCK_BYTES_MAX)
    store = MemoryStore(blocks)
    stream = await opened(pair, store)
    await stream.write(wire.want_frame([block.cid.digest for block in blocks]))
    await until(lambda: stream.closing)  # the peer that takes nothing is not waited for
    with pytest.raises(StreamReset):
        await stream.read()
    assert len(store.read) == 4


async def test_peers_that_take_nothing_leave_places_for_others(
    pair: tuple[FakeOverlay, FakeOverlay], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "BLOCKS_PER_PEER_MAX", 3)
    asks, serves = pair
    blocks = blocks_of(8, BLOCK_BYTES_MAX)
    store = MemoryStore(blocks)
    serving.serve(serves, store.get)
    streams = [await asks.open_stream(serves.peer_id, wire.PROTOCOL) for _ in range(6)]
    for stream in streams:
        await stream.write(wire.want_frame([block.cid.digest for block in blocks]))
    await until(lambda: len(store.read) == 3)
    async with FakeOverlay() as other:
        await other.connect(serves)
        async with await other.open_stream(serves.peer_id, wire.PROTOCOL) as stream:
            await stream.write(wire.want_frame([blocks[0].cid.digest]))
            answer = framed(blocks[0].data)
            assert await stream.read_exactly(len(answer)) == answer
    assert len(store.read) == 4
    for stream in streams:  # their places come back
        stream.reset()
    async with await asks.open_stream(serves.peer_id, wire.PROTOCOL) as stream:
        await stream.write(wire.want_frame([blocks[1].cid.digest]))
        answer = framed(blocks[1].data)
        assert await stream.read_exactly(len(answer)) == answer


async def test_a_peer_has_so_many_streams(
    pair: tuple[FakeOverlay, FakeOverlay], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "STREAMS_PER_PEER_MAX", 2)
    asks, serves = pair
    serving.serve(serves, MemoryStore().get)
    streams = [await asks.open_stream(serves.peer_id, wire.PROTOCOL) for _ in range(3)]
    with pytest.raises(StreamReset):
        await streams[2].read()
    for stream in streams[:2]:
        await stream.write(wire.want_frame([bytes(32)]))
        assert await stream.read_exactly(4) == wire.ABSENT_FRAME
        stream.reset()
