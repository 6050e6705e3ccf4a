"""Time, as what runs is given it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Time, injected so that tests control it."""

    def time(self) -> float:
        """Unix time, seconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...


class SystemClock:
    """The machine's clock."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
