"""Byte pipes over RPC: how a client reaches the link of a node that it cannot dial.

The client's node carries the bytes (`Cluster.tunnel`); the noise handshake and the login run inside
them, between the client and the far node, so that the carrier sees ciphertext only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.errors import Disconnected, InvalidArgument, WetwareError
from wetware.protocol import CORE

if TYPE_CHECKING:
    from wetware.link import Pipe

TUNNEL_PROTOCOL = "/wetware/tunnel/1.0.0"
"""The stream that carries a tunnel between two members: raw bytes of a link connection."""
WRITE_BYTES_MAX = 64 << 10
"""Of one `ByteSink.write`."""
BUFFER_BYTES_MAX = 256 << 10
"""Received and not yet read, in each direction; beyond it `write` does not return."""
IN_FLIGHT_MAX = 8
"""Calls of `ByteSink.write` that wait for their answer: bandwidth × round trip over 64 KiB each."""


class _SinkServant(rpc.Servant, interface=CORE.ByteSink):
    """The near end of a pipe, as the far one calls it."""

    def __init__(self, pipe: RpcPipe) -> None:
        self._pipe = pipe

    async def write(self, data: bytes) -> None:
        """Take bytes; return when there is room for more."""
        await self._pipe.feed(data)

    async def end(self) -> None:
        """No more will come."""
        self._pipe.feed_end()

    def released(self) -> None:
        """The far end let go."""
        self._pipe.cut(Disconnected("the other end of the tunnel is gone"))


class RpcPipe:
    """A byte pipe made of two ByteSinks: `servant` is given to the far end, `attach` takes its own.

    Looks like `wetware.link.Pipe`: one task reads, one writes. What ended it is raised from
    then on.
    """

    def __init__(self) -> None:
        self.servant = _SinkServant(self)
        self._ref: rpc.Ref | None = None
        self._received: deque[bytes] = deque()
        self._received_bytes = 0
        self._ended = False
        self._error: WetwareError | None = None
        self._arrived, self._room = asyncio.Event(), asyncio.Event()
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._closing = False

    def attach(self, ref: rpc.Ref) -> RpcPipe:
        """The far end's sink."""
        self._ref = ref
        return self

    # --- what the far end does ---

    async def feed(self, data: bytes) -> None:
        """Bytes have come; waits while the buffer is full. Raises what cut the pipe."""
        if len(data) > WRITE_BYTES_MAX:
            raise InvalidArgument(f"a write of {len(data)} bytes; at most {WRITE_BYTES_MAX}")
        if self._ended:
            raise InvalidArgument("bytes after the end of the pipe")
        if self._received_bytes > BUFFER_BYTES_MAX + IN_FLIGHT_MAX * WRITE_BYTES_MAX:
            # Who waits for answers never gets here.
            self.cut(Disconnected("the other end of the tunnel does not wait"))
        if self._error is None and data:
            self._received.append(data)
            self._received_bytes += len(data)
            self._arrived.set()
        while self._error is None and self._received_bytes > BUFFER_BYTES_MAX:
            self._room.clear()
            await self._room.wait()
        if self._error is not None:
            raise self._error

    def feed_end(self) -> None:
        """The far end has no more bytes."""
        self._ended = True
        self._arrived.set()

    def cut(self, error: WetwareError) -> None:
        """End both directions now. Idempotent: the first reason stays."""
        if self._error is not None:
            return
        self._error = error
        self._received.clear()
        self._received_bytes = 0
        self._arrived.set()
        self._room.set()
        for call in self._in_flight:
            call.cancel()
        if self._ref is not None:
            self._ref.close()

    # --- Pipe ---

    async def read(self) -> bytes:
        """The next bytes; b"" at the end. Raises WetwareError if the pipe was cut."""
        while not self._received:
            if self._ended:
                return b""
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        data = self._received.popleft()
        self._received_bytes -= len(data)
        if self._received_bytes <= BUFFER_BYTES_MAX:
            self._room.set()
        return data

    async def write(self, data: bytes) -> None:
        """Send bytes; returns when they are on their way and there is room for more."""
        for at in range(0, len(data), WRITE_BYTES_MAX):
            while len(self._in_flight) >= IN_FLIGHT_MAX and self._error is None:
                await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            if self._error is not None:
                raise self._error
            self._call("write", data=bytes(data[at : at + WRITE_BYTES_MAX]))

    def _call(self, method: str, **params: object) -> None:
        if self._ref is None:
            raise RuntimeError("the pipe has no far end yet")
        with rpc.time_limit(None):  # it waits as long as the far end has no room
            call = asyncio.ensure_future(self._ref.call(method, **params))
        self._in_flight.add(call)
        call.add_done_callback(self._called)

    def _called(self, call: asyncio.Task[Any]) -> None:
        self._in_flight.discard(call)
        if self._closing and not self._in_flight:
            self.cut(Disconnected("the tunnel was closed"))
        if not call.cancelled() and (exc := call.exception()) is not None:
            self.cut(exc if isinstance(exc, WetwareError) else Disconnected("the tunnel failed"))

    def close(self) -> None:
        """End after what was written; nothing is read any more. Idempotent, returns at once."""
        if self._closing or self._error is not None:
            return
        self._closing = True
        if self._ref is None:
            self.abort()
        else:
            self._call("end")

    def abort(self) -> None:
        """End now. Idempotent."""
        self.cut(Disconnected("the tunnel was closed"))


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
        target.close()
        source.abort()
    except BaseException:
        left.abort()
        right.abort()
        raise
    finally:
        forth.cancel()
        back.cancel()
        await asyncio.gather(forth, back, return_exceptions=True)


async def _carry(source: Pipe, target: Pipe) -> None:
    while data := await source.read():
        await target.write(data)
