"""Fencing: a token proves who holds a lock now, and a resource refuses those that held it before.

A lock's home signs tokens whose (epoch, counter) only grows. The broker at a resource keeps the
highest it has seen of each lock, on disk: a lower one is refused from then on, and a higher one is
admitted only when the calls under lower ones have ended. So a holder that was paused, or cut off
while its lease ran out, cannot write after its successor.

Source: Kleppmann, "How to do distributed locking" (2016); Gray & Cheriton, "Leases" (SOSP 1989).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from wetware.base import cbor
from wetware.errors import Denied, InvalidArgument, LimitExceeded
from wetware.identity import Key, PeerId, verify

if TYPE_CHECKING:
    from wetware.broker.store import GrantStore

DOMAIN: Final = b"wetware-fence:1\n"
FENCE_BYTES_MAX: Final = 1024
LOCK_CHARS_MAX: Final = 256
LOCKS_MAX: Final = 65_536
"""Locks whose highest token is kept: none can be forgotten, so beyond it new ones are refused."""
LOCKS_PER_OWNER_MAX: Final = 4096
"""Of these, locks that one principal's grants have brought in since the node started: anybody can
sign tokens of locks of their own."""
DRAIN_S_MAX: Final = 30.0
"""How long a new holder waits for the calls of the one before it."""
_NUMBER_MAX: Final = 2**63 - 1
_FIELDS: Final = ("v", "authority", "epoch", "lock", "counter", "signature")


def _bad(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"not a fencing token: {why}",
        hint="take the token that the lock's home gave with the lock",
        code="invalid.fence",
    )


@dataclass(frozen=True, slots=True)
class Fence:
    """A token of one holder of one lock.

    Attributes:
        authority: Whose signature it is: the lock's home.
        epoch: Grows when the home loses its state.
        lock: The lock's name at its home.
        counter: Grows with each holder.
        signature: By the authority over all of that.
    """

    authority: PeerId
    epoch: int
    lock: str
    counter: int
    signature: bytes = field(repr=False)

    @classmethod
    def issue(cls, key: Key, lock: str, *, epoch: int, counter: int) -> Fence:
        """A token signed by the lock's home."""
        unsigned = cls(key.peer_id, epoch, lock, counter, b"")
        return cls(key.peer_id, epoch, lock, counter, key.sign(unsigned._signed_bytes()))

    def _signed_bytes(self) -> bytes:
        return DOMAIN + cbor.encode([self.authority.multihash, self.epoch, self.lock, self.counter])

    @property
    def mark(self) -> tuple[int, int]:
        return self.epoch, self.counter

    def encode(self) -> bytes:
        """As bytes, for the wire and the disk."""
        return cbor.encode(
            {
                "v": 1,
                "authority": self.authority.multihash,
                "epoch": self.epoch,
                "lock": self.lock,
                "counter": self.counter,
                "signature": self.signature,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Fence:
        """The inverse of `encode`; raises InvalidArgument "invalid.fence", for a forged one too."""
        try:
            value = cbor.decode(data, bytes_max=FENCE_BYTES_MAX)
        except InvalidArgument as exc:
            raise _bad(exc.message) from None
        match value:
            case {
                "v": 1,
                "authority": bytes(authority),
                "epoch": int(epoch),
                "lock": str(lock),
                "counter": int(counter),
                "signature": bytes(signature),
            } if len(value) == len(_FIELDS) and type(epoch) is type(counter) is int:
                pass
            case _:
                raise _bad(f"not the fields {', '.join(_FIELDS)} of a release that is known here")
        if not (0 <= epoch <= _NUMBER_MAX and 0 <= counter <= _NUMBER_MAX):
            raise _bad("epoch or counter is not a number between 0 and 2^63 - 1")
        if not 0 < len(lock) <= LOCK_CHARS_MAX or not lock.isprintable():
            raise _bad(f"the lock's name is not 1 to {LOCK_CHARS_MAX} printable characters")
        try:
            peer = PeerId.from_multihash(authority)
        except ValueError as exc:
            raise _bad(f"the authority is {exc}") from None
        fence = cls(peer, epoch, lock, counter, signature)
        key = peer.public_key
        if key is None or not verify(key, signature, fence._signed_bytes()):
            raise _bad("the signature is not the authority's")
        return fence

    def describe(self) -> str:
        return f"fence {self.lock} {self.epoch}.{self.counter} of {self.authority}"


class _Lock:
    """One lock, as this resource sees it."""

    __slots__ = ("changed", "durable", "highest", "in_flight")

    def __init__(self, mark: tuple[int, int]) -> None:
        self.highest = mark  # refuses what is lower, from the moment that a higher one is seen
        self.durable = mark  # admits: it is on disk, and what was below it has ended
        self.in_flight: Counter[tuple[int, int]] = Counter()
        self.changed: asyncio.Event | None = None

    def wake(self) -> None:
        if self.changed is not None:
            self.changed.set()
            self.changed = None

    async def wait(self) -> None:
        if self.changed is None:
            self.changed = asyncio.Event()
        await self.changed.wait()


class Hold(NamedTuple):
    """A call that goes on under a token; `release` it once."""

    lock: _Lock
    mark: tuple[int, int]

    def release(self) -> None:
        """The call has ended."""
        in_flight = self.lock.in_flight
        in_flight[self.mark] -= 1
        if in_flight[self.mark] <= 0:
            del in_flight[self.mark]
            self.lock.wake()


class Fences:
    """The highest token of each lock that this node has admitted.

    Args:
        store: Keeps them; None: in memory alone, for tests.
        known: From the store: (authority, lock) → (epoch, counter).
        drain_s: See DRAIN_S_MAX.
    """

    def __init__(
        self,
        store: GrantStore | None = None,
        known: Mapping[tuple[str, str], tuple[int, int]] | None = None,
        *,
        drain_s: float = DRAIN_S_MAX,
    ) -> None:
        self._store, self._drain_s = store, drain_s
        self._locks = {name: _Lock(mark) for name, mark in (known or {}).items()}
        self._brought: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._locks)

    def refusal(self, fence: Fence) -> Denied | None:
        """Why a call under `fence` is refused, or None."""
        lock = self._locks.get((str(fence.authority), fence.lock))
        if lock is None or fence.mark >= lock.highest:
            return None
        return Denied(
            f"the lock {fence.lock!r} has a later holder: token {fence.epoch}.{fence.counter} is "
            f"below {lock.highest[0]}.{lock.highest[1]}",
            hint="acquire the lock again",
            code="capability.denied.fenced",
        )

    def enter(self, fence: Fence) -> Hold | None:
        """A hold if nothing has to be waited for, None if `raise_to` has to; raises Denied."""
        if (refusal := self.refusal(fence)) is not None:
            raise refusal
        lock = self._locks.get((str(fence.authority), fence.lock))
        if lock is None or not lock.durable == lock.highest == fence.mark:
            return None
        lock.in_flight[fence.mark] += 1
        return Hold(lock, fence.mark)

    async def raise_to(self, fence: Fence, owner: str = "") -> None:
        """Admit a token that is higher than any before; the lower ones are refused at once.

        `owner` is the principal whose role the call comes from: a new lock counts as theirs.

        Raises Denied if a still higher one comes meanwhile, LimitExceeded if calls under lower ones
        do not end in time or the table is full, and what the store raises.
        """
        name, mark = (str(fence.authority), fence.lock), fence.mark
        lock = self._locks.get(name)
        if lock is None:
            if len(self._locks) >= LOCKS_MAX:
                raise LimitExceeded(f"this node fences {LOCKS_MAX} locks already (LOCKS_MAX)")
            if self._brought[owner] >= LOCKS_PER_OWNER_MAX:
                raise LimitExceeded(
                    f"{owner} has brought in {LOCKS_PER_OWNER_MAX} locks (LOCKS_PER_OWNER_MAX)"
                )
            self._brought[owner] += 1
            lock = self._locks[name] = _Lock((0, 0))
        if mark > lock.highest:
            lock.highest = mark
            lock.wake()  # who waits for a lower one is refused now
        try:
            async with asyncio.timeout(self._drain_s):
                while lock.highest == mark and any(m < mark for m in lock.in_flight):
                    await lock.wait()
        except TimeoutError:
            raise LimitExceeded(
                f"calls under an older token of the lock {fence.lock!r} have not ended within "
                f"{self._drain_s:g} s",
                hint="try again, or revoke the older holder's grant",
                code="limit.fence",
            ) from None
        if lock.durable < mark and self._store is not None:
            await self._store.save_fence(name, mark)
        if (refusal := self.refusal(fence)) is not None:
            raise refusal
        lock.durable = max(lock.durable, mark)
        lock.wake()
