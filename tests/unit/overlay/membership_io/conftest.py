"""Nodes without RPC and services: link, admission, membership, on loopback, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware.base import cbor
from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key, PeerId
from wetware.overlay.admission.decision import Admission
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.service import Introductions
from wetware.overlay.admission.store import Store
from wetware.overlay.link import LinkHost, LinkLimits, Stream
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.courier import PROTOCOL
from wetware.overlay.membership.known import Change
from wetware.overlay.membership.reach import ReachLimits
from wetware.overlay.membership.service import Membership
from wetware.overlay.relay import Relay
from wetware.testing import tasks_of_core

QUICK = MembershipConfig(
    probe_s=0.2,
    probe_timeout_s=0.1,
    gossip_s=0.05,
    sync_s=1.0,
    sync_peer_s_min=0.2,
    suspicion_mult=3,
    suspicion_max_mult=2,
    update_s_min=0.05,
    redial_s_min=0.05,
    redial_s_max=0.5,
)
"""Deaths are known in about two seconds; slow enough for a busy machine."""
QUICK_REACH = ReachLimits(second_s=0.2, stable_s=0.2, dial_s=2.0, introduce_s=2.0)

DEADLINE_S = 60.0


class SystemClock:
    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


async def until(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition of which no event tells; fails at the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.01)


async def everybody(peer: PeerId) -> bool:
    return True


class Node:
    """One node. `start` and `stop` may alternate; what is durable stays."""

    def __init__(self, net: Net, key: Key, name: str) -> None:
        self.net, self.key, self.name = net, key, name
        self.path = net.path / name
        self.path.mkdir(exist_ok=True)
        self.labels: dict[str, str] = {}
        self.announced: tuple[Multiaddr, ...] = ()  # instead of where it listens
        self.services: tuple[str, ...] = ("node",)
        self.changes: list[Change] = []
        self.veto: Callable[[PeerId], Awaitable[bool]] = everybody
        self._stack = contextlib.AsyncExitStack()
        self.host: LinkHost
        self.admission: Admission
        self.introductions: Introductions
        self.membership: Membership

    @property
    def peer(self) -> PeerId:
        return self.key.peer_id

    @property
    def addr(self) -> Multiaddr:
        return self.host.listen_addrs[0]

    async def start(
        self,
        *bootstrap: Multiaddr,
        config: MembershipConfig = QUICK,
        reach: ReachLimits = QUICK_REACH,
        member: bool = True,
    ) -> Node:
        """Begin to live; `member` is whether membership runs, or the test speaks for the node."""
        stack = self._stack = contextlib.AsyncExitStack()
        clock = SystemClock()
        self.admission = Admission(
            Store(self.path), self.key, clock=clock, limits=AdmissionLimits(), veto=self._ask
        )
        stack.push_async_callback(self.admission.store.files.flush)
        self.host = await stack.enter_async_context(
            LinkHost(
                self.key,
                limits=LinkLimits(close_s=0.5, linger_s=1.0),
                admit=self.admission,
                privileged=self.admission.is_member,
            )
        )
        await self.host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
        self.introductions = Introductions(
            self.host,
            self.admission,
            addrs=lambda: self.host.listen_addrs,
            join_document=self._document,
        )
        self.introductions.start()
        Relay(self.host, is_member=self.admission.is_member, enabled=True).start()
        stack.push_async_callback(self._close_introductions)
        self.changes = []
        if member:
            self.membership = Membership(
                self.host,
                self.key,
                self.admission,
                self.introductions,
                config=config,
                clock=clock,
                describe=self.describe,
                data_dir=self.path,
                reach_limits=reach,
            )
            self.membership.watch(self.changes.append)
            self.membership.reach.bootstrap(bootstrap)
            ready = asyncio.Event()
            self._run(stack, self.membership.run(ready.set))
            await ready.wait()
        self.net.running.append(self)
        return self

    def _run(self, stack: contextlib.AsyncExitStack, coro: Any) -> None:
        task = asyncio.ensure_future(coro)

        async def stop() -> None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        stack.push_async_callback(stop)

    async def _ask(self, peer: PeerId) -> bool:
        return await self.veto(peer)

    async def _document(self) -> bytes:
        return b""

    async def _close_introductions(self) -> None:
        await self.introductions.aclose()

    def describe(self) -> dict[str, Any]:
        return {
            "addrs": [str(addr) for addr in self.announced or self.host.listen_addrs],
            "host": "machine",
            "name": self.name,
            "labels": self.labels,
            "version": "0.1",
            "services": self.services,
        }

    async def stop(self) -> None:
        """As a clean stop of a node."""
        if self in self.net.running:
            self.net.running.remove(self)
            await self._stack.aclose()

    async def kill(self) -> None:
        """As kill -9: connections are cut, nothing is said."""
        for connection in self.host.connections():
            connection._transport.abort()  # type: ignore[union-attr]
        await self.host._stop_listening()
        self.membership._left = True  # nobody says goodbye
        await self.stop()

    # --- what it sees ---

    def state(self, other: Node) -> str | None:
        member = self.membership.member(other.peer)
        return member.state.value if member is not None else None

    def sees(self, *others: Node, state: str = "alive") -> bool:
        return all(self.state(other) == state for other in others)

    def is_up(self, other: Node) -> bool:
        return other.peer in self.introductions.peers()

    # --- a node whose part the test plays ---

    async def speak(self, other: Node) -> Stream:
        """A membership stream to another node, to send what one likes."""
        await self.host.dial([other.addr])
        await until(lambda: self.is_up(other) and other.is_up(self))
        return await self.host.open_stream(other.peer, PROTOCOL)


def framed(message: object) -> bytes:
    """A frame of the membership protocol."""
    body = message if isinstance(message, bytes) else cbor.encode(message)
    return len(body).to_bytes(4, "big") + body


class Net:
    """A cluster in one process."""

    until = staticmethod(until)
    framed = staticmethod(framed)
    config, reach = QUICK, QUICK_REACH

    def __init__(self, path: Path) -> None:
        self.path = path
        self.running: list[Node] = []
        self.founder: Node | None = None
        self._count = 0

    async def node(self, *, certified: bool = True, rights: tuple[str, ...] = ()) -> Node:
        """A node with what it needs to be a member, not started. The first one founds."""
        node = Node(self, Key.generate(), f"n{self._count}")
        self._count += 1
        if not certified:
            return node
        if self.founder is None:
            Store(node.path).found("test", b"statement")
            self.founder = node
        else:
            await self.certify(node, rights=rights)
        return node

    async def certify(self, node: Node, **how: Any) -> None:
        assert self.founder is not None
        admission = Admission(Store(self.founder.path), self.founder.key, clock=SystemClock())
        bundle = await admission.issuer.certify(node.peer, **how)
        Store(node.path).join(bundle.founding, bundle.chain.encoded, b"", ())
        await admission.store.files.flush()

    async def cluster(self, count: int, **how: Any) -> list[Node]:
        """Running nodes; all but the first know the first one's address."""
        nodes = [await self.node() for _ in range(count)]
        await nodes[0].start(**how)
        for node in nodes[1:]:
            await node.start(nodes[0].addr, **how)
        return nodes

    async def converged(self, *nodes: Node, deadline_s: float = DEADLINE_S) -> None:
        """Wait until each one sees all the others alive."""
        await until(lambda: all(node.sees(*(set(nodes) - {node})) for node in nodes), deadline_s)

    async def aclose(self) -> None:
        for node in reversed(self.running[:]):
            await node.stop()


@pytest.fixture
async def net(anyio_backend: str, tmp_path: Path) -> AsyncIterator[Net]:
    network = Net(tmp_path)
    try:
        yield network
    finally:
        await network.aclose()
    for _ in range(3):
        await asyncio.sleep(0)
    assert tasks_of_core() == [], "a node leaves no task behind"
