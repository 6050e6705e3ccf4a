"""A relayed connection beside a direct one, in one run: `python tests/bench/bench_reach.py`.

Three processes on this machine over loopback: home dials cafe directly, and through hub, which
carries. Both ways are encrypted (noise, ChaCha20-Poly1305) and multiplexed (yamux); nothing is
synced. Rounds alternate, so that noise of the machine hits both. The relay's pace, 256 MiB/s by
default, is lifted: what is measured is what it can do.

The same once more where each hop takes 20 ms one way, through `delay.py`, which ends TCP: the
windows of yamux and what the relay holds meet the delay, TCP's slow start does not. Plain TCP over
the same delay tells whether the delay itself is what bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key
from wetware.overlay import relay
from wetware.overlay.link import Connection, LinkHost, Stream

ECHO, SINK = "/bench/echo/1", "/bench/sink/1"
CHUNK_BYTES = 64 << 10
PACED_MB_PER_S = 200
HOP_MS = 20
DELAY = Path(__file__).with_name("delay.py")


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def sink(stream: Stream) -> None:
    total = 0
    while data := await stream.read():
        total += len(data)
    await stream.write(total.to_bytes(8, "big"))


async def plain_sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    total = 0
    while data := await reader.read(1 << 20):
        total += len(data)
    writer.write(total.to_bytes(8, "big"))
    writer.close()


async def serve(hub: str) -> None:
    """Be the hub, or with its address cafe."""
    relay.BYTES_PER_S = 1 << 40  # type: ignore[misc]
    async with LinkHost(Key.generate(), admit=lambda *_: True, privileged=lambda _: True) as host:
        host.handle(ECHO, echo, access=Access.PUBLIC)
        host.handle(SINK, sink, access=Access.PUBLIC)
        relay.Relay(host, is_member=lambda _: True, enabled=True).start()
        (addr,) = await host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
        if hub:
            await host.dial([Multiaddr.parse(hub)])
        plain = await asyncio.start_server(plain_sink, "127.0.0.1")
        ports = [addr.port, plain.sockets[0].getsockname()[1]]
        print(json.dumps({"addr": str(addr), "ports": ports}), flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until the parent is done or gone


class Child:
    """A process of this benchmark.

    Attributes:
        ports: Of its link and its plain sink; of a process of paths, one for each.
    """

    def __init__(self, script: str, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        says = json.loads(self.process.stdout.readline())
        self.ports: list[int] = says["ports"]
        self._addr: str = says.get("addr", "")

    def addr(self, port: int = 0) -> Multiaddr:
        """Of its link; over a path, where its port is given."""
        addr = Multiaddr.parse(self._addr)
        return replace(addr, port=port) if port else addr

    def cpu_s(self) -> float:
        """Of this process so far, user and system."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


async def echo_us(conn: Connection, count: int) -> list[float]:
    out = []
    async with await conn.open_stream(ECHO) as stream:
        for _ in range(count):
            start = time.perf_counter()
            await stream.write(b"x" * 64)
            await stream.read_exactly(64)
            out.append((time.perf_counter() - start) * 1e6)
    return out


async def one_way(conn: Connection, total: int, mb_per_s: float = 0.0) -> float:
    """MB/s until the far end has all; paced where a rate is given."""
    stream = await conn.open_stream(SINK)
    chunk = os.urandom(CHUNK_BYTES)
    start = time.perf_counter()
    for sent in range(0, total, CHUNK_BYTES):
        await stream.write(chunk)
        if mb_per_s and (ahead := sent / 1e6 / mb_per_s - (time.perf_counter() - start)) > 0.002:
            await asyncio.sleep(ahead)
    stream.close()
    if int.from_bytes(await stream.read_exactly(8), "big") != total:
        raise AssertionError("bytes were lost")
    return total / 1e6 / (time.perf_counter() - start)


async def first_byte_ms(*addrs: Multiaddr) -> float:
    """A fresh node, that knows nobody: dial, open a stream, one byte there and back."""
    async with LinkHost(Key.generate()) as host:
        start = time.perf_counter()
        conn = await host.dial(addrs)
        async with await conn.open_stream(ECHO) as stream:
            await stream.write(b"a")
            await stream.read_exactly(1)
        return (time.perf_counter() - start) * 1e3


async def plain_one_way(port: int, total: int) -> float:
    """MB/s over TCP alone, until the far end has all."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    chunk = os.urandom(CHUNK_BYTES)
    start = time.perf_counter()
    for _ in range(0, total, CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    writer.write_eof()
    if int.from_bytes(await reader.readexactly(8), "big") != total:
        raise AssertionError("bytes were lost")
    rate = total / 1e6 / (time.perf_counter() - start)
    writer.close()
    return rate


def quantiles(values: list[float], unit: str = "µs") -> str:
    values = sorted(values)
    p50, p99 = values[len(values) // 2], values[len(values) * 99 // 100]
    return f"p50 {p50:6.1f} {unit}  p99 {p99:6.1f} {unit}"


async def near(rounds: int, echoes: int, megabytes: int) -> None:
    with contextlib.ExitStack() as children:
        hub = children.enter_context(Child(__file__, "--serve"))
        cafe = children.enter_context(Child(__file__, "--serve", "--hub", str(hub.addr())))
        total = megabytes * 1_000_000 // CHUNK_BYTES * CHUNK_BYTES
        ways = {"direct": cafe.addr(), "relayed": hub.addr().through(cafe.addr().peer)}
        times: dict[str, list[float]] = {way: [] for way in ways}
        firsts: dict[str, list[float]] = {way: [] for way in ways}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        async with LinkHost(Key.generate()) as one, LinkHost(Key.generate()) as two:
            conns = {
                way: await host.dial([addr])
                for host, (way, addr) in zip((one, two), ways.items(), strict=True)
            }
            for conn in conns.values():  # warm up
                await echo_us(conn, 200)
            for _ in range(rounds):
                for way, conn in conns.items():
                    times[way] += await echo_us(conn, echoes // rounds)
                    rates[way].append(await one_way(conn, total))
                    firsts[way] += [await first_byte_ms(ways[way]) for _ in range(10)]
            before, start = hub.cpu_s(), time.perf_counter()
            paced = await one_way(conns["relayed"], 9200 * CHUNK_BYTES, PACED_MB_PER_S)  # 3 s
            cpu = (hub.cpu_s() - before) / (time.perf_counter() - start)
        print(
            f"# relayed beside direct: 3 processes, 127.0.0.1, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}, {rounds} alternating rounds"
        )
        us = {way: statistics.median(values) for way, values in times.items()}
        rate = {way: statistics.median(values) for way, values in rates.items()}
        for way in ways:
            print(f"echo 64 B, {way:8}                 {quantiles(times[way])}")
        print(f"  relayed / direct {us['relayed'] / us['direct']:.2f} (target ≤ 2.5)")
        for way in ways:
            print(
                f"one way, 64 KiB writes, {megabytes} MB, {way:8} {rate[way]:6.0f} MB/s "
                f"({min(rates[way]):.0f}–{max(rates[way]):.0f})"
            )
        print(f"  relayed / direct {rate['relayed'] / rate['direct']:.2f} (target ≥ 0.2)")
        for way in ways:
            print(f"first byte of a fresh pair, {way:8}  {quantiles(firsts[way], 'ms')}")
        print(f"hub at {paced:.0f} MB/s: {100 * cpu:.0f} % of a core")


async def far(rounds: int, megabytes: int) -> None:
    one, two = f"{HOP_MS} ms", f"{2 * HOP_MS} ms"
    over_hub = f"{HOP_MS} + {HOP_MS} ms"
    with contextlib.ExitStack() as children:

        def child(*args: object) -> Child:
            return children.enter_context(Child(*map(str, args)))

        hub = child(__file__, "--serve")
        (to_hub,) = child(DELAY, HOP_MS, hub.ports[0]).ports
        cafe = child(__file__, "--serve", "--hub", hub.addr(to_hub))
        link, plain = cafe.ports
        paths = child(DELAY, HOP_MS, link, 2 * HOP_MS, link, HOP_MS, plain, 2 * HOP_MS, plain).ports
        ways = {
            f"direct,  {one}": cafe.addr(paths[0]),
            f"direct,  {two}": cafe.addr(paths[1]),
            f"relayed, {over_hub}": hub.addr(to_hub).through(cafe.addr().peer),
        }
        plains = {f"plain TCP, {one}": paths[2], f"plain TCP, {two}": paths[3]}
        total = megabytes * 1_000_000 // CHUNK_BYTES * CHUNK_BYTES
        rates: dict[str, list[float]] = {way: [] for way in (*ways, *plains)}
        async with contextlib.AsyncExitStack() as hosts:
            conns = {}
            for way, addr in ways.items():
                host = await hosts.enter_async_context(LinkHost(Key.generate()))
                conns[way] = await host.dial([addr])
            times = {way: await echo_us(conn, 10) for way, conn in conns.items()}
            for _ in range(rounds):
                for way, conn in conns.items():
                    rates[way].append(await one_way(conn, total))
                for way, port in plains.items():
                    rates[way].append(await plain_one_way(port, total))
        print(
            f"# {HOP_MS} ms a hop, one way, by processes that end TCP (delay.py), "
            f"{rounds} alternating rounds"
        )
        for way in ways:
            print(f"echo 64 B, {way:20} p50 {statistics.median(times[way]) / 1e3:6.1f} ms")
        rate = {way: statistics.median(values) for way, values in rates.items()}
        for way in rates:
            print(
                f"one way, {megabytes} MB, {way:22} {rate[way]:6.0f} MB/s "
                f"({min(rates[way]):.0f}–{max(rates[way]):.0f})"
            )
        once, twice, relayed = (rate[way] for way in ways)
        print(
            f"  relayed / direct {relayed / once:.2f} of {one} (target ≥ 0.6), "
            f"{relayed / twice:.2f} of {two}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--hub", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--echoes", type=int, default=5000, help="round trips of 64 B in all")
    parser.add_argument("--megabytes", type=int, default=256, help="per one-way transfer")
    parser.add_argument("--quick", action="store_true", help="some 20 s")
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.hub))
    elif args.quick:
        asyncio.run(near(3, 1500, 64))
        asyncio.run(far(2, 128))
    else:
        asyncio.run(near(args.rounds, args.echoes, args.megabytes))
        asyncio.run(far(args.rounds, args.megabytes))
