"""What a store is, in memory and without regard to speed: what the real one is compared with."""

from __future__ import annotations

import copy
from typing import Any

from wetware.errors import LimitExceeded
from wetware_sync.charges import charge
from wetware_sync.engine import (
    WRITES_MAX,
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    LeaseEnded,
    Limits,
    Order,
    Outcome,
    Page,
    Put,
    Txn,
)

NOTHING = KeyValue(b"", b"", 0, 0, 0)


class Model:
    """Attributes are what they are called; `owners`: of each key, who wrote it last."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.revision = self.compacted = 0
        self.keys: dict[bytes, KeyValue] = {}
        self.owners: dict[bytes, str] = {}
        self.events: list[Event] = []
        self.leases: dict[int, tuple[str, float]] = {}

    def copy(self) -> Model:
        other = copy.copy(self)
        other.keys, other.owners = dict(self.keys), dict(self.owners)
        other.events, other.leases = list(self.events), dict(self.leases)
        return other

    def txn(self, txn: Txn, owner: str) -> Outcome:
        succeeded = all(map(self._holds, txn.compares))
        branch = txn.then if succeeded else txn.otherwise
        targets = [self._targets(operation) for operation in branch]
        if sum(map(len, targets)) > WRITES_MAX:
            raise LimitExceeded("too many")
        for put in branch:
            if type(put) is Put and put.lease and self.leases.get(put.lease, ("", 0))[0] != owner:
                raise LeaseEnded("no lease")
        self._check(branch, owner)
        if any(targets):
            self.revision += 1
        results: list[Page | int] = []
        for operation, keys in zip(branch, targets, strict=True):
            if isinstance(operation, Get):
                results.append(self.read(operation))
                continue
            for key in keys:
                self._write(key, operation, owner)
            results.append(len(keys))
        return Outcome(succeeded, self.revision, tuple(results))

    def _holds(self, compare: Compare) -> bool:
        found = self.keys.get(compare.key)
        if compare.target == "value" and found is None:
            return False
        return bool(getattr(found or NOTHING, compare.target) == compare.operand)

    def _targets(self, operation: Put | Delete | Get) -> list[bytes]:
        match operation:
            case Put():
                return [operation.key]
            case Delete(prefix=True):
                return sorted(k for k in self.keys if k.startswith(operation.key))
            case Delete():
                return [operation.key] if operation.key in self.keys else []
        return []

    def _check(self, branch: tuple[Any, ...], owner: str) -> None:
        """What is written may not bring its owner above a limit, nor all of them."""
        after = self.copy()
        for operation in branch:
            if isinstance(operation, Put):
                after._write(operation.key, operation, owner)
        before, mine = self.usage().get(owner, (0, 0)), after.usage().get(owner, (0, 0))
        if mine[0] > before[0] or mine[1] > before[1]:
            usage = after.usage().values()
            if (
                mine[0] > self.limits.owner_keys
                or mine[1] > self.limits.owner_bytes
                or len(after.keys) > self.limits.keys
                or sum(nbytes for _, nbytes in usage) > self.limits.nbytes
            ):
                raise LimitExceeded("quota")

    def _write(self, key: bytes, operation: Put | Delete, owner: str) -> None:
        before = self.keys.pop(key, None)
        self.owners.pop(key, None)
        now = None
        if isinstance(operation, Put):
            created = before.create_revision if before else self.revision
            version = before.version + 1 if before else 1
            now = KeyValue(key, operation.value, created, self.revision, version, operation.lease)
            self.keys[key], self.owners[key] = now, owner
        self.events.append(Event(key, self.revision, now))

    def read(self, get: Get) -> Page:
        found = [
            kv
            for kv in self.keys.values()
            if (kv.key.startswith(get.key) if get.prefix else kv.key == get.key)
            and kv.key > get.after
            and (not get.created_before or kv.create_revision < get.created_before)
        ]
        by: dict[Order, Any] = {
            Order.KEY: lambda kv: kv.key,
            Order.OLDEST: lambda kv: (kv.create_revision, kv.key),
            Order.NEWEST: lambda kv: (kv.create_revision, kv.key),
        }
        found.sort(key=by[get.order], reverse=get.order is Order.NEWEST)
        return Page(tuple(found[: get.limit]), self.revision, len(found) > get.limit)

    def grant(self, id_: int, ttl_s: float, owner: str) -> None:
        self.leases[id_] = owner, ttl_s

    def end(self, id_: int) -> None:
        if id_ not in self.leases:
            raise LeaseEnded("no lease")
        keys = sorted(kv.key for kv in self.keys.values() if kv.lease == id_)
        self.revision += bool(keys)
        for key in keys:
            self._write(key, Delete(key), "")
        del self.leases[id_]

    def compact(self, revision: int) -> None:
        self.compacted = max(self.compacted, revision)

    def usage(self) -> dict[str, tuple[int, int]]:
        """Owner → keys, and what they are charged."""
        found: dict[str, tuple[int, int]] = {}
        for key, owner in self.owners.items():
            keys, nbytes = found.get(owner, (0, 0))
            found[owner] = keys + 1, nbytes + charge(key, len(self.keys[key].value))
        return found
