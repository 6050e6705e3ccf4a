"""What is put: bytes or a CAR, on their way to blocks on the disk.

Reading, hashing and writing go on beside each other; what is in memory is bounded, whatever comes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from wetware.base.tasks import Tasks
from wetware.errors import LimitExceeded, WetwareError
from wetware_blob.format import car
from wetware_blob.format.build import FileTree, Profile, leaf

if TYPE_CHECKING:
    from wetware import rpc
    from wetware_blob.format.cid import Block, Cid
    from wetware_blob.store.store import Hold, Store

UNWRITTEN_BYTES_MAX: Final = 24 << 20
"""Of one upload, in memory: blocks that are hashed or written."""
UNWRITTEN_BYTES_TOTAL_MAX: Final = 64 << 20
"""Of all uploads of a node; those that go on share it evenly."""
HASHED_BYTES: Final = 4 << 20
"""Of a file, by one call in a thread, and less where many uploads share the memory: a call for each
MiB costs a quarter of what hashing does."""
HASHING_MAX: Final = 2
"""Calls of one upload at a time."""
WRITES_MAX: Final = 4
"""Of one upload, at a time, each in a thread: what is handed in meanwhile is written together."""
_INLINE_BYTES: Final = 8 << 10
"""Hashing so few takes less time than to hand them to a thread."""

RunSync = Callable[..., Awaitable[Any]]


class Counted:
    """A stream of which no more than so many bytes are taken.

    Attributes:
        count: Bytes that have come.
    """

    def __init__(self, stream: rpc.ByteStream, bytes_max: int) -> None:
        self._stream, self._bytes_max = stream, bytes_max
        self.count = 0

    async def fill(self, buffer: bytearray) -> memoryview:
        """What fills it, less at the end alone; raises LimitExceeded "limit.blob_bytes"."""
        some = memoryview(buffer)[: self._bytes_max - self.count + 1]
        some = some[: await self._stream.receive_into(some)]
        self.count += len(some)
        if self.count > self._bytes_max:
            raise LimitExceeded(
                f"more than {self._bytes_max} bytes came (bytesMax)",
                hint="say how much it is at most, within what the grant allows",
                code="limit.blob_bytes",
            )
        return some


class Blocks:
    """Blocks of one upload on their way to the disk; what is left on leaving it is cancelled.

    Args:
        store: Where they go.
        hold: Keeps them.
        run_sync: Runs what takes long in a thread.
        uploads: Those that go on at this node, this one included while it is entered.
    """

    def __init__(self, store: Store, hold: Hold, run_sync: RunSync, uploads: set[Blocks]) -> None:
        self._store, self._hold, self.run_sync = store, hold, run_sync
        self._uploads = uploads
        self._tasks = Tasks()
        self._waiting: list[Block] = []
        self._then: list[Callable[[], object]] = []
        self._writes = self._unwritten_bytes = 0
        self._error: WetwareError | None = None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Blocks:
        self._uploads.add(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._uploads.discard(self)
        await self._tasks.end()

    async def put(self, *blocks: Block, then: Callable[[], object] = lambda: None) -> None:
        """Hand blocks in; waits for room, not for the disk. Raises what an earlier one raised.

        `then` is called once they are on the disk, and their memory is not read any more.
        """
        if blocks:
            await self._until(self._has_room)
            self._waiting += blocks
            self._then.append(then)
            self._unwritten_bytes += _size(blocks)
            if self._writes < WRITES_MAX:
                self._writes += 1
                self._tasks.start(self._write())

    async def finish(self) -> None:
        """All that was handed in is on the disk."""
        await self._until(lambda: not self._writes)

    def _has_room(self) -> bool:
        return self._unwritten_bytes < self._share()

    def _share(self) -> int:
        """Of the memory for blocks, bytes."""
        return max(1, min(UNWRITTEN_BYTES_MAX, UNWRITTEN_BYTES_TOTAL_MAX // len(self._uploads)))

    def hashed_bytes(self) -> int:
        """To be hashed by one call: what is hashed comes on top of what has been."""
        return min(HASHED_BYTES, self._share() // 4)

    def hashing(self, profile: Profile, chunks: Sequence[bytes]) -> asyncio.Task[list[Block]]:
        """Chunks on their way to blocks, which are then handed in by who waits for them."""
        return self._tasks.start(self._hash(profile, chunks))

    async def _hash(self, profile: Profile, chunks: Sequence[bytes]) -> list[Block]:
        def hashed() -> list[Block]:
            return [leaf(profile, chunk) for chunk in chunks]

        if sum(map(len, chunks)) <= _INLINE_BYTES:
            return hashed()
        blocks: list[Block] = await self.run_sync(hashed)
        return blocks

    async def _write(self) -> None:
        try:
            while self._waiting and self._error is None:
                blocks, self._waiting = self._waiting, []
                written, self._then = self._then, []
                await self._store.put(self._hold, blocks)
                for then in written:
                    then()
                self._unwritten_bytes -= _size(blocks)
                self._changed.set()
        except WetwareError as exc:
            self._error = self._error or exc
        finally:
            self._writes -= 1
            self._changed.set()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while self._error is None and not ready():
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error


def _size(blocks: Iterable[Block]) -> int:
    return sum(len(block.data) for block in blocks)


async def put_file(stream: Counted, profile: Profile, blocks: Blocks) -> Cid:
    """The file that `stream` is, to its end."""
    tree, size = FileTree(profile), profile.chunk_bytes
    hashing: deque[tuple[bytearray, list[bytes], asyncio.Task[list[Block]]]] = deque()
    free: list[bytearray] = []  # new memory costs as much as what is read into it

    async def take() -> None:
        buffer, chunks, task = hashing.popleft()
        leaves = await task
        made = list(leaves)
        for chunk, block in zip(chunks, leaves, strict=True):
            made += tree.add(block.cid, len(chunk), len(block.data))
        await blocks.put(*made, then=partial(free.append, buffer))

    empty = goes_on = True
    while goes_on:
        length = max(1, blocks.hashed_bytes() // size) * size
        buffer = free.pop() if free else bytearray(length)
        if len(buffer) != length:  # others share the memory, or do not any more
            free.clear()
            buffer = bytearray(length)
        some = await stream.fill(buffer)
        goes_on = len(some) == length
        if some or empty:  # an empty file has one chunk, of no bytes
            parts = [some[at : at + size] for at in range(0, len(some) or 1, size)]
            chunks = cast("list[bytes]", parts)
            hashing.append((buffer, chunks, blocks.hashing(profile, chunks)))
            empty = False
        if len(hashing) >= HASHING_MAX:
            await take()
    while hashing:
        await take()
    root, rest = tree.finish()
    await blocks.put(*rest)
    return root.cid


async def put_car(stream: Counted, blocks: Blocks) -> Cid:
    """The root of the CAR that `stream` is; whether all that it reaches is there is for the pin."""
    reader = car.Reader()
    buffer = bytearray(blocks.hashed_bytes())
    while data := await stream.fill(buffer):
        await blocks.put(*await blocks.run_sync(reader.feed, data))
    return reader.close()
