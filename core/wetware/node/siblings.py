"""Siblings: the same service of the same plugin at another node, and this one's for theirs.

One RPC connection leads to each member, and all plugins share it: a stream to the member's Gate,
and `Gate.peer` there. It is made at the first use, and ends when nobody has used it for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.base.log import get_logger
from wetware.broker.peers import PeerGuard, PeerServant, no_peer
from wetware.broker.protocol import CORE, GATE_PROTOCOL
from wetware.errors import (
    AdmissionRefused,
    Disconnected,
    InvalidArgument,
    LimitExceeded,
    Revoked,
    TimedOut,
    Unsupported,
    stopping,
)
from wetware.overlay.rpc_pipe import RpcPipe

if TYPE_CHECKING:
    from wetware.hookspecs import Service
    from wetware.identity import PeerId
    from wetware.overlay.link import Connection

log = get_logger("siblings")

LINKS_MAX: Final = 512
"""Members with a connection; of those that nobody uses the longest unused makes room."""
LINKS_PER_MEMBER_MAX: Final = 2
"""One for new references, and one, on a worse path, whose references are still held."""
IDLE_S: Final = 60.0
"""How long a connection stays that nobody uses."""
OPEN_S: Final = 10.0
"""For the member to answer, once it is connected."""


@dataclass(eq=False, slots=True)
class _Link:
    """One RPC connection to a member.

    Attributes:
        under: What carries it.
        connection: The RPC connection.
        peer: What this node has there.
        used_at: When somebody was last seen to use it.
        opening: Callers that wait for it.
        ending: It is being closed.
    """

    under: Connection
    connection: rpc.RpcConnection
    peer: rpc.Ref
    used_at: float
    opening: int = 0
    ending: bool = False

    @property
    def in_use(self) -> bool:
        return self.opening > 0 or self.connection.held > 1  # `peer` itself is one

    @property
    def current(self) -> bool:
        """Whether what is new goes over it: a better path has not come up."""
        return not (self.ending or self.connection.closed or self.under.superseded)


class Siblings:
    """Of one node.

    Args:
        services: That this node offers, by name.
        reach: A connection to a member; raises NotFound and DialError.
        admit: The node at the other end of one; raises AdmissionRefused for who is none.
        record: Counts what happens again and again, as `Records.denied`.
        spawn: Begins a task that ends with the node.
    """

    def __init__(
        self,
        services: Mapping[str, Service],
        *,
        reach: Callable[[PeerId], Awaitable[Connection]],
        admit: Callable[[Connection], Awaitable[PeerId]],
        record: Callable[..., None],
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ) -> None:
        self._services, self._reach, self._admit = services, reach, admit
        self._record, self._spawn = record, spawn
        self._guards: dict[PeerId, set[PeerGuard]] = {}
        self._links: dict[PeerId, list[_Link]] = {}  # the one for new references last
        self._dials: dict[PeerId, asyncio.Task[_Link]] = {}
        self._sweep_due = False

    # --- what others have here --------------------------------------------------------------------

    @contextlib.contextmanager
    def served(self, connection: Connection) -> Iterator[Callable[[], Awaitable[rpc.Guarded]]]:
        """What `Gate.peer` does for the peer of a connection; what it gave ends with the block."""
        guard = PeerGuard()
        given: list[rpc.Guarded] = []

        async def peer() -> rpc.Guarded:
            try:
                node = await self._admit(connection)
            except AdmissionRefused as exc:
                # The key is none that the peer can choose, so that nobody can fill the disk.
                self._record("sibling.refused", key=exc.code, peer=connection.peer, reason=exc)
                raise no_peer(exc.message) from None

            def opened(service: str) -> None:
                # Counted, not recorded each time: a member connects as often as it likes.
                self._record("sibling.opened", key=(node, service), peer=node, service=service)

            if not given:
                self._guards.setdefault(node, set()).add(guard)
                given.append(rpc.guarded(PeerServant(node, self._services, opened), guard))
            return given[0]

        try:
            yield peer
        finally:
            guard.end(Disconnected("the connection ended", hint="connect again"))
            if (guards := self._guards.get(connection.peer)) is not None:
                guards.discard(guard)
                if not guards:
                    del self._guards[connection.peer]

    def gone(self, peer: PeerId) -> None:
        """A node is connected as a member no more: what it has here is dead from now on."""
        for guard in self._guards.get(peer, ()):
            guard.end(Revoked(f"{peer} is no connected member any more", hint="introduce it again"))

    # --- what this node has there -----------------------------------------------------------------

    async def open(self, peer: PeerId, service: Service) -> rpc.Ref:
        """What the service at another member has for this node; see `PluginContext.sibling`."""
        if service.peer_interface is None:
            raise InvalidArgument(
                f"the service {service.name!r} has no siblings",
                hint="declare its peer_interface and peer_bootstrap",
            )
        link = await self._link(peer)
        link.opening += 1
        try:
            with rpc.time_limit(OPEN_S):
                got = (await link.peer.call("open", service=service.name))["service"]
        except Revoked:  # that node has taken this one for a member no more, at least for a time
            self._end(link)
            raise
        finally:
            link.opening -= 1
            link.used_at = asyncio.get_running_loop().time()
        if got is None:
            raise Unsupported(f"{peer} gave nothing for the service {service.name!r}")
        ref: rpc.Ref = got.cast(service.peer_interface)
        return ref

    async def _link(self, peer: PeerId) -> _Link:
        """The connection to use for a member; who asks at the same time shares a dial."""
        links = self._links.get(peer)
        if links and links[-1].current:
            return links[-1]
        dial = self._dials.get(peer)
        if dial is None:
            dial = self._dials[peer] = self._spawn(self._dial(peer))
            dial.add_done_callback(lambda done: self._dialled(peer, done))
        try:
            return await asyncio.shield(dial)
        except asyncio.CancelledError:
            if dial.cancelled():
                raise stopping() from None
            raise

    def _dialled(self, peer: PeerId, dial: asyncio.Task[_Link]) -> None:
        del self._dials[peer]
        if not dial.cancelled():
            dial.exception()  # looked at, even if nobody waits

    async def _dial(self, peer: PeerId) -> _Link:
        self._make_room(peer)
        under = await self._reach(peer)
        try:
            async with asyncio.timeout(OPEN_S):
                stream = await under.open_stream(GATE_PROTOCOL)
                connection = await rpc.connect(RpcPipe(stream))
                try:
                    given = await connection.bootstrap(CORE.Gate).call("peer")
                    return self._keep(peer, under, connection, given["peer"])
                except BaseException:
                    await connection.aclose()
                    raise
        except TimeoutError:
            raise TimedOut(f"{peer} did not answer within {OPEN_S:g} s") from None

    def _keep(
        self, peer: PeerId, under: Connection, connection: rpc.RpcConnection, given: rpc.Ref
    ) -> _Link:
        links = self._links.setdefault(peer, [])
        loop = asyncio.get_running_loop()
        self._spawn(self._until_closed(peer, connection))
        link = _Link(under, connection, given, loop.time())
        used = [old for old in links if old.in_use]
        for old in links:
            if old not in used[1 - LINKS_PER_MEMBER_MAX :]:
                self._end(old)
        links.append(link)
        if not self._sweep_due:
            self._sweep_due = True
            loop.call_later(IDLE_S / 4, self._sweep)
        return link

    async def _until_closed(self, peer: PeerId, connection: rpc.RpcConnection) -> None:
        try:
            await connection.wait_closed()
        finally:
            links = self._links[peer]
            links[:] = [link for link in links if link.connection is not connection]
            if not links:
                del self._links[peer]
            await connection.aclose()

    def _end(self, link: _Link) -> None:
        if not link.ending:
            link.ending = True
            self._spawn(link.connection.aclose())

    def _make_room(self, peer: PeerId) -> None:
        """Before a dial; raises LimitExceeded where all that there are are in use."""
        # What is ending has made room already, for another dial.
        open_ = [links for links in self._links.values() if not all(each.ending for each in links)]
        if peer in self._links or len(open_) + len(self._dials) <= LINKS_MAX:
            return
        unused = [links for links in open_ if not any(each.in_use for each in links)]
        if not unused:
            raise LimitExceeded(f"siblings at {LINKS_MAX} members are in use (LINKS_MAX)")
        for link in min(unused, key=lambda links: links[-1].used_at):
            self._end(link)

    def _sweep(self) -> None:
        """End what nobody has used, again and again while there is anything."""
        loop = asyncio.get_running_loop()
        for links in self._links.values():
            for link in links:
                if link.in_use:
                    link.used_at = loop.time()
                elif not link.current or loop.time() - link.used_at >= IDLE_S:
                    self._end(link)
        self._sweep_due = bool(self._links)
        if self._sweep_due:
            loop.call_later(IDLE_S / 4, self._sweep)
