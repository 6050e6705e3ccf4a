"""Copies of a store on their way: a file, through a stream, and a file again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import anyio

from wetware import rpc
from wetware.errors import LimitExceeded

if TYPE_CHECKING:
    from pathlib import Path

CHUNK_BYTES: Final = 1 << 20
COPY_BYTES_MAX: Final = 16 << 30


async def send(source: Path, stream: rpc.ByteStream) -> None:
    """All of a file; the stream goes on."""
    async with await anyio.open_file(source, "rb") as file:
        while chunk := await file.read(CHUNK_BYTES):
            await stream.send(chunk)


async def bring(source: Path, ref: rpc.Ref) -> bytes:
    """A file to who takes it at this stream; returns what they answer at the end."""
    async with rpc.ByteStream(ref) as stream:
        await send(source, stream)
        await stream.send_eof()
        return b"".join([chunk async for chunk in stream])


async def take(stream: rpc.ByteStream, target: Path) -> int:
    """What comes, as a new file (0600) that is on the disk, or none; returns its bytes.

    Raises LimitExceeded.
    """
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    size = 0
    try:
        async with await anyio.open_file(fd, "wb") as file:
            async for chunk in stream:
                if (size := size + len(chunk)) > COPY_BYTES_MAX:
                    raise LimitExceeded(  # noqa: TRY301 the file is removed below
                        f"a backup has at most {COPY_BYTES_MAX} bytes (COPY_BYTES_MAX)"
                    )
                await file.write(chunk)
            await file.flush()
            await anyio.to_thread.run_sync(os.fsync, fd)
    except BaseException:
        os.unlink(target)
        raise
    return size
