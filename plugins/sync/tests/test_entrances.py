"""Two real nodes in front of one etcd, and one beside them that has none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import wetware
from wetware.errors import Denied, WetwareError
from wetware.testing import Home, NodeProcess
from wetware_sync.config import SyncConfig
from wetware_sync.engine import Closed, LeaseEnded, Unknown
from wetware_sync.errors import HomeDown, NotFree
from wetware_sync.home import own_etcd

from .etcds import EtcdProcess, Wire

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


@dataclass
class Three:
    """`a` and `b` are entrances, `c` is not; `wires`: of each to etcd."""

    home: Home
    etcd: EtcdProcess
    wires: dict[str, Wire]
    a: NodeProcess
    b: NodeProcess
    c: NodeProcess


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Three]:
    etcd = EtcdProcess(tmp_path / "etcd")
    etcd.start()
    try:
        with Home(tmp_path / "home", libp2p=False) as home:
            entrances = [str(home.node_id(name)) for name in ("a", "b")]
            wires = {name: Wire(etcd.ports[0]) for name in "ab"}
            env = {}
            for name in "abc":
                config = tmp_path / f"{name}.toml"
                config.write_text(
                    f'[plugins.sync]\nengine = "etcd"\nentrances = {json.dumps(entrances)}\n'
                    + (f'endpoints = ["127.0.0.1:{wires[name].port}"]' if name in wires else "")
                )
                env[name] = {"WW_CONFIG": str(config)}
            with (
                home.node("a", env=env["a"]) as a,
                home.node("b", join=a, env=env["b"]) as b,
                home.node("c", join=a, env=env["c"]) as c,
            ):
                for node in (a, b, c):
                    node.wait_members([other.peer_id for other in (a, b, c) if other is not node])
                yield Three(home, etcd, wires, a, b, c)
            for wire in wires.values():
                wire.cut()
    finally:
        etcd.stop(kill=True)


@contextlib.asynccontextmanager
async def at(node: NodeProcess) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(
        data_dir=node.data_dir, key=node.home.key(), reconnect=True
    ) as session:
        await opened(session)
        yield session


async def opened(session: wetware.Session) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(HomeDown, Closed):
                await session.kv.status()
                return
            await asyncio.sleep(0.05)


async def test_either_entrance_has_the_store(three: Three) -> None:
    async with at(three.a) as one, at(three.b) as other, at(three.c) as beside:
        home = (await beside.kv.home.here.call("home"))["home"]
        assert (home["engine"], set(home["entrances"])) == (
            "etcd",
            {three.a.peer_id, three.b.peer_id},
        )
        await one.kv.put("/k", b"1")
        for session in (other, beside):
            entry = await session.kv.get("/k")
            assert entry is not None
            assert entry.value == b"1"
        async with one.sync.lock("deploy") as held:
            for session in (other, beside):
                with pytest.raises(NotFree):
                    async with session.sync.lock("deploy", wait_s=0):
                        pass
            await one.kv.put("/k", b"2", fence=held)
        async with other.sync.lock("deploy") as later:
            assert later.revision > held.revision
            with pytest.raises(Denied, match="not held any more"):
                await one.kv.put("/k", b"3", fence=held)
        await beside.names.set("/site", "node:x")
        assert (await other.names.get("/site")).value == "node:x"
        status = await beside.kv.status()
        assert (status["engine"], status["failover"]) == (
            "etcd",
            "none: etcd has 1 member(s), and needs all of them",
        )


async def test_an_entrance_is_killed_and_its_users_go_on_at_the_other(three: Three) -> None:
    async with at(three.c) as session, at(three.b) as other:
        first = await session.kv.put("/w/0", b"0")
        used = three.a if session.kv.home.node == three.a.peer_id else three.b
        if used is three.b:
            pytest.fail("a user of no entrance begins at the first one")
        seen: list[int] = []

        async def watches() -> None:
            async for event in session.kv.watch("/w/", first):
                seen.append(event.revision)  # noqa: PERF401 they are looked at meanwhile

        watching = asyncio.create_task(watches())
        lease = session.kv.lease(60)
        async with asyncio.timeout(120), lease:
            await session.kv.put("/held", b"", lease=lease)
            await asyncio.to_thread(used.stop, signal.SIGKILL)
            last = 0
            for number in range(1, 20):
                last = await other.kv.put(f"/w/{number}", b"")
            written = 0
            while not written:
                with contextlib.suppress(HomeDown, Unknown):
                    written = await session.kv.put("/w/again", b"")
            while not seen or seen[-1] < written:
                assert not watching.done(), watching.exception()
                await asyncio.sleep(0.05)
            assert written > last
            log = [e async for e in _until(other, first, written)]
            assert seen == log, "the watch has a gap"
            assert await (await lease.ref()).call("keep") == {"ttl_ms": 60_000}
            entry = await other.kv.get("/held")
            assert entry is not None
        watching.cancel()


async def _until(session: wetware.Session, first: int, last: int) -> AsyncIterator[int]:
    async for event in session.kv.watch("/w/", first):
        yield event.revision
        if event.revision >= last:
            return


@pytest.mark.long
async def test_an_entrance_without_its_etcd_is_left(three: Three) -> None:
    async with at(three.c) as session, at(three.b) as other:
        first = await session.kv.put("/w/0", b"0")
        assert session.kv.home.node == three.a.peer_id
        watch = session.kv.watch("/w/", first)
        assert (await anext(watch)).revision == first
        async with asyncio.timeout(120), session.sync.lock("deploy", ttl_s=20) as held:
            three.wires["a"].cut()
            coming = asyncio.ensure_future(anext(watch))
            last = await other.kv.put("/w/1", b"1")
            assert (await coming).revision == last
            written = 0
            while not written:
                with contextlib.suppress(HomeDown, Unknown):
                    written = await session.kv.put("/w/2", b"2", fence=held)
            assert session.kv.home.node == three.b.peer_id
            await asyncio.sleep(21)  # longer than its lease
            assert held.lost is None
            await session.kv.put("/w/3", b"3", fence=held)


def test_who_else_can_read_the_password_is_not_asked_for_it(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("secret\n")
    file.chmod(0o644)
    config = SyncConfig(endpoints=("x:1",), user="ww", password_file=str(file))
    with pytest.raises(WetwareError, match="password"):
        own_etcd(config)
    file.chmod(0o600)
    login = own_etcd(config).login
    assert login is not None
    assert login.password == "secret"
    assert "secret" not in repr(login)


async def test_without_etcd_every_entrance_says_so(three: Three) -> None:
    async with at(three.c) as session:
        await session.kv.put("/k", b"1")
        await asyncio.to_thread(three.etcd.stop, kill=True)
        async with asyncio.timeout(60):
            with pytest.raises((HomeDown, Unknown)):
                await session.kv.put("/k", b"2")
            for _ in range(3):
                with pytest.raises(HomeDown, match="etcd cannot be reached"):
                    await session.kv.get("/k")
        await asyncio.to_thread(three.etcd.start)
        await opened(session)
        entry = await session.kv.get("/k")
        assert entry is not None
        assert entry.value == b"1"


@pytest.mark.long
async def test_a_store_of_one_node_moves_there(three: Three, tmp_path: Path) -> None:
    """With a backup; and what was held, there or here, is lost, and everybody is told."""
    copy = tmp_path / "copy"
    with Home(tmp_path / "before", libp2p=False) as before, before.node("one") as one:
        async with at(one) as session:
            for number in range(150):
                await session.kv.put(f"/kept/{number}", b"%d" % number)
            await session.names.set("/site", "node:x")
            async with session.sync.lock("deploy") as old:
                await session.kv.backup(copy)
            embedded = await session.kv.status()
    async with at(three.a) as session, at(three.b) as other:
        watch = other.kv.watch("/gone", await session.kv.put("/gone", b""))
        await anext(watch)
        watching = asyncio.ensure_future(anext(watch))
        told: list[WetwareError] = []

        async def holds() -> None:
            try:
                async with other.sync.lock("deploy", ttl_s=5):
                    held.set()
                    await asyncio.sleep(60)
            except WetwareError as exc:
                told.append(exc)

        held = asyncio.Event()
        holding = asyncio.create_task(holds())
        await held.wait()
        epoch = await session.kv.restore(copy)
        async with asyncio.timeout(60):
            with pytest.raises(WetwareError) as ended:
                await watching
            assert ended.value.code == "sync.moved"
            await holding
            assert [type(each) for each in told] == [LeaseEnded]
            await opened(session)
            await opened(other)
        status = await other.kv.status()
        assert status["epoch"] == epoch > embedded["epoch"]
        assert status["authority"] == embedded["authority"]
        kept = [(e.key, e.value) async for e in other.kv.ls("/kept/", values=True)]
        assert sorted(kept) == sorted((str(n), b"%d" % n) for n in range(150))
        assert await session.kv.get("/gone") is None
        assert (await session.names.get("/site")).value == "node:x"
        with pytest.raises(Denied, match="not held any more"):
            await session.kv.put("/kept/0", b"", fence=old)
        # And from there another one can be made.
        again = tmp_path / "again"
        await session.kv.backup(again)
        assert await session.kv.restore(again) > epoch
