"""Copies of a pin in a cluster that falls into parts, and comes together while it drops some."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest

from wetware.errors import WetwareError
from wetware.testing import Home
from wetware_blob.replicas.duties import LEASE_S

from .cluster import Cluster
from .lab import Lab

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

MIB = 1 << 20
NAMES = ("home", "a", "b", "c", "d", "e")
COPIES = 3
ENV = {"WW_PLUGINS_BLOB_GRACE_S": "3"}
POLL_S = 0.05
SETTLED_S = LEASE_S + 60.0
"""To see who is dead, or back, and for a few rounds, on a loaded machine: who has promised another
one to keep its copy, which then dropped its own, keeps it for as long as it has promised."""


class Disks:
    """How many disks have all of a blob, as the files on them say: looked at all the time."""

    def __init__(self, cluster: Cluster) -> None:
        self._nodes, self.least = cluster.nodes, COPIES

    def whole(self) -> set[str]:
        """Nodes that have a file for each of its blocks."""
        found = set()
        for name, node in self._nodes.items():
            files = (node.data_dir / "plugins" / "blob" / "store").glob("*/*-*")
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                if sum(file.stat().st_size == MIB for file in files) == 3:
                    found.add(name)
        return found

    async def watch(self) -> None:
        while True:
            there = self.whole()
            assert len(there) >= self.least, there
            await asyncio.sleep(POLL_S)

    async def until(self, done: Callable[[set[str]], bool]) -> None:
        with anyio.fail_after(SETTLED_S):
            while not done(self.whole()):
                await asyncio.sleep(POLL_S)


@contextlib.asynccontextmanager
async def collecting(cluster: Cluster) -> AsyncIterator[None]:
    """What no pin keeps any more is gone from the disk at once."""

    async def collect(name: str) -> None:
        async with cluster.session(name) as session:
            while True:
                with contextlib.suppress(WetwareError):
                    await session.blob.gc()
                await asyncio.sleep(0.2)

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(collect(name)) for name in cluster.nodes]
        yield
        for task in running:
            task.cancel()


@pytest.mark.long
async def test_never_fewer_copies_than_wanted_through_partitions(lab: Lab, tmp_path: Path) -> None:
    """Also where the cluster falls apart again while those that are too many are dropped."""
    rng = random.Random(5)
    with Home(tmp_path, ENV) as home:
        cluster = Cluster(lab, home)
        for name in NAMES:
            lab.host(name)
            cluster.start(name, join="home" if cluster.nodes else "")
        for node in cluster.nodes.values():
            others = [other.peer_id for other in cluster.nodes.values() if other is not node]
            node.wait_members(others)
        disks = Disks(cluster)
        async with cluster.session("home") as session:
            put = await session.blob.put(os.urandom(3 * MIB), name="x", copies=COPIES, ack=COPIES)
            holders = disks.whole()
            assert len(holders) == COPIES
            (spare, *_) = sorted(set(NAMES) - holders)
            watching = asyncio.ensure_future(disks.watch())
            async with collecting(cluster):
                for flaps, copies in ((0, COPIES), (3, COPIES), (0, COPIES - 1)):
                    # The home has one other at its side, and the others make up for it.
                    lab.part({"home", spare})
                    await disks.until(lambda there: len(there) > COPIES and spare in there)
                    if copies != COPIES:
                        await session.blob.pin(put.cid, name="x", copies=copies)
                        disks.least = copies
                    for _ in range(flaps):
                        lab.part(())
                        await asyncio.sleep(rng.uniform(0.5, 4.0))
                        lab.part(rng.sample(NAMES, 3))
                        await asyncio.sleep(rng.uniform(0.5, 4.0))
                    lab.part(())
                    await disks.until(lambda there, copies=copies: len(there) == copies)
                    await asyncio.sleep(3.0)
                    assert not watching.done(), watching.exception()
            watching.cancel()
