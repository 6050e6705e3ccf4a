"""Who is charged for what: counted from etcd's log, so all entrances count the same.

What is under way at this entrance counts as if it were all new, until the log has it. Where that
would be too much, the caller looks at what is really there. What is under way at another entrance
is not seen: by so much a bound can be exceeded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from wetware.errors import LimitExceeded
from wetware_sync.charges import Added, Used, charge
from wetware_sync.engine import ROW_BYTES, Limits, Put, Txn
from wetware_sync.etcd.layout import DATA, LEASES, unwrap


@dataclass(slots=True)
class LeaseUsed:
    """A lease: whose it is, and how many keys it has."""

    owner: str
    keys: int = 0


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
        self._leases_under_way: Counter[int] = Counter()

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
            nbytes = sign * charge(kv.key[len(DATA) :], len(value))
            mine = self._owners.setdefault(owner, Used())
            mine.add(sign, nbytes)
            self.all.add(sign, nbytes)
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

    def begin(self, added: Added) -> bool:
        """Take note of what is under way; returns whether it is within all bounds in any case."""
        fits = True
        try:
            self._check(added)
        except LimitExceeded:
            fits = False
        self._note(added, 1)
        return fits

    def done(self, added: Added) -> None:
        """The log has it, or never will."""
        self._note(added, -1)

    def check_instead(self, added: Added, noted: Added) -> None:
        """Raises LimitExceeded where this is too much in the place of what was noted."""
        self._note(noted, -1)
        try:
            self._check(added)
        finally:
            self._note(noted, 1)

    def _note(self, added: Added, sign: int) -> None:
        keys, nbytes = sign * added.keys, sign * added.nbytes
        mine = self._under_way.setdefault(added.owner, Used())
        mine.add(keys, nbytes)
        self._all_under_way.add(keys, nbytes)
        if not mine.keys:
            del self._under_way[added.owner]
        for lease, keys in added.leases.items():
            self._leases_under_way[lease] += sign * keys
            if not self._leases_under_way[lease]:
                del self._leases_under_way[lease]

    def _check(self, added: Added) -> None:
        none, owner = Used(), added.owner
        mine = _sum(self._owners.get(owner, none), self._under_way.get(owner, none))
        added.check(self._limits, mine, _sum(self.all, self._all_under_way), self._keys_of)

    def _keys_of(self, lease: int) -> int:
        there = self.leases[lease].keys if lease in self.leases else 0
        return there + self._leases_under_way[lease]


def _sum(one: Used, other: Used) -> Used:
    return Used(one.keys + other.keys, one.nbytes + other.nbytes)


def most(txn: Txn, owner: str) -> Added:
    """What either branch adds if all of its keys are new."""
    added, other = Added(owner), Added(owner)
    for branch, each in ((txn.then, added), (txn.otherwise, other)):
        for put in branch:
            if isinstance(put, Put):
                each.put(put)
    added.all_keys = added.keys = max(added.keys, other.keys)
    added.all_bytes = added.nbytes = max(added.nbytes, other.nbytes)
    for lease, keys in other.leases.items():
        added.leases[lease] = max(added.leases.get(lease, 0), keys)
    return added
