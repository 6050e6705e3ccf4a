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

`Swim` judges what comes in: records, claims and facts. Each of its parts holds one idea: `table`,
`own_record`, `probing`, `suspicion`, `awareness`, `sources`, `fetching`, `push_pull`, `gossip`.

Sources: Das, Gupta, Motivala, "SWIM" (2002); Dadgar, Phillips, Currey, "Lifeguard: Local Health
Awareness for More Accurate Failure Detection" (2017); hashicorp/memberlist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import WetwareError
from wetware.overlay.membership import wire
from wetware.overlay.membership.awareness import Awareness
from wetware.overlay.membership.basis import Basis
from wetware.overlay.membership.fetching import Fetching
from wetware.overlay.membership.gossip import Gossip
from wetware.overlay.membership.known import Change, ChangeKind, Known, State
from wetware.overlay.membership.own_record import OwnRecord, is_routine
from wetware.overlay.membership.probing import Probing
from wetware.overlay.membership.push_pull import PushPull
from wetware.overlay.membership.record import Forged, Malformed, Record, key_of
from wetware.overlay.membership.rumours import ENTRY, FACT
from wetware.overlay.membership.sources import FACT as FACT_WANTED
from wetware.overlay.membership.sources import Source, Sources, Want
from wetware.overlay.membership.suspicion import Suspicion
from wetware.overlay.membership.table import STATES, Node, Table, entry_of
from wetware.overlay.membership.timers import Timers
from wetware.overlay.membership.wire import ALIVE, DEAD, LEFT, SUSPECT, Frame, Kind

if TYPE_CHECKING:
    import random

    from wetware.identity import PeerId
    from wetware.overlay.membership.config import MembershipConfig

DOUBTS_MAX: Final = 8
"""Accusers of a node that are remembered while it is not suspected; a few confirm a suspicion."""
REAP_S: Final = 60.0
FORGERY_COST: Final = 64
"""Records that a forged one counts for: an honest member passes on only what it verified."""


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


def _key(peer: PeerId) -> bytes | None:
    """None of a foreign libp2p peer: certified, maybe, but it has no record."""
    try:
        return key_of(peer)
    except Malformed:
        return None


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
        awareness: Its own health.
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
        self._config, self._rng = config, rng
        self._accept, self._facts, self._adopt = accept, facts, adopt
        self._now, self._unix_ms = now, unix_ms
        self._on_change, self._on_old = on_change, on_old
        self._parse, self._verify = parse, verify
        self.counters: Counter[str] = Counter()
        self.awareness = Awareness(config.awareness_max)
        self._key = key_of(record.peer)
        self._timers = timers = Timers(now)
        self._table = Table(self._key, rng)
        self._gossip = Gossip(config, timers, self._table, rng, send, self.counters)
        basis = Basis(
            config, rng, unix_ms, timers, self._table, self._gossip, self.awareness, self.counters
        )
        self._sources = Sources(config, now)
        self._fetching = Fetching(basis, self._sources)
        self._own = OwnRecord(basis, record, sign)
        self._push_pull = PushPull(basis, self._own, facts)
        self._probing = Probing(
            basis, self._key, lambda node: self._suspect(node, self._key, SUSPECT)
        )
        timers.after(rng.random() * config.probe_s, self._probing.next)
        timers.after(rng.random() * config.sync_s, self._sync_next)
        timers.after(REAP_S, self._reap)
        self._own.start()

    # --- what is known ----------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """Its own current record."""
        return self._own.record

    @property
    def due(self) -> float:
        """When `tick` is to be called. Every other call may make it earlier."""
        return self._timers.due

    @property
    def size(self) -> int:
        """Members alive or suspected, this node included."""
        return self._table.size

    @property
    def clock_offsets_s(self) -> dict[PeerId, float]:
        """The clocks of living members minus this node's, of those that were measured."""
        return {
            node.record.peer: node.offset_s
            for node in self._table.nodes.values()
            if node.offset_s is not None and node.lives
        }

    def _find(self, peer: PeerId) -> Node | None:
        return self._table.nodes.get(key) if (key := _key(peer)) else None

    def member(self, peer: PeerId) -> Known | None:
        node = self._find(peer)
        return None if node is None else node.snapshot()

    def members(self) -> dict[PeerId, Known]:
        return {node.record.peer: node.snapshot() for node in self._table.nodes.values()}

    # --- what happens -----------------------------------------------------------------------------

    def tick(self) -> None:
        """Do what is due."""
        late_s = self._now() - self._timers.due
        if late_s > self._config.away_s:
            self._was_away(late_s)
        self._timers.run()

    def _was_away(self, late_s: float) -> None:
        """This process stood still: what others seem not to have done, they may have done."""
        self.counters["away"] += 1
        self.awareness.add(1)
        self._probing.reset()
        for node in self._table.nodes.values():
            if node.suspicion is not None:
                node.suspicion.postpone(late_s)
                self._timers.at(node.suspicion.deadline, self._suspicion_over, node)

    def receive(self, peer: PeerId, data: bytes) -> None:
        """Take a frame from an authenticated, admitted peer.

        Raises Malformed: the peer does not keep to the protocol; nothing of the frame was used.
        """
        key, config = key_of(peer), self._config
        source = self._sources.seen(key)
        if not source.frames.take(1 + (len(data) >> 10)):
            self.counters["flooded"] += 1
            return
        frame = wire.decode(
            data, bytes_max=config.frame_bytes_max, fact_bytes_max=config.fact_bytes_max
        )
        records = [self._parse(record) for record in self._affordable(source, frame.records)]
        if key == self._key:
            return
        node = self._table.nodes.get(key)
        if node is not None:
            self._heard(node)
        elif frame.kind is not Kind.HAVE:
            self._fetching.want(source, (key, 0, 0))
        match frame.kind:
            case Kind.PING:
                answer = {"k": int(Kind.ACK), "n": frame.seq, "u": self._unix_ms()}
                self._gossip.post(key, answer, config.piggyback_bytes_max)
            case Kind.ACK:
                if (node := self._probing.acked(key, frame)) is not None:
                    self._heard(node)
            case Kind.NACK:
                self._probing.nacked(key, frame)
            case Kind.PING_REQ:
                self._probing.relay(key, frame)
            case Kind.SYNC:
                source.synced_at = self._now()
                self._push_pull.answer(source, frame)
            case Kind.WANT:
                self._push_pull.serve(source, frame)
        if self.record.left:
            return
        if frame.kind is Kind.HAVE:
            self._received(source, frame, records)
        self._rumours(source, frame)
        self._fetching.ask_all()

    def _affordable(self, source: Source, records: list[bytes]) -> list[bytes]:
        """As many records of a frame as its peer may make this node look at."""
        for at in range(len(records)):
            if not source.records.take():
                self.counters["limited"] += len(records) - at
                return records[:at]
        return records

    def _rumours(self, source: Source, frame: Frame) -> None:
        """What a frame of any kind announces and claims."""
        rumours = self._gossip.rumours
        nodes, has_routine = self._table.nodes, rumours.has_routine
        for about, incarnation, revision, state in frame.entries:
            if not state and (known := nodes.get(about)) is not None:
                record = known.record  # nearly always: nothing new, so no more than a glance
                if incarnation == record.incarnation and revision == record.revision:
                    if has_routine:
                        rumours.came_back(ENTRY, about, known.entry)
                    continue
            self._entry(source, about, incarnation, revision, state)
        for target, incarnation, accuser, state in frame.claims:
            self._claim(source, target, incarnation, accuser, state)
        if frame.facts:
            known_facts = self._facts()
            for digest in frame.facts:
                if digest in known_facts:
                    rumours.came_back(FACT, digest, digest)
                else:
                    self._fetching.want(source, (digest, FACT_WANTED, 0))

    def peer_up(self, peer: PeerId) -> None:
        """A connection to a member came up."""
        key = _key(peer)
        if key is None or key == self._key or self.record.left:
            return
        source = self._sources.seen(key)
        source.connected = True
        if key not in self._table.nodes:  # nothing is known of its clock either
            self._fetching.want(source, (key, 0, 0))
            self._fetching.ask_all()
        # Both ends hear of the connection; one push-pull serves both, so the smaller key begins.
        wait_s = 0.0 if self._key < key else 2 * self._config.probe_timeout_s
        earliest = source.synced_at + self._config.sync_peer_s_min
        self._plan_sync(source, max(self._now() + wait_s, earliest))

    def peer_down(self, peer: PeerId) -> None:
        """The last connection to a member went."""
        if (key := _key(peer)) and (source := self._sources.get(key)) is not None:
            source.connected = False
        self.probe(peer)

    def unreachable(self, peer: PeerId) -> None:
        """A dial or a send to a member failed."""
        if (key := _key(peer)) is None:
            return
        self._probing.unreachable(key)
        if (source := self._sources.get(key)) is not None and source.asked:
            self._fetching.failed(source)

    def heard(self, peer: PeerId) -> None:
        """A member sent something, authenticated, on whatever stream: it lives."""
        if (node := self._find(peer)) is not None:
            self._heard(node)

    def probe(self, peer: PeerId) -> None:
        """Probe a member now, out of turn."""
        if (node := self._find(peer)) is not None and not self.record.left:
            self._probing.probe(node)

    def ping(self, peer: PeerId, answered: Callable[[], None]) -> None:
        """Call back when a peer answers; its silence says nothing. Raises LimitExceeded."""
        self._probing.ping(key_of(peer), answered)

    def update(self, **fields: Any) -> None:
        """Describe this node anew: any of the fields of a record that the node chooses.

        Load and memory are published at leisure, everything else at once.
        """
        self._own.update(fields)

    def met(self, record: Record) -> None:
        """A member says that a process with this node's key lives, and has just signed this.

        Raises Forged.
        """
        record.verify()
        if record.peer == self.record.peer:
            self._other_self(record)

    def add_fact(self, fact: bytes) -> None:
        """A fact became known here: tell the others."""
        self._gossip.tell_fact(wire.digest_of(fact))

    def evict(self, peer: PeerId) -> None:
        if (node := self._find(peer)) is not None:
            self._remove(node)

    def leave(self) -> None:
        """Say farewell, and do nothing from then on but answer."""
        if self.record.left:
            return
        self._own.leave()
        self._fetching.stop()
        fields = {"k": int(Kind.HAVE), "r": [self.record.encoded], "z": True}
        nodes = [node for node in self._table.nodes.values() if node.lives]
        self._rng.shuffle(nodes)
        nodes.sort(key=lambda node: not self._sources.is_connected(node.key))  # no time to dial
        for node in nodes[: self._config.farewells]:
            self._gossip.post(node.key, fields)
        self._timers.stop()
        self._probing.reset()

    # --- suspicion --------------------------------------------------------------------------------

    def _heard(self, node: Node) -> None:
        node.heard_at = self._now()
        if node.doubts:
            node.doubts = set()
        if node.state == SUSPECT:
            self._tell(node)
            self._gossip.drop_claims(node)
            self._table.set_state(node, ALIVE, self._now())
            self._emit(ChangeKind.ALIVE, node, State.SUSPECT)
        elif node.state == DEAD:
            self._tell(node)

    def _tell(self, node: Node) -> None:
        """A node that lives is told what is said of it, so that it refutes."""
        source, now = self._sources.seen(node.key), self._now()
        if now - source.told_at >= self._config.probe_s:
            source.told_at = now
            claim = wire.CLAIM.pack(node.key, node.record.incarnation, self._key, node.state)
            self._gossip.post(node.key, {"k": int(Kind.GOSSIP), "c": claim})

    def _claim(
        self, source: Source, key: bytes, incarnation: int, accuser: bytes, state: int
    ) -> None:
        """Somebody says that a node does not answer, or is dead."""
        if not source.claims.take():
            self.counters["limited"] += 1
            return
        if key == self._key:
            self._accused(source, incarnation)
            return
        node = self._table.nodes.get(key)
        if node is None or not node.lives or incarnation < node.record.incarnation:
            return
        if incarnation > node.record.incarnation:
            self._fetching.want(source, (key, incarnation, 0))
            return
        if accuser == key or (accuser != self._key and accuser not in self._table.nodes):
            accuser = source.key
        patience_s = self.awareness.scaled(self._config.probe_s)
        if node.state == ALIVE and self._now() - node.heard_at < patience_s:
            self.counters["doubted"] += 1
            if len(node.doubts) < DOUBTS_MAX:
                node.doubts.add(accuser)
            self._probing.probe(node)
            return
        self._suspect(node, accuser, state)

    def _suspect(self, node: Node, accuser: bytes, state: int) -> None:
        """Begin to suspect, or confirm the suspicion by another accuser."""
        now = self._now()
        if (suspicion := node.suspicion) is None:
            self.counters["suspicions"] += 1
            # When a process ends, all see it at once, and each tells the others while they still
            # doubt it: those claims confirm the suspicion that this node now has itself.
            accusers, node.doubts = {accuser, *node.doubts}, set()
            suspicion = Suspicion(self._config, self.size, accusers, now)
            if state == DEAD:
                suspicion.hasten()
            self._table.set_state(node, SUSPECT, now)
            node.suspicion = suspicion
            self._timers.at(suspicion.deadline, self._suspicion_over, node)
            self._gossip.claim(node, accuser)
            self._emit(ChangeKind.SUSPECTED, node, State.ALIVE)
            return
        before = suspicion.deadline
        if state == DEAD:
            suspicion.hasten()
        elif suspicion.confirm(accuser):
            self._gossip.claim(node, accuser)
        if suspicion.deadline < before:
            self._timers.at(max(now, suspicion.deadline), self._suspicion_over, node)

    def _suspicion_over(self, node: Node) -> None:
        now, suspicion = self._now(), node.suspicion
        gone = self._table.nodes.get(node.key) is not node
        if suspicion is None or now < suspicion.deadline or gone:
            return
        self.counters["deaths"] += 1
        self._table.set_state(node, DEAD, now)
        self._gossip.claim(node, self._key)
        self._emit(ChangeKind.DIED, node, State.SUSPECT)

    def _accused(self, source: Source, incarnation: int) -> None:
        """This node itself is said not to answer."""
        if incarnation > self.record.incarnation:
            self._fetching.want(source, (self._key, incarnation, 0))
            return
        if incarnation == self.record.incarnation:
            self._own.refute(incarnation)
            if self.record.incarnation == incarnation:
                return  # later
        if self._now() - source.shown_at >= self._config.gossip_s:
            source.shown_at = self._now()
            fields = {"k": int(Kind.HAVE), "r": [self.record.encoded]}
            self._gossip.post(source.key, fields)

    # --- the table --------------------------------------------------------------------------------

    def _emit(self, kind: ChangeKind, node: Node, before: State | None) -> None:
        self._on_change(Change(kind, node.snapshot(), before))

    def _install(self, key: bytes, record: Record, labels: Mapping[str, str]) -> bool:
        """Take a newer record into the table, if there is room."""
        now = self._now()
        node = self._table.nodes.get(key)
        if node is None:
            if len(self._table.nodes) >= self._config.members_max:
                if (dead := self._table.longest_dead()) is None:
                    self.counters["table_full"] += 1
                    return False
                self._remove(dead)
            node = self._table.add(key, record, labels, now)
            if record.left:
                self._table.set_state(node, LEFT, now)
            else:
                self._emit(ChangeKind.JOINED, node, None)
            self._gossip.announce(record, urgent=not record.left)
            return True
        before, was = STATES[node.state], node.record
        node.record, node.labels = record, labels
        if record.instance != was.instance:
            node.offset_s = None  # another process, and maybe another clock
            if record.instance == node.past_instance:  # no restart brings a process back
                self._emit(ChangeKind.DUPLICATE, node, before)
            node.past_instance = was.instance
        if record.left:
            state = LEFT
        elif record.incarnation > was.incarnation:
            state = ALIVE
        else:
            state = node.state
        if state != node.state:
            self._gossip.drop_claims(node)
            self._table.set_state(node, state, now)
        else:
            node.entry = entry_of(record, state)
        self._gossip.announce(record, urgent=state != ALIVE or not is_routine(was, record))
        if state == LEFT:
            self._emit(ChangeKind.LEFT, node, before)
        elif state == ALIVE and before is not State.ALIVE:
            self._emit(ChangeKind.ALIVE, node, before)
        else:
            self._emit(ChangeKind.UPDATED, node, before)
        return True

    def _remove(self, node: Node) -> None:
        if self._table.remove(node):
            self._gossip.forget(node)
            self._probing.forget(node.key)
            self._emit(ChangeKind.REMOVED, node, STATES[node.state])

    def _reap(self) -> None:
        self._timers.after(REAP_S, self._reap)
        horizon = self._now() - self._config.retention_s
        for node in list(self._table.nodes.values()):
            if not node.lives and node.since < horizon:
                self._remove(node)
        self._sources.reap()

    def _entry(
        self, source: Source, key: bytes, incarnation: int, revision: int, state: int
    ) -> None:
        """Somebody knows a version of a node's record, and maybe doubts that it lives."""
        doubted = state in (SUSPECT, DEAD)
        if key == self._key:
            if (incarnation, revision) > self.record.order:
                self._fetching.want(source, (key, incarnation, revision))
            elif doubted:
                self._accused(source, incarnation)
            return
        node = self._table.nodes.get(key)
        if node is None:
            if state != DEAD:  # one that is already dead is nothing to know
                self._fetching.want(source, (key, incarnation, revision))
        elif (incarnation, revision) > node.record.order:
            self._fetching.want(source, (key, incarnation, revision))
        elif doubted and incarnation == node.record.incarnation and state != node.state:
            # (Hearsay is no confirmation: who accuses whom is in the claims.)
            self._claim(source, key, incarnation, source.key, state)

    # --- push-pull --------------------------------------------------------------------------------

    def _sync(self, source: Source) -> None:
        source.synced_at = self._now()
        self._push_pull.begin(source)

    def _sync_next(self) -> None:
        self._timers.after(self._config.sync_period_s(self.size), self._sync_next)
        for node in self._table.sample(1):
            self._sync(self._sources.seen(node.key))

    def _plan_sync(self, source: Source, when: float) -> None:
        if source.sync_since is None:
            source.sync_since = self._now()
            if when <= source.sync_since:
                self._sync_planned(source)
            else:
                self._timers.at(when, self._sync_planned, source)

    def _sync_planned(self, source: Source) -> None:
        since, source.sync_since = source.sync_since, None
        if since is not None and source.connected and source.synced_at < since:
            self._sync(source)

    # --- records and facts ------------------------------------------------------------------------

    def _received(self, source: Source, frame: Frame, records: Iterable[Record]) -> None:
        for record in records:
            self._record(source, record)
        node = self._table.nodes.get(source.key)
        if node is not None and node.offset_s is None and frame.unix_ms is not None:
            # Known to some round trips, until the first probe measures it.
            node.offset_s = (frame.unix_ms - self._unix_ms()) / 1000
        for blob in frame.blobs:
            self._fact(source, blob)
        if frame.done:
            self._fetching.answered(source)

    def _record(self, source: Source, record: Record) -> None:
        """Judge a record: whatever is cheap to know first, its signature only if it is newer."""
        key, order = key_of(record.peer), record.order
        exact = (key, *order)
        wants: list[Want] = [exact]
        if source.asked is not None and exact not in source.asked:
            wants += [want for want in source.asked if want[0] == key and want[1:] <= order]
        known = self._table.nodes.get(key)
        if key == self._key:
            newest = self.record.order
        else:
            newest = (-1, 0) if known is None else known.record.order
        if order <= newest or (
            known is not None
            and known.state == LEFT
            and record.incarnation == known.record.incarnation
        ):
            self.counters["stale"] += 1
            self._fetching.settle(wants)
            return
        try:
            self._verify(record)
        except Forged:
            self.counters["forged"] += 1
            source.records.spend(FORGERY_COST)
            return  # and somebody else is asked
        self._fetching.settle(wants)
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
                self._fetching.want(author, exact)
            else:
                self._fetching.refuse(wants)
                self._on_old(record)
            return
        try:
            certified = self._accept(record)
        except WetwareError:
            self.counters["refused"] += 1
            self._fetching.refuse(wants)
            return
        labels = record.labels
        if certified:
            labels = MappingProxyType({**labels, **certified})
        if not self._install(key, record, labels):
            self._fetching.refuse(wants)
        elif key == source.key:
            self._table.nodes[key].heard_at = self._now()

    def _other_self(self, record: Record) -> None:
        """A newer record with this node's key: from before its restart, or a second process."""
        if self._own.is_other(record):
            if self._own.is_twin(record):
                other = Known(record, State.ALIVE, self._now(), record.labels, None, None)
                self._on_change(Change(ChangeKind.DUPLICATE, other, None))
            self._own.refute(record.incarnation)

    def _fact(self, source: Source, fact: bytes) -> None:
        digest = wire.digest_of(fact)
        want = (digest, FACT_WANTED, 0)
        self._fetching.settle([want])
        if digest in self._facts() or want in self._fetching.refused:
            return
        if not source.records.take():
            self.counters["limited"] += 1
            return
        try:
            is_new = self._adopt(fact)
        except WetwareError:
            self.counters["facts_refused"] += 1
            self._fetching.refuse([want])
            return
        if is_new:
            self.add_fact(fact)
