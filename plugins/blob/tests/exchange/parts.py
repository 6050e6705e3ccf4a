"""Members in one process: stores in memory, and providers that do what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from wetware.base.threads import Threads
from wetware.errors import NotFound, WetwareError
from wetware.hookspecs import Access
from wetware.identity import PeerId
from wetware.overlay.link import Stream
from wetware.testing import FakeOverlay, Started
from wetware_blob.exchange import wire
from wetware_blob.exchange.exchange import Exchange
from wetware_blob.format.cid import RAW, Block, Cid

if TYPE_CHECKING:
    from wetware_blob.store.store import Store


def blocks_of(count: int, size: int = 20_000, seed: int = 7) -> list[Block]:
    """So many different ones."""
    rng = random.Random(seed)
    made = [rng.randbytes(size) for _ in range(count)]
    return [Block(Cid.of(RAW, data), data) for data in made]


class MemoryStore:
    """`store.Store` without a disk.

    Attributes:
        blocks: By digest.
        writable: Writes wait while it is not set.
        fails: What the next write raises.
        holds: That are open.
        finished: Whether the last one ended without an error.
        read: Digests, in the order in which `get` was asked for them.
    """

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self.blocks = {block.cid.digest: block.data for block in blocks}
        self.writable = asyncio.Event()
        self.writable.set()
        self.fails: WetwareError | None = None
        self.finished = False
        self.holds: list[tuple[str, Cid | None]] = []
        self.read: list[bytes] = []

    async def have(self, digests: Collection[bytes]) -> set[bytes]:
        return {digest for digest in digests if digest in self.blocks}

    async def get(self, digest: bytes) -> bytes:
        self.read.append(digest)
        if digest not in self.blocks:
            raise NotFound("no such block")
        return self.blocks[digest]

    @contextlib.asynccontextmanager
    async def hold(self, owner: str, root: Cid | None = None) -> AsyncIterator[str]:
        self.holds.append((owner, root))
        self.finished = False
        try:
            yield owner
            self.finished = True
        finally:
            self.holds.remove((owner, root))

    async def put(self, hold: Any, blocks: Sequence[Block]) -> None:
        assert any(owner == hold for owner, _ in self.holds)
        await self.writable.wait()
        if self.fails is not None:
            raise self.fails
        self.blocks |= {block.cid.digest: block.data for block in blocks}


def found(*peers: PeerId) -> Callable[[Cid], AsyncGenerator[PeerId, None]]:
    """They are who may have any root."""

    async def find(root: Cid) -> AsyncGenerator[PeerId, None]:
        for peer in peers:
            yield peer

    return find


@contextlib.asynccontextmanager
async def exchange_on(
    overlay: FakeOverlay,
    store: MemoryStore,
    find: Callable[[Cid], AsyncGenerator[PeerId, None]] | None = None,
) -> AsyncIterator[Exchange]:
    """A running one."""
    run_sync = Threads().run
    made = Exchange(overlay, cast("Store", store), find=find or found(), run_sync=run_sync)
    ready = Started()
    task = asyncio.create_task(made.run(task_status=ready))
    await ready.wait()
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


class Provider:
    """One that answers as a test says.

    Args:
        overlay: Where it is served.
        answer: Gets the number of the want, from 0 over all streams, its digest and the stream;
            returns what is sent.

    Attributes:
        asked: Digests that came.
        streams: That are open.
    """

    def __init__(
        self,
        overlay: FakeOverlay,
        answer: Callable[[int, bytes, Stream], Any],
    ) -> None:
        self.peer = overlay.peer_id
        self.asked: list[bytes] = []
        self.streams = 0
        self._answer = answer
        overlay.handle(wire.PROTOCOL, self._serve, access=Access.MEMBER)

    async def _serve(self, stream: Stream) -> None:
        self.streams += 1
        try:
            while digests := await wire.read_want(stream):
                for digest in digests:
                    self.asked.append(digest)
                    data = self._answer(len(self.asked) - 1, digest, stream)
                    if asyncio.iscoroutine(data):
                        data = await data
                    if stream.closing:
                        return
                    await stream.write(data)
        finally:
            self.streams -= 1


def framed(data: bytes) -> bytes:
    """A block as an answer."""
    return wire.head(data) + data


async def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Wait for what other tasks of this process bring about."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # of many kinds
            await asyncio.sleep(0.002)
