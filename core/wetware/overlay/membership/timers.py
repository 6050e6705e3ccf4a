"""What is to be done later, driven from outside."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count


class Timers:
    """Calls and when they are due; of those due at one time the one planned first comes first.

    Args:
        now: Monotonic seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Callable[..., object], tuple[object, ...]]] = []
        self._order = count()
        self._stopped = False

    @property
    def due(self) -> float:
        """When the next call is due; infinity where none is planned."""
        return self._heap[0][0] if self._heap else math.inf

    def at(self, when: float, call: Callable[..., object], *args: object) -> None:
        if not self._stopped:
            heapq.heappush(self._heap, (when, next(self._order), call, args))

    def after(self, seconds: float, call: Callable[..., object], *args: object) -> None:
        self.at(self.now() + seconds, call, *args)

    def run(self) -> None:
        """Make the calls that are due."""
        now = self.now()
        while self._heap and self._heap[0][0] <= now:
            _, _, call, args = heapq.heappop(self._heap)
            call(*args)

    def stop(self) -> None:
        """Forget what is planned, and plan nothing more."""
        self._stopped = True
        self._heap.clear()
