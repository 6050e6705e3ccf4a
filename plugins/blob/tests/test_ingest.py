"""What is put, on its way to the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from wetware.base.threads import Threads
from wetware.errors import InternalError, LimitExceeded, WetwareError
from wetware_blob.format.build import V1_2025, leaf
from wetware_blob.format.cid import Block
from wetware_blob.ingest import BLOCK_BYTES, UNWRITTEN_BYTES_MAX, Blocks, Counted, put_stream
from wetware_blob.store.pins import Pin

from .memory import Bytes
from .store.parts import ADA, running

pytestmark = pytest.mark.anyio


class Disk:
    """A store that stands still, or fails."""

    def __init__(self, fails: Exception | None = None) -> None:
        self._fails = fails
        self.blocks = 0

    async def put(self, _: object, blocks: Sequence[Block]) -> None:
        self.blocks += len(blocks)
        if self._fails is not None:
            raise self._fails
        await anyio.sleep_forever()


def blocks_to(store: Any) -> Blocks:
    return Blocks(store, None, Threads().run)  # type: ignore[arg-type]  # the store has no use for it


async def test_an_empty_file_is_on_the_disk_when_all_is(tmp_path: Path) -> None:
    async with (
        running(tmp_path / "s") as store,
        store.hold(ADA) as hold,
        Blocks(store, hold, Threads().run) as blocks,
    ):
        root = await put_stream(Counted(Bytes(), 0), V1_2025, blocks)
        await blocks.finish()
        await store.pin(hold, Pin(ADA, root.cid))
        assert await store.get(root.cid.digest) == b""


async def test_blocks_without_bytes_wait_for_room_too() -> None:
    block, handed_in = leaf(V1_2025, b""), 0
    async with blocks_to(Disk()) as blocks:
        with anyio.move_on_after(5):
            while handed_in * BLOCK_BYTES < 2 * UNWRITTEN_BYTES_MAX:
                putting = asyncio.ensure_future(blocks.put(block))
                await asyncio.sleep(0)
                if not putting.done():
                    putting.cancel()
                    break
                handed_in += 1
    assert handed_in * BLOCK_BYTES == UNWRITTEN_BYTES_MAX


@pytest.mark.parametrize(
    ("fails", "told"),
    [(LimitExceeded("full", code="limit.blob_quota"), LimitExceeded), (OSError(), InternalError)],
)
async def test_what_was_not_written_is_told(fails: Exception, told: type[WetwareError]) -> None:
    async with blocks_to(Disk(fails)) as blocks:
        await blocks.put(leaf(V1_2025, b"one"))
        with anyio.fail_after(5), pytest.raises(told) as first:
            await blocks.finish()
        with pytest.raises(told) as again:
            await blocks.put(leaf(V1_2025, b"two"))
    assert first.value is not again.value, "it would collect tracebacks"
