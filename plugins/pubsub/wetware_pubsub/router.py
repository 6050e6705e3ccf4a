"""GossipSub 1.1, without I/O: what to do when a peer comes, speaks, is silent or goes.

A `Router` is driven from outside: `peer_up`, `peer_down`, `receive`, `publish`, `heartbeat`. It
calls `deliver` with messages for this node and `wake` when something waits to be sent to a peer,
which `take` then gives out as one frame. Clock, randomness and keys are passed in, so that a test
runs fifty of them in one thread and gets the same result twice. `gossip.py` drives it over real
streams.

Source: libp2p specs, pubsub/gossipsub/gossipsub-v1.0.md and -v1.1.md. Peer exchange is ignored:
nobody tells this node whom to dial. The score is a penalty for observed misbehaviour that decays
with time; the specification's rewards (time in mesh, first deliveries) are left out, as are its
per-topic weights.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from wetware.errors import InvalidArgument
from wetware.identity import PeerId, verify
from wetware_pubsub import frames
from wetware_pubsub.names import ASKED, is_shared, mesh
from wetware_pubsub.order import COUNTER_MAX, Orderer, Sequencer, number_of
from wetware_pubsub.wire import (
    SIGN_DOMAIN,
    Malformed,
    Prune,
    Rpc,
    WireLimits,
    WireMessage,
    control_chunk,
    decode,
    encode_unsigned,
    frame,
    graft_chunk,
    ihave_chunk,
    iwant_chunk,
    prune_chunk,
    publish_chunk,
    subscription_chunk,
)

if TYPE_CHECKING:
    import random

    from wetware_pubsub.config import PubSubConfig

MESHSUB_11, MESHSUB_10, FLOODSUB = "/meshsub/1.1.0", "/meshsub/1.0.0", "/floodsub/1.0.0"
PROTOCOLS = (MESHSUB_11, MESHSUB_10, FLOODSUB)

FRAME_BYTES = 64 << 10
"""Messages are sent in frames of about this size: large enough to be cheap, small enough that the
receiver gives other work its turn."""
IHAVE_IDS_PER_ENTRY = 1024  # keeps one entry near 48 KiB
PENALTIES_KEPT_MAX = 1024
"""Peers that left with a penalty, remembered so that reconnecting does not clear it."""
PROMISES_MAX = 65_536
"""Messages asked for and not come yet, over all peers."""
_CACHED_BYTES = 128  # what a kept message costs beside its bytes
AUTHORS_MAX = 4096  # decoded public keys
_PENALTY_FORGOTTEN = 1.0
_BACKOFF_SLACK_S = 1.0  # we GRAFT so much later than allowed: the other side counts for itself
_GRAFT_FLOOD_S = 10.0  # a GRAFT so soon after our PRUNE cannot be a misunderstanding
_ED25519_KEY_PB = b"\x08\x01\x12\x20"


def too_long(nbytes: int, limit: int) -> InvalidArgument:
    """The refusal of a message above `message_bytes_max`."""
    return InvalidArgument(
        f"the message has {nbytes} bytes; message_bytes_max is {limit}",
        hint="send it in parts, or put it into a blob and publish its CID",
        code="invalid.message_bytes",
    )


class Offence(Enum):
    """What a peer can do wrong, and the penalty for it.

    A peer is ignored from `penalty_graylist` (80) on: four malformed frames, eight forged messages.
    """

    MALFORMED = 20.0
    INVALID_MESSAGE = 10.0
    GRAFT_IN_BACKOFF = 5.0
    GRAFT_FLOOD = 10.0
    BROKEN_PROMISE = 2.0
    TOO_MANY_TOPICS = 5.0
    GOSSIP_FLOOD = 1.0


@dataclass(frozen=True, slots=True)
class Received:
    """A message for this node.

    Attributes:
        topic: As on the wire.
        data: The payload: of a topic that ends with `frames.FRAMED`, a frame.
        publisher: Who signed it.
        seqno: Eight bytes, opaque unless `order.number_of` knows them.
        count: How many messages it holds.
    """

    topic: str
    data: bytes
    publisher: PeerId
    seqno: bytes
    count: int = 1


@dataclass(slots=True)
class RouterStats:
    """Counters since the start."""

    published: int = 0
    delivered: int = 0
    forwarded: int = 0
    duplicates: int = 0
    stale: int = 0
    invalid: int = 0
    malformed: int = 0
    gossip_dropped: int = 0
    streams_lost: int = 0
    iwant_sent: int = 0
    iwant_served: int = 0
    promises_broken: int = 0
    ignored: int = 0


class Outbox:
    """What waits to be sent to one peer, bounded; gossip gives way to messages.

    Subscriptions, GRAFT and PRUNE are state, so that the last one of a topic replaces those before.
    """

    __slots__ = (
        "_bytes_max",
        "_control",
        "_data",
        "_gossip",
        "_gossip_bytes_max",
        "_subscriptions",
        "data_bytes",
        "gossip_bytes",
    )

    def __init__(self, bytes_max: int, gossip_bytes_max: int) -> None:
        self._bytes_max, self._gossip_bytes_max = bytes_max, gossip_bytes_max
        self._subscriptions: dict[str, bool] = {}
        self._control: dict[str, bytes] = {}
        self._gossip: deque[bytes] = deque()
        self._data: deque[bytes] = deque()
        self.data_bytes = self.gossip_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._data or self._subscriptions or self._control or self._gossip)

    def subscription(self, topic: str, subscribe: bool) -> None:
        """Announce a topic, or take it back."""
        self._subscriptions[topic] = subscribe

    def mesh(self, topic: str, chunk: bytes) -> None:
        self._control[topic] = chunk

    def gossip(self, chunk: bytes) -> bool:
        """Send IHAVE or IWANT; False if there is no room, or messages need it."""
        if (
            self.gossip_bytes + len(chunk) > self._gossip_bytes_max
            or self.data_bytes > self._bytes_max // 2
        ):
            return False
        self._gossip.append(chunk)
        self.gossip_bytes += len(chunk)
        return True

    def data(self, chunk: bytes) -> bool:
        """Send a message; False if the queue is full: the peer has lost the thread."""
        if self.data_bytes + len(chunk) > self._bytes_max:
            return False
        self._data.append(chunk)
        self.data_bytes += len(chunk)
        return True

    @property
    def is_crowded(self) -> bool:
        """Whether more than half of the room is taken."""
        return self.data_bytes > self._bytes_max // 2

    def take(self) -> bytes:
        """The next frame, or b"" when nothing waits."""
        chunks = [subscription_chunk(t, s) for t, s in self._subscriptions.items()]
        self._subscriptions.clear()
        size = 0
        while self._data and size < FRAME_BYTES:
            chunk = self._data.popleft()
            size += len(chunk)
            chunks.append(chunk)
        self.data_bytes -= size
        parts = list(self._control.values())
        self._control.clear()
        while self._gossip and size < 2 * FRAME_BYTES:
            chunk = self._gossip.popleft()
            self.gossip_bytes -= len(chunk)
            size += len(chunk)
            parts.append(chunk)
        if parts:
            chunks.append(control_chunk(parts))
        return frame(chunks) if chunks else b""

    def clear(self) -> None:
        self._subscriptions.clear()
        self._control.clear()
        self._gossip.clear()
        self._data.clear()
        self.data_bytes = self.gossip_bytes = 0


@dataclass(slots=True)
class _Peer:
    """What this node knows of a peer. `protocol` is None while no stream to it is open."""

    outbox: Outbox
    protocol: str | None = None
    outbound: bool = False
    generation: int = 0  # of its stream: changes when one opens or closes
    topics: dict[str, None] = field(default_factory=dict)
    penalty: float = 0.0
    penalty_at: float = 0.0
    backoff: dict[str, float] = field(default_factory=dict)  # topic → until
    pruned_at: dict[str, float] = field(default_factory=dict)  # topic → when we sent PRUNE
    ihave_messages: int = 0  # this heartbeat
    asked: int = 0  # message IDs asked for this heartbeat


@dataclass(slots=True)
class _Cached:
    """A message that may be asked for.

    An own one is encoded and signed when the first peer is to get it: `chunk` is None before.
    """

    topic: str
    data: bytes
    chunk: bytes | None
    size: int
    sent: dict[PeerId, int] = field(default_factory=dict)  # IWANTs answered


class MessageCache:
    """The last messages, in windows of one heartbeat, for IHAVE and IWANT.

    Args:
        windows: How many heartbeats a message stays.
        gossip_windows: How many of them IHAVE names.
        bytes_max: Beyond it the oldest messages go early.
    """

    def __init__(self, windows: int, gossip_windows: int, bytes_max: int) -> None:
        self._windows: deque[OrderedDict[bytes, _Cached]] = deque(
            (OrderedDict() for _ in range(windows)), maxlen=windows
        )
        self._gossip_windows, self._bytes_max = gossip_windows, bytes_max
        self._bytes = 0

    def put(
        self, message_id: bytes, topic: str, data: bytes, chunk: bytes | None = None
    ) -> _Cached:
        cached = _Cached(topic, data, chunk, len(chunk or data) + _CACHED_BYTES)
        self._windows[0][message_id] = cached
        self._bytes += cached.size
        while self._bytes > self._bytes_max:
            oldest = next(w for w in reversed(self._windows) if w)
            self._bytes -= oldest.popitem(last=False)[1].size
        return cached

    def get(self, message_id: bytes) -> _Cached | None:
        for window in self._windows:
            if (cached := window.get(message_id)) is not None:
                return cached
        return None

    def recent(self) -> dict[str, list[bytes]]:
        """Topic → IDs to gossip about, oldest first."""
        found: dict[str, list[bytes]] = {}
        for window in reversed(list(self._windows)[: self._gossip_windows]):
            for message_id, cached in window.items():
                found.setdefault(cached.topic, []).append(message_id)
        return found

    def shift(self) -> None:
        for cached in self._windows[-1].values():
            self._bytes -= cached.size
        self._windows.appendleft(OrderedDict())


class SeenCache:
    """Message IDs that were seen, for `ttl_s` and at most `entries_max` of them."""

    def __init__(self, ttl_s: float, entries_max: int) -> None:
        self._ttl_s, self._max = ttl_s, entries_max
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def __contains__(self, message_id: bytes) -> bool:
        return message_id in self._until

    def __len__(self) -> int:
        return len(self._until)

    def add(self, message_id: bytes, now: float) -> None:
        self._until[message_id] = now + self._ttl_s
        if len(self._until) > self._max:
            self._until.popitem(last=False)

    def expire(self, now: float) -> None:
        """Forget what is older than the TTL."""
        while self._until:
            message_id, until = next(iter(self._until.items()))
            if until > now:
                return
            del self._until[message_id]


class Router:
    """One node's GossipSub.

    Args:
        me: This node.
        sign: The node's signature over `SIGN_DOMAIN` and its argument.
        config: Limits and degrees.
        prefix: Topics that begin otherwise belong to another cluster and are ignored.
        deliver: Gets each message of a subscribed topic once, in its publisher's order.
        wake: Called when something waits for a peer whose outbox was empty.
        lost: Called when a peer's outbox overflowed: its stream must be opened anew.
        monotonic: Seconds that never go back.
        rng: Chooses mesh and gossip peers.
        sequencer: Numbers own messages.
        wire_limits: Of received frames.
    """

    def __init__(
        self,
        me: PeerId,
        *,
        sign: Callable[[bytes], bytes],
        config: PubSubConfig,
        deliver: Callable[[Received], None],
        wake: Callable[[PeerId], None],
        lost: Callable[[PeerId], None],
        monotonic: Callable[[], float],
        rng: random.Random,
        sequencer: Sequencer,
        prefix: str = "",
        wire_limits: WireLimits | None = None,
    ) -> None:
        self.me, self.config, self.prefix = me, config, prefix
        self.stats = RouterStats()
        self.limits = wire_limits or WireLimits()
        self._me_bytes = me.multihash
        self._sign, self._now, self._rng = sign, monotonic, rng
        self._deliver_to_node, self._wake, self._lost = deliver, wake, lost
        self._sequencer = sequencer
        self._peers: dict[PeerId, _Peer] = {}
        self._by_topic: dict[str, dict[PeerId, None]] = {}  # dicts: sets have no stable order
        self._mesh: dict[str, dict[PeerId, None]] = {}  # the keys are this node's subscriptions
        self._fanout: dict[str, dict[PeerId, None]] = {}
        self._fanout_until: dict[str, float] = {}
        self._since: dict[str, float] = {}  # topic → when it was subscribed
        self._left: dict[str, float] = {}  # topic → until when we must not be grafted
        self._seen = SeenCache(config.seen_s, config.seen_max)
        self._cache = MessageCache(
            config.history_windows, config.gossip_windows, config.history_bytes_max
        )
        self._promises: dict[bytes, tuple[PeerId, float]] = {}
        self._penalties: OrderedDict[PeerId, tuple[float, float]] = OrderedDict()
        self._authors: OrderedDict[bytes, tuple[PeerId, bytes | None]] = OrderedDict()
        self.order: Orderer[Received] = Orderer(
            self._deliver,
            hold_s=config.hold_s,
            held_max=config.held_messages_max,
            held_bytes_max=config.held_bytes_max,
            lines_max=config.publishers_max,
        )

    # --- peers ---

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """Known peers, with a stream or without."""
        return tuple(self._peers)

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(self._mesh)

    def mesh(self, topic: str) -> frozenset[PeerId]:
        """The peers that messages of a subscribed topic are exchanged with in full."""
        return frozenset(self._mesh.get(topic, ()))

    def subscribers(self, topic: str) -> tuple[PeerId, ...]:
        return tuple(self._by_topic.get(topic, ()))

    def peer_up(self, peer: PeerId) -> None:
        """A peer connected. Idempotent."""
        if peer in self._peers:
            return
        config = self.config
        state = _Peer(Outbox(config.queue_bytes_max, config.gossip_bytes_max))
        state.penalty, state.penalty_at = self._penalties.pop(peer, (0.0, self._now()))
        self._peers[peer] = state

    def peer_down(self, peer: PeerId) -> None:
        """A peer's last connection ended. Idempotent."""
        if (state := self._peers.pop(peer, None)) is None:
            return
        self._forget_topics(peer, state)
        if (penalty := self._decayed(state)) >= _PENALTY_FORGOTTEN:
            self._penalties[peer] = penalty, self._now()
            if len(self._penalties) > PENALTIES_KEPT_MAX:
                self._penalties.popitem(last=False)

    def stream_opened(self, peer: PeerId, protocol: str, *, outbound: bool) -> None:
        """A stream *to* the peer is open: it is greeted with all our subscriptions.

        Args:
            peer: Whom it leads to.
            protocol: One of PROTOCOLS.
            outbound: Whether this node dialled the connection.
        """
        self.peer_up(peer)
        if all(other.protocol is None for other in self._peers.values()):
            for topic in self._mesh:
                self.order.resume(topic)  # what was missed while nobody was there does not come
        state = self._peers[peer]
        state.protocol, state.outbound = protocol, outbound
        state.generation += 1
        state.outbox.clear()
        self.greet(peer)
        for topic in state.topics:
            self._heard_by(topic, peer)
            self._graft_if_low(topic, peer)

    def _heard_by(self, topic: str, peer: PeerId) -> None:
        """`peer` can be sent a topic's messages from now on.

        If it is the only one, nobody has what was published before, so nobody is to wait for that.
        """
        others = (self._peers[p] for p in self._by_topic[topic] if p != peer)
        if all(other.protocol is None for other in others):
            self._sequencer.begin_anew(topic)

    def greet(self, peer: PeerId) -> None:
        """Tell the peer all our subscriptions."""
        state = self._peers[peer]
        for topic in self._mesh:
            self._announce(peer, state, topic, True)

    def stream_closed(self, peer: PeerId) -> None:
        """The stream to the peer is gone: it gets nothing until there is another."""
        if (state := self._peers.get(peer)) is not None:
            state.protocol = None
            state.generation += 1
            state.outbox.clear()
            for mesh in self._mesh.values():
                mesh.pop(peer, None)
            for fanout in self._fanout.values():
                fanout.pop(peer, None)

    def generation(self, peer: PeerId) -> int:
        """A number that changes whenever a stream to the peer opens or closes; -1 if unknown."""
        state = self._peers.get(peer)
        return -1 if state is None else state.generation

    def inbound_opened(self, peer: PeerId) -> None:
        """The peer opened a stream to us, and will say what it is subscribed to from the start."""
        self.peer_up(peer)
        self._forget_topics(peer, self._peers[peer])

    def _forget_topics(self, peer: PeerId, state: _Peer) -> None:
        for topic in list(state.topics):
            self._unsubscribed(peer, state, topic)

    # --- penalties ---

    def penalty(self, peer: PeerId) -> float:
        """A peer's penalty now; 0 for a good one."""
        if (state := self._peers.get(peer)) is not None:
            return self._decayed(state)
        penalty, at = self._penalties.get(peer, (0.0, 0.0))
        return penalty * self._decay(at)

    def _decay(self, since: float) -> float:
        return float(0.5 ** ((self._now() - since) / self.config.penalty_half_life_s))

    def _decayed(self, state: _Peer) -> float:
        return state.penalty * self._decay(state.penalty_at) if state.penalty else 0.0

    def punish(self, peer: PeerId, offence: Offence, times: int = 1) -> None:
        """Add to a peer's penalty; from `penalty_gossip` on it leaves every mesh."""
        if (state := self._peers.get(peer)) is None:
            return
        state.penalty = self._decayed(state) + offence.value * times
        state.penalty_at = self._now()
        if state.penalty >= self.config.penalty_gossip:
            for topic, mesh in self._mesh.items():
                if peer in mesh:
                    self._prune(topic, peer)

    def _is_graylisted(self, state: _Peer) -> bool:
        return state.penalty > 0 and self._decayed(state) >= self.config.penalty_graylist

    def _is_trusted(self, state: _Peer) -> bool:
        return not state.penalty or self._decayed(state) < self.config.penalty_gossip

    # --- sending ---

    def take(self, peer: PeerId) -> bytes:
        """The next frame for a peer, or b"" when nothing waits."""
        state = self._peers.get(peer)
        return state.outbox.take() if state is not None else b""

    def is_crowded(self, peer: PeerId) -> bool:
        """Whether more than half of a peer's room for messages is taken."""
        state = self._peers.get(peer)
        return state is not None and state.outbox.is_crowded

    def _announce(self, peer: PeerId, state: _Peer, topic: str, subscribe: bool) -> None:
        if state.protocol is not None:
            self._woken(peer, state)
            state.outbox.subscription(topic, subscribe)

    def _woken(self, peer: PeerId, state: _Peer) -> None:
        if not state.outbox:
            self._wake(peer)

    def _send_mesh(self, peer: PeerId, state: _Peer, topic: str, chunk: bytes) -> None:
        if state.protocol in (MESHSUB_11, MESHSUB_10):
            self._woken(peer, state)
            state.outbox.mesh(topic, chunk)

    def _send_gossip(self, peer: PeerId, state: _Peer, chunk: bytes) -> bool:
        self._woken(peer, state)
        if state.outbox.gossip(chunk):
            return True
        self.stats.gossip_dropped += 1
        return False

    def _send_data(self, peer: PeerId, chunk: bytes) -> None:
        state = self._peers.get(peer)
        if state is None or state.protocol is None or self._is_graylisted(state):
            return
        if not state.outbox:
            self._wake(peer)
        if not state.outbox.data(chunk):
            self.stats.streams_lost += 1
            self.stream_closed(peer)
            self._lost(peer)

    # --- subscriptions and mesh ---

    def subscribe(self, topic: str) -> None:
        """Deliver the topic's messages from now on. Idempotent."""
        if topic in self._mesh:
            return
        self.order.resume(topic)
        self._mesh[topic] = {}
        self._since[topic] = self._now()
        self._left.pop(topic, None)
        for peer, state in self._peers.items():
            self._announce(peer, state, topic, True)
        fanout = self._fanout.pop(topic, {})
        self._fanout_until.pop(topic, None)
        candidates = [p for p in fanout if self._may_graft(topic, p)]
        others = [p for p in self._by_topic.get(topic, ()) if p not in fanout]
        self._rng.shuffle(others)
        candidates += [p for p in others if self._may_graft(topic, p)]
        for peer in candidates[: self.config.mesh_d]:
            self._graft(topic, peer)

    def unsubscribe(self, topic: str) -> None:
        """Deliver no more. Idempotent."""
        if (mesh := self._mesh.get(topic)) is None:
            return
        for peer in list(mesh):
            self._prune(topic, peer, self.config.unsubscribe_backoff_s)
        del self._mesh[topic], self._since[topic]
        self._left[topic] = self._now() + self.config.unsubscribe_backoff_s
        for peer, state in self._peers.items():
            self._announce(peer, state, topic, False)

    def _may_graft(self, topic: str, peer: PeerId) -> bool:
        state = self._peers.get(peer)
        return (
            state is not None
            and state.protocol in (MESHSUB_11, MESHSUB_10)
            and topic in state.topics
            and peer not in self._mesh.get(topic, ())
            and self._is_trusted(state)
            and state.backoff.get(topic, -math.inf) + _BACKOFF_SLACK_S <= self._now()
        )

    def _graft_if_low(self, topic: str, peer: PeerId) -> None:
        """A small mesh does not wait for the heartbeat: a new subscriber hears at once."""
        mesh = self._mesh.get(topic)
        if mesh is not None and len(mesh) < self.config.mesh_d and self._may_graft(topic, peer):
            self._graft(topic, peer)

    def _graft(self, topic: str, peer: PeerId) -> None:
        self._mesh[topic][peer] = None
        self._send_mesh(peer, self._peers[peer], topic, graft_chunk(topic))

    def _prune(self, topic: str, peer: PeerId, backoff_s: float | None = None) -> None:
        self._mesh.get(topic, {}).pop(peer, None)
        self._send_prune(topic, peer, backoff_s)

    def _send_prune(self, topic: str, peer: PeerId, backoff_s: float | None = None) -> None:
        state, now = self._peers[peer], self._now()
        wait_s = math.ceil(self.config.prune_backoff_s if backoff_s is None else backoff_s)
        state.pruned_at[topic] = now
        state.backoff[topic] = max(state.backoff.get(topic, 0.0), now + wait_s)
        stated = wait_s if state.protocol == MESHSUB_11 else None
        self._send_mesh(peer, state, topic, prune_chunk(topic, stated))

    # --- publishing ---

    def publish(self, topic: str, data: bytes, count: int = 1) -> bytes:
        """Sign and send a message; delivered here too if the topic is subscribed.

        Returns its seqno: of a frame of `count` messages that of the first. Raises InvalidArgument
        if it is longer than `message_bytes_max`.
        """
        if len(data) > self._bytes_max(topic):
            raise too_long(len(data), self.config.message_bytes_max)
        seqno = self._sequencer.next(topic, count)
        message_id = self._me_bytes + seqno
        self._seen.add(message_id, self._now())
        cached = self._cache.put(message_id, topic, data)
        self.stats.published += count
        for peer in self.targets(topic):
            self._send_data(peer, self._chunk(cached, seqno))
        if topic in self._mesh:
            self._deliver(Received(topic, data, self.me, seqno, count))
        return seqno

    def _chunk(self, cached: _Cached, seqno: bytes) -> bytes:
        if cached.chunk is None:
            unsigned = encode_unsigned(self._me_bytes, cached.data, seqno, cached.topic)
            signature = self._sign(frames.signed(cached.topic, unsigned))
            cached.chunk, cached.data = publish_chunk(unsigned, signature), b""
        return cached.chunk

    def _bytes_max(self, topic: str) -> int:
        """Of the data of one GossipSub message."""
        limit = self.config.message_bytes_max
        return frames.bytes_max(limit) if topic.endswith(frames.FRAMED) else limit

    def targets(self, topic: str) -> list[PeerId]:
        """The peers that a message published now would be sent to."""
        return [p for p in self._publish_to(topic) if self._peers[p].protocol is not None]

    def _publish_to(self, topic: str) -> list[PeerId]:
        subscribed = self._by_topic.get(topic)
        if not subscribed:
            return []
        if self.config.flood_publish:
            return list(subscribed)
        floodsub = [p for p in subscribed if self._peers[p].protocol == FLOODSUB]
        if mesh := self._mesh.get(topic):
            return [*mesh, *floodsub]
        # Not subscribed, or nobody has accepted our GRAFT yet: gossip alone would be slow.
        fanout = self._fanout.setdefault(topic, {})
        self._fanout_until[topic] = self._now() + self.config.fanout_s
        self._fill_fanout(topic, fanout)
        return [*fanout, *floodsub]

    def _fill_fanout(self, topic: str, fanout: dict[PeerId, None]) -> None:
        subscribed = self._by_topic.get(topic, {})
        for peer in [p for p in fanout if p not in subscribed]:
            del fanout[peer]
        missing = self.config.mesh_d - len(fanout)
        if missing > 0:
            eligible = [
                p
                for p in subscribed
                if p not in fanout
                and self._peers[p].protocol in (MESHSUB_11, MESHSUB_10)
                and self._is_trusted(self._peers[p])
            ]
            for peer in self._rng.sample(eligible, min(missing, len(eligible))):
                fanout[peer] = None

    # --- receiving ---

    def receive(self, peer: PeerId, body: bytes) -> list[WireMessage]:
        """Take a frame: acts on subscriptions and control, and returns its messages.

        The caller passes each message to `message`, at its leisure: checking a signature takes
        about 0.2 ms, and a frame may hold thousands. Raises Malformed after punishing the peer; its
        stream must then be reset.
        """
        if (state := self._peers.get(peer)) is None:
            return []
        try:
            rpc = decode(body, self.limits)
        except Malformed:
            self.stats.malformed += 1
            self.punish(peer, Offence.MALFORMED)
            raise
        for subscribe, topic in rpc.subscriptions:
            self._subscription(peer, state, topic, subscribe)
        if self._is_graylisted(state):
            self.stats.ignored += len(rpc.messages)
            return []
        self._control(peer, state, rpc)
        return rpc.messages

    def _subscription(self, peer: PeerId, state: _Peer, topic: str, subscribe: bool) -> None:
        if not topic.startswith(self.prefix):
            return
        if not subscribe:
            self._unsubscribed(peer, state, topic)
        elif topic not in state.topics:
            if len(state.topics) >= self.config.peer_topics_max:
                self.punish(peer, Offence.TOO_MANY_TOPICS)
                return
            state.topics[topic] = None
            self._by_topic.setdefault(topic, {})[peer] = None
            if state.protocol is not None:
                self._heard_by(topic, peer)
            self._graft_if_low(topic, peer)

    def _unsubscribed(self, peer: PeerId, state: _Peer, topic: str) -> None:
        state.topics.pop(topic, None)
        if (peers := self._by_topic.get(topic)) is not None:
            peers.pop(peer, None)
            if not peers:
                del self._by_topic[topic]
        self._mesh.get(topic, {}).pop(peer, None)
        self._fanout.get(topic, {}).pop(peer, None)

    def _control(self, peer: PeerId, state: _Peer, rpc: Rpc) -> None:
        for topic in rpc.graft:
            self._grafted(peer, state, topic)
        for prune in rpc.prune:
            self._pruned(peer, state, prune)
        if rpc.ihave:
            self._offered(peer, state, rpc.ihave)
        if rpc.iwant:
            self._asked(peer, state, rpc.iwant)

    def _grafted(self, peer: PeerId, state: _Peer, topic: str) -> None:
        mesh = self._mesh.get(topic)
        now = self._now()
        if mesh is None:
            # Unknown topics are ignored, or a peer could make us send; one we just left is refused.
            if self._left.get(topic, 0.0) > now and topic in state.topics:
                self._send_prune(topic, peer, self.config.unsubscribe_backoff_s)
            return
        if peer in mesh:
            return
        if state.backoff.get(topic, 0.0) > now:
            flood = now - state.pruned_at.get(topic, -math.inf) < _GRAFT_FLOOD_S
            self.punish(peer, Offence.GRAFT_FLOOD if flood else Offence.GRAFT_IN_BACKOFF)
            self._send_prune(topic, peer)
        elif (
            topic not in state.topics
            or not self._is_trusted(state)
            or (len(mesh) >= self.config.mesh_d_high and not state.outbound)
        ):
            self._send_prune(topic, peer)
        else:
            mesh[peer] = None

    def _pruned(self, peer: PeerId, state: _Peer, prune: Prune) -> None:
        if (mesh := self._mesh.get(prune.topic)) is None:
            return
        mesh.pop(peer, None)
        wait_s = self.config.prune_backoff_s
        if prune.backoff_s is not None:  # an hour at most: a peer cannot shut itself out for ever
            wait_s = float(min(prune.backoff_s, 3600))
        until = self._now() + wait_s
        state.backoff[prune.topic] = max(state.backoff.get(prune.topic, 0.0), until)

    def _offered(self, peer: PeerId, state: _Peer, ihave: list[tuple[str, list[bytes]]]) -> None:
        if not self._is_trusted(state):
            return
        wanted: dict[bytes, None] = {}
        for topic, ids in ihave:
            state.ihave_messages += 1
            if state.ihave_messages > self.config.ihave_messages_max:
                self.punish(peer, Offence.GOSSIP_FLOOD)
                break
            if topic not in self._mesh:
                continue
            # Gossip names what was sent in the last seconds. Just subscribed, we want of it only
            # what fills a gap: a topic has no memory.
            now, windows = self._now(), self.config.gossip_windows + 1
            is_new = now - self._since[topic] < windows * self.config.heartbeat_s
            for message_id in ids:
                author = message_id[:-8]
                if not (
                    message_id in self._seen
                    or message_id in self._promises
                    or (is_new and not self.order.is_live(author, topic))
                    or self.order.is_stale(author, topic, message_id[-8:])
                ):
                    wanted[message_id] = None
        room = min(self.config.ihave_ids_max - state.asked, PROMISES_MAX - len(self._promises))
        asked = list(wanted)[: max(0, room)]
        if not asked or state.protocol is None:
            return
        state.asked += len(asked)
        if self._send_gossip(peer, state, iwant_chunk(asked)):
            self.stats.iwant_sent += len(asked)
            until = self._now() + self.config.iwant_s
            for message_id in asked:
                self._promises[message_id] = peer, until

    def _asked(self, peer: PeerId, state: _Peer, ids: list[bytes]) -> None:
        if not self._is_trusted(state) or state.protocol is None:
            return
        for message_id in ids:
            if (cached := self._cache.get(message_id)) is None:
                continue
            times = cached.sent.get(peer, 0)
            if times >= self.config.iwant_repeats_max:
                self.punish(peer, Offence.GOSSIP_FLOOD)
                return
            if state.outbox.is_crowded:
                self.stats.gossip_dropped += 1
                return
            cached.sent[peer] = times + 1
            self.stats.iwant_served += 1
            self._send_data(peer, self._chunk(cached, message_id[-8:]))

    def message(self, peer: PeerId, message: WireMessage) -> bool:
        """Judge, deliver and forward one message that `receive` returned.

        Returns True if it was new and good.
        """
        state = self._peers.get(peer)
        if state is None or message.topic not in self._mesh or self._is_graylisted(state):
            self.stats.ignored += 1
            return False
        message_id = message.id
        self._promises.pop(message_id, None)
        if message_id in self._seen:
            self.stats.duplicates += 1
            return False
        if message.author == self._me_bytes:
            self.stats.ignored += 1  # our own, from before a restart
            return False
        if self.order.is_stale(message.author, message.topic, message.seqno):
            self.stats.stale += 1
            return False
        unsigned = message.signed()
        publisher = self._check(message, unsigned)
        count = 0 if publisher is None else self._count(message)
        if publisher is None or not count:
            self.stats.invalid += 1
            self.punish(peer, Offence.INVALID_MESSAGE)
            return False
        now = self._now()
        self._seen.add(message_id, now)
        chunk = publish_chunk(unsigned, message.signature, message.key)
        self._cache.put(message_id, message.topic, b"", chunk)
        for other in self._forward_to(message.topic):
            if other != peer and other != publisher:
                self.stats.forwarded += 1
                self._send_data(other, chunk)
        received = Received(message.topic, message.data, publisher, message.seqno, count)
        self.order.push(
            message.author,
            message.topic,
            message.seqno,
            received,
            len(message.data),
            now,
            count=count,
        )
        return True

    def _count(self, message: WireMessage) -> int:
        """How many messages it holds; 0 if it is a frame that is none, or where there are none."""
        if message.topic.endswith(ASKED):
            return 0
        if not message.topic.endswith(frames.FRAMED):
            return 1
        number = number_of(message.seqno)
        try:
            found = frames.decode(message.data)
        except (ValueError, InvalidArgument):
            return 0
        count, topic = len(found.lengths), message.topic.removesuffix(frames.FRAMED)
        # A subject of another mesh is forged; where nobody shares it, it is no subject.
        if found.subject and self.prefix + mesh(found.subject) != topic:
            return 0
        if bool(found.subject) is not is_shared(topic):
            return 0
        if number is None or (number & COUNTER_MAX) + count > COUNTER_MAX + 1:
            return 0
        return count

    def _forward_to(self, topic: str) -> Iterable[PeerId]:
        mesh = self._mesh[topic]
        flood = [p for p in self._by_topic.get(topic, ()) if self._peers[p].protocol == FLOODSUB]
        return [*mesh, *flood]

    def _check(self, message: WireMessage, unsigned: bytes) -> PeerId | None:
        """Whose message it is, or None if it does not prove that. Ed25519 keys only."""
        if (
            len(message.seqno) != 8
            or len(message.signature) != 64
            or len(message.data) > self._bytes_max(message.topic)
        ):
            return None
        publisher, public = self._author(message.author)
        if public is None or (message.key and message.key != _ED25519_KEY_PB + public):
            return None
        signed = SIGN_DOMAIN + frames.signed(message.topic, unsigned)
        return publisher if verify(public, message.signature, signed) else None

    def _author(self, author: bytes) -> tuple[PeerId, bytes | None]:
        if (known := self._authors.get(author)) is not None:
            self._authors.move_to_end(author)
            return known
        try:
            peer = PeerId.from_multihash(author)
            public = peer.public_key
        except ValueError:
            return PeerId(), None
        self._authors[author] = peer, public
        if len(self._authors) > AUTHORS_MAX:
            self._authors.popitem(last=False)
        return peer, public

    def _deliver(self, received: Received) -> None:
        if received.topic in self._mesh:
            self.stats.delivered += received.count
            self._deliver_to_node(received)

    # --- time ---

    def heartbeat(self) -> None:
        """To be called every `heartbeat_s`: keeps the meshes, sends gossip, forgets what is old."""
        now = self._now()
        self._seen.expire(now)
        self.order.expire(now)
        self._expire_promises(now)
        for state in self._peers.values():
            state.ihave_messages = state.asked = 0
            for table in (state.backoff, state.pruned_at):
                horizon = now - (_BACKOFF_SLACK_S if table is state.backoff else _GRAFT_FLOOD_S)
                for topic in [t for t, at in table.items() if at < horizon]:
                    del table[topic]
        for topic in [t for t, until in self._left.items() if until <= now]:
            del self._left[topic]
        for topic in [t for t, until in self._fanout_until.items() if until <= now]:
            del self._fanout_until[topic]
            self._fanout.pop(topic, None)
        recent = self._cache.recent()
        for topic in self._mesh:
            self._keep_mesh(topic)
        for topic, fanout in self._fanout.items():
            self._fill_fanout(topic, fanout)
        for topic, ids in recent.items():
            self._gossip(topic, ids)
        self._cache.shift()

    def expire_holds(self) -> None:
        """To be called at `order.deadline`."""
        self.order.expire(self._now())

    def _expire_promises(self, now: float) -> None:
        broken: dict[PeerId, int] = {}
        for message_id, (peer, until) in list(self._promises.items()):
            if until <= now:
                del self._promises[message_id]
                broken[peer] = broken.get(peer, 0) + 1
        for peer, count in broken.items():
            # One penalty a heartbeat: a peer that was merely crowded breaks many at once.
            self.stats.promises_broken += count
            self.punish(peer, Offence.BROKEN_PROMISE)

    def _keep_mesh(self, topic: str) -> None:
        mesh, config = self._mesh[topic], self.config
        for peer in [p for p in mesh if not self._is_trusted(self._peers[p])]:
            self._prune(topic, peer)
        if len(mesh) < config.mesh_d_low:
            self._graft_some(topic, config.mesh_d - len(mesh), outbound_only=False)
        if len(mesh) > config.mesh_d_high:
            ranked = list(mesh)
            self._rng.shuffle(ranked)
            ranked.sort(key=lambda p: self._decayed(self._peers[p]))
            outbound = [p for p in ranked if self._peers[p].outbound][: config.mesh_d_out]
            keep = dict.fromkeys([*outbound, *ranked][: config.mesh_d + len(outbound)])
            kept = list(keep)[: config.mesh_d]
            for peer in [p for p in mesh if p not in kept]:
                self._prune(topic, peer)
        outbound_count = sum(self._peers[p].outbound for p in mesh)
        if config.mesh_d_low <= len(mesh) and outbound_count < config.mesh_d_out:
            self._graft_some(topic, config.mesh_d_out - outbound_count, outbound_only=True)

    def _graft_some(self, topic: str, count: int, *, outbound_only: bool) -> None:
        eligible = [
            p
            for p in self._by_topic.get(topic, ())
            if self._may_graft(topic, p) and (not outbound_only or self._peers[p].outbound)
        ]
        for peer in self._rng.sample(eligible, min(count, len(eligible))):
            self._graft(topic, peer)

    def _gossip(self, topic: str, ids: list[bytes]) -> None:
        config = self.config
        excluded = self._mesh.get(topic) or self._fanout.get(topic, {})
        eligible = [
            p
            for p in self._by_topic.get(topic, ())
            if p not in excluded
            and self._peers[p].protocol in (MESHSUB_11, MESHSUB_10)
            and self._is_trusted(self._peers[p])
        ]
        count = max(config.gossip_d, math.ceil(config.gossip_factor * len(eligible)))
        for peer in self._rng.sample(eligible, min(count, len(eligible))):
            named = ids
            if len(ids) > config.ihave_ids_max:  # a sample for each peer; their union is more
                chosen = sorted(self._rng.sample(range(len(ids)), config.ihave_ids_max))
                named = [ids[i] for i in chosen]
            state = self._peers[peer]
            for at in range(0, len(named), IHAVE_IDS_PER_ENTRY):
                if not self._send_gossip(
                    peer, state, ihave_chunk(topic, named[at : at + IHAVE_IDS_PER_ENTRY])
                ):
                    break
