"""The provider's end: blocks of the store, to members that ask for them.

What is in memory is bounded, however many ask for how much: of a stream one block is sent and the
next few are read, and the blocks of a peer, and of all, are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from wetware.base.bounds import Claim, Places
from wetware.base.log import get_logger
from wetware.errors import WetwareError
from wetware.hookspecs import Access
from wetware_blob.exchange import wire
from wetware_blob.format.cid import BLOCK_BYTES_MAX

if TYPE_CHECKING:
    from wetware.hookspecs import Overlay
    from wetware.identity import PeerId
    from wetware.overlay.link import Stream

log = get_logger("blob.serve")

STREAMS_MAX: Final = 256
STREAMS_PER_PEER_MAX: Final = 32
"""A member has one for each of its fetches."""
BLOCKS_MAX: Final = 32
"""In memory, of all streams; of up to 2 MiB each."""
BLOCKS_PER_PEER_MAX: Final = 8
STALL_S: Final = 15.0
"""For a peer to take a piece of a block, which is in a place that others may wait for."""
_AT_A_TIME: Final = 4  # of one stream: the disk is read while the network is written
_PIECE_BYTES: Final = 256 << 10

Get = Callable[[bytes], Awaitable[bytes]]


def serve(overlay: Overlay, get: Get) -> Callable[[], None]:
    """Serve the protocol to members; returns a function that ends the registration.

    Args:
        overlay: Streams.
        get: A block by its digest. A WetwareError is an absent block to the peer.
    """
    places, room = Places(), asyncio.Semaphore(BLOCKS_MAX)
    rooms: WeakValueDictionary[PeerId, asyncio.Semaphore] = WeakValueDictionary()

    async def handle(stream: Stream) -> None:
        peer = stream.peer
        try:
            with places.hold(
                Claim(peer, STREAMS_PER_PEER_MAX, "the peer has STREAMS_PER_PEER_MAX streams"),
                Claim("", STREAMS_MAX, "there are STREAMS_MAX streams"),
            ):
                own = rooms.setdefault(peer, asyncio.Semaphore(BLOCKS_PER_PEER_MAX))
                await _provide(stream, get, (own, room))
        except* (WetwareError, EOFError, TimeoutError) as exc:
            log.debug("stream.ended", peer=peer, reason=exc.exceptions[0])
            stream.reset()

    return overlay.handle(wire.PROTOCOL, handle, access=Access.MEMBER)


async def _provide(stream: Stream, get: Get, rooms: Sequence[asyncio.Semaphore]) -> None:
    """Answer what the peer wants, in order, until it closes its side."""
    wants: deque[bytes] = deque()
    reading = asyncio.Lock()
    last = asyncio.Event()  # the turn of who read the latest want
    last.set()

    async def answer() -> None:
        nonlocal last
        while True:
            async with contextlib.AsyncExitStack() as block:
                async with reading:
                    if not wants:
                        wants.extend(await wire.read_want(stream))
                    if not wants:
                        return
                    # In the order of the turns: who has a room never waits for one who has none.
                    for room in rooms:
                        await block.enter_async_context(room)
                    digest = wants.popleft()
                    before, last = last, asyncio.Event()
                    mine = last
                data = await _find(get, digest)
                await before.wait()
                await _send(stream, data)
            mine.set()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(_AT_A_TIME):
            tasks.create_task(answer())


async def _find(get: Get, digest: bytes) -> bytes | None:
    try:
        data = await get(digest)
    except WetwareError as exc:  # the store has told the operator of what is damaged
        log.debug("block.absent", digest=digest.hex(), reason=exc)
        return None
    return data if len(data) <= BLOCK_BYTES_MAX else None


async def _send(stream: Stream, data: bytes | None) -> None:
    if data is None:
        await stream.write(wire.ABSENT_FRAME)
        return
    await stream.write(wire.head(data))
    view = memoryview(data)
    for at in range(0, len(view), _PIECE_BYTES):
        async with asyncio.timeout(STALL_S):
            await stream.write(view[at : at + _PIECE_BYTES])
