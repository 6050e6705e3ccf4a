"""Who is charged for what: counted from etcd's log, so all entrances count the same.

What is under way at this entrance counts as if it were all new, until the log has it. Where that
would be too much, the caller looks at what is really there. What is under way at another entrance
is not seen: by so much a bound can be exceeded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wetware.errors import LimitExceeded
from wetware_sync.engine import ROW_BYTES, WRITES_MAX, KeyValue, Limits, Put, Txn, charge, limit
from wetware_sync.etcd.layout import DATA, LEASES, unwrap


@dataclass(slots=True)
class Used:
    """Of an owner, or by a transaction."""

    keys: int = 0
    nbytes: int = 0

    def add(self, other: Used, sign: int = 1) -> None:
        self.keys += sign * other.keys
        self.nbytes += sign * other.nbytes


@dataclass(slots=True)
class LeaseUsed:
    """A lease: whose it is, and how many keys it has."""

    owner: str
    keys: int = 0


@dataclass(slots=True)
class Charge:
    """What a transaction adds at most."""

    owner: str
    used: Used
    leases: dict[int, int] = field(default_factory=dict)


class Gap(Exception):
    """The log does not say any more what a key was before: count anew."""


class Books:
    """All of it, at one revision of the log."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.all = Used()
        self._owners: dict[str, Used] = {}
        self.leases: dict[int, LeaseUsed] = {}
        self._under_way: dict[str, Used] = {}
        self._all_under_way = Used()
        self._leases_under_way: dict[int, int] = {}

    # --- the log ----------------------------------------------------------------------------------

    def count(self, kv: Any, sign: int = 1) -> None:
        """Etcd's KeyValue of ours is there; or with -1 no more."""
        if kv.key.startswith(LEASES):
            lease = int(kv.key[len(LEASES) :])
            if sign > 0:
                self.leases.setdefault(lease, LeaseUsed(kv.value.decode()))
            else:
                self.leases.pop(lease, None)
        elif kv.key.startswith(DATA):
            owner, value = unwrap(kv.value)
            used = Used(1, charge(kv.key[len(DATA) :], len(value)))
            mine = self._owners.setdefault(owner, Used())
            mine.add(used, sign)
            self.all.add(used, sign)
            if not mine.keys:
                del self._owners[owner]
            if kv.lease in self.leases:
                self.leases[kv.lease].keys += sign

    def follow(self, event: Any) -> int:
        """Count an event of etcd; returns the bytes that are history now. Raises Gap."""
        kv, before = event.kv, event.prev_kv
        if event.type == event.DELETE or kv.version > 1:
            if not before.key:
                raise Gap
            self.count(before, -1)
        if event.type != event.DELETE:
            self.count(kv)
        return len(before.value) + ROW_BYTES

    # --- bounds -----------------------------------------------------------------------------------

    def begin(self, charge: Charge) -> bool:
        """Take note of what is under way; returns whether it is within all bounds in any case."""
        fits = True
        try:
            self.check(charge)
        except LimitExceeded:
            fits = False
        self._note(charge, 1)
        return fits

    def done(self, charge: Charge) -> None:
        """The log has it, or never will."""
        self._note(charge, -1)

    def _note(self, charge: Charge, sign: int) -> None:
        mine = self._under_way.setdefault(charge.owner, Used())
        mine.add(charge.used, sign)
        self._all_under_way.add(charge.used, sign)
        if not mine.keys:
            del self._under_way[charge.owner]
        for lease, keys in charge.leases.items():
            left = self._leases_under_way.get(lease, 0) + sign * keys
            self._leases_under_way[lease] = left
            if not left:
                del self._leases_under_way[lease]

    def check(self, charge: Charge, own: Charge | None = None, in_all: Used | None = None) -> None:
        """Raises LimitExceeded.

        Args:
            charge: What is added to the owner's.
            own: What was noted for it by `begin`, and does not count.
            in_all: What is added to the store's; else the same.
        """
        limits, used, in_all = self._limits, charge.used, in_all or charge.used
        if used.keys > 0 or used.nbytes > 0:
            mine = Used()
            mine.add(self._owners.get(charge.owner, Used()))
            mine.add(self._under_way.get(charge.owner, Used()))
            every = Used(self.all.keys, self.all.nbytes)
            every.add(self._all_under_way)
            if own is not None:
                mine.add(own.used, -1)
                every.add(own.used, -1)
            limit("keys of one owner", mine.keys + used.keys, limits.owner_keys)
            limit("bytes of one owner", mine.nbytes + used.nbytes, limits.owner_bytes)
            limit("keys in the store", every.keys + in_all.keys, limits.keys)
            limit("bytes in the store", every.nbytes + in_all.nbytes, limits.nbytes)
        for lease, keys in charge.leases.items():
            there = self.leases[lease].keys if lease in self.leases else 0
            there += self._leases_under_way.get(lease, 0)
            there -= own.leases.get(lease, 0) if own is not None else 0
            limit("keys of one lease", there + keys, WRITES_MAX)

    def check_leases(self, owner: str) -> None:
        """Whether one more is allowed; raises LimitExceeded."""
        mine = sum(lease.owner == owner for lease in self.leases.values())
        limit("leases of one owner", mine + 1, self._limits.owner_leases)
        limit("leases in the store", len(self.leases) + 1, self._limits.leases)


def most(txn: Txn, owner: str) -> Charge:
    """What either branch adds if all of its keys are new."""
    added = Charge(owner, Used())
    for branch in (txn.then, txn.otherwise):
        used, leases = Used(), dict[int, int]()
        for put in branch:
            if isinstance(put, Put):
                used.add(Used(1, charge(put.key, len(put.value))))
                if put.lease:
                    leases[put.lease] = leases.get(put.lease, 0) + 1
        added.used.keys = max(added.used.keys, used.keys)
        added.used.nbytes = max(added.used.nbytes, used.nbytes)
        for lease, keys in leases.items():
            added.leases[lease] = max(added.leases.get(lease, 0), keys)
    return added


def really(
    puts: Iterable[Put], owner: str, there: Mapping[bytes, tuple[KeyValue, str]]
) -> tuple[Charge, Used]:
    """What they add to their owner's and to the store's, where this is there, with its owners."""
    added, in_all, leases = Used(), Used(), dict[int, int]()
    for put in puts:
        size = charge(put.key, len(put.value))
        row, before = there.get(put.key, (None, ""))
        old = Used(1, charge(row.key, len(row.value))) if row else Used()
        in_all.add(Used(1, size))
        in_all.add(old, -1)
        added.add(Used(1, size))
        if before == owner:
            added.add(old, -1)
        if put.lease and (row is None or row.lease != put.lease):
            leases[put.lease] = leases.get(put.lease, 0) + 1
    return Charge(owner, added, leases), in_all
