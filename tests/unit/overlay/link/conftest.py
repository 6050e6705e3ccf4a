"""Real hosts on loopback, and a raw peer that speaks just as much of the protocol as it likes."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key, PeerId
from wetware.overlay.link import LinkHost, LinkLimits, Stream
from wetware.overlay.link.multistream import HELLO, LineReader, encode_line
from wetware.overlay.link.noise import NoiseHandshake, NoiseIdentity, Secured
from wetware.testing import tasks_of_core

HEADER = struct.Struct("!BBHII")
DEADLINE_S = 60.0


async def until(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition of which no event tells; fails at the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.002)


def streams(host: LinkHost) -> int:
    """How many are open."""
    return sum(len(conn.streams) for conn in host.connections())


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


@dataclass
class RawPeer:
    """A TCP connection to a host, driven by hand."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    key: Key = field(default_factory=Key.generate)
    secured: Secured | None = None
    plain: bytearray = field(default_factory=bytearray)

    @classmethod
    async def connect(cls, addr: Multiaddr, source: str | None = None) -> RawPeer:
        """Connect from address `source`, e.g. another one of 127.0.0.0/8."""
        return cls(
            *await asyncio.open_connection(
                addr.host, addr.port, limit=1 << 24, local_addr=(source, 0) if source else None
            )
        )

    async def secure(self, identity: NoiseIdentity | None = None) -> RawPeer:
        """Multistream, noise and yamux, as an honest dialler."""
        self.writer.write(HELLO + encode_line("/noise"))
        await self.expect_lines("/multistream/1.0.0", "/noise")
        noise = NoiseHandshake(identity or NoiseIdentity(self.key), initiator=True)
        self.send_plain_message(noise.write_message())
        noise.read_message(await self.read_plain_message())
        self.send_plain_message(noise.write_message())
        self.secured = noise.secured
        self.send(HELLO + encode_line("/yamux/1.0.0"))
        await self.expect_lines("/multistream/1.0.0", "/yamux/1.0.0")
        return self

    async def expect_lines(self, *expected: str) -> None:
        lines = LineReader()
        for text in expected:
            while (line := lines.line()) is None:
                lines.feed(
                    await self.reader.readexactly(1) if not self.secured else await self.recv()
                )
            assert line == text
        self.plain[:0] = lines.rest()

    def send_plain_message(self, message: bytes) -> None:
        self.writer.write(len(message).to_bytes(2, "big") + message)

    async def read_plain_message(self) -> bytes:
        return await self.reader.readexactly(
            int.from_bytes(await self.reader.readexactly(2), "big")
        )

    def send(self, data: bytes) -> None:
        """Encrypt and send, in messages of at most 60,000 bytes."""
        assert self.secured is not None
        for at in range(0, len(data), 60_000):
            self.send_plain_message(self.secured.send.encrypt(data[at : at + 60_000]))

    def frame(self, kind: int, flags: int, stream_id: int, size: int, body: bytes = b"") -> None:
        self.send(HEADER.pack(0, kind, flags, stream_id, size) + body)

    async def recv(self) -> bytes:
        """One decrypted message."""
        assert self.secured is not None
        return self.secured.receive.decrypt(await self.read_plain_message())

    async def recv_frame(self) -> tuple[int, int, int, int, bytes]:
        """(type, flags, stream, length, body of a data frame)."""

        async def need(n: int) -> None:
            while len(self.plain) < n:
                self.plain += await self.recv()

        async with asyncio.timeout(DEADLINE_S):
            await need(12)
            _, kind, flags, stream_id, size = HEADER.unpack_from(self.plain)
            body_bytes = size if kind == 0 else 0
            await need(12 + body_bytes)
            body = bytes(self.plain[12 : 12 + body_bytes])
            del self.plain[: 12 + body_bytes]
            return kind, flags, stream_id, size, body

    async def cut_off(self, deadline_s: float = DEADLINE_S) -> bool:
        """Wait until the host has closed the connection; False at the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                while await self.reader.read(1 << 16):
                    pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    async def aclose(self) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class Network:
    """Makes hosts and raw peers, and closes them after the test."""

    until = staticmethod(until)
    streams = staticmethod(streams)
    echo = staticmethod(echo)
    deadline_s = DEADLINE_S

    def __init__(self) -> None:
        self.stack = contextlib.AsyncExitStack()

    async def host(
        self,
        limits: LinkLimits | None = None,
        *,
        listen: bool = True,
        key: Key | None = None,
        privileged: Callable[[PeerId], bool] = lambda _: False,
    ) -> LinkHost:
        host = await self.stack.enter_async_context(
            LinkHost(key or Key.generate(), limits=limits or LinkLimits(), privileged=privileged)
        )
        host.handle("/echo", echo, access=Access.PUBLIC)
        if listen:
            await host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
        return host

    @staticmethod
    def cancel_after(host: LinkHost, task: asyncio.Task[Any], turns: int) -> None:
        """Cancel a task so many turns of the loop after the next connection of `host` is up."""

        def step(left: int) -> None:
            if left:
                asyncio.get_running_loop().call_soon(step, left - 1)
            else:
                task.cancel()

        end = host.watch(lambda _: (step(turns), end()), lambda _: None)

    async def hung(self) -> Multiaddr:
        """Where connections are accepted and nothing is ever said."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        self.stack.callback(server.close)
        return Multiaddr("ip4", "127.0.0.1", server.sockets[0].getsockname()[1])

    async def raw(self, host: LinkHost, source: str | None = None) -> RawPeer:
        """A bare TCP connection."""
        raw = await RawPeer.connect(host.listen_addrs[0], source)
        self.stack.push_async_callback(raw.aclose)
        return raw

    async def secured(
        self, host: LinkHost, *, key: Key | None = None, source: str | None = None
    ) -> RawPeer:
        """An authenticated raw peer."""
        raw = await self.raw(host, source)
        async with asyncio.timeout(DEADLINE_S):
            return await raw.secure(NoiseIdentity(key or raw.key))

    async def busy(self, host: LinkHost, **how: Any) -> RawPeer:
        """An authenticated raw peer with one echo stream."""
        raw = await self.secured(host, **how)
        lines = HELLO + encode_line("/echo")
        raw.frame(0, 1, 1, len(lines), lines)
        answer = b""
        while answer != lines:
            answer += (await raw.recv_frame())[4]
        return raw


@pytest.fixture
async def net(anyio_backend: str) -> AsyncIterator[Network]:
    network = Network()
    async with network.stack:
        yield network
    assert tasks_of_core() == [], "a host leaves no task behind"
