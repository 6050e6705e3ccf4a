"""Link hosts with and without an overlay, on ephemeral ports."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key, PeerId
from wetware.overlay.libp2p import Overlay, OverlayLimits
from wetware.overlay.link import Connection, LinkHost, LinkLimits, Stream

ANY = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
ECHO = "/test/echo/1"
IDENTIFY, PING, KAD = "/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/ipfs/kad/1.0.0"
WAIT_S_MAX = 30.0


def everybody(peer: PeerId, protocol: str, access: Access) -> bool:
    return True


async def until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S_MAX) -> None:
    """Wait, turn by turn of the loop, until `condition()` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.002)


async def serve_echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def answers_ping(connection: Connection) -> bool:
    """Ask over a stream of the link; libp2p answers."""
    async with await connection.open_stream(PING) as stream:
        await stream.write(b"p" * 32)
        return await stream.read_exactly(32) == b"p" * 32


async def identify(connection: Connection) -> Any:
    """What the peer says of itself, asked over a stream of the link."""
    from libp2p.identity.identify.identify import parse_identify_response

    said = b""
    async with await connection.open_stream(IDENTIFY) as stream:
        while part := await stream.read():
            said += part
    return parse_identify_response(said)


def adopted(node: Node) -> int:
    """How many connections libp2p has."""
    guest = node.overlay._guest
    return len(guest._swarm.get_connections()) if guest is not None else 0


@dataclass
class Node:
    host: LinkHost
    overlay: Overlay
    task: asyncio.Task[None]

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])

    async def crash(self, error: Exception | None = None) -> None:
        """Crash the guest and wait until it is back."""
        before = self.overlay.status().restarts
        self.overlay.crash(error or RuntimeError("on purpose"))
        await until(lambda: self.overlay.status().restarts > before, "the crash is noticed")
        await until(lambda: self.overlay.status().state == "running", "the guest is back")


@contextlib.asynccontextmanager
async def running_node(
    limits: OverlayLimits | None = None,
    *,
    admit: Callable[[PeerId, str, Access], bool] = everybody,
    link_limits: LinkLimits | None = None,
    prepare: Callable[[LinkHost], None] = lambda host: None,
) -> AsyncIterator[Node]:
    key = Key.generate()
    async with LinkHost(key, admit=admit, limits=link_limits) as host:
        await host.listen([ANY])
        host.handle(ECHO, serve_echo, access=Access.PUBLIC)
        prepare(host)
        overlay = Overlay(host, key, limits=limits or OverlayLimits())
        ready = asyncio.Event()
        task = asyncio.create_task(overlay.run(ready.set))
        node = Node(host, overlay, task)
        try:
            waiting = asyncio.create_task(ready.wait())
            await asyncio.wait([waiting, task], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            assert ready.is_set(), "the overlay ended"
            yield node
        finally:
            await node.stop()


@contextlib.asynccontextmanager
async def plain_host(
    admit: Callable[[PeerId, str, Access], bool] = everybody,
) -> AsyncIterator[LinkHost]:
    """A link without libp2p: a peer that the test plays itself."""
    async with LinkHost(Key.generate(), admit=admit) as host:
        await host.listen([ANY])
        host.handle(ECHO, serve_echo, access=Access.PUBLIC)
        yield host


async def never_answers(node: Node, peer: LinkHost) -> asyncio.Event:
    """`peer` is in the node's table of the DHT and says nothing; the event: it was asked."""
    from libp2p.peer.id import ID
    from multiaddr import Multiaddr as LibAddr

    asked = asyncio.Event()

    async def silent(stream: Stream) -> None:
        asked.set()
        await stream.read_exactly(1 << 20)

    peer.handle(KAD, silent, access=Access.PUBLIC)
    await node.host.dial(peer.listen_addrs)
    guest, peer_id = node.overlay._guest, ID(peer.peer_id.multihash)
    assert guest is not None
    addr = LibAddr(str(peer.listen_addrs[0].with_peer(None)))
    guest._host.get_peerstore().add_addrs(peer_id, [addr], 3600)
    await guest.call(lambda: guest._dht.add_peer(peer_id))
    assert node.overlay.status().dht_peers == 1
    return asked


class ThreadNode:
    """A node with an overlay in a thread and a loop of its own (one guest runs per thread)."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self.node: Node
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(WAIT_S_MAX)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with running_node() as self.node:
            self._ready.set()
            await self._stop.wait()

    async def run(self, make: Callable[[Node], Coroutine[Any, Any, Any]]) -> Any:
        """Run `make(node)` on the other loop."""
        future = asyncio.run_coroutine_threadsafe(make(self.node), self._loop)
        return await asyncio.wrap_future(future)

    async def aclose(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        await asyncio.to_thread(self._thread.join, WAIT_S_MAX)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    """A link host with a running overlay; back-off is short."""
    async with running_node(OverlayLimits(restart_s_min=0.01, restart_s_max=0.01)) as node:
        yield node


@pytest.fixture
async def peer() -> AsyncIterator[LinkHost]:
    async with plain_host() as host:
        yield host


@pytest.fixture
async def other() -> AsyncIterator[ThreadNode]:
    thread_node = await asyncio.to_thread(ThreadNode)
    try:
        yield thread_node
    finally:
        await thread_node.aclose()


@pytest.fixture
def wait_until() -> Callable[..., Awaitable[None]]:
    return until


@pytest.fixture
def record_figure(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """`record_figure(name, value)`: into the report (--junitxml) of this test."""
    return lambda name, value: request.node.user_properties.append((name, value))
