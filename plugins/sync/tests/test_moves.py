"""The store moves between nodes: whole, once, and back where anything fails. Real etcds."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from wetware.errors import Unsupported, WetwareError
from wetware.identity import PeerId
from wetware.testing import FakeOverlay, overlays, plugin_context
from wetware_sync.config import SyncConfig
from wetware_sync.engine import Closed, Get, LeaseEnded, Put, Txn
from wetware_sync.home import Home
from wetware_sync.kv import KvService
from wetware_sync.managed import contents
from wetware_sync.managed.child import EtcdError
from wetware_sync.managed.moves import Moves

from .parts import ADA, BOB

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]
needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed")


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
async def test_up_replace_down(tmp_path: Path) -> None:
    """Keys stay, with their owners; what is held ends; each move is a new epoch."""
    async with cluster(tmp_path, 5) as nodes:
        a, b, c, d, e = nodes
        engine = a.home.engine
        await a.put("one", "1")
        await a.put("two", "2", BOB)
        lease = await engine.grant(60, ADA)
        await engine.txn(Txn((Put(b"held", b"x", lease.id),)), ADA)
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
        assert {*a.home.entrances} == {b.peer, c.peer, d.peer}
        await until(lambda: b.put("three", "3"))
        with pytest.raises(LeaseEnded):
            await b.home.engine.keep(lease.id, ADA)

        await d.stop()  # for good
        await until(lambda: c.put("four", "4"))
        await b.service.moves.replace(d.peer, e.peer, silent)
        assert await until(e.all) == {"one": "1", "two": "2", "three": "3", "four": "4"}
        assert {*a.home.entrances} == {b.peer, c.peer, e.peer}
        await d.start()  # it has missed that
        await until(lambda: _asserted({*d.home.entrances} == {b.peer, c.peer, e.peer}))
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
            await until(lambda node=node: _asserted(node.home.entrances == (a.peer,)))
            await until(lambda node=node: _asserted(node.home.keeper.child is None))


async def _asserted(holds: bool) -> None:
    assert holds


STEPS = {
    "the etcds are looked at": (Moves, "_check"),
    "they are started": (Moves, "_prepare"),
    "they find each other": (Moves, "_wait_until_ready"),
    "the store is brought": (Moves, "_load"),
    "it is put into etcd": (contents, "load"),
}


@needs_etcd
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_move_that_fails_has_not_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """Whichever step fails, before or after it has done its part: the store is where it was."""
    where, name = STEPS[step]
    original = getattr(where, name)
    failing = True

    async def fails(*args: Any) -> Any:
        if failing and after:
            await original(*args)
        if failing:
            raise EtcdError("as planned")
        return await original(*args)

    def fails_in_thread(*args: Any) -> Any:
        if failing and after:
            original(*args)
        if failing:
            raise EtcdError("as planned")
        return original(*args)

    monkeypatch.setattr(where, name, fails_in_thread if where is contents else fails)
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
            await until(lambda node=node: _asserted(node.home.entrances == (home.peer,)))
            await until(lambda node=node: _asserted(node.home.keeper.child is None))
        failing = False
        await up(home, nodes)
        for node in nodes:
            assert await until(node.all) == {"key": "later"}
