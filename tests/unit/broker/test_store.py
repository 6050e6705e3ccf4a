"""What survives a restart: shares with their ancestors, spent quotas, fences, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from wetware.broker.budgets import BLOCK_CALLS_MAX
from wetware.broker.clock import SteadyClock
from wetware.broker.fences import Fence, Fences
from wetware.broker.limits import BrokerLimits
from wetware.broker.store import GrantStore, StoreUnavailable
from wetware.broker.terms import Terms
from wetware.broker.tree import Tree
from wetware.broker.values import Rate
from wetware.errors import ConfigError, Denied, Expired, LimitExceeded, Revoked, WetwareError
from wetware.hookspecs import RoleProfile
from wetware.identity import Key, Principal

from .parts import ADA, JOIN, PUBLISH, Clock, call, where

pytestmark = pytest.mark.anyio
ALL = RoleProfile({"pubsub": frozenset({"*"})})
KEY = Key.from_seed(b"k" * 32)


@contextlib.asynccontextmanager
async def running(
    directory: Path, clock: Clock, profile: RoleProfile | None = ALL
) -> AsyncIterator[Tree]:
    """A node's tree over its store, put back as a start does."""
    store = GrantStore(directory, clock)
    tree = Tree(clock, store=store, limits=BrokerLimits())
    try:
        tree.restore(lambda principal, role: profile)
        yield tree
    finally:
        tree.close()
        store.close()


async def shared(tree: Tree, terms: Terms | None = None, **more: Any) -> tuple[Any, bytes]:
    session = tree.session(ADA, (tree.root(ADA, "member", ALL),))
    return await tree.share(session, terms or Terms(), label="x", **more)


def used(grant: Any) -> Any:
    return grant.derive(kind="service", label="s", service="pubsub")


async def test_a_share_is_there_after_a_restart_with_what_binds_it(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        session = tree.session(ADA, (tree.root(ADA, "member", ALL),))
        middle = session.derive(label="m", terms=where("topic=glob:chat/*"))
        share, secret = await tree.share(middle, Terms(calls=3), label="x", uses=2)
    async with running(tmp_path, clock) as tree:
        use = used(await tree.redeem(share.id, secret))
        await admitted(use, JOIN, topic="chat/a")
        with pytest.raises(Denied):
            call(use, JOIN, topic="news")
        assert [grant.kind for grant in use.lineage] == [
            "service", "redeemed", "share", "attenuated", "session", "role"
        ]  # fmt: skip
        assert tree.shares[share.id].uses_left == 1
    async with running(tmp_path, clock) as tree:
        await tree.redeem(share.id, secret)
        with pytest.raises(LimitExceeded, match="used 2 times"):
            await tree.redeem(share.id, secret)


async def test_what_is_shared_from_a_session_with_an_end_ends_with_it_after_a_restart(
    tmp_path: Path,
) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        roots = (tree.root(ADA, "member", ALL),)
        session = tree.session(ADA, roots, expires_at=clock.now + 60)
        share, secret = await tree.share(session, Terms(), label="x")
        session.close("the connection ended")
        assert share.expires_at == clock.now + 60
    async with running(tmp_path, clock) as tree:
        use = used(await tree.redeem(share.id, secret))
        await admitted(use, PUBLISH, data=b"")
        clock.now += 60
        with pytest.raises(Expired):
            call(use, PUBLISH, data=b"")
    async with running(tmp_path, clock) as tree:
        with pytest.raises(Revoked, match="derived from ended"):
            await tree.redeem(share.id, secret)


async def admitted(grant: Any, method: Any, **args: object) -> None:
    """A call that may have to wait for the disk."""
    running_ = asyncio.get_running_loop().create_future()
    waiting = grant.enter(method, args, running_)
    try:
        if waiting is not None:
            await waiting
    finally:
        grant.leave(running_)


async def test_a_crash_gives_no_call_of_a_quota_back(tmp_path: Path) -> None:
    clock = Clock()
    store = GrantStore(tmp_path, clock)
    tree = Tree(clock, store=store)
    share, secret = await shared(tree, Terms(calls=100))
    use = used(await tree.redeem(share.id, secret))
    for _ in range(40):
        await admitted(use, PUBLISH, data=b"")
    # No close: what the disk has now is what a crash leaves.
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in os.listdir(tmp_path):
        if name.startswith("grants.db"):
            (copy / name).write_bytes((tmp_path / name).read_bytes())
    async with running(copy, clock) as after:
        use = used(await after.redeem(share.id, secret))
        left = after.grants[share.id].info().calls_left
        assert 60 - 100 // 16 <= left <= 60
        done = 0
        with contextlib.suppress(LimitExceeded):
            while True:
                await admitted(use, PUBLISH, data=b"")
                done += 1
        assert done == left
    tree.close()
    store.close()


async def test_a_crash_gives_nothing_back_of_a_quota_whose_first_share_could_not_be_kept(
    tmp_path: Path,
) -> None:
    clock = Clock()
    store = GrantStore(tmp_path / "a", clock)
    tree = Tree(clock, store=store)
    middle = tree.session(ADA, (tree.root(ADA, "member", ALL),)).derive(
        label="m", terms=Terms(calls=160)
    )
    middle.exported()
    store._db.execute("PRAGMA query_only=ON")
    with pytest.raises(StoreUnavailable):
        await tree.share(middle, Terms(), label="x")
    store._db.execute("PRAGMA query_only=OFF")
    use = used(middle)
    await admitted(use, PUBLISH, data=b"")  # reserves a block, of a grant that is on no disk
    share, secret = await tree.share(middle, Terms(), label="x")
    done = 1
    while middle.budget.calls.free:
        call(use, PUBLISH, data=b"")
        done += 1
    copy = tmp_path / "b"
    copy.mkdir()
    for file in (tmp_path / "a").glob("grants.db*"):  # as after a crash
        (copy / file.name).write_bytes(file.read_bytes())
    async with running(copy, clock) as after:
        left = (await after.redeem(share.id, secret)).lineage[2].info().calls_left
        assert left <= 160 - done
    tree.close()
    store.close()


async def test_many_calls_of_a_quota_cost_few_writes(tmp_path: Path) -> None:
    async with running(tmp_path, Clock()) as tree:
        share, secret = await shared(tree, Terms(calls=10_000))
        use = used(await tree.redeem(share.id, secret))
        writes = 0
        save = share.budget._save

        async def counted(calls: int, nbytes: int) -> None:
            nonlocal writes
            writes += 1
            await save(calls, nbytes)

        share.budget._save = counted
        for _ in range(2000):
            await admitted(use, PUBLISH, data=b"")
        assert writes <= 2000 // (10_000 // 16 // 2)
        assert BLOCK_CALLS_MAX >= 10_000 // 16


async def test_two_hundred_callers_at_once_get_the_quota_and_no_more(tmp_path: Path) -> None:
    async with running(tmp_path, Clock()) as tree:
        share, secret = await shared(tree, Terms(calls=50))
        uses = [used(await tree.redeem(share.id, secret)) for _ in range(4)]
        results = await asyncio.gather(
            *(admitted(uses[n % 4], PUBLISH, data=b"") for n in range(200)), return_exceptions=True
        )
        assert results.count(None) == 50
        assert all(r is None or isinstance(r, LimitExceeded) for r in results)


async def test_a_rate_starts_empty_after_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        share, secret = await shared(tree, Terms(rate=Rate(1.0, 5.0)))
    async with running(tmp_path, clock) as tree:
        use = used(await tree.redeem(share.id, secret))
        with pytest.raises(LimitExceeded):
            call(use, PUBLISH, data=b"")
        clock.now += 1
        call(use, PUBLISH, data=b"")


async def test_what_was_revoked_stays_revoked_and_its_holder_is_told_why(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        share, secret = await shared(tree)
        other, other_secret = await shared(tree)
        share.revoke("lost laptop")
        await tree.store.written()
    async with running(tmp_path, clock) as tree:
        with pytest.raises(Revoked, match="lost laptop"):
            await tree.redeem(share.id, secret)
        with pytest.raises(Denied) as refused:
            await tree.redeem(share.id, b"x" * 32)
        assert refused.value.code == "capability.denied.unknown_ref"
        await tree.redeem(other.id, other_secret)


@pytest.mark.parametrize(
    "profile",
    [None, RoleProfile({"pubsub": frozenset({"Topic.*"})}), RoleProfile({"blob": frozenset("*")}),
     RoleProfile({"pubsub": frozenset({"*"})}, where("topic=chat").where)],
    ids=["gone", "narrower", "another", "constrained"],
)  # fmt: skip
async def test_a_role_that_went_while_the_node_was_down_takes_its_shares(
    tmp_path: Path, profile: RoleProfile | None
) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        share, secret = await shared(tree)
    async with running(tmp_path, clock, profile) as tree:
        assert not tree.grants
        with pytest.raises(Revoked, match="while the node was down"):
            await tree.redeem(share.id, secret)
    async with running(tmp_path, clock) as tree:  # it came back too late
        with pytest.raises(Revoked):
            await tree.redeem(share.id, secret)


async def test_a_share_that_expired_while_the_node_was_down(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        share, secret = await shared(tree, Terms(expires_at=1010.0))
    clock.now = 1011.0
    async with running(tmp_path, clock) as tree:
        with pytest.raises(WetwareError, match="expired"):
            await tree.redeem(share.id, secret)


async def test_a_clock_that_was_set_back_while_the_node_was_down(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        share, secret = await shared(tree, Terms(expires_at=1100.0))
        clock.now = 1099.0
        await shared(tree)  # a write, which keeps what time it is
    clock.now = 1000.0
    async with running(tmp_path, clock) as tree:
        assert tree.clock.time() >= 1099.0
        assert tree.clock.ahead_s >= 99.0
        use = await tree.redeem(share.id, secret)
        clock.now += 2  # two seconds by both clocks: 1101 for who remembers
        with pytest.raises(Expired):
            use.check_live()


def test_a_clock_that_is_read_by_two_threads_never_jumps() -> None:
    """The store's thread reads it while the loop does: between any two steps of each other."""
    clock = Clock()
    seen: list[float] = []

    class Watched(SteadyClock):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if ready:
                seen.append(self.time())

    ready = False
    steady = Watched(clock)
    clock.now += 36_000  # ten hours by both clocks, and the wall clock is set
    clock.time = lambda: clock.now + 1  # type: ignore[method-assign]
    ready = True
    assert steady.time() == clock.time()
    assert set(seen) <= {clock.time()}


async def test_no_secret_is_on_disk(tmp_path: Path) -> None:
    async with running(tmp_path, Clock()) as tree:
        _, secret = await shared(tree)
    for file in tuple(tmp_path.iterdir()):  # noqa: ASYNC240
        assert secret not in file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0


async def test_a_share_is_not_given_if_it_cannot_be_kept(tmp_path: Path) -> None:
    async with running(tmp_path, Clock()) as tree:
        tree.store._db.execute("PRAGMA query_only=ON")
        with pytest.raises(StoreUnavailable):
            await shared(tree)
        assert not tree.shares
        assert [g.kind for g in tree.grants.values() if g.ended is None] in (
            ["role", "session"],
            ["session", "role"],
        )
        assert tree.store.failing
        tree.store._db.execute("PRAGMA query_only=OFF")
        await shared(tree)
        assert not tree.store.failing


async def test_a_revocation_takes_effect_while_the_disk_fails_and_reaches_it_later(
    tmp_path: Path,
) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        share, secret = await shared(tree)
        tree.store._db.execute("PRAGMA query_only=ON")
        share.revoke("now")
        with pytest.raises(Revoked):
            await tree.redeem(share.id, secret)
        with pytest.raises(StoreUnavailable):
            await tree.store.written()
        tree.store._db.execute("PRAGMA query_only=OFF")
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    await tree.store.written()
                    break
    async with running(tmp_path, clock) as tree:
        with pytest.raises(Revoked):
            await tree.redeem(share.id, secret)


async def test_what_no_store_can_keep_is_refused_and_the_rest_is_written(tmp_path: Path) -> None:
    store = GrantStore(tmp_path, Clock())
    try:
        async with asyncio.timeout(60):
            with pytest.raises(StoreUnavailable, match="refused"):
                await store.save_redeemed("x", 2**63)
            await store.save_fence(("a", "l"), (1, 1))
    finally:
        store.close()
    store = GrantStore(tmp_path, Clock())
    assert store.kept.fences == {("a", "l"): (1, 1)}
    store.close()


async def test_no_reason_keeps_an_end_from_the_disk(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        share, secret = await shared(tree)
        share.revoke("\ud800")
    async with running(tmp_path, clock) as tree:
        with pytest.raises(Revoked):
            await tree.redeem(share.id, secret)


async def test_a_share_that_ended_does_not_come_back_with_what_is_left_of_it(
    tmp_path: Path,
) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        share, secret = await shared(tree)
    db = sqlite3.connect(tmp_path / "grants.db")
    db.execute("UPDATE shares SET ended = 'capability.revoked: over', ended_at = 1")
    db.commit()
    db.close()
    async with running(tmp_path, clock) as tree:
        with pytest.raises(Revoked):
            await tree.redeem(share.id, secret)
        assert not tree.grants


async def test_concurrent_redemptions_of_the_last_use(tmp_path: Path) -> None:
    async with running(tmp_path, Clock()) as tree:
        share, secret = await shared(tree, uses=1)
        results = await asyncio.gather(
            *(tree.redeem(share.id, secret) for _ in range(10)), return_exceptions=True
        )
        assert sum(not isinstance(r, Exception) for r in results) == 1


async def test_a_share_that_is_revoked_while_it_is_made(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        session = tree.session(ADA, (tree.root(ADA, "member", ALL),))

        async def admit(grant: Any) -> None:
            session.revoke("changed my mind")

        with pytest.raises(Revoked):
            await tree.share(session, Terms(), admit=admit)
        assert not tree.shares
        assert not tree.grants
    async with running(tmp_path, clock) as tree:
        assert not tree.grants


@pytest.mark.parametrize("damage", [b"no database at all", b"SQLite format 3\0" + b"\xff" * 9000])
async def test_a_damaged_store_is_an_error_and_not_an_empty_one(
    tmp_path: Path, damage: bytes
) -> None:
    (tmp_path / "grants.db").write_bytes(damage)
    with pytest.raises(ConfigError, match="cannot be used"):
        GrantStore(tmp_path, Clock())


async def test_a_store_of_a_later_release_is_refused(tmp_path: Path) -> None:
    GrantStore(tmp_path, Clock()).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "grants.db")) as db:
        db.execute("PRAGMA user_version=9")
    with pytest.raises(ConfigError, match="version 9"):
        GrantStore(tmp_path, Clock())


# --- fences ---------------------------------------------------------------------------------------


def token(counter: int, epoch: int = 1, lock: str = "db") -> Fence:
    return Fence.issue(KEY, lock, epoch=epoch, counter=counter)


def fenced(tree: Tree, counter: int, epoch: int = 1) -> Any:
    root = tree.root(ADA, "member", ALL)
    return root.derive(label="f", service="pubsub", terms=Terms(fence=token(counter, epoch)))


async def test_a_later_holder_shuts_the_earlier_one_out_for_good(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as tree:
        old, new = fenced(tree, 1), fenced(tree, 2)
        await admitted(old, PUBLISH, data=b"")
        call(old, PUBLISH, data=b"")  # the second time nothing is waited for
        await admitted(new, PUBLISH, data=b"")
        with pytest.raises(Denied) as refused:
            call(old, PUBLISH, data=b"")
        assert refused.value.code == "capability.denied.fenced"
        await admitted(fenced(tree, 1, epoch=2), PUBLISH, data=b"")
        with pytest.raises(Denied):
            call(new, PUBLISH, data=b"")
    async with running(tmp_path, clock) as tree:
        with pytest.raises(Denied):
            call(fenced(tree, 2), PUBLISH, data=b"")


async def test_a_later_holder_waits_for_the_calls_of_the_earlier_one() -> None:
    tree = Tree(Clock())
    old, new = fenced(tree, 1), fenced(tree, 2)
    going = asyncio.get_running_loop().create_future()
    await old.enter(PUBLISH, {"data": b""}, going)
    entering = asyncio.create_task(admitted(new, PUBLISH, data=b""))
    await asyncio.sleep(0.01)
    assert not entering.done()
    with pytest.raises(Denied):  # new calls of the earlier one are refused already
        call(old, PUBLISH, data=b"")
    old.leave(going)
    await entering


async def test_a_later_holder_does_not_wait_for_ever() -> None:
    tree = Tree(Clock())
    tree.fences = Fences(drain_s=0.02)
    old = fenced(tree, 1)
    await old.enter(PUBLISH, {"data": b""}, asyncio.get_running_loop().create_future())
    with pytest.raises(LimitExceeded) as refused:
        await admitted(fenced(tree, 2), PUBLISH, data=b"")
    assert refused.value.code == "limit.fence"


async def test_a_cancelled_call_lets_go_of_its_fence() -> None:
    tree = Tree(Clock())
    old, new = fenced(tree, 1), fenced(tree, 2)
    await admitted(old, PUBLISH, data=b"")
    going = asyncio.get_running_loop().create_future()
    assert old.enter(PUBLISH, {"data": b""}, going) is None
    old.revoke("x")
    old.leave(going)
    await admitted(new, PUBLISH, data=b"")


async def test_nobody_fills_the_table_of_locks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wetware.broker.fences.LOCKS_PER_OWNER_MAX", 3)
    tree = Tree(Clock())

    def on(lock: str, principal: Any = ADA) -> Any:
        top = tree.root(principal, "member", ALL)
        return top.derive(label="f", service="pubsub", terms=Terms(fence=token(1, lock=lock)))

    for lock in "abc":
        await admitted(on(lock), PUBLISH, data=b"")
    with pytest.raises(LimitExceeded, match="LOCKS_PER_OWNER_MAX"):
        await admitted(on("d"), PUBLISH, data=b"")
    await admitted(on("a"), PUBLISH, data=b"")
    await admitted(on("d", Principal("local", "bob")), PUBLISH, data=b"")
    await admitted(on("d"), PUBLISH, data=b"")  # somebody has brought it in by now


def test_a_forged_fence_is_refused() -> None:
    good = token(5)
    assert Fence.decode(good.encode()) == good
    for forged in (
        Fence(good.authority, 1, "db", 6, good.signature),
        Fence(good.authority, 2, "db", 5, good.signature),
        Fence(good.authority, 1, "other", 5, good.signature),
        Fence(Key.from_seed(b"o" * 32).peer_id, 1, "db", 5, good.signature),
        Fence(good.authority, 1, "db", 5, bytes(64)),
    ):
        with pytest.raises(WetwareError, match="signature"):
            Fence.decode(forged.encode())
    for malformed in (b"", b"\xff", good.encode()[:-1], good.encode() + b"\0", b"\xa0"):
        with pytest.raises(WetwareError):
            Fence.decode(malformed)
