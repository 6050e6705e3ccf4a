"""What the embedded engine of sync costs in one process, without sessions.

`python tests/bench/bench_sync_store.py [--json] [--keys N] [--seconds N]`: puts a second by 1 and
by 64 callers, beside a plain SQLite table of the same durability (WAL, synchronous=FULL, one row in
a commit); a lock and its unlock as transactions; how long after its put was asked for an event is
told; and the same puts in a store of more and more keys, up to N (1,000,000: 2 min, 600 MB).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
from cluster_report import Report, machine, quantile

from wetware.base.files import Files
from wetware.base.threads import Threads
from wetware_sync.embedded.engine import EmbeddedEngine
from wetware_sync.engine import Compare, Delete, Engine, Get, Limits, Order, Put, Txn

VALUE = bytes(100)
OWNER = "local:bench"
LIMITS = Limits(owner_keys=2_000_000, owner_bytes=1 << 40)


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Engine]:
    engine = EmbeddedEngine(Files(path), run_sync=Threads().run, limits=LIMITS)
    async with anyio.create_task_group() as tasks:
        await tasks.start(lambda task_status: engine.run(task_status=task_status))
        yield engine
        tasks.cancel_scope.cancel()


async def timed(
    call: Callable[[int, int], Awaitable[object]], seconds: float, callers: int
) -> list[float]:
    """Latencies, s, of what callers do over and over, each with its number and a count."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        count = 0
        while (began := time.perf_counter()) < end:
            await call(number, count)
            latencies.append(time.perf_counter() - began)
            count += 1

    await asyncio.gather(*map(caller, range(callers)))
    return latencies


def plain(folder: Path, seconds: float) -> float:
    """Rows a second."""
    db = sqlite3.connect(folder / "plain.db", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE IF NOT EXISTS t (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
    rows, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        db.execute("INSERT OR REPLACE INTO t VALUES (?, ?)", (b"%d" % (rows % 1000), VALUE))
        rows += 1
    db.close()
    return rows / seconds


async def put(engine: Engine, key: bytes) -> None:
    await engine.txn(Txn((Put(key, VALUE),)), OWNER)


async def lock(engine: Engine, lease: int, name: bytes) -> None:
    """As a mutex that nobody else wants: two transactions."""
    key = b"%s/%d" % (name, lease)
    first = Get(name + b"/", prefix=True, limit=1, order=Order.OLDEST)
    taken = Txn((Put(key, b"", lease), first), (Compare(key, "version", 0),))
    assert (await engine.txn(taken, OWNER)).succeeded
    await engine.txn(Txn((Delete(key),)), OWNER)


async def speed(report: Report, folder: Path, seconds: float) -> None:
    async with opened(folder / "speed") as engine:
        lease = await engine.grant(3600.0, OWNER)
        for callers in (1, 64):
            beside = plain(folder, seconds)
            calls = {
                "puts": lambda number, count: put(engine, b"%d/%d" % (number, count % 1000)),
                "lock + unlock": lambda number, _: lock(engine, lease, b"m/%d" % number),
            }
            for name, call in calls.items():
                times = await timed(call, seconds, callers)
                report.figure(
                    "speed",
                    f"{name}, {callers} callers",
                    len(times) / seconds,
                    "/s",
                    digits=0,
                    beside=f"p50 {quantile(times, 0.5) * 1e3:.2f} ms, "
                    f"p99 {quantile(times, 0.99) * 1e3:.2f} ms; plain SQLite {beside:.0f} rows/s",
                )


async def watched(report: Report, folder: Path, many: int) -> None:
    async with opened(folder / "watched") as engine:
        watch = engine.watch(b"w/", 1, OWNER, prefix=True)
        put_s: list[float] = []
        told_s: list[float] = []
        for number in range(many):
            began = time.perf_counter()
            done = asyncio.ensure_future(put(engine, b"w/%d" % (number % 10)))
            await watch.next()
            told_s.append(time.perf_counter() - began)
            await done
            put_s.append(time.perf_counter() - began)
        for share in (0.5, 0.99):
            report.figure(
                "watch",
                f"put asked for → event told, p{share * 100:.0f}",
                quantile(told_s, share) * 1e3,
                "ms",
                beside=f"put answered {quantile(put_s, share) * 1e3:.2f} ms",
            )


async def growth(report: Report, folder: Path, seconds: float, most: int) -> None:
    rng = random.Random(1)
    async with opened(folder / "growth") as engine:
        keys = 0
        for size in (size for size in (1000, 10_000, 100_000, 1_000_000) if size <= most):
            while keys < size:
                parts = [range(at, at + 100) for at in range(keys, min(size, keys + 6400), 100)]
                puts = [tuple(Put(b"g/%08d" % n, VALUE) for n in part) for part in parts]
                await asyncio.gather(*(engine.txn(Txn(some), OWNER) for some in puts))
                keys += 100 * len(parts)
            beside = plain(folder, seconds)
            processor = time.process_time()
            among = range(keys)
            times = await timed(
                lambda *_, among=among: put(engine, b"g/%08d" % rng.choice(among)), seconds, 64
            )
            report.figure(
                "growth",
                f"puts over {size} keys, 64 callers",
                len(times) / seconds,
                "/s",
                digits=0,
                beside=f"p99 {quantile(times, 0.99) * 1e3:.1f} ms, "
                f"{(time.process_time() - processor) / len(times) * 1e6:.0f} µs of processor each; "
                f"plain SQLite {beside:.0f} rows/s",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    report = Report(as_json=args.json)
    report.say(f"values of {len(VALUE)} bytes, durable when answered; {machine()}")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        asyncio.run(speed(report, Path(folder), args.seconds))
        asyncio.run(watched(report, Path(folder), 500))
        asyncio.run(growth(report, Path(folder), args.seconds, args.keys))
    if args.json:
        print(json.dumps(report.figures, indent=2))


if __name__ == "__main__":
    main()
