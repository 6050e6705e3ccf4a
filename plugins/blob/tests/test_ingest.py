"""What an upload has in memory while the disk is slow, and how much it takes of its stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from wetware.errors import LimitExceeded
from wetware_blob.format.build import V1_2025
from wetware_blob.format.cid import Block, Cid
from wetware_blob.ingest import (
    UNWRITTEN_BYTES_MAX,
    UNWRITTEN_BYTES_TOTAL_MAX,
    Blocks,
    Counted,
    put_file,
)

pytestmark = pytest.mark.anyio
MIB = 1 << 20


class Stream:
    """So many bytes, each MiB of another one, and the memory that they were read into."""

    def __init__(self, size: int) -> None:
        self.left, self.taken = size, 0
        self.buffers: list[Any] = []

    async def receive_into(self, buffer: memoryview) -> int:
        if not any(buffer.obj is known for known in self.buffers):
            self.buffers.append(buffer.obj)
        count = min(len(buffer), self.left)
        for at in range(0, count, MIB):
            end = min(at + MIB, count)
            buffer[at:end] = bytes([(self.taken + at) // MIB % 256]) * (end - at)
        self.left -= count
        self.taken += count
        return count


class Store:
    def __init__(self, *, slow: bool = False) -> None:
        self.slow, self.found = slow, dict[Cid, bytes]()

    async def put(self, _: object, blocks: list[Block]) -> None:
        if self.slow:
            await asyncio.Event().wait()
        for _turn in range(3):  # what is read meanwhile must not change it
            await asyncio.sleep(0)
        self.found |= {block.cid: bytes(block.data) for block in blocks}


async def run_sync(function: Callable[..., Any], *args: object) -> Any:
    return function(*args)


def opened(store: Store, uploads: int = 1) -> Blocks:
    hold: Any = None
    made: Any = store
    others = {Blocks(made, hold, run_sync, set()) for _ in range(uploads - 1)}
    return Blocks(made, hold, run_sync, others)


def counted(stream: Stream, bytes_max: int = 1 << 40) -> Counted:
    made: Any = stream
    return Counted(made, bytes_max)


@pytest.mark.parametrize("uploads", [1, 8, 32])
async def test_many_uploads_share_the_memory_for_blocks(uploads: int) -> None:
    """The disk writes nothing; each reads on until it is kept waiting, up to twice its share."""
    stream = Stream(1 << 40)
    async with opened(Store(slow=True), uploads) as blocks:
        putting = asyncio.create_task(put_file(counted(stream), V1_2025, blocks))
        before = -1
        while stream.taken > before:
            before = stream.taken
            for _ in range(100):
                await asyncio.sleep(0)
        putting.cancel()
    share = min(UNWRITTEN_BYTES_MAX, UNWRITTEN_BYTES_TOTAL_MAX // uploads)
    assert share <= stream.taken <= 2 * share


@pytest.mark.parametrize("size", [0, 1, MIB, 4 * MIB, 100 * MIB, 100 * MIB + 1])
async def test_memory_is_used_again_once_its_blocks_are_written(size: int) -> None:
    stream, store = Stream(size), Store()
    async with opened(store) as blocks:
        root = await put_file(counted(stream), V1_2025, blocks)
        await blocks.finish()
    chunks = [bytes([n % 256]) * MIB for n in range(size // MIB)] + [
        bytes([size // MIB % 256]) * (size % MIB)
    ] * bool(size % MIB or not size)
    assert all(Cid.of(cid.codec, data) == cid for cid, data in store.found.items())
    assert set(chunks) <= set(store.found.values())
    assert root in store.found
    assert sum(map(len, stream.buffers)) <= UNWRITTEN_BYTES_MAX * 2


async def test_a_stream_is_not_read_beyond_what_may_come() -> None:
    stream = Stream(100 * MIB)
    async with opened(Store()) as blocks:
        with pytest.raises(LimitExceeded, match="more than 5242885 bytes came") as refused:
            await put_file(counted(stream, 5 * MIB + 5), V1_2025, blocks)
    assert refused.value.code == "limit.blob_bytes"
    assert stream.taken == 5 * MIB + 6
