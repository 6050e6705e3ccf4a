"""The record of decisions: who got what, what was refused, and what ended.

What gives something (a login, an opening, a grant, a redemption) is recorded first, with `admit`:
if it cannot be recorded it is not given. What takes something away takes effect first, with
`record` or `ended`: no disk delays a revocation; its *answer* waits for `written`, so that what was
answered is not missing after a crash. Denials are counted (`denied`), so that nobody can fill the
disk by asking. The log itself is in `wetware.audit.log`; copies go to the plugins' `ww_audit` hooks
through a bounded queue: a slow plugin loses records, counted, and never delays a decision.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from wetware.audit.chain import Checkpoint, field
from wetware.audit.config import AuditConfig
from wetware.audit.log import AuditLog, AuditUnavailable
from wetware.log import get_logger

if TYPE_CHECKING:
    from wetware.hookspecs import Clock

__all__ = ["Audit", "AuditConfig", "AuditLog", "AuditUnavailable", "Checkpoint"]

_logger = get_logger("audit")

QUEUE_RECORDS_MAX: Final = 4096
"""Copies that wait for plugins."""
DENIED_KEYS_MAX: Final = 1024
"""Kinds of denials that are counted apart; beyond it they are counted together."""
DENIED_S: Final = 10.0
"""Between two records of denials of one kind."""

Sink = Callable[[Mapping[str, object]], None]


@dataclass(slots=True)
class _Denials:
    """Denials of one kind since the last record of them."""

    event: str
    fields: Mapping[str, object]
    count: int = 0


class Audit:
    """Records decisions in their order.

    Args:
        clock: Stamps the records.
        sink: Gets a copy of each record off the decision's path, or None.
        to: The log on disk; None: there is none, for tests.
    """

    def __init__(self, clock: Clock, sink: Sink | None = None, *, to: AuditLog | None = None):
        self._clock, self._sink = clock, sink
        self.log = to
        self._queue: asyncio.Queue[Mapping[str, object]] = asyncio.Queue(QUEUE_RECORDS_MAX)
        self._denials: OrderedDict[Hashable, _Denials] = OrderedDict()
        self._listeners: dict[int, Callable[[Sequence[Mapping[str, Any]]], None]] = {}
        self.on_checkpoint: Callable[[Checkpoint], None] = lambda _: None
        self.sequence = 0
        self.dropped = 0
        if to is not None:
            to.watch(self._written)
            for event, fields in to.findings:
                _logger.error(event, **fields, hint="`ww audit verify` says more")
                self.record(event, **fields)

    # --- recording --------------------------------------------------------------------------------

    async def admit(self, event: str, /, **fields: object) -> int:
        """Record what is about to be given; returns the record's number.

        Raises AuditUnavailable if it cannot be recorded and `on_full` is "fail_closed".
        """
        record = _plain(event, fields)
        if self.log is None:
            return self._made(record)
        seq = await self.log.append(record)
        _logger.info(event, seq=seq, **fields)
        return seq

    def record(self, event: str, /, **fields: object) -> None:
        """Record what has taken effect. Never waits, never raises."""
        self._record(event, fields, reserved=False)

    def ended(self, event: str, /, **fields: object) -> None:
        """The same, of what an operator or the auth backend ended: also while the disk is full."""
        self._record(event, fields, reserved=True)

    def _record(self, event: str, fields: Mapping[str, object], *, reserved: bool) -> None:
        record = _plain(event, fields)
        _logger.info(event, **fields)
        if self.log is None:
            self._made(record)
        else:
            self.log.append_soon(record, reserved=reserved)

    async def written(self) -> bool:
        """Wait until what was recorded is on the disk; see `AuditLog.written`."""
        return self.log is None or await self.log.written()

    def denied(self, event: str, /, *, key: Hashable, **fields: object) -> None:
        """Record a denial: the first of a kind (`key`) at once, then how many there were."""
        kind: Hashable = (event, key)
        known = self._denials.get(kind)
        if known is None and len(self._denials) >= DENIED_KEYS_MAX:
            kind = event  # all further kinds of it together
            known = self._denials.get(kind)
            fields = {}
        if known is None:
            self._denials[kind] = _Denials(event, fields)
            self.record(event, **fields)
        else:
            known.count += 1
            known.fields = fields

    def flush_denials(self) -> None:
        """Record how many denials of each kind there were, and begin afresh."""
        denials, self._denials = self._denials, OrderedDict()
        for kind, denied in denials.items():
            if denied.count:
                self.record(denied.event, **denied.fields, count=denied.count)
                # It goes on: the next ones are counted, too.
                self._denials[kind] = _Denials(denied.event, denied.fields)

    def _made(self, record: dict[str, Any]) -> int:
        """Without a log on disk."""
        self.sequence += 1
        stamped = {"seq": self.sequence, "time_ms": round(self._clock.time() * 1000), **record}
        self._written([stamped])
        return self.sequence

    # --- copies -----------------------------------------------------------------------------------

    def listen(self, callback: Callable[[Sequence[Mapping[str, Any]]], None]) -> Callable[[], None]:
        """Call back, on the loop, with records as they are written; returns a remover."""
        token = id(callback)
        self._listeners[token] = callback
        return lambda: self._listeners.pop(token, None) and None

    def _written(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self.log is not None:
            self.sequence = self.log.seq
        for record in records:
            if record.get("event") == "log.checkpoint":
                with contextlib.suppress(Exception):
                    self.on_checkpoint(Checkpoint.parse(record["checkpoint"]))
            if self._sink is not None:
                try:
                    self._queue.put_nowait(record)
                except asyncio.QueueFull:
                    self.dropped += 1
        for listener in tuple(self._listeners.values()):
            listener(records)

    async def run(self) -> None:
        """Hand copies to the sink until cancelled, then what is left, without waiting."""
        flushing = asyncio.create_task(self._flush())
        try:
            while self._sink is not None:
                self._sink(await self._queue.get())
            await asyncio.Event().wait()
        finally:
            flushing.cancel()
            self.flush_denials()
            if self._sink is not None:
                with contextlib.suppress(asyncio.QueueEmpty):
                    while True:
                        self._sink(self._queue.get_nowait())

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(DENIED_S)
            self.flush_denials()


def _plain(event: str, fields: Mapping[str, object]) -> dict[str, Any]:
    """The record without number and time."""
    return {"event": event, **{name: field(value) for name, value in fields.items()}}
