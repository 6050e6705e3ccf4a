"""Paths with a delay, in one process: `python delay.py MS PORT [MS PORT…]`.

Each listens on a port of its own, which are printed, and what a connection to it says is said at
127.0.0.1:PORT that much later, both ways. It ends TCP: so TCP's slow start and its windows never
meet the delay, but all that is above TCP does. In Python because netem is not in every kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import deque

WAITING_BYTES_MAX = 64 << 20
"""On their way, in each direction: more than 20 ms of anything that these benchmarks send."""


class End(asyncio.Protocol):
    """One socket of a connection; `other` says what this one hears."""

    other: End

    def __init__(self, delay_s: float) -> None:
        self._delay_s, self._loop = delay_s, asyncio.get_running_loop()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._full = False  # its socket takes no more

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(WAITING_BYTES_MAX)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._loop.call_later(self._delay_s, self._pass)
        self._read_or_not()

    def _pass(self) -> None:
        data = self._waiting.popleft()
        self._waiting_bytes -= len(data)
        self.other.transport.write(data)
        self._read_or_not()

    def _read_or_not(self) -> None:
        if self.transport.is_closing():
            return
        if self._waiting_bytes > WAITING_BYTES_MAX or self.other._full:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self._full = True
        self.other._read_or_not()

    def resume_writing(self) -> None:
        self._full = False
        self.other._read_or_not()

    def eof_received(self) -> bool:
        self._loop.call_later(self._delay_s, self._pass_eof)
        return True  # the other direction stays open

    def _pass_eof(self) -> None:
        with contextlib.suppress(OSError):  # it has ended as well, meanwhile
            self.other.transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._loop.call_later(self._delay_s, self.other.transport.close)


class Near(End):
    """The one that was connected to: it hears nothing until the far end is there."""

    def __init__(self, delay_s: float, port: int) -> None:
        super().__init__(delay_s)
        self._port = port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        self.other = End(self._delay_s)
        self.other.other = self
        await self._loop.create_connection(lambda: self.other, "127.0.0.1", self._port)
        self.transport.resume_reading()


async def main(delays_ms: list[int], targets: list[int]) -> None:
    loop, ports = asyncio.get_running_loop(), []
    for ms, target in zip(delays_ms, targets, strict=True):
        server = await loop.create_server(
            lambda ms=ms, target=target: Near(ms / 1000, target),  # type: ignore[misc]
            "127.0.0.1",
        )
        ports.append(server.sockets[0].getsockname()[1])
    print(json.dumps({"ports": ports}), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the parent is done or gone


if __name__ == "__main__":
    numbers = [int(arg) for arg in sys.argv[1:]]
    asyncio.run(main(numbers[::2], numbers[1::2]))
