"""Inbound places: who gets a connection when there are not enough, and for how long."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from wetware.base.bounds import address_key, less
from wetware.base.log import get_logger
from wetware.errors import LimitExceeded, OverlayError

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.link.connection import NoiseConnection
    from wetware.overlay.link.limits import LinkLimits

log = get_logger("link")

Privileged = Callable[["PeerId"], bool]


class Slot:
    """What an inbound connection is booked under, from its TCP accept to its end."""

    __slots__ = ("group", "pending", "stranger")

    def __init__(self, group: str) -> None:
        self.group = group
        self.pending = True  # the handshake goes on
        self.stranger = False  # known towards its end


class Slots:
    """The slots of a host's inbound connections.

    Args:
        limits: See LinkLimits.
        privileged: See LinkHost.
        refused: Counts by reason what is turned away.

    Attributes:
        taken: In the order of their arrival.
        pending: Handshakes by address.
        strangers: Established connections of strangers by address.
    """

    def __init__(self, limits: LinkLimits, privileged: Privileged, refused: Counter[str]) -> None:
        self._limits, self._privileged, self._refused = limits, privileged, refused
        self.taken: dict[NoiseConnection, Slot] = {}
        self.pending: Counter[str] = Counter()
        self.strangers: Counter[str] = Counter()
        self._idle: dict[NoiseConnection, asyncio.TimerHandle] = {}  # of strangers, dialled too

    def is_privileged(self, peer: PeerId) -> bool:
        try:
            return self._privileged(peer)
        except Exception:  # fail closed
            log.error("privileged.failed", exc_info=True)
            return False

    # --- the life of a slot -----------------------------------------------------------------------

    def book(self, conn: NoiseConnection) -> None:
        """Book a handshake, or raise LimitExceeded."""
        limits, group, pending = self._limits, address_key(conn.address), self.pending
        if pending.total() >= limits.handshakes_max:
            self._evict_handshake(group)
        if (count := pending.total()) >= limits.handshakes_max:
            raise self._full(conn, "handshakes_max", count)
        if (count := pending[group]) >= limits.handshakes_per_ip_max:
            raise self._full(conn, "handshakes_per_ip_max", count)
        pending[group] += 1
        self.taken[conn] = Slot(group)

    def admit(self, conn: NoiseConnection, established: int) -> None:
        """Find a place among those established for an authenticated one, or raise LimitExceeded."""
        limits = self._limits
        if conn.initiator:
            if established >= limits.connections_max:
                raise self._full(conn, "connections_max", established)
            return
        slot = self.taken[conn]
        slot.stranger = not self.is_privileged(conn.peer)
        inbound_max = limits.connections_max - limits.connections_max // 8
        strangers_max = inbound_max - min(limits.connections_privileged, inbound_max // 4)
        own = self.strangers[slot.group]
        if slot.stranger and own >= limits.connections_per_ip_max:
            name, value, within = "connections_per_ip_max", own, True
        elif established >= inbound_max or (
            slot.stranger and self.strangers.total() >= strangers_max
        ):
            name, value, within = "connections_max", established, False
        else:
            return
        if not self._make_room(slot.group if slot.stranger else None, within=within):
            raise self._full(conn, name, value)

    def establish(self, conn: NoiseConnection) -> None:
        """The handshake is done."""
        if (slot := self.taken.get(conn)) is not None:
            slot.pending = False
            less(self.pending, slot.group)
            if slot.stranger:
                self.strangers[slot.group] += 1
        if not self.is_privileged(conn.peer):
            self._watch_idle(conn)

    def reconsider(self, conn: NoiseConnection) -> None:
        """The peer is privileged now."""
        self._end_watch(conn)
        slot = self.taken.get(conn)
        if slot is not None and slot.stranger:
            slot.stranger = False
            less(self.strangers, slot.group)

    def free(self, conn: NoiseConnection) -> None:
        """The connection has ended."""
        self._end_watch(conn)
        slot = self.taken.pop(conn, None)
        if slot is None:
            return
        if slot.pending:
            less(self.pending, slot.group)
        elif slot.stranger:
            less(self.strangers, slot.group)

    # --- when there are not enough ----------------------------------------------------------------

    def _full(self, conn: NoiseConnection, name: str, value: int) -> LimitExceeded:
        self._refused[name] += 1
        log.debug("connection.refused", remote=conn.remote, limit=name)
        hint = "raise connections_max, and the limit of open files with it"
        return LimitExceeded(
            f"{value} connections are open ({name})", hint=hint if conn.initiator else ""
        )

    def _evict_handshake(self, group: str) -> None:
        """End the oldest handshake of the address with most, if that has more than `group` will.

        An honest handshake takes three round trips: what an address hoards is not honest.
        """
        crowded, most = max(self.pending.items(), key=lambda item: item[1])
        if most > self.pending[group] + 1:
            oldest = next(
                conn for conn, slot in self.taken.items() if slot.pending and slot.group == crowded
            )
            self._evict(oldest, "handshake.evicted")

    def _make_room(self, group: str | None, *, within: bool) -> bool:
        """End one stranger's inbound connection, if there is one that has to give way.

        The longest idle one goes first. One in use goes only for a privileged peer (`group` None),
        or if its address has more connections than the newcomer's will have: who holds many does
        not crowd out who wants one, and nobody's work is cut off for a newcomer of a crowd.

        Args:
            group: The address of the newcomer, a stranger; None for a privileged one.
            within: Whether only connections of `group` count.
        """
        counts = self.strangers
        own = 0 if group is None else counts[group] + 1
        best: tuple[bool, int, float] | None = None
        victim: NoiseConnection | None = None
        for conn, slot in self.taken.items():
            if slot.pending or not slot.stranger or (within and slot.group != group):
                continue
            used, count = conn.in_use, counts[slot.group]
            if used and count <= own and group is not None:
                continue
            rank = (used, -count if used else 0, conn.used_at)
            if (best is None or rank < best) and not self.is_privileged(conn.peer):
                best, victim = rank, conn
        if victim is None:
            return False
        self._evict(victim, "connection.evicted")
        return True

    def _evict(self, conn: NoiseConnection, reason: str) -> None:
        self._refused[reason] += 1
        conn.abort(OverlayError("its slot was given to another peer", code="overlay.closed"))

    def _end_watch(self, conn: NoiseConnection) -> None:
        if (timer := self._idle.pop(conn, None)) is not None:
            timer.cancel()

    def _watch_idle(self, conn: NoiseConnection) -> None:
        """Close a stranger's connection that nobody uses; look again when it may be due."""
        idle_s = self._limits.stranger_idle_s
        loop = asyncio.get_running_loop()
        if not conn.in_use and not conn.closed and not self.is_privileged(conn.peer):
            left_s = conn.used_at + idle_s - loop.time()
            if left_s <= 0:
                self._refused["connection.idle"] += 1
                conn.close()
                return
        else:
            left_s = idle_s
        self._idle[conn] = loop.call_later(left_s, self._watch_idle, conn)
