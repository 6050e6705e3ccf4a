"""LinkHost: listens, dials, keeps the connections, and gives each inbound stream to its handler."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from wetware.base.access import Access
from wetware.base.bounds import Rates, Throttle, address_key
from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.base.sockets import accept
from wetware.errors import (
    Busy,
    ConfigError,
    DialError,
    InvalidArgument,
    LimitExceeded,
    OverlayError,
    PeerMismatch,
    WetwareError,
)
from wetware.identity import Key, PeerId
from wetware.overlay.link.connection import RECEIVE_BYTES, Connection
from wetware.overlay.link.limits import LinkLimits, LinkStats, Totals, Violation
from wetware.overlay.link.multistream import HEADER, HELLO, Responder, encode_line
from wetware.overlay.link.noise import MESSAGE_BYTES_MAX, NoiseIdentity
from wetware.overlay.link.pipe import Pipe, PipeTransport
from wetware.overlay.link.yamux import Bytes, Stream

log = get_logger("link")

Handler = Callable[[Stream], Coroutine[Any, Any, None]]
Admit = Callable[[PeerId, str, Access], bool]
Privileged = Callable[[PeerId], bool]

_ADDRESSES_MAX = 4096
"""Addresses whose strangers' streams are counted; the longest silent is forgotten."""
_ACCEPT_AGAIN_S = 0.1
"""Wait after the kernel gave no connection, e.g. for want of a descriptor: it holds them."""
_ACCEPT_LINES_PER_MINUTE = 2
_REFUSALS_LOGGED_MAX = 8  # per connection: a peer must not be able to fill the log


def allow_public_only(peer: PeerId, protocol: str, access: Access) -> bool:
    """The default of `LinkHost`: what is not public is refused."""
    return access is Access.PUBLIC


def nobody(peer: PeerId) -> bool:
    """The default of `LinkHost` for who is privileged."""
    return False


class GuestPort(Protocol):
    """Another libp2p implementation on the same connections (see overlay/).

    It gets the streams of protocols that the link does not serve. Both methods are called on the
    loop, must not block, and cost a stream if they raise.
    """

    def accepts(self, protocol: str) -> Access | None:
        """Who may open a stream of `protocol`; None if the guest does not serve it now."""
        ...

    def offer(self, stream: Stream, protocol: str) -> None:
        """Take over an inbound stream, `owner` "guest".

        The guest negotiates again as if nothing had happened: what it reads begins with the
        multistream header and the proposal of `protocol`, and the header that it writes is
        dropped, because the link has sent one already. So an adapter just reads and writes. The
        link does not touch the stream any more; `set_guest(None)` resets it.
        """
        ...


class _Dial:
    """One attempt to reach a peer, shared by all who ask for it meanwhile."""

    __slots__ = ("addrs", "arrived", "failures", "key", "task", "waiters")

    def __init__(self, key: object, addrs: Sequence[Multiaddr]) -> None:
        self.key, self.addrs = key, addrs
        self.failures: dict[Multiaddr, WetwareError | None] = {}  # None: still trying
        self.arrived: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[Connection] | None = None
        self.waiters = 0


class _Slot:
    """What an inbound connection is booked under, from its TCP accept to its end."""

    __slots__ = ("group", "stranger", "timer")

    def __init__(self, group: str) -> None:
        self.group = group
        self.stranger = False  # known after the handshake
        self.timer: asyncio.TimerHandle | None = None  # for the idle deadline


class _Inbound:
    """The negotiation of one inbound stream, driven by its data."""

    __slots__ = ("host", "responder", "stream", "timer")

    def __init__(self, host: LinkHost, stream: Stream, timer: asyncio.TimerHandle) -> None:
        self.host, self.stream, self.timer = host, stream, timer
        self.responder = Responder(
            self._decide, proposals_max=host.limits.negotiation_proposals_max
        )

    def _decide(self, protocol: str) -> bool | None:
        return self.host._decide(self.stream, protocol)

    def on_data(self, data: Bytes) -> None:
        self.stream.consumed(len(data))
        self._advance(lambda: self.responder.receive(data))

    def resume(self) -> None:
        self._advance(self.responder.resume)

    def _advance(self, step: Callable[[], bytes]) -> None:
        stream = self.stream
        try:
            answer = step()
            chosen = self.responder.chosen
            if chosen is not None and self.host._serves(chosen):
                answer += encode_line(chosen)
            # At most a few dozen short lines, and a new stream takes 16 KiB: nothing is cut off.
            stream.write_nowait(answer)
        except Violation as exc:
            self.host.refused("stream.negotiation")
            log.debug("stream.bad_negotiation", peer=stream.peer, reason=exc.message)
            stream.reset()
            return
        except OverlayError:
            return  # the stream ended meanwhile
        if chosen is not None:
            self.host._agreed(self, chosen)

    def on_end(self, exc: Exception | None) -> None:
        self.host._negotiating.pop(self.stream, None)
        self.timer.cancel()
        if exc is None:
            self.stream.reset()  # closed before anything was agreed

    def expired(self) -> None:
        self.host.refused("stream.negotiation_timeout")
        self.stream.reset()


class LinkHost:
    """One node's end of the data path.

    Args:
        key: The node's key; its peer ID is what peers authenticate.
        limits: See LinkLimits.
        admit: Whether a peer may open a stream for a protocol of a class; asked for each stream,
            the guest's included. A refused one hears `na`, as for an unknown protocol.
        privileged: Whether a peer is one that this node is there for, e.g. a member of its cluster;
            everybody else is a stranger. Inbound connections of strangers are closed when idle, are
            limited per address, and make room for privileged ones. Asked when the peer has proven
            who it is, and again before a stranger's connection is ended; one that raises says no.

    Use as `async with LinkHost(key) as host:`; leaving closes listeners, connections, handlers.

    Attributes:
        peer_id: This node.
        guest_expected: While True and no guest is set, streams of protocols that nobody serves
            wait, up to `negotiation_s`, instead of hearing `na`.
    """

    def __init__(
        self,
        key: Key,
        *,
        limits: LinkLimits | None = None,
        admit: Admit = allow_public_only,
        privileged: Privileged = nobody,
    ) -> None:
        self.limits = limits or LinkLimits()
        self.totals = Totals()
        self.noise = NoiseIdentity(key)
        self.peer_id = key.peer_id
        self.scratch = memoryview(bytearray(RECEIVE_BYTES + MESSAGE_BYTES_MAX + 2))
        self.guest_expected = False
        self._admit, self._privileged = admit, privileged
        self._handlers: dict[str, tuple[Handler, Access]] = {}
        self._guest: GuestPort | None = None
        self._stranger_opens = Rates(
            self.limits.stranger_opens_per_s,
            self.limits.stranger_opens_burst,
            _ADDRESSES_MAX,
            time.monotonic,
        )
        self._negotiating: dict[Stream, _Inbound] = {}
        self._serving: dict[Stream, asyncio.Task[None]] = {}
        self._listeners: dict[asyncio.Task[None], socket.socket] = {}
        self._accept_lines = Throttle(_ACCEPT_LINES_PER_MINUTE, 1, time.monotonic)
        self._listen_addrs: tuple[Multiaddr, ...] = ()
        self._connections: dict[PeerId, list[Connection]] = {}
        self._all: set[Connection] = set()  # established
        self._handshaking: set[Connection] = set()
        self._slots: dict[Connection, _Slot] = {}  # inbound ones, in the order of their arrival
        self._strangers = 0  # established, of the slots
        self._strangers_per_ip: Counter[str] = Counter()
        self._pending_per_ip: Counter[str] = Counter()
        self._dials: dict[object, _Dial] = {}
        self._dial_slots = asyncio.Semaphore(self.limits.dials_max)
        self._watchers: list[tuple[Callable[[Connection], None], Callable[[Connection], None]]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._refused: Counter[str] = Counter()
        self._refusals_logged: Counter[Connection] = Counter()
        self._accepted = self._dialled = 0
        self._past_in = self._past_out = 0
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
        for dial in self._dials.values():
            if dial.task is not None:
                dial.task.cancel()
        for task in self._serving.values():
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
        for timer in self._timers:
            timer.cancel()

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task that ends with the host at the latest."""
        task = asyncio.get_running_loop().create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        def run() -> None:
            self._timers.discard(timer)
            callback()

        timer = asyncio.get_running_loop().call_later(delay_s, run)
        self._timers.add(timer)
        return timer

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
        listeners = await _bind(addrs, self.limits.listen_backlog)
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
                self.refused("accept")
                if (left_out := self._accept_lines.lines("accept")) is not None:
                    log.warning("accept.failed", why=exc.strerror, unlogged=left_out)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            try:
                await loop.connect_accepted_socket(lambda: Connection(self, initiator=False), sock)
            except OSError as exc:  # it went already
                sock.close()
                log.debug("accept.gone", why=exc.strerror)

    # --- inbound slots ----------------------------------------------------------------------------

    def admit_connection(self, conn: Connection) -> None:
        """Book an inbound handshake, or raise LimitExceeded (called by connections)."""
        limits, group, pending = self.limits, address_key(conn.remote.host), self._pending_per_ip
        if pending.total() >= limits.handshakes_max:
            self._evict_handshake(group)
        for name, value, limit in (
            ("handshakes_max", pending.total(), limits.handshakes_max),
            ("handshakes_per_ip_max", pending[group], limits.handshakes_per_ip_max),
        ):
            if value >= limit or self._closing:
                raise self._full(conn, name, value)
        pending[group] += 1
        self._slots[conn] = _Slot(group)
        self._handshaking.add(conn)

    def _evict_handshake(self, group: str) -> None:
        """End the oldest handshake of the address with most, if that has more than `group` will.

        An honest handshake takes three round trips: what an address hoards is not honest.
        """
        crowded, most = max(self._pending_per_ip.items(), key=lambda item: item[1])
        if most > self._pending_per_ip[group] + 1:
            oldest = next(
                conn
                for conn, slot in self._slots.items()
                if slot.group == crowded and conn in self._handshaking
            )
            self._evict(oldest, "handshake.evicted")

    def admit_peer(self, conn: Connection) -> None:
        """Find a slot for an authenticated connection, or raise LimitExceeded.

        Called by connections before the dialler hears the end of the handshake: who is turned away
        sees a failed dial. `established` follows in the same turn of the loop.
        """
        limits = self.limits
        mine = self._connections.get(conn.peer, [])
        while len(mine) >= limits.connections_per_peer_max:
            self.refused("connections_per_peer_max")
            # Idle ones first: a peer that restarted leaves dead connections behind.
            oldest = min(mine, key=lambda other: (other.streams_total > 0, other.opened_at))
            oldest.abort(OverlayError("replaced by a newer connection", code="overlay.closed"))
            mine = self._connections.get(conn.peer, [])
        if conn.initiator:
            if len(self._all) >= limits.connections_max:
                raise self._full(conn, "connections_max", len(self._all))
            return
        slot = self._slots[conn]
        slot.stranger = not self._is_privileged(conn.peer)
        inbound_max = limits.connections_max - limits.connections_max // 8
        strangers_max = inbound_max - min(limits.connections_privileged, inbound_max // 4)
        own = self._strangers_per_ip[slot.group]
        if slot.stranger and own >= limits.connections_per_ip_max:
            name, value, within = "connections_per_ip_max", own, True
        elif len(self._all) >= inbound_max or (slot.stranger and self._strangers >= strangers_max):
            name, value, within = "connections_max", len(self._all), False
        else:
            return
        if not self._make_room(slot.group if slot.stranger else None, within=within):
            raise self._full(conn, name, value)

    def _full(self, conn: Connection, name: str, value: int) -> LimitExceeded:
        self.refused(name)
        log.debug("connection.refused", remote=conn.remote, limit=name)
        hint = "raise connections_max, and the limit of open files with it"
        return LimitExceeded(
            f"{value} connections are open ({name})", hint=hint if conn.initiator else ""
        )

    def _is_privileged(self, peer: PeerId) -> bool:
        try:
            return self._privileged(peer)
        except Exception:  # fail closed
            log.error("privileged.failed", exc_info=True)
            return False

    def reconsider(self, peer: PeerId) -> None:
        """Ask anew whether `peer` is privileged: then its connections are no longer a stranger's.

        For whoever learns it after the handshake, e.g. from a certificate.
        """
        if not self._is_privileged(peer):
            return
        for conn in self._connections.get(peer, ()):
            slot = self._slots.get(conn)
            if slot is None or not slot.stranger:
                continue
            slot.stranger = False
            self._strangers -= 1
            self._strangers_per_ip[slot.group] -= 1
            _drop_zero(self._strangers_per_ip, slot.group)
            if slot.timer is not None:
                slot.timer.cancel()
                slot.timer = None

    def _make_room(self, group: str | None, *, within: bool = False) -> bool:
        """End one stranger's inbound connection, if there is one that has to give way.

        The longest idle one goes first. One in use goes only for a privileged peer (`group` None),
        or if its address has more connections than the newcomer's will have: who holds many does
        not crowd out who wants one, and nobody's work is cut off for a newcomer of a crowd.

        Args:
            group: The address of the newcomer, a stranger; None for a privileged one.
            within: Whether only connections of `group` count.
        """
        counts = self._strangers_per_ip
        own = 0 if group is None else counts[group] + 1
        best: tuple[bool, int, float] | None = None
        victim: Connection | None = None
        for conn, slot in self._slots.items():
            if not slot.stranger or conn not in self._all or (within and slot.group != group):
                continue
            used, count = conn.in_use, counts[slot.group]
            if used and count <= own and group is not None:
                continue
            rank = (used, -count if used else 0, conn.used_at)
            if (best is None or rank < best) and not self._is_privileged(conn.peer):
                best, victim = rank, conn
        if victim is None:
            return False
        self._evict(victim, "connection.evicted")
        return True

    def _evict(self, conn: Connection, reason: str) -> None:
        self.refused(reason)
        conn.abort(OverlayError("its slot was given to another peer", code="overlay.closed"))

    def _watch_idle(self, conn: Connection, slot: _Slot) -> None:
        """Close a stranger's connection that nobody uses; look again when it may be due."""
        idle_s = self.limits.stranger_idle_s
        loop = asyncio.get_running_loop()
        if not conn.in_use and not conn.closed and not self._is_privileged(conn.peer):
            left_s = conn.used_at + idle_s - loop.time()
            if left_s <= 0:
                self.refused("connection.idle")
                conn.close()
                return
        else:
            left_s = idle_s
        slot.timer = loop.call_later(left_s, self._watch_idle, conn, slot)

    # --- connections ------------------------------------------------------------------------------

    def established(self, conn: Connection) -> None:
        """Adopt a connection whose handshake is done (called by connections)."""
        peer = conn.peer
        if self._closing:
            raise OverlayError("this node is stopping", code="overlay.closed")
        self._leave_handshake(conn)
        mine = self._connections.setdefault(peer, [])
        mine.append(conn)
        self._all.add(conn)
        slot = self._slots.get(conn)
        if slot is not None and slot.stranger:
            self._strangers += 1
            self._strangers_per_ip[slot.group] += 1
            self._watch_idle(conn, slot)
        if conn.initiator:
            self._dialled += 1
        else:
            self._accepted += 1
            dial = self._dials.get(peer)
            # Both ends dial each other: the smaller peer ID's connection is the one to keep, so the
            # larger one stops its own attempt. Were both to stop, none would be left.
            if dial is not None and peer < self.peer_id and not dial.arrived.done():
                dial.arrived.set_result(conn)
        log.info("connection.up", peer=peer, remote=conn.remote, initiator=conn.initiator)
        for on_up, _on_down in list(self._watchers):
            self._notify(on_up, conn)
        if len(mine) > 1:
            self._later(self.limits.duplicate_idle_s, lambda: self._close_duplicates(peer))

    def _close_duplicates(self, peer: PeerId) -> None:
        keep = self.connection(peer)
        idle = [
            conn
            for conn in self._connections.get(peer, ())
            if conn is not keep and not conn.closed and not conn.streams_total
        ]
        for conn in idle:
            conn.close()

    def _leave_handshake(self, conn: Connection) -> None:
        if conn in self._handshaking:
            self._handshaking.discard(conn)
            slot = self._slots.get(conn)
            if slot is not None:
                self._pending_per_ip[slot.group] -= 1
                _drop_zero(self._pending_per_ip, slot.group)

    def lost(self, conn: Connection) -> None:
        """Forget a connection that has ended (called by connections)."""
        self._leave_handshake(conn)
        slot = self._slots.pop(conn, None)
        if slot is not None and slot.timer is not None:
            slot.timer.cancel()
        self._refusals_logged.pop(conn, None)
        self._past_in += conn.bytes_in
        self._past_out += conn.bytes_out
        if conn not in self._all:
            if not conn.initiator:
                log.debug("handshake.failed", remote=conn.remote, reason=conn.error)
            return
        self._all.discard(conn)
        if slot is not None and slot.stranger:
            self._strangers -= 1
            self._strangers_per_ip[slot.group] -= 1
            _drop_zero(self._strangers_per_ip, slot.group)
        mine = self._connections[conn.peer]
        mine.remove(conn)
        if not mine:
            del self._connections[conn.peer]
        violated = isinstance(conn.error, Violation)
        (log.warning if violated else log.info)(
            "connection.down", peer=conn.peer, remote=conn.remote, reason=conn.error or "closed"
        )
        for _on_up, on_down in list(self._watchers):
            self._notify(on_down, conn)

    def _notify(self, callback: Callable[[Connection], None], conn: Connection) -> None:
        try:
            callback(conn)
        except Exception:  # a watcher's defect must not end the connection
            log.error("watcher.failed", exc_info=True)

    def refused(self, reason: str) -> None:
        """Count something that was turned away (called by connections)."""
        self._refused[reason] += 1

    def connection(self, peer: PeerId) -> Connection | None:
        """The connection to use for new streams to `peer`, or None.

        Of several, both ends prefer the same one: one that nobody carries, then that which the
        smaller peer ID dialled, and of those the oldest.
        """
        live = [conn for conn in self._connections.get(peer, ()) if conn.accepts_streams]
        if len(live) < 2:
            return live[0] if live else None
        mine_first = self.peer_id < peer

        def rank(conn: Connection) -> tuple[bool, bool, float]:
            return conn.tunnelled, conn.initiator is not mine_first, conn.opened_at

        return min(live, key=rank)

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

    def stats(self) -> LinkStats:
        """A snapshot for `ww status` and tests."""
        return LinkStats(
            connections=len(self._all),
            handshakes_pending=len(self._handshaking),
            streams=sum(conn.streams_total for conn in self._all),
            handlers=len(self._serving),
            buffered_bytes=self.totals.buffered_bytes,
            unsent_bytes=self.totals.unsent_bytes,
            bytes_in=self._past_in + sum(conn.bytes_in for conn in self._all),
            bytes_out=self._past_out + sum(conn.bytes_out for conn in self._all),
            accepted=self._accepted,
            dialled=self._dialled,
            refused=dict(self._refused),
        )

    # --- dialling ---------------------------------------------------------------------------------

    async def dial(
        self,
        addrs: Sequence[Multiaddr],
        *,
        peer: PeerId | None = None,
        timeout_s: float | None = None,
    ) -> Connection:
        """Connect to a peer, or return a live connection to it.

        The addresses are tried in order, each `dial_stagger_s` after the one before it or as soon
        as that one fails; the first to finish the handshake wins. Who dials the same peer meanwhile
        shares the attempt.

        Args:
            addrs: Where the peer may be; more than `dial_addrs_max` are not tried.
            peer: Who must answer. Without it, the peer ID in the addresses; without that, anybody.
            timeout_s: For everything; `dial_s` if None.

        Raises PeerMismatch if only other peers answered, else DialError, which names every address
        and why it failed.
        """
        if peer is None:
            named = {addr.peer for addr in addrs}
            peer = named.pop() if len(named) == 1 else None
        if peer is not None and (live := self.connection(peer)) is not None:
            return live
        if self._closing:
            raise DialError("this node is stopping")
        if peer == self.peer_id:
            raise DialError("that is this node itself", code="overlay.dial_self")
        if not addrs:
            raise DialError(
                f"no address of {peer or 'the peer'} is known",
                hint="give one: /ip4/HOST/tcp/PORT/p2p/PEER",
            )
        wanted = tuple(addrs)[: self.limits.dial_addrs_max]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self.limits.dial_s if timeout_s is None else timeout_s)
        while True:
            key = peer or wanted
            dial = self._dials.get(key)
            if dial is None:
                dial = self._dials[key] = _Dial(key, wanted)
                dial.task = self.spawn(self._race(dial, peer))
                dial.task.add_done_callback(partial(self._dial_done, dial))
            try:
                return await self._join(dial, peer, deadline)
            except DialError:
                # Somebody else's attempt failed, but it had other addresses.
                if set(wanted) <= set(dial.addrs):
                    raise

    def _forget_dial(self, dial: _Dial) -> None:
        if self._dials.get(dial.key) is dial:
            del self._dials[dial.key]

    def _dial_done(self, dial: _Dial, task: asyncio.Task[Connection]) -> None:
        self._forget_dial(dial)
        if not task.cancelled():
            task.exception()  # looked at, even if all who waited are gone

    async def _join(self, dial: _Dial, peer: PeerId | None, deadline: float) -> Connection:
        assert dial.task is not None  # noqa: S101  # set where it is made
        dial.waiters += 1
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.shield(dial.task)
        except TimeoutError:
            raise _dial_error(dial, peer, "no answer in time") from None
        except asyncio.CancelledError:
            if dial.task.cancelled() and self._closing:
                raise DialError("this node is stopping") from None
            raise
        finally:
            dial.waiters -= 1
            if not dial.waiters and not dial.task.done():
                self._forget_dial(dial)  # nobody may join what is being cancelled
                dial.task.cancel()

    async def _race(self, dial: _Dial, peer: PeerId | None) -> Connection:
        waiting = deque(dial.addrs)
        attempts: dict[asyncio.Task[Connection], Multiaddr] = {}
        try:
            while waiting or attempts:
                if waiting:
                    addr = waiting.popleft()
                    dial.failures[addr] = None
                    attempts[asyncio.ensure_future(self._attempt(addr, peer))] = addr
                done, _ = await asyncio.wait(
                    {*attempts, dial.arrived},
                    timeout=self.limits.dial_stagger_s if waiting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in [task for task in attempts if task in done]:
                    tried = attempts.pop(task)
                    exc = task.exception()
                    if exc is None:
                        return task.result()
                    if not isinstance(exc, WetwareError):
                        log.error("dial.defect", exc_info=exc)
                        exc = DialError("a defect; the log has the details")
                    dial.failures[tried] = exc
                if dial.arrived in done and dial.arrived.result().accepts_streams:
                    return dial.arrived.result()
                if dial.arrived.done():
                    dial.arrived = asyncio.get_running_loop().create_future()
            raise _dial_error(dial, peer, "")
        finally:
            for task in attempts:
                task.cancel()
            if attempts:
                await asyncio.wait(attempts)
                for task in attempts:  # won too late
                    if not task.cancelled() and task.exception() is None:
                        task.result().close()

    async def _attempt(self, addr: Multiaddr, peer: PeerId | None) -> Connection:
        """One address: resolve, connect, handshake. Raises WetwareError."""
        expect = peer or addr.peer
        if addr.peer not in (None, expect):
            raise PeerMismatch(f"the address names another peer, {addr.peer}")
        conn: Connection | None = None

        def connected() -> Connection:
            nonlocal conn
            conn = Connection(self, initiator=True, expect=expect)
            self._handshaking.add(conn)
            return conn

        try:
            async with self._dial_slots:
                await asyncio.get_running_loop().create_connection(
                    connected,
                    addr.host,
                    addr.port,
                    family=_FAMILIES[addr.kind],
                    # A name may stand for several addresses, of which some do not work here.
                    happy_eyeballs_delay=(
                        self.limits.dial_stagger_s if addr.kind.startswith("dns") else None
                    ),
                )
                assert conn is not None  # noqa: S101  # made by create_connection
                return await asyncio.shield(conn.ready)
        except socket.gaierror as exc:
            raise DialError(f"{addr.host} cannot be resolved: {exc.strerror}") from exc
        except OSError as exc:
            raise DialError(_os_reason(exc)) from exc
        except BaseException:
            if conn is not None:
                conn.abort(OverlayError("the dial was given up", code="overlay.closed"))
            raise

    # --- tunnels ----------------------------------------------------------------------------------

    def accept_pipe(self, pipe: Pipe, remote: Multiaddr) -> Connection:
        """Let a peer connect through `pipe`, which this host then owns.

        The limits of inbound connections hold, and `remote`, the address of whoever carries the
        bytes, is what they are counted under: a carrier takes no more places than one address does.
        The peer that is authenticated at the other end is told to watchers as any other.

        Returns the connection, not established yet: `wait_closed` tells when it is over, also if it
        was turned away. A handler that passes its stream here has to wait for that.
        """
        conn = Connection(self, initiator=False, carrier=remote.with_peer(None))
        PipeTransport(pipe, conn, self.spawn)
        return conn

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
        what = f"cannot reach {peer} through {remote.with_peer(None)}"
        if self._closing or peer == self.peer_id:
            pipe.abort()
            if self._closing:
                raise DialError("this node is stopping")
            raise DialError("that is this node itself", code="overlay.dial_self")
        conn = Connection(self, initiator=True, expect=peer, carrier=remote.with_peer(None))
        self._handshaking.add(conn)
        PipeTransport(pipe, conn, self.spawn)
        try:
            async with asyncio.timeout(self.limits.dial_s if timeout_s is None else timeout_s):
                return await asyncio.shield(conn.ready)
        except TimeoutError:
            conn.abort(OverlayError("the dial was given up", code="overlay.closed"))
            raise DialError(f"{what}: no answer in time") from None
        except PeerMismatch:
            raise
        except WetwareError as exc:
            raise DialError(f"{what}: {exc}") from exc
        except BaseException:
            conn.abort(OverlayError("the dial was given up", code="overlay.closed"))
            raise

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        """Open a stream over a live connection; see `Connection.open_stream`.

        Raises DialError if there is no connection to `peer`; this does not dial.
        """
        conn = self.connection(peer)
        if conn is None:
            raise DialError(f"not connected to {peer}", code="overlay.not_connected")
        return await conn.open_stream(*protocols)

    # --- inbound streams --------------------------------------------------------------------------

    def handle(self, protocol: str, handler: Handler, *, access: Access) -> Callable[[], None]:
        """Serve `protocol` with `handler`, for peers that `admit` lets in for `access`.

        The handler runs as a task of the host. When it returns, the stream is finished; when it
        raises, the stream is reset and the error logged, and nothing else happens. A handler whose
        stream was reset is cancelled after `handler_grace_s`.

        Returns a function that ends the registration; streams in progress go on.
        Raises InvalidArgument if the protocol is taken or is not a name.
        """
        encode_line(protocol)
        if not protocol.startswith("/") or protocol == HEADER:
            raise InvalidArgument(f"{protocol!r} is not a protocol name: it begins with /")
        if protocol in self._handlers:
            raise InvalidArgument(f"{protocol} is served already", code="invalid.protocol_taken")
        entry = self._handlers[protocol] = (handler, access)

        def end() -> None:
            if self._handlers.get(protocol) is entry:
                del self._handlers[protocol]

        return end

    @property
    def protocols(self) -> tuple[str, ...]:
        return tuple(self._handlers)

    def set_guest(self, guest: GuestPort | None) -> None:
        """Put the guest in place, or take it away: its streams are then reset."""
        previous, self._guest = self._guest, guest
        if previous is not None and guest is not previous:
            for conn in self._all:
                for stream in conn.streams:
                    if stream.owner == "guest":
                        stream.on_wake = None
                        stream.reset()
        for waiting in list(self._negotiating.values()):
            waiting.resume()

    def admits(self, peer: PeerId, protocol: str, access: Access) -> bool:
        """Whether `peer` may open a stream for `protocol`: `admit`, failing closed."""
        try:
            return self._admit(peer, protocol, access)
        except Exception:  # fail closed
            log.error("admit.failed", exc_info=True)
            return False

    def _serves(self, protocol: str) -> bool:
        return protocol in self._handlers

    def _decide(self, stream: Stream, protocol: str) -> bool | None:
        """Whether an inbound stream gets `protocol`; None while the guest is awaited."""
        entry = self._handlers.get(protocol)
        if entry is not None:
            allowed = self.admits(stream.peer, protocol, entry[1])
            if not allowed:
                self._log_refusal(stream, protocol, "not admitted")
            return allowed
        if self._guest is None:
            if self.guest_expected:
                return None
        else:
            access: Access | None = None
            try:
                access = self._guest.accepts(protocol)
            except Exception:  # the guest's defect costs one stream
                log.error("guest.failed", exc_info=True)
            if access is not None:
                allowed = self.admits(stream.peer, protocol, access)
                if not allowed:
                    self._log_refusal(stream, protocol, "not admitted")
                return allowed
        self._log_refusal(stream, protocol, "not served")
        return False

    def _log_refusal(self, stream: Stream, protocol: str, reason: str) -> None:
        self.refused("stream.protocol")
        self._refusals_logged[stream.connection] += 1
        if self._refusals_logged[stream.connection] <= _REFUSALS_LOGGED_MAX:
            log.info("stream.refused", peer=stream.peer, protocol=protocol, reason=reason)

    def inbound(self, stream: Stream) -> None:
        """Begin the negotiation of a new inbound stream (called by connections)."""
        if not self._may_open(stream):
            self.refused("stream.stranger_rate")
            stream.connection.abort(Violation("strangers at this address open streams too fast"))
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(
            self.limits.negotiation_s, lambda: self._negotiating[stream].expired()
        )
        inbound = self._negotiating[stream] = _Inbound(self, stream, timer)
        stream.attach(inbound.on_data, inbound.on_end)

    def _may_open(self, stream: Stream) -> bool:
        """Whether there is time for one more stream of this peer, if it is a stranger."""
        if self._is_privileged(stream.peer) or stream.connection.initiator:
            return True
        return self._stranger_opens.take(address_key(stream.connection.remote.host))

    def _agreed(self, inbound: _Inbound, protocol: str) -> None:
        """A protocol was agreed: the stream goes to its handler, or to the guest."""
        stream, rest = inbound.stream, inbound.responder.rest()
        if self._negotiating.pop(stream, None) is None:
            return
        inbound.timer.cancel()
        stream.detach()
        stream.unread(rest)
        stream.protocol = protocol
        entry = self._handlers.get(protocol)
        if entry is not None:
            stream.hold()
            task = self.spawn(self._run(entry[0], stream))
            self._serving[stream] = task
            task.add_done_callback(lambda _task: self._served(stream))
            return
        stream.owner = "guest"
        stream.replay(HELLO + encode_line(protocol), swallow=len(HELLO))
        guest = self._guest
        if guest is None:  # it went between its yes and now
            stream.reset()
            return
        try:
            guest.offer(stream, protocol)
        except Exception:  # the guest's defect costs one stream
            log.error("guest.failed", exc_info=True)
            stream.reset()

    async def _run(self, handler: Handler, stream: Stream) -> None:
        try:
            await handler(stream)
        except (OverlayError, EOFError) as exc:  # the peer ended it early: nobody's defect
            log.debug("handler.ended", protocol=stream.protocol, peer=stream.peer, reason=exc)
            stream.reset()
        except Exception:  # a handler's defect ends its stream only
            log.error("handler.failed", protocol=stream.protocol, peer=stream.peer, exc_info=True)
            stream.reset()
        except BaseException:
            stream.reset()
            raise
        else:
            stream.finish()

    def _served(self, stream: Stream) -> None:
        if self._serving.pop(stream, None) is not None:
            if not stream.closing:  # cancelled before it began
                stream.reset()
            stream.release()

    def stream_reset(self, stream: Stream) -> None:
        """A stream was reset: its handler ends soon (called by connections)."""
        task = self._serving.get(stream)
        if task is None or task.done():
            return

        def cut() -> None:
            task.cancel()

        timer = self._later(self.limits.handler_grace_s, cut)

        def done(_task: asyncio.Task[None]) -> None:
            timer.cancel()
            self._timers.discard(timer)

        task.add_done_callback(done)


_FAMILIES = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}


async def check_free(addrs: Iterable[Multiaddr]) -> None:
    """Raise as `LinkHost.listen` does, if one of `addrs` cannot be had now."""
    for sock in await _bind(addrs, backlog=1):
        sock.close()


async def _bind(addrs: Iterable[Multiaddr], backlog: int) -> list[socket.socket]:
    """The sockets that listen on `addrs`; all or none."""
    loop = asyncio.get_running_loop()
    found: list[socket.socket] = []
    try:
        for addr in addrs:
            try:
                infos = await loop.getaddrinfo(
                    addr.host, addr.port, family=_FAMILIES[addr.kind], type=socket.SOCK_STREAM
                )
                for family, kind, proto, _, name in dict.fromkeys(infos):
                    found.append(sock := socket.socket(family, kind, proto))
                    sock.setblocking(False)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    sock.bind(name)
                    sock.listen(backlog)
            except OSError as exc:
                raise _listen_error(addr, exc) from exc
    except BaseException:
        for sock in found:
            sock.close()
        raise
    return found


def _drop_zero(counter: Counter[str], key: str) -> None:
    if not counter[key]:
        del counter[key]


def _os_reason(exc: OSError) -> str:
    if exc.errno is not None:
        return os.strerror(exc.errno).lower()
    return str(exc) or type(exc).__name__


def _listen_error(addr: Multiaddr, exc: OSError) -> ConfigError:
    if exc.errno == errno.EADDRINUSE:
        return Busy(
            f"cannot listen on {addr}: the port is taken",
            hint=f"stop what listens there, or: --listen /{addr.kind}/{addr.host}/tcp/PORT",
            code="config.busy.port",
        )
    if exc.errno == errno.EADDRNOTAVAIL:  # at boot, the network may not be up yet
        return Busy(
            f"cannot listen on {addr}: this machine has no such address",
            hint="use one of its own, or /ip4/0.0.0.0",
            code="config.busy.address",
        )
    if exc.errno == errno.EACCES:
        why, hint = "not permitted", "choose a port from 1024 upwards"
    else:
        why, hint = _os_reason(exc), "check the address"
    return ConfigError(f"cannot listen on {addr}: {why}", hint=hint, code="config.listen")


def _dial_error(dial: _Dial, peer: PeerId | None, pending: str) -> DialError:
    reasons = []
    for addr in dial.addrs:
        failure = dial.failures.get(addr) if addr in dial.failures else None
        reasons.append(f"{addr.with_peer(None)} ({failure or pending or 'not tried'})")
    known = [failure for failure in dial.failures.values() if failure is not None]
    message = f"cannot reach {peer or 'the peer'}: {'; '.join(reasons)}"
    if len(known) == len(dial.addrs) and all(isinstance(exc, PeerMismatch) for exc in known):
        code = known[0].code if len(known) == 1 else None
        return PeerMismatch(message, hint="check the peer ID after /p2p/", code=code)
    return DialError(message, hint="check that the node runs there and that no firewall is between")
