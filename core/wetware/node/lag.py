"""How late the event loop is: what a callback waits before it runs, for `ww status` and the log.

A node does everything on one loop: who blocks it delays probes, calls and streams alike. The meter
wants to run `LAG_TICKS_PER_S` times a second and notes how much later it did. As in HdrHistogram,
the ticks that a long delay swallowed count as well, each with what was left of it, so that
quantiles are over time: a loop that stands still for a second of ten has a p90 of it.
"""

from __future__ import annotations

import asyncio
import bisect
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
"""What "recent" is in a snapshot, and how often the log hears of lag at most."""

LAG_LOGGED_S = 0.25
"""A delay beyond this is logged: half of a membership probe's time-out, and felt by people."""

_WINDOW_TICKS = LAG_TICKS_PER_S * LAG_WINDOW_S
_BUCKETS_PER_DOUBLING = 4  # so that a quantile is at most 19 % above the truth
_EDGES_S = tuple(1e-4 * 2 ** (n / _BUCKETS_PER_DOUBLING) for n in range(4 * 20))  # 0.1 ms to 90 s


@dataclass(frozen=True, slots=True)
class LagFigures:
    """Delays in seconds. All zero before the first tick.

    Attributes:
        p50_s: Half of the time the loop was at most this late.
        p99_s: In 99 % of the time.
        max_s: Ever.
        ticks: How many measurements these are.
    """

    p50_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0
    ticks: int = 0


@dataclass(frozen=True, slots=True)
class LagSnapshot:
    """What `LagMeter.snapshot` returns.

    Attributes:
        recent: Of the last LAG_WINDOW_S seconds, exact.
        total: Since the start; quantiles are rounded up by less than a fifth.
    """

    recent: LagFigures
    total: LagFigures


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
        self._counts = [0] * (len(_EDGES_S) + 1)
        self._ticks = 0
        self._max_s = 0.0
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
        self._max_s = max(self._max_s, delay_s)
        # Longer than the window: the rest says nothing new.
        ticks = min(max(math.ceil(delay_s * LAG_TICKS_PER_S), 1), _WINDOW_TICKS)
        for swallowed in range(ticks):
            left_s = delay_s - swallowed / LAG_TICKS_PER_S
            self._recent.append(left_s)
            self._counts[bisect.bisect_left(_EDGES_S, left_s)] += 1
        self._ticks += ticks
        if delay_s > LAG_LOGGED_S:
            self._unlogged_s = max(self._unlogged_s, delay_s)
            self._unlogged += 1
        if self._unlogged and at - self._logged_at >= LAG_WINDOW_S:
            log.warning("loop.lag", lag_ms=round(self._unlogged_s * 1000), times=self._unlogged)
            self._logged_at, self._unlogged_s, self._unlogged = at, 0.0, 0

    def snapshot(self) -> LagSnapshot:
        """The figures now; costs well below a millisecond."""
        recent = sorted(self._recent)
        count = len(recent)
        return LagSnapshot(
            recent=LagFigures(
                recent[(count - 1) // 2], recent[(count - 1) * 99 // 100], recent[-1], count
            )
            if recent
            else LagFigures(),
            total=LagFigures(self._quantile(0.5), self._quantile(0.99), self._max_s, self._ticks),
        )

    def _quantile(self, share: float) -> float:
        """The upper edge of the bucket in which the quantile is."""
        left = self._ticks * share
        for edge_s, count in zip(_EDGES_S, self._counts, strict=False):
            left -= count
            if left <= 0:
                return min(edge_s, self._max_s)
        return self._max_s

    def findings(self, up_s: float) -> list[Finding]:
        """Whether the loop is held up, where the node started so long ago."""
        if up_s < SETTLED_S:
            return [ok("loop", f"too early to say: the node started {span(up_s)} ago")]
        recent = self.snapshot().recent
        return judge_lag(recent.p99_s, recent.max_s)


def judge_lag(p99_s: float, max_s: float) -> list[Finding]:
    text = f"the event loop lags {p99_s * 1000:.1f} ms (p99), {max_s * 1000:.0f} ms at most"
    if p99_s <= LAG_S_MAX:
        return [ok("loop", text)]
    return [
        warning(
            "loop",
            f"{text}; above {LAG_S_MAX * 1000:.0f} ms others begin to suspect the node",
            "`ww status` and `top` on the node's machine: too much load, or a plugin that blocks",
        )
    ]
