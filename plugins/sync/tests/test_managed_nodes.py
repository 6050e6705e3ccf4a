"""Three real nodes that run an etcd each for the store: one may die, and of two nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

import wetware
from wetware.errors import Denied, OverlayError, WetwareError
from wetware.testing import Home, NodeProcess, wait_for
from wetware_sync.engine import Closed, LeaseEnded, Unknown, Unwritten
from wetware_sync.errors import HomeDown

from .etcds import needs_etcd

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(600),
    pytest.mark.long,
    needs_etcd,
]

GOES_ON_S = 5.0
"""From the death of a member until writes and locks of all clients go on."""
LOCK_TTL_S = 2.0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Home, dict[str, NodeProcess]]]:
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(Home(tmp_path, libp2p=False))
        a = stack.enter_context(home.node("a"))
        b = stack.enter_context(home.node("b", join=a))
        c = stack.enter_context(home.node("c", join=a))
        found = {"a": a, "b": b, "c": c}
        for node in found.values():
            node.wait_members([other.peer_id for other in found.values() if other is not node])
        yield home, found
        for name, node in found.items():  # those that were started again
            if node is not {"a": a, "b": b, "c": c}[name]:
                node.stop()


@contextlib.asynccontextmanager
async def at(node: NodeProcess) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(
        data_dir=node.data_dir, key=node.home.key(), reconnect=True
    ) as session:
        yield session


async def test_who_holds_and_who_watches_is_told_and_the_token_is_worth_nothing(
    nodes: tuple[Home, dict[str, NodeProcess]],
) -> None:
    _, found = nodes
    a, b, c = found.values()

    async def watch(session: Any) -> list[Any]:
        return [event async for event in session.kv.open("/held/").watch()]

    async with wetware.connect(data_dir=b.data_dir, key=b.home.key()) as session:
        await session.kv.put("/held/key", "before")
        watching = asyncio.create_task(watch(session))
        held: list[Any] = []

        async def move_while_held() -> None:
            async with session.sync.lock("moving", ttl_s=5.0) as lock:
                held.append(lock)
                await session.kv.put("/held/key", "held", fence=lock)
                on = ",".join(str(node.peer_id) for node in (a, b, c))
                done = await asyncio.to_thread(a.ww, "sync", "etcd", "up", "--on", on, "--yes")
                assert done.returncode == 0, done.stderr
                await asyncio.sleep(60)

        with pytest.raises(LeaseEnded):
            await move_while_held()
        with pytest.raises((Closed, OverlayError)):
            await watching
    async with at(c) as session:
        entry = await opened(session, "/held/key")
        assert entry.value == b"held"
        with pytest.raises(Denied, match="not held any more"):
            await session.kv.put("/held/key", "late", fence=held[0])
        async with session.sync.lock("moving", wait_s=0):  # nobody has it
            pass


async def opened(session: Any, key: str) -> Any:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(Closed, OverlayError):
                return await session.kv.get(key)
            await asyncio.sleep(0.1)


async def test_a_member_without_etcd_is_named_and_nothing_is_moved(tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    with (
        Home(tmp_path / "home", libp2p=False) as home,
        home.node("a") as a,
        home.node("b", join=a) as b,
        Home(tmp_path / "other", libp2p=False, env={"PATH": str(bare)}) as other,
        other.node("c", join=a) as c,
    ):
        a.wait_members([b.peer_id, c.peer_id])
        on = ",".join(str(node.peer_id) for node in (a, b, c))
        done = a.ww("sync", "etcd", "up", "--on", on, "--yes")
        assert done.returncode != 0
        assert str(c.peer_id) in done.stderr
        assert "apt install etcd-server" in done.stderr
        assert "engine    embedded" in a.ww("kv", "status", check=True).stdout
        asked = a.ww("sync", "etcd", "up", "--on", on)
        assert asked.returncode != 0  # it asks, and nobody answers


class Load:
    """Clients that write and lock all the time, and what they were told."""

    def __init__(self) -> None:
        self.acked: dict[str, int] = {}
        self.done: dict[str, list[float]] = {}
        self.progress = asyncio.Event()

    async def writes(self, name: str, session: Any) -> None:
        number = 0
        while True:
            number += 1
            try:
                async with asyncio.timeout(20):
                    await session.kv.put(f"/load/{name}", str(number))
            except (WetwareError, TimeoutError):
                await asyncio.sleep(0.05)
            else:
                self.acked[name] = number
                self._done(name)

    async def locks(self, name: str, session: Any) -> None:
        while True:
            try:
                async with asyncio.timeout(20):
                    async with session.sync.lock("load/lock", ttl_s=LOCK_TTL_S):
                        self._done(name)
            except (WetwareError, TimeoutError):
                await asyncio.sleep(0.05)

    def _done(self, name: str) -> None:
        self.done.setdefault(name, []).append(monotonic())
        self.progress.set()

    async def goes_on(self, names: tuple[str, ...], since: float) -> dict[str, float]:
        """Of each how long after `since` it has done something that was begun later."""
        async with asyncio.timeout(60):
            while not all(sum(t > since for t in self.done.get(n, ())) >= 2 for n in names):
                self.progress = asyncio.Event()
                await self.progress.wait()
        return {n: sorted(t for t in self.done[n] if t > since)[1] - since for n in names}


def etcd_of(node: NodeProcess) -> int:
    """The process ID of a node's etcd."""
    pid = node.process.pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{child}/comm").read_text() == "etcd\n":
                return int(child)
    raise AssertionError(f"{pid} has no etcd")


def status(node: NodeProcess) -> list[dict[str, Any]]:
    shown = node.ww("sync", "etcd", "status", "--json")
    assert shown.returncode == 0, shown.stderr
    parts: list[dict[str, Any]] = json.loads(shown.stdout)["parts"]
    return parts


def all_work(node: NodeProcess, count: int = 3) -> bool:
    parts = status(node)
    return len(parts) == count and not any(part["failing"] for part in parts)


async def kill(node: NodeProcess) -> float:
    """With all that is on it; returns when."""
    etcd = etcd_of(node)
    killed = monotonic()
    await asyncio.to_thread(node.stop, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{etcd}").exists(), "its etcd to be gone with it")
    return killed


async def test_one_of_three_dies_under_load_and_then_a_second(
    nodes: tuple[Home, dict[str, NodeProcess]],
) -> None:
    home, at_name = nodes
    a, b, c = at_name["a"], at_name["b"], at_name["c"]
    names = {node.peer_id: name for name, node in at_name.items()}
    assert a.ww("kv", "put", "/before", "1").returncode == 0
    moved = a.ww("sync", "etcd", "up", "--yes", "--on", f"{a.peer_id},{b.peer_id},{c.peer_id}")
    assert moved.returncode == 0, moved.stderr
    await asyncio.to_thread(wait_for, lambda: all_work(b), "three etcds", within_s=60)
    leader = next(names[part["node"]] for part in status(b) if part["leads"])
    # The leader dies: that is the harder one. The clients are at the others.
    victim, (left, right) = leader, [name for name in names.values() if name != leader]
    load = Load()
    async with at(at_name[left]) as one, at(at_name[right]) as other:
        assert (await one.kv.get("/before")).value == b"1"  # type: ignore[union-attr]
        work = {
            "write one": load.writes("one", one),
            "lock one": load.locks("lock one", one),
            "write other": load.writes("other", other),
            "lock other": load.locks("lock other", other),
        }
        clients = ("one", "other", "lock one", "lock other")
        tasks = [asyncio.create_task(each) for each in work.values()]
        try:
            await load.goes_on(clients, monotonic())
            killed = await kill(at_name[victim])
            took = await load.goes_on(clients, killed)
            assert max(took.values()) < GOES_ON_S, took

            at_name[victim] = await again(home, victim, at_name[left])
            await asyncio.to_thread(
                wait_for, lambda: all_work(at_name[left]), "all three etcds", within_s=90
            )

            await kill(at_name[victim])
            await kill(at_name[right])
            with pytest.raises(HomeDown):
                await refused(one)
            at_name[right] = await again(home, right, at_name[left])
            at_name[victim] = await again(home, victim, at_name[left])
            back = monotonic()
            await load.goes_on(("one", "lock one"), back)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        async with asyncio.timeout(60):
            for name, number in load.acked.items():
                entry = None
                while entry is None:
                    with contextlib.suppress(OverlayError, Closed):
                        entry = await one.kv.get(f"/load/{name}")
                assert int(entry.value) >= number, f"{name}: {number} was acknowledged"


async def refused(session: wetware.Session) -> None:
    """What a read raises once the store knows that it is away."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(Closed, Unknown, Unwritten):
                await session.kv.get("/before")
            await asyncio.sleep(0.1)


async def again(home: Home, name: str, by: NodeProcess) -> NodeProcess:
    node = await asyncio.to_thread(home.start_node, name, peers=[by.addr])
    return await asyncio.to_thread(node.wait_ready)
