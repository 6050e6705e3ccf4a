"""Whether the DHT is used."""

from __future__ import annotations

from dataclasses import dataclass

from wetware.hookspecs import setting


@dataclass(frozen=True, slots=True)
class DhtConfig:
    """Nodes of a cluster find each other in libp2p's distributed hash table."""

    enabled: bool = setting(True, "False: nothing is announced in the table, and it is not asked.")
