"""Time, injected so that tests control it."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The module `time` is the machine's clock."""

    def time(self) -> float:
        """Unix time, seconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...
