"""The keeper of copies, and what it answers others, with a real store."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from wetware.base.bounds import Places
from wetware.errors import InvalidArgument, LimitExceeded, TimedOut
from wetware.testing import FakeClock
from wetware_blob.config import BlobConfig
from wetware_blob.format.cid import RAW, Block, Cid
from wetware_blob.replicas import keeper as keeping
from wetware_blob.replicas.duties import Copy, Kept, Wanted
from wetware_blob.replicas.keeper import Keeper, Members
from wetware_blob.replicas.sibling import SiblingServant
from wetware_blob.store.errors import Damaged, StoreFailed
from wetware_blob.store.index import charge
from wetware_blob.store.pins import Pin
from wetware_blob.store.store import Store

from ..store.parts import raw, running

pytestmark = pytest.mark.anyio

ROOT = Cid(1, RAW, bytes(32))
HOME = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
OTHER = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"


class Watched:
    """A context of a plugin, as far as a Keeper needs one."""

    def __init__(self, **config: Any) -> None:
        self.config = BlobConfig(**config)
        self.overlay = SimpleNamespace(peer_id="me")
        self.clock = FakeClock()
        self.warned: list[str] = []
        self.log = SimpleNamespace(warning=lambda event, **_: self.warned.append(event))

    def members(self, selector: str = "") -> list[Any]:
        return [SimpleNamespace(peer_id="b", is_self=False, state="alive", since_s=0.0)]

    def watch_members(self, callback: Any, selector: str) -> Any:
        return lambda: None


class Member:
    """A keeper with a real store; others have `blocks`, each a root by itself."""

    def __init__(self, store: Store, *blocks: Block, forgotten: tuple[str, ...] = ()) -> None:
        self.store, self.blocks = store, {block.cid: block for block in blocks}
        self.fetching: list[Cid] = []
        self.can_fetch = asyncio.Event()
        self.can_fetch.set()
        self.ctx = Watched(forgotten=forgotten)
        ctx = cast("Any", self.ctx)
        self.keeper = Keeper(ctx, store, self.fetch)

    async def fetch(
        self,
        root: Cid,
        owner: str,
        made: Callable[..., Pin],
        count: Callable[[int], object],
    ) -> None:
        async with self.store.hold(owner, root) as hold:
            block = self.blocks[root]
            self.fetching.append(root)
            await self.can_fetch.wait()
            await self.store.put(hold, [block])
            count(charge(len(block.data)))
            await self.store.pin(hold, made(owner, root, kind="file", size=len(block.data)))

    async def keep(self, asker: str, copy: Copy) -> Kept:
        """As it is once that goes on no more."""
        await self.keeper.replicas.keep(asker, copy)
        if tasks := self.keeper.disk.tasks._tasks:
            await asyncio.wait(tasks, timeout=10)
        return await self.keeper.replicas.keep(asker, copy)


def copy_of(block: Block, store: int = 0, home: str = HOME) -> Copy:
    """A pin of a home's store of that number."""
    return Copy(block.cid, home, bytes([store]) * 16, 2, charged=charge(len(block.data)))


async def test_copies_of_homes_that_are_forgotten_are_given_up(tmp_path: Path) -> None:
    blocks = [raw(b"a"), raw(b"b"), raw(b"c")]
    copies = [copy_of(blocks[0]), copy_of(blocks[1], 1), copy_of(blocks[2], home=OTHER)]
    async with running(tmp_path / "s") as store:
        member = Member(store, *blocks)
        for copy in copies:
            assert (await member.keep(copy.home, copy)).done
        for forgotten, left in ((f"{HOME}/{'01' * 8}", copies[::2]), (HOME, copies[2:])):
            member = Member(store, *blocks, forgotten=(forgotten,))
            await member.keeper.replicas.refresh()
            assert {pin.root for pin in await store.pins()} == {copy.root for copy in left}
            for copy in copies:
                assert (await member.keep(copy.home, copy)).room == (copy in left)


async def test_a_copy_whose_pin_is_damaged_is_written_anew_when_its_home_asks(
    tmp_path: Path,
) -> None:
    copy = copy_of(block := raw(b"a"))
    async with running(tmp_path / "s") as store:
        member = Member(store, block)
        assert (await member.keep(HOME, copy)).done
        await store._index.write(lambda db: db.execute("UPDATE pins SET pin = ''"))
        await member.keeper.replicas.refresh()
        assert member.keeper.replicas.has([copy.id]) == [False]
        with pytest.raises(Damaged):
            await store.collect()
        assert (await member.keep(HOME, copy)).done
        await store.check_pins()
        assert not (await store.collect()).blocks
        assert (await store.usage(f"node:{HOME}")).charged == copy.charged


async def test_who_says_that_a_copy_is_smaller_than_it_is_has_none_kept(tmp_path: Path) -> None:
    copy = copy_of(block := raw(b"a" * 5000))
    async with running(tmp_path / "s") as store:
        member = Member(store, block)
        assert not (await member.keep(HOME, replace(copy, charged=copy.charged - 1))).room
        assert await store.pins() == []
        member.ctx.clock.now += 2 * keeping.REFUSED_S
        assert (await member.keep(HOME, copy)).done


async def test_one_asker_leaves_room_and_places_for_others(tmp_path: Path) -> None:
    blocks = [raw(b"%d" % number) for number in range(101)]
    mine, (theirs,) = [copy_of(block) for block in blocks[:100]], map(copy_of, blocks[100:])
    size = mine[0].charged
    async with running(tmp_path / "s", owner_bytes_max=30 * size) as store:
        member = Member(store, *blocks)
        member.can_fetch.clear()
        rooms = [(await member.keeper.replicas.keep(HOME, copy)).room for copy in mine]
        assert sum(rooms) == 30, "what waits counts for the quota"
        await anyio.wait_all_tasks_blocked()
        assert len(member.fetching) == 2
        assert (await member.keeper.replicas.keep(OTHER, theirs)).room
        await anyio.wait_all_tasks_blocked()
        assert member.fetching[2:] == [theirs.root]
        await member.keeper.disk.tasks.end()
    async with running(tmp_path / "t") as store:
        member = Member(store, *blocks)
        member.can_fetch.clear()
        rooms = [(await member.keeper.replicas.keep(HOME, copy)).room for copy in mine]
        assert sum(rooms) == 64
        await member.keeper.disk.tasks.end()


@pytest.mark.parametrize(
    "value", ["attic", HOME[:-1], f"{HOME}/", f"{HOME}/01", f"{HOME}/{'x' * 16}"]
)
def test_what_is_no_home_cannot_be_forgotten(value: str) -> None:
    (field,) = (each for each in dataclasses.fields(BlobConfig) if each.name == "forgotten")
    check = field.metadata["check"]
    check((HOME, f"{OTHER}/0123456789abcdef"))
    with pytest.raises((ValueError, InvalidArgument)):
        check((HOME, value))


async def test_a_round_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is being made anew, say."""
    ctx, again = Watched(grace_s=0.01), asyncio.Event()
    keeper = Keeper(cast("Any", ctx), cast("Any", None), cast("Any", None))
    rounds = 0

    async def round_() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise StoreFailed("it is being repaired")
        again.set()

    monkeypatch.setattr(keeper, "_round", round_)
    task = asyncio.ensure_future(keeper.run())
    done, _ = await asyncio.wait(
        [task, asyncio.ensure_future(again.wait())], timeout=10, return_when="FIRST_COMPLETED"
    )
    assert done
    assert task not in done
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert ctx.warned == ["blob.copies_not_tended"]


async def test_a_drain_waits_until_it_knows_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another reading of the pins has begun since its own, and has not ended."""
    monkeypatch.setattr(keeping, "POLL_S", 0.0)
    readings = [asyncio.Event(), asyncio.Event()]
    left = list(readings)

    async def pins() -> list[Pin]:
        await left.pop(0).wait()
        return [Pin("local:ada", ROOT)]

    damaged: list[str] = []

    async def check_pins() -> None:
        if damaged:
            raise StoreFailed("a pin is damaged")

    store = SimpleNamespace(id=bytes(8), pins=pins, check_pins=check_pins)
    keeper = Keeper(cast("Any", Watched()), cast("Any", store), cast("Any", None))
    said: list[str] = []
    drain = asyncio.ensure_future(keeper.drain(said.append))
    await anyio.wait_all_tasks_blocked()
    other = asyncio.ensure_future(keeper.replicas.refresh())
    await anyio.wait_all_tasks_blocked()
    readings[0].set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not drain.done()
    readings[1].set()
    await other
    assert not drain.done()
    (id_,) = keeper.replicas.copies
    damaged.append("found meanwhile")
    keeper.replicas.handed.add(id_)
    with pytest.raises(StoreFailed):
        await asyncio.wait_for(drain, 60)
    assert said[-1] == "handing over: 1 pin left"
    assert not keeper.replicas.draining


async def test_a_drain_goes_on_as_long_as_bytes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "POLL_S", 0.0)
    ctx = Watched()

    async def nothing() -> None:
        pass

    async def pins() -> list[Pin]:
        return [Pin("local:ada", ROOT)]

    store = SimpleNamespace(id=bytes(8), pins=pins, check_pins=nothing)
    keeper = Keeper(cast("Any", ctx), cast("Any", store), cast("Any", None))
    drain = asyncio.ensure_future(keeper.drain(lambda _: None))

    async def turns() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    for nbytes in range(1, 4):
        keeper._coming[b"id"] = nbytes
        await turns()
        ctx.clock.now += keeping.STALLED_S + keeping.LEASE_S - 1
        await turns()
        assert not drain.done()
    ctx.clock.now += 2
    with pytest.raises(TimedOut, match=f"1 pin: {ROOT} \\(on any\\)"):
        await asyncio.wait_for(drain, 60)
    await keeper.replicas.refresh()
    assert not keeper.replicas.copies, "it is as before"


async def test_a_drain_that_fails_leaves_another_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "POLL_S", 0.0)

    async def nothing() -> None:
        pass

    async def pins() -> list[Pin]:
        return [Pin("local:ada", ROOT)]

    store = SimpleNamespace(id=bytes(8), pins=pins, check_pins=nothing)
    keeper = Keeper(cast("Any", Watched()), cast("Any", store), cast("Any", None))
    drains = [asyncio.ensure_future(keeper.drain(lambda _: None)) for _ in range(3)]
    await anyio.sleep(0.01)
    drains[0].cancel()
    await asyncio.wait(drains[:1])
    assert keeper.replicas.draining
    keeper.replicas.handed.update(keeper.replicas.copies)
    await asyncio.wait_for(asyncio.gather(*drains[1:]), 60)
    assert keeper.replicas.draining, "it has come to its end"


async def test_a_node_with_damaged_pins_is_not_drained(tmp_path: Path) -> None:
    async with running(tmp_path / "s") as store:
        member = Member(store, raw(b"a"))
        assert (await member.keep(HOME, copy_of(raw(b"a")))).done
        await store._index.write(lambda db: db.execute("UPDATE pins SET pin = ''"))
        with pytest.raises(StoreFailed, match="damaged pins: 1"):
            await member.keeper.drain(lambda _: None)
        assert not member.keeper.replicas.draining


def asked(home: str) -> dict[str, Any]:
    return {
        "root": bytes(ROOT), "home": home, "pin": bytes(16), "copies": 2, "where": "", "bytes": 0
    }  # fmt: skip


async def test_promises_are_one_at_a_time_for_a_copy_and_few_for_a_member() -> None:
    """Each reads all of the copy."""
    asked: list[bytes] = []

    async def lease(id_: bytes) -> float:
        asked.append(id_)
        await asyncio.sleep(3600)
        return 0.0

    async def wants(ids: list[bytes]) -> Wanted:
        return bytes(8), []

    replicas = SimpleNamespace(loaded=True, lease=lease, wants=wants)
    keeper = SimpleNamespace(replicas=replicas, asked=Places())
    b, c = (SiblingServant(cast("Any", None), cast("Any", keeper), peer) for peer in "bc")
    tasks = [asyncio.ensure_future(b.lease(bytes([n]) * 32)) for n in range(8)]
    await anyio.wait_all_tasks_blocked()
    for refused in (b.lease(bytes([9]) * 32), c.lease(bytes(32)), b.wanted([])):
        with pytest.raises(LimitExceeded):
            await refused
    await c.wanted([])
    assert len(asked) == 8
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert not keeper.asked


@pytest.mark.parametrize("home", ["x/y", "", "x" * 100])
async def test_a_home_that_is_no_peer_is_refused(home: str) -> None:
    """It is in the name of the pin, which is read back."""

    async def keep(asker: str, copy: Copy) -> Kept:
        return Kept(room=True)

    keeper = SimpleNamespace(replicas=SimpleNamespace(loaded=True, keep=keep))
    servant = SiblingServant(cast("Any", None), cast("Any", keeper), "b")
    with pytest.raises(InvalidArgument):
        await servant.keep(asked(home))


@pytest.mark.parametrize(
    "wanted", [{"copies": 200, "where": ""}, {"copies": 2, "where": "x" * 2000}]
)
async def test_a_home_that_wants_what_no_pin_can_is_not_heeded(wanted: dict[str, Any]) -> None:
    async def call(peer: str, method: str, **_: Any) -> dict[str, Any]:
        return {"store": bytes(8), "wanted": [wanted]}

    members = Members(cast("Any", Watched()))
    members._call = call  # type: ignore[method-assign,assignment]
    with pytest.raises(InvalidArgument):
        await members.wanted("home", [bytes(32)])
