"""Rates, throttles and places: what they allow, and that their tables do not grow."""

from __future__ import annotations

import contextlib
import json
import sys

import pytest

from wetware.base.bounds import (
    Claim,
    Places,
    Rates,
    Recent,
    Throttle,
    TokenBucket,
    address_key,
    network_key,
)
from wetware.errors import LimitExceeded
from wetware.node import process


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_allows_the_burst_and_then_what_comes_back() -> None:
    clock = Clock()
    rates = Rates(2.0, 3, 16, clock)
    assert [rates.take("a") for _ in range(4)] == [True, True, True, False]
    assert rates.take("b"), "each key has its own"
    clock.now += 0.5
    assert [rates.take("a") for _ in range(2)] == [True, False]
    clock.now += 1000
    assert [rates.take("a") for _ in range(4)] == [True, True, True, False], "never more than burst"


def test_time_in_which_a_bucket_was_full_gives_nothing() -> None:
    clock = Clock()
    bucket = TokenBucket(1.0, 3, clock)
    clock.now += 100
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    assert bucket.wait_s(2) == 2.0
    clock.now += 2
    assert [bucket.take(2), bucket.take()] == [True, False]


def test_a_token_given_back_can_be_spent_and_never_exceeds_the_burst() -> None:
    rates = Rates(0.001, 2, 16, Clock())
    rates.give_back("unknown")
    assert [rates.take("a"), rates.take("a"), rates.take("a")] == [True, True, False]
    for _ in range(5):
        rates.give_back("a")
    assert [rates.take("a"), rates.take("a"), rates.take("a")] == [True, True, False]


def test_the_table_of_rates_is_bounded() -> None:
    rates = Rates(0.001, 1, 8, Clock())
    for key in range(100):
        assert rates.take(key)
    assert len(rates) == 8
    assert not rates.take(99)
    assert rates.take(0), "forgotten, so it starts afresh"


def test_what_is_recent_ends_and_the_oldest_makes_room() -> None:
    clock = Clock()
    recent: Recent[str, int] = Recent(10.0, 2, clock)
    recent.put("a", 1)
    clock.now += 6.0
    recent.put("b", 2)
    assert (recent.get("a"), recent.get("b"), "c" in recent) == (1, 2, False)
    clock.now += 4.0
    assert (recent.get("a"), recent.get("b")) == (None, 2)
    recent.put("a", 3)
    recent.put("c", 4)
    assert ("b" in recent, recent.get("a"), len(recent)) == (False, 3, 2)
    recent.discard("a")
    recent.discard("a")
    assert "a" not in recent


def test_a_throttle_says_how_much_it_left_out() -> None:
    clock = Clock()
    throttle = Throttle(2, 8, clock)
    assert [throttle.lines("a") for _ in range(5)] == [0, 0, None, None, None]
    clock.now += 30
    assert [throttle.lines("a") for _ in range(2)] == [3, None]
    for key in range(100):
        for _ in range(3):
            throttle.lines(key)
    assert len(throttle._left_out) <= 8


def test_a_place_is_taken_in_every_count_or_in_none() -> None:
    places = Places()

    def claims(connection: str) -> tuple[Claim, ...]:
        return Claim(connection, 1, "one per connection"), Claim("all", 2, "two in all")

    with contextlib.ExitStack() as stack:
        stack.enter_context(places.hold(*claims("a")))
        with pytest.raises(LimitExceeded, match="one per connection"):
            stack.enter_context(places.hold(*claims("a")))
        stack.enter_context(places.hold(*claims("b")))
        with pytest.raises(LimitExceeded, match="two in all"):
            stack.enter_context(places.hold(*claims("c")))
        assert places
    assert not places, "nothing is left behind"


def test_an_address_is_an_ip4_address_or_an_ip6_network_of_64_bits() -> None:
    assert address_key("192.0.2.7") != address_key("192.0.2.8")
    assert address_key("2001:db8:1:2::7") == address_key("2001:db8:1:2:ffff::8")
    assert address_key("2001:db8:1:2::7") != address_key("2001:db8:1:3::7")
    assert address_key("not:an:address") == "not:an:address"


def test_a_network_is_a_24_of_ipv4_and_a_64_of_ipv6() -> None:
    assert network_key("192.0.2.7") == network_key("192.0.2.8") != network_key("192.0.3.7")
    assert network_key("2001:db8:1:2::7") == network_key("2001:db8:1:2:ffff::8")
    assert network_key("2001:db8:1:2::7") != network_key("2001:db8:1:3::7")


def test_a_node_sets_the_limit_of_recursion_back() -> None:
    """Where a plugin's import raised it, 100 KB of a peer's brackets would end the process."""
    sys.setrecursionlimit(100_000)
    try:
        process.bound_recursion()
        assert sys.getrecursionlimit() == process.RECURSION_MAX
        with pytest.raises(RecursionError):
            json.loads("[" * 100_000)
    finally:
        sys.setrecursionlimit(process.RECURSION_MAX)
