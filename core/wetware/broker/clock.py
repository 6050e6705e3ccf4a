"""Time as grants are judged by: it never goes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from wetware.base.clock import Clock

MEET_S: Final = 5.0
"""For a node that starts to meet another member; expiry is not judged before, or until then."""
COMPARED_S_MAX: Final = 86_400.0
"""How long a comparison counts, as long as a node without contact admits anybody."""
NOT_YET: Final = "it was not compared with another member's yet"
NOT_FOR_LONG: Final = "it was not compared with another member's for a day"


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

    def go_back(self) -> None:
        """Take the time of the wall clock, though it was later here."""
        self._mark = (self._clock.time(), self._clock.monotonic())


class Comparison:
    """Whether a clock can judge the ends of grants: what those of the other members say of it.

    Not to know is no leave. Until one of the others was compared, shortly after the start, and
    when none was for a day, the answer is no; in between the last one holds.

    Args:
        clock: The one to judge.
        bound_s: How far the others may be from it, and how far it may have been set back.
    """

    def __init__(self, clock: SteadyClock, bound_s: float) -> None:
        self._clock, self._bound_s = clock, bound_s
        self._until = clock.monotonic() + MEET_S  # for so long the last answer holds
        self._last = NOT_YET

    def judge(self, others_ahead_s: float | None, *, alone: bool) -> str:
        """Why the clock cannot be relied on; "" if it can.

        Args:
            others_ahead_s: How far the other members' clocks are ahead, in the median; None if no
                living one was compared.
            alone: Whether there is no other member to compare with.
        """
        now = self._clock.monotonic()
        if others_ahead_s is not None:
            self._until = now + COMPARED_S_MAX
            wrong = abs(others_ahead_s) > self._bound_s
            self._last = f"the other members' clocks are {others_ahead_s:+.0f} s from it" * wrong
        elif alone:
            self._last, self._until = "", now + COMPARED_S_MAX
        elif now >= self._until:
            if self._last == NOT_YET:  # nobody can be reached: this node's own word, for a day
                self._last, self._until = "", now + COMPARED_S_MAX
            elif not self._last:
                self._last = NOT_FOR_LONG
        if not self._last and (back_s := self._clock.ahead_s) > self._bound_s:
            return f"it was set back by {back_s:.0f} s"
        return self._last

    def trust(self) -> None:
        """Somebody who has looked at it says that the wall clock is right."""
        self._clock.go_back()
        self._last, self._until = "", self._clock.monotonic() + COMPARED_S_MAX
