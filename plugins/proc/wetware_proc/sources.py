"""Reading what a `Ww.Source` has: another's, who may say one thing and send another."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from wetware import rpc
from wetware.errors import InvalidArgument, LimitExceeded


async def file_bytes(path: str | os.PathLike[str], what: str = "") -> bytes:
    """A file of the user's, `what` for people; raises InvalidArgument "invalid.unreadable"."""
    try:
        return await asyncio.get_running_loop().run_in_executor(None, Path(path).read_bytes)
    except OSError as exc:
        raise InvalidArgument(
            f"cannot read {what}{os.fspath(path)!r}: {exc.strerror}", code="invalid.unreadable"
        ) from exc


async def size_of(source: rpc.Ref, what: str, bytes_max: int) -> int:
    """How many bytes it says to have; raises LimitExceeded for more than `bytes_max`."""
    size: int = (await source.call("stat"))["size"]
    if size > bytes_max:
        raise LimitExceeded(f"{what} of {size} bytes; at most {bytes_max} are taken")
    return size


async def read(
    source: rpc.Ref, what: str, size: int, take: Callable[[bytes], Awaitable[object] | object]
) -> None:
    """Give all of it to `take`, piece by piece; raises InvalidArgument where it has not `size`."""
    reply, left = await source.call("read", start=0, end=size), size
    if reply["stream"] is None:
        raise InvalidArgument(f"the source of {what} has given no stream")
    async with rpc.ByteStream(reply["stream"]) as stream:
        async for data in stream:
            left -= len(data)
            if left < 0:
                break
            if (taking := take(data)) is not None:
                await taking  # type: ignore[misc]  # what is awaitable
    if left:
        raise InvalidArgument(f"{what} of {size} bytes has another length than it says")


@contextlib.asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """Raise LimitExceeded where the block takes longer."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise LimitExceeded(
            f"the source has not given {what} within {seconds:g} s (READ_S)"
        ) from None
