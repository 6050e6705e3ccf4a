"""Bounds per address or peer: rates, places, and lines of log. Every table has a limit.

For whoever serves strangers: the Gate, admission, the link.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

from wetware.errors import LimitExceeded

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def address_key(address: str) -> str:
    """What limits per address count: an IPv4 address, or the /64 that one IPv6 host owns."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.IPv6Network((address, 64), strict=False).network_address)
    except ValueError:
        return address


def network_key(address: str) -> str:
    """The network of an address that one owner likely has: the /24 of IPv4, the /64 of IPv6."""
    key = address_key(address)
    return key if ":" in key else key.rpartition(".")[0]


def less(counter: Counter[K], key: K, count: int = 1) -> None:
    """Fewer of `key`; what is down to none is forgotten, so that the counter is as long."""
    counter[key] -= count
    if not counter[key]:
        del counter[key]


class TokenBucket:
    """Admits `burst` at once and `per_s` sustained.

    Args:
        per_s: Tokens that come back in a second.
        burst: Tokens that can be saved up.
        monotonic: Seconds that never go back.
        full: Whether all of `burst` is there at the start.
    """

    __slots__ = ("_at", "_burst", "_monotonic", "_per_s", "_tokens")

    def __init__(
        self,
        per_s: float,
        burst: float,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        full: bool = True,
    ) -> None:
        self._per_s, self._burst, self._monotonic = per_s, float(burst), monotonic
        self._tokens, self._at = self._burst if full else 0.0, monotonic()

    def wait_s(self, count: float = 1.0) -> float:
        """Until there are `count` tokens; 0 if there are."""
        now = self._monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        return max(0.0, count - self._tokens) / self._per_s

    def take(self, count: float = 1.0) -> bool:
        """Spend `count` tokens; False, and none spent, if there are fewer."""
        if self.wait_s(count):
            return False
        self._tokens -= count
        return True

    def spend(self, count: float) -> None:
        """Spend more than there is, maybe; a negative count gives back what was taken."""
        self._tokens = min(self._burst, self._tokens - count)


class Rates:
    """A token bucket for each key.

    Args:
        per_s: See TokenBucket.
        burst: See TokenBucket.
        keys_max: Keys that are remembered; the longest silent one makes room, and starts afresh.
        monotonic: Seconds that never go back.
    """

    def __init__(
        self, per_s: float, burst: float, keys_max: int, monotonic: Callable[[], float]
    ) -> None:
        self._per_s, self._burst, self._keys_max = per_s, burst, keys_max
        self._monotonic = monotonic
        self._seen: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def take(self, key: Hashable) -> bool:
        """Spend a token of `key`; False if it has none."""
        if (bucket := self._seen.pop(key, None)) is None:
            bucket = TokenBucket(self._per_s, self._burst, self._monotonic)
        self._seen[key] = bucket
        while len(self._seen) > self._keys_max:
            self._seen.popitem(last=False)
        return bucket.take()

    def give_back(self, key: Hashable) -> None:
        """What the token was spent for turned out well: it does not count."""
        if (bucket := self._seen.get(key)) is not None:
            bucket.spend(-1)


class Recent(Generic[K, V]):
    """What was put in less than `ttl_s` ago; of more than `entries_max` the oldest make room.

    Args:
        ttl_s: How long an entry is known.
        entries_max: How many are.
        monotonic: Seconds that never go back.
    """

    def __init__(self, ttl_s: float, entries_max: int, monotonic: Callable[[], float]) -> None:
        self._ttl_s, self._entries_max, self._monotonic = ttl_s, entries_max, monotonic
        self._entries: OrderedDict[K, tuple[V, float]] = OrderedDict()  # with its end

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        entry = self._entries.get(key)
        if entry is not None and self._monotonic() >= entry[1]:
            del self._entries[key]
            return False
        return entry is not None

    def get(self, key: K) -> V | None:
        return self._entries[key][0] if key in self else None

    def put(self, key: K, value: V) -> None:
        """The entry is known from now on, whatever was put under its key before."""
        self._entries[key] = value, self._monotonic() + self._ttl_s
        self._entries.move_to_end(key)
        while len(self._entries) > self._entries_max:
            self._entries.popitem(last=False)

    def discard(self, key: K) -> None:
        self._entries.pop(key, None)


class Throttle:
    """What is logged about each key: so many lines a minute, and how many were left out.

    Args:
        per_minute: Lines.
        keys_max: See Rates.
        monotonic: See Rates.
    """

    def __init__(self, per_minute: int, keys_max: int, monotonic: Callable[[], float]) -> None:
        self._rates = Rates(per_minute / 60, per_minute, keys_max, monotonic)
        self._keys_max = keys_max
        self._left_out: OrderedDict[Hashable, int] = OrderedDict()

    def lines(self, key: Hashable) -> int | None:
        """None: do not log. Else how many lines about `key` were left out before this one."""
        if self._rates.take(key):
            return self._left_out.pop(key, 0)
        self._left_out[key] = self._left_out.pop(key, 0) + 1
        while len(self._left_out) > self._keys_max:
            self._left_out.popitem(last=False)
        return None


class Claim(NamedTuple):
    """One of the counts that a place is taken in: `key` may have `limit` places.

    `message` tells who is refused, and names the limit.
    """

    key: Hashable
    limit: int
    message: str


class Places:
    """How many of something go on: per connection, per address, in all."""

    def __init__(self) -> None:
        self._taken: Counter[Hashable] = Counter()

    @contextlib.contextmanager
    def hold(self, *claims: Claim) -> Iterator[None]:
        """Take a place in every count, or raise LimitExceeded and take none."""
        for claim in claims:
            if self._taken[claim.key] >= claim.limit:
                raise LimitExceeded(claim.message)
        for claim in claims:
            self._taken[claim.key] += 1
        try:
            yield
        finally:
            for claim in claims:
                less(self._taken, claim.key)

    def __bool__(self) -> bool:
        return bool(self._taken)
