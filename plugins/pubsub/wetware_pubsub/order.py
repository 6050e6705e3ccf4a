"""Per-publisher order over a network that has none, and message numbers that allow it.

GossipSub delivers what arrives first, and a message that took another path than its predecessor may
overtake it. A libp2p seqno is eight opaque bytes; ours are laid out so that a receiver sees a gap:

    0x77 | epoch, 40 bits | counter, 16 bits        (big-endian)

A frame has the number of its first message, and takes as many as it holds.
A publisher numbers each topic in blocks: `epoch` (in 1/256 s of Unix time, never given out twice,
over restarts too) names a block, `counter` runs from 0 without holes. So `n + 1` follows `n`, and a
counter of 0 begins anew. A receiver holds what overtook until the gap is filled or `hold_s` is
over, and then goes on; what comes still later, or again, is stale. That is also what stops a replay
of a signed message that the seen-cache has forgotten. Seqnos of other implementations (js: random,
go: one counter for all topics) do not have the mark and are delivered as they arrive.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_MARK = 0x77
_COUNTER_BITS = 16
COUNTER_MAX = (1 << _COUNTER_BITS) - 1
_EPOCH_MAX = (1 << 40) - 1
_NUMBER_MASK = (1 << 56) - 1
EPOCHS_PER_S = 256

RESERVE_EPOCHS = 4096
"""Epochs reserved on disk at a time (16 s of clock): few writes, and a restart never waits."""
TOPICS_MAX = 4096
"""Topics whose block a publisher remembers; a forgotten one begins a new block."""


def number_of(seqno: bytes) -> int | None:
    """The block and counter of one of our seqnos as one number, or None for a foreign seqno."""
    if len(seqno) == 8 and seqno[0] == _MARK:
        return int.from_bytes(seqno, "big") & _NUMBER_MASK
    return None


class Sequencer:
    """Numbers what this node publishes.

    Args:
        time: Unix time in seconds.
        floor: The first epoch that may be used: what `reserve` was last given.
        reserve: Makes durable that epochs below its argument may be in use. Called before they are.
    """

    def __init__(
        self,
        time: Callable[[], float],
        *,
        floor: int = 0,
        reserve: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._time, self._reserve = time, reserve
        self._next_epoch = self._reserved = floor
        self._blocks: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def next(self, topic: str, count: int = 1) -> bytes:
        """The seqno of the next message in `topic`, or of the first of `count` in one block."""
        epoch, last = self._blocks.get(topic, (0, COUNTER_MAX))
        counter = last + 1
        if counter + count > COUNTER_MAX + 1:
            epoch, counter = self._new_epoch(), 0
        self._blocks[topic] = epoch, counter + count - 1
        self._blocks.move_to_end(topic)
        if len(self._blocks) > TOPICS_MAX:
            self._blocks.popitem(last=False)
        number = _MARK << 56 | epoch << _COUNTER_BITS | counter
        return number.to_bytes(8, "big")

    def begin_anew(self, topic: str) -> None:
        """Let nobody wait for what was numbered before."""
        self._blocks.pop(topic, None)

    def _new_epoch(self) -> int:
        epoch = max(self._next_epoch, int(self._time() * EPOCHS_PER_S)) & _EPOCH_MAX
        if epoch >= self._reserved:
            self._reserve(epoch + RESERVE_EPOCHS)
            self._reserved = epoch + RESERVE_EPOCHS
        self._next_epoch = epoch + 1
        return epoch


@dataclass(slots=True)
class _Line(Generic[T]):
    """What is known of one publisher in one topic. `heap` and `held` have the same numbers."""

    last: int
    heap: list[int] = field(default_factory=list)
    held: dict[int, tuple[T, int, int]] = field(default_factory=dict)  # with bytes and count
    deadline: float = 0.0
    resumed: bool = False  # nobody listened for a while: what was missed is no gap


class Orderer(Generic[T]):
    """Puts messages back into their publisher's order.

    Args:
        deliver: Gets the messages, in order.
        hold_s: How long a gap is waited for.
        held_max: Messages held for one publisher and topic; more give the gap up.
        held_bytes_max: Bytes held over all; more give gaps up.
        lines_max: Pairs of publisher and topic remembered; the least recent one is forgotten.

    Attributes:
        missed: Messages whose gap was given up.
    """

    def __init__(
        self,
        deliver: Callable[[T], None],
        *,
        hold_s: float,
        held_max: int,
        held_bytes_max: int,
        lines_max: int,
    ) -> None:
        self._deliver = deliver
        self._hold_s, self._held_max, self._lines_max = hold_s, held_max, lines_max
        self._held_bytes_max = held_bytes_max
        self._held_bytes = 0
        self._lines: OrderedDict[tuple[bytes, str], _Line[T]] = OrderedDict()
        self._holding: dict[tuple[bytes, str], _Line[T]] = {}
        self.missed = 0

    def is_stale(self, author: bytes, topic: str, seqno: bytes) -> bool:
        """Whether it, or a later one of its publisher and topic, was delivered, or it is held."""
        if (number := number_of(seqno)) is None:
            return False
        line = self._lines.get((author, topic))
        return line is not None and (number <= line.last or number in line.held)

    def is_live(self, author: bytes, topic: str) -> bool:
        """Whether the publisher was heard in the topic since that was last subscribed."""
        line = self._lines.get((author, topic))
        return line is not None and not line.resumed

    def resume(self, topic: str) -> None:
        """The topic is subscribed again: go on from whatever comes next, and deliver no replay."""
        for key, line in self._lines.items():
            if key[1] == topic:
                while line.heap:  # of the last subscription: nobody waits for it
                    self._skip(key, line, 0.0)
                line.resumed = True

    def push(
        self,
        author: bytes,
        topic: str,
        seqno: bytes,
        item: T,
        size: int,
        now: float,
        *,
        count: int = 1,
    ) -> bool:
        """Take a message, or `count` in one; True unless it is stale.

        Delivers what is due, maybe nothing yet. `size` is in bytes.
        """
        if (number := number_of(seqno)) is None:
            self._deliver(item)
            return True
        key = (author, topic)
        line = self._lines.get(key)
        if line is None:
            self._lines[key] = _Line(number + count - 1)
            if len(self._lines) > self._lines_max:
                self._forget()
            self._deliver(item)
            return True
        self._lines.move_to_end(key)
        if number <= line.last or number in line.held:
            return False
        follows = number == line.last + 1 or not number & COUNTER_MAX or line.resumed
        if not line.heap and follows:
            line.last = number + count - 1
            line.resumed = False
            self._deliver(item)
            return True
        if not line.heap:
            line.deadline = now + self._hold_s
            self._holding[key] = line
        heapq.heappush(line.heap, number)
        line.held[number] = item, size, count
        self._held_bytes += size
        self._advance(key, line)
        while len(line.heap) > self._held_max:
            self._skip(key, line, now)
        while self._held_bytes > self._held_bytes_max:
            oldest = next(iter(self._holding))
            self._skip(oldest, self._holding[oldest], now)
        return True

    def expire(self, now: float) -> None:
        """Give up the gaps whose time is over."""
        due = [(key, line) for key, line in self._holding.items() if line.deadline <= now]
        for key, line in due:
            self._skip(key, line, now)

    @property
    def deadline(self) -> float | None:
        """When `expire` is due next, or None."""
        return min((line.deadline for line in self._holding.values()), default=None)

    @property
    def held(self) -> int:
        return sum(len(line.heap) for line in self._holding.values())

    def _advance(self, key: tuple[bytes, str], line: _Line[T]) -> None:
        while line.heap:
            number = line.heap[0]
            if number > line.last + 1 and number & COUNTER_MAX:
                return
            heapq.heappop(line.heap)
            item, size, count = line.held.pop(number)
            self._held_bytes -= size
            if number > line.last:  # else it overlaps another one: its publisher lies
                line.last = number + count - 1
                self._deliver(item)
        self._holding.pop(key, None)

    def _skip(self, key: tuple[bytes, str], line: _Line[T], now: float) -> None:
        first = line.heap[0]
        if first >> _COUNTER_BITS == line.last >> _COUNTER_BITS:
            self.missed += first - line.last - 1
        else:  # the lost end of a block has an unknown length; its known part is the new beginning
            self.missed += first & COUNTER_MAX
        line.last = first - 1
        line.deadline = now + self._hold_s
        self._advance(key, line)

    def _forget(self) -> None:
        key, line = self._lines.popitem(last=False)
        while line.heap:
            self._skip(key, line, 0.0)
