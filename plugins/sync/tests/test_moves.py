"""The store moves between nodes: whole, once, and back where anything fails. Real etcds."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from wetware.base.private_files import replace_private_file
from wetware.errors import Busy, Unsupported, WetwareError
from wetware.identity import Key, PeerId
from wetware.testing import FakeOverlay, overlays, plugin_context
from wetware_sync.config import SyncConfig
from wetware_sync.engine import Closed, Get, LeaseEnded, Put, Txn
from wetware_sync.home import Home
from wetware_sync.kv import KvService
from wetware_sync.managed.child import EtcdError
from wetware_sync.managed.moves import Moves
from wetware_sync.managed.placement import (
    RUNS,
    SERVES,
    BadPlacement,
    Part,
    Placement,
    Placements,
)

from .etcds import needs_etcd
from .parts import ADA, BOB

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


class Node:
    """A node's service `kv`, which is stopped and started again."""

    def __init__(self, overlay: FakeOverlay, directory: Path, founder: PeerId) -> None:
        directory.mkdir(0o700)
        overlay.founded_by = founder
        self.overlay = overlay
        self.ctx = plugin_context(directory, SyncConfig(), name="sync", overlay=overlay)
        self._task: asyncio.Task[None] | None = None

    @property
    def peer(self) -> PeerId:
        return self.overlay.peer_id

    async def start(self) -> None:
        self.home = Home(self.ctx)
        self.service = KvService(self.home)
        self.overlay.services["kv"] = self.service
        started = asyncio.Event()

        async def run() -> None:
            async with anyio.create_task_group() as tasks:
                await tasks.start(lambda **how: self.service.run(**how))
                started.set()

        self._task = asyncio.create_task(run())
        done = asyncio.create_task(started.wait())
        await asyncio.wait([done, self._task], return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        self.overlay.services.pop("kv", None)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def put(self, key: str, value: str, owner: str = ADA) -> None:
        await self.home.engine.txn(Txn((Put(key.encode(), value.encode()),)), owner)

    async def all(self) -> dict[str, str]:
        page = await self.home.engine.read(Get(b"", prefix=True))
        return {item.key.decode(): item.value.decode() for item in page.items}


@contextlib.asynccontextmanager
async def cluster(directory: Path, count: int) -> AsyncIterator[tuple[Node, ...]]:
    """Nodes, of which the first is the home of the store."""
    async with overlays(count) as made:
        founder = made[0].peer_id
        nodes = tuple(Node(each, directory / str(at), founder) for at, each in enumerate(made))
        try:
            for node in nodes:
                await node.start()
            yield nodes
        finally:
            await asyncio.gather(*(node.stop() for node in nodes))


async def until(works: Callable[[], Any], within_s: float = 60) -> Any:
    """What it returns as soon as it does not raise."""
    async with asyncio.timeout(within_s):
        while True:
            with contextlib.suppress(WetwareError, AssertionError):
                return await works()
            await asyncio.sleep(0.05)


async def silent(_: str) -> None:
    """Nobody wants to know how far it is."""


async def up(home: Node, on: tuple[Node, ...]) -> None:
    await home.service.moves.up([node.peer for node in on], silent)


@needs_etcd
@pytest.mark.long
async def test_up_replace_down(tmp_path: Path) -> None:
    """Keys stay, with their owners; what is held ends; each move is a new epoch."""
    async with cluster(tmp_path, 5) as nodes:
        a, b, c, d, e = nodes
        engine = a.home.engine
        await a.put("one", "1")
        await a.put("two", "2", BOB)
        lease = await engine.grant(60, ADA)
        await engine.txn(Txn((Put(b"held", b"x", lease),)), ADA)
        watch = engine.watch(b"", 1, ADA, prefix=True)
        await watch.next()
        authority, epoch = engine.authority.peer_id, engine.epoch
        lines: list[str] = []

        async def tell(line: str) -> None:
            lines.append(line)

        await a.service.moves.up([b.peer, c.peer, d.peer], tell)
        assert lines[-1] == "the store is in etcd"
        with pytest.raises(Closed):
            await watch.next()
        with pytest.raises(Unsupported, match="not here"):
            _ = a.home.engine
        for node in (b, c, d):
            assert await until(node.all) == {"one": "1", "two": "2"}
            assert node.home.engine.authority.peer_id == authority
            assert node.home.engine.epoch == epoch + 1
        assert {*a.home.place[1]} == {b.peer, c.peer, d.peer}
        await until(lambda: b.put("three", "3"))
        with pytest.raises(LeaseEnded):
            await b.home.engine.keep(lease, ADA)

        await d.stop()  # for good
        await until(lambda: c.put("four", "4"))
        await b.service.moves.replace(d.peer, e.peer, silent)
        assert await until(e.all) == {"one": "1", "two": "2", "three": "3", "four": "4"}
        assert {*a.home.place[1]} == {b.peer, c.peer, e.peer}
        await d.start()  # it has missed that
        await until(lambda: _asserted({*d.home.place[1]} == {b.peer, c.peer, e.peer}))
        await until(lambda: _asserted(not list((tmp_path / "3" / "etcd").iterdir())))
        await c.stop()  # the one that came is as good as those that were there
        await until(lambda: b.put("five", "5"))
        await c.start()

        await b.service.moves.down(a.peer, silent)
        assert await until(a.all) == dict(one="1", two="2", three="3", four="4", five="5")
        assert a.home.engine.authority.peer_id == authority
        assert a.home.engine.epoch > epoch + 1
        status = await a.home.engine.status()
        assert status.keys == 5
        for node in (b, c, d, e):
            await until(lambda node=node: _asserted(node.home.place[1] == (a.peer,)))
            await until(lambda node=node: _asserted(node.home.keeper.child is None))


async def _asserted(holds: bool) -> None:
    assert holds


STEPS = {
    "the etcds are looked at": (Moves, "_check"),
    "they are started": (Moves, "_prepare"),
    "they find each other": (Moves, "_wait_until_ready"),
    "the store is brought": (Moves, "_load"),
    "it is put into etcd": (Home, "load"),
    "it is taken out": (Home, "dump"),
    "nobody serves it": (Moves, "_close"),
    "it is taken": (Moves, "take_store"),
}
UP, DOWN = list(STEPS)[:5], list(STEPS)[5:]


class Fault:
    """One step fails: before it has done its part, or after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: str, *, after: bool) -> None:
        where, name = STEPS[step]
        original = getattr(where, name)
        self.on = True

        def check(now: bool) -> None:
            if self.on and now:
                raise EtcdError("as planned")

        async def fails(*args: Any) -> Any:
            check(not after)
            result = await original(*args)
            check(True)
            return result

        monkeypatch.setattr(where, name, fails)


BOTH = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@needs_etcd
@pytest.mark.long
@BOTH
@pytest.mark.parametrize("step", UP)
async def test_a_move_up_that_fails_has_not_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """Whichever step fails: the store is where it was, with all that is in it, and can be moved."""
    fault = Fault(monkeypatch, step, after=after)
    async with cluster(tmp_path, 3) as nodes:
        home = nodes[0]
        await home.put("key", "value")
        epoch = home.home.engine.epoch
        with pytest.raises(EtcdError, match="as planned"):
            await up(home, nodes)
        assert await until(home.all) == {"key": "value"}
        await home.put("key", "later")
        assert home.home.engine.epoch == epoch
        for node in nodes:
            await until(lambda node=node: _asserted(node.home.place[1] == (home.peer,)))
            await until(lambda node=node: _asserted(node.home.keeper.child is None))
        fault.on = False
        await up(home, nodes)
        for node in nodes:
            assert await until(node.all) == {"key": "later"}


@needs_etcd
@pytest.mark.long
@BOTH
@pytest.mark.parametrize("step", DOWN)
async def test_a_move_down_that_fails_has_not_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """The same the other way."""
    async with cluster(tmp_path, 4) as nodes:
        home, *others = nodes
        await home.put("key", "value")
        await up(home, nodes[:3])
        await until(lambda: others[0].put("key", "in etcd"))
        fault = Fault(monkeypatch, step, after=after)
        with pytest.raises(EtcdError, match="as planned"):
            await others[0].service.moves.down(home.peer, silent)
        for node in nodes[:3]:
            assert await until(node.all) == {"key": "in etcd"}
        await until(lambda: others[1].put("key", "later"))
        fault.on = False
        await others[1].service.moves.down(home.peer, silent)
        assert await until(home.all) == {"key": "later"}


@needs_etcd
@pytest.mark.long
@BOTH
@pytest.mark.parametrize("is_away", [False, True], ids=["there", "away"])
async def test_a_replacement_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_away: bool, after: bool
) -> None:
    """Who was to come runs no etcd any more, and the command can be given again."""
    async with cluster(tmp_path, 4) as nodes:
        home, second, third, fourth = nodes
        await home.put("key", "value")
        await up(home, nodes[:3])
        assert await until(second.all) == {"key": "value"}
        if is_away:
            await third.stop()
        fault = Fault(monkeypatch, "they are started", after=after)
        with pytest.raises(EtcdError, match="as planned"):
            await home.service.moves.replace(third.peer, fourth.peer, silent)
        await until(lambda: _asserted(fourth.home.keeper.child is None))
        await until(lambda: second.put("key", "later"))
        fault.on = False
        await second.service.moves.replace(third.peer, fourth.peer, silent)
        assert await until(fourth.all) == {"key": "later"}
        assert {*home.home.place[1]} == {home.peer, second.peer, fourth.peer}
        parts = [await home.service.moves.look(peer) for peer in home.home.place[1]]
        assert [part["failing"] for part in parts] == [""] * 3


@needs_etcd
@pytest.mark.long
async def test_a_home_that_is_killed_while_it_moves_the_store_still_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who had begun with the move hears of it."""
    async with cluster(tmp_path, 4) as nodes:
        home, *others = nodes
        await home.put("key", "value")
        reached = asyncio.Event()

        async def hangs(*_: Any) -> None:
            reached.set()
            await asyncio.sleep(3600)

        async def nothing(*_: Any) -> None:
            """A process that is killed undoes nothing."""

        monkeypatch.setattr(Moves, "_load", hangs)
        monkeypatch.setattr(Moves, "_give_up", nothing)
        moving = asyncio.create_task(up(home, tuple(others)))
        await asyncio.wait_for(reached.wait(), 90)
        with pytest.raises(Closed):
            _ = home.home.engine
        moving.cancel()
        with anyio.move_on_after(0.2):
            await home.stop()
        await home.start()
        assert await until(home.all) == {"key": "value"}
        for node in others:
            await until(lambda node=node: _asserted(node.home.keeper.child is None))


@needs_etcd
@pytest.mark.long
async def test_what_was_answered_is_there_after_each_move(tmp_path: Path) -> None:
    """Writers go on all the time; down while a member is away, which has no part in it then."""
    async with cluster(tmp_path, 3) as nodes:
        acked: dict[str, int] = {}

        async def write(node: Node, name: str) -> None:
            number = 0
            while True:
                number += 1
                try:
                    await node.put(name, str(number))
                except WetwareError:
                    await asyncio.sleep(0.01)
                else:
                    acked[name] = number

        tasks = [
            asyncio.create_task(write(node, f"{at}.{n}"))
            for at, node in enumerate(nodes)
            for n in range(4)
        ]
        home, second, third = nodes
        names = [f"{at}.{n}" for at in range(3) for n in range(4)]
        try:
            await until(lambda: _asserted(len(acked) == 4))
            await up(home, nodes)
            before = dict(acked)
            found = await until(second.all)
            assert all(int(found[name]) >= number for name, number in before.items())
            await until(lambda: _asserted(set(acked) == set(names)))
            await third.stop()
            await second.service.moves.down(home.peer, silent)
            before = dict(acked)
            found = await until(home.all)
            assert all(int(found[name]) >= number for name, number in before.items())
            await third.start()
            await until(lambda: _asserted(third.home.place[1] == (home.peer,)))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


@needs_etcd
async def test_the_old_home_never_has_it_again(tmp_path: Path) -> None:
    """Also where it is started again and sees nobody; and of two dead the third serves nothing."""
    async with cluster(tmp_path, 4) as nodes:
        home, *others = nodes
        await home.put("key", "old")
        await up(home, tuple(others))
        await until(lambda: others[0].put("key", "new"))
        await home.stop()
        for node in others:
            await home.overlay.disconnect(node.overlay)
        await home.start()
        with pytest.raises(Unsupported, match="not here"):
            _ = home.home.engine
        assert (home.home.directory / "store.db").exists()  # what it had is not what counts
        for node in others[1:]:
            await node.stop()
        with pytest.raises(WetwareError):
            await forever(others[0])
        await others[1].start()
        assert await until(others[0].all) == {"key": "new"}


async def forever(node: Node) -> None:
    async with asyncio.timeout(60):
        while True:
            await node.all()


# --- who may say where it is ----------------------------------------------------------------------


def placements(overlay: FakeOverlay, directory: Path, founder: PeerId) -> Placements:
    overlay.founded_by = founder
    directory.mkdir()
    return Placements(plugin_context(directory, SyncConfig(), name="sync", overlay=overlay))


async def test_only_the_first_home_names_the_key_that_signs(tmp_path: Path) -> None:
    a, b, c = (FakeOverlay() for _ in range(3))
    home = placements(a, tmp_path / "a", a.peer_id)
    member = placements(b, tmp_path / "b", a.peer_id)
    liar = placements(c, tmp_path / "c", c.peer_id)
    parts = {b.peer_id: Part(1, RUNS)}
    first = await home.put(Placement(1, a.peer_id, parts))
    assert await member.take(first)
    with pytest.raises(BadPlacement, match="does not say"):
        await member.take(await liar.put(Placement(9, c.peer_id)))
    for at in range(0, len(first), 7):
        forged = first[:at] + bytes([first[at] ^ 1]) + first[at + 1 :]
        with pytest.raises(BadPlacement):
            await member.take(forged)
    with pytest.raises(BadPlacement, match="not the key"):
        await member.keep_key(Key.generate().seed, first)
    assert member._key is None
    await member.keep_key(home.seed, first)
    second = await member.put(Placement(2, None, {b.peer_id: Part(1, SERVES)}))
    assert await home.take(second)
    assert home.home is None
    assert not await home.take(first)  # what is older counts no more
    again = Placements(home._ctx)
    again.load()
    assert again.current == home.current


async def test_of_one_version_there_is_one(tmp_path: Path) -> None:
    """Two who change something at once cannot both succeed: each member takes one."""
    a = FakeOverlay()
    home = placements(a, tmp_path / "a", a.peer_id)
    first = await home.sign(Placement(1, a.peer_id))
    other = await home.sign(Placement(1, None))
    assert await home.take(first)
    assert not await home.take(other)
    with pytest.raises(Busy):
        await home.put(Placement(1, None))


async def test_another_cluster_s_placement_says_nothing(tmp_path: Path) -> None:
    key = Key.generate()
    a, b = FakeOverlay(key, cluster="aa" * 20), FakeOverlay(cluster="bb" * 20)
    signed = await placements(a, tmp_path / "a", a.peer_id).sign(Placement(1, a.peer_id))
    with pytest.raises(BadPlacement):
        await placements(b, tmp_path / "b", a.peer_id).take(signed)


async def test_a_placement_on_the_disk_counts_also_where_its_taker_was_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another one of the same version would come in its place, at this node or on the disk."""
    async with cluster(tmp_path, 1) as (home,):
        writing, written = threading.Event(), threading.Event()
        placements = home.home.placements
        await placements.put(Placement(1, home.peer))

        def slow(path: Path, data: bytes) -> None:
            writing.set()
            assert written.wait(60)
            replace_private_file(path, data)

        monkeypatch.setattr("wetware_sync.managed.placement.replace_private_file", slow)
        taking = asyncio.create_task(placements.put(Placement(2, home.peer)))
        assert await asyncio.to_thread(writing.wait, 60)
        taking.cancel()
        await asyncio.wait([taking], timeout=0.1)
        written.set()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert placements.current == Placement(2, home.peer)
        again = Home(home.ctx).placements
        again.load()
        assert again.current == placements.current
