"""Keys, locks and names from any node of a cluster: each test is at `b`, the store at `a`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest

import wetware
from wetware.errors import Denied, InvalidArgument
from wetware.testing import Home, NodeProcess
from wetware_sync.client import Compare, Write
from wetware_sync.engine import Closed, LeaseEnded
from wetware_sync.errors import Conflict, HomeDown, NotFree

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

Pair = tuple[NodeProcess, NodeProcess]


@pytest.fixture
def own_pair(home: Home) -> Iterator[Pair]:
    """Two nodes of one test."""
    with home.node("a") as a, home.node("b", join=a) as b:
        a.wait_members([b.peer_id])
        b.wait_members([a.peer_id])
        yield a, b


@contextlib.asynccontextmanager
async def at(node: NodeProcess, *, reconnect: bool = False) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(
        data_dir=node.data_dir, key=node.home.key(), reconnect=reconnect
    ) as session:
        yield session


async def opened(session: wetware.Session) -> None:
    """The store is open."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(HomeDown, Closed):
                await session.kv.status()
                return
            await asyncio.sleep(0.05)


async def test_keys_from_another_node(pair: Pair) -> None:
    a, b = pair
    async with at(b) as session, at(a) as there:
        kv = session.kv
        assert (await kv.home.call("home"))["home"]["node"] == a.peer_id
        first = await kv.put("/shop/price", "12")
        entry = await there.kv.get("/shop/price")
        assert entry is not None
        assert (entry.key, entry.value, entry.modified) == ("price", b"12", first)
        shop = session.kv.open("/shop/")
        assert await shop.cas("price", b"13", modified=first - 1) == 0
        second = await shop.cas("price", b"13", modified=first)
        assert second == first + 1
        done, third = await shop.txn(
            [Compare("price", modified=second), Compare("stock", modified=0)],
            [Write("stock", b"3"), Write("price", None)],
        )
        assert done
        assert [(e.key, e.value) async for e in shop.ls(values=True)] == [("stock", b"3")]
        assert await kv.get("/shop/price") is None
        done, _ = await shop.txn([Compare("stock", value=b"4")], [], [Write("stock", b"5")])
        assert not done
        one = session.kv.open("/shop/stock")
        got = await one.get()
        assert got is not None
        assert (got.value, got.created, got.version) == (b"5", third, 2)
        with pytest.raises(InvalidArgument, match="no path"):
            await kv.put("shop", b"")
        assert await shop.delete("", below=True) == 1


async def test_a_watch_tells_each_change_once_and_goes_on_from_a_revision(pair: Pair) -> None:
    a, b = pair
    async with at(b) as session, at(a) as there:
        tree = session.kv.open("/watched/")
        first = await there.kv.put("/watched/a", b"1")
        watch = tree.watch(revision=first)
        event = await anext(watch)
        assert (event.key, event.value, event.revision) == ("a", b"1", first)
        await there.kv.put("/elsewhere", b"")
        await there.kv.delete("/watched/a")
        event = await anext(watch)
        assert (event.key, event.value, event.entry) == ("a", None, None)
        assert event.revision == first + 2
        again = tree.watch(revision=first)
        assert [(await anext(again)).revision, (await anext(again)).revision] == [first, first + 2]


async def test_a_share_of_a_prefix_reads_and_nothing_else(pair: Pair) -> None:
    a, _ = pair
    async with at(a) as session:
        await session.kv.put("/shared/a", b"1")
        weak = await session.attenuate({"kv:/shared/": ["Kv.open", "Reader.*"]})
        shared = weak.kv.open("/shared/")
        entry = await shared.get("a")
        assert entry is not None
        with pytest.raises(Denied):
            await shared.put("a", b"2")
        with pytest.raises(Denied):
            await weak.kv.open("/").get("shared/a")


async def test_two_want_a_lock_from_two_nodes(pair: Pair) -> None:
    a, b = pair
    async with at(a) as one, at(b) as other:
        got: list[int] = []
        async with one.sync.lock("deploy") as held:
            with pytest.raises(NotFree):
                async with other.sync.lock("deploy", wait_s=0):
                    pass

            async def second() -> None:
                async with other.sync.lock("deploy") as mine:
                    got.append(mine.revision)

            waiting = asyncio.create_task(second())
            while len(await one.sync.waiting("deploy")) < 2:
                await asyncio.sleep(0.01)
            assert [w.held for w in await one.sync.waiting("deploy")] == [True, False]
            assert not got
            await one.kv.put("/deploy", b"1", fence=held)
        await asyncio.wait_for(waiting, 60)
        assert got[0] > held.revision
        with pytest.raises(Denied, match="not held any more"):
            await one.kv.put("/deploy", b"2", fence=held)
        assert await one.sync.waiting("deploy") == ()


async def test_readers_share_and_a_writer_waits_for_them(pair: Pair) -> None:
    _, b = pair
    async with at(b) as session, session.sync.lock("rw", shared=True):
        async with session.sync.lock("rw", shared=True, wait_s=0):
            with pytest.raises(NotFree):
                async with session.sync.lock("rw", wait_s=0.1):
                    pass
        waiting = await session.sync.waiting("rw")
        assert [(w.kind, w.held) for w in waiting] == [("shared", True)]


async def test_a_semaphore_a_leader_a_counter_and_a_barrier(pair: Pair) -> None:
    a, b = pair
    async with at(b) as session, at(a) as there:
        sync = session.sync
        async with sync.semaphore("slots", 2), sync.semaphore("slots", 2):
            with pytest.raises(NotFree):
                async with there.sync.semaphore("slots", 2, wait_s=0.1):
                    pass
            with pytest.raises(InvalidArgument, match="2 places"):
                async with there.sync.semaphore("slots", 3):
                    pass
        leaders = there.sync.leaders("chief")
        assert await anext(leaders) is None
        async with sync.election("chief", b"me") as held:
            leader = await anext(leaders)
            assert leader is not None
            assert leader.value == b"me"
            await held.proclaim(b"still me")
            leader = await anext(leaders)
            assert leader is not None
            assert leader.value == b"still me"
        assert await anext(leaders) is None
        assert sorted(await asyncio.gather(*(sync.add("n") for _ in range(20)))) == [*range(1, 21)]
        assert await there.sync.count("n") == 20
        await sync.block("gate")
        with pytest.raises(NotFree):
            await there.sync.pass_("gate", wait_s=0.1)
        passing = asyncio.create_task(there.sync.pass_("gate"))
        await asyncio.sleep(0.1)
        await sync.unblock("gate")
        await asyncio.wait_for(passing, 60)


async def test_names_with_history(pair: Pair) -> None:
    a, b = pair
    async with at(b) as session, at(a) as there:
        first = await session.names.set("/site/live", "bafy1")
        with pytest.raises(Conflict):
            await there.names.set("/site/live", "bafy2", expected=0)
        await there.names.set("/site/live", "bafy2", expected=first)
        name = await session.names.get("/site/live")
        assert (name.value, [past.value for past in name.history]) == ("bafy2", ["bafy1"])
        assert [n.path async for n in session.names.ls("/site/")] == ["/site/live"]
        assert await session.names.rm("/site/live")
        with pytest.raises(wetware.errors.NotFound):
            await session.names.get("/site/live")


async def test_a_holder_that_is_stopped_beyond_its_lease_writes_nothing_more(pair: Pair) -> None:
    """It is paused with SIGSTOP, in a process of its own, and goes on as if nothing had been."""
    a, b = pair
    script = f"""
import asyncio, sys, wetware
async def main():
    async with wetware.connect(data_dir={str(b.data_dir)!r}) as s:
        try:
            async with s.sync.lock("paused", ttl_s=2) as held:
                print("held", flush=True)
                await asyncio.to_thread(sys.stdin.readline)
                try:
                    await s.kv.put("/paused", b"old", fence=held)
                except Exception as exc:
                    print(type(exc).__name__, flush=True)
                else:
                    print("written", flush=True)
        except BaseException as exc:
            print(type(exc).__name__, flush=True)
asyncio.run(main())
"""
    holder = subprocess.Popen(  # noqa: ASYNC220  # at once
        [sys.executable, "-c", script],
        env=b.home.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert await asyncio.to_thread(holder.stdout.readline) == "held\n"
        os.kill(holder.pid, signal.SIGSTOP)
        async with at(a) as session, session.sync.lock("paused", wait_s=20) as held:
            await session.kv.put("/paused", b"new", fence=held)
            os.kill(holder.pid, signal.SIGCONT)
            out, _ = await asyncio.to_thread(holder.communicate, "go\n", 20)
            assert out.split() in (["LeaseEnded"], ["Denied", "LeaseEnded"])
            entry = await session.kv.get("/paused")
            assert entry is not None
            assert entry.value == b"new"
    finally:
        holder.kill()
        await asyncio.to_thread(holder.communicate)


async def test_a_backup_takes_the_place_of_a_running_store(own_pair: Pair, tmp_path: Path) -> None:
    a, b = own_pair
    async with at(b) as session, at(a) as there:
        kv, copy = session.kv, tmp_path / "copy"
        first = await kv.put("/kept", b"1")
        assert await kv.backup(copy) == copy.stat().st_size
        assert copy.stat().st_mode & 0o777 == 0o600
        watch = there.kv.open("/").watch(revision=first)
        assert (await anext(watch)).value == b"1"

        async def hold() -> None:
            async with there.sync.lock("kept", ttl_s=2) as held:
                await kv.put("/kept", b"2")
                before = (await kv.status())["epoch"]
                assert await kv.restore(copy) == before + 1
                await opened(session)
                with pytest.raises(Denied, match="not held any more"):
                    await there.kv.put("/kept", b"3", fence=held)
                await anyio.sleep_forever()

        with pytest.raises(LeaseEnded, match="what was held is lost"):
            await hold()
        with pytest.raises(Closed):
            await anext(watch)
        entry = await kv.get("/kept")
        assert entry is not None
        assert entry.value == b"1"
        copy.write_bytes(b"junk")
        with pytest.raises(InvalidArgument, match="no backup"):
            await kv.restore(copy)
        await opened(session)
        assert await kv.get("/kept") == entry
        async with there.sync.lock("kept", wait_s=10):
            pass
    assert sorted(path.name for path in (a.data_dir / "plugins" / "sync").iterdir()) == ["store"]


async def test_the_home_is_killed_and_comes_back(home: Home, own_pair: Pair) -> None:
    a, b = own_pair
    with contextlib.ExitStack() as stack:
        await _killed(stack, home, a, b)


async def _killed(stack: contextlib.ExitStack, home: Home, a: NodeProcess, b: NodeProcess) -> None:
    async with at(b, reconnect=True) as session:
        revision = await session.kv.put("/kept", b"1")
        watch = session.kv.open("/").watch(revision=revision)
        assert (await anext(watch)).key == "kept"
        async with session.sync.lock("kept", ttl_s=30) as held:
            a.stop(signal.SIGKILL)
            with pytest.raises(HomeDown):
                await session.kv.get("/kept")
            stack.enter_context(home.node("a", peers=[b.addr]))
            await opened(session)
            assert held.lost is None
            await session.kv.put("/kept", b"2", fence=held)
            event = await asyncio.wait_for(anext(watch), 60)
            assert (event.key, event.value) == ("kept", b"2")
        assert await session.sync.waiting("kept") == ()
