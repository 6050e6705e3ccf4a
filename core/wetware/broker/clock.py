"""Time as grants are judged by: it never goes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wetware.hookspecs import Clock


class SteadyClock:
    """Unix time that goes on by the monotonic clock, and follows the wall clock only forwards.

    So a wall clock that is set back, at run time or while the node was down, prolongs nothing.

    Args:
        clock: The machine's.
        floor: The latest time known from before, Unix s.
    """

    def __init__(self, clock: Clock, floor: float = 0.0) -> None:
        self._clock = clock
        # (time, monotonic) at one moment; assigned as one: two threads read it.
        self._mark = (max(clock.time(), floor), clock.monotonic())

    def time(self) -> float:
        """Unix time, s."""
        clock = self._clock
        base, since = self._mark
        now = base + (clock.monotonic() - since)
        wall = clock.time()
        if wall > now:
            self._mark, now = (wall, clock.monotonic()), wall
        return now

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return self._clock.monotonic()

    @property
    def ahead_s(self) -> float:
        """How far the wall clock is behind: it was set back by so much."""
        return self.time() - self._clock.time()
