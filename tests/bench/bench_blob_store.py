"""The part `store` of bench_blob.py: what the store of one node costs, without sessions.

10,000 blocks of 4 KiB, put together and by 64 callers one block each, beside inserts of the same
bytes into a plain SQLite database of the same durability (WAL, synchronous=FULL, as many rows in a
commit); then a file in blocks of 1 MiB beside `cp && sync`, and all of it read again, verified.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
from cluster_report import Report, machine

from wetware.base.files import Files
from wetware.base.threads import Threads
from wetware_blob.format.cid import RAW, Block, Cid
from wetware_blob.store.store import Store

MIB = 1 << 20
SMALL, MANY = 4096, 10_000
CALLERS = 64
IN_FLIGHT = 2
"""Puts of one upload at a time: while one is synced the next is written."""
GROUP = 256
"""Rows of 4 KiB in a commit, as the store has them (1 MiB)."""


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Store]:
    store = Store(
        Files(path),
        run_sync=Threads().run,
        clock=time,
        node_bytes_max=1 << 50,
        owner_bytes_max=1 << 50,
    )
    async with anyio.create_task_group() as tasks:
        await tasks.start(lambda task_status: store.run(task_status=task_status))
        yield store
        tasks.cancel_scope.cancel()


def block(data: bytes) -> Block:
    return Block(Cid(1, RAW, hashlib.sha256(data).digest()), data)


async def small(folder: Path, *, together: bool) -> float:
    """Blocks a second."""
    blocks = [block(os.urandom(SMALL)) for _ in range(MANY)]
    async with opened(folder / f"small-{together}") as store, store.hold("bench") as hold:
        start = time.perf_counter()
        if together:
            await store.put(hold, blocks)
        else:
            left = iter(blocks)

            async def caller() -> None:
                for one in left:
                    await store.put(hold, [one])

            await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return MANY / (time.perf_counter() - start)


def plain(folder: Path, rows: int) -> float:
    """Inserts a second into SQLite, so many in a commit."""
    blocks = [os.urandom(SMALL) for _ in range(MANY)]
    db = sqlite3.connect(folder / f"plain-{rows}.db", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE blocks (digest BLOB PRIMARY KEY, data BLOB)")
    start = time.perf_counter()
    for at in range(0, MANY, rows):
        db.execute("BEGIN IMMEDIATE")
        db.executemany(
            "INSERT INTO blocks VALUES (?, ?)",
            [(hashlib.sha256(data).digest(), data) for data in blocks[at : at + rows]],
        )
        db.execute("COMMIT")
    rate = MANY / (time.perf_counter() - start)
    db.close()
    return rate


def copied(source: Path) -> float:
    """MB/s of `cp && sync` of a file in the page cache.

    The copy stays, as what is put does: memory that a deleted file has just freed takes what is
    written next several times faster where the machine is virtual.
    """
    to = Path(tempfile.mktemp(dir=source.parent))  # noqa: S306 the directory is our own
    start = time.perf_counter()
    subprocess.run(f"cp {source} {to} && sync {to}", shell=True, check=True)  # noqa: S602 our own names
    return source.stat().st_size / (time.perf_counter() - start) / 1e6


async def large(folder: Path, source: Path) -> tuple[float, float]:
    """MB/s of putting a file in blocks of 1 MiB, hashed on the way, and of reading it again."""
    size = os.stat(source).st_size
    threads = Threads()
    digests: list[bytes] = []
    async with opened(folder / "large") as store, store.hold("bench") as hold:
        places = asyncio.Semaphore(IN_FLIGHT)

        async def put(blocks: list[Block]) -> None:
            try:
                await store.put(hold, blocks)
            finally:
                places.release()

        start = time.perf_counter()
        with source.open("rb") as file:
            async with asyncio.TaskGroup() as tasks:
                while parts := await threads.run(read, file):
                    blocks = await asyncio.gather(*(threads.run(block, part) for part in parts))
                    digests += [one.cid.digest for one in blocks]
                    await places.acquire()
                    tasks.create_task(put(list(blocks)))
        written = size / (time.perf_counter() - start) / 1e6
        start = time.perf_counter()
        for at in range(0, len(digests), 8):
            await asyncio.gather(*(store.get(digest) for digest in digests[at : at + 8]))
        return written, size / (time.perf_counter() - start) / 1e6


def read(file: object) -> list[bytes]:
    parts = (file.read(MIB) for _ in range(16))  # type: ignore[attr-defined]
    return [part for part in parts if part]


async def measure(report: Report, folder: Path, size: int) -> None:
    report.say(f"blocks of 4 KiB, {MANY}, durable when put; {machine()}")
    rows = [("put together", True, GROUP), (f"put by {CALLERS} callers", False, CALLERS)]
    for name, together, group in rows:
        beside = plain(folder, group)
        rate = await small(folder, together=together)
        report.figure(
            "small",
            f"SQLite, {group} in a commit / {name}",
            beside / rate,
            "×",
            beside=f"{beside:.0f}/s beside {rate:.0f}/s",
        )
    report.say(f"\n{size // MIB} MiB in blocks of 1 MiB")
    source = folder / "source"
    with source.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    os.sync()
    before = copied(source)
    written, again = await large(folder, source)
    copy = (before + copied(source)) / 2
    report.figure(
        "large",
        "cp && sync / put, hashed",
        copy / written,
        "×",
        at_most=2.0,
        beside=f"{copy:.0f} MB/s beside {written:.0f} MB/s",
    )
    report.figure("large", "get, verified, out of the page cache", again, "MB/s", digits=0)


def store(report: Report, folder: Path, mebibytes: int) -> None:
    asyncio.run(measure(report, folder, mebibytes * MIB))
