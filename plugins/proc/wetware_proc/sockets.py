"""A socket and a byte stream, joined."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Final

from anyio import ClosedResourceError, EndOfStream

from wetware.errors import Disconnected, WetwareError

if TYPE_CHECKING:
    from wetware import rpc

_READ_BYTES: Final = 64 << 10


async def carried(stream: rpc.ByteStream, sock: socket.socket) -> None:
    """Carry both ways until both have ended, or one fails; ends both."""
    loop = asyncio.get_running_loop()

    async def out() -> None:
        try:
            while data := await loop.sock_recv(sock, _READ_BYTES):
                await stream.send(data)
            await stream.send_eof()
        except OSError as exc:
            stream.abort(Disconnected(f"the connection was lost: {exc.strerror}"))

    async def back() -> None:
        try:
            while True:
                await loop.sock_sendall(sock, await stream.receive(_READ_BYTES))
        except EndOfStream:
            sock.shutdown(socket.SHUT_WR)

    ways = [asyncio.ensure_future(way) for way in (out(), back())]
    try:
        await asyncio.gather(*ways)
    except (WetwareError, OSError, ClosedResourceError):
        pass  # who is at the ends sees it there
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        sock.close()
        await stream.aclose()
