"""Random histories of a store on a disk that fails, and what has to be true after each step."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.failing_disk import Disk, forget

from wetware.errors import ConfigError, WetwareError
from wetware_sync.embedded.store import Change, Store
from wetware_sync.engine import (
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Limits,
    Operation,
    Outcome,
    Put,
    Txn,
    Unknown,
    Unwritten,
)

from .model import Model

OWNERS = ("local:ada", "local:bob")
KEYS = [b"%s/%d" % (stem, n) for stem in (b"a", b"b", b"c") for n in range(4)]
SIZES = (0, 10, 10, 200, 3000, 9000)
DISK_REFUSES = (Unwritten, Unknown)


class Lost(AssertionError):
    """What was acknowledged is not there, or what was not is."""


@dataclass(frozen=True, slots=True)
class Step:
    """A change of the store, and the same of the model."""

    change: Change
    to_model: Callable[[Model], Any]


class Unsynced(Disk):
    """SQLite is told not to sync, if that is left out."""

    def connect(self, name: str) -> Any:
        connection = super().connect(name)
        if self.dropped != "synchronous":
            return connection
        execute = connection.execute

        def without(sql: str, params: Any = ()) -> Any:
            return execute(sql.replace("synchronous=FULL", "synchronous=OFF"), params)

        connection.execute = without
        return connection


class History:
    """What a store was told, and what it has acknowledged.

    Attributes:
        model: With all that was acknowledged.
        unsure: What a crash may bring back instead: the store after something Unknown.
        seen: Revision → what anybody was shown of it. It stays so for ever.
    """

    def __init__(self, seed: int, dropped: str = "") -> None:
        self.rng = rng = random.Random(seed)
        self.disk = Unsynced(rng, dropped)
        self.model = Model()
        self.unsure: list[Model] = []
        self.seen: dict[int, list[Event]] = {}
        self.leases = 0
        self.killed = False  # in a commit, in the life before
        self.acknowledged = self.refused = self.unknown = 0

    def run(self) -> None:
        """Some lives, each of which ends in its own way, and what is there after the last."""
        try:
            for _ in range(self.rng.randrange(2, 5)):
                self._live()
            self.disk.faults = {}
            try:
                store = Store(self.disk, Limits())
            except ConfigError as refused:
                raise Lost(f"all of it: {refused}") from refused
            self._compare(store)
        finally:
            forget(self.disk)

    def _live(self) -> None:
        rng, disk = self.rng, self.disk
        if rng.random() < 0.7:
            likely = rng.choice([0.01, 0.05, 0.2])
            kinds = [("sync", "log"), ("log",), ("write",), ("sync", "log", "write", "read")]
            disk.faults = dict.fromkeys(rng.choice(kinds), likely)
            disk.faults["log's name"] = rng.choice([0, 0.5])
        disk.dies_in_commit = rng.choice([0, 0, 0.2])
        if rng.random() < 0.4:
            disk.calls_left = int(rng.expovariate(1 / 60)) + 1
        store = None
        with contextlib.suppress(ConfigError):
            store = Store(disk, Limits())
            self._compare(store)
            acts = rng.choice([0, 1, 2, 4, 8])
            if self.killed and rng.random() < 0.7:
                acts = 0  # nothing brings to the disk what was only read since
            for _ in range(acts):
                disk.full = rng.random() < 0.1
                self._commit(store, [self._step() for _ in range(rng.choice([1, 1, 2, 4]))])
                if disk.dead:
                    break
                self._check(store, self.model)
                if rng.random() < 0.2:
                    store.idle()
            disk.dead = disk.dead or not acts or rng.random() < 0.7
        if store is not None:
            store.close()
        # A process that is killed in a commit, a start, and then a power loss: that is rare.
        self.killed = disk.died_in_commit
        disk.crash(power=rng.random() < (0.1 if disk.died_in_commit else 0.6))

    def _step(self) -> Step:
        rng = self.rng
        owner = rng.choice(OWNERS)
        what = rng.choices(["txn", "grant", "end", "compact"], [10, 1, 1, 1])[0]
        if what == "grant":
            self.leases += 1
            terms: dict[str, Any] = {"id_": self.leases, "ttl_s": 10.0, "owner": owner}
            return _both("grant", **terms)
        if what == "end" and self.leases:
            return _both("end", must=True, id_=rng.randrange(self.leases) + 1)
        if what == "compact":
            return _both("compact", revision=max(0, self.model.revision - rng.randrange(6)))
        txn = Txn(self._branch(), self._compares(), self._branch())
        size = txn.check()
        return _both("txn", must=txn.only_deletes, size=size, txn=txn, owner=owner)

    def _compares(self) -> tuple[Compare, ...]:
        rng = self.rng
        if rng.random() < 0.6:
            return ()
        key = rng.choice(KEYS)
        found = self.model.keys.get(key)
        if rng.random() < 0.3:
            return (Compare(key, "value", found.value if found else b""),)
        target: Any = rng.choice(["version", "create_revision", "mod_revision"])
        number = getattr(found, target) if found else 0
        return (Compare(key, target, number + (rng.random() < 0.3)),)

    def _branch(self) -> tuple[Operation, ...]:
        rng = self.rng
        if rng.random() < 0.1:
            return (Delete(rng.choice([b"a/", b"b/", b""]), prefix=True),)
        chosen: list[Operation] = []
        for key in rng.sample(KEYS, rng.choice([1, 1, 2, 3])):
            if rng.random() < 0.25:
                chosen.append(Delete(key))
                continue
            lease = rng.randrange(self.leases + 1) if rng.random() < 0.3 else 0
            chosen.append(Put(key, rng.randbytes(rng.choice(SIZES)), lease))
        if rng.random() < 0.2:
            chosen.append(Get(b"", prefix=True, limit=rng.randrange(1, 9)))
        return tuple(chosen)

    def _commit(self, store: Store, steps: list[Step]) -> None:
        before = self.model.copy()
        done = store.commit([step.change for step in steps])
        wrote = False
        unknown: list[Step] = []
        for step, result in zip(steps, done.results, strict=True):
            if isinstance(result, DISK_REFUSES):
                self.refused += 1
                if isinstance(result, Unknown):
                    unknown.append(step)
                continue
            self.acknowledged += 1
            expected = _apply(step, self.model)
            said = isinstance(expected, Outcome) and expected != result
            if said and not isinstance(result, WetwareError):
                raise Lost(f"{result} instead of {expected}")
            if isinstance(expected, WetwareError) and type(expected) is not type(result):
                raise Lost(f"{result!r} instead of {expected!r}")
            wrote = wrote or not isinstance(result, WetwareError)
        events = self.model.events[len(before.events) :]
        if done.events != events:
            raise Lost(f"watchers were told {done.events} instead of {events}")
        self._show(events)
        self.model.compacted = max(self.model.compacted, done.compacted)
        if self.model.revision != before.revision:
            self.unsure = []  # it has written over what might come back
        self.unknown += len(unknown)
        after = self.model.copy()
        for step in unknown:
            _apply(step, after)
            self.unsure.append(after.copy())

    def _show(self, events: list[Event]) -> None:
        by_revision: dict[int, list[Event]] = {}
        for event in events:
            by_revision.setdefault(event.revision, []).append(event)
        for revision, some in by_revision.items():
            if self.seen.setdefault(revision, some) != some:
                raise Lost(f"revision {revision} was {self.seen[revision]}, and is {some}")

    def _compare(self, store: Store) -> None:
        """A store that was opened has all that was acknowledged, and nothing that was refused."""
        with self._sound():
            why = ""
            for model in (self.model, *self.unsure):
                try:
                    self._check(store, model)
                except Lost as lost:
                    why = why or str(lost)
                    continue
                self.model, self.unsure = model, []
                self._show([e for e in model.events if e.revision > store.compacted])
                return
            raise Lost(why)

    def _check(self, store: Store, model: Model) -> None:
        with self._sound():
            items: list[KeyValue] = []
            more, after = True, b""
            while more:
                try:
                    page = store.read(Get(b"", prefix=True, limit=5, after=after))
                except WetwareError as refused:
                    raise Lost(f"it cannot be read: {refused}") from refused
                more = page.more
                items += page.items
                after = page.items[-1].key if more else b""
            if store.revision != model.revision:
                raise Lost(f"revision {store.revision}, not {model.revision}")
            if items != [model.keys[key] for key in sorted(model.keys)]:
                raise Lost(f"the keys {items} instead of {model.keys}")
            if {i: (r.owner, r.ttl_s) for i, r in store.leases.items()} != model.leases:
                raise Lost(f"the leases {store.leases} instead of {model.leases}")
            usage = {name: (o.keys, o.nbytes) for name, o in store._owners.items() if o.keys}
            if usage != model.usage():
                raise Lost(f"charged {usage} instead of {model.usage()}")
            compacted, told = store.compacted, list[Event]()
            if compacted < model.compacted:
                raise Lost(f"compacted at {compacted} instead of {model.compacted}")
            while compacted < store.revision:
                batch = store.events(b"", compacted + 1, prefix=True)
                told += batch.events
                compacted = batch.revision
            if told != [e for e in model.events if e.revision > store.compacted]:
                raise Lost(f"the history {told} instead of {model.events}")

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        disk = self.disk
        before = disk.faults, disk.calls_left, disk.dead, disk.dies_in_commit
        disk.faults, disk.calls_left, disk.dead, disk.dies_in_commit = {}, None, False, 0
        try:
            yield
        finally:
            disk.faults, disk.calls_left, disk.dead, disk.dies_in_commit = before


def _both(name: str, *, must: bool = False, size: int = 0, **terms: Any) -> Step:
    apply = partial(getattr(Store, name), **terms)
    return Step(Change(apply, must, size), lambda model: getattr(model, name)(**terms))


def _apply(step: Step, model: Model) -> Any:
    try:
        return step.to_model(model)
    except WetwareError as refused:
        return refused
