"""Routers in one thread: a network with a clock of its own, latency, lost streams and churn."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from wetware.identity import Key, PeerId
from wetware.testing import FakeClock
from wetware_pubsub.config import PubSubConfig
from wetware_pubsub.order import Sequencer
from wetware_pubsub.router import MESHSUB_11, Received, Router
from wetware_pubsub.wire import SIGN_DOMAIN, FrameReader, Malformed

PREFIX = "/wetware/test/"


@dataclass
class SimNode:
    key: Key
    router: Router
    inbox: list[Received] = field(default_factory=list)
    woken: list[PeerId] = field(default_factory=list)
    lost: list[PeerId] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.key.peer_id

    def texts(self) -> list[bytes]:
        return [m.data for m in self.inbox]


class Network:
    """Nodes whose links are FIFO with a random latency; time passes only in `run`."""

    def __init__(self, seed: int = 1, **config: object) -> None:
        self.rng = random.Random(seed)
        self.clock = FakeClock()
        self.config = PubSubConfig(**config)  # type: ignore[arg-type]
        self.nodes: dict[PeerId, SimNode] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._links: dict[tuple[PeerId, PeerId], int] = {}  # direction → generation
        self._last: dict[tuple[PeerId, PeerId], float] = {}
        self._flushing: set[tuple[PeerId, PeerId]] = set()

    def node(self) -> SimNode:
        key = Key.from_seed(self.rng.randbytes(32))
        node: SimNode
        router = Router(
            key.peer_id,
            sign=lambda data: key.sign(SIGN_DOMAIN + data),
            config=self.config,
            deliver=lambda m: node.inbox.append(m),
            wake=lambda peer: self._woken(node, peer),
            lost=lambda peer: node.lost.append(peer),
            monotonic=self.clock.monotonic,
            rng=random.Random(self.rng.random()),
            sequencer=Sequencer(self.clock.time),
            prefix=PREFIX,
        )
        node = SimNode(key, router)
        self.nodes[node.id] = node
        self._at(self.rng.random(), lambda: self._beat(node))
        return node

    def make(self, count: int) -> list[SimNode]:
        return [self.node() for _ in range(count)]

    def connect(self, a: SimNode, b: SimNode) -> None:
        if (a.id, b.id) in self._links:
            return
        for x, y in ((a, b), (b, a)):
            self._links[x.id, y.id] = next(self._ids)
            x.router.peer_up(y.id)
        for x, y in ((a, b), (b, a)):
            y.router.inbound_opened(x.id)
            x.router.stream_opened(y.id, MESHSUB_11, outbound=x is a)

    def disconnect(self, a: SimNode, b: SimNode) -> None:
        """Everything in flight is lost."""
        for x, y in ((a, b), (b, a)):
            if self._links.pop((x.id, y.id), None) is not None:
                x.router.peer_down(y.id)

    def links(self) -> list[tuple[SimNode, SimNode]]:
        return [(self.nodes[a], self.nodes[b]) for a, b in self._links if a < b]

    def graph(self, nodes: list[SimNode], degree: int) -> None:
        """A ring, so that it is connected, and random links."""
        for i, node in enumerate(nodes):
            self.connect(node, nodes[(i + 1) % len(nodes)])
        for node in nodes:
            for other in self.rng.sample(nodes, degree - 2):
                if other is not node:
                    self.connect(node, other)

    def remove(self, node: SimNode) -> None:
        for other in list(self.nodes.values()):
            self.disconnect(node, other)
        del self.nodes[node.id]

    def run(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self._events and self._events[0][0] <= end:
            at, _, action = heapq.heappop(self._events)
            self.clock.now = at
            action()
        self.clock.now = end

    def later(self, delay: float, action: Callable[[], None]) -> None:
        self._at(delay, action)

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now + delay, next(self._ids), action))

    def _beat(self, node: SimNode) -> None:
        if node.id in self.nodes:
            node.router.heartbeat()
            self._at(self.config.heartbeat_s, lambda: self._beat(node))

    def _woken(self, node: SimNode, peer: PeerId) -> None:
        node.woken.append(peer)
        way = (node.id, peer)
        if way in self._links and way not in self._flushing:
            self._flushing.add(way)
            self._at(0.0, lambda: self._flush(node, peer))

    def _flush(self, node: SimNode, peer: PeerId) -> None:
        way = (node.id, peer)
        self._flushing.discard(way)
        generation = self._links.get(way)
        while frame := node.router.take(peer):
            arrival = max(self._last.get(way, 0.0), self.clock.now + self.rng.uniform(0.001, 0.080))
            self._last[way] = arrival
            self._at(arrival - self.clock.now, lambda f=frame: self._arrive(way, generation, f))

    def _arrive(self, way: tuple[PeerId, PeerId], generation: int | None, frame: bytes) -> None:
        if self._links.get(way) != generation or generation is None:
            return
        sender, receiver = way
        router = self.nodes[receiver].router
        try:
            for body in FrameReader(router.limits).feed(frame):
                for message in router.receive(sender, body):
                    router.message(sender, message)
        except Malformed:
            pytest.fail("a router sent a malformed frame")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def make_network() -> type[Network]:
    return Network
