"""Two streams tied together: order, and what waits where one end takes nothing."""

from __future__ import annotations

import os
import tracemalloc
from typing import Any

from wetware.base.bounds import TokenBucket
from wetware.overlay.splice import _Way

KIB, MIB = 1 << 10, 1 << 20


class Target:
    """Takes as many bytes as there is room for."""

    def __init__(self) -> None:
        self.room, self.got = 0, bytearray()

    def write_nowait(self, data: Any) -> int:
        taken = bytes(data[: self.room])
        self.room -= len(taken)
        self.got += taken
        return len(taken)


class Source:
    def __init__(self) -> None:
        self.credited = 0

    def consumed(self, count: int) -> None:
        self.credited += count


def way() -> tuple[_Way, Source, Target]:
    source, target, pace = Source(), Target(), TokenBucket(1 << 40, 1 << 40)
    stuck: Any = _Way(source, target, lambda: pace, lambda *_: None)  # type: ignore[arg-type]
    return stuck, source, target


def test_small_pieces_that_wait_do_not_keep_the_messages_that_they_came_in() -> None:
    stuck, _, _ = way()
    tracemalloc.start()
    try:
        for _ in range(1000):
            stuck.data(memoryview(bytes(64 * KIB))[:1])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < MIB


def test_what_waited_leaves_in_order_and_is_credited_as_it_does() -> None:
    stuck, source, target = way()
    sizes = [1, 100, 64 * KIB, 5, 20 * KIB, 15 * KIB, 15 * KIB, 3]
    said = os.urandom(sum(sizes))
    at = 0
    for size in sizes:
        stuck.data(memoryview(said)[at : at + size])
        at += size
    while len(target.got) < len(said):
        target.room = 10_000
        stuck.writable()
        assert source.credited == len(target.got)
    assert target.got == said
