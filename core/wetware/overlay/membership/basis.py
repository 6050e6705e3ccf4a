"""What the parts of SWIM share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections import Counter

    from wetware.overlay.membership.awareness import Awareness
    from wetware.overlay.membership.config import MembershipConfig
    from wetware.overlay.membership.gossip import Gossip
    from wetware.overlay.membership.table import Table
    from wetware.overlay.membership.timers import Timers


@dataclass(frozen=True, slots=True)
class Basis:
    """The setting, the table, and the way out."""

    config: MembershipConfig
    rng: random.Random
    unix_ms: Callable[[], int]
    timers: Timers
    table: Table
    gossip: Gossip
    awareness: Awareness
    counters: Counter[str]
