"""How late the event loop is: what a callback waits before it runs, for `ww status` and the log.

A node does everything on one loop: who blocks it delays probes, calls and streams alike. The meter
wants to run `LAG_TICKS_PER_S` times a second and notes how much later it did. As in HdrHistogram,
the ticks that a long delay swallowed count as well, each with what was left of it, so that
quantiles are over time: a loop that stands still for a second of ten has a p90 of it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from wetware.base.finding import Finding, ok, span, warning
from wetware.base.log import get_logger

log = get_logger("lag")

LAG_TICKS_PER_S = 10
"""Waking an idle loop is all that the meter costs: 0.05 to 0.13 % of a core at this rate."""

LAG_WINDOW_S = 60
"""What `LagMeter.recent` looks back on, and how often the log hears of lag at most."""

LAG_LOGGED_S = 0.25
"""A delay beyond this is logged: half of a membership probe's time-out, and felt by people."""

_WINDOW_TICKS = LAG_TICKS_PER_S * LAG_WINDOW_S


@dataclass(frozen=True, slots=True)
class Lag:
    """Delays of the last LAG_WINDOW_S, in seconds. All zero before the first tick.

    Attributes:
        p99_s: In 99 % of the time the loop was at most this late.
        max_s: It was never later.
    """

    p99_s: float = 0.0
    max_s: float = 0.0


LAG_S_MAX: Final = 0.05
"""p99 of the event loop's lag: above it probes are answered late, and others suspect the node."""
SETTLED_S: Final = 90.0
"""After a start. Loading libp2p holds the loop up once, and the meter looks back over a minute."""


class LagMeter:
    """Measures the loop that `run` runs on. Its memory is bounded, whatever happens.

    Args:
        now: Monotonic seconds; the loop's own time if None.
    """

    def __init__(self, *, now: Callable[[], float] | None = None) -> None:
        self._now = now
        self._recent: deque[float] = deque(maxlen=_WINDOW_TICKS)
        self._logged_at = -float("inf")
        self._unlogged_s = 0.0  # the longest delay that the log has not heard of
        self._unlogged = 0

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        now = self._now or loop.time
        interval_s = 1 / LAG_TICKS_PER_S
        due = now() + interval_s
        timer: asyncio.TimerHandle

        # A chain of timers: a task that sleeps costs twice as much.
        def tick() -> None:
            nonlocal due, timer
            at = now()
            self.record(max(at - due, 0.0), at)
            due = at + interval_s
            timer = loop.call_later(interval_s, tick)

        timer = loop.call_later(interval_s, tick)
        try:
            await loop.create_future()
        finally:
            timer.cancel()

    def record(self, delay_s: float, at: float) -> None:
        """Note that a tick at time `at` came `delay_s` late (called by `run`)."""
        # Longer than the window: the rest says nothing new.
        ticks = min(max(math.ceil(delay_s * LAG_TICKS_PER_S), 1), _WINDOW_TICKS)
        for swallowed in range(ticks):
            self._recent.append(delay_s - swallowed / LAG_TICKS_PER_S)
        if delay_s > LAG_LOGGED_S:
            self._unlogged_s = max(self._unlogged_s, delay_s)
            self._unlogged += 1
        if self._unlogged and at - self._logged_at >= LAG_WINDOW_S:
            log.warning("loop.lag", lag_ms=round(self._unlogged_s * 1000), times=self._unlogged)
            self._logged_at, self._unlogged_s, self._unlogged = at, 0.0, 0

    def recent(self) -> Lag:
        """The figures now; costs well below a millisecond."""
        delays_s = sorted(self._recent)
        return Lag(delays_s[(len(delays_s) - 1) * 99 // 100], delays_s[-1]) if delays_s else Lag()

    def findings(self, up_s: float) -> list[Finding]:
        """Whether the loop is held up, where the node started so long ago."""
        if up_s < SETTLED_S:
            return [ok("loop", f"too early to say: the node started {span(up_s)} ago")]
        return judge_lag(self.recent())


def judge_lag(lag: Lag) -> list[Finding]:
    text = f"the event loop lags {lag.p99_s * 1000:.1f} ms (p99), {lag.max_s * 1000:.0f} ms at most"
    if lag.p99_s <= LAG_S_MAX:
        return [ok("loop", text)]
    return [
        warning(
            "loop",
            f"{text}; above {LAG_S_MAX * 1000:.0f} ms others begin to suspect the node",
            "`ww status` and `top` on the node's machine: too much load, or a plugin that blocks",
        )
    ]
