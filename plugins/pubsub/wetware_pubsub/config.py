"""Every limit of the plugin, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from wetware.hookspecs import setting


@dataclass(frozen=True, slots=True)
class PubSubConfig:
    """Topics and their messages.

    What `setting` makes is in `[plugins.pubsub]` of ww.toml.

    Attributes:
        topic_chars_max: Length of a topic's name.
        buffer_messages_default: Messages that a subscription buffers unless it says otherwise: what
            `buffer_bytes_max` holds of about a hundred bytes each.
        buffer_messages_max: The most that a subscription may ask for.
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
        fanout_s: How long peers are remembered for a topic that is only published to.
        seen_s: How long a message ID is remembered. 120 s, as in go and js.
        seen_max: Message IDs remembered, about 16 MiB of them.
        prune_backoff_s: No GRAFT for so long after a PRUNE. 60 s, as in the specification.
        unsubscribe_backoff_s: The same after leaving a topic. 10 s.
        ihave_ids_max: Message IDs offered to a peer, and accepted from one, a heartbeat.
        ihave_messages_max: IHAVE messages accepted from a peer a heartbeat.
        iwant_repeats_max: Times that one message is sent to one peer on IWANT.
        iwant_s: How long a peer that offered a message may take to send it before that counts as a
            broken promise.
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

    message_bytes_max: int = setting(
        512 << 10,
        "Data of one message; the same on all nodes. An RPC to a client holds at least one, and "
        "stays below 1 MiB, which is also go-libp2p's limit for a GossipSub frame.",
        min=1,
        max=768 << 10,
    )
    topics_max: int = setting(
        4096,
        "Topics with a local subscriber, over all sessions: each costs an announcement to every "
        "peer.",
    )
    subscriptions_max: int = setting(8192, "Subscriptions over all sessions.")
    subscriptions_per_principal_max: int = setting(
        1024, "Subscriptions of one principal, over all its sessions."
    )
    buffer_bytes_max: int = setting(8 << 20, "Memory for what one subscription buffers.")
    history_bytes_max: int = setting(
        32 << 20, "Memory for messages that other nodes may still ask for; older ones go first."
    )
    queue_bytes_max: int = setting(
        8 << 20,
        "Memory for what waits to be sent to one node. One that falls behind by more loses its "
        "stream and starts again; gossip is dropped from half of it on.",
    )
    flood_publish: bool = setting(
        True,
        "Send own messages to every subscribed node, not to a few alone: no node can censor this "
        "one, and latency is one hop. Costs bandwidth with many nodes.",
    )
    topic_chars_max: int = 128
    buffer_messages_default: int = 65_536
    buffer_messages_max: int = 1 << 20
    mesh_d: int = 6
    mesh_d_low: int = 5
    mesh_d_high: int = 12
    mesh_d_out: int = 2
    gossip_d: int = 6
    gossip_factor: float = 0.25
    heartbeat_s: float = 1.0
    history_windows: int = 5
    gossip_windows: int = 3
    fanout_s: float = 60.0
    seen_s: float = 120.0
    seen_max: int = 131_072
    prune_backoff_s: float = 60.0
    unsubscribe_backoff_s: float = 10.0
    ihave_ids_max: int = 5000
    ihave_messages_max: int = 10
    iwant_repeats_max: int = 3
    iwant_s: float = 3.0
    gossip_bytes_max: int = 512 << 10
    publish_wait_s: float = 5.0
    stall_s: float = 10.0
    peer_topics_max: int = 4096
    penalty_gossip: float = 20.0
    penalty_graylist: float = 80.0
    penalty_half_life_s: float = 60.0
    hold_s: float = 2.5
    held_messages_max: int = 4096
    held_bytes_max: int = 16 << 20
    publishers_max: int = 16_384

    def __post_init__(self) -> None:
        if self.queue_bytes_max < 2 * self.message_bytes_max:
            raise ValueError("queue_bytes_max must hold two messages of message_bytes_max")
