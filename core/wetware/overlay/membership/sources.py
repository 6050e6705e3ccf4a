"""What is known of peers as senders, members or not yet: what they may send, and when they did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from wetware.base.bounds import TokenBucket

if TYPE_CHECKING:
    from wetware.overlay.membership.config import MembershipConfig

SOURCE_IDLE_S: Final = 60.0
"""A peer's allowances are full again long before; what is known of it is forgotten then."""

Want = tuple[bytes, int, int]
"""A node and the version of its record that was announced; (digest, FACT, 0) for a fact."""
FACT: Final = -1


@dataclass(slots=True, eq=False)
class Source:
    """One peer."""

    key: bytes
    frames: TokenBucket
    records: TokenBucket
    claims: TokenBucket
    seen_at: float
    connected: bool = False
    synced_at: float = -math.inf
    sync_since: float | None = None  # since when one is planned
    told_at: float = -math.inf  # what is said of it
    shown_at: float = -math.inf  # this node's own record
    queue: dict[Want, None] = field(default_factory=dict)  # to be asked for
    asked: dict[Want, None] | None = None  # in flight
    silences: int = 0

    def charge(self, nbytes: int) -> bool:
        """What a peer makes this node send counts as if it had sent it."""
        return self.frames.take(nbytes >> 10)


class Sources:
    """The peers that have sent something, by key."""

    def __init__(self, config: MembershipConfig, now: Callable[[], float]) -> None:
        self._config, self._now = config, now
        self._sources: dict[bytes, Source] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def get(self, key: bytes) -> Source | None:
        return self._sources.get(key)

    def seen(self, key: bytes) -> Source:
        """The source with this key, new if need be; it is remembered for a while."""
        source, now = self._sources.get(key), self._now()
        if source is None:
            config = self._config
            source = self._sources[key] = Source(
                key,
                TokenBucket(config.frames_per_s, config.frames_burst, self._now),
                TokenBucket(config.records_per_s, config.records_burst, self._now),
                TokenBucket(config.claims_per_s, config.claims_burst, self._now),
                now,
            )
        source.seen_at = now
        return source

    def is_connected(self, key: bytes) -> bool:
        source = self._sources.get(key)
        return source is not None and source.connected

    def reap(self) -> None:
        """Forget those that are silent, and of which nothing is expected."""
        horizon = self._now() - SOURCE_IDLE_S
        for key, source in list(self._sources.items()):
            busy = source.connected or source.asked or source.queue
            if source.seen_at < horizon and not busy and source.sync_since is None:
                del self._sources[key]
