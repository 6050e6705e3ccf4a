"""When a node's clock may judge the ends of grants: not to know is no leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from wetware.broker.clock import (
    COMPARED_S_MAX,
    MEET_S,
    NOT_FOR_LONG,
    NOT_YET,
    Comparison,
    SteadyClock,
)
from wetware.broker.store import GrantStore

BOUND_S = 30.0


class Hand:
    """A machine's clock in hand; `glitch_s` moves the wall clock alone."""

    def __init__(self) -> None:
        self.at, self.glitch_s = 1000.0, 0.0

    def time(self) -> float:
        return 1_800_000_000.0 + self.at + self.glitch_s

    def monotonic(self) -> float:
        return self.at


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def comparison(hand: Hand) -> Comparison:
    return Comparison(SteadyClock(hand), BOUND_S)


def test_a_node_alone_judges_by_its_own(comparison: Comparison) -> None:
    assert comparison.judge(None, alone=True) == ""


def test_the_first_that_it_meets_is_in_nobody_s_way(hand: Hand, comparison: Comparison) -> None:
    hand.at += 10 * COMPARED_S_MAX
    assert comparison.judge(None, alone=True) == ""
    hand.at += 1
    assert comparison.judge(None, alone=False) == ""  # it joins, and was not compared yet


def test_before_another_was_compared_nothing_is_judged(hand: Hand, comparison: Comparison) -> None:
    assert comparison.judge(None, alone=False) == NOT_YET
    assert comparison.judge(0.2, alone=False) == ""


def test_nobody_to_be_reached_is_borne_for_a_day(hand: Hand, comparison: Comparison) -> None:
    assert comparison.judge(None, alone=False) == NOT_YET
    hand.at += MEET_S
    assert comparison.judge(None, alone=False) == ""
    hand.at += COMPARED_S_MAX - 1
    assert comparison.judge(None, alone=False) == ""
    hand.at += 1
    assert comparison.judge(None, alone=False) == NOT_FOR_LONG
    assert comparison.judge(-0.1, alone=False) == ""
    hand.at += COMPARED_S_MAX
    assert comparison.judge(None, alone=False) == NOT_FOR_LONG
    assert comparison.judge(None, alone=True) == ""  # the others were evicted


@pytest.mark.parametrize("ahead_s", [BOUND_S + 1, -BOUND_S - 1, 7200.0])
def test_a_wrong_clock_is_not_right_again_when_its_witness_leaves(
    hand: Hand, comparison: Comparison, ahead_s: float
) -> None:
    assert f"{ahead_s:+.0f} s" in comparison.judge(ahead_s, alone=False)
    hand.at += 3 * COMPARED_S_MAX
    assert f"{ahead_s:+.0f} s" in comparison.judge(None, alone=False)
    assert comparison.judge(BOUND_S, alone=False) == ""


def test_a_glitch_is_mended_by_who_has_looked(hand: Hand) -> None:
    clock = SteadyClock(hand)
    comparison = Comparison(clock, BOUND_S)
    hand.glitch_s = 3600.0
    assert clock.time() == hand.time()
    hand.glitch_s = 0.0
    assert "set back by 3600 s" in comparison.judge(0.0, alone=False)
    comparison.trust()
    assert clock.time() == hand.time()
    assert comparison.judge(0.0, alone=False) == ""
    hand.at += 10
    assert clock.time() == hand.time()


@pytest.mark.anyio
async def test_what_is_mended_stays_so_over_a_restart(tmp_path: Path, hand: Hand) -> None:
    hand.glitch_s = 3600.0
    store = GrantStore(tmp_path, hand)
    await store.save_clock()
    store.close()
    hand.glitch_s = 0.0
    store = GrantStore(tmp_path, hand)
    assert store.clock.ahead_s == pytest.approx(3600.0)
    store.clock.go_back()
    await store.save_clock()
    store.close()
    store = GrantStore(tmp_path, hand)
    assert store.clock.ahead_s == 0.0
    store.close()
