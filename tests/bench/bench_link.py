"""The link beside plain asyncio TCP, in one run: `python tests/bench/bench_link.py`.

Two processes on this machine over loopback; the link is encrypted (noise, ChaCha20-Poly1305) and
multiplexed (yamux), TCP is neither. Rounds alternate, so that noise of the machine hits both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

from wetware.access import Access
from wetware.identity import Key
from wetware.link import LinkHost, Stream
from wetware.multiaddr import Multiaddr

ECHO, SINK, PUSH = "/bench/echo/1", "/bench/sink/1", "/bench/push-echo/1"
CHUNK_BYTES = 64 << 10


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
    async with LinkHost(Key.generate()) as host:
        host.handle(ECHO, echo, access=Access.PUBLIC)
        host.handle(SINK, sink, access=Access.PUBLIC)
        host.handle(PUSH, push_echo, access=Access.PUBLIC)
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
    out = []
    for _ in range(count):
        start = time.perf_counter()
        await write()
        await read()
        out.append((time.perf_counter() - start) * 1e6)
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


def quantiles(values: list[float]) -> str:
    values = sorted(values)
    return f"p50 {values[len(values) // 2]:5.0f} µs  p99 {values[len(values) * 99 // 100]:5.0f} µs"


async def main(rounds: int, echoes: int, megabytes: int) -> None:
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
        async with LinkHost(Key.generate()) as host:
            conn = await host.dial([Multiaddr.parse(where["link"])])
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
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--echoes", type=int, default=5000, help="round trips of 64 B in all")
    parser.add_argument("--megabytes", type=int, default=256, help="per one-way transfer")
    args = parser.parse_args()
    asyncio.run(serve() if args.serve else main(args.rounds, args.echoes, args.megabytes))
