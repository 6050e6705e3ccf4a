"""What a grant may use up: a rate, and quotas of calls and bytes.

Each grant with such terms has one budget, and every use below it is charged to it, so that
delegation never multiplies anything. The quotas of durable grants are charged on disk before the
call, in blocks: a limit costs one write for many calls, and a crash never gives a use back (what
was left of a block is lost).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
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


class Budget:
    """The account of one grant.

    Args:
        rate: Calls per second and burst, or None.
        calls: Quota of calls, or None.
        nbytes: Quota of bytes, or None.
        monotonic: Seconds that never go back.
        calls_spent: Spent before, reserved blocks included.
        bytes_spent: Likewise.
        fresh: Whether the bucket starts full; after a restart it starts empty.
    """

    __slots__ = (
        "_bucket",
        "_bytes_free",
        "_calls_free",
        "_reserving",
        "_save",
        "bytes",
        "bytes_spent",
        "calls",
        "calls_spent",
        "rate",
    )

    def __init__(
        self,
        rate: Rate | None,
        calls: int | None,
        nbytes: int | None,
        monotonic: Callable[[], float],
        *,
        calls_spent: int = 0,
        bytes_spent: int = 0,
        fresh: bool = True,
    ) -> None:
        self.rate, self.calls, self.bytes = rate, calls, nbytes
        self.calls_spent, self.bytes_spent = calls_spent, bytes_spent
        self._bucket: TokenBucket | None = None
        if rate is not None:
            self._bucket = TokenBucket(rate.per_s, rate.burst, monotonic, full=fresh)
        self._save: Save | None = None
        # Reserved on disk and not used yet; without a store all that is left.
        self._calls_free = self._bytes_free = 0
        self._reserving: asyncio.Future[None] | None = None

    def keep(self, save: Save) -> None:
        """From here on quotas are charged on disk first."""
        if self._save is None:
            self._save = save
            self._calls_free = self._bytes_free = 0

    @property
    def durable(self) -> bool:
        """Whether a store keeps it, and there is something to keep."""
        return self._save is not None and (self.calls is not None or self.bytes is not None)

    @property
    def reserved(self) -> tuple[int, int]:
        """(calls, bytes) spent or reserved: what is reserved is used without another write."""
        if self._save is None:
            return self.calls_spent, self.bytes_spent
        return self.calls_spent + self._calls_free, self.bytes_spent + self._bytes_free

    @property
    def calls_left(self) -> int | None:
        """What is left of the quota, or None."""
        return None if self.calls is None else max(0, self.calls - self.calls_spent)

    @property
    def bytes_left(self) -> int | None:
        """What is left of the quota, or None."""
        return None if self.bytes is None else max(0, self.bytes - self.bytes_spent)

    def refusal(self, calls: int, nbytes: int) -> LimitExceeded | None:
        """Why so much cannot be spent now, or None."""
        if self.calls is not None and self.calls_spent + calls > self.calls:
            return LimitExceeded(
                f"the quota of {self.calls} calls is spent",
                hint="ask who shared it for more",
                code="limit.calls",
            )
        if self.bytes is not None and self.bytes_spent + nbytes > self.bytes:
            return LimitExceeded(
                f"{nbytes} bytes, and {self.bytes_left} are left of the quota of {self.bytes}",
                hint="ask who shared it for more",
                code="limit.bytes",
            )
        bucket = self._bucket
        if self.rate is not None and bucket is not None and (wait_s := bucket.wait_s(calls)):
            return LimitExceeded(
                f"more than {self.rate.text}",
                hint=f"try again in {wait_s:.2g} s",
                code="limit.rate",
            )
        return None

    def covers(self, calls: int, nbytes: int) -> bool:
        """Whether what is reserved on disk is enough."""
        if self._save is None:
            return True
        return (self.calls is None or self._calls_free >= calls) and (
            self.bytes is None or self._bytes_free >= nbytes
        )

    def take(self, calls: int, nbytes: int) -> None:
        """Spend; `refusal` was None and `covers` True, without an await in between."""
        if self._bucket is not None:
            self._bucket.spend(calls)
        if self.calls is not None:
            self.calls_spent += calls
            self._calls_free -= calls
        if self.bytes is not None:
            self.bytes_spent += nbytes
            self._bytes_free -= nbytes

    async def reserve(self, calls: int, nbytes: int) -> None:
        """Write the next block; raises StoreUnavailable. Who comes meanwhile shares it."""
        if self._reserving is not None:
            # Whoever reserves may be cancelled or fail: then the next one tries.
            await asyncio.wait([self._reserving])
            return
        save = self._save
        if save is None:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reserving = done
        calls_block = _block(self.calls_left, self._calls_free, calls, BLOCK_CALLS_MAX)
        bytes_block = _block(self.bytes_left, self._bytes_free, nbytes, BLOCK_BYTES_MAX)
        try:
            await save(
                self.calls_spent + self._calls_free + calls_block,
                self.bytes_spent + self._bytes_free + bytes_block,
            )
            self._calls_free += calls_block
            self._bytes_free += bytes_block
        finally:
            self._reserving = None
            done.set_result(None)


def _block(left: int | None, free: int, wanted: int, block_max: int) -> int:
    """How much to reserve beyond `free`: at least what is wanted, at most what is left."""
    if left is None:
        return 0
    unreserved = max(0, left - free)
    return min(unreserved, max(wanted - free, min(block_max, unreserved // _BLOCKS)))
