"""An overlay in this process: real streams over pipes in memory, and peers that are pretended."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware import rpc
from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.broker.protocol import CORE, GATE_PROTOCOL
from wetware.errors import AdmissionRefused, NotFound, OverlayError, Unsupported
from wetware.identity import Key, PeerId
from wetware.member import Member
from wetware.node.siblings import Siblings
from wetware.overlay.link import LinkHost
from wetware.overlay.membership.selector import Selector, selected
from wetware.overlay.peers import PeerDown, PeerUp
from wetware.overlay.rpc_pipe import RpcPipe

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from wetware.hookspecs import Service
    from wetware.overlay.link import Connection, Stream

PIECES_MAX: Final = 4
"""Writes that a pipe in memory holds each way; a writer waits beyond."""
_NOWHERE: Final = Multiaddr("ip4", "127.0.0.1", 1)


class FakeOverlay:
    """`hookspecs.Overlay` for tests: whoever is connected is a member, the DHT is what a test says.

    `await a.connect(b)` gives two of one process real streams, over a pipe in memory. `meet` and
    `part` pretend a peer that no stream leads to. What is in `services` has siblings at others:
    `plugin_context(…, overlay=a).sibling(b.peer_id)`.

    Args:
        key: Of the node; a new one if None.
        cluster: The cluster's ID.
        host: A link that is there already, e.g. one that listens; closed by whoever made it.

    Attributes:
        announced: What `addrs` says; where the host listens while it is empty.
        taken: What `provide` says, or raises.
        found: What `find_providers` says, or raises.
        keys: What the two were asked for, in order.
        watchers: The callbacks of `watch_peers`.
        founded_by: Where the cluster was founded; None: here.
        services: By name; each of its siblings comes by a connection, until `evict`.
        recorded: What of that is counted: event and fields.
    """

    def __init__(
        self, key: Key | None = None, *, cluster: str = "ab" * 20, host: LinkHost | None = None
    ) -> None:
        self.key = key or Key.generate()
        self.peer_id = self.key.peer_id if host is None else host.peer_id
        self.cluster = cluster
        self.announced: tuple[str, ...] = ()
        self.taken: bool | OverlayError = False
        self.found: tuple[str, ...] | OverlayError = ()
        self.keys: list[bytes] = []
        self.founded_by: PeerId | None = None
        self.watchers: list[Callable[[PeerUp | PeerDown], None]] = []
        self.services: dict[str, Service] = {}
        self.recorded: list[tuple[str, dict[str, object]]] = []
        self._evicted: set[PeerId] = set()
        self._members: dict[PeerId, Member] = {}
        self._member_watchers: list[Callable[[Member], None]] = []
        if host is not None:
            self.host = host
            self._watch()

    @cached_property
    def host(self) -> LinkHost:
        """The link below, made at first use."""
        self.host = LinkHost(self.key, admit=lambda *_: True)
        self._watch()
        return self.host

    @cached_property
    def siblings(self) -> Siblings:
        """As a node's."""

        def record(event: str, /, *, key: object, **fields: object) -> None:
            self.recorded.append((event, fields))

        return Siblings(
            self.services,
            reach=self._reach,
            admit=self._admit,
            record=record,
            spawn=self.host.spawn,
        )

    async def _reach(self, peer: PeerId) -> Connection:
        connection = self.host.connection(peer)
        if connection is None:
            raise NotFound(f"{peer} is no other member of the cluster", code="not_found.member")
        return connection

    async def _admit(self, connection: Connection) -> PeerId:
        if connection.peer in self._evicted:
            raise AdmissionRefused(f"{connection.peer} was evicted", code="admission.evicted")
        return connection.peer

    async def _gate(self, stream: Stream) -> None:
        with self.siblings.served(stream.connection) as peer:
            await rpc.serve(RpcPipe(stream), _Gate(peer))

    def _watch(self) -> None:
        self.host.handle(GATE_PROTOCOL, self._gate, access=Access.PUBLIC)
        for connection in self.host.connections():
            self.meet(connection.peer)
        self.host.watch(lambda connection: self.meet(connection.peer), self._lost)

    def _lost(self, connection: Connection) -> None:
        if self.host.connection(connection.peer) is None:
            self.part(connection.peer)

    async def __aenter__(self) -> FakeOverlay:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End its connections and handlers."""
        if "host" in vars(self):
            await self.host.aclose()

    # --- what a test does -------------------------------------------------------------------------

    async def connect(self, other: FakeOverlay) -> None:
        """A connection in memory; both know each other when this returns."""
        near, far = _MemoryPipe.pair()
        accepted = other.host.accept_pipe(far, _NOWHERE)
        await self.host.connect_pipe(near, other.peer_id, _NOWHERE)
        await accepted.ready

    async def disconnect(self, other: FakeOverlay) -> None:
        """End the connections of the two, as an end of the process would."""
        for here, there in ((self, other), (other, self)):
            for connection in here.host.connections():
                if connection.peer == there.peer_id:
                    connection.abort(OverlayError("cut by the test"))
                    await connection.wait_closed()

    def evict(self, peer: PeerId) -> None:
        """It is a member no more, and its connections end."""
        self._evicted.add(peer)
        self.siblings.gone(peer)
        self.part(peer)
        for connection in self.host.connections():
            if connection.peer == peer:
                connection.abort(OverlayError("evicted by the test"))

    def meet(self, peer: PeerId, **says: Any) -> None:
        """A member is there, and says this of itself: attributes of `Member`. Idempotent."""
        before = self._members.get(peer)
        self._members[peer] = now = replace(before or Member(peer, connected=True), **says)
        if before != now:
            self._tell_of(now)
        if before is None:
            self._tell(PeerUp(peer))

    def part(self, peer: PeerId) -> None:
        """A member is gone. Idempotent."""
        if (member := self._members.pop(peer, None)) is not None:
            self._tell(PeerDown(peer))
            self._tell_of(replace(member, state="removed", connected=False))

    def _tell_of(self, member: Member) -> None:
        for callback in tuple(self._member_watchers):
            callback(member)

    def _tell(self, event: PeerUp | PeerDown) -> None:
        for callback in tuple(self.watchers):
            callback(event)

    async def sibling(self, peer: PeerId, service: str) -> rpc.Ref:
        """For `PluginContext.open_sibling`."""
        if (found := self.services.get(service)) is None:
            raise Unsupported(f"no service {service!r} here", code="unsupported.service")
        return await self.siblings.open(peer, found)

    # --- hookspecs.Overlay ------------------------------------------------------------------------

    def addrs(self) -> tuple[str, ...]:
        """What is announced, or where the link listens."""
        if self.announced or "host" not in vars(self):
            return self.announced
        return tuple(map(str, self.host.listen_addrs))

    def peers(self) -> tuple[PeerId, ...]:
        """Who is there."""
        return tuple(self._members)

    def watch_peers(self, callback: Callable[[PeerUp | PeerDown], None]) -> Callable[[], None]:
        """Call back once a peer, however many connections it has; those there already first."""
        self.watchers.append(callback)
        for peer in self.peers():
            callback(PeerUp(peer))
        return lambda: self.watchers.remove(callback) if callback in self.watchers else None

    def members(self, selector: str = "") -> tuple[Member, ...]:
        """This node, and who is there."""
        own = Member(self.peer_id, addrs=self.addrs(), is_self=True)
        return tuple(filter(Selector.parse(selector).matches, (own, *self._members.values())))

    def founder(self) -> PeerId | None:
        """`founded_by`, or this node where a test has said nothing."""
        return self.founded_by or self.peer_id

    def watch_members(
        self, callback: Callable[[Member], None], selector: str = ""
    ) -> Callable[[], None]:
        """Call back for those that match, and whenever a test changes them."""
        tell = selected(Selector.parse(selector), callback)
        for member in self.members(selector):
            tell(member)
        self._member_watchers.append(tell)
        return lambda: self._member_watchers.remove(tell)

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        """A stream of the link."""
        return await self.host.open_stream(peer, *protocols)

    def handle(
        self,
        protocol: str,
        handler: Callable[[Stream], Coroutine[Any, Any, None]],
        *,
        access: Access,
    ) -> Callable[[], None]:
        """Serve a protocol, to everybody."""
        return self.host.handle(protocol, handler, access=access)

    async def provide(self, key: bytes) -> bool:
        """As `taken` says."""
        self.keys.append(key)
        if isinstance(self.taken, OverlayError):
            raise self.taken
        return self.taken

    async def find_providers(self, key: bytes) -> tuple[str, ...]:
        """As `found` says."""
        self.keys.append(key)
        if isinstance(self.found, OverlayError):
            raise self.found
        return self.found

    def sign(self, domain: bytes, data: bytes) -> bytes:
        """Sign with the key; no domain is refused."""
        return self.key.sign(domain + data)


@contextlib.asynccontextmanager
async def overlays(count: int) -> AsyncIterator[tuple[FakeOverlay, ...]]:
    """So many nodes, each connected to all others; closed at the end of the block."""
    nodes = tuple(FakeOverlay() for _ in range(count))
    async with contextlib.AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node)
        for one, two in combinations(nodes, 2):
            await one.connect(two)
        yield nodes


class _Gate(rpc.Servant, interface=CORE.Gate):
    """What members have of it."""

    def __init__(self, peer: Callable[[], Awaitable[rpc.Guarded]]) -> None:
        self._peer = peer

    async def peer(self) -> dict[str, object]:
        return {"peer": await self._peer()}

    async def terminal(self, **_: object) -> dict[str, object]:
        raise Unsupported("nobody logs in here")

    redeem = describe = terminal


class _MemoryPipe:
    """`link.Pipe`: one end of a pipe in this process."""

    def __init__(
        self,
        incoming: MemoryObjectReceiveStream[bytes],
        outgoing: MemoryObjectSendStream[bytes],
    ) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    @classmethod
    def pair(cls) -> tuple[_MemoryPipe, _MemoryPipe]:
        """Both ends."""
        to_far, at_far = anyio.create_memory_object_stream[bytes](PIECES_MAX)
        to_near, at_near = anyio.create_memory_object_stream[bytes](PIECES_MAX)
        return cls(at_near, to_far), cls(at_far, to_near)

    async def read(self) -> bytes:
        try:
            return await self._incoming.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            return b""

    async def write(self, data: bytes) -> None:
        try:
            await self._outgoing.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise EOFError("the other end is closed") from exc

    def finish(self) -> None:
        self._incoming.close()
        self._outgoing.close()

    reset = finish
