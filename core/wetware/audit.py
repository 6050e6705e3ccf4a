"""The record of decisions: logins, openings, withdrawals.

A record is an event name and fields; it goes to the log, and copies go to the plugins' `ww_audit`
hooks through a bounded queue: a slow plugin loses records, counted, and never delays a decision.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from wetware.log import get_logger

if TYPE_CHECKING:
    from wetware.hookspecs import Clock

log = get_logger("audit")

QUEUE_RECORDS_MAX = 4096
"""Copies that wait for plugins."""

Sink = Callable[[Mapping[str, object]], None]


class Audit:
    """Records decisions in their order.

    Args:
        clock: Stamps the records.
        sink: Gets each record off the decision's path, or None.
    """

    def __init__(self, clock: Clock, sink: Sink | None = None) -> None:
        self._clock, self._sink = clock, sink
        self._queue: asyncio.Queue[Mapping[str, object]] = asyncio.Queue(QUEUE_RECORDS_MAX)
        self.sequence = 0
        self.dropped = 0

    def record(self, event: str, **fields: object) -> None:
        """Record one decision."""
        self.sequence += 1
        log.info(event, seq=self.sequence, **fields)
        if self._sink is None:
            return
        record = {
            "seq": self.sequence,
            "time": self._clock.time(),
            "event": event,
            **{name: str(value) for name, value in fields.items()},
        }
        try:
            self._queue.put_nowait(record)
        except asyncio.QueueFull:
            self.dropped += 1

    async def run(self) -> None:
        """Hand copies to the sink until cancelled, then what is left, without waiting."""
        if self._sink is None:
            return
        try:
            while True:
                self._sink(await self._queue.get())
        finally:
            with contextlib.suppress(asyncio.QueueEmpty):
                while True:
                    self._sink(self._queue.get_nowait())
