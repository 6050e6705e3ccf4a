"""Time that a test sets."""

from __future__ import annotations


class FakeClock:
    """`hookspecs.Clock`: stands still until a test moves it.

    Attributes:
        now: What `monotonic` says, s. To move it is to let time pass, for `time` as well.
        epoch_s: What `time` is ahead of `now`. To move it is to set the wall clock alone.
    """

    def __init__(self, now: float = 1000.0, *, epoch_s: float = 1_800_000_000.0) -> None:
        self.now, self.epoch_s = now, epoch_s

    def time(self) -> float:
        """Unix time, s."""
        return self.epoch_s + self.now

    def monotonic(self) -> float:
        """Seconds that never go back, unless a test makes them."""
        return self.now
