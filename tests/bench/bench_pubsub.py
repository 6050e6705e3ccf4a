"""Pub-sub beside NATS, in one run: `python tests/bench/bench_pubsub.py` (extra `bench`).

64 B and 1 KiB, from one publisher to one subscriber, one to eight, eight to one: through
nats-server with nats-py (plain TCP, no TLS, no signature), through one node (unix sockets), and
from one node to another (encrypted, signed by the one and verified by the other). Nodes,
nats-server, the publishers and the subscribers are four or five processes on this machine; each
publisher and each subscriber has a connection of its own. Subscribers of wetware are of the kind
that nothing is dropped for. Each message is checked for its publisher's order; nothing is lost, or
the run fails. Systems take turns, and the best of the rounds is printed, with the processor time of
publishers, nodes and subscribers together for each delivered message. `--quick`: one round of a
quarter of the messages.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import wetware
from wetware.testing import Home, NodeProcess

SHAPES = ((1, 1), (1, 8), (8, 1))  # publishers, subscribers
DELIVERIES = {64: 300_000, 1024: 100_000}  # of a burst, by payload in bytes
IDLE_MESSAGES, IDLE_S = 200, 0.005
HALF_S, TICK_S = 1.5, 0.002
HEAD = struct.Struct("<IIQ")  # publisher, number, time in ns

Publish = Callable[[bytes], Awaitable[object]]


# --- the two systems ------------------------------------------------------------------------------


async def wetware_publisher(
    where: list[str], stack: contextlib.AsyncExitStack
) -> tuple[Publish, Publish, Callable[[], Awaitable[object]]]:
    """What publishes one message, one of many, and waits for those."""
    session = await stack.enter_async_context(wetware.connect(data_dir=where[0], key=where[1]))
    topic = await session.pubsub.join("bench")
    if where[2:]:
        while not (await topic.info()).peers:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
    many = topic.publisher()
    return topic.publish, many.publish, many.flush


async def wetware_subscriber(
    where: list[str], stack: contextlib.AsyncExitStack, take: Callable[[bytes], None]
) -> None:
    session = await stack.enter_async_context(wetware.connect(data_dir=where[0], key=where[1]))
    topic = await session.pubsub.join("bench")
    messages = await stack.enter_async_context(topic.subscribe(slow="block"))

    async def read() -> None:
        async for message in messages:
            take(message.data)

    task = asyncio.create_task(read())
    stack.callback(task.cancel)


async def nats_publisher(
    where: list[str], stack: contextlib.AsyncExitStack
) -> tuple[Publish, Publish, Callable[[], Awaitable[object]]]:
    import nats

    connection = await nats.connect(where[0])
    stack.push_async_callback(connection.close)

    async def many(data: bytes) -> None:
        await connection.publish("bench", data)

    return many, many, connection.flush


async def nats_subscriber(
    where: list[str], stack: contextlib.AsyncExitStack, take: Callable[[bytes], None]
) -> None:
    import nats

    connection = await nats.connect(where[0])
    stack.push_async_callback(connection.close)

    async def read(message: Any) -> None:
        take(message.data)

    limits = {"pending_msgs_limit": 1 << 24, "pending_bytes_limit": 1 << 30}
    await connection.subscribe("bench", cb=read, **limits)
    await connection.flush()


# --- roles ----------------------------------------------------------------------------------------


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _commands() -> Any:
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        yield json.loads(line)


async def publish(system: str, count: int, where: list[str]) -> None:
    """Publishers, which do what they are told on standard input."""
    connect = {"nats": nats_publisher, "wetware": wetware_publisher}[system]
    async with contextlib.AsyncExitStack() as stack:
        publishers = [await connect(where, stack) for _ in range(count)]
        async for command in _commands():
            kind, size, amount = command
            pad = bytes(size - HEAD.size)
            cpu_s, started = _cpu_s(), time.perf_counter()
            if kind == "idle":
                for number in range(amount):
                    await publishers[0][0](HEAD.pack(0, number, time.time_ns()) + pad)
                    await asyncio.sleep(IDLE_S)
            elif kind == "burst":
                each = [
                    [HEAD.pack(who, number, 0) + pad for number in range(amount)]
                    for who in range(count)
                ]
                cpu_s, started = _cpu_s(), time.perf_counter()

                async def burst(who: int, each: list[list[bytes]] = each) -> None:
                    _, many, flush = publishers[who]
                    for message in each[who]:
                        await many(message)
                    await flush()

                await asyncio.gather(*map(burst, range(count)))
            else:  # an even stream, from the first publisher
                _, many, flush = publishers[0]
                sent = 0
                while sent < amount:
                    due = min(amount, int(amount * (time.perf_counter() - started) / HALF_S) + 1)
                    now = time.time_ns()
                    for number in range(sent, due):
                        await many(HEAD.pack(0, number, now) + pad)
                    sent = max(sent, due)
                    await asyncio.sleep(TICK_S)
                await flush()
            took_s = time.perf_counter() - started
            print(json.dumps([started, took_s, _cpu_s() - cpu_s]), flush=True)


async def subscribe(system: str, count: int, where: list[str]) -> None:
    """Subscribers, which say when each of them has so many messages."""
    connect = {"nats": nats_subscriber, "wetware": wetware_subscriber}[system]
    due, got, done = 0, [0] * count, asyncio.Event()
    expected: dict[tuple[int, int], int] = {}
    latencies_s: list[float] = []

    def taker(index: int) -> Callable[[bytes], None]:
        def take(data: bytes) -> None:
            who, number, sent_ns = HEAD.unpack_from(data)
            if expected.get((index, who), 0) != number:
                raise SystemExit(f"{number} of {who} came in place of {expected.get((index, who))}")
            expected[index, who] = number + 1
            got[index] += 1
            if sent_ns and not index:
                latencies_s.append((time.time_ns() - sent_ns) / 1e9)
            if got[index] == due and min(got) == due:
                done.set()

        return take

    async with contextlib.AsyncExitStack() as stack:
        for index in range(count):
            await connect(where, stack, taker(index))
        async for command in _commands():
            due, cpu_s = command, _cpu_s()
            expected.clear()
            print("waiting", flush=True)
            await done.wait()
            last = time.perf_counter()
            done.clear()
            ranked = sorted(latencies_s) or [0.0]
            p50, p99 = (ranked[int(len(ranked) * part)] * 1e3 for part in (0.5, 0.99))
            print(json.dumps([last, _cpu_s() - cpu_s, p50, p99]), flush=True)
            got[:] = [0] * count
            latencies_s.clear()


class Role:
    """One of the two processes."""

    def __init__(self, role: str, system: str, count: int, where: list[str]) -> None:
        self.process = subprocess.Popen(  # ourselves
            [sys.executable, __file__, "--role", role, system, str(count), *where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.read()

    def tell(self, command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a publisher or subscriber has failed")
        return line

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


# --- measuring ------------------------------------------------------------------------------------


def cpu_of(pids: list[int]) -> float:
    """Processor time of other processes, s."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def measure(
    system: str, at: list[str], to: list[str], pids: list[int], shape: tuple[int, int], size: int,
    burst: int,
) -> dict[str, float]:  # fmt: skip
    """One run of a system."""
    publishers, subscribers = shape
    with contextlib.ExitStack() as stack:
        reading = Role("sub", system, subscribers, to)
        stack.callback(reading.end)
        writing = Role("pub", system, publishers, at)
        stack.callback(writing.end)

        def phase(kind: str, each: int, all_: int) -> tuple[list[float], list[float]]:
            reading.tell(all_)
            reading.read()
            writing.tell((kind, size, each))
            return json.loads(writing.read()), json.loads(reading.read())

        _, idle = phase("idle", IDLE_MESSAGES, IDLE_MESSAGES)
        each = burst // publishers // subscribers
        phase("burst", each // 10, each // 10 * publishers)  # warm
        others_s = cpu_of(pids)
        wrote, read = phase("burst", each, each * publishers)
        others_s = cpu_of(pids) - others_s
        published, delivered = each * publishers, each * publishers * subscribers
        delivered_per_s = delivered / (read[0] - wrote[0])
        half = int(delivered_per_s / subscribers / 2 * HALF_S)
        _, loaded = phase("half", half, half)
    return {
        "published_per_s": published / wrote[1],
        "delivered_per_s": delivered_per_s,
        "cpu_us": (wrote[2] + read[1] + others_s) / delivered * 1e6,
        "idle_p50_ms": idle[2], "idle_p99_ms": idle[3],
        "half_p50_ms": loaded[2], "half_p99_ms": loaded[3],
    }  # fmt: skip


@contextlib.contextmanager
def nats_server(directory: Path) -> Iterator[tuple[str, int]]:
    """The address and the process of a nats-server."""
    found = shutil.which("nats-server", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        raise SystemExit("there is no nats-server: install the extra `bench`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [found, "-a", "127.0.0.1", "-p", str(port), "-l", str(directory / "nats.log")]
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"nats://127.0.0.1:{port}", server.pid
    finally:
        server.kill()
        server.wait()


def main() -> None:
    """Start everything, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--size", type=int, choices=DELIVERIES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", choices=("pub", "sub"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        system, count, *where = args.rest
        work = publish if args.role == "pub" else subscribe
        asyncio.run(work(system, int(count), where))
        return
    rounds, part = (1, 4) if args.quick else (args.rounds, 1)
    results: dict[str, dict[str, dict[str, float]]] = {}
    with (
        tempfile.TemporaryDirectory() as path,
        nats_server(Path(path)) as (url, server),
        Home(Path(path)) as home,
        home.node("a") as a,
        home.node("b", join=a) as b,
    ):
        os.environ.update(home.env)
        b.wait_members([a.peer_id])
        key = home.path / "bench.key"
        home.key().save(key)

        def at(node: NodeProcess, *more: str) -> list[str]:
            return [str(node.data_dir), str(key), *more]

        systems = {
            "NATS": ("nats", [url], [url], [server]),
            "one node": ("wetware", at(a), at(a), [a.process.pid]),
            "two nodes": ("wetware", at(a, "far"), at(b), [a.process.pid, b.process.pid]),
        }
        for size in [args.size] if args.size else DELIVERIES:
            for shape in SHAPES:
                row = results[f"{size} B, {shape[0]} -> {shape[1]}"] = {}
                for _ in range(rounds):
                    for name, (system, *places) in systems.items():
                        found = measure(system, *places, shape, size, DELIVERIES[size] // part)
                        best = row.setdefault(name, found)
                        for what, value in found.items():
                            better = max if what.endswith("per_s") else min
                            best[what] = better(best[what], value)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f}, Python {platform.python_version()}")
    print(f"{'':32} published/s delivered/s  ratio  µs cpu   idle p50/p99 ms   half p50/p99 ms")
    for name, row in results.items():
        for system, r in row.items():
            ratio = r["delivered_per_s"] / row["NATS"]["delivered_per_s"]
            rates = f"{r['published_per_s']:12,.0f} {r['delivered_per_s']:11,.0f}"
            print(
                f"{name:18} {system:12} {rates} {ratio:6.2f} {r['cpu_us']:7.2f} "
                f"{r['idle_p50_ms']:8.2f} {r['idle_p99_ms']:6.2f} "
                f"{r['half_p50_ms']:9.2f} {r['half_p99_ms']:7.2f}"
            )


if __name__ == "__main__":
    main()
