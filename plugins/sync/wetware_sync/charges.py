"""Who is charged for what, what a page has room for, what may wait: the same for both engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from wetware.errors import LimitExceeded
from wetware_sync.engine import PAGE_BYTES_MAX, PAGE_KEYS_MAX, ROW_BYTES, WRITES_MAX

if TYPE_CHECKING:
    from wetware_sync.engine import KeyValue, Limits, Put

WAITING_MAX: Final = 8192
WAITING_BYTES_MAX: Final = 64 << 20
"""Of what was asked for and is not answered; more is refused."""


def charge(key: bytes, value_bytes: int) -> int:
    """Bytes that an owner is charged for a key."""
    return len(key) + value_bytes + ROW_BYTES


def limit(what: str, many: int, most: int) -> None:
    """Raises LimitExceeded of a store's bound."""
    if many > most:
        raise LimitExceeded(
            f"{what}: at most {most}", hint="delete some, or ask the operator of the store"
        )


@dataclass(slots=True)
class Used:
    """Of an owner, or of all."""

    keys: int = 0
    nbytes: int = 0

    def add(self, keys: int, nbytes: int) -> None:
        self.keys += keys
        self.nbytes += nbytes


@dataclass(slots=True)
class Added:
    """What the puts of one owner add: to what they have, to all of the store, to leases (keys)."""

    owner: str
    keys: int = 0
    nbytes: int = 0
    all_keys: int = 0
    all_bytes: int = 0
    leases: dict[int, int] = field(default_factory=dict)

    def put(self, put: Put, owner: str | None = None, lease: int = 0, value_bytes: int = 0) -> None:
        """One that replaces a key of this `owner`; None: there is none."""
        size = charge(put.key, len(put.value))
        before = 0 if owner is None else charge(put.key, value_bytes)
        self.all_keys += owner is None
        self.all_bytes += size - before
        own = owner == self.owner
        self.keys += not own
        self.nbytes += size - before if own else size
        if put.lease and put.lease != lease:
            self.leases[put.lease] = self.leases.get(put.lease, 0) + 1

    def check(self, limits: Limits, mine: Used, every: Used, keys_of: Callable[[int], int]) -> None:
        """Raises LimitExceeded, where so much is there; nobody is refused who needs less then."""
        if self.keys > 0 or self.nbytes > 0:
            limit("keys of one owner", mine.keys + self.keys, limits.owner_keys)
            limit("bytes of one owner", mine.nbytes + self.nbytes, limits.owner_bytes)
            limit("keys in the store", every.keys + self.all_keys, limits.keys)
            limit("bytes in the store", every.nbytes + self.all_bytes, limits.nbytes)
        for lease, keys in self.leases.items():
            limit("keys of one lease", keys_of(lease) + keys, WRITES_MAX)


class Owned(Protocol):
    """A lease."""

    owner: str


def check_leases(limits: Limits, leases: Iterable[Owned], owner: str) -> None:
    """Whether one more is allowed; raises LimitExceeded."""
    owners = [lease.owner for lease in leases]
    limit("leases of one owner", owners.count(owner) + 1, limits.owner_leases)
    limit("leases in the store", len(owners) + 1, limits.leases)


class Room:
    """What the pages of one transaction may still have, together."""

    def __init__(self) -> None:
        self._left = Used(PAGE_KEYS_MAX, PAGE_BYTES_MAX)

    @property
    def is_over(self) -> bool:
        return self._left.keys <= 0 or self._left.nbytes <= 0

    def take(self, items: Iterator[KeyValue], many: int = PAGE_KEYS_MAX) -> list[KeyValue]:
        """As many as there is room for, and at most so many; the next one is not looked at."""
        taken: list[KeyValue] = []
        while len(taken) < many and not self.is_over and (item := next(items, None)):
            taken.append(item)
            self._left.add(-1, -len(item.key) - len(item.value))
        return taken


class Waiting:
    """How much was asked for and is not answered."""

    def __init__(self, hint: str) -> None:
        self._hint = hint
        self.many = self.nbytes = 0

    def begin(self, nbytes: int) -> None:
        """Raises LimitExceeded."""
        if self.many >= WAITING_MAX or self.nbytes + nbytes > WAITING_BYTES_MAX:
            raise LimitExceeded(
                f"{self.many} requests of {self.nbytes} bytes wait for the store", hint=self._hint
            )
        self.many += 1
        self.nbytes += nbytes

    def end(self, nbytes: int) -> None:
        self.many -= 1
        self.nbytes -= nbytes

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Until the block ends."""
        self.begin(nbytes)
        try:
            yield
        finally:
            self.end(nbytes)
