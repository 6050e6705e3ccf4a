"""What holders, waiters and watchers are told while the home, or the way to it, is lost."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic

import pytest
from tests.reach.cluster import LISTEN
from tests.reach.lab import Lab, missing

import wetware
from wetware.errors import WetwareError
from wetware.testing import Home, NodeProcess
from wetware_sync.engine import Compacted
from wetware_sync.errors import HomeDown
from wetware_sync.lease import now_s

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

WITHIN_S = 120.0
TTL_S = 4

HOLDER = """
import asyncio, sys, wetware
from wetware_sync.lease import now_s
async def main(data_dir, ttl_s):
    async with wetware.connect(data_dir=data_dir, reconnect=True) as s:
        try:
            async with s.sync.lock("x", ttl_s=float(ttl_s)):
                print("held", flush=True)
                await asyncio.sleep(3600)
        except wetware.errors.WetwareError as exc:
            print(type(exc).__name__, now_s(), flush=True)
asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.contextmanager
def holding(node: NodeProcess) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock "x", and says when it has lost it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(node.data_dir), str(TTL_S)],
        env=node.home.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.asynccontextmanager
async def at(node: NodeProcess) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(
        data_dir=node.data_dir, key=node.home.key(), reconnect=True
    ) as session:
        yield session


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "home", libp2p=False) as made:
        yield made


@pytest.fixture
def pair(home: Home) -> Iterator[tuple[NodeProcess, NodeProcess]]:
    """The home of the store, and another node."""
    with home.node("a") as a, home.node("b", join=a) as b:
        a.wait_members([b.peer_id])
        b.wait_members([a.peer_id])
        yield a, b


async def acquired(session: wetware.Session) -> float:
    """When the lock was had, by the clock of leases; tried until the home is there."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            with contextlib.suppress(WetwareError):
                async with session.sync.lock("x", ttl_s=TTL_S):
                    return now_s()
            await asyncio.sleep(0.02)


async def test_all_packets_of_the_holder_are_dropped_and_it_is_told_within_its_ttl(
    home: Home,
) -> None:
    if reason := missing():
        pytest.skip(reason)
    with Lab() as lab, contextlib.ExitStack() as stack:
        for name in ("a", "b"):
            lab.host(name)
        with lab.inside("a"):
            a = stack.enter_context(home.node("a", listen=LISTEN))
        with lab.inside("b"):
            b = stack.enter_context(home.node("b", listen=LISTEN, join=a))
        for node in (a, b):
            node.wait_members([a.peer_id, b.peer_id])
        with lab.inside("b"):
            holder = stack.enter_context(holding(b))
        async with at(a) as session:
            waits = asyncio.create_task(acquired(session))
            while len(await session.sync.waiting("x")) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            lab.part(["b"])
            dropped_s = now_s()
            assert holder.stdout is not None
            said = await asyncio.to_thread(holder.stdout.readline)
            why, told_s = said.split()
            assert why == "LeaseEnded"
            assert float(told_s) - dropped_s < TTL_S
            assert float(told_s) < await waits


async def test_after_a_restart_a_lease_has_its_full_time_before_a_waiter_has_anything(
    home: Home, pair: tuple[NodeProcess, NodeProcess]
) -> None:
    """The holder is stopped, so nothing keeps its lease, nor ends it."""
    a, b = pair
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(holding(b))
        async with at(b) as session:
            waits = asyncio.create_task(acquired(session))
            while len(await session.sync.waiting("x")) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            holder.send_signal(signal.SIGSTOP)
            await asyncio.sleep(TTL_S * 0.6)  # of which nothing counts
            assert not waits.done()
            await asyncio.to_thread(a.stop, signal.SIGKILL)
            started_s = now_s()
            stack.enter_context(home.node("a", peers=[b.addr]))
            assert await waits - started_s >= TTL_S


async def test_the_home_restarts_under_an_idle_watch(
    home: Home, pair: tuple[NodeProcess, NodeProcess]
) -> None:
    a, b = pair
    async with at(b) as session:
        tree = session.kv.open("/idle/")
        watch = tree.watch()
        waits = asyncio.ensure_future(anext(watch))
        while not (await session.kv.status())["watchers"]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await asyncio.to_thread(a.stop, signal.SIGKILL)
        with home.node("a", peers=[b.addr]):
            async with asyncio.timeout(WITHIN_S):
                while True:
                    with contextlib.suppress(HomeDown):
                        revision = await tree.put("a", b"1")
                        break
                    await asyncio.sleep(0.02)
                event = await waits
            assert (event.key, event.value, event.revision) == ("a", b"1", revision)
            await watch.aclose()


async def test_history_is_compacted_under_a_watch(pair: tuple[NodeProcess, NodeProcess]) -> None:
    """Who has not read it is told so, and from where to go on; the delete is not left out."""
    _, b = pair
    async with at(b) as session:
        tree = session.kv.open("/c/")
        first = await tree.put("a", b"1")
        watch = tree.watch(revision=first)
        assert (await anext(watch)).revision == first
        for number in range(3):
            await tree.put("a", str(number))
        await tree.delete("a")
        last = await tree.put("b", b"1")
        await session.kv.compact(last - 1)
        with pytest.raises(Compacted) as refused:
            [event async for event in watch]
        assert refused.value.revision == last
        assert await tree.get("a") is None
        events = tree.watch(revision=refused.value.revision)
        event = await anext(events)
        assert (event.key, event.revision) == ("b", last)
        await events.aclose()


async def test_the_home_is_down_and_every_call_says_so_at_once(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    """Nothing is pretended: not a read from before, nor a lock."""
    a, b = pair
    async with at(b) as session:
        await session.kv.put("/a", b"1")
        await session.names.set("/a", "x")
        async with session.sync.lock("y"):
            pass
        await asyncio.to_thread(a.stop, signal.SIGKILL)
        while True:  # the connection is known to be lost
            with contextlib.suppress(WetwareError):
                await session.kv.get("/a")
                continue
            break

        async def lock() -> None:
            async with session.sync.lock("z"):
                pass

        for call in (
            lambda: session.kv.get("/a"),
            lambda: session.kv.put("/a", b"2"),
            lambda: session.kv.cas("/a", b"2", modified=1),
            lambda: session.kv.status(),
            lambda: session.names.get("/a"),
            lambda: session.names.set("/a", "y"),
            lambda: session.sync.add("n"),
            lambda: session.sync.waiting("y"),
            lock,
        ):
            began_s = monotonic()
            with pytest.raises(HomeDown, match="cannot be reached"):
                await call()
            assert monotonic() - began_s < 10
