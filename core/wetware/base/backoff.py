"""Pauses between tries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random


class Backoff:
    """Pauses that double from one failure to the next, with jitter, until a success.

    Args:
        s_min: The first pause.
        s_max: The longest one.
        rng: For the jitter: two nodes must not try in step.
    """

    __slots__ = ("_rng", "_s_max", "_s_min", "failures")

    def __init__(self, s_min: float, s_max: float, rng: random.Random) -> None:
        self._s_min, self._s_max, self._rng = s_min, s_max, rng
        self.failures = 0

    def pause_s(self, *, stretch: float = 1.0) -> float:
        """How long to wait now, and the next pause is longer. `stretch` lengthens the longest."""
        ceiling = self._s_max * max(1.0, stretch)
        pause_s = min(ceiling, self._s_min * 2.0 ** min(self.failures, 32))
        self.failures += 1
        return pause_s * self._rng.uniform(0.75, 1.25)

    def reset(self) -> None:
        self.failures = 0
