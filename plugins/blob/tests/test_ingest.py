"""What an upload has in memory while the disk is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from wetware_blob.format.build import V1_2025
from wetware_blob.ingest import (
    UNWRITTEN_BYTES_MAX,
    UNWRITTEN_BYTES_TOTAL_MAX,
    Blocks,
    put_file,
)

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
    others = {Blocks(store, hold, run_sync, set()) for _ in range(uploads - 1)}
    async with Blocks(store, hold, run_sync, others) as blocks:
        putting = asyncio.create_task(put_file(read, V1_2025, blocks))
        before = -1
        while taken > before:
            before = taken
            for _ in range(100):
                await asyncio.sleep(0)
        putting.cancel()
    share = min(UNWRITTEN_BYTES_MAX, UNWRITTEN_BYTES_TOTAL_MAX // uploads)
    assert share <= taken <= 2 * share
