"""The link beside plain asyncio TCP, in one run: `python tests/bench/bench_link.py`.

Two processes on this machine over loopback; the link is encrypted (noise, ChaCha20-Poly1305) and
multiplexed (yamux), TCP is neither. Rounds alternate, so that noise of the machine hits both.

The second part saturates the connection with a transfer, to the server, from it, or both, and times
64-byte echoes on it meanwhile: on an ordinary stream and on an urgent one, in turn; then the same
over a path of 20 Mbit/s, shaped by a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key
from wetware.overlay.link import Connection, LinkHost, Stream

ECHO, SINK, PUSH = "/bench/echo/1", "/bench/sink/1", "/bench/push-echo/1"
SOURCE, URGENT = "/bench/source/1", "/bench/urgent-echo/1"
CHUNK_BYTES = 64 << 10
ECHOES_S = 10  # after which a round of echoes is short: on a slow path one may take seconds
SLOW_BYTES_PER_S = 20_000_000 // 8


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def push_echo(stream: Stream) -> None:
    """The synchronous face: what an RPC transport uses."""
    done = asyncio.Event()

    def on_data(data: bytes | bytearray | memoryview) -> None:
        stream.write_nowait(data)
        stream.consumed(len(data))

    stream.attach(on_data, lambda exc: done.set())
    await done.wait()


async def sink(stream: Stream) -> None:
    total = 0
    while data := await stream.read():
        total += len(data)
    await stream.write(total.to_bytes(8, "big"))


async def source(stream: Stream) -> None:
    """Send until the peer resets the stream."""
    chunk = os.urandom(CHUNK_BYTES)
    while True:
        await stream.write(chunk)


def make_urgent(stream: Stream) -> Stream:
    if hasattr(stream, "urgent"):  # to compare with a link that has no such thing
        stream.urgent = True
    return stream


async def tcp_serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    kind, total = await reader.readexactly(1), 0
    try:
        while data := await reader.read(CHUNK_BYTES):
            total += len(data)
            if kind == b"e":
                writer.write(data)
                await writer.drain()
        writer.write(total.to_bytes(8, "big"))
        await writer.drain()
    finally:
        writer.close()


async def serve() -> None:
    # As a member: strangers may open fewer streams a second than are measured here.
    async with LinkHost(Key.generate(), privileged=lambda _: True) as host:
        host.handle(ECHO, echo, access=Access.PUBLIC)
        host.handle(SINK, sink, access=Access.PUBLIC)
        host.handle(PUSH, push_echo, access=Access.PUBLIC)
        host.handle(SOURCE, source, access=Access.PUBLIC)
        host.handle(URGENT, lambda stream: echo(make_urgent(stream)), access=Access.PUBLIC)
        (addr,) = await host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
        server = await asyncio.start_server(tcp_serve, "127.0.0.1", 0)
        print(
            json.dumps({"link": str(addr), "tcp": server.sockets[0].getsockname()[1]}), flush=True
        )
        await asyncio.to_thread(sys.stdin.read)  # until the parent is done or gone
        server.close()


async def echo_us(
    write: Callable[[], Awaitable[None]], read: Callable[[], Awaitable[bytes]], count: int
) -> list[float]:
    out, end = [], time.perf_counter() + ECHOES_S
    for _ in range(count):
        start = time.perf_counter()
        await write()
        await read()
        out.append((time.perf_counter() - start) * 1e6)
        if start > end:
            break
    return out


async def tcp_one_way(port: int, total: int) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    chunk = os.urandom(CHUNK_BYTES)
    start = time.perf_counter()
    writer.write(b"s")
    for _ in range(total // CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    writer.write_eof()
    if int.from_bytes(await reader.readexactly(8), "big") != total:
        raise AssertionError("bytes were lost")
    took = time.perf_counter() - start
    writer.close()
    await writer.wait_closed()
    return total / 1e6 / took


async def link_one_way(open_stream: Callable[[str], Awaitable[Stream]], total: int) -> float:
    stream = await open_stream(SINK)
    chunk = os.urandom(CHUNK_BYTES)
    start = time.perf_counter()
    for _ in range(total // CHUNK_BYTES):
        await stream.write(chunk)
    stream.close()
    if int.from_bytes(await stream.read_exactly(8), "big") != total:
        raise AssertionError("bytes were lost")
    return total / 1e6 / (time.perf_counter() - start)


async def relay(port: int) -> None:
    """A slow path to `port`: 20 Mbit/s each way, with the small buffers that a router should have.

    Each direction passes on 12 KB every 4.8 ms, so that no more than that waits in here.
    """
    piece = 12_000

    async def pump(source: socket.socket, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while data := await loop.sock_recv(source, piece):
            due = max(due, loop.time()) + len(data) / SLOW_BYTES_PER_S
            await asyncio.sleep(due - loop.time())
            await loop.sock_sendall(target, data)
        target.shutdown(socket.SHUT_WR)

    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
        server.setblocking(False)
        print(server.getsockname()[1], flush=True)
        near, _ = await loop.sock_accept(server)
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        await loop.sock_connect(far, ("127.0.0.1", port))
        with near, far, contextlib.suppress(OSError):
            await asyncio.gather(pump(near, far), pump(far, near))


class Transfer:
    """Saturates a connection in one or both directions, and counts."""

    def __init__(self, conn: Connection, direction: str) -> None:
        self.conn, self.direction, self.total = conn, direction, 0
        self.flowing = asyncio.Event()
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._start = 0.0

    async def __aenter__(self) -> Transfer:
        for way, protocol in (("up", SINK), ("down", SOURCE)):
            if self.direction in (way, "both"):
                stream = await self.conn.open_stream(protocol)
                self._streams.append(stream)
                work = self._up(stream) if way == "up" else self._down(stream)
                self._tasks.append(asyncio.create_task(work))
        if self._tasks:
            await self.flowing.wait()
            await asyncio.sleep(0.3)  # windows and buffers fill
        self.total, self._start = 0, time.perf_counter()
        return self

    def megabytes_per_s(self) -> float:
        return self.total / 1e6 / (time.perf_counter() - self._start)

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        for stream in self._streams:
            stream.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _up(self, stream: Stream) -> None:
        chunk = os.urandom(CHUNK_BYTES)
        while True:
            await stream.write(chunk)
            self.total += len(chunk)
            self.flowing.set()

    async def _down(self, stream: Stream) -> None:
        while data := await stream.read():
            self.total += len(data)
            self.flowing.set()


async def under_load(conn: Connection, rounds: int, echoes: int, directions: list[str]) -> None:
    """Print echoes beside a saturated transfer, on an ordinary and on an urgent stream."""
    payload = b"x" * 64
    for direction in directions:
        times: dict[str, list[float]] = {"ordinary": [], "urgent": []}
        rates: list[float] = []
        for _ in range(rounds):
            streams = {
                "ordinary": await conn.open_stream(ECHO),
                "urgent": make_urgent(await conn.open_stream(URGENT)),
            }
            async with Transfer(conn, direction) as transfer:
                for name, stream in streams.items():

                    async def write(stream: Stream = stream) -> None:
                        await stream.write(payload)

                    async def read(stream: Stream = stream) -> bytes:
                        return await stream.read_exactly(64)

                    times[name] += await echo_us(write, read, echoes // rounds)
                rates.append(transfer.megabytes_per_s())
            for stream in streams.values():
                stream.finish()
        for name, values in times.items():
            print(
                f"echo 64 B beside a transfer {direction:5} {name:9} {quantiles(values)}"
                f"   transfer {statistics.median(rates):5.1f} MB/s"
            )


async def slow_path(addr: Multiaddr, rounds: int, echoes: int) -> None:
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, __file__, "--relay", str(addr.port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        print(f"# a path of {SLOW_BYTES_PER_S / 1e6:.1f} MB/s")
        async with LinkHost(Key.generate()) as host:
            conn = await host.dial([Multiaddr("ip4", "127.0.0.1", port, addr.peer)])
            await under_load(conn, rounds, echoes, ["none", "up", "down", "both"])
    finally:
        child.terminate()
        child.wait(10)


def quantiles(values: list[float]) -> str:
    values = sorted(values)
    return f"p50 {values[len(values) // 2]:6.0f} µs  p99 {values[len(values) * 99 // 100]:6.0f} µs"


async def load(addr: Multiaddr, rounds: int, echoes: int) -> None:
    print(f"# echoes beside a saturated transfer on the same connection, {rounds} rounds")
    async with LinkHost(Key.generate()) as host:
        conn = await host.dial([addr])
        await under_load(conn, rounds, echoes // 2, ["none", "up", "down", "both"])
    await slow_path(addr, 2, min(echoes // 10, 100))


async def main(rounds: int, echoes: int, megabytes: int, *, only_load: bool) -> None:
    child = subprocess.Popen(  # noqa: ASYNC220  # before anything is measured
        [sys.executable, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        where = json.loads(child.stdout.readline())
        total = megabytes * 1_000_000 // CHUNK_BYTES * CHUNK_BYTES
        payload = b"x" * 64
        times: dict[str, list[float]] = {"tcp": [], "link": [], "push": []}
        rates: dict[str, list[float]] = {"tcp": [], "link": []}
        opens: list[float] = []
        addr = Multiaddr.parse(where["link"])
        if only_load:
            await load(addr, rounds, echoes)
            return
        async with LinkHost(Key.generate()) as host:
            conn = await host.dial([addr])
            reader, writer = await asyncio.open_connection("127.0.0.1", where["tcp"])
            writer.write(b"e")
            stream, pushed = await conn.open_stream(ECHO), await conn.open_stream(PUSH)

            async def tcp_write() -> None:
                writer.write(payload)

            faces = {
                "tcp": (tcp_write, lambda: reader.readexactly(64)),
                "link": (lambda: stream.write(payload), lambda: stream.read_exactly(64)),
                "push": (lambda: pushed.write(payload), lambda: pushed.read_exactly(64)),
            }
            for write, read in faces.values():  # warm up
                await echo_us(write, read, 200)
            for _ in range(rounds):
                for name, (write, read) in faces.items():
                    times[name] += await echo_us(write, read, echoes // rounds)
                rates["tcp"].append(await tcp_one_way(where["tcp"], total))
                rates["link"].append(await link_one_way(conn.open_stream, total))
                start = time.perf_counter()
                for _ in range(200):
                    async with await conn.open_stream(ECHO) as fresh:
                        await fresh.write(b"a")
                        await fresh.read_exactly(1)
                opens.append(200 / (time.perf_counter() - start))
            writer.close()
            await writer.wait_closed()
        tcp_us, link_us = statistics.median(times["tcp"]), statistics.median(times["link"])
        tcp_rate, link_rate = statistics.median(rates["tcp"]), statistics.median(rates["link"])
        print(
            f"# link beside plain asyncio TCP: 2 processes, 127.0.0.1, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}, {rounds} alternating rounds"
        )
        print(f"echo 64 B, plain TCP (asyncio streams)      {quantiles(times['tcp'])}")
        print(
            f"echo 64 B, link: noise + yamux              {quantiles(times['link'])}   "
            f"{link_us / tcp_us:.2f} × TCP"
        )
        print(f"echo 64 B, link, server on attach()         {quantiles(times['push'])}")
        print(
            f"one way, 64 KiB writes, {megabytes} MB, plain TCP {tcp_rate:6.0f} MB/s "
            f"({min(rates['tcp']):.0f}–{max(rates['tcp']):.0f})"
        )
        print(
            f"one way, 64 KiB writes, {megabytes} MB, link      {link_rate:6.0f} MB/s "
            f"({min(rates['link']):.0f}–{max(rates['link']):.0f})   "
            f"{link_rate / tcp_rate:.2f} × TCP (target ≥ 0.5)"
        )
        print(f"open stream + 1 B echo + close, link        {statistics.median(opens):6.0f} /s")
        await load(addr, rounds, echoes)
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--relay", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--echoes", type=int, default=5000, help="round trips of 64 B in all")
    parser.add_argument("--megabytes", type=int, default=256, help="per one-way transfer")
    parser.add_argument("--load", action="store_true", help="only the part with a transfer beside")
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
    elif args.relay:
        asyncio.run(relay(args.relay))
    else:
        asyncio.run(main(args.rounds, args.echoes, args.megabytes, only_load=args.load))
