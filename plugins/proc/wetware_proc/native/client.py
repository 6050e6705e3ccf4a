"""Native programs for clients: the service itself, which `session.proc` uses, and their ports."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

from anyio import ClosedResourceError, EndOfStream

from wetware import rpc
from wetware.base.sockets import accept
from wetware.base.tasks import Tasks
from wetware.errors import ConfigError, Disconnected, WetwareError
from wetware_proc.schema import SCHEMA

__all__ = ["Native", "forwarded"]

_BACKLOG = 64
_READ_BYTES = 64 << 10


class Native:
    """The service `native` of a session: `session.proc` calls it where a `kind` is "native".

    Args:
        ref: A reference to a Native.
    """

    INTERFACE = SCHEMA.Native

    def __init__(self, ref: Any) -> None:
        self.call = ref.call


@contextlib.asynccontextmanager
async def forwarded(port: rpc.Ref, number: int) -> AsyncIterator[int]:
    """Listen on this machine's loopback interface for a `Ww.Port`; the block gets the number.

    Each connection there becomes one of the port; where that refuses, it is closed. `number` 0 is
    any that is free. Raises ConfigError "config.listen".
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    tasks = Tasks()

    async def lead(sock: socket.socket) -> None:
        try:
            stream = rpc.ByteStream((await port.call("connect"))["stream"])
        except WetwareError:
            sock.close()
            return
        await carried(stream, sock)

    async def listen() -> None:
        while True:
            tasks.start(lead(await accept(listener)))

    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        try:
            listener.bind(("127.0.0.1", number))
        except OSError as exc:
            raise ConfigError(
                f"cannot listen at 127.0.0.1:{number}: {exc.strerror}",
                hint="choose another port; 0 is any that is free",
                code="config.listen",
            ) from None
        listener.listen(_BACKLOG)
        tasks.start(listen())
        try:
            yield listener.getsockname()[1]
        finally:
            await tasks.end()


async def carried(stream: rpc.ByteStream, sock: socket.socket) -> None:
    """Join a stream and a socket until both ways have ended, or one fails; ends both."""
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
