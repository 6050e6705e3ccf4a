"""What every engine keeps: one suite for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from wetware.errors import InvalidArgument, LimitExceeded
from wetware_sync.engine import (
    PAGE_BYTES_MAX,
    VALUE_BYTES_MAX,
    WRITES_MAX,
    Closed,
    Compacted,
    Compare,
    Delete,
    Engine,
    Event,
    Get,
    KeyValue,
    LeaseEnded,
    Limits,
    Order,
    Page,
    Put,
    Txn,
)

from .etcds import anyio_backend, one_loop  # noqa: F401 fixtures
from .parts import ADA, BOB, FACTORIES, Clock, absent, delete, get, put, running, told

pytestmark = pytest.mark.anyio

LIMITS = Limits(owner_keys=300, owner_bytes=2 << 20, owner_leases=2, owner_watches=2, keys=400)


SLOW_ETCD = pytest.mark.parametrize(
    "kind", ["embedded", pytest.param("etcd", marks=pytest.mark.long)], indirect=True
)
"""Where a lease of etcd ends by the clock: one test of the others shows that it does."""


@pytest.fixture(params=list(FACTORIES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock(kind: str) -> Clock:
    clock: Clock = FACTORIES[kind][1]()
    return clock


@pytest.fixture
def factory(kind: str, tmp_path: Path, clock: Clock) -> Callable[..., Engine]:
    return lambda limits=None: FACTORIES[kind][0](tmp_path, clock, limits)


@pytest.fixture
async def engine(factory: Callable[..., Engine]) -> AsyncIterator[Engine]:
    async with running(factory()) as engine:
        yield engine


# --- transactions ---------------------------------------------------------------------------------


async def test_a_key_counts_its_revisions_and_versions(engine: Engine) -> None:
    first = await put(engine, b"a", b"1")
    assert await put(engine, b"b", b"x") == first + 1
    assert await put(engine, b"a", b"2") == first + 2
    assert await get(engine, b"a") == KeyValue(b"a", b"2", first, first + 2, 2)
    assert await delete(engine, b"a") == 1
    assert await get(engine, b"a") is None
    assert await put(engine, b"a", b"3") == first + 4
    assert await get(engine, b"a") == KeyValue(b"a", b"3", first + 4, first + 4, 1)


async def test_what_changes_nothing_has_no_revision(engine: Engine) -> None:
    revision = await put(engine, b"a")
    assert await delete(engine, b"b") == 0
    assert await delete(engine, b"b", prefix=True) == 0
    outcome = await engine.txn(Txn((Put(b"a", b"x"),), (absent(b"a"),), (Get(b"a"),)), ADA)
    assert not outcome.succeeded
    assert outcome.revision == revision
    assert outcome.results == (Page((KeyValue(b"a", b"", revision, revision, 1),), revision),)
    assert (await engine.status()).revision == revision


async def test_all_of_a_transaction_has_one_revision(engine: Engine) -> None:
    await put(engine, b"x/1")
    before = await put(engine, b"x/2")
    txn = Txn(
        (Put(b"a", b"1"), Delete(b"x/", prefix=True), Put(b"b", b"2"), Get(b"a"), Get(b"x/1"))
    )
    outcome = await engine.txn(txn, ADA)
    revision = outcome.revision
    assert outcome.succeeded
    assert revision == before + 1
    a = KeyValue(b"a", b"1", revision, revision, 1)
    assert outcome.results == (1, 2, 1, Page((a,), revision), Page((), revision))
    watch = engine.watch(b"", revision, ADA, prefix=True)
    b = KeyValue(b"b", b"2", revision, revision, 1)
    assert await told(watch, revision) == [
        Event(b"a", revision, a),
        Event(b"x/1", revision, None),
        Event(b"x/2", revision, None),
        Event(b"b", revision, b),
    ]


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        (Compare(b"a", "value", b"1"), True),
        (Compare(b"a", "value", b"0"), False),
        (Compare(b"a", "version", 2), True),
        (Compare(b"a", "version", 1), False),
        (Compare(b"a", "create_revision", 0), False),
        (Compare(b"a", "mod_revision", (1 << 64) - 1), False),
        (Compare(b"no", "version", 0), True),
        (Compare(b"no", "mod_revision", 0), True),
        (Compare(b"no", "create_revision", 1), False),
        (Compare(b"no", "value", b""), False),
    ],
)
async def test_compares(engine: Engine, compare: Compare, holds: bool) -> None:
    await put(engine, b"a", b"0")
    await put(engine, b"a", b"1")
    assert (await engine.txn(Txn((), (compare,)), ADA)).succeeded is holds
    both = Txn((), (compare, Compare(b"a", "version", 2)))
    assert (await engine.txn(both, ADA)).succeeded is holds


async def test_of_many_that_create_a_key_one_succeeds(engine: Engine) -> None:
    txns = [Txn((Put(b"a", b"%d" % n),), (absent(b"a"),), (Get(b"a"),)) for n in range(50)]
    outcomes = await asyncio.gather(*(engine.txn(txn, ADA) for txn in txns))
    (won,) = [n for n, outcome in enumerate(outcomes) if outcome.succeeded]
    kept = await get(engine, b"a")
    assert kept is not None
    assert kept.value == b"%d" % won
    lost = [outcome.results[0] for outcome in outcomes if not outcome.succeeded]
    assert all(isinstance(page, Page) and page.items == (kept,) for page in lost)


async def test_what_is_asked_is_checked_first(engine: Engine) -> None:
    with pytest.raises(InvalidArgument):
        await put(engine, b"")
    with pytest.raises(LimitExceeded):
        await put(engine, b"a", bytes(VALUE_BYTES_MAX + 1))
    with pytest.raises(InvalidArgument):
        await engine.read(Get(b"", limit=0))
    with pytest.raises(InvalidArgument):
        await engine.grant(1.0, ADA)
    with pytest.raises(InvalidArgument):
        engine.watch(b"", 1, ADA)
    with pytest.raises(InvalidArgument):
        engine.watch(b"a", 0, ADA)
    with pytest.raises(InvalidArgument):
        engine.watch(b"a", 1 << 62, ADA)
    with pytest.raises(InvalidArgument):
        await engine.read(Get(b"a", created_before=1 << 62))


async def test_more_keys_than_a_transaction_may_have_are_not_deleted(engine: Engine) -> None:
    for n in range(WRITES_MAX + 1):
        await put(engine, b"a/%03d" % n)
    with pytest.raises(LimitExceeded):
        await delete(engine, b"a/", prefix=True)
    assert await delete(engine, b"a/0", prefix=True) == 100
    assert await delete(engine, b"a/", prefix=True) == WRITES_MAX + 1 - 100


# --- reading --------------------------------------------------------------------------------------


async def test_pages(engine: Engine) -> None:
    for n in range(10):
        await put(engine, b"a/%d" % n)
    await put(engine, b"b")
    revision = await put(engine, b"a")
    page = await engine.read(Get(b"a/", prefix=True, limit=4))
    assert [kv.key for kv in page.items] == [b"a/0", b"a/1", b"a/2", b"a/3"]
    assert page.more
    assert page.revision == revision
    page = await engine.read(Get(b"a/", prefix=True, limit=6, after=b"a/3"))
    assert [kv.key for kv in page.items] == [b"a/%d" % n for n in range(4, 10)]
    assert not page.more
    page = await engine.read(Get(b"", prefix=True))
    assert len(page.items) == 12


async def test_a_page_ends_by_its_bytes(engine: Engine) -> None:
    for n in range(6):
        await put(engine, b"a/%d" % n, bytes(VALUE_BYTES_MAX))
    page = await engine.read(Get(b"a/", prefix=True))
    assert page.more
    assert PAGE_BYTES_MAX // VALUE_BYTES_MAX <= len(page.items) < 6


async def test_the_order_of_creation(engine: Engine) -> None:
    for key in (b"q/c", b"q/a", b"q/b", b"q/a"):
        last = await put(engine, key)
    oldest = await engine.read(Get(b"q/", prefix=True, order=Order.OLDEST, limit=2))
    assert [kv.key for kv in oldest.items] == [b"q/c", b"q/a"]
    assert oldest.more
    newest = Get(b"q/", prefix=True, order=Order.NEWEST, limit=1, created_before=last - 1)
    assert [kv.key for kv in (await engine.read(newest)).items] == [b"q/a"]


# --- watching -------------------------------------------------------------------------------------


async def test_a_watch_tells_what_was_and_what_comes(engine: Engine) -> None:
    first = await put(engine, b"a/1")
    await put(engine, b"b/1")
    await put(engine, b"a/2")
    watch = engine.watch(b"a/", first, ADA, prefix=True)
    events = await told(watch, first + 2)
    waits = asyncio.ensure_future(watch.next())
    await put(engine, b"b/2")
    await asyncio.sleep(0.05)
    assert not waits.done()
    last = await put(engine, b"a/1")
    batch = await waits
    assert batch.revision == last
    events += batch.events
    assert [(e.key, e.revision) for e in events] == [
        (b"a/1", first),
        (b"a/2", first + 2),
        (b"a/1", last),
    ]
    one = engine.watch(b"a/1", first + 1, BOB)
    assert [e.revision for e in await told(one, last)] == [last]


async def test_a_watch_may_begin_in_the_future(engine: Engine) -> None:
    revision = await put(engine, b"a")
    watch = engine.watch(b"a", revision + 3, ADA)
    for _ in range(4):
        last = await put(engine, b"a")
    assert [e.revision for e in await told(watch, last)] == [last - 1, last]


async def test_a_watch_that_is_cancelled_has_lost_nothing(engine: Engine) -> None:
    revision = await put(engine, b"a")
    watch = engine.watch(b"a", revision, ADA)
    seen: list[Event] = []
    for _ in range(20):
        waits = asyncio.ensure_future(watch.next())
        last = await put(engine, b"a")
        await asyncio.sleep(0)
        if waits.done():
            seen += waits.result().events
        else:
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
    if not seen or seen[-1].revision < last:
        seen += await told(watch, last)
    assert [event.revision for event in seen] == list(range(revision, last + 1))


async def test_who_closes_a_watch_ends_who_waits_for_it(engine: Engine) -> None:
    watch = engine.watch(b"a", 1, ADA)
    waits = asyncio.ensure_future(watch.next())
    await asyncio.sleep(0)
    watch.close()
    with pytest.raises(Closed):
        await waits


async def test_a_slow_watch_loses_nothing(engine: Engine) -> None:
    """Also where what it has not seen fits into no memory that is kept for it."""
    first = await put(engine, b"a/first")
    watch = engine.watch(b"a/", first, ADA, prefix=True)
    many = 60
    for n in range(many):
        await put(engine, b"a/%d" % n, bytes(VALUE_BYTES_MAX))
    last = await put(engine, b"a/last")
    events = await told(watch, last)
    assert [event.revision for event in events] == list(range(first, last + 1))


async def test_what_is_compacted_is_said(engine: Engine) -> None:
    first = await put(engine, b"a")
    await put(engine, b"b")
    await delete(engine, b"a")
    await put(engine, b"b")
    idle = engine.watch(b"a", first + 1, BOB)
    assert [e.now for e in await told(idle, first + 2)] == [None]
    lags = engine.watch(b"", first, BOB, prefix=True)
    await engine.compact(first + 2)
    for revision in (first, first + 2):
        with pytest.raises(Compacted) as refused:
            await engine.watch(b"", revision, ADA, prefix=True).next()
        assert refused.value.revision == first + 3
    with pytest.raises(Compacted):
        await lags.next()
    watch = engine.watch(b"", first + 3, BOB + "2", prefix=True)
    assert [e.key for e in await told(watch, first + 3)] == [b"b"]
    assert [kv.key for kv in (await engine.read(Get(b"", prefix=True))).items] == [b"b"]
    last = await put(engine, b"a")
    assert [e.revision for e in await told(idle, last)] == [last]
    assert (await engine.status()).compacted == first + 2
    await engine.compact(first)
    assert (await engine.status()).compacted == first + 2
    with pytest.raises(InvalidArgument):
        await engine.compact(last + 1)


async def test_many_watches_are_each_told_their_own(factory: Callable[..., Engine]) -> None:
    async with running(factory(Limits(owner_watches=1000))) as engine:
        watches = [engine.watch(b"a/%d" % n, 1, ADA) for n in range(200)]
        everything = engine.watch(b"a/", 1, ADA, prefix=True)
        waits = [asyncio.ensure_future(watch.next()) for watch in watches]
        await asyncio.gather(*(put(engine, b"a/%d" % n) for n in range(200)))
        for n, batch in enumerate(await asyncio.gather(*waits)):
            assert [event.key for event in batch.events] == [b"a/%d" % n]
        last = await put(engine, b"a/z")
        assert len(await told(everything, last)) == 201


# --- leases ---------------------------------------------------------------------------------------


async def test_the_keys_of_a_lease_end_with_it(engine: Engine, clock: Clock) -> None:
    lease = await engine.grant(clock.ttl_s, ADA)
    await put(engine, b"a", lease=lease)
    await put(engine, b"b", lease=lease)
    await put(engine, b"b")  # without it again
    last = await put(engine, b"c", lease=lease)
    watch = engine.watch(b"", last + 1, BOB, prefix=True)
    await clock.passes(clock.almost)
    assert await engine.keep(lease, ADA) == clock.ttl_s
    await clock.passes(clock.almost)
    assert await get(engine, b"a") is not None
    await clock.passes(1.01 - clock.almost)
    events = await told(watch, last + 1)
    assert [(e.key, e.revision, e.now) for e in events] == [
        (b"a", last + 1, None),
        (b"c", last + 1, None),
    ]
    with pytest.raises(LeaseEnded):
        await engine.keep(lease, ADA)
    with pytest.raises(LeaseEnded):
        await put(engine, b"a", lease=lease)
    with pytest.raises(LeaseEnded):
        await engine.end(lease, ADA)
    assert (await engine.status()).leases == 0


@SLOW_ETCD
async def test_a_lease_whose_time_is_over_is_not_kept(engine: Engine, clock: Clock) -> None:
    lease = await engine.grant(clock.ttl_s, ADA)
    await clock.ends()
    with pytest.raises(LeaseEnded):
        await engine.keep(lease, ADA)


async def test_a_lease_is_ended(engine: Engine) -> None:
    lease = await engine.grant(10.0, ADA)
    await put(engine, b"a", lease=lease)
    await engine.end(lease, ADA)
    assert await get(engine, b"a") is None
    with pytest.raises(LeaseEnded):
        await engine.end(lease, ADA)


async def test_a_lease_is_its_owners(engine: Engine) -> None:
    lease = await engine.grant(10.0, ADA)
    for use in (
        engine.keep(lease, BOB),
        engine.end(lease, BOB),
        put(engine, b"a", lease=lease, owner=BOB),
        put(engine, b"a", lease=lease + 1),
    ):
        with pytest.raises(LeaseEnded):
            await use
    assert await get(engine, b"a") is None


@SLOW_ETCD
async def test_after_a_restart_all_is_there_and_leases_have_their_full_time(
    factory: Callable[..., Engine], clock: Clock
) -> None:
    async with running(factory()) as engine:
        lease = await engine.grant(clock.ttl_s, ADA)
        await put(engine, b"a", b"1", lease=lease)
        kept = await get(engine, b"a")
        first = kept.mod_revision if kept else 0
        await clock.passes(clock.almost)
        watch = engine.watch(b"a", first + 1, ADA)
        waits = asyncio.ensure_future(watch.next())
        await asyncio.sleep(0)
        authority, epoch = engine.authority, engine.epoch
    with pytest.raises(Closed):
        await waits
    with pytest.raises(Closed):
        await put(engine, b"a")
    with pytest.raises(Closed):
        engine.watch(b"a", 1, ADA)
    async with running(factory()) as engine:
        assert (engine.authority.seed, engine.epoch) == (authority.seed, epoch)
        assert await get(engine, b"a") == kept
        await clock.passes(clock.almost)
        assert await get(engine, b"a") == kept
        assert [e.now for e in await told(engine.watch(b"a", first, ADA), first)] == [kept]
        assert await put(engine, b"b") == first + 1
        await clock.passes(1.01 - clock.almost)
        assert [e.now for e in await told(engine.watch(b"a", first + 1, ADA), first + 2)] == [None]
        assert await get(engine, b"a") is None


# --- limits ---------------------------------------------------------------------------------------


async def test_an_owner_takes_no_more_than_allowed(factory: Callable[..., Engine]) -> None:
    async with running(factory(LIMITS)) as engine:
        for start in range(0, 300, 100):
            keys = [b"a/%d" % n for n in range(start, start + 100)]
            await engine.txn(Txn(tuple(Put(key, b"") for key in keys)), ADA)
        with pytest.raises(LimitExceeded, match="keys of one owner"):
            await put(engine, b"b")
        await put(engine, b"a/0", b"again")
        await put(engine, b"b", owner=BOB)
        await put(engine, b"a/0", owner=BOB)  # now his
        await put(engine, b"c")
        with pytest.raises(LimitExceeded, match="keys of one owner"):
            await put(engine, b"a/0")
        await delete(engine, b"c", owner=BOB)
        await put(engine, b"a/0")
        for n in range(99):
            await put(engine, b"b/%d" % n, owner=BOB)
        with pytest.raises(LimitExceeded, match="keys in the store"):
            await put(engine, b"b/100", owner=BOB)
        for n in range(7):
            await put(engine, b"b/%d" % n, bytes(VALUE_BYTES_MAX), owner=BOB)
        with pytest.raises(LimitExceeded, match="bytes of one owner"):
            await put(engine, b"b/8", bytes(VALUE_BYTES_MAX), owner=BOB)
        await put(engine, b"b/1", bytes(10), owner=BOB)
        await put(engine, b"b/8", bytes(VALUE_BYTES_MAX), owner=BOB)


async def test_leases_and_watches_are_bounded(factory: Callable[..., Engine]) -> None:
    async with running(factory(LIMITS)) as engine:
        lease = await engine.grant(10.0, ADA)
        await engine.grant(10.0, ADA)
        with pytest.raises(LimitExceeded, match="leases of one owner"):
            await engine.grant(10.0, ADA)
        await engine.grant(10.0, BOB)
        await engine.end(lease, ADA)
        lease = await engine.grant(10.0, ADA)
        for n in range(WRITES_MAX):
            await put(engine, b"a/%d" % n, lease=lease)
        with pytest.raises(LimitExceeded, match="keys of one lease"):
            await put(engine, b"a/no", lease=lease)
        await put(engine, b"a/1", lease=lease)
        watches = [engine.watch(b"a", 1, ADA) for _ in range(2)]
        with pytest.raises(LimitExceeded, match="watches of one owner"):
            engine.watch(b"a", 1, ADA)
        assert (await engine.status()).watches == 2
        watches[0].close()
        watches[0].close()
        engine.watch(b"b", 1, ADA, prefix=True).close()
        engine.watch(b"c", 1, ADA)
