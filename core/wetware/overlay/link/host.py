"""LinkHost: listens, dials, keeps the connections, and gives each inbound stream to its handler."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from wetware.base.access import Access
from wetware.base.bounds import Rates, Throttle, address_key
from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.base.sockets import accept
from wetware.errors import DialError, OverlayError
from wetware.overlay.link.connection import RECEIVE_BYTES, NoiseConnection
from wetware.overlay.link.dialling import Dialler
from wetware.overlay.link.limits import LinkLimits, Violation
from wetware.overlay.link.noise import MESSAGE_BYTES_MAX, NoiseIdentity
from wetware.overlay.link.pipe import Pipe, PipeTransport
from wetware.overlay.link.serving import Admit, Handler, Serving
from wetware.overlay.link.slots import Privileged, Slots
from wetware.overlay.link.tcp import bind
from wetware.overlay.link.yamux import Connection, Stream, Totals

if TYPE_CHECKING:
    from wetware.identity import Key, PeerId

log = get_logger("link")

_ADDRESSES_MAX = 4096
"""Addresses whose strangers' streams are counted; the longest silent is forgotten."""
_ACCEPT_AGAIN_S = 0.1
"""Wait after the kernel gave no connection, e.g. for want of a descriptor: it holds them."""
_ACCEPT_LINES_PER_MINUTE = 2
_CONNECTION_LINES_PER_MINUTE = 60
"""In the log, of connections of one privileged peer, or of all strangers at one address: whoever
connects over and over must not fill the disk."""

_STRANDED = "this machine has lost the address that the connection was from"
PROBE_S = 1.5
"""For an answer where a connection may be dead. After an interruption of `FLAP_S`, TCP sends again
within a second."""
REPLACED_S = 0.5
"""The same, beside two round trips, where the peer has connected anew: it nearly always is dead."""
FLAP_S = 2.0
"""An address that is back after so long has cost nothing."""
_KEPT_BYTES = 4 << 20
"""glibc gives free memory at its heap's end back to the kernel, with each flush of a connection
again, until a block as large as this was freed: then it keeps twice as much. See `mallopt(3)`."""
_CROSSED_S = 0.5
"""Two connections within so long, one from each end, are most likely two dials that crossed."""


def allow_public_only(peer: PeerId, protocol: str, access: Access) -> bool:
    """The default of `LinkHost`: what is not public is refused."""
    return access is Access.PUBLIC


def nobody(peer: PeerId) -> bool:
    """The default of `LinkHost` for who is privileged."""
    return False


class LinkHost:
    """One node's end of the data path.

    Args:
        key: The node's key; its peer ID is what peers authenticate.
        limits: See LinkLimits.
        admit: Whether a peer may open a stream for a protocol of a class; asked for each stream. A
            refused one hears `na`, as for an unknown protocol.
        privileged: Whether a peer is one that this node is there for, e.g. a member of its cluster;
            everybody else is a stranger. Connections of strangers are closed when idle; inbound
            ones are limited per address, and make room for privileged ones. Asked when the peer has
            proven who it is, and again before a stranger's connection is ended; one that raises
            says no.

    Use as `async with LinkHost(key) as host:`; leaving closes listeners, connections, handlers.

    Attributes:
        peer_id: This node.
        refused: Reason → how often a connection or stream was turned away or cut off.
    """

    def __init__(
        self,
        key: Key,
        *,
        limits: LinkLimits | None = None,
        admit: Admit = allow_public_only,
        privileged: Privileged = nobody,
    ) -> None:
        self.limits = limits = limits or LinkLimits()
        self.totals = Totals()
        self.noise = NoiseIdentity(key)
        self.peer_id = key.peer_id
        bytes(_KEPT_BYTES)
        self.scratch = memoryview(bytearray(RECEIVE_BYTES + MESSAGE_BYTES_MAX + 2))
        self.refused: Counter[str] = Counter()
        self._stranger_opens = Rates(
            limits.stranger_opens_per_s,
            limits.stranger_opens_burst,
            _ADDRESSES_MAX,
            time.monotonic,
        )
        self._listeners: dict[asyncio.Task[None], socket.socket] = {}
        self._accept_lines = Throttle(_ACCEPT_LINES_PER_MINUTE, 1, time.monotonic)
        self._lines = Throttle(_CONNECTION_LINES_PER_MINUTE, _ADDRESSES_MAX, time.monotonic)
        self._listen_addrs: tuple[Multiaddr, ...] = ()
        self._connections: dict[PeerId, list[NoiseConnection]] = {}
        self._all: set[NoiseConnection] = set()  # established
        self._handshaking: set[NoiseConnection] = set()
        self._slots = Slots(limits, privileged, self.refused)
        self._serving = Serving(limits, admit, self.refused, self.spawn)
        self._dialler = Dialler(
            limits, self.peer_id, live=self.connection, begin=self._outbound, spawn=self.spawn
        )
        self._watchers: list[tuple[Callable[[Connection], None], Callable[[Connection], None]]] = []
        self._hosts: frozenset[str] | None = None  # this machine's addresses, once they changed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    # --- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> LinkHost:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop listening, say goodbye to all peers, cancel handlers.

        Peers that do not read, and handlers that do not end, are waited for `close_s` each.
        """
        self._closing = True
        await self._stop_listening()
        self._dialler.close()
        for task in self._serving.tasks.values():
            task.cancel()
        connections = [*self._all, *self._handshaking]
        for conn in connections:
            conn.close()
        await asyncio.gather(*(conn.wait_closed() for conn in connections))
        if self._tasks:
            for other in self._tasks:
                other.cancel()
            _, stuck = await asyncio.wait(self._tasks, timeout=self.limits.close_s)
            for other in stuck:
                log.error("handler.stuck", task=other.get_name())

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task that ends with the host at the latest."""
        task = asyncio.get_running_loop().create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- listening --------------------------------------------------------------------------------

    @property
    def listen_addrs(self) -> tuple[Multiaddr, ...]:
        """Where this node listens, real ports and its own peer ID included."""
        return self._listen_addrs

    async def listen(self, addrs: Iterable[Multiaddr]) -> tuple[Multiaddr, ...]:
        """Listen on `addrs` (port 0: any free one) and return them with their real ports.

        All or none of `addrs`. Raises ConfigError "config.listen" if one cannot be had, or Busy
        "config.busy.port" where another process listens: a port is never shared.
        """
        listeners = await bind(addrs, self.limits.listen_backlog)
        found: list[Multiaddr] = []
        for sock in listeners:
            self._listeners[self.spawn(self._accept(sock))] = sock
            host, port = sock.getsockname()[:2]
            kind = "ip6" if sock.family == socket.AF_INET6 else "ip4"
            found.append(Multiaddr(kind, host.partition("%")[0], port, self.peer_id))
        self._listen_addrs += tuple(found)
        return tuple(found)

    async def _stop_listening(self) -> None:
        listeners, self._listeners = self._listeners, {}
        for task in listeners:
            task.cancel()
        if listeners:
            await asyncio.wait(listeners)
        for sock in listeners.values():
            sock.close()

    async def _accept(self, listener: socket.socket) -> None:
        """Take one connection after the other: `admit_connection` judges each before the next.

        asyncio's own server takes a whole backlog at once, and out of descriptors it fills the log.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock = await accept(listener)
            except OSError as exc:
                self.refused["accept"] += 1
                if (left_out := self._accept_lines.lines("accept")) is not None:
                    log.warning("accept.failed", why=exc.strerror, unlogged=left_out)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            try:
                await loop.connect_accepted_socket(self._accepted, sock)
            except OSError as exc:  # it went already
                sock.close()
                log.debug("accept.gone", why=exc.strerror)

    def _accepted(self, carrier: Multiaddr | None = None) -> NoiseConnection:
        return NoiseConnection(self, initiator=False, carrier=carrier)

    def accept_pipe(self, pipe: Pipe, remote: Multiaddr) -> NoiseConnection:
        """Let a peer connect through `pipe`, which this host then owns.

        The limits of inbound connections hold, and whoever carries the bytes, the peer in `remote`,
        is what they are counted under: a carrier takes no more places than one address does. The
        peer that is authenticated at the other end is told to watchers as any other.

        Returns the connection, not established yet: `wait_closed` tells when it is over, also if it
        was turned away. A handler that passes its stream here has to wait for that.
        """
        conn = self._accepted(remote)
        PipeTransport(pipe, conn, self.spawn)
        return conn

    # --- dialling ---------------------------------------------------------------------------------

    async def dial(
        self,
        addrs: Sequence[Multiaddr],
        *,
        peer: PeerId | None = None,
        timeout_s: float | None = None,
        direct: bool = False,
    ) -> Connection:
        """Connect to a peer, or return a live connection to it.

        The addresses are tried in order, each `dial_stagger_s` after the one before it or as soon
        as that one fails; the first to finish the handshake wins. Who dials the same peer meanwhile
        shares the attempt.

        Args:
            addrs: Where the peer may be; more than `dial_addrs_max` are not tried.
            peer: Who must answer. Without it, the peer ID in the addresses; without that, anybody.
            timeout_s: For everything; `dial_s` if None.
            direct: A live connection that somebody carries is not enough.

        Raises PeerMismatch if only other peers answered, else DialError, which names every address
        and why it failed.
        """
        return await self._dialler.dial(addrs, peer, timeout_s, direct=direct)

    async def connect_pipe(
        self, pipe: Pipe, peer: PeerId, remote: Multiaddr, *, timeout_s: float | None = None
    ) -> Connection:
        """Connect to `peer` through `pipe`, which this host then owns, also if this raises.

        Always a connection of its own, also if there is one already.

        Args:
            pipe: Leads to a host that calls `accept_pipe`; who carries it need not be trusted.
            peer: Who must answer at its other end.
            remote: The address of whoever carries the bytes, for logs.
            timeout_s: For everything; `dial_s` if None.

        Raises PeerMismatch if another peer answered, else DialError.
        """
        return await self._dialler.connect_pipe(pipe, peer, remote, timeout_s)

    async def adopt(self, sock: socket.socket, peer: PeerId, *, initiator: bool) -> Connection:
        """Run the handshake on a TCP connection that is made already, and whose end is `peer`.

        The socket is this host's then, also if this raises. Raises PeerMismatch, OverlayError.
        """
        return await self._dialler.adopt(
            sock,
            self._outbound(peer, None)
            if initiator
            else NoiseConnection(self, initiator=False, expect=peer),
        )

    def _outbound(self, expect: PeerId | None, carrier: Multiaddr | None) -> NoiseConnection:
        conn = NoiseConnection(self, initiator=True, expect=expect, carrier=carrier)
        self._handshaking.add(conn)
        return conn

    # --- connections, as they call it -------------------------------------------------------------

    def admit_connection(self, conn: NoiseConnection) -> None:
        """Book an inbound handshake, or raise OverlayError or LimitExceeded."""
        if self._closing:
            raise OverlayError("this node is stopping", code="overlay.closed")
        self._slots.book(conn)
        self._handshaking.add(conn)

    def admit_peer(self, conn: NoiseConnection) -> None:
        """Find a slot for an authenticated connection, or raise LimitExceeded.

        Before the dialler hears the end of the handshake: who is turned away sees a failed dial.
        `established` follows in the same turn of the loop.
        """
        while len(mine := self._connections.get(conn.peer, [])) >= (
            self.limits.connections_per_peer_max
        ):
            self.refused["connections_per_peer_max"] += 1
            # Idle ones first: a peer that restarted leaves dead connections behind.
            oldest = min(mine, key=lambda other: (other.in_use, other.opened_at))
            oldest.abort(OverlayError("replaced by a newer connection", code="overlay.closed"))
        self._slots.admit(conn, len(self._all))

    def established(self, conn: NoiseConnection) -> None:
        """Adopt a connection whose handshake is done."""
        peer = conn.peer
        if self._closing:
            raise OverlayError("this node is stopping", code="overlay.closed")
        if conn.closed:  # `lost` was called already, and is not called again
            raise OverlayError("the connection ended", code="overlay.closed")
        self._handshaking.discard(conn)
        self._all.add(conn)
        mine = self._connections.setdefault(peer, [])
        mine.append(conn)
        self._slots.establish(conn)
        if not conn.initiator:
            self._dialler.arrived(conn)
        self._tell(log.info, "connection.up", conn, initiator=conn.initiator)
        for on_up, _on_down in list(self._watchers):
            self._notify(on_up, conn)
        if self._hosts is not None and not (conn.tunnelled or conn.local.is_loopback):
            # There is a way out again, maybe from an address that came a moment ago.
            self._hosts |= {conn.local.host}
            for other in [other for other in self._all if self._is_stranded(other)]:
                other.abort(OverlayError(_STRANDED, code="overlay.closed"))
        best = self.connection(peer)
        for other in mine[:-1]:
            moved = best is conn and conn.remote.relay != other.remote.relay
            if other.tunnelled and (moved or not conn.tunnelled):
                # No sign of a death, and its answer may wait at the relay behind megabytes.
                continue
            age_s, rtt_s = conn.opened_at - other.opened_at, max(conn.rtt_s, other.rtt_s)
            crossed = conn.initiator is not other.initiator and age_s < _CROSSED_S
            other.probe(PROBE_S if crossed else min(PROBE_S, REPLACED_S + 2 * rtt_s))
        if len(mine) == 2:
            self._close_duplicates(peer)

    def _close_duplicates(self, peer: PeerId) -> None:
        """Look again and again, while there are two: what is in use ends later."""
        keep, idle_s = self.connection(peer), self.limits.duplicate_idle_s
        loop = asyncio.get_running_loop()
        duplicates = [conn for conn in self._connections.get(peer, ()) if conn is not keep]
        for conn in duplicates:
            if not conn.in_use and loop.time() - conn.used_at >= idle_s:
                conn.close()
        if duplicates:
            loop.call_later(idle_s, self._close_duplicates, peer)

    def lost(self, conn: NoiseConnection) -> None:
        """Forget a connection that has ended."""
        self._handshaking.discard(conn)
        self._slots.free(conn)
        self._serving.lost(conn)
        if conn not in self._all:
            if not conn.initiator:
                log.debug("handshake.failed", remote=conn.remote, reason=conn.error)
            return
        self._all.discard(conn)
        mine = self._connections[conn.peer]
        mine.remove(conn)
        if not mine:
            del self._connections[conn.peer]
        violated = isinstance(conn.error, Violation)
        say = log.warning if violated else log.info
        self._tell(say, "connection.down", conn, reason=conn.error or "closed")
        for _on_up, on_down in list(self._watchers):
            self._notify(on_down, conn)

    def _tell(
        self, say: Callable[..., None], event: str, conn: NoiseConnection, **fields: object
    ) -> None:
        known = self._slots.is_privileged(conn.peer)
        key = known, conn.peer if known else address_key(conn.address)
        if (left_out := self._lines.lines(key)) is not None:
            say(event, peer=conn.peer, remote=conn.remote, **fields, unlogged=left_out)

    def _notify(self, callback: Callable[[Connection], None], conn: Connection) -> None:
        try:
            callback(conn)
        except Exception:  # a watcher's defect must not end the connection
            log.error("watcher.failed", exc_info=True)

    def inbound(self, stream: Stream) -> None:
        """Serve a new inbound stream, if there is time for one more of this peer's."""
        conn = stream.connection
        if (
            conn.initiator
            or self._slots.is_privileged(conn.peer)
            or self._stranger_opens.take(address_key(conn.address))
        ):
            self._serving.start(stream)
            return
        self.refused["stream.stranger_rate"] += 1
        conn.abort(Violation("strangers at this address open streams too fast"))

    def stream_reset(self, stream: Stream) -> None:
        """A stream was reset: its handler ends soon."""
        self._serving.stream_reset(stream)

    # --- connections, as others see them ----------------------------------------------------------

    def reconsider(self, peer: PeerId) -> None:
        """Ask anew whether `peer` is privileged: then its connections are no longer a stranger's.

        For whoever learns it after the handshake, e.g. from a certificate.
        """
        if self._slots.is_privileged(peer):
            for conn in self._connections.get(peer, ()):
                self._slots.reconsider(conn)

    def connection(self, peer: PeerId) -> Connection | None:
        """The connection to use for new streams to `peer`, or None.

        Of several, both ends prefer the same one: one that is not in doubt, and that nobody
        carries, then that which the smaller peer ID dialled, and of those the oldest; of those that
        are carried the newest, for the smaller peer ID looks for a better relay.
        """
        mine_first = self.peer_id < peer

        def rank(conn: NoiseConnection) -> tuple[bool, bool, bool, float]:
            not_mine = conn.initiator is not mine_first
            opened_at = -conn.opened_at if conn.tunnelled else conn.opened_at
            return conn.doubted, conn.tunnelled, not_mine, opened_at

        mine = self._connections.get(peer, ())
        live = [c for c in mine if c.accepts_streams and not self._is_stranded(c)]
        return min(live, key=rank, default=None)

    def network_changed(self, hosts: frozenset[str]) -> None:
        """This machine, now with the addresses `hosts`, may be in another network, or has slept.

        Connections are asked for a sign of life. Those from an address that is gone are not used
        for new streams; they end when a peer is connected from another one, or if the address does
        not come back for `FLAP_S`. Dials that are under way begin again.
        """
        self._hosts = hosts
        for conn in tuple(self._all):
            conn.probe(PROBE_S + FLAP_S if self._is_stranded(conn) else PROBE_S)
        self._dialler.begin_again()

    def _is_stranded(self, conn: Connection) -> bool:
        """Whether a connection is from an address that this machine does not have any more."""
        hosts, local = self._hosts, conn.local
        return not (hosts is None or conn.tunnelled or local.is_loopback or local.host in hosts)

    def connections(self) -> tuple[Connection, ...]:
        return tuple(conn for mine in self._connections.values() for conn in mine)

    def peers(self) -> tuple[PeerId, ...]:
        return tuple(self._connections)

    def watch(
        self, on_up: Callable[[Connection], None], on_down: Callable[[Connection], None]
    ) -> Callable[[], None]:
        """Call back for each connection that is established or ends; not for those there already.

        Callbacks run on the loop and must not block. Returns a function that ends the watch.
        """
        entry = (on_up, on_down)
        self._watchers.append(entry)

        def end() -> None:
            if entry in self._watchers:
                self._watchers.remove(entry)

        return end

    # --- streams ----------------------------------------------------------------------------------

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        """Open a stream over a live connection; see `Connection.open_stream`.

        Raises DialError if there is no connection to `peer`; this does not dial.
        """
        conn = self.connection(peer)
        if conn is None:
            raise DialError(f"not connected to {peer}", code="overlay.not_connected")
        return await conn.open_stream(*protocols)

    def handle(self, protocol: str, handler: Handler, *, access: Access) -> Callable[[], None]:
        """Serve `protocol` with `handler`, for peers that `admit` lets in for `access`.

        The handler runs as a task of the host. When it returns, the stream is finished; when it
        raises, the stream is reset and the error logged, and nothing else happens. A handler whose
        stream was reset is cancelled after `handler_grace_s`.

        Returns a function that ends the registration; streams in progress go on.
        Raises InvalidArgument if the protocol is taken or is not a name.
        """
        return self._serving.handle(protocol, handler, access)

    @property
    def protocols(self) -> tuple[str, ...]:
        return tuple(self._serving.handlers)

    def admits(self, peer: PeerId, protocol: str, access: Access) -> bool:
        """Whether `peer` may open a stream for `protocol`: `admit`, failing closed."""
        return self._serving.admits(peer, protocol, access)
