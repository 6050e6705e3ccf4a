"""Streams, some bytes or items at a time."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import TYPE_CHECKING, Final, TypeVar

from anyio import EndOfStream

if TYPE_CHECKING:
    from anyio.abc import ByteReceiveStream

T = TypeVar("T")

CHUNK_BYTES: Final = 1 << 20
"""Read or written by one call in a thread."""


async def received(stream: ByteReceiveStream, max_bytes: int = CHUNK_BYTES) -> bytes:
    """The next bytes of a stream; b"" at its end."""
    try:
        return await stream.receive(max_bytes)
    except EndOfStream:
        return b""


async def pieces(stream: ByteReceiveStream) -> AsyncIterator[bytes]:
    """What comes, in pieces as large as it comes in."""
    while data := await received(stream):
        yield data


async def batches(
    items: AsyncIterable[T], most: int, size: Callable[[T], int]
) -> AsyncIterator[list[T]]:
    """Items as they come, as many at a time as their sizes make `most`, or a little more."""
    batch, total = [], 0
    async for item in items:
        batch.append(item)
        total += size(item)
        if total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
