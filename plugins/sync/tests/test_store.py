"""The store of the embedded engine, beside a model of it, and on disks that are full or damaged."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.failing_disk import Disk, forget

from wetware.base.files import Files
from wetware.base.threads import Threads
from wetware.errors import ConfigError, WetwareError
from wetware_sync.embedded import store as module
from wetware_sync.embedded.engine import EmbeddedEngine
from wetware_sync.embedded.store import FILE, Change, Damaged, Store
from wetware_sync.engine import (
    Compacted,
    Compare,
    Delete,
    Get,
    Limits,
    Order,
    Outcome,
    Put,
    Txn,
    Unwritten,
)

from .model import Model
from .parts import ADA, BOB, delete, get, put, running, told

KEYS = [b"%s/%d" % (stem, n) for stem in (b"a", b"b") for n in range(3)]
LIMITS = Limits(owner_keys=4, owner_bytes=1200, keys=5, nbytes=2000)

owners = st.sampled_from([ADA, BOB])
keys = st.sampled_from(KEYS)
prefixes = st.sampled_from([b"", b"a/", b"b/", b"b/1", b"\xff"])
puts = st.builds(
    Put, keys, st.integers(0, 600).map(lambda size: b"x" * size), st.sampled_from([0, 0, 1, 2])
)
# Each field is said: of a named tuple hypothesis would make up those that have defaults.
deletes = st.builds(Delete, keys, st.just(False)) | st.builds(Delete, prefixes, st.just(True))
gets = st.builds(
    Get,
    prefixes,
    st.just(True),
    after=st.sampled_from([b"", b"a/1", b"b/"]),
    limit=st.integers(1, 7),
    order=st.just(Order.KEY),
    created_before=st.just(0),
) | st.builds(
    Get,
    prefixes,
    st.just(True),
    after=st.just(b""),
    limit=st.integers(1, 7),
    order=st.sampled_from(Order),
    created_before=st.integers(0, 12),
)
compares = st.builds(
    Compare,
    keys,
    st.sampled_from(["version", "create_revision", "mod_revision"]),
    st.integers(0, 6),
) | st.builds(Compare, keys, st.just("value"), st.just(b"xxx"))
branches = st.lists(puts | deletes | gets, max_size=4).map(tuple)
txns = st.builds(Txn, branches, st.lists(compares, max_size=2).map(tuple), branches)


class Stores(RuleBasedStateMachine):
    """What the store answers is what the model does, also after a restart."""

    @initialize()
    def start(self) -> None:
        self.disk = Disk(random.Random(0))
        self.model = Model(LIMITS)
        self.store = Store(self.disk, LIMITS)

    def both(self, name: str, **terms: Any) -> tuple[Any, Any]:
        (result,) = self.store.commit([Change(partial(getattr(Store, name), **terms))]).results
        expected, refused = None, type(None)
        try:
            expected = getattr(self.model, name)(**terms)
        except WetwareError as exc:
            refused = type(exc)
        if isinstance(result, WetwareError) or refused is not type(None):
            assert type(result) is refused
            return None, None
        assert not isinstance(result, Exception), result
        self.model.compacted = max(self.model.compacted, self.store.compacted)
        return result, expected

    @rule(txn=txns, owner=owners)
    def txn(self, txn: Txn, owner: str) -> None:
        try:
            txn.check()
        except WetwareError:
            return
        result, expected = self.both("txn", txn=txn, owner=owner)
        assert isinstance(result, Outcome | None)
        assert result == expected

    @rule(owner=owners)
    def grant(self, owner: str) -> None:
        id_ = len(self.model.leases) + 1
        if id_ not in self.model.leases:
            self.both("grant", id_=id_, ttl_s=10.0, owner=owner)

    @rule(id_=st.integers(1, 3))
    def end(self, id_: int) -> None:
        self.both("end", id_=id_)

    @rule(back=st.integers(0, 5))
    def compact(self, back: int) -> None:
        self.both("compact", revision=max(0, self.model.revision - back))

    @rule(get=gets)
    def read(self, get: Get) -> None:
        assert self.store.read(get) == self.model.read(get)

    @rule(revision=st.integers(1, 30), key=prefixes)
    def watch(self, revision: int, key: bytes) -> None:
        """From any revision: all of it, or the word that it is compacted."""
        wanted = [e for e in self.model.events if e.revision >= revision and e.key.startswith(key)]
        if revision <= self.store.compacted:
            with pytest.raises(Compacted) as refused:
                self.store.events(key, revision, prefix=True)
            assert refused.value.revision == self.store.compacted + 1
            return
        told = []
        while revision <= self.store.revision:
            batch = self.store.events(key, revision, prefix=True)
            told += batch.events
            assert batch.revision >= revision
            revision = batch.revision + 1
        assert told == wanted

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store(self.disk, LIMITS)

    @rule()
    def idle(self) -> None:
        self.store.idle()

    @invariant()
    def all_is_accounted_for(self) -> None:
        usage = {name: (o.keys, o.nbytes) for name, o in self.store._owners.items()}
        assert usage == self.model.usage()
        assert self.store.used.keys == len(self.model.keys)
        assert self.store.revision == self.model.revision
        leases = {id_: (row.owner, row.ttl_s) for id_, row in self.store.leases.items()}
        assert leases == self.model.leases
        kept = [kv.lease for kv in self.model.keys.values() if kv.lease]
        assert sum(row.keys for row in self.store.leases.values()) == len(kept)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            forget(self.disk)


TestStores = pytest.mark.usefixtures("small_steps")(Stores.TestCase)
TestStores.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HISTORY_ROWS_MAX", 10)
    monkeypatch.setattr(module, "SWEPT_ROWS", 12)
    monkeypatch.setattr(module, "SCANNED_ROWS", 12)


def commit(store: Store, *operations: Any, owner: str = ADA) -> Any:
    txn = Txn(tuple(operations))
    return store.commit([Change(partial(Store.txn, txn=txn, owner=owner), txn.only_deletes)])


def test_the_history_is_bounded_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HISTORY_BYTES_MAX", 50_000)
    store = Store(Files(tmp_path / "s"), Limits())
    commit(store, *(Put(b"kept/%d" % n, b"") for n in range(100)))
    for n in range(150):
        commit(store, Put(b"a", bytes(1000)), Put(b"b/%d" % n, b""))
        commit(store, Delete(b"b/%d" % n))
    assert 200 < store.compacted < store.revision
    ((rows,),) = store.db.execute("SELECT COUNT(*) FROM log").fetchall()
    assert rows < 101 + 3 * (store.revision - store.compacted) + module.SWEPT_ROWS
    store.commit([Change(partial(Store.compact, revision=store.revision))])
    while store.waits:
        store.idle()
    ((rows,),) = store.db.execute("SELECT COUNT(*) FROM log").fetchall()
    assert rows == 101
    assert len(store.read(Get(b"", prefix=True)).items) == 101
    assert (store._history, store._garbage) == (0, 0)
    store.close()


def test_what_is_damaged_is_not_given_out(tmp_path: Path) -> None:
    store = Store(Files(tmp_path / "s"), Limits())
    commit(store, Put(b"a", b"right"))
    commit(store, Put(b"b", b"right"))
    store.close()
    db = sqlite3.connect(tmp_path / "s" / FILE)
    db.execute("UPDATE log SET value = X'00' WHERE key = ?", (b"a",))
    db.commit()
    db.close()
    store = Store(Files(tmp_path / "s"), Limits())
    assert store.read(Get(b"b")).items[0].value == b"right"
    with pytest.raises(Damaged, match="revision 1"):
        store.read(Get(b"a"))
    with pytest.raises(Damaged, match="revision 1"):
        store.events(b"", 1, prefix=True)
    store.close()


def test_one_that_meets_damage_is_refused_whole_and_alone(tmp_path: Path) -> None:
    store = Store(Files(tmp_path / "s"), Limits())
    commit(store, Put(b"a", b"right"))
    store.db.execute("UPDATE log SET value = X'00'")
    txns = [
        Txn((Put(b"b", b""),)),
        Txn((Put(b"c", b""), Get(b"a"))),
        Txn((Put(b"d", b""), Put(b"e", b""))),
    ]
    done = store.commit([Change(partial(Store.txn, txn=txn, owner=ADA)) for txn in txns])
    assert [type(result) for result in done.results] == [Outcome, Damaged, Outcome]
    assert [(e.key, e.revision) for e in done.events] == [(b"b", 2), (b"d", 3), (b"e", 3)]
    assert [store.read(Get(key)).items == () for key in (b"b", b"c", b"d")] == [False, True, False]
    assert store.used.keys == 4
    store.close()


@pytest.mark.parametrize("how", ["version", "schema", "bytes"])
def test_what_is_no_store_is_not_opened(tmp_path: Path, how: str) -> None:
    Store(Files(tmp_path / "s"), Limits()).close()
    path = tmp_path / "s" / FILE
    assert path.stat().st_mode & 0o777 == 0o600
    if how == "bytes":
        path.write_bytes(b"x" * 8192)
    else:
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version=7" if how == "version" else "DROP TABLE leases")
        db.commit()
        db.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="cannot be used"):
        Store(Files(tmp_path / "s"), Limits())
    assert path.read_bytes() == before


def test_a_store_has_one_process(tmp_path: Path) -> None:
    store = Store(Files(tmp_path / "s"), Limits())
    commit(store, Put(b"a", b""))
    with pytest.raises(ConfigError, match="locked"):
        Store(Files(tmp_path / "s"), Limits())
    store.close()


@pytest.mark.anyio
async def test_on_a_full_disk_all_can_be_given_up_and_read(small_disk: Any) -> None:
    files = Files(small_disk.path / "s")
    engine = EmbeddedEngine(files, run_sync=Threads().run)
    async with running(engine):
        lease = await engine.grant(60.0, ADA)
        await put(engine, b"held", lease=lease)
        many = 0
        with contextlib.suppress(Unwritten):
            while True:
                await put(engine, b"a/%04d" % many, bytes(50_000))
                many += 1
        assert many > 100
        small_disk.fill()
        assert not small_disk.free_bytes
        with pytest.raises(Unwritten, match=r"full|No space"):
            await put(engine, b"b", bytes(50_000))
        assert await get(engine, b"b") is None
        assert (await engine.status()).failing
        assert len((await engine.read(Get(b"a/", prefix=True, limit=20))).items) == 20
    small_disk.fill()
    engine = EmbeddedEngine(files, run_sync=Threads().run)
    async with running(engine):
        revision = (await engine.status()).revision
        watch = engine.watch(b"", revision + 1, BOB, prefix=True)
        follows = asyncio.ensure_future(told(watch, revision + many + 1))
        for n in range(many):
            small_disk.fill()
            assert await delete(engine, b"a/%04d" % n) == 1
        await engine.end(lease, ADA)
        events = await follows
        assert [e.key for e in events] == [*(b"a/%04d" % n for n in range(many)), b"held"]
        assert (await engine.read(Get(b"", prefix=True))).items == ()
    small_disk.free()
    engine = EmbeddedEngine(files, run_sync=Threads().run)
    async with running(engine):
        assert await put(engine, b"b", bytes(50_000)) == revision + many + 2
        assert not (await engine.status()).failing


@pytest.mark.anyio
async def test_a_lease_whose_end_the_disk_refused_ends_later(tmp_path: Path) -> None:
    disk = Disk(random.Random(1))
    now = [0.0]
    engine = EmbeddedEngine(disk, run_sync=Threads().run, now=lambda: now[0])
    async with running(engine):
        lease = await engine.grant(10.0, ADA)
        revision = await put(engine, b"a", lease=lease)
        watch = engine.watch(b"a", revision + 1, ADA)
        disk.faults = {"log": 1.0, "write": 1.0}
        with pytest.raises(WetwareError):
            await engine.end(lease, ADA)
        disk.faults = {}
        assert await get(engine, b"a") is not None
        with pytest.raises(WetwareError, match="no lease"):
            await engine.keep(lease, ADA)
        now[0] += 2
        assert [e.now for e in await told(watch, revision + 1)] == [None]
    forget(disk)


@pytest.mark.anyio
async def test_who_stops_waiting_takes_nothing_back(tmp_path: Path) -> None:
    engine = EmbeddedEngine(Files(tmp_path / "s"), run_sync=Threads().run)
    async with running(engine):
        task = asyncio.ensure_future(put(engine, b"a"))
        grants = asyncio.ensure_future(engine.grant(10.0, ADA))
        await asyncio.sleep(0)
        task.cancel()
        grants.cancel()
        await asyncio.gather(task, grants, return_exceptions=True)
        await put(engine, b"b")  # after both
        assert await get(engine, b"a") is not None
        assert (await engine.status()).leases == 1
        assert len(engine._leases) == 1  # and it will end
    assert engine._waiting.many == engine._waiting.nbytes == 0
