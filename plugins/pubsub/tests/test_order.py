"""Message numbers, and the order that they give back."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from wetware_pubsub.order import Orderer, Sequencer, number_of

A = b"author"


def _orderer(out: list[int], **limits: int) -> Orderer[int]:
    return Orderer(
        out.append,
        hold_s=2.0,
        held_max=limits.get("held_max", 100),
        held_bytes_max=limits.get("held_bytes_max", 10_000),
        lines_max=limits.get("lines_max", 10),
    )


def _seqnos(count: int, topic: str = "t") -> list[bytes]:
    sequencer = Sequencer(lambda: 1.8e9)
    return [sequencer.next(topic) for _ in range(count)]


def test_numbers_have_no_holes_and_rise_over_topics_and_blocks() -> None:
    sequencer = Sequencer(lambda: 1.8e9)
    numbers = [number_of(sequencer.next("a")) for _ in range(70_000)]
    assert all(n is not None for n in numbers)
    jumps = [(x, y) for x, y in itertools.pairwise(numbers) if y != x + 1]  # type: ignore[operator]
    # 65,536 in a block; the next block begins with counter 0, and no other topic was between.
    assert jumps == []
    other = number_of(sequencer.next("b"))
    assert other is not None
    assert other > max(n for n in numbers if n is not None)
    assert other & 0xFFFF == 0


def test_numbers_never_repeat_over_restarts_with_the_clock_set_back() -> None:
    floor = 0
    used: set[bytes] = set()
    for time in (1.8e9, 1.8e9, 1.7e9, 1.6e9, 1.8e9 + 1):
        reserved = [floor]
        sequencer = Sequencer(lambda now=time: now, floor=floor, reserve=reserved.append)
        new = {sequencer.next(f"topic {i % 50}") for i in range(500)}
        assert len(new) == 500
        assert not used or min(new) > max(used)
        used |= new
        floor = max(reserved)


@given(st.permutations(list(range(20))), st.integers(0, 19))
def test_any_order_of_arrival_is_put_right(arrival: list[int], first: int) -> None:
    out: list[int] = []
    orderer, seqnos = _orderer(out), _seqnos(20)
    # Whatever arrives first is the beginning; what was before it is stale.
    arrival = [first, *(n for n in arrival if n != first)]
    for n in arrival:
        assert orderer.push(A, "t", seqnos[n], n, 1, now=0.0) == (n >= first)
        orderer.push(A, "t", seqnos[n], n, 1, now=0.0)  # a duplicate
    assert out == list(range(first, 20))
    assert orderer.held == 0
    assert orderer.deadline is None


def test_a_gap_is_waited_for_and_then_given_up() -> None:
    out: list[int] = []
    orderer, seqnos = _orderer(out), _seqnos(6)
    for n in (0, 2, 5):
        orderer.push(A, "t", seqnos[n], n, 1, now=10.0)
    assert out == [0]
    assert orderer.deadline == 12.0
    orderer.expire(11.9)
    assert out == [0]
    orderer.expire(12.0)
    assert out == [0, 2]
    assert orderer.missed == 1
    assert not orderer.push(A, "t", seqnos[1], 1, 1, now=12.5)
    orderer.push(A, "t", seqnos[3], 3, 1, now=12.5)
    assert out == [0, 2, 3]
    orderer.expire(14.0)
    assert out == [0, 2, 3, 5]
    assert orderer.missed == 2


def test_a_new_block_is_not_waited_for() -> None:
    out: list[int] = []
    orderer = _orderer(out)
    before, after = Sequencer(lambda: 1.8e9), Sequencer(lambda: 1.8e9 + 1)
    orderer.push(A, "t", before.next("t"), 1, 1, now=0.0)
    orderer.push(A, "t", after.next("t"), 2, 1, now=0.0)
    orderer.push(A, "t", before.next("t"), 3, 1, now=0.0)  # replayed from before the restart
    assert out == [1, 2]


def test_after_a_pause_it_goes_on_from_what_comes_next_without_replays() -> None:
    out: list[int] = []
    orderer, seqnos = _orderer(out), _seqnos(10)
    for n in (0, 1, 3):
        orderer.push(A, "t", seqnos[n], n, 1, now=0.0)
        orderer.push(A, "u", seqnos[n], -n, 1, now=0.0)
    assert orderer.is_live(A, "t")
    orderer.resume("t")
    assert not orderer.is_live(A, "t")
    assert out == [0, 0, 1, -1, 3], "what was held is let go"
    assert not orderer.push(A, "t", seqnos[2], 2, 1, now=1.0)
    assert orderer.push(A, "t", seqnos[6], 6, 1, now=1.0)
    assert orderer.push(A, "t", seqnos[8], 8, 1, now=1.0)
    assert out[5:] == [6]
    assert orderer.is_live(A, "t")
    assert not orderer.is_live(A, "v")


def test_a_publisher_that_begins_anew_is_not_waited_for() -> None:
    out: list[int] = []
    orderer, sequencer = _orderer(out), Sequencer(lambda: 1.8e9)
    numbers = [sequencer.next("t") for _ in range(9)]
    orderer.push(A, "t", numbers[0], 0, 1, now=0.0)
    sequencer.begin_anew("t")
    orderer.push(A, "t", sequencer.next("t"), 9, 1, now=0.0)
    assert out == [0, 9]
    assert not orderer.push(A, "t", numbers[8], 8, 1, now=0.0), "no replay"


def test_what_is_held_is_bounded() -> None:
    out: list[int] = []
    orderer, seqnos = _orderer(out, held_max=5), _seqnos(50)
    orderer.push(A, "t", seqnos[0], 0, 1, now=0.0)
    for n in range(2, 50):
        orderer.push(A, "t", seqnos[n], n, 1, now=0.0)
        assert orderer.held <= 5
    assert out == [0, *range(2, 50)]
    out.clear()
    orderer = _orderer(out, held_bytes_max=1000)
    orderer.push(A, "t", seqnos[0], 0, 1, now=0.0)
    orderer.push(A, "t", seqnos[2], 2, 600, now=0.0)
    orderer.push(A, "t", seqnos[4], 4, 600, now=0.0)
    assert out == [0, 2]


def test_publishers_are_forgotten_beyond_the_limit_with_nothing_lost() -> None:
    out: list[int] = []
    orderer, seqnos = _orderer(out, lines_max=2), _seqnos(3)
    orderer.push(b"1", "t", seqnos[0], 10, 1, now=0.0)
    orderer.push(b"1", "t", seqnos[2], 12, 1, now=0.0)
    for author in (b"2", b"3"):
        orderer.push(author, "t", seqnos[0], 0, 1, now=0.0)
    assert out == [10, 0, 12, 0] or out == [10, 0, 0, 12]
    assert orderer.held == 0


@given(st.binary(min_size=8, max_size=8).filter(lambda s: s[0] != 0x77))
def test_foreign_numbers_are_delivered_as_they_come(seqno: bytes) -> None:
    out: list[int] = []
    orderer = _orderer(out)
    for n in range(3):
        assert orderer.push(A, "t", seqno, n, 1, now=0.0)
    assert out == [0, 1, 2]
