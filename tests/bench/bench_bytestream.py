"""What `rpc.ByteStream` costs beside a plain unix socket: `python tests/bench/bench_bytestream.py`.

Two processes; one sends pieces of a size, the other sends them back, and all comes in again: MB/s,
each byte counted once. The plain echoes are asyncio's streams and anyio's `connect_unix`, the same
code as over the RPC connection; `ratio` is to the faster of them, the median of rounds that follow
each other, so that a busy machine hits all alike. Then one byte there and back, alone: p50 and p99.
Exit status 1 with --check if a target is missed by more than a quarter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import ByteStream

from wetware import rpc

SCHEMA = Path(__file__).with_name("bench.capnp")
WAYS = ("asyncio", "anyio", "ww-unix")
SIZES = (4 << 10, 64 << 10, 1 << 20)
TARGET = 0.6
READ_BYTES = 256 << 10


# --- the server process


async def echo(stream: ByteStream) -> None:
    async with stream:
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                await stream.send(await stream.receive(READ_BYTES))
        await stream.send_eof()


async def plain_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(READ_BYTES):
        writer.write(data)
        await writer.drain()
    writer.close()


async def serve(folder: Path) -> None:
    schema = rpc.load(SCHEMA)

    class Pipes(rpc.Servant, interface=schema.Pipes):
        async def open(self) -> dict[str, Any]:
            stream = rpc.ByteStream()
            group.start_soon(echo, stream)
            return {"stream": stream.servant}

    listener = await anyio.create_unix_listener(folder / "anyio")
    await asyncio.start_unix_server(plain_echo, folder / "asyncio")
    async with (
        anyio.create_task_group() as group,
        rpc.runtime(),
        rpc.loop_gc(),  # as in a node
        rpc.serve_unix(folder / "ww-unix", lambda _peer: Pipes()),
    ):
        group.start_soon(listener.serve, echo)
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        group.cancel_scope.cancel()


# --- the client process


class _Plain(ByteStream):
    """asyncio's streams with anyio's names."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if not (data := await self.reader.read(max_bytes)):
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        self.writer.write(item)
        await self.writer.drain()

    async def send_eof(self) -> None:
        self.writer.write_eof()

    async def aclose(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def ways(folder: Path) -> AsyncIterator[dict[str, Callable[[], Awaitable[ByteStream]]]]:
    async with rpc.runtime(), await rpc.connect_unix(folder / "ww-unix") as connection:
        pipes = connection.bootstrap(rpc.load(SCHEMA).Pipes)

        async def plain() -> ByteStream:
            return _Plain(*await asyncio.open_unix_connection(folder / "asyncio"))

        async def anyios() -> ByteStream:
            return await anyio.connect_unix(folder / "anyio")

        async def ours() -> ByteStream:
            return rpc.ByteStream((await pipes.open())["stream"])

        yield {"asyncio": plain, "anyio": anyios, "ww-unix": ours}


async def mb_s(stream: ByteStream, size: int, total: int) -> float:
    piece, count = os.urandom(size), total // size

    async def write() -> None:
        for _ in range(count):
            await stream.send(piece)
        await stream.send_eof()

    got, start = 0, time.perf_counter()
    async with stream, asyncio.TaskGroup() as group:
        group.create_task(write())
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                got += len(await stream.receive(READ_BYTES))
        elapsed = time.perf_counter() - start
    if got != count * size:
        raise ValueError(f"{got} bytes came back of {count * size}")
    return got / elapsed / 1e6


async def round_trips_us(stream: ByteStream, count: int) -> list[float]:
    clock, out = time.perf_counter, []
    async with stream:
        for _ in range(count):
            start = clock()
            await stream.send(b"x")
            await stream.receive()
            out.append((clock() - start) * 1e6)
        await stream.send_eof()
        with contextlib.suppress(anyio.EndOfStream):
            await stream.receive()
    return sorted(out[count // 10 :])


def cpu_s(pid: int) -> float:
    """What this process and process `pid` have used of the processors, seconds (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + time.process_time()


def memory_mib(pid: int | str) -> float:
    """The most that a process has held, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def measure(folder: Path, pid: int, rounds: int, total: int) -> dict[str, Any]:
    rates: dict[tuple[str, int], list[float]] = {(w, s): [] for w in WAYS for s in SIZES}
    cpu: dict[tuple[str, int], list[float]] = {(w, s): [] for w in WAYS for s in SIZES}
    trips: dict[str, list[list[float]]] = {w: [] for w in WAYS}
    async with ways(folder) as openers:
        before = memory_mib("self"), memory_mib(pid)
        for turn in range(rounds + 1):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                for size in SIZES:
                    used = cpu_s(pid)
                    rate = await mb_s(await openers[way](), size, total)
                    if turn:  # the first warms up
                        cpu[way, size].append((cpu_s(pid) - used) / total * 1e9)
                        rates[way, size].append(rate)
                trips[way].append(await round_trips_us(await openers[way](), 500))
        after = memory_mib("self"), memory_mib(pid)
    median = statistics.median
    return {
        "rates": {f"{w} {s}": median(v) for (w, s), v in rates.items()},
        "cpu": {f"{w} {s}": median(v) for (w, s), v in cpu.items()},
        "ratios": {
            str(s): min(
                median(a / b for a, b in zip(rates["ww-unix", s], rates[plain, s], strict=True))
                for plain in ("asyncio", "anyio")
            )
            for s in SIZES
        },
        "p50_us": {w: median(v[len(v) // 2] for v in trips[w]) for w in WAYS},
        "p99_us": {w: median(v[len(v) * 99 // 100] for v in trips[w]) for w in WAYS},
        "grown_mib": max(a - b for a, b in zip(after, before, strict=True)),
    }


def report(result: dict[str, Any]) -> bool:
    print(
        f"\necho between two processes, unix sockets, {os.cpu_count()} cores; MB/s (CPU ns a byte)"
    )
    print(
        f"{'':10}" + "".join(f"{size >> 10:>13} KiB" for size in SIZES) + f"{'1 B p50/p99 µs':>20}"
    )
    for way in WAYS:
        cells = (
            f"{result['rates'][f'{way} {size}']:9.0f} ({result['cpu'][f'{way} {size}']:.2f})"
            for size in SIZES
        )
        print(
            f"{way:10}"
            + "".join(f"{cell:>17}" for cell in cells)
            + f"{result['p50_us'][way]:14.0f} /{result['p99_us'][way]:5.0f}"
        )
    good = True
    for size, ratio in result["ratios"].items():
        met = "met" if ratio >= TARGET else "MISSED"
        good = good and ratio >= TARGET / 1.25
        print(f"ratio at {int(size) >> 10:>4} KiB {ratio:6.2f}  target >= {TARGET} {met}")
    print(f"memory: either process grew by {result['grown_mib']:.1f} MiB at most")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about 10 s instead of 40 s")
    parser.add_argument("--json", action="store_true", help="figures alone, as JSON")
    parser.add_argument("--check", action="store_true", help="fail if a target is far off")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.serve))
        return 0
    rounds, total = (3, 32 << 20) if args.quick else (9, 64 << 20)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--serve", folder]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            try:
                if not server.stdout.readline():
                    raise RuntimeError("the server process did not start")
                result = asyncio.run(measure(Path(folder), server.pid, rounds, total))
            finally:
                server.terminate()
    if args.json:
        print(json.dumps(result))
        return 0
    return 0 if report(result) or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
