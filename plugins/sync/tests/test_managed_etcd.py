"""Etcds of several nodes that speak by streams of the nodes: real ones, on links in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from wetware.errors import Unsupported, WetwareError
from wetware.testing import FakeOverlay, overlays, plugin_context
from wetware_sync.errors import HomeDown
from wetware_sync.managed.child import Child, check_version, find
from wetware_sync.managed.pipes import PROTOCOL, Pipes, Room

from .etcds import anyio_backend, needs_etcd, one_loop  # noqa: F401 fixtures

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(240),
    needs_etcd,
]


class Member:
    """One with an etcd."""

    def __init__(self, overlay: FakeOverlay, directory: Path) -> None:
        directory.mkdir(0o700)
        self.ctx = plugin_context(directory, overlay=overlay)
        self.room = Room(directory)
        self.admitted: set[Any] = set()
        self.changed = anyio.Event()
        self.pipes = Pipes(self.ctx, self.room, lambda: self.admitted)
        self.child = Child(self.room, overlay.peer_id, "test", run_sync=self.ctx.run_sync)

    async def run(self, *, new: bool = True) -> None:
        others = tuple(self.admitted - {self.ctx.overlay.peer_id})
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self.pipes.run(lambda: self.changed))
                both.create_task(self.child.run(others, new=new))
        finally:
            self.room.close()

    async def put(self, value: str) -> None:
        from wetware_sync.etcd.wire import pb, transaction

        put = pb.PutRequest(key=b"k", value=value.encode())
        request = pb.TxnRequest(success=[pb.RequestOp(request_put=put)])
        async with self.child.etcd() as etcd:
            await etcd.write(transaction(request))

    async def get(self) -> str:
        from wetware_sync.etcd.wire import pb, ranged

        async with self.child.etcd() as etcd:
            (found,) = (await etcd.read(ranged(pb.RangeRequest(key=b"k")))).kvs
        return str(found.value, "utf-8")


async def until(works: Callable[[], Any], within_s: float = 60) -> Any:
    """What it returns as soon as it does not raise."""
    async with asyncio.timeout(within_s):
        while True:
            with contextlib.suppress(WetwareError, AssertionError):
                return await works()
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def members(directory: Path, nodes: tuple[FakeOverlay, ...]) -> AsyncIterator[list[Member]]:
    found = [Member(node, directory / str(at)) for at, node in enumerate(nodes)]
    for each in found:
        each.admitted |= {node.peer_id for node in nodes}
    tasks = [asyncio.create_task(each.run()) for each in found]
    try:
        yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_three_are_one_store_and_go_on_without_one(tmp_path: Path) -> None:
    async with overlays(4) as nodes, members(tmp_path, nodes[:3]) as (a, b, c):
        await until(lambda: a.put("1"))
        assert await until(b.get) == await until(c.get) == "1"
        stranger = await nodes[3].open_stream(a.ctx.overlay.peer_id, PROTOCOL)
        with pytest.raises(WetwareError):
            await stranger.read()
        for other in (b, c):  # nobody reaches it any more
            await nodes[0].disconnect(other.ctx.overlay)  # type: ignore[arg-type]
        await until(lambda: b.put("2"))
        assert await until(c.get) == "2"
        with pytest.raises(HomeDown):
            await a.get()


async def test_one_that_is_killed_is_started_again(tmp_path: Path) -> None:
    async with overlays(1) as nodes, members(tmp_path, nodes) as (a,):
        await until(lambda: a.put("1"))
        (pid,) = _children()
        os.kill(pid, signal.SIGKILL)
        assert await until(a.get) == "1"
        assert a.child.starts == 2
        assert a.child.failing == ""
    assert not _children()


async def test_nobody_else_on_the_machine_reaches_it(tmp_path: Path) -> None:
    async with overlays(1) as nodes, members(tmp_path, nodes) as (a,):
        await until(lambda: a.put("1"))
        (pid,) = _children()
        assert not _tcp(pid)
        assert a.room.directory.stat().st_mode & 0o077 == 0


async def test_a_connection_that_comes_as_all_ends_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()

    async def accept(_: socket.socket) -> socket.socket:
        monkeypatch.setattr("wetware_sync.managed.pipes.accept", ends)
        return ours

    async def ends(_: socket.socket) -> socket.socket:
        for task in member.pipes._tasks._tasks:
            task.cancel()  # what carries it has not begun
        running.cancel()
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr("wetware_sync.managed.pipes.accept", accept)
    with theirs:
        async with overlays(2) as nodes:
            member = Member(nodes[0], tmp_path / "a")
            member.admitted.add(nodes[1].peer_id)
            running = asyncio.create_task(member.pipes.run(lambda: member.changed))
            await asyncio.wait([running])
            member.room.close()
        assert ours.fileno() == -1


def _tcp(pid: int) -> set[str]:
    """The TCP sockets of a process."""
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines() for name in ("tcp", "tcp6")]
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            sockets.add(os.readlink(fd))
    return sockets & {f"socket:[{line.split()[9]}]" for table in tables for line in table[1:]}


def _children() -> list[int]:
    """Etcds that this process has started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in map(int, children) if _is_etcd(pid)]


def _is_etcd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "etcd\n"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes between open and read
        return False


@pytest.mark.parametrize("bad", [(2, 3, 8), (3, 3, 27), (3, 5, 0), (3, 5, 2), (3, 5, 4)])
def test_what_is_known_to_lose_data_is_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(Unsupported, match="is refused"):
        check_version(bad)


def test_where_there_is_no_etcd_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find()[1].startswith("3.")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unsupported) as caught:
        find()
    assert "apt install etcd-server" in caught.value.hint
