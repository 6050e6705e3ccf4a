"""Leases as their holders have them: kept in the background, and known to be lost in time.

An end of a lease is counted from when the request was *sent* that kept it last, so it is known here
before the store takes what it held away. The clock goes on while the machine sleeps (a monotonic
one does not on Linux): a laptop that wakes up knows at once that it has lost.

Source: Gray & Cheriton, "Leases" (SOSP 1989).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import anyio

from wetware import rpc
from wetware.errors import OverlayError, WetwareError
from wetware_sync.engine import Closed, LeaseEnded, Unknown
from wetware_sync.errors import HomeDown

if TYPE_CHECKING:
    from wetware_sync.reach import AtHome

TTL_S: Final = 15.0
"""Of a lease, where nothing else is said."""
TICK_S: Final = 0.25
"""Between two looks at the clock: the loop's own timers stand still while the machine sleeps."""
END_S: Final = 1.0
"""For telling the store once; else it ends there by itself."""
ELECTION_S: Final = 10.0
"""So much longer than its time a lease that is lost may go on in the store, while etcd elects."""
KEEP_PART: Final = 3
"""A lease is kept so many times as often as it must be."""
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_s() -> float:
    """Seconds since this machine was started, those in which it slept included."""
    return time.clock_gettime(_CLOCK)


class Lease:
    """A lease, kept while its block is entered. It is lost for good, and then says so.

    Args:
        home: Of the service.
        method: That makes one: "lease" or "enter".
        ttl_s: How long it lasts without being kept.

    Attributes:
        id: Its ID, 0 before it was entered.
        ended: Why it is lost; None while it lives.
    """

    def __init__(self, home: AtHome, method: str, ttl_s: float) -> None:
        self.home, self._method, self.ttl_s = home, method, ttl_s
        self.id = self._epoch = 0
        self.ended: WetwareError | None = None
        self._until_s = 0.0
        self._ref: rpc.Ref | None = None
        self._scopes: set[anyio.CancelScope] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Lease:
        await self._take()
        self._task = asyncio.create_task(self._run(), name="lease")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop keeping it, and end it now if the store can be reached. Idempotent."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        if self.ended is None:
            self._lose(LeaseEnded("the lease was closed"))
            with anyio.move_on_after(END_S, shield=True), contextlib.suppress(WetwareError):
                await (await self.ref()).call("end")

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """Cancel the block where the lease is lost within it, and raise LeaseEnded then."""
        if self.ended is not None:
            raise LeaseEnded(str(self.ended))
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught and self.ended is not None:
            raise LeaseEnded(
                f"what was held is lost: {self.ended.message}",
                hint="what was done meanwhile may be seen by the next holder; fence it",
            )

    async def ref(self) -> rpc.Ref:
        """Its capability, held again after a lost connection."""
        if self._ref is None or self._ref.closed:
            await self._take()
        assert self._ref is not None  # noqa: S101  # _take
        return self._ref

    async def _take(self) -> None:
        sent_s = now_s()
        reply = await self.home.call(
            self._method, ttl_ms=int(self.ttl_s * 1000), id=self.id, epoch=self._epoch
        )
        self._ref = reply["holder" if self._method == "enter" else "lease"]
        self.id, self._epoch = reply["id"], reply["epoch"]
        self._until_s = sent_s + self.ttl_s

    async def _run(self) -> None:
        """Keep it, and when it is lost end it.

        Else others wait for what nobody holds: an election of etcd gives each lease its whole time
        again. What is heard too late changes nothing.
        """
        await self._keep()
        until_s = now_s() + self.ttl_s + ELECTION_S
        while now_s() < until_s:
            try:
                await self._ask("end", END_S)
            except (OverlayError, Closed, Unknown):
                await asyncio.sleep(TICK_S)
            except WetwareError:  # it has ended there, too, or is nobody's any more
                return
            else:
                return

    async def _keep(self) -> None:
        keeping: asyncio.Task[None] | None = None
        due_s = now_s() + self.ttl_s / KEEP_PART
        try:
            while True:
                await asyncio.sleep(TICK_S)
                if now_s() >= self._until_s - TICK_S:  # the next look would be too late
                    self._lose(LeaseEnded(f"it was not kept within {self.ttl_s:g} s"))
                    return
                if keeping is not None and keeping.done():
                    if (error := keeping.exception()) is None:
                        due_s = self._until_s - self.ttl_s * (1 - 1 / KEEP_PART)
                    elif not isinstance(error, OverlayError | Closed):
                        self._lose(error if isinstance(error, WetwareError) else _odd(error))
                        return
                    keeping = None
                if keeping is None and now_s() >= due_s:
                    keeping = asyncio.create_task(self._keep_once())
        finally:
            if keeping is not None:
                keeping.cancel()

    async def _keep_once(self) -> None:
        self._until_s = await self._ask("keep", self.ttl_s) + self.ttl_s

    async def _ask(self, method: str, limit_s: float) -> float:
        """Call it; returns when that was sent."""
        ref, sent_s = await self.ref(), now_s()
        try:
            with rpc.time_limit(limit_s), self.home.read():
                await ref.call(method)
        except HomeDown:
            self._ref = None  # it is held again at another entrance
            raise
        return sent_s

    def _lose(self, why: WetwareError) -> None:
        self.ended = why
        for scope in tuple(self._scopes):
            scope.cancel()


def _odd(error: BaseException) -> WetwareError:
    return LeaseEnded(f"keeping it failed: {error}")
