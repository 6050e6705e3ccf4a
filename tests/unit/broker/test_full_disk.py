"""The broker's store on a disk that is full to the last byte."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from wetware.base.disk import MARK_BYTES, RESERVED_BYTES, RESERVED_FILE
from wetware.broker.limits import BrokerLimits
from wetware.broker.store import ENDED_BYTES_MAX, GrantStore, StoreUnavailable
from wetware.broker.terms import Terms
from wetware.broker.tree import Tree
from wetware.errors import Revoked, WetwareError
from wetware.hookspecs import RoleProfile

from .parts import ADA, Clock

pytestmark = pytest.mark.anyio
ALL = RoleProfile({"pubsub": frozenset({"*"})})


@contextlib.asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Tree]:
    store = GrantStore(directory, Clock())
    tree = Tree(Clock(), store=store, limits=BrokerLimits())
    try:
        tree.restore(lambda principal, role: ALL)
        yield tree
    finally:
        tree.close()
        store.close()


async def shared(tree: Tree, **more: Any) -> tuple[Any, bytes]:
    session = tree.session(ADA, (tree.root(ADA, "member", ALL),))
    return await tree.share(session, Terms(), **{"label": "x", **more})


def crashed(directory: Path, to: Path) -> Path:
    """What a kill -9 leaves now."""
    to.mkdir()
    for file in directory.iterdir():
        shutil.copy(file, to / file.name)
    return to


async def test_a_share_that_is_refused_leaves_the_reserve_to_a_revocation(
    small_disk: Any, tmp_path: Path
) -> None:
    async with running(small_disk.path / "broker") as tree:
        store = tree.store
        assert store is not None
        share, secret = await shared(tree)
        small_disk.fill()
        for _ in range(300):
            with pytest.raises(StoreUnavailable):
                await shared(tree)
        assert store.reserve.fill()
        assert not small_disk.free_bytes
        share.revoke("stolen")
        await store.written()
        copy = crashed(small_disk.path / "broker", tmp_path / "copy")
    async with running(copy) as tree:
        with pytest.raises(Revoked, match="stolen"):
            await tree.redeem(share.id, secret)


async def test_no_holder_uses_the_reserve_up_by_ending_what_is_their_own(
    small_disk: Any, tmp_path: Path
) -> None:
    async with running(small_disk.path / "broker") as tree:
        store = tree.store
        assert store is not None
        theirs = [await shared(tree, label="é" * 128) for _ in range(500)]
        share, secret = await shared(tree)
        small_disk.fill()
        for made, _ in theirs:
            made.revoke("\N{GRINNING FACE}" * 256)
            await store.written()  # one commit each
        left = (small_disk.path / "broker" / RESERVED_FILE).stat().st_size
        assert left > RESERVED_BYTES // 2
        assert not small_disk.free_bytes, "what is left is taken back at once"
        share.revoke("stolen")
        await store.written()
        assert not store.reserve.marked
        copy = crashed(small_disk.path / "broker", tmp_path / "copy")
    async with running(copy) as tree:
        for made, its_secret in (theirs[0], theirs[-1], (share, secret)):
            with pytest.raises(Revoked):
                await tree.redeem(made.id, its_secret)
        assert all(len(row.ended.encode()) <= ENDED_BYTES_MAX for row in tree.store.kept.shares)


async def test_the_end_of_thousands_of_shares_needs_no_more_room_than_that_of_one(
    small_disk: Any, tmp_path: Path
) -> None:
    directory = small_disk.path / "broker"
    async with running(directory) as tree:
        store = tree.store
        assert store is not None
        root = tree.root(ADA, "member", ALL)
        made = [
            await tree.share(tree.session(ADA, (root,)), Terms(), label="x" * 100)
            for _ in range(4000)
        ]
        small_disk.fill()
        assert root.revoke("all of them") > 4000
        await store.written()
        assert not store.reserve.marked
        assert (directory / RESERVED_FILE).stat().st_size > RESERVED_BYTES // 2
        copy = crashed(directory, tmp_path / "copy")
    async with running(copy) as tree:
        assert not tree.grants
        with pytest.raises(Revoked, match="all of them"):
            await tree.redeem(made[0][0].id, made[0][1])


async def test_other_writes_are_refused_until_the_reserve_is_whole_again(small_disk: Any) -> None:
    async with running(small_disk.path / "broker") as tree:
        store = tree.store
        assert store is not None
        share, _ = await shared(tree)
        small_disk.fill()
        share.revoke("x")
        await store.written()
        with pytest.raises(StoreUnavailable):
            await store.save_fence(("a", "l"), (1, 1))
        assert store.failing
        small_disk.free()
        async with asyncio.timeout(60):
            while store.failing:
                await asyncio.sleep(0.02)
        await store.save_fence(("a", "l"), (1, 1))
        assert not store.reserve.missing
        assert (small_disk.path / "broker" / RESERVED_FILE).stat().st_size == RESERVED_BYTES


async def test_a_start_without_room_for_a_reserve_is_said_and_leaves_no_empty_file(
    small_disk: Any,
) -> None:
    directory = small_disk.path / "broker"
    async with running(directory) as tree:
        share, secret = await shared(tree)
    (directory / RESERVED_FILE).unlink()
    small_disk.fill()
    async with running(directory) as tree:
        store = tree.store
        assert store is not None
        assert "No space left" in store.reserve.missing
        assert "No space left" in store.failing
        assert not (directory / RESERVED_FILE).exists()
        tree._shared(share.id, secret)
        with pytest.raises(StoreUnavailable):
            await shared(tree)


async def test_what_ended_at_a_start_on_a_full_disk_stays_ended(small_disk: Any) -> None:
    directory = small_disk.path / "broker"
    async with running(directory) as tree:
        share, secret = await shared(tree)
    small_disk.fill()
    store = GrantStore(directory, Clock())
    tree = Tree(Clock(), store=store, limits=BrokerLimits())
    tree.restore(lambda principal, role: None)  # the role is gone
    store.close()
    assert not store.reserve.marked
    async with running(directory) as tree:
        with pytest.raises(Revoked, match="while the node was down"):
            await tree.redeem(share.id, secret)


async def test_where_the_reserve_is_gone_too_shares_are_suspended_after_a_crash(
    small_disk: Any, tmp_path: Path
) -> None:
    directory = small_disk.path / "broker"
    async with running(directory) as tree:
        store = tree.store
        assert store is not None
        share, secret = await shared(tree)
        other, other_secret = await shared(tree)
        store._db.execute("PRAGMA query_only=ON")  # as a disk that takes nothing
        share.revoke("stolen")
        with pytest.raises(StoreUnavailable, match="not on the disk yet") as said:
            await store.written()
        assert "suspended" in said.value.hint
        assert store.reserve.marked
        copy = crashed(directory, tmp_path / "copy")
        store._db.execute("PRAGMA query_only=OFF")
        async with asyncio.timeout(60):
            while store.reserve.marked:  # written later after all
                await asyncio.sleep(0.02)
    for _ in range(2):  # a restart is no look
        async with running(copy) as tree:
            for made, its_secret in ((share, secret), (other, other_secret)):
                with pytest.raises(WetwareError) as refused:
                    await tree.redeem(made.id, its_secret)
                assert refused.value.code == "capability.suspended.not_durable"
            await shared(tree)  # a new one can be made, and a role's session works
            tree.session(ADA, (tree.root(ADA, "member", ALL),)).check_live()
    async with running(copy) as tree:
        assert tree.resume() == 4
        await tree.redeem(other.id, other_secret)
    async with running(copy) as tree:
        await tree.redeem(other.id, other_secret)


async def test_a_mark_is_written_where_there_is_no_room_at_all(small_disk: Any) -> None:
    directory = small_disk.path / "broker"
    async with running(directory) as tree:
        store = tree.store
        assert store is not None
        with store.reserve.open():
            small_disk.fill()
        assert store.reserve._path.stat().st_size == MARK_BYTES
        store.reserve.mark("x")
        store.reserve.marked = ""
        assert store.reserve._read_mark() == "x"
        store.reserve.unmark()
