"""Lifeguard's local health: a node that is slow itself gives others more time."""

from __future__ import annotations


class Awareness:
    """How much this node doubts itself.

    Args:
        levels: `awareness_max` of the configuration.

    Attributes:
        score: 0 when this node answers and is answered in time; up to `levels` - 1.
    """

    def __init__(self, levels: int) -> None:
        self._levels = levels
        self.score = 0

    def add(self, delta: int) -> None:
        """Negative is better, as in the paper."""
        self.score = min(self._levels - 1, max(0, self.score + delta))

    def scaled(self, seconds: float) -> float:
        """A time in which others have to answer."""
        return seconds * (1 + self.score)
