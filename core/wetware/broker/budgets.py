"""What a grant may use up: a rate, and quotas of calls and bytes.

Each grant with such terms has one budget, and every use below it is charged to it, so that
delegation never multiplies anything. The quotas of durable grants are charged on disk before the
call, in blocks: a limit costs one write for many calls, and a crash never gives a use back (what
was left of a block is lost).
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final

from wetware.base.bounds import TokenBucket
from wetware.errors import LimitExceeded

if TYPE_CHECKING:
    from wetware.broker.values import Rate

BLOCK_CALLS_MAX: Final = 1024
BLOCK_BYTES_MAX: Final = 16 << 20
_BLOCKS: Final = 16
"""A block is this part of what is left: a crash costs a small quota nothing or one use."""

Save = Callable[[int, int], Awaitable[None]]
"""Writes (calls, bytes) spent or reserved in all."""


class Quota:
    """How much of something may be used in all.

    Args:
        limit: None: as much as one likes; then nothing is counted.
        spent: Before, reserved blocks included.
        block_max: Reserved on disk at a time, at most.

    Attributes:
        free: Reserved on disk and not used yet; of a budget that is kept.
    """

    def __init__(self, limit: int | None, spent: int, block_max: int) -> None:
        self.limit, self.spent, self.free = limit, spent, 0
        self._block_max = block_max

    @property
    def left(self) -> int | None:
        return None if self.limit is None else max(0, self.limit - self.spent)

    @property
    def reserved(self) -> int:
        """Spent or reserved: what is reserved is used without another write."""
        return self.spent + self.free

    def allows(self, amount: int) -> bool:
        return self.limit is None or self.spent + amount <= self.limit

    def covers(self, amount: int) -> bool:
        """Whether what is reserved is enough."""
        return self.limit is None or self.free >= amount

    def take(self, amount: int) -> None:
        if self.limit is not None:
            self.spent += amount
            self.free -= amount

    def block(self, wanted: int) -> int:
        """How much to reserve beyond `free`: at least what is wanted, at most what is left."""
        if self.left is None:
            return 0
        unreserved = max(0, self.left - self.free)
        return min(unreserved, max(wanted - self.free, min(self._block_max, unreserved // _BLOCKS)))


class Budget:
    """The account of one grant.

    One that is not new says what it has `spent`, calls and bytes, reserved blocks included; its
    bucket starts empty.
    """

    def __init__(
        self,
        rate: Rate | None,
        calls: int | None,
        nbytes: int | None,
        monotonic: Callable[[], float],
        *,
        spent: tuple[int, int] | None = None,
    ) -> None:
        calls_spent, bytes_spent = spent or (0, 0)
        self.calls = Quota(calls, calls_spent, BLOCK_CALLS_MAX)
        self.bytes = Quota(nbytes, bytes_spent, BLOCK_BYTES_MAX)
        self._rate = rate
        self._bucket: TokenBucket | None = None
        if rate is not None:
            self._bucket = TokenBucket(rate.per_s, rate.burst, monotonic, full=spent is None)
        self._save: Save | None = None
        self._reserving: asyncio.Future[None] | None = None

    @property
    def metered(self) -> bool:
        """Whether bytes are counted."""
        return self.bytes.limit is not None

    def keep(self, save: Save) -> None:
        """From here on quotas are charged on disk first."""
        if self._save is None:
            self._save = save
            self.calls.free = self.bytes.free = 0

    def refusal(self, calls: int, nbytes: int) -> LimitExceeded | None:
        """Why so much cannot be spent now, or None."""
        if not self.calls.allows(calls):
            return LimitExceeded(
                f"the quota of {self.calls.limit} calls is spent",
                hint="ask who shared it for more",
                code="limit.calls",
            )
        if not self.bytes.allows(nbytes):
            return LimitExceeded(
                f"{nbytes} bytes, and {self.bytes.left} are left of the quota of "
                f"{self.bytes.limit}",
                hint="ask who shared it for more",
                code="limit.bytes",
            )
        bucket = self._bucket
        if self._rate is not None and bucket is not None and (wait_s := bucket.wait_s(calls)):
            return LimitExceeded(
                f"more than {self._rate.text}",
                hint=f"try again in {wait_s:.2g} s",
                code="limit.rate",
            )
        return None

    def covers(self, calls: int, nbytes: int) -> bool:
        """Whether what is reserved on disk is enough."""
        return self._save is None or (self.calls.covers(calls) and self.bytes.covers(nbytes))

    def take(self, calls: int, nbytes: int) -> None:
        """Spend; `refusal` was None and `covers` True, without an await in between."""
        if self._bucket is not None:
            self._bucket.spend(calls)
        self.calls.take(calls)
        self.bytes.take(nbytes)

    async def reserve(self, calls: int, nbytes: int) -> None:
        """Write the next block; raises StoreUnavailable. Who comes meanwhile shares it."""
        if self._reserving is not None:
            # Whoever reserves may be cancelled or fail: then the next one tries.
            await asyncio.wait([self._reserving])
            return
        if self._save is None:
            return
        done = self._reserving = asyncio.get_running_loop().create_future()
        more_calls, more_bytes = self.calls.block(calls), self.bytes.block(nbytes)
        try:
            await self._save(self.calls.reserved + more_calls, self.bytes.reserved + more_bytes)
            self.calls.free += more_calls
            self.bytes.free += more_bytes
        finally:
            self._reserving = None
            done.set_result(None)


def pay(
    budgets: Collection[Budget], calls: int, nbytes: int, check_live: Callable[[], None]
) -> Awaitable[None] | None:
    """Charge every budget or none; raises LimitExceeded.

    What is returned has to be awaited: it reserves on disk, asks `check_live` again, and charges.
    """
    return None if _paid(budgets, calls, nbytes) else _pay_later(budgets, calls, nbytes, check_live)


def _paid(budgets: Collection[Budget], calls: int, nbytes: int) -> bool:
    """Charge all of them, unless what is reserved does not cover it."""
    for budget in budgets:
        if (short := budget.refusal(calls, nbytes)) is not None:
            raise short
    if not all(budget.covers(calls, nbytes) for budget in budgets):
        return False
    for budget in budgets:
        budget.take(calls, nbytes)
    return True


def pay_some(
    budgets: Collection[Budget],
    totals: Sequence[int],
    check_live: Callable[[], None],
    paid: Callable[[int], None],
) -> Awaitable[None] | None:
    """Charge for as many of several calls as all budgets allow: the first ones, in their order.

    `totals` has the bytes of the first one, of the first two, and so on; `paid` is told how many
    were charged. Raises LimitExceeded if not even one is allowed. What is returned has to be
    awaited, as that of `pay`.
    """
    count = _allowed(budgets, totals)
    if _paid(budgets, count, totals[count - 1]):
        paid(count)
        return None
    return _pay_some_later(budgets, totals, check_live, paid)


def _allowed(budgets: Collection[Budget], totals: Sequence[int]) -> int:
    """How many of the calls may be charged; 1 where `_paid` has to say why none may."""

    def refused(count: int) -> bool:
        return any(budget.refusal(count, totals[count - 1]) is not None for budget in budgets)

    if not refused(len(totals)):
        return len(totals)
    return max(1, bisect.bisect_left(range(1, len(totals)), True, key=refused))


async def _pay_some_later(
    budgets: Collection[Budget],
    totals: Sequence[int],
    check_live: Callable[[], None],
    paid: Callable[[int], None],
) -> None:
    count = _allowed(budgets, totals)
    while True:
        for budget in budgets:
            if not budget.covers(count, totals[count - 1]):
                await budget.reserve(count, totals[count - 1])
        check_live()
        count = _allowed(budgets, totals)  # others may have spent meanwhile
        if _paid(budgets, count, totals[count - 1]):
            paid(count)
            return


async def _pay_later(
    budgets: Collection[Budget], calls: int, nbytes: int, check_live: Callable[[], None]
) -> None:
    paid = False
    while not paid:
        for budget in budgets:
            if not budget.covers(calls, nbytes):
                await budget.reserve(calls, nbytes)
        check_live()
        paid = _paid(budgets, calls, nbytes)
