"""The etcd engine where etcd fails, and where several entrances use one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from wetware.errors import LimitExceeded
from wetware.testing import wait_for
from wetware_sync.engine import (
    Closed,
    Compare,
    Delete,
    Engine,
    Get,
    LeaseEnded,
    Limits,
    Put,
    Txn,
    Unknown,
)
from wetware_sync.errors import HomeDown

from .etcds import EtcdProcess, anyio_backend, one_loop, three_members  # noqa: F401 fixtures
from .parts import ADA, BOB, delete, get, put, running, told

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

CUT_S = 10.0
"""Within which a watch is fed by another member, or ends."""


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    process = EtcdProcess(tmp_path / "etcd")
    process.start()
    yield process
    process.stop(kill=True)


def entrance(*endpoints: str, limits: Limits | None = None) -> Engine:
    from wetware_sync.etcd.engine import EtcdEngine
    from wetware_sync.etcd.wire import Etcd

    return EtcdEngine(Etcd(endpoints), limits=limits)


@contextlib.asynccontextmanager
async def two(etcd: EtcdProcess, limits: Limits | None = None) -> AsyncIterator[list[Engine]]:
    async with (
        running(entrance(etcd.endpoint, limits=limits)) as a,
        running(entrance(etcd.endpoint, limits=limits)) as b,
    ):
        yield [a, b]


async def test_two_entrances_have_one_store(etcd: EtcdProcess) -> None:
    async with two(etcd) as (a, b):
        assert (a.epoch, a.authority.seed) == (b.epoch, b.authority.seed)
        watch = b.watch(b"", 1, BOB, prefix=True)
        lease = await a.grant(30, ADA)
        last = await put(a, b"k", b"1", lease=lease)
        assert [e.revision for e in await told(watch, last)] == [last]
        assert await b.keep(lease, ADA) == 30
        with pytest.raises(LeaseEnded):
            await b.keep(lease, BOB)
        with pytest.raises(LeaseEnded):
            await put(b, b"k", lease=lease, owner=BOB)
        await put(b, b"j", lease=lease)
        await b.end(lease, ADA)
        assert not (await a.read(Get(b"", prefix=True))).items
        with pytest.raises(LeaseEnded):
            await a.keep(lease, ADA)


async def test_a_lease_is_asked_for_again_where_the_answer_is_lost(
    etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a leader dies: it is had at once, and once."""
    from wetware_sync.etcd.wire import Etcd, Failed

    at, answered = Etcd.at, list[str]()

    async def loses(self: Etcd, member: Any, call: Any) -> Any:
        answer = await at(self, member, call)
        name = type(answer).__name__
        answered.append(name)
        if name in ("LeaseGrantResponse", "PutResponse") and answered.count(name) == 1:
            raise Failed(HomeDown("no answer"), begun=True)
        return answer

    async with two(etcd) as (a, b):
        with monkeypatch.context() as patch:
            patch.setattr(Etcd, "at", loses)
            lease = await a.grant(30, ADA)
        assert answered.count("LeaseGrantResponse") == 1  # the second time it was there
        assert answered.count("PutResponse") == 2
        assert await b.keep(lease, ADA) == 30
        await a.end(lease, ADA)
        with pytest.raises(LeaseEnded):
            await b.keep(lease, ADA)


async def test_all_entrances_charge_alike(etcd: EtcdProcess) -> None:
    limits = Limits(owner_keys=6, owner_leases=2)
    async with two(etcd, limits) as (a, b):
        lease = await a.grant(30, ADA)
        for n in range(3):
            await put(a, b"a%d" % n)
            await put(b, b"b%d" % n, lease=lease)
        await told(a.watch(b"b2", 1, ADA), 1)
        for engine in (a, b):
            with pytest.raises(LimitExceeded, match="keys of one owner"):
                await put(engine, b"more")
            await put(engine, b"b0", b"again")
        await b.grant(30, ADA)
        mark = await put(b, b"b0", b"behind it")
        await told(a.watch(b"b0", mark, ADA), mark)
        with pytest.raises(LimitExceeded, match="leases of one owner"):
            await a.grant(30, ADA)
        last = await put(a, b"a0", owner=BOB)
        await told(b.watch(b"a0", last, BOB), last)
        await put(b, b"more")
        kept = [(s.keys, s.nbytes, s.leases) for s in (await a.status(), await b.status())]
        assert kept[0] == kept[1]
    async with running(entrance(etcd.endpoint, limits=limits)) as engine:  # counts anew
        status = await engine.status()
        assert (status.keys, status.nbytes, status.leases) == kept[0]
        with pytest.raises(LimitExceeded, match="keys of one owner"):
            await put(engine, b"one more")


async def test_values_are_compared_while_others_write_them(etcd: EtcdProcess) -> None:
    async with two(etcd) as engines:
        await put(engines[0], b"n", b"0")

        async def count(engine: Engine) -> None:
            done = 0
            while done < 10:
                was = await get(engine, b"n")
                assert was is not None
                same = Compare(b"n", "value", was.value)
                more = Put(b"n", b"%d" % (int(was.value) + 1))
                outcome = await engine.txn(Txn((more,), (same,), (Get(b"n"),)), ADA)
                done += outcome.succeeded

        await asyncio.gather(*(count(engine) for engine in engines * 3))
        kept = await get(engines[1], b"n")
        assert kept is not None
        assert (kept.value, kept.version) == (b"60", 61)


async def test_etcd_is_down_and_comes_back_under_a_watch(etcd: EtcdProcess) -> None:
    async with running(entrance(etcd.endpoint)) as engine:
        lease = await engine.grant(30, ADA)
        first = await put(engine, b"a", lease=lease)
        watch = engine.watch(b"a", first + 1, ADA)
        waits = asyncio.ensure_future(watch.next())
        await asyncio.to_thread(etcd.stop, kill=True)
        for ask in (
            get(engine, b"a"),
            put(engine, b"a"),
            engine.keep(lease, ADA),
            engine.grant(10, ADA),
            engine.status(),
        ):
            began = monotonic()
            with pytest.raises((HomeDown, Unknown)):
                await ask
            assert monotonic() - began < 5
        with pytest.raises(HomeDown, match="cannot be reached"):
            await put(engine, b"a")
        await asyncio.to_thread(etcd.start)
        last = await put(engine, b"a", b"2")
        assert [e.revision for e in (await waits).events] == [last]
        assert last == first + 1
        assert await engine.keep(lease, ADA) == 30
    with pytest.raises(Closed):
        await put(engine, b"a")


async def test_a_watch_ends_where_etcd_stays_away(etcd: EtcdProcess) -> None:
    async with running(entrance(etcd.endpoint)) as engine:
        first = await put(engine, b"a")
        watch = engine.watch(b"a", first + 1, ADA)
        waits = asyncio.ensure_future(watch.next())
        await asyncio.to_thread(etcd.stop, kill=True)
        began = monotonic()
        with pytest.raises(HomeDown):
            await waits
        assert monotonic() - began < CUT_S
        with pytest.raises(HomeDown):
            engine.watch(b"a", first + 1, ADA)
        watch.close()
        await asyncio.to_thread(etcd.start)
        last = await put(engine, b"a")
        while True:
            with contextlib.suppress(HomeDown):
                watch = engine.watch(b"a", first + 1, ADA)
                break
            await asyncio.sleep(0.05)
        assert [e.revision for e in await told(watch, last)] == [last]


def _stands(etcd: EtcdProcess) -> bool:
    """Whether SIGSTOP has come to all threads: until then one may still take a write."""
    assert etcd.process is not None
    stats = Path(f"/proc/{etcd.process.pid}/task").glob("*/stat")
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in stats)


async def test_of_a_write_without_an_answer_nobody_knows(etcd: EtcdProcess) -> None:
    async with running(entrance(etcd.endpoint)) as engine:
        last = await put(engine, b"a")
        assert etcd.process is not None
        etcd.process.send_signal(signal.SIGSTOP)
        await asyncio.to_thread(wait_for, lambda: _stands(etcd), "no thread of etcd runs")
        waits = [asyncio.ensure_future(put(engine, b"a/%d" % n)) for n in range(3)]
        await asyncio.sleep(0.2)  # they are on their way
        assert not any(each.done() for each in waits)
        await asyncio.to_thread(etcd.stop, kill=True)
        answers = await asyncio.gather(*waits, return_exceptions=True)
        assert all(isinstance(each, Unknown) for each in answers), answers
        await asyncio.to_thread(etcd.start)
        page = await engine.read(Get(b"a/", prefix=True))
        assert (page.items, page.revision) == ((), last)  # nobody has asked again


async def test_compaction_by_another_entrance(etcd: EtcdProcess) -> None:
    async with two(etcd) as (a, b):
        for n in range(20):
            last = await put(a, b"k%d" % (n % 3), b"%d" % n)
        watch = b.watch(b"", 1, BOB, prefix=True)
        await told(watch, last)
        last = await put(a, b"k0", b"x")
        await a.compact(last)
        assert (await b.status()).compacted == last
        last = await delete(a, b"k0") + last
        assert [e.now for e in await told(watch, last)][-1] is None


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[EtcdProcess]]:
    with three_members(tmp_path) as members:
        yield members


async def test_one_of_three_dies_and_a_watch_goes_on(three: list[EtcdProcess]) -> None:
    async with running(entrance(*(member.endpoint for member in three))) as engine:
        first = await put(engine, b"a")
        assert (await engine.status()).failover.startswith("1 of the 3 members")
        watch = engine.watch(b"a", first, ADA)
        assert len(await told(watch, first)) == 1
        await asyncio.to_thread(three[0].stop, kill=True)  # the one that is spoken to
        last, began = 0, monotonic()
        while not last:
            with contextlib.suppress(HomeDown, Unknown):
                last = await put(engine, b"a", b"x")
        assert monotonic() - began < CUT_S
        events = await told(watch, last)
        assert [e.revision for e in events] == list(range(first + 1, last + 1))
        # It is back, and another one dies.
        await asyncio.to_thread(three[0].start)
        await asyncio.to_thread(three[1].stop, kill=True)
        later = 0
        while not later:
            with contextlib.suppress(HomeDown, Unknown):
                later = await put(engine, b"a", b"y")
        events = await told(watch, later)
        assert [e.revision for e in events] == list(range(last + 1, later + 1))


async def test_a_member_that_is_cut_from_the_others_is_left(three: list[EtcdProcess]) -> None:
    async with running(entrance(three[0].endpoint)) as engine:
        first = await put(engine, b"a")
        waits = asyncio.ensure_future(engine.watch(b"a", first + 1, ADA).next())
        for member in three[1:]:
            assert member.process is not None
            member.process.send_signal(signal.SIGSTOP)
        began = monotonic()
        with pytest.raises(HomeDown):
            await waits
        assert monotonic() - began < CUT_S
        with pytest.raises(HomeDown):
            await get(engine, b"a")
        for member in three[1:]:
            assert member.process is not None
            member.process.send_signal(signal.SIGCONT)


def own_certificate(key: Path, cert: Path) -> None:
    options = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost"
    )
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", *options.split(), *names, "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)


async def test_users_and_tls(tmp_path: Path) -> None:
    from wetware_sync.etcd.engine import EtcdEngine
    from wetware_sync.etcd.wire import Etcd, Login, Tls

    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    own_certificate(key, cert)
    etcd = EtcdProcess(
        tmp_path / "etcd", options=[f"--cert-file={cert}", f"--key-file={key}"], scheme="https"
    )
    tls = Tls(cert.read_bytes())
    etcd.start(ready=False)
    try:
        for args in (
            ["user", "add", "root:secret"],
            ["user", "grant-role", "root", "root"],
            ["auth", "enable"],
        ):
            await asyncio.to_thread(etcd.ctl, f"--cacert={cert}", *args)

        def engine(login: Login | None) -> Engine:
            return EtcdEngine(Etcd([etcd.endpoint], tls, login))

        async with running(engine(Login("root", "secret"))) as inside:
            last = await put(inside, b"a")
            assert [e.revision for e in await told(inside.watch(b"a", 1, ADA), last)] == [last]
        for login in (None, Login("root", "wrong")):
            with pytest.raises(ExceptionGroup) as refused:
                async with running(engine(login)):
                    pass
            assert "secret" not in repr(refused.value)
        with pytest.raises(ExceptionGroup, match="unhandled"):
            async with running(entrance(etcd.endpoint)):  # in plain text
                pass
    finally:
        etcd.stop(kill=True)


async def test_a_prefix_with_too_many_keys_is_not_deleted_by_either(etcd: EtcdProcess) -> None:
    async with two(etcd) as engines:
        for part in (b"a", b"b"):
            await engines[0].txn(Txn(tuple(Put(b"%s%d" % (part, n), b"") for n in range(100))), ADA)
        with pytest.raises(LimitExceeded):
            await engines[1].txn(Txn((Delete(b"a", prefix=True), Delete(b"b", prefix=True))), BOB)
        assert await delete(engines[1], b"a", prefix=True) == 100
