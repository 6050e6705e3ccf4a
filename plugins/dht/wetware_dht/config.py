"""`[plugins.dht]`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DhtConfig:
    """`[plugins.dht]`.

    Attributes:
        enabled: False: nothing is announced in the table, and it is not asked.
    """

    enabled: bool = field(default=True, metadata={"help": "Use the DHT for discovery at all."})
