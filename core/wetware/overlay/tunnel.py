"""How a client reaches the link of a node that it cannot dial: through a stream of its own node.

The client's node carries the bytes (`Cluster.tunnel`); the noise handshake and the login run inside
them, between the client and the far node, so that the carrier sees ciphertext only.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from wetware.errors import Disconnected, WetwareError

if TYPE_CHECKING:
    from wetware.overlay.link import Pipe
    from wetware.rpc import ByteStream

TUNNEL_PROTOCOL = "/wetware/tunnel/1.0.0"
"""The stream that carries a tunnel between two members: raw bytes of a link connection."""


class TunnelPipe:
    """An RPC byte stream as a `wetware.overlay.link.Pipe`."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._closing: asyncio.Task[None] | None = None

    async def read(self) -> bytes:
        from anyio import EndOfStream  # clients import this module: 20 ms and more

        try:
            return await self._stream.receive()
        except EndOfStream:
            return b""

    async def write(self, data: bytes) -> None:
        await self._stream.send(data)

    def finish(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        with contextlib.suppress(WetwareError):  # it has ended: how is of no interest
            await self._stream.send_eof()
        await self._stream.aclose()

    def reset(self) -> None:
        self._stream.abort(Disconnected("the tunnel was closed"))


async def relay(left: Pipe, right: Pipe) -> None:
    """Carry bytes both ways until one end has no more, or fails; both pipes have ended then.

    Raises what failed. What the end that is done had said before still arrives.
    """
    forth = asyncio.ensure_future(_carry(left, right))
    back = asyncio.ensure_future(_carry(right, left))
    try:
        done, _ = await asyncio.wait((forth, back), return_when=asyncio.FIRST_COMPLETED)
        source, target = (left, right) if forth in done else (right, left)
        for way in done:
            way.result()
        target.finish()
        source.reset()
    except BaseException:
        left.reset()
        right.reset()
        raise
    finally:
        forth.cancel()
        back.cancel()
        await asyncio.gather(forth, back, return_exceptions=True)


async def _carry(source: Pipe, target: Pipe) -> None:
    while data := await source.read():
        await target.write(data)
