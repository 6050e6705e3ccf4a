"""The nodes that one node knows, in the order in which it probes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from wetware.overlay.membership import wire
from wetware.overlay.membership.known import Known, State
from wetware.overlay.membership.record import key_of
from wetware.overlay.membership.wire import ALIVE, DEAD, SUSPECT

if TYPE_CHECKING:
    import random

    from wetware.overlay.membership.record import Record
    from wetware.overlay.membership.suspicion import Suspicion

STATES: Final = (State.ALIVE, State.SUSPECT, State.DEAD, State.LEFT)  # as on the wire


@lru_cache(maxsize=16_384)
def _packed(key: bytes, incarnation: int, revision: int, state: int) -> bytes:
    return wire.ENTRY.pack(key, incarnation, revision, state)


def entry_of(record: Record, state: int) -> bytes:
    """The entry of a frame that announces a record."""
    return _packed(key_of(record.peer), record.incarnation, record.revision, state)


@dataclass(slots=True, eq=False)
class Node:
    """What is known of one node."""

    key: bytes
    record: Record
    labels: Mapping[str, str]
    since: float
    state: int = ALIVE
    heard_at: float = -math.inf
    doubts: set[bytes] = field(default_factory=set)  # who accused it since, and was doubted
    claims: list[bytes] = field(default_factory=list)  # accusers whose claims are passed on
    suspicion: Suspicion | None = None
    rtt_s: float | None = None
    offset_s: float | None = None
    past_instance: bytes = b""  # the process before this one
    entry: bytes = b""  # announces it in a digest

    @property
    def lives(self) -> bool:
        """Whether it is alive or suspected."""
        return self.state <= SUSPECT

    def snapshot(self) -> Known:
        return Known(
            self.record, STATES[self.state], self.since, self.labels, self.rtt_s, self.offset_s
        )


class Table:
    """All other nodes, by the keys that name them on the wire.

    Attributes:
        size: Members alive or suspected, this node included.
    """

    def __init__(self, own: bytes, rng: random.Random) -> None:
        self._own, self._rng = own, rng
        self.nodes: dict[bytes, Node] = {}
        self.size = 1
        self._sorted: list[bytes] | None = None
        self._ring: list[bytes] = []  # may hold keys of nodes that are gone
        self._ring_at = 0

    def keys(self) -> list[bytes]:
        """Everybody's, this node's included, sorted."""
        if self._sorted is None:
            self._sorted = sorted((*self.nodes, self._own))
        return self._sorted

    def add(self, key: bytes, record: Record, labels: Mapping[str, str], now: float) -> Node:
        node = self.nodes[key] = Node(key, record, labels, now)
        self._sorted = None
        self._ring.insert(int(self._rng.random() * (len(self._ring) + 1)), key)
        self.size += 1
        node.entry = entry_of(record, ALIVE)
        return node

    def set_state(self, node: Node, state: int, now: float) -> None:
        self.size += (state <= SUSPECT) - node.lives
        node.state, node.since = state, now
        if state != SUSPECT:
            node.suspicion = None
        node.entry = entry_of(node.record, state)

    def remove(self, node: Node) -> bool:
        """Forget a node; whether it was there."""
        if self.nodes.get(node.key) is not node:
            return False
        del self.nodes[node.key]
        self._sorted = None  # the ring forgets it when its round comes to it
        self.size -= node.lives
        if len(self._ring) > 2 * len(self.nodes) + 16:
            self._ring = [key for key in self._ring if key in self.nodes]
            self._ring_at = 0
        return True

    def longest_dead(self) -> Node | None:
        dead = (node for node in self.nodes.values() if not node.lives)
        return min(dead, key=lambda node: node.since, default=None)

    def next_in_turn(self) -> Node | None:
        """The next living node of this round; a round ends with a new order."""
        for _attempt in range(len(self._ring) + 1):
            if self._ring_at >= len(self._ring):
                self._ring = list(self.nodes)
                self._rng.shuffle(self._ring)
                self._ring_at = 0
                if not self._ring:
                    return None
            node = self.nodes.get(self._ring[self._ring_at])
            self._ring_at += 1
            if node is not None and node.lives:
                return node
        return None

    def sample(
        self, count: int, *, exclude: bytes = b"", dead_since: float | None = None
    ) -> list[Node]:
        """Random members that are alive.

        Args:
            count: At most so many.
            exclude: Not the node with this key.
            dead_since: Also those that are suspected, and those that died later than this.
        """
        ring, nodes, rng = self._ring, self.nodes, self._rng
        chosen: list[Node] = []
        if len(ring) <= 3 * count:
            some: Iterable[bytes] = rng.sample(ring, len(ring))
        else:
            some = (ring[int(rng.random() * len(ring))] for _ in range(4 * count))
        for key in some:
            node = nodes.get(key)
            if node is None or key == exclude or node in chosen:
                continue
            if node.state == ALIVE or (
                dead_since is not None
                and (node.state == SUSPECT or (node.state == DEAD and node.since > dead_since))
            ):
                chosen.append(node)
                if len(chosen) == count:
                    break
        return chosen
