"""What a transfer takes of the memory of both nodes, and of the disk of one that is full."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import wetware
from wetware.errors import LimitExceeded
from wetware.testing import Home, NodeProcess

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

MIB = 1 << 20
GROWTH_BYTES_MAX = 64 * MIB
STOPPED_S = 4.0


def rss(node: NodeProcess) -> int:
    return int(Path(f"/proc/{node.process.pid}/statm").read_text().split()[1]) * 4096


@contextlib.asynccontextmanager
async def bounded(what: str, at_rest: dict[str, int], *nodes: NodeProcess) -> AsyncIterator[None]:
    peak = dict(at_rest)

    async def watch() -> None:
        while True:
            for node in nodes:
                peak[node.data_dir.name] = max(peak[node.data_dir.name], rss(node))
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
    grown = {name: peak[name] - at_rest[name] for name in peak}
    print(what, {name: round(n / MIB, 1) for name, n in grown.items()})  # noqa: T201 - with -s
    assert max(grown.values()) <= GROWTH_BYTES_MAX


def random_file(path: Path, mib: int) -> Path:
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))
    return path


@pytest.mark.long
async def test_both_nodes_stay_within_64_mebibytes(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, b = pair
    mib = int(os.environ.get("BLOB_MEMORY_MIB", "256"))  # 1024 and more by hand
    first, second = (random_file(tmp_path / name, mib) for name in ("first", "second"))
    rest = {node.data_dir.name: rss(node) for node in pair}
    async with (
        wetware.connect(a.addr, key=a.home.key()) as at_a,
        wetware.connect(b.addr, key=a.home.key()) as at_b,
    ):
        async with bounded("put", rest, a, b):
            put = await at_a.blob.put(first)
        async with bounded("get", rest, a, b):
            await at_b.blob.get(put.cid, tmp_path / "got")
        put = await at_a.blob.put(second)
        async with (
            bounded("a reader that stops", rest, a, b),
            at_b.blob.open(put.cid) as blob,
            await blob.stream() as stream,
        ):
            await stream.receive()
            await asyncio.sleep(STOPPED_S)


@pytest.mark.long
async def test_a_node_that_is_full_collects_what_was_only_read(
    shared_home: Home, pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, _ = pair
    env = {"WW_PLUGINS_BLOB_NODE_BYTES_MAX": str(64 * MIB)}
    small = shared_home.start_node("small", join=a, env=env).wait_ready()
    small.wait_members([a.peer_id])
    async with (
        wetware.connect(a.addr, key=a.home.key()) as at_a,
        wetware.connect(small.addr, key=a.home.key()) as session,
    ):
        for number in range(4):
            put = await at_a.blob.put(os.urandom(24 * MIB))
            await session.blob.get(put.cid, tmp_path / f"{number}")
        pinned = await session.blob.put(os.urandom(30 * MIB), name="kept")
        usage = (await session.blob.all())[1]
        assert usage.disk_bytes <= usage.disk_bytes_max <= 64 * MIB
        with pytest.raises(LimitExceeded) as full:
            await session.blob.put(os.urandom(40 * MIB))
        assert full.value.code == "limit.blob_node"
        assert full.value.hint
        async with session.blob.open(pinned.cid, local=True) as blob:
            assert len(await blob.read()) == 30 * MIB
    small.stop()
