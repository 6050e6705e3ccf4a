"""Real hosts on loopback with real files, a clock that tests move, and no node around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.hookspecs import PeerDown, PeerUp
from wetware.identity import Key, PeerId
from wetware.overlay.admission.decision import Admission
from wetware.overlay.admission.issuing import Issuer
from wetware.overlay.admission.joining import join
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.members import Admitted, Removed
from wetware.overlay.admission.service import Introductions
from wetware.overlay.admission.store import Store
from wetware.overlay.admission.texts import Bundle, Ticket
from wetware.overlay.link import Connection, LinkHost, Stream
from wetware.testing import tasks_of_core

DEADLINE_S = 60.0
DAY_S = 86_400.0
LIMITS = AdmissionLimits(sweep_s=0.01, renew_retry_s=0.02, veto_recheck_s=0.05, exchange_s=5.0)
DOCUMENT = b"the policy"


class FakeClock:
    """Wall clock of one node, in steps; monotonic likewise."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


async def until(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition of which no event tells; fails at the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.002)


@dataclass
class Veto:
    """An auth backend's `admit_node`, as a test wants it."""

    refused: set[PeerId] = field(default_factory=set)
    error: Exception | None = None
    hang: bool = False
    asked: int = 0

    async def __call__(self, peer: PeerId) -> bool:
        self.asked += 1
        if self.hang:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return peer not in self.refused


class Member:
    """A node as far as admission goes."""

    def __init__(self, data_dir: Path, key: Key, clock: FakeClock, limits: AdmissionLimits) -> None:
        self.data_dir, self.key, self.clock, self.limits = data_dir, key, clock, limits
        self.veto = Veto()
        self.records: list[tuple[str, dict[str, object]]] = []
        self.events: list[Admitted | Removed] = []
        self.peer_events: list[PeerUp | PeerDown] = []
        self.stack = contextlib.AsyncExitStack()
        self.host: LinkHost
        self.admission: Admission
        self.introductions: Introductions
        self._admission: Admission | None = None

    @property
    def peer_id(self) -> PeerId:
        return self.key.peer_id

    @property
    def issuer(self) -> Issuer:
        return self.admission.issuer

    @property
    def addr(self) -> Multiaddr:
        return self.host.listen_addrs[0]

    async def open_host(self) -> None:
        def admits(peer: PeerId, protocol: str, access: Access) -> bool:
            if self._admission is None:
                return access is Access.PUBLIC
            return self._admission(peer, protocol, access)

        def privileged(peer: PeerId) -> bool:
            return self._admission is not None and self._admission.is_member(peer)

        self.host = await self.stack.enter_async_context(
            LinkHost(self.key, admit=admits, privileged=privileged)
        )
        self.host.handle("/member/1", self._echo, access=Access.MEMBER)
        await self.host.listen([Multiaddr("ip4", "127.0.0.1", 0)])

    async def _echo(self, stream: Stream) -> None:
        while data := await stream.read():
            await stream.write(data)

    async def _document(self) -> bytes:
        return DOCUMENT

    async def start(self, store: Store) -> Member:
        """Admission, introductions and their tasks, on the open host."""
        self.admission = self._admission = Admission(
            store,
            self.key,
            clock=self.clock,
            limits=self.limits,
            open_protocols=("/open/1",),
            veto=self.veto,
            record=lambda event, **fields: self.records.append((event, fields)),
        )
        self.admission.members.changes.add(self.events.append)
        ready = asyncio.Event()
        task = asyncio.create_task(self.admission.run(ready.set))
        self.stack.push_async_callback(_cancel, task)
        await ready.wait()
        self.introductions = Introductions(
            self.host,
            self.admission,
            addrs=lambda: self.host.listen_addrs,
            join_document=self._document,
        )
        self.introductions.watch(self.peer_events.append)
        self.introductions.start()
        self.stack.push_async_callback(self.introductions.aclose)
        return self

    async def stop(self) -> None:
        await self.stack.aclose()

    async def ticket(self, **how: object) -> Ticket:
        ticket = await self.issuer.invite(addrs=self.host.listen_addrs, **how)  # type: ignore[arg-type]
        return Ticket.parse(ticket.text)

    async def connect(self, other: Member) -> Connection:
        """Dial, and wait until both are up."""
        connection = await self.host.dial([other.addr])
        await self.introductions.introduced(connection)
        await until(lambda: self.peer_id in other.introductions.peers())
        return connection

    async def may(self, other: Member, protocol: str = "/member/1") -> bool:
        """Whether `other` lets this node speak a protocol for members."""
        async with await self.host.open_stream(other.peer_id, protocol) as stream:
            await stream.write(b"x")
            return await stream.read_exactly(1) == b"x"


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


class Cluster:
    """Makes nodes, and ends them after the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = FakeClock()
        self.nodes: list[Member] = []
        self._number = 0

    def member(
        self,
        key: Key | None = None,
        *,
        clock: FakeClock | None = None,
        data_dir: Path | None = None,
        **limits: float,
    ) -> Member:
        """A node that is not started."""
        self._number += 1
        if data_dir is None:
            data_dir = self.path / f"node{self._number}"
            data_dir.mkdir(mode=0o700)
        bounds = replace(LIMITS, **limits)  # type: ignore[arg-type]
        node = Member(data_dir, key or Key.generate(), clock or self.clock, bounds)
        self.nodes.append(node)
        return node

    async def founder(self, **how: object) -> Member:
        node = self.member(**how)  # type: ignore[arg-type]
        store = Store(node.data_dir)
        store.found("local", b"operator")
        await node.open_host()
        return await node.start(store)

    async def join(self, invitation: Ticket | Bundle, **how: object) -> Member:
        node = self.member(**how)  # type: ignore[arg-type]
        await node.open_host()
        store = Store(node.data_dir)
        await join(node.host, invitation, store, key=node.key, clock=node.clock, limits=node.limits)
        return await node.start(store)

    async def restart(self, node: Member, **how: object) -> Member:
        """The same key and files in a new process, so to speak."""
        await node.stop()
        again = self.member(node.key, data_dir=node.data_dir, **how)  # type: ignore[arg-type]
        await again.open_host()
        return await again.start(Store(again.data_dir))

    async def stranger(self) -> LinkHost:
        host = LinkHost(Key.generate())
        node = self.member()
        node.host = await node.stack.enter_async_context(host)
        return host

    async def aclose(self) -> None:
        for node in self.nodes:
            await node.stop()


@pytest.fixture
async def cluster(anyio_backend: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        await made.aclose()
    assert tasks_of_core() == [], "nothing goes on after the end"


Eventually = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture
def eventually() -> Eventually:
    return until


@pytest.fixture
def document() -> bytes:
    return DOCUMENT
