"""Many nodes' membership in one process: simulated time, latency, loss, pauses and deaths.

The code under test is `membership.swim` as it is; what is simulated is the clock and the
network. Deterministic for a seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial

from wetware.identity import Key, PeerId
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.known import Change, ChangeKind, State
from wetware.overlay.membership.record import Record, key_of
from wetware.overlay.membership.swim import Swim

UNIX_MS = 1_800_000_000_000
"""The simulation's beginning."""


@lru_cache(maxsize=8192)
def key_number(number: int) -> Key:
    """The same keys in every run."""
    return Key.from_seed(number.to_bytes(32, "big"))


@lru_cache(maxsize=16_384)
def parse_once(encoded: bytes) -> Record:
    """A thousand nodes read the same record; one of them really does."""
    return Record.parse(encoded)


@lru_cache(maxsize=16_384)
def _verify_bytes(encoded: bytes) -> None:
    parse_once(encoded).verify()


def verify_once(record: Record) -> None:
    """As `parse_once`."""
    _verify_bytes(record.encoded)


@dataclass(slots=True, eq=False)
class SimNode:
    """One node: its protocol, and what happened to it."""

    number: int
    peer: PeerId
    swim: Swim
    frames_in: int = 0
    alive: bool = True
    paused_until: float = 0.0
    armed: float = float("inf")
    clock_offset_s: float = 0.0
    facts: dict[bytes, bytes] = field(default_factory=dict)
    changes: list[tuple[float, Change]] = field(default_factory=list)


class Sim:
    """A network of nodes.

    Args:
        seed: Of everything random.
        config: Of every node.
        latency_s: One way, uniform between the two.
        loss: Share of frames that vanish.
        refuse: Whether a dial to a dead node fails at once, as after a crash; else it is silent, as
            when the power is cut.
        chain_bytes: Length of the (meaningless) admission chain in each record.
        on_change: Gets the node, time and change of every change.
    """

    def __init__(
        self,
        *,
        seed: int = 1,
        config: MembershipConfig | None = None,
        latency_s: tuple[float, float] = (0.005, 0.05),
        loss: float = 0.0,
        refuse: bool = False,
        chain_bytes: int = 300,
        keep_changes: bool = True,
        on_change: Callable[[SimNode, float, Change], None] | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.config = config or MembershipConfig()
        self.time = 0.0
        self.nodes: dict[PeerId, SimNode] = {}
        self.cut: Callable[[SimNode, SimNode], bool] = lambda _a, _b: False
        self._latency_s, self._loss, self._refuse = latency_s, loss, refuse
        self._chain = bytes(chain_bytes)
        self._keep, self._on_change = keep_changes, on_change
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0
        self.frames = self.bytes = 0

    # --- nodes ---

    def add(self, number: int, *, incarnation: int | None = None, instance: int = 0) -> SimNode:
        """A node that has just started; it knows nobody."""
        key = key_number(number)
        now_ms = UNIX_MS + int(self.time * 1000)
        sign = partial(Record.sign, key)
        record = sign(
            incarnation=now_ms if incarnation is None else incarnation,
            instance=instance.to_bytes(8, "big"),
            issued_ms=now_ms,
            addrs=[f"/ip4/10.{number >> 16}.{number >> 8 & 255}.{number & 255}/tcp/4001"],
            host=f"host-{number}",
            name=f"n{number}",
            labels={"zone": f"z{number % 3}"},
            version="0.1.0",
            services=["pubsub"],
            memory_bytes=8 << 30,
            chain=self._chain,
        )
        node = SimNode(number, key.peer_id, swim=None)  # type: ignore[arg-type]
        node.swim = Swim(
            record,
            config=self.config,
            sign=sign,
            send=partial(self._sent, node),
            accept=lambda _: {},
            facts=lambda: node.facts,
            adopt=partial(self._adopt, node),
            now=lambda: self.time,
            unix_ms=lambda: UNIX_MS + int((self.time + node.clock_offset_s) * 1000),
            rng=random.Random(self.rng.getrandbits(64)),
            on_change=partial(self._changed, node),
            parse=parse_once,
            verify=verify_once,
        )
        self.nodes[node.peer] = node
        self._arm(node)
        return node

    def connect(self, one: SimNode, other: SimNode) -> None:
        """A connection comes up."""
        for a, b in ((one, other), (other, one)):
            a.swim.peer_up(b.peer)
            self._arm(a)

    def kill(self, node: SimNode) -> None:
        """It stops, without a word."""
        node.alive = False

    def pause(self, node: SimNode, seconds: float) -> None:
        """It stands still; what arrives meanwhile waits."""
        node.paused_until = max(node.paused_until, self.time + seconds)

    def call(self, node: SimNode, act: Callable[[Swim], object]) -> None:
        """Have a node do something."""
        act(node.swim)
        self._arm(node)

    def start(self, count: int, *, seeds: int = 1) -> list[SimNode]:
        """So many nodes at once; all but the first know only some of the first `seeds`."""
        nodes = [self.add(number) for number in range(len(self.nodes), len(self.nodes) + count)]
        for at, node in enumerate(nodes):
            if at:
                self.connect(node, nodes[self.rng.randrange(min(seeds, at))])
        return nodes

    def started(self, count: int) -> list[SimNode]:
        """So many nodes that know each other already, as if for a while."""
        nodes = [self.add(number) for number in range(len(self.nodes), len(self.nodes) + count)]
        for node in nodes:
            swim = node.swim
            for other in nodes:
                if other is not node:
                    swim._install(key_of(other.peer), other.swim.record, {})
            swim._gossip.rumours.__init__()  # type: ignore[misc]
            node.changes.clear()
        return nodes

    @property
    def living(self) -> list[SimNode]:
        """Nodes that run."""
        return [node for node in self.nodes.values() if node.alive]

    def knows_all(self, among: Iterable[SimNode] | None = None) -> bool:
        """Whether all living nodes believe that exactly the living nodes live."""
        nodes = list(self.living if among is None else among)
        return all(node.swim.size == len(nodes) for node in nodes) and all(
            (member := node.swim.member(other.peer)) is not None and member.state is State.ALIVE
            for node in nodes
            for other in nodes
            if other is not node
        )

    # --- time ---

    def at(self, when: float, act: Callable[..., None], *args: object) -> None:
        """Do something at a time."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, act, args))

    def run(
        self, seconds: float, until: Callable[[], bool] | None = None, every_s: float = 0.1
    ) -> bool:
        """Let time pass: so many seconds, or until a condition holds; whether it does."""
        end, check = self.time + seconds, self.time
        events = self._events
        while True:
            if until is not None and self.time >= check:
                if until():
                    return True
                check = self.time + every_s
            if not events or events[0][0] > end:
                break
            when, _, act, args = heapq.heappop(events)
            self.time = max(self.time, when)
            act(*args)
        self.time = end
        return until() if until is not None else True

    def _arm(self, node: SimNode) -> None:
        due = node.swim.due
        if due < node.armed:
            node.armed = due
            self.at(max(due, self.time), self._tick, node, due)

    def _tick(self, node: SimNode, due: float) -> None:
        if node.armed != due or not node.alive:
            return
        if node.paused_until > self.time:
            self.at(node.paused_until, self._tick, node, due)
            return
        node.armed = float("inf")
        node.swim.tick()
        self._arm(node)

    # --- network ---

    def _sent(self, node: SimNode, peer: PeerId, frame: bytes) -> None:
        self.frames += 1
        self.bytes += len(frame)
        low, high = self._latency_s
        delay = low + (high - low) * self.rng.random()
        other = self.nodes.get(peer)
        if other is None or not other.alive or self.cut(node, other):
            if self._refuse and other is not None and not other.alive:
                self.at(self.time + 2 * delay, self._unreachable, node, peer)
            return
        if self._loss and self.rng.random() < self._loss:
            return
        self.at(self.time + delay, self._arrive, node, other, frame)

    def _arrive(self, node: SimNode, other: SimNode, frame: bytes) -> None:
        if not other.alive:
            return
        if other.paused_until > self.time:
            self.at(other.paused_until, self._arrive, node, other, frame)
            return
        other.frames_in += 1
        other.swim.receive(node.peer, frame)
        if other.swim.due < other.armed:
            self._arm(other)

    def _unreachable(self, node: SimNode, peer: PeerId) -> None:
        if node.alive:
            self.call(node, lambda swim: swim.unreachable(peer))

    def _changed(self, node: SimNode, change: Change) -> None:
        if self._keep:
            node.changes.append((self.time, change))
        if self._on_change is not None:
            self._on_change(node, self.time, change)

    def _adopt(self, node: SimNode, fact: bytes) -> bool:
        from hashlib import sha256

        digest = sha256(fact).digest()[:16]
        is_new = digest not in node.facts
        node.facts[digest] = fact
        return is_new


def happened(node: SimNode, kind: ChangeKind) -> list[tuple[float, PeerId]]:
    """When, and to whom."""
    return [(at, change.member.peer) for at, change in node.changes if change.kind is kind]
