"""`[plugins.pubsub]`: every limit of the plugin, with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field


def _option(default: float, text: str) -> float:
    value: float = field(default=default, metadata={"help": text})
    return value


def _count(default: int, text: str) -> int:
    value: int = field(default=default, metadata={"help": text})
    return value


@dataclass(frozen=True, slots=True)
class PubSubConfig:
    """`[plugins.pubsub]`.

    Attributes:
        message_bytes_max: Data of one message. An RPC to a client holds at least one, and stays
            below 1 MiB, which is also go-libp2p's limit for a GossipSub frame.
        topic_chars_max: Length of a topic's name.
        topics_max: Topics with a local subscriber, over all sessions: each costs an announcement to
            every peer.
        subscriptions_max: Subscriptions over all sessions.
        subscriptions_per_principal_max: Subscriptions of one principal, over all its sessions.
        buffer_messages_default: Messages that a subscription buffers unless it says otherwise: half
            a second of a burst at 10,000 a second.
        buffer_messages_max: The most that a subscription may ask for.
        buffer_bytes_max: Bytes that a subscription buffers.
        mesh_d: Peers of a topic's mesh. GossipSub's D: 6 reaches 1,000 nodes in about 4 hops.
        mesh_d_low: Below it the heartbeat grafts. 5, as in go.
        mesh_d_high: Above it the heartbeat prunes. 12, as in go.
        mesh_d_out: Of the mesh, at least so many connections that this node dialled itself, so that
            peers who dial in cannot fill it. Must be < mesh_d_low and ≤ mesh_d / 2.
        gossip_d: Peers outside the mesh that get IHAVE each heartbeat, at least (GossipSub's
            D_lazy).
        gossip_factor: … or this part of them, if that is more. 0.25: any message is offered to all
            but a 0.75³ part of them in three windows.
        heartbeat_s: GossipSub's 1 s.
        history_windows: Heartbeats that a message stays answerable to IWANT.
        gossip_windows: Heartbeats that it is named in IHAVE.
        history_bytes_max: Bytes of messages kept for IWANT; older ones go first.
        fanout_s: How long peers are remembered for a topic that is only published to.
        flood_publish: Send own messages to every subscribed peer, not the mesh alone: no peer can
            censor this node, and latency is one hop. Costs bandwidth with many peers.
        seen_s: How long a message ID is remembered. 120 s, as in go and js.
        seen_max: Message IDs remembered, about 16 MiB of them.
        prune_backoff_s: No GRAFT for so long after a PRUNE. 60 s, as in the specification.
        unsubscribe_backoff_s: The same after leaving a topic. 10 s.
        ihave_ids_max: Message IDs offered to a peer, and accepted from one, a heartbeat.
        ihave_messages_max: IHAVE messages accepted from a peer a heartbeat.
        iwant_repeats_max: Times that one message is sent to one peer on IWANT.
        iwant_s: How long a peer that offered a message may take to send it before that counts as a
            broken promise.
        queue_bytes_max: Bytes that wait to be sent to one peer. A peer that falls behind by more
            loses its stream and starts again; gossip is dropped from half of it on.
        gossip_bytes_max: Bytes of IHAVE and IWANT among them.
        publish_wait_s: How long one publish waits for the slower half of its peers.
        stall_s: A peer that takes no byte for so long while some wait loses its stream.
        peer_topics_max: Topics that one peer may be subscribed to, as far as this node remembers.
        penalty_gossip: From this penalty on a peer's gossip is ignored, and it is pruned.
        penalty_graylist: From this one on everything but its subscriptions is ignored, and nothing
            is sent to it.
        penalty_half_life_s: The time in which a penalty halves.
        hold_s: How long a message waits for one of the same publisher that it overtook. Two
            heartbeats and a round trip: gossip brings it back within that, if anybody has it.
        held_messages_max: Messages that wait so, for one publisher and topic.
        held_bytes_max: Bytes that wait so, in all.
        publishers_max: Pairs of publisher and topic whose last number is remembered.
    """

    message_bytes_max: int = _count(512 << 10, "Data of one message, bytes.")
    topic_chars_max: int = _count(128, "Length of a topic's name.")
    topics_max: int = _count(4096, "Topics with a local subscriber.")
    subscriptions_max: int = _count(8192, "Subscriptions over all sessions.")
    subscriptions_per_principal_max: int = _count(1024, "Subscriptions of one principal.")
    buffer_messages_default: int = _count(4096, "Messages a subscription buffers by default.")
    buffer_messages_max: int = _count(65_536, "Messages a subscription may ask to buffer.")
    buffer_bytes_max: int = _count(8 << 20, "Bytes that a subscription buffers.")
    mesh_d: int = _count(6, "Peers of a topic's mesh.")
    mesh_d_low: int = _count(5, "Below it the heartbeat grafts.")
    mesh_d_high: int = _count(12, "Above it the heartbeat prunes.")
    mesh_d_out: int = _count(2, "Of the mesh, peers that this node dialled.")
    gossip_d: int = _count(6, "Peers that get IHAVE each heartbeat, at least.")
    gossip_factor: float = _option(0.25, "Part of the peers that get IHAVE each heartbeat.")
    heartbeat_s: float = _option(1.0, "Time between two heartbeats.")
    history_windows: int = _count(5, "Heartbeats that a message is kept for IWANT.")
    gossip_windows: int = _count(3, "Heartbeats that a message is named in IHAVE.")
    history_bytes_max: int = _count(32 << 20, "Bytes of messages kept for IWANT.")
    fanout_s: float = _option(60.0, "How long the peers of a topic published to are remembered.")
    flood_publish: bool = field(
        default=True, metadata={"help": "Send own messages to every subscribed peer."}
    )
    seen_s: float = _option(120.0, "How long a message ID is remembered.")
    seen_max: int = _count(131_072, "Message IDs remembered.")
    prune_backoff_s: float = _option(60.0, "No GRAFT for so long after a PRUNE.")
    unsubscribe_backoff_s: float = _option(10.0, "No GRAFT for so long after leaving a topic.")
    ihave_ids_max: int = _count(5000, "Message IDs offered to or taken from a peer a heartbeat.")
    ihave_messages_max: int = _count(10, "IHAVE messages taken from a peer a heartbeat.")
    iwant_repeats_max: int = _count(3, "Times that a message is sent to one peer on IWANT.")
    iwant_s: float = _option(3.0, "Time within which an offered message must come.")
    queue_bytes_max: int = _count(8 << 20, "Bytes that wait to be sent to one peer.")
    gossip_bytes_max: int = _count(512 << 10, "Bytes of gossip that wait to be sent to one peer.")
    publish_wait_s: float = _option(5.0, "How long a publish waits for slow peers.")
    stall_s: float = _option(10.0, "A peer that takes no byte for so long loses its stream.")
    peer_topics_max: int = _count(4096, "Topics of one peer that are remembered.")
    penalty_gossip: float = _option(20.0, "Penalty from which on a peer's gossip is ignored.")
    penalty_graylist: float = _option(80.0, "Penalty from which on a peer is ignored.")
    penalty_half_life_s: float = _option(60.0, "Time in which a penalty halves.")
    hold_s: float = _option(2.5, "How long a message waits for one that it overtook.")
    held_messages_max: int = _count(4096, "Messages of one publisher that wait so.")
    held_bytes_max: int = _count(16 << 20, "Bytes of messages that wait so.")
    publishers_max: int = _count(16_384, "Publishers whose last number is remembered.")

    def __post_init__(self) -> None:
        if not 1 <= self.message_bytes_max <= 768 << 10:
            raise ValueError("message_bytes_max must be between 1 and 786432")
        if not 0 < self.mesh_d_low <= self.mesh_d <= self.mesh_d_high:
            raise ValueError("mesh_d_low ≤ mesh_d ≤ mesh_d_high is required, and mesh_d_low > 0")
        if self.mesh_d_out >= self.mesh_d_low or self.mesh_d_out > self.mesh_d / 2:
            raise ValueError("mesh_d_out must be below mesh_d_low and at most mesh_d / 2")
        if not 0 < self.gossip_windows <= self.history_windows:
            raise ValueError("gossip_windows must be between 1 and history_windows")
        if self.heartbeat_s <= 0:
            raise ValueError("heartbeat_s must be positive")
        if not 0 < self.buffer_messages_default <= self.buffer_messages_max:
            raise ValueError("buffer_messages_default must be between 1 and buffer_messages_max")
        if self.queue_bytes_max < 2 * self.message_bytes_max:
            raise ValueError("queue_bytes_max must hold two messages of message_bytes_max")
