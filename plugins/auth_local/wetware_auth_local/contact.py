"""How long ago the policy was last compared with another member's, kept over restarts.

A clock that is set back must not make the policy look fresher than it is. So the age is kept as an
age, not as a date: while the node runs it grows by the monotonic clock, or by the wall clock if
that says more (a sleeping laptop's monotonic clock stands still); over a restart it grows by the
wall clock, and is unknown if that shows an earlier time than when the file was written.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING

from wetware.identity import replace_private_file

if TYPE_CHECKING:
    from wetware.hookspecs import PluginContext

CONTACT_FILE = "contact.json"
SAVE_S = 60.0
"""The file may say so much more than the truth, never less: one fsync a minute is enough."""
_FILE_BYTES_MAX = 4096


class Contact:
    """Whether the node belongs to a larger cluster, and the age of what it knows of it.

    Args:
        ctx: Its directory has the file. Damaged, the age is unknown: it then takes a comparison to
            admit anybody.
        joined: Whether the node got its policy from another member: without a file, it is then not
            alone, though it has not met anybody yet.
    """

    def __init__(self, ctx: PluginContext, *, joined: bool) -> None:
        self._file = ctx.data_dir / CONTACT_FILE
        self._clock, self._log, self._run_sync = ctx.clock, ctx.log, ctx.run_sync
        self.met = joined
        """Whether the node has met another member at any time."""
        self._age_s = math.inf
        self._wall = ctx.clock.time()
        self._monotonic = ctx.clock.monotonic()
        self._saved_at: float | None = None
        self._lock = asyncio.Lock()
        self._load()

    def _load(self) -> None:
        try:
            with self._file.open("rb") as file:
                data = json.loads(file.read(_FILE_BYTES_MAX))
            met, at_s = bool(data["met"]), float(data["at_s"])
            age_s = math.inf if data["age_s"] is None else float(data["age_s"])
            if not (age_s >= 0 and math.isfinite(at_s)):
                raise ValueError("a number out of range")  # noqa: TRY301  # one place to refuse
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
            self._log.error("contact.damaged", file=self._file.name, reason=exc)
            self.met = True
            return
        self.met = met
        if at_s > self._wall:
            self._log.warning("contact.clock_set_back", by_s=round(at_s - self._wall, 1))
            return
        self._age_s = age_s + (self._wall - at_s)

    @property
    def age_s(self) -> float:
        """Seconds since the last comparison, at least; infinite if there was none."""
        return self._age_s + max(
            self._clock.monotonic() - self._monotonic, self._clock.time() - self._wall, 0.0
        )

    def compared(self) -> None:
        """The policy was compared with a member's, just now."""
        self._restart(0.0)

    def meet(self) -> None:
        """A member is there. Until now this node was the whole cluster, so its policy is fresh."""
        if not self.met:
            self.met = True
            self._restart(0.0)

    def _restart(self, age_s: float) -> None:
        self._age_s = age_s
        self._wall, self._monotonic = self._clock.time(), self._clock.monotonic()

    async def save(self, *, now: bool = False) -> None:
        """Make it durable, if it is time to, or the first time; a failure is logged."""
        async with self._lock:
            monotonic = self._clock.monotonic()
            due = self._saved_at is None or monotonic - self._saved_at >= SAVE_S
            if not self.met or not (due or now):
                return
            try:
                await self._run_sync(self.save_now)
            except OSError as exc:
                self._log.error("contact.not_saved", reason=exc.strerror)
                return
            self._saved_at = monotonic

    def save_now(self) -> None:
        """Make it durable; raises OSError."""
        age_s = self.age_s
        data = {
            "met": self.met,
            "age_s": age_s if math.isfinite(age_s) else None,
            "at_s": self._clock.time(),
        }
        replace_private_file(self._file, json.dumps(data).encode())
