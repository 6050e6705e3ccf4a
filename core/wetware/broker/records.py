"""Decisions on their way to the recorder: who got what, what was refused, and what ended.

What gives something (a login, an opening, a grant, a redemption) is recorded first, with `admit`:
if it cannot be recorded it is not given. What takes something away takes effect first, with
`record` or `ended`: no recorder delays a revocation; its *answer* waits for `written`, so that what
was answered is not missing after a crash. Denials are counted (`denied`), so that nobody can fill
the disk by asking.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wetware.base.log import get_logger
from wetware.errors import Unrecorded

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.broker.ports import Recorder

log = get_logger("audit")

FIELD_CHARS_MAX: Final = 1024
"""Of a text in a record."""
ADMIT_S: Final = 10.0
"""For what has to be recorded first; then it is refused, though the record may still follow."""
WRITTEN_S: Final = 5.0
"""For what has taken effect to be on record, before its answer comes all the same."""
DENIED_KEYS_MAX: Final = 1024
"""Kinds of denials that are counted apart; beyond it they are counted together."""
DENIED_S: Final = 10.0
"""Between two records of denials of one kind."""


@dataclass(slots=True)
class _Denials:
    """Denials of one kind since the last record of them."""

    event: str
    fields: Mapping[str, object]
    count: int = 0


class Records:
    """Hands decisions to the recorder, in their order.

    Args:
        clock: Stamps the records.
        recorder: Keeps them; None: nothing is kept, and nothing refused for it.

    Attributes:
        failed: Why the recorder ended while the node runs; "" while it has not.
    """

    def __init__(self, clock: Clock, recorder: Recorder | None) -> None:
        self._clock, self.recorder = clock, recorder
        self._denials: OrderedDict[Hashable, _Denials] = OrderedDict()
        self.failed = ""

    async def admit(self, event: str, /, **fields: object) -> None:
        """Record what is about to be given.

        Raises Unrecorded where the recorder refuses, fails, or does not answer for ADMIT_S.
        """
        if (recorder := self.recorder) is not None:
            if self.failed:
                raise Unrecorded(
                    f"the recorder {recorder.name!r} has ended: {self.failed}",
                    hint="its operator has to start the node again",
                )
            await self._ask(recorder, lambda: recorder.admit(self._record(event, fields)), ADMIT_S)
        log.info(event, **fields)

    def record(self, event: str, /, **fields: object) -> None:
        """Record what has taken effect. Never waits, never raises."""
        self._report(event, fields, ending=False)

    def ended(self, event: str, /, **fields: object) -> None:
        """The same, of what an operator or the auth backend ended: also while the disk is full."""
        self._report(event, fields, ending=True)

    def _report(self, event: str, fields: Mapping[str, object], *, ending: bool) -> None:
        log.info(event, **fields)
        if self.recorder is not None:
            try:
                self.recorder.report(self._record(event, fields), ending=ending)
            except (Exception, asyncio.CancelledError):  # the latter is not the caller's: no await
                log.exception("recorder.failed", recorder=self.recorder.name)

    async def written(self) -> bool:
        """Wait until what was recorded is kept, at most WRITTEN_S; returns whether it is."""
        if (recorder := self.recorder) is not None:
            try:
                await self._ask(recorder, recorder.written, WRITTEN_S)
            except Unrecorded:
                return False
        return True

    async def _ask(
        self, recorder: Recorder, question: Callable[[], Awaitable[None]], limit_s: float
    ) -> None:
        """Wait for the recorder; whatever goes wrong there is Unrecorded."""
        try:
            async with asyncio.timeout(limit_s):
                await question()
        except Unrecorded:
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # it is the caller that is cancelled
                raise
            raise Unrecorded(
                f"the recorder {recorder.name!r} gave it up", hint="the node's log says why"
            ) from None
        except TimeoutError:
            raise Unrecorded(
                f"it was not on record within {limit_s:g} s",
                hint="the node's disk is too slow or failing; `ww doctor`",
            ) from None
        except Exception as exc:
            log.exception("recorder.failed", recorder=recorder.name)
            raise Unrecorded(
                f"the recorder {recorder.name!r} failed", hint="the node's log says how"
            ) from exc

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

    async def run(self) -> None:
        """Record the numbers of denials now and then, until cancelled."""
        while True:
            await asyncio.sleep(DENIED_S)
            self.flush_denials()

    def _record(self, event: str, fields: Mapping[str, object]) -> dict[str, str | int | bool]:
        """Plain and bounded, with the time at which it happened: it may be written later."""
        now_ms = round(self._clock.time() * 1000)
        return {
            "time_ms": now_ms,
            "event": event,
            **{name: plain(value) for name, value in fields.items()},
        }


def plain(value: object) -> str | int | bool:
    """A field as it is kept: bounded, plain."""
    if isinstance(value, bool | int):
        return value
    text = str(value)
    return text if len(text) <= FIELD_CHARS_MAX else f"{text[:FIELD_CHARS_MAX]}…"
