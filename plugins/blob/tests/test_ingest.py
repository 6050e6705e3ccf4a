"""What an upload has in memory while the disk is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.errors import InvalidArgument
from wetware_blob.format.build import V1_2025
from wetware_blob.format.cid import Block
from wetware_blob.ingest import (
    ENTRY_BYTES,
    UNWRITTEN_BYTES_MAX,
    UNWRITTEN_BYTES_TOTAL_MAX,
    Blocks,
    Counted,
    Entries,
    put_file,
    put_tree,
)
from wetware_blob.records import DEPTH_MAX, Writer

from .memory import Bytes

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("uploads", [1, 8, 32])
async def test_many_uploads_share_the_memory_for_blocks(uploads: int) -> None:
    """The disk writes nothing; each reads on until it is kept waiting, up to twice its share."""
    taken = 0

    async def put(*_: object) -> None:
        await asyncio.Event().wait()

    async def run_sync(function: Callable[..., Any], *args: object) -> Any:
        return function(*args)

    async def read() -> bytes:
        nonlocal taken
        taken += 256 << 10
        return bytes(256 << 10)

    store: Any = SimpleNamespace(put=put)
    hold: Any = None
    async with Blocks(store, hold, run_sync, lambda: uploads) as blocks:
        putting = asyncio.create_task(put_file(read, V1_2025, blocks))
        before = -1
        while taken > before:
            before = taken
            for _ in range(100):
                await asyncio.sleep(0)
        putting.cancel()
    share = min(UNWRITTEN_BYTES_MAX, UNWRITTEN_BYTES_TOTAL_MAX // uploads)
    assert share <= taken <= 2 * share


@pytest.mark.parametrize("whole", [True, False])
async def test_a_tree_as_deep_as_may_be_and_the_memory_for_its_names(whole: bool) -> None:
    """It is given back at the end, and where the tree breaks off in the middle."""
    entries, put, sent = Entries(), list[Block](), Bytes()
    writer = Writer(sent)
    for depth in range(DEPTH_MAX):
        await writer.record("directory", "d" * min(depth, 1))
        await writer.record("symlink", "l", b"d")
    if whole:
        for _ in range(DEPTH_MAX):
            await writer.record("end")

    async def keep(_: object, blocks: list[Block]) -> None:
        put.extend(blocks)

    async def run_sync(function: Callable[..., Any], *args: object) -> Any:
        return function(*args)

    store: Any = SimpleNamespace(put=keep)
    most = 0

    def take(nbytes: int) -> None:
        nonlocal most
        entries.take("local:ada", nbytes)
        most = max(most, entries._bytes.total())

    async with Blocks(store, None, run_sync) as blocks:  # type: ignore[arg-type]
        if whole:
            root = await put_tree(Counted(sent, 1 << 30), V1_2025, blocks, take)
            await blocks.finish()
            assert root == put[-1].cid
            assert len({block.cid for block in put}) == DEPTH_MAX + 1
        else:
            with pytest.raises(InvalidArgument, match="before its end"):
                await put_tree(Counted(sent, 1 << 30), V1_2025, blocks, take)
    assert most >= ENTRY_BYTES * DEPTH_MAX
    assert not entries._bytes
