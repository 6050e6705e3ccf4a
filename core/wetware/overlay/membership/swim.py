"""Who is in the cluster, and alive: SWIM with Lifeguard's extensions, without I/O.

A `Swim` is driven from outside: `receive`, `peer_up`, `peer_down`, `tick` at the time that `due`
names. It calls `send` with frames for other members. Clock, randomness, keys and the judgement of
certificates are passed in, so that a test runs a thousand of them in one thread and gets the same
result twice. `service.py` drives it over real streams.

Every node probes one other each second, in shuffled rounds; one that does not answer is probed
through others, then suspected, and dead when the suspicion outlasts its timeout (formulas:
`MembershipConfig`). What differs from memberlist:

- Connections are authenticated, and a node's record is signed by itself. So nobody can announce
  another node, let it leave, or raise its incarnation.
- A suspicion can be claimed by any member. It never kills at once: a node that was heard a moment
  ago is probed instead, and even a claim that a node is dead leaves it the shortest timeout to
  refute. What a lying member gains is that others must refute, at a bounded rate.
- A node that is heard is not suspected, and is told at once if it was.
- Rumours announce versions; who lacks one asks for it, and asks another if the first stays silent.

Sources: Das, Gupta, Motivala, "SWIM" (2002); Dadgar, Phillips, Currey, "Lifeguard: Local Health
Awareness for More Accurate Failure Detection" (2017); hashicorp/memberlist.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from wetware.base.bounds import TokenBucket
from wetware.errors import WetwareError
from wetware.overlay.membership import wire
from wetware.overlay.membership.record import (
    INCARNATION_MAX,
    REVISION_MAX,
    Forged,
    Malformed,
    Record,
    key_of,
    peer_of,
)
from wetware.overlay.membership.rumours import CLAIM, ENTRY, FACT, Rumours
from wetware.overlay.membership.wire import Frame, Kind

if TYPE_CHECKING:
    import random

    from wetware.identity import PeerId
    from wetware.overlay.membership.config import MembershipConfig

REFUSED_MAX: Final = 4096
"""Records and facts that were refused, remembered so that they are not fetched again and again."""
REFUSED_S: Final = 60.0
ALTERNATES_MAX: Final = 3
"""Others that announced a version too, and are asked if the first does not answer."""
SOURCE_IDLE_S: Final = 60.0
"""A peer's allowances are full again long before; what is known of it is forgotten then."""
DOUBTS_MAX: Final = 8
"""Accusers of a node that are remembered while it is not suspected; a few confirm a suspicion."""
REAP_S: Final = 60.0
FORGERY_COST: Final = 64
"""Records that a forged one counts for: an honest member passes on only what it verified."""
LOAD_CHANGE_MIN: Final = 0.1
"""Load, per CPU, and memory, as a fraction: smaller changes are not worth a rumour."""
RTT_USABLE_S: Final = 1.0  # the clock of a peer is known to half a round trip
_RTT_WEIGHT: Final = 0.25
_LOAD_FIELDS: Final = frozenset(("load", "memory_bytes"))
_FIELDS: Final = (
    "addrs", "host", "name", "labels", "version", "services", "load", "memory_bytes", "chain",
)  # fmt: skip
_FRAME_ROOM: Final = 256  # what a frame holds beside its packed list


class State(StrEnum):
    """What this node believes of another."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


_STATES: Final = (State.ALIVE, State.SUSPECT, State.DEAD, State.LEFT)  # as on the wire
ALIVE, SUSPECT, DEAD, GONE = wire.ALIVE, wire.SUSPECT, wire.DEAD, wire.LEFT


class ChangeKind(StrEnum):
    """What happened to a member.

    JOINED: it is new. UPDATED: a newer record. SUSPECTED, DIED, LEFT: as the state. ALIVE: back
    from any of these. REMOVED: forgotten, after its retention or because it was evicted. DUPLICATE:
    two processes use one key, this node's or the member's; told each time that the other is heard
    of, and the member is the other, as it describes itself.
    """

    JOINED = "joined"
    UPDATED = "updated"
    SUSPECTED = "suspected"
    ALIVE = "alive"
    DIED = "died"
    LEFT = "left"
    REMOVED = "removed"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of another node, at one moment.

    Attributes:
        record: Its newest description.
        state: What this node believes.
        since: Monotonic time at which it began to.
        labels: The node's, with those of its certificate, which win.
        rtt_s: Round trip of probes, smoothed; None before the first.
        clock_offset_s: Its clock minus this node's; None if not measured.
    """

    record: Record
    state: State
    since: float
    labels: Mapping[str, str]
    rtt_s: float | None
    clock_offset_s: float | None

    @property
    def peer(self) -> PeerId:
        return self.record.peer


@dataclass(frozen=True, slots=True)
class Change:
    """Something happened to a member; `before` is its state until then, None if it was unknown."""

    kind: ChangeKind
    member: Known
    before: State | None


_Want = tuple[bytes, int, int]
"""A node and the version of its record that was announced; (digest, -1, 0) for a fact."""
_FACT: Final = -1


@dataclass(slots=True)
class _Source:
    """What this node knows of a peer as a sender, member or not yet."""

    key: bytes
    frames: TokenBucket
    records: TokenBucket
    claims: TokenBucket
    seen_at: float
    connected: bool = False
    synced_at: float = -math.inf
    sync_since: float | None = None  # since when one is planned
    told_at: float = -math.inf  # what is said of it
    shown_at: float = -math.inf  # this node's own record
    queue: dict[_Want, None] | None = None  # to be asked for
    asked: dict[_Want, None] | None = None  # in flight
    asked_at: float = 0.0
    silences: int = 0


@dataclass(slots=True)
class _Suspicion:
    start: float
    shortest_s: float
    nodes: int  # alive when it began: the formula's N
    wanted: int
    accusers: set[bytes]
    deadline: float


class _Node:
    """A member, inside."""

    __slots__ = (
        "claims",
        "doubts",
        "entry",
        "heard_at",
        "key",
        "labels",
        "offset_s",
        "past_instance",
        "peer",
        "record",
        "rtt_s",
        "since",
        "state",
        "suspicion",
    )

    def __init__(self, key: bytes, record: Record, labels: Mapping[str, str], now: float) -> None:
        self.key, self.peer, self.record, self.labels = key, record.peer, record, labels
        self.state = ALIVE
        self.since = now
        self.heard_at = -math.inf
        # Who accused it since it was heard last, and was doubted; at most DOUBTS_MAX.
        self.doubts: set[bytes] = set()
        self.claims: list[bytes] = []  # accusers whose claims are passed on; a few, see _suspect
        self.rtt_s: float | None = None
        self.offset_s: float | None = None
        self.past_instance = b""  # the process before this one
        self.suspicion: _Suspicion | None = None
        self.entry = _entry(key, record.incarnation, record.revision, ALIVE)

    def snapshot(self) -> Known:
        return Known(
            self.record, _STATES[self.state], self.since, self.labels, self.rtt_s, self.offset_s
        )


@dataclass(slots=True, eq=False)
class _Probe:
    seq: int
    key: bytes
    started: float
    relays: set[bytes] = field(default_factory=set)  # asked, and silent so far
    nacks_due: int = 0
    unreachable: bool = False
    indirect: bool = False


@dataclass(slots=True, eq=False)
class _Relay:
    source: bytes
    source_seq: int
    key: bytes
    settled: bool = False  # answered, one way or the other


@lru_cache(maxsize=16_384)
def _entry(key: bytes, incarnation: int, revision: int, state: int) -> bytes:
    return wire.ENTRY.pack(key, incarnation, revision, state)


def middle(offsets: Iterable[float]) -> float | None:
    """How far the clocks of others are ahead of this one, in the median, s; None of nobody's.

    Of an even number it is the one of the two in the middle that is nearer to this clock, which
    counts too: where one of three clocks is wrong, the other two say which.
    """
    ordered = sorted(offsets)
    if not ordered:
        return None
    half = len(ordered) // 2
    return min(ordered[~half], ordered[half], key=abs)


def _digest(fact: bytes) -> bytes:
    return hashlib.sha256(fact).digest()[: wire.DIGEST_BYTES]


class Swim:
    """The membership of one node.

    Args:
        record: Its own first record.
        config: Timings and bounds.
        sign: Makes its next one; gets every field of `Record.sign` by keyword.
        send: Gets a frame for a peer. Never raises and never calls back at once.
        accept: Judges the certificate in a record whose signature holds, and returns the
            certificate's labels; raises WetwareError to refuse. Called once for each newer record.
        facts: The signed statements that are known here: digest (16 bytes of SHA-256) → encoded.
        adopt: Takes a fact; True if it was new; raises WetwareError if it does not hold.
        now: Monotonic seconds.
        unix_ms: Unix time.
        rng: All choices come from it.
        on_change: Gets every change of the table.
        on_old: Gets records that are too old to be believed unless their author says the same.
        parse: Reads a record; a simulation passes one that remembers.
        verify: Checks its signature; raises Forged.

    Attributes:
        counters: How often what tests and benchmarks ask for has happened.
        record: Its own current record.
    """

    def __init__(
        self,
        record: Record,
        *,
        config: MembershipConfig,
        sign: Callable[..., Record],
        send: Callable[[PeerId, bytes], None],
        accept: Callable[[Record], Mapping[str, str]],
        facts: Callable[[], Mapping[bytes, bytes]],
        adopt: Callable[[bytes], bool],
        now: Callable[[], float],
        unix_ms: Callable[[], int],
        rng: random.Random,
        on_change: Callable[[Change], None],
        on_old: Callable[[Record], None] = lambda _: None,
        parse: Callable[[bytes], Record] = Record.parse,
        verify: Callable[[Record], None] = Record.verify,
    ) -> None:
        self.record = record
        self.counters: Counter[str] = Counter()
        self._config, self._rng = config, rng
        self._sign, self._send, self._accept = sign, send, accept
        self._facts, self._adopt = facts, adopt
        self._now, self._unix_ms = now, unix_ms
        self._on_change, self._on_old = on_change, on_old
        self._parse, self._verify = parse, verify
        self._key = key_of(record.peer)
        self._born_ms = record.issued_ms
        self._nodes: dict[bytes, _Node] = {}
        self._size = 1  # alive and suspected, with this node
        self._sorted: list[bytes] | None = None
        self._ring: list[bytes] = []
        self._ring_at = 0
        self._sources: dict[bytes, _Source] = {}
        self._asking: dict[bytes, _Source] = {}  # have something to be asked for
        self._pending: dict[_Want, list[bytes]] = {}  # who announced it; the first is asked
        self._refused: OrderedDict[_Want, float] = OrderedDict()
        self._rumours = Rumours()
        self._gossip_planned = False
        self._probes: dict[int, _Probe] = {}
        self._probing: dict[bytes, _Probe] = {}
        self._relays: dict[int, _Relay] = {}
        self._seq = rng.getrandbits(31)
        self._health = 0
        self._left = False
        t = now()
        self._refutes = TokenBucket(config.refutes_per_s, config.refutes_burst, now)
        self._refute_planned = False
        self._changed: dict[str, Any] = {}
        self._published_at = t
        self._publish_at: float | None = None
        self._timers: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._timer_count = 0
        self._after(rng.random() * config.probe_s, self._probe_next)
        self._after(rng.random() * config.sync_s, self._sync_next)
        self._after(REAP_S, self._reap)
        self._after(self._refresh_s(), self._refresh)
        self._announce_self()

    # --- what is known ----------------------------------------------------------------------------

    @property
    def due(self) -> float:
        """When `tick` is to be called. Every other call may make it earlier."""
        return self._timers[0][0] if self._timers else math.inf

    @property
    def local_health(self) -> int:
        """0 when this node answers and is answered in time; up to awareness_max - 1."""
        return self._health

    @property
    def size(self) -> int:
        """Members alive or suspected, this node included."""
        return self._size

    @property
    def clock_offsets_s(self) -> dict[PeerId, float]:
        """The clocks of living members minus this node's, of those that were measured."""
        return {
            node.peer: node.offset_s
            for node in self._nodes.values()
            if node.offset_s is not None and node.state <= SUSPECT
        }

    def member(self, peer: PeerId) -> Known | None:
        node = self._find(peer)
        return None if node is None else node.snapshot()

    def members(self) -> dict[PeerId, Known]:
        return {node.peer: node.snapshot() for node in self._nodes.values()}

    def _find(self, peer: PeerId) -> _Node | None:
        try:
            return self._nodes.get(key_of(peer))
        except Malformed:  # a foreign libp2p peer: certified, maybe, but it has no record
            return None

    # --- what happens -----------------------------------------------------------------------------

    def tick(self) -> float:
        """Do what is due; returns when to call again."""
        now = self._now()
        if not self._timers:
            return math.inf
        if now - self._timers[0][0] > self._config.away_s:
            self._was_away(now, now - self._timers[0][0])
        while self._timers and self._timers[0][0] <= now:
            _, _, callback, argument = heapq.heappop(self._timers)
            callback(argument)
        return self.due

    def receive(self, peer: PeerId, frame: bytes) -> None:
        """Take a frame from an authenticated, admitted peer.

        Raises Malformed: the peer does not keep to the protocol; nothing of the frame was used.
        """
        key = key_of(peer)
        now = self._now()
        config = self._config
        source = self._source(key, now)
        cost = 1 + (len(frame) >> 10)
        if not source.frames.take(cost):
            self.counters["flooded"] += 1
            return
        parsed = wire.decode(
            frame, bytes_max=config.frame_bytes_max, fact_bytes_max=config.fact_bytes_max
        )
        records = [
            self._parse(record) for record in parsed.records[: self._parses(source, now, parsed)]
        ]
        if key == self._key:
            return
        node = self._nodes.get(key)
        if node is not None:
            self._heard(node, now)
        elif parsed.kind is not Kind.HAVE:
            self._want(source, (key, 0, 0))
        match parsed.kind:
            case Kind.PING:
                fields = {"k": 2, "n": parsed.seq, "u": self._unix_ms()}
                self._post(key, fields, config.piggyback_bytes_max)
            case Kind.ACK:
                self._acked(source, parsed, now)
            case Kind.NACK:
                self._nacked(source, parsed)
            case Kind.PING_REQ:
                self._relay(source, parsed)
            case Kind.SYNC:
                self._synced(source, parsed, now)
            case Kind.WANT:
                self._serve(source, parsed, now)
            case Kind.HAVE:
                self._received(source, parsed, records, now)
        if self._left:
            return
        nodes, has_routine = self._nodes, self._rumours.has_routine
        for about, incarnation, revision, state in parsed.entries:
            if not state and (known := nodes.get(about)) is not None:
                record = known.record  # nearly always: nothing new, so no more than a glance
                if incarnation == record.incarnation and revision == record.revision:
                    if has_routine:
                        self._rumours.came_back(ENTRY, about, known.entry)
                    continue
            self._entry(source, about, incarnation, revision, state, now)
        for target, incarnation, accuser, state in parsed.claims:
            self._claim(source, target, incarnation, accuser, state, now)
        if parsed.facts and not (parsed.kind is Kind.SYNC and parsed.covers_facts):
            self._want_facts(source, parsed.facts)
        if self._asking:
            self._ask_all(now)

    def peer_up(self, peer: PeerId) -> None:
        """A connection to a member came up."""
        if self._left or peer == self.record.peer:
            return
        now = self._now()
        try:
            source = self._source(key_of(peer), now)
        except Malformed:
            return
        source.connected = True
        if source.key not in self._nodes:  # nothing is known of its clock either
            self._want(source, (source.key, 0, 0))
            self._ask_all(now)
        # Both ends hear of the connection; one push-pull serves both, so the smaller key begins.
        wait = 0.0 if self._key < source.key else 2 * self._config.probe_timeout_s
        self._plan_sync(source, max(now + wait, source.synced_at + self._config.sync_peer_s_min))

    def peer_down(self, peer: PeerId) -> None:
        """The last connection to a member went."""
        try:
            source = self._sources.get(key_of(peer))
        except Malformed:
            return
        if source is not None:
            source.connected = False
        self.probe(peer)

    def unreachable(self, peer: PeerId) -> None:
        """A dial or a send to a member failed."""
        try:
            key = key_of(peer)
        except Malformed:
            return
        probe = self._probing.get(key)
        if probe is not None and not probe.unreachable:
            probe.unreachable = True
            if not probe.indirect:
                self._probe_indirectly(probe)
        for probe in [p for p in self._probes.values() if key in p.relays]:
            probe.relays.discard(key)  # that says nothing of this node's own health
            probe.nacks_due -= 1
            self._probe_maybe_over(probe)
        for seq, relay in list(self._relays.items()):
            if relay.key == key:
                self._nack(relay)
                self._relays.pop(seq, None)
        if (source := self._sources.get(key)) is not None and source.asked:
            self._fetch_failed(source)

    def heard(self, peer: PeerId) -> None:
        """A member sent something, authenticated, on whatever stream: it lives."""
        if (node := self._find(peer)) is not None:
            self._heard(node, self._now())

    def probe(self, peer: PeerId) -> None:
        """Probe a member now, out of turn."""
        if (node := self._find(peer)) is not None:
            self._probe_now(node)

    def update(self, **fields: Any) -> None:
        """Describe this node anew: any of the fields of a record that the node chooses.

        Load and memory are published at leisure, everything else at once.
        """
        if unknown := fields.keys() - set(_FIELDS):
            raise TypeError(f"no such fields of a record: {', '.join(sorted(unknown))}")
        for name in ("addrs", "services"):
            if name in fields:
                fields[name] = tuple(fields[name])
        for name, value in fields.items():
            if getattr(self.record, name) == value:
                self._changed.pop(name, None)
            else:
                self._changed[name] = value
        if not self._changed or self._left:
            return
        if self._changed.keys() <= _LOAD_FIELDS:
            if self._load_differs():
                self._plan_publish(self._published_at + self._config.load_period_s(self._size))
        else:
            self._plan_publish(self._published_at + self._config.update_s_min)

    def met(self, record: Record) -> None:
        """A member says that a process with this node's key lives, and has just signed this.

        Raises Forged.
        """
        record.verify()
        if record.peer == self.record.peer:
            self._other_self(record)

    def add_fact(self, fact: bytes) -> None:
        """A fact became known here: tell the others."""
        digest = _digest(fact)
        self._rumours.add(FACT, digest, digest)
        self._plan_gossip()

    def evict(self, peer: PeerId) -> None:
        if (node := self._find(peer)) is not None:
            self._remove(node)

    def leave(self) -> None:
        """Say farewell, and do nothing from then on but answer."""
        if self._left:
            return
        self._publish(left=True)
        self._left = True
        fields = {"k": int(Kind.HAVE), "r": [self.record.encoded], "z": True}
        nodes = [node for node in self._nodes.values() if node.state in (ALIVE, SUSPECT)]
        self._rng.shuffle(nodes)
        nodes.sort(key=lambda node: not self._is_connected(node.key))  # no time to dial
        for node in nodes[: self._config.farewells]:
            self._post(node.key, fields)
        self._timers.clear()
        self._probes.clear()
        self._probing.clear()
        self._relays.clear()

    # --- probes -----------------------------------------------------------------------------------

    def _scaled(self, seconds: float) -> float:
        return seconds * (1 + self._health)

    def _healthier(self, delta: int) -> None:
        """Negative is better, as in the paper."""
        self._health = min(self._config.awareness_max - 1, max(0, self._health + delta))

    def _was_away(self, now: float, late_s: float) -> None:
        """This process stood still: what others seem not to have done, they may have done."""
        self.counters["away"] += 1
        self._healthier(1)
        self._probes.clear()
        self._probing.clear()
        self._relays.clear()
        for node in self._nodes.values():
            if (suspicion := node.suspicion) is not None:
                suspicion.start += late_s
                suspicion.deadline += late_s
                self._at(suspicion.deadline, self._suspicion_over, node)

    def _probe_next(self, _: None) -> None:
        """One of this round; a round ends with a new order."""
        self._after(self._scaled(self._config.probe_s), self._probe_next)
        for _attempt in range(len(self._ring) + 1):
            if self._ring_at >= len(self._ring):
                self._ring = list(self._nodes)
                self._rng.shuffle(self._ring)
                self._ring_at = 0
                if not self._ring:
                    return
            node = self._nodes.get(self._ring[self._ring_at])
            self._ring_at += 1
            if node is not None and node.state <= SUSPECT:
                self._probe_now(node, in_turn=True)
                return

    def _probe_now(self, node: _Node, *, in_turn: bool = False) -> None:
        if self._left or node.state > SUSPECT or node.key in self._probing:
            return
        if not in_turn and len(self._probes) >= self._config.probes_max:
            return
        self.counters["probes"] += 1
        probe = _Probe(self._next_seq(), node.key, self._now())
        self._probes[probe.seq] = self._probing[node.key] = probe
        fields: dict[str, Any] = {"k": 1, "n": probe.seq}
        if node.state == SUSPECT:  # let it know, so that it refutes
            fields["c"] = wire.CLAIM.pack(node.key, node.record.incarnation, self._key, SUSPECT)
        self._after(self._scaled(self._config.probe_timeout_s), self._probe_indirectly, probe)
        self._after(self._scaled(self._config.probe_s), self._probe_over, probe)
        self._post(node.key, fields, self._config.piggyback_bytes_max)

    def _next_seq(self) -> int:
        self._seq = (self._seq + 1) & wire.SEQ_MAX
        return self._seq

    def _probe_indirectly(self, probe: _Probe) -> None:
        if self._probes.get(probe.seq) is not probe or probe.indirect:
            return
        probe.indirect = True
        fields = {"k": 4, "n": probe.seq, "i": probe.key}
        for node in self._sample(self._config.indirect_probes, exclude=probe.key, alive=True):
            probe.relays.add(node.key)
            self._post(node.key, fields, self._config.piggyback_bytes_max)
        probe.nacks_due = len(probe.relays)
        self._probe_maybe_over(probe)

    def _probe_maybe_over(self, probe: _Probe) -> None:
        """No need to wait if everybody has said that there is no way."""
        if probe.indirect and probe.unreachable and not probe.relays:
            self._probe_over(probe)

    def _probe_over(self, probe: _Probe) -> None:
        """The time is over, without an answer to the probe."""
        if self._probes.get(probe.seq) is not probe:
            return
        self._forget_probe(probe)
        node = self._nodes.get(probe.key)
        if node is None or node.state > SUSPECT:
            return
        if node.heard_at > probe.started:  # it spoke, so it lives
            self._healthier(-1)
            return
        self.counters["probes_failed"] += 1
        # Relays that did not even say that they got no answer: maybe it is this node's fault.
        self._healthier(len(probe.relays) if probe.nacks_due > 0 else 1)
        self._suspect(node, self._key, SUSPECT, self._now())

    def _forget_probe(self, probe: _Probe) -> None:
        self._probes.pop(probe.seq, None)
        if self._probing.get(probe.key) is probe:
            del self._probing[probe.key]

    def _acked(self, source: _Source, frame: Frame, now: float) -> None:
        probe = self._probes.get(frame.seq)
        if probe is not None and (source.key == probe.key or source.key in probe.relays):
            self._forget_probe(probe)
            self._healthier(-1)
            node = self._nodes.get(probe.key)
            if node is None:
                return
            if source.key == probe.key:
                self._measured(node, frame, now - probe.started)
            else:
                self._heard(node, now)
            return
        relay = self._relays.get(frame.seq)
        if relay is not None and relay.key == source.key:
            del self._relays[frame.seq]
            relay.settled = True
            self._post(relay.source, {"k": 2, "n": relay.source_seq})

    def _measured(self, node: _Node, frame: Frame, rtt_s: float) -> None:
        if node.rtt_s is None:
            node.rtt_s = rtt_s
        else:
            node.rtt_s += _RTT_WEIGHT * (rtt_s - node.rtt_s)
        if frame.unix_ms is not None and rtt_s <= RTT_USABLE_S:
            node.offset_s = (frame.unix_ms - self._unix_ms()) / 1000 + rtt_s / 2

    def _nacked(self, source: _Source, frame: Frame) -> None:
        probe = self._probes.get(frame.seq)
        if probe is not None and source.key in probe.relays:
            probe.relays.discard(source.key)
            self._probe_maybe_over(probe)

    def _relay(self, source: _Source, frame: Frame) -> None:
        relay = _Relay(source.key, frame.seq, frame.node)
        if frame.node == self._key:
            self._post(source.key, {"k": 2, "n": frame.seq})
        elif frame.node not in self._nodes or len(self._relays) >= self._config.relays_max:
            self._nack(relay)
        else:
            seq = self._next_seq()
            self._relays[seq] = relay
            # Before the asker's own time is over; a late answer is still passed on.
            self._after(0.8 * self._config.probe_timeout_s, self._nack, relay)
            self._after(self._config.probe_s, self._relay_over, seq)
            self._post(frame.node, {"k": 1, "n": seq}, self._config.piggyback_bytes_max)

    def _nack(self, relay: _Relay) -> None:
        if not relay.settled and not self._left:
            relay.settled = True
            self._post(relay.source, {"k": 3, "n": relay.source_seq})

    def _relay_over(self, seq: int) -> None:
        self._relays.pop(seq, None)

    def _sample(self, count: int, *, exclude: bytes = b"", alive: bool = False) -> list[_Node]:
        """Random members: living ones, and the newly dead too unless `alive`."""
        ring, nodes, rng = self._ring, self._nodes, self._rng
        chosen: list[_Node] = []
        if len(ring) <= 3 * count:
            some: Iterable[bytes] = rng.sample(ring, len(ring))
        else:
            some = (ring[int(rng.random() * len(ring))] for _ in range(4 * count))
        horizon = self._now() - self._config.gossip_to_dead_s
        for key in some:
            node = nodes.get(key)
            if node is None or key == exclude or node in chosen:
                continue
            if node.state == ALIVE or (
                not alive
                and (node.state == SUSPECT or (node.state == DEAD and node.since > horizon))
            ):
                chosen.append(node)
                if len(chosen) == count:
                    break
        return chosen

    # --- suspicion --------------------------------------------------------------------------------

    def _heard(self, node: _Node, now: float) -> None:
        node.heard_at = now
        if node.doubts:
            node.doubts = set()
        if node.state == SUSPECT:
            self._tell(node, now)
            self._drop_claims(node)
            self._set_state(node, ALIVE, now)
            self._emit(ChangeKind.ALIVE, node, State.SUSPECT)
        elif node.state == DEAD:
            self._tell(node, now)

    def _tell(self, node: _Node, now: float) -> None:
        """A node that lives is told what is said of it, so that it refutes."""
        source = self._source(node.key, now)
        if now - source.told_at >= self._config.probe_s:
            source.told_at = now
            claim = wire.CLAIM.pack(node.key, node.record.incarnation, self._key, node.state)
            self._post(node.key, {"k": 5, "c": claim})

    def _claim(
        self, source: _Source, key: bytes, incarnation: int, accuser: bytes, state: int, now: float
    ) -> None:
        """Somebody says that a node does not answer, or is dead."""
        if not source.claims.take():
            self.counters["limited"] += 1
            return
        if key == self._key:
            self._accused(source, incarnation, now)
            return
        node = self._nodes.get(key)
        if node is None or node.state > SUSPECT or incarnation < node.record.incarnation:
            return
        if incarnation > node.record.incarnation:
            self._want(source, (key, incarnation, 0))
            return
        if accuser == key or (accuser != self._key and accuser not in self._nodes):
            accuser = source.key
        if node.state == ALIVE and now - node.heard_at < self._scaled(self._config.probe_s):
            self.counters["doubted"] += 1
            if len(node.doubts) < DOUBTS_MAX:
                node.doubts.add(accuser)
            self._probe_now(node)
            return
        self._suspect(node, accuser, state, now)

    def _suspect(self, node: _Node, accuser: bytes, state: int, now: float) -> None:
        """Begin to suspect, or confirm the suspicion by another accuser."""
        suspicion = node.suspicion
        config = self._config
        if suspicion is None:
            self.counters["suspicions"] += 1
            shortest, timeout, wanted = config.suspicion_s(self._size)
            # When a process ends, all see it at once, and each tells the others while they still
            # doubt it: those claims confirm the suspicion that this node now has itself.
            accusers = {accuser, *node.doubts}
            node.doubts = set()
            if len(accusers) > 1:
                confirmations = min(len(accusers) - 1, wanted)
                _, timeout, _ = config.suspicion_s(self._size, confirmations)
            if state == DEAD:
                timeout = shortest
            suspicion = _Suspicion(now, shortest, self._size, wanted, accusers, now + timeout)
            self._set_state(node, SUSPECT, now)
            node.suspicion = suspicion
            self._at(suspicion.deadline, self._suspicion_over, node)
            self._rumour_claim(node, accuser)
            self._emit(ChangeKind.SUSPECTED, node, State.ALIVE)
            return
        if state == DEAD:
            deadline = suspicion.start + suspicion.shortest_s
        elif accuser in suspicion.accusers or len(suspicion.accusers) > suspicion.wanted:
            return
        else:
            suspicion.accusers.add(accuser)
            _, timeout, _ = config.suspicion_s(suspicion.nodes, len(suspicion.accusers) - 1)
            deadline = suspicion.start + timeout
            self._rumour_claim(node, accuser)
        if deadline < suspicion.deadline:
            suspicion.deadline = deadline
            self._at(max(now, deadline), self._suspicion_over, node)

    def _suspicion_over(self, node: _Node) -> None:
        now = self._now()
        if (
            node.suspicion is None
            or now < node.suspicion.deadline
            or self._nodes.get(node.key) is not node
        ):
            return
        self.counters["deaths"] += 1
        self._set_state(node, DEAD, now)
        self._rumour_claim(node, self._key)
        self._emit(ChangeKind.DIED, node, State.SUSPECT)

    def _rumour_claim(self, node: _Node, accuser: bytes) -> None:
        # Each accuser's claim goes its own way: were the last to replace the others, nobody would
        # hear of enough of them to confirm a suspicion. A death replaces them all.
        if node.state != SUSPECT:
            self._drop_claims(node)
        claim = wire.CLAIM.pack(node.key, node.record.incarnation, accuser, node.state)
        self._rumours.add(CLAIM, node.key + accuser, claim)
        if accuser not in node.claims:
            node.claims.append(accuser)
        self._plan_gossip()

    def _drop_claims(self, node: _Node) -> None:
        for accuser in node.claims:
            self._rumours.drop(CLAIM, node.key + accuser)
        node.claims.clear()

    def _accused(self, source: _Source, incarnation: int, now: float) -> None:
        """This node itself is said not to answer."""
        if incarnation > self.record.incarnation:
            self._want(source, (self._key, incarnation, 0))
        elif incarnation == self.record.incarnation:
            self._refute(incarnation)
            if self.record.incarnation > incarnation:
                self._show_self(source, now)
        else:
            self._show_self(source, now)

    def _show_self(self, source: _Source, now: float) -> None:
        if now - source.shown_at >= self._config.gossip_s:
            source.shown_at = now
            self._post(source.key, {"k": int(Kind.HAVE), "r": [self.record.encoded]})

    def _refute(self, incarnation: int) -> None:
        """Say more loudly than any claim so far that this node lives."""
        if self._left or incarnation < self.record.incarnation:
            return
        config = self._config
        if not self._refutes.take():
            if not self._refute_planned:
                self._refute_planned = True
                self._after(1 / config.refutes_per_s, self._refute_later, incarnation)
            return
        self.counters["refutations"] += 1
        self._healthier(1)
        self._publish(incarnation=min(INCARNATION_MAX, incarnation + 1))

    def _refute_later(self, incarnation: int) -> None:
        self._refute_planned = False
        self._refute(incarnation)

    # --- the table --------------------------------------------------------------------------------

    def _set_state(self, node: _Node, state: int, now: float) -> None:
        self._size += (state <= SUSPECT) - (node.state <= SUSPECT)
        node.state, node.since = state, now
        if state != SUSPECT:
            node.suspicion = None
        node.entry = _entry(node.key, node.record.incarnation, node.record.revision, state)

    def _emit(self, kind: ChangeKind, node: _Node, before: State | None) -> None:
        self._on_change(Change(kind, node.snapshot(), before))

    def _install(self, key: bytes, record: Record, labels: Mapping[str, str], now: float) -> bool:
        """Take a newer record into the table."""
        node = self._nodes.get(key)
        if node is None:
            if len(self._nodes) >= self._config.members_max and not self._make_room():
                self.counters["table_full"] += 1
                return False
            node = self._nodes[key] = _Node(key, record, labels, now)
            self._sorted = None
            self._ring.insert(int(self._rng.random() * (len(self._ring) + 1)), key)
            self._size += 1
            if record.left:
                self._set_state(node, GONE, now)
            else:
                self._emit(ChangeKind.JOINED, node, None)
            self._rumour_entry(node, urgent=not record.left)
            return True
        before, was = _STATES[node.state], node.record
        node.record, node.labels = record, labels
        if record.instance != was.instance:
            node.offset_s = None  # another process, and maybe another clock
            if record.instance == node.past_instance:  # no restart brings a process back
                self._emit(ChangeKind.DUPLICATE, node, before)
            node.past_instance = was.instance
        if record.left:
            state = GONE
        elif record.incarnation > was.incarnation:
            state = ALIVE
        else:
            state = node.state
        if state != node.state:
            self._drop_claims(node)
            self._set_state(node, state, now)
        else:
            node.entry = _entry(key, record.incarnation, record.revision, state)
        self._rumour_entry(node, urgent=state != ALIVE or not _is_routine(was, record))
        if state == GONE:
            self._emit(ChangeKind.LEFT, node, before)
        elif state == ALIVE and before is not State.ALIVE:
            self._emit(ChangeKind.ALIVE, node, before)
        else:
            self._emit(ChangeKind.UPDATED, node, before)
        return True

    def _make_room(self) -> bool:
        """Forget whoever has been dead for longest."""
        dead = [node for node in self._nodes.values() if node.state > SUSPECT]
        if not dead:
            return False
        self._remove(min(dead, key=lambda node: node.since))
        return True

    def _remove(self, node: _Node) -> None:
        if self._nodes.pop(node.key, None) is None:
            return
        self._sorted = None  # the ring forgets it when its round comes to it
        self._size -= node.state <= SUSPECT
        self._rumours.drop(ENTRY, node.key)
        self._drop_claims(node)
        if (probe := self._probing.get(node.key)) is not None:
            self._forget_probe(probe)
        if len(self._ring) > 2 * len(self._nodes) + 16:
            self._ring = [key for key in self._ring if key in self._nodes]
            self._ring_at = 0
        self._emit(ChangeKind.REMOVED, node, _STATES[node.state])

    def _reap(self, _: None) -> None:
        self._after(REAP_S, self._reap)
        now = self._now()
        horizon = now - self._config.retention_s
        for node in [n for n in self._nodes.values() if n.state > SUSPECT and n.since < horizon]:
            self._remove(node)
        for key, source in list(self._sources.items()):
            if (
                source.seen_at < now - SOURCE_IDLE_S
                and not source.connected
                and not source.asked
                and not source.queue
                and source.sync_since is None
            ):
                del self._sources[key]

    def _rumour_entry(self, node: _Node, *, urgent: bool) -> None:
        # Without the state: who is suspected or dead is claimed, not announced.
        state = GONE if node.state == GONE else ALIVE
        record = node.record
        entry = _entry(node.key, record.incarnation, record.revision, state)
        self._rumours.add(ENTRY, node.key, entry, urgent=urgent)
        if urgent:
            self._plan_gossip()

    # --- this node's own record -------------------------------------------------------------------

    def _announce_self(self, *, urgent: bool = True) -> None:
        record = self.record
        state = GONE if record.left else ALIVE
        entry = _entry(self._key, record.incarnation, record.revision, state)
        self._rumours.add(ENTRY, self._key, entry, urgent=urgent)
        if urgent:
            self._plan_gossip()

    def _publish(self, *, incarnation: int | None = None, left: bool = False) -> None:
        """Sign the record anew, with what has changed."""
        was = self.record
        fields = {name: getattr(was, name) for name in _FIELDS} | self._changed
        self._changed.clear()
        if incarnation is None and was.revision == REVISION_MAX:
            incarnation = was.incarnation + 1
        self.record = self._sign(
            incarnation=was.incarnation if incarnation is None else incarnation,
            revision=was.revision + 1 if incarnation is None else 0,
            instance=was.instance,
            issued_ms=self._unix_ms(),
            left=left,
            **fields,
        )
        self._published_at = self._now()
        self._publish_at = None
        self._announce_self(urgent=left or not _is_routine(was, self.record))

    def _plan_publish(self, when: float) -> None:
        now = self._now()
        if when <= now:
            self._publish()
        elif self._publish_at is None or when < self._publish_at:
            self._publish_at = when
            self._at(when, self._publish_planned, when)

    def _publish_planned(self, when: float) -> None:
        if self._publish_at == when:
            self._publish_at = None
            if self._changed.keys() - _LOAD_FIELDS or self._load_differs():
                self._publish()

    def _load_differs(self) -> bool:
        load = self._changed.get("load", self.record.load)
        memory, was = self._changed.get("memory_bytes", 0), self.record.memory_bytes
        return abs(load - self.record.load) >= LOAD_CHANGE_MIN or (
            "memory_bytes" in self._changed and abs(memory - was) >= LOAD_CHANGE_MIN * max(was, 1)
        )

    def _refresh_s(self) -> float:
        return self._config.record_age_s_max / 3 * (0.8 + 0.2 * self._rng.random())

    def _refresh(self, _: None) -> None:
        """Keep the record young enough for nodes that join."""
        wait = self._refresh_s()
        old_s = self._now() - self._published_at
        if old_s >= 0.7 * wait:
            self._publish()
            self._after(wait, self._refresh)
        else:
            self._after(wait - old_s, self._refresh)

    # --- gossip -----------------------------------------------------------------------------------

    def _plan_gossip(self) -> None:
        if not self._gossip_planned and not self._left:
            self._gossip_planned = True
            self._after(self._rng.random() * self._config.gossip_s, self._gossip)

    def _gossip(self, _: None) -> None:
        self._gossip_planned = False
        if not self._rumours.is_urgent or not self._nodes:
            return  # what is not urgent waits for a probe; a newcomer begins with a push-pull
        for node in self._sample(self._config.gossip_nodes):
            if not self._post(node.key, {"k": 5}, self._config.gossip_bytes_max):
                break
        self._gossip_planned = True
        self._after(self._config.gossip_s, self._gossip)

    def _post(self, key: bytes, fields: dict[str, Any], rumours_bytes_max: int = 0) -> bool:
        """Send a frame, with rumours if there is room for them; gossip only if there are any."""
        if rumours_bytes_max and len(self._rumours):
            limit = self._config.transmissions(self._size)
            entries, claims, facts = self._rumours.take(rumours_bytes_max, limit)
            if entries:
                fields["d"] = entries
            if claims:
                fields["c"] = fields.get("c", b"") + claims
            if facts:
                fields["f"] = facts
        if len(fields) == 1:
            return False
        frame = wire.encode(fields)
        self.counters["frames_out"] += 1
        self.counters["bytes_out"] += len(frame)
        self._send(peer_of(key), frame)
        return True

    def _entry(
        self, source: _Source, key: bytes, incarnation: int, revision: int, state: int, now: float
    ) -> None:
        """Somebody knows a version of a node's record, and maybe doubts that it lives."""
        if key == self._key:
            if (incarnation, revision) > self.record.order:
                self._want(source, (key, incarnation, revision))
            elif state in (SUSPECT, DEAD):
                self._accused(source, incarnation, now)
            return
        node = self._nodes.get(key)
        if node is None:
            if state != DEAD:  # one that is already dead is nothing to know
                self._want(source, (key, incarnation, revision))
            return
        record = node.record
        known = record.incarnation
        if incarnation > known or (incarnation == known and revision > record.revision):
            self._want(source, (key, incarnation, revision))
        elif state in (SUSPECT, DEAD) and incarnation == known and state != node.state:
            # (Hearsay is no confirmation: who accuses whom is in the claims.)
            self._claim(source, key, incarnation, source.key, state, now)

    # --- push-pull --------------------------------------------------------------------------------

    def _is_connected(self, key: bytes) -> bool:
        source = self._sources.get(key)
        return source is not None and source.connected

    def _sync_next(self, _: None) -> None:
        self._after(self._config.sync_period_s(self._size), self._sync_next)
        for node in self._sample(1, alive=True):
            self._sync(self._source(node.key, self._now()))

    def _plan_sync(self, source: _Source, when: float) -> None:
        if source.sync_since is None:
            source.sync_since = self._now()
            if when <= source.sync_since:
                self._sync_planned(source)
            else:
                self._at(when, self._sync_planned, source)

    def _sync_planned(self, source: _Source) -> None:
        since, source.sync_since = source.sync_since, None
        if since is not None and source.connected and source.synced_at < since and not self._left:
            self._sync(source)

    def _sync(self, source: _Source) -> None:
        """Tell a peer all versions that are known here; it answers with what it knows better."""
        source.synced_at = self._now()
        keys = self._keys()
        per_frame = (self._config.frame_bytes_max - _FRAME_ROOM) // wire.ENTRY.size
        for low, high, chunk in _ranges(keys, per_frame):
            entries = b"".join([self._entry_of(key) for key in chunk])
            self._post(source.key, {"k": 6, "l": low, "h": high, "d": entries})
        digests = sorted(self._facts())[: self._config.facts_max]
        self._post(source.key, {"k": 6, "l": b"", "h": b"", "f": b"".join(digests)})

    def _keys(self) -> list[bytes]:
        """Everybody, this node included, in the order of digests."""
        if self._sorted is None:
            self._sorted = sorted((*self._nodes, self._key))
        return self._sorted

    def _entry_of(self, key: bytes) -> bytes:
        if key == self._key:
            record = self.record
            state = GONE if record.left else ALIVE
            return _entry(key, record.incarnation, record.revision, state)
        return self._nodes[key].entry

    def _synced(self, source: _Source, frame: Frame, now: float) -> None:
        """Offer what the peer lacks; what it knows better is fetched like any other rumour."""
        source.synced_at = now
        if frame.covers_facts:
            facts = self._facts()
            theirs = set(frame.facts)
            self._want_facts(source, frame.facts)
            digests = [digest for digest in facts if digest not in theirs]
            self._offer(source, "f", digests[: self._config.facts_max], now)
            return
        keys = self._keys()
        first = bisect_left(keys, frame.low)
        last = bisect_left(keys, frame.high) if frame.high else len(keys)
        versions = {key: (inc, rev, state) for key, inc, rev, state in frame.entries}
        offers = []
        for key in keys[first:last]:
            theirs_of = versions.get(key)
            entry = self._entry_of(key)
            if theirs_of is None:
                if entry[-1] != DEAD and key != source.key:
                    offers.append(entry)
                continue
            _, incarnation, revision, state = wire.ENTRY.unpack(entry)
            if (incarnation, revision) > theirs_of[:2] or (
                incarnation == theirs_of[0] and state in (SUSPECT, DEAD) and state > theirs_of[2]
            ):
                offers.append(entry)
        self._offer(source, "d", offers, now)

    def _offer(self, source: _Source, name: str, items: Sequence[bytes], now: float) -> None:
        if not items:
            return
        config = self._config
        size = len(items[0])
        if not self._charge(source, size * len(items), now):
            return
        per_frame = (config.frame_bytes_max - _FRAME_ROOM) // size
        for at in range(0, len(items), per_frame):
            self._post(source.key, {"k": 5, name: b"".join(items[at : at + per_frame])})

    def _charge(self, source: _Source, size: int, now: float) -> bool:
        """What a peer makes this node send counts as if it had sent it."""
        if source.frames.take(size >> 10):
            return True
        self.counters["limited"] += 1
        return False

    # --- fetching ---------------------------------------------------------------------------------

    def _source(self, key: bytes, now: float) -> _Source:
        source = self._sources.get(key)
        if source is None:
            config = self._config
            source = self._sources[key] = _Source(
                key,
                TokenBucket(config.frames_per_s, config.frames_burst, self._now),
                TokenBucket(config.records_per_s, config.records_burst, self._now),
                TokenBucket(config.claims_per_s, config.claims_burst, self._now),
                now,
            )
        source.seen_at = now
        return source

    def _want(self, source: _Source, want: _Want) -> None:
        """Plan to ask a peer for what it announced, unless somebody else is being asked."""
        if self._left:
            return
        if want in self._refused:
            if self._refused[want] > self._now():
                return
            del self._refused[want]
        others = self._pending.get(want)
        if others is not None:
            if source.key not in others and len(others) <= ALTERNATES_MAX:
                others.append(source.key)
            return
        if source.queue is None:
            source.queue = {}
        if max(len(source.queue), len(self._pending) >> 2) >= self._config.members_max:
            self.counters["limited"] += 1
            return
        self._pending[want] = [source.key]
        source.queue[want] = None
        self._asking[source.key] = source

    def _want_facts(self, source: _Source, digests: Iterable[bytes]) -> None:
        known = self._facts()
        for digest in digests:
            if digest in known:
                self._rumours.came_back(FACT, digest, digest)
            else:
                self._want(source, (digest, _FACT, 0))

    def _ask_all(self, now: float) -> None:
        asking, self._asking = self._asking, {}
        for source in asking.values():
            self._ask(source, now)

    def _ask(self, source: _Source, now: float) -> None:
        if source.asked or not source.queue:
            return
        asked: dict[_Want, None] = {}
        keys: list[bytes] = []
        digests: list[bytes] = []
        while source.queue and len(asked) < self._config.fetch_records_max:
            want = next(iter(source.queue))
            del source.queue[want]
            asked[want] = None
            (digests if want[1] == _FACT else keys).append(want[0])
        source.asked, source.asked_at = asked, now
        fields: dict[str, Any] = {"k": int(Kind.WANT)}
        if keys:
            fields["w"] = b"".join(keys)
        if digests:
            fields["g"] = b"".join(digests)
        self._at(now + self._config.fetch_s, self._fetch_late, (source, asked))
        self._post(source.key, fields)

    def _fetch_late(self, what: tuple[_Source, dict[_Want, None]]) -> None:
        source, asked = what
        if source.asked is asked and asked:
            self._fetch_failed(source)

    def _fetch_failed(self, source: _Source) -> None:
        """A peer does not give what it announced: ask others that announced it too."""
        source.silences += 1
        asked, source.asked = source.asked or {}, None
        if source.silences > 1:  # the rest of what it announced as well
            asked.update(source.queue or {})
            source.queue = None
            source.silences = 0
        now = self._now()
        self._ask_others(source, asked, now)
        self._ask(source, now)
        self._ask_all(now)

    def _ask_others(self, source: _Source, wants: Iterable[_Want], now: float) -> None:
        for want in wants:
            others = self._pending.pop(want, [])
            others = [key for key in others if key != source.key]
            if not others:
                continue
            self._want(self._source(others[0], now), want)
            if want in self._pending:
                self._pending[want].extend(others[1:])

    def _serve(self, source: _Source, frame: Frame, now: float) -> None:
        """Answer a request, in frames that are not too long."""
        room = self._config.frame_bytes_max - _FRAME_ROOM
        facts = self._facts() if frame.fact_wants else {}
        found: list[tuple[str, bytes]] = []
        for key in frame.wants:
            node = self._nodes.get(key)
            if key == self._key:
                found.append(("r", self.record.encoded))
            elif node is not None:
                found.append(("r", node.record.encoded))
        held = (facts.get(digest) for digest in frame.fact_wants)
        found += [("b", fact) for fact in held if fact is not None and len(fact) < room]
        fields: dict[str, Any] = {"k": int(Kind.HAVE), "r": [], "b": []}
        size = 0
        for name, item in found:
            if size + len(item) + 8 > room:
                self._post(source.key, fields)
                fields, size = {"k": int(Kind.HAVE), "r": [], "b": []}, 0
            if not self._charge(source, len(item) + 1023, now):
                break
            fields[name].append(item)
            size += len(item) + 8
        fields["z"] = True
        fields["u"] = self._unix_ms()
        self._post(source.key, fields)

    def _parses(self, source: _Source, now: float, frame: Frame) -> int:
        """How many of a frame's records are looked at."""
        count = len(frame.records)
        if not count:
            return 0
        allowed = 0
        while allowed < count and source.records.take():
            allowed += 1
        self.counters["limited"] += count - allowed
        return allowed

    def _received(
        self, source: _Source, frame: Frame, records: Iterable[Record], now: float
    ) -> None:
        if self._left:
            return
        for record in records:
            self._record(source, record, now)
        node = self._nodes.get(source.key)
        if node is not None and node.offset_s is None and frame.unix_ms is not None:
            # Known to some round trips, until the first probe measures it.
            node.offset_s = (frame.unix_ms - self._unix_ms()) / 1000
        for blob in frame.blobs:
            self._fact(source, blob, now)
        if frame.done and source.asked is not None:
            asked, source.asked = source.asked, None
            source.silences = 0
            self._ask_others(source, [want for want in asked if want in self._pending], now)
            self._ask(source, now)

    def _settle(self, wants: Iterable[_Want]) -> None:
        for want in wants:
            self._pending.pop(want, None)

    def _refuse(self, wants: Iterable[_Want]) -> None:
        until = self._now() + REFUSED_S
        for want in wants:
            self._refused[want] = until
        while len(self._refused) > REFUSED_MAX:
            self._refused.popitem(last=False)

    def _record(self, source: _Source, record: Record, now: float) -> None:
        """Judge a record: whatever is cheap to know first, its signature only if it is newer."""
        key = key_of(record.peer)
        order = record.order
        exact = (key, *order)
        wants = [exact]
        if source.asked is not None and exact not in source.asked:
            wants += [want for want in source.asked if want[0] == key and want[1:] <= order]
        known = self._nodes.get(key)
        if key == self._key:
            newest = self.record.order
        else:
            newest = (-1, 0) if known is None else known.record.order
        if order <= newest or (
            known is not None
            and known.state == GONE
            and record.incarnation == known.record.incarnation
        ):
            self.counters["stale"] += 1
            self._settle(wants)
            return
        try:
            self._verify(record)
        except Forged:
            self.counters["forged"] += 1
            source.records.spend(FORGERY_COST)
            return  # and somebody else is asked
        self._settle(wants)
        if key == self._key:
            self._other_self(record)
            return
        old_s = abs(self._unix_ms() - record.issued_ms) / 1000
        if old_s > self._config.record_age_s_max and key != source.key:
            # A recording; or the author's clock is wrong, or this one. What the author says itself,
            # on a connection of its own, is none: only so both learn how their clocks differ.
            self.counters["too_old"] += 1
            author = self._sources.get(key)
            if author is not None and author.connected:
                self._want(author, exact)
            else:
                self._refuse(wants)
                self._on_old(record)
            return
        try:
            certified = self._accept(record)
        except WetwareError:
            self.counters["refused"] += 1
            self._refuse(wants)
            return
        labels = record.labels
        if certified:
            labels = MappingProxyType({**labels, **certified})
        if self._install(key, record, labels, now):
            if key == source.key:
                self._nodes[key].heard_at = now
        else:
            self._refuse(wants)

    def _other_self(self, record: Record) -> None:
        """A newer record with this node's key: from before its restart, or a second process."""
        if record.instance != self.record.instance:
            if record.issued_ms > self._born_ms:
                other = Known(record, State.ALIVE, self._now(), record.labels, None, None)
                self._on_change(Change(ChangeKind.DUPLICATE, other, None))
            self._refute(record.incarnation)

    def _fact(self, source: _Source, fact: bytes, now: float) -> None:
        digest = _digest(fact)
        want = (digest, _FACT, 0)
        self._pending.pop(want, None)
        if digest in self._facts() or self._refused.get(want, 0.0) > now:
            return
        if not source.records.take():
            self.counters["limited"] += 1
            return
        try:
            is_new = self._adopt(fact)
        except WetwareError:
            self.counters["facts_refused"] += 1
            self._refuse([want])
            return
        if is_new:
            self.add_fact(fact)

    # --- time -------------------------------------------------------------------------------------

    def _at(self, when: float, callback: Callable[[Any], None], argument: Any = None) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, callback, argument))

    def _after(self, seconds: float, callback: Callable[[Any], None], argument: Any = None) -> None:
        self._at(self._now() + seconds, callback, argument)


def _is_routine(was: Record, now: Record) -> bool:
    """Whether nothing changed that anybody waits for: load, memory, the time of the signature."""
    return was.incarnation == now.incarnation and all(
        getattr(was, name) == getattr(now, name) for name in _FIELDS if name not in _LOAD_FIELDS
    )


def _ranges(keys: Sequence[bytes], count: int) -> Iterable[tuple[bytes, bytes, Sequence[bytes]]]:
    """Sorted keys in pieces, each with the range that it covers; together they cover everything."""
    for at in range(0, len(keys), count):
        low = keys[at] if at else b""
        high = keys[at + count] if at + count < len(keys) else b""
        yield low, high, keys[at : at + count]
