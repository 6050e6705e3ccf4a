"""`[plugins.dht]`: how often the table is written and asked, and every limit with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DhtConfig:
    """`[plugins.dht]`.

    Attributes:
        enabled: False: nothing is announced in the table, and it is not asked.
        provide_s: Time between two announcements. Records live 24 h with their holders; nodes come
            and go faster, libp2p here may restart, and an announcement is a lookup and some writes.
        retry_s_min: Wait after an announcement that nobody took; doubles up to `retry_s_max`.
        retry_s_max: … and its bound.
        lookup_s_min: Time between two lookups while fewer than `peers_few` members are connected;
            doubles up to `lookup_s_max`, and starts again when a member connects or is lost.
        lookup_s_max: … and its bound.
        lookup_s: Time between two lookups otherwise: the members know each other by gossip then.
        peers_few: With fewer connected members than this the node looks for more in earnest.
        settle_s: Wait after a change of the connected members: libp2p takes a moment to ask a new
            one what it speaks, members often come in groups, and one that comes and goes shall not
            keep this node busy.
        again_s: An address is reported at most once in this time.
        seen_max: Addresses that are remembered for it; the oldest go first.
        addrs_max: Addresses taken from one lookup. What it returns is not authenticated, and each
            is dialled.
        addrs_per_peer_max: … and of one peer among them, so that no provider fills the answer.
    """

    enabled: bool = field(default=True, metadata={"help": "Use the DHT for discovery at all."})
    provide_s: float = field(
        default=1800.0,
        metadata={"help": "Time between announcements.", "min": 10, "max": 86_400},
    )
    retry_s_min: float = field(
        default=5.0,
        metadata={"help": "First wait after a failed one.", "min": 0.1, "max": 3600},
    )
    retry_s_max: float = field(
        default=300.0,
        metadata={"help": "Longest wait after a failed one.", "min": 0.1, "max": 86_400},
    )
    lookup_s_min: float = field(
        default=5.0,
        metadata={"help": "First wait between lookups.", "min": 0.1, "max": 3600},
    )
    lookup_s_max: float = field(
        default=300.0,
        metadata={"help": "Longest wait while few are known.", "min": 0.1, "max": 86_400},
    )
    lookup_s: float = field(
        default=900.0,
        metadata={"help": "Wait between lookups otherwise.", "min": 1, "max": 86_400},
    )
    peers_few: int = field(
        default=4, metadata={"help": "Fewer connected members are few.", "min": 0, "max": 1000}
    )
    settle_s: float = field(
        default=1.0, metadata={"help": "Wait after a change of members.", "min": 0.01, "max": 60}
    )
    again_s: float = field(
        default=60.0,
        metadata={"help": "An address is reported once in this time.", "min": 1, "max": 86_400},
    )
    seen_max: int = field(
        default=1024, metadata={"help": "Addresses remembered for it.", "min": 1, "max": 65_536}
    )
    addrs_max: int = field(
        default=128, metadata={"help": "Addresses of one lookup.", "min": 1, "max": 4096}
    )
    addrs_per_peer_max: int = field(
        default=8, metadata={"help": "… of one peer.", "min": 1, "max": 64}
    )

    def __post_init__(self) -> None:
        if self.retry_s_min > self.retry_s_max:
            raise ValueError("retry_s_min must not be above retry_s_max")
        if self.lookup_s_min > self.lookup_s_max:
            raise ValueError("lookup_s_min must not be above lookup_s_max")
