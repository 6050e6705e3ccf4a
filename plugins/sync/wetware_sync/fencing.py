"""What is held, as who holds it shows it: a secret that names one key of a lock, once made.

A write that shows it is done in one transaction with the question whether that key is still there.
So who was paused until the lease had ended, and goes on as if nothing had been, writes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wetware.base import cbor
from wetware.errors import Busy, Denied, InvalidArgument
from wetware_sync.engine import KEY_BYTES_MAX, Compare, Get, Page, Put, Txn
from wetware_sync.keys import LOCK

if TYPE_CHECKING:
    from wetware_sync.engine import Engine, KeyValue, Outcome

HOLD_BYTES_MAX: Final = KEY_BYTES_MAX + 64
TRIES_MAX: Final = 256
"""Of a change to a key that others write all the time."""


@dataclass(frozen=True, slots=True)
class Hold:
    """One thing that is, or was, held.

    Attributes:
        epoch: Of the store.
        revision: That made the key.
        key: Its last part is random: who has not been told cannot name it.
    """

    epoch: int
    revision: int
    key: bytes

    def encode(self) -> bytes:
        return cbor.encode([self.epoch, self.revision, self.key])

    @classmethod
    def decode(cls, data: bytes) -> Hold:
        """The inverse; raises InvalidArgument "invalid.hold"."""
        with contextlib.suppress(InvalidArgument):
            match cbor.decode(data, bytes_max=HOLD_BYTES_MAX):
                # 0 would be the revision of each key that there is not.
                case [int(epoch), int(revision), bytes(key)] if revision and key.startswith(LOCK):
                    return cls(epoch, revision, key)
        raise InvalidArgument(
            "this is not what stands for a lock that is held",
            hint="give `held.hold`, as it is",
            code="invalid.hold",
        )

    def compare(self, epoch: int) -> Compare:
        """That it is held, in the store of this epoch; raises Denied of another one."""
        if self.epoch != epoch:
            raise fenced()
        return Compare(self.key, "create_revision", self.revision)


def fenced() -> Denied:
    return Denied(
        "what the fence stands for is not held any more: its lease has ended, or it was let go",
        hint="take the lock again, and read again what you go by",
        code="capability.denied.fenced",
    )


async def guarded_by(engine: Engine, fence: bytes, txn: Txn, owner: str) -> Outcome:
    """Run a transaction only while what `fence` stands for is held; b"": without a condition.

    Raises Denied "capability.denied.fenced", InvalidArgument for one that has an `otherwise`, too.
    """
    if not fence:
        return await engine.txn(txn, owner)
    if txn.otherwise:
        raise InvalidArgument(
            "a transaction with a fence has no `else`: it would be run without the lock, too",
            code="invalid.fence",
        )
    hold = Hold.decode(fence)
    held = hold.compare(engine.epoch)
    both = Txn(txn.then, (held, *txn.compares), (Get(hold.key),))
    outcome = await engine.txn(both, owner)
    if not outcome.succeeded:
        (page,) = outcome.results
        assert isinstance(page, Page)  # noqa: S101  # what Get answers
        if not any(item.create_revision == hold.revision for item in page.items):
            raise fenced()
    return outcome


async def changed(
    engine: Engine,
    key: bytes,
    change: Callable[[KeyValue | None], bytes],
    owner: str,
    *,
    fence: bytes = b"",
) -> tuple[int, bytes]:
    """Write what `change` makes of what is there; returns the revision, and what was written.

    Raises Busy where others write the key each time, and as `guarded_by`.
    """
    for _ in range(TRIES_MAX):
        page = await engine.read(Get(key))
        item = page.items[0] if page.items else None
        same = Compare(key, "mod_revision", item.mod_revision if item else 0)
        value = change(item)
        outcome = await guarded_by(engine, fence, Txn((Put(key, value),), (same,)), owner)
        if outcome.succeeded:
            return outcome.revision, value
    raise Busy(
        f"others changed it meanwhile, {TRIES_MAX} times: nothing was written", hint="try again"
    )
