"""The machine's clock."""

from __future__ import annotations

import time


class SystemClock:
    """The machine's clock."""

    def time(self) -> float:
        """Unix time, s."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()
