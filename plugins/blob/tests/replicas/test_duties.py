"""What is owed to copies where a pin, a block or another member is not as it should be."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from wetware.errors import Denied, InvalidArgument
from wetware.testing import FakeClock
from wetware_blob.format.cid import RAW, Cid
from wetware_blob.replicas import keeper as keeping
from wetware_blob.replicas.duties import Copy, Kept, Replicas, Wanted
from wetware_blob.replicas.keeper import Keeper, Members
from wetware_blob.replicas.sibling import SiblingServant
from wetware_blob.store.errors import Damaged, StoreFailed
from wetware_blob.store.pins import Pin

pytestmark = pytest.mark.anyio

ROOT = Cid(1, RAW, bytes(32))


class Disk:
    """`duties.Disk`; `damaged` are blocks or pins that are."""

    id = bytes(8)

    def __init__(self, *copies: Copy) -> None:
        self.copies = list(copies)
        self.damaged: set[bytes] = set()

    async def read(self, *, single: bool) -> list[Copy]:
        return [copy for copy in self.copies if copy.id not in self.damaged]

    async def keep(self, asker: str, copy: Copy) -> Kept:
        return Kept(room=True)

    async def amend(self, copy: Copy) -> bool:
        if copy.id in self.damaged:
            raise Damaged("a block is damaged")
        return True

    async def drop(self, copy: Copy) -> None:
        self.copies.remove(copy)

    async def check_whole(self) -> None:
        if self.damaged:
            raise StoreFailed("a pin is damaged")


class Others:
    """`duties.Cluster`: b has all, and the home, whose store is `store`, wants 3 of each."""

    def __init__(self) -> None:
        self.told: list[tuple[str, list[bytes]]] = []
        self.store, self.wants = bytes(8), 3

    def alive(self, where: str = "") -> set[str]:
        return {"me", "home", "b"}

    def gone(self, peer: str) -> bool:
        return False

    async def holding(self, ids: list[bytes]) -> dict[str, set[bytes]]:
        return {"b": set(ids)}

    async def wanted(self, home: str, ids: list[bytes]) -> Wanted:
        return self.store, [(self.wants, "") for _ in ids]

    async def keep(self, peer: str, copy: Copy) -> Kept:
        return Kept(room=True)

    async def lease(self, peer: str, copy: Copy) -> float:
        return 0.0

    async def drop(self, peer: str, ids: list[bytes]) -> None:
        self.told.append((peer, ids))


def copy_of(home: str, pin: int, root: Cid = ROOT) -> Copy:
    return Copy(root, home, bytes(8) + bytes([pin]) * 8, 2)


async def replicas_of(disk: Disk, others: Others) -> Replicas:
    replicas = Replicas("me", disk, others, FakeClock(), grace_s=60.0)
    await replicas.refresh()
    return replicas


async def test_a_pin_that_is_damaged_is_not_given_up_elsewhere() -> None:
    one, two = copy_of("me", 1), copy_of("me", 2)
    disk, others = Disk(one, two), Others()
    replicas = await replicas_of(disk, others)
    await replicas.survey([one.id, two.id])
    disk.damaged = {one.id}
    await replicas.refresh()
    assert one.id not in replicas.copies
    assert others.told == []
    disk.damaged = set()
    await replicas.refresh()
    await replicas.survey([one.id, two.id])
    disk.copies = [one]
    await replicas.refresh()
    assert others.told == [("b", [two.id])]


async def test_who_drains_says_that_it_keeps_none() -> None:
    """Else its home would go on asking it, and nobody else."""
    copy = copy_of("home", 1)
    replicas = await replicas_of(Disk(copy), Others())
    assert (await replicas.keep("home", copy)).done
    replicas.draining = True
    assert await replicas.keep("home", copy) == Kept(room=False)


async def test_what_cannot_be_amended_does_not_keep_others_from_it() -> None:
    copies = [copy_of("home", n) for n in range(3)]
    disk = Disk(*copies)
    replicas = await replicas_of(disk, Others())
    disk.damaged = {copies[0].id}
    await replicas.survey([copy.id for copy in copies])
    assert [replicas.copies[copy.id].copies for copy in copies] == [2, 3, 3]


async def test_other_blocks_are_not_taken_for_a_copy() -> None:
    """Who looks after it while its home is gone says what its root is."""
    copy = copy_of("home", 1)
    replicas = await replicas_of(Disk(copy_of("home", 1, Cid(1, RAW, b"x" * 32))), Others())
    assert replicas.has([copy.id]) == [False]


async def test_a_home_whose_store_was_made_anew_gives_nothing_up() -> None:
    """Its copies are kept as those of one that is gone: others look after them, too."""
    copy = copy_of("home", 1)
    disk, others = Disk(copy), Others()
    replicas = await replicas_of(disk, others)
    others.store, others.wants = b"another.", 0
    await replicas.survey([copy.id])
    assert disk.copies == [copy]
    asked = copy_of("home", 2)
    assert (await replicas.keep("b", asked)).room
    others.store = bytes(8)
    with pytest.raises(Denied):
        await replicas.keep("b", asked)
    await replicas.survey([copy.id])
    assert not disk.copies


async def test_what_is_not_known_to_be_lost_is_not_said_to_be_over() -> None:
    copy, damaged = copy_of("me", 1), copy_of("me", 2)
    disk = Disk(copy, damaged)
    replicas = await replicas_of(disk, Others())
    disk.damaged = {damaged.id}
    await replicas.refresh()
    assert await replicas.wants([copy.id]) == (disk.id, [(2, "")])
    with pytest.raises(StoreFailed):
        await replicas.wants([copy.id, damaged.id])


class Watched:
    """A context of a plugin, as far as a Keeper needs one."""

    def __init__(self) -> None:
        self.overlay = SimpleNamespace(peer_id="me")
        self.clock = FakeClock()
        self.warned: list[str] = []
        self.log = SimpleNamespace(warning=lambda event, **_: self.warned.append(event))

    def members(self, selector: str = "") -> list[Any]:
        return [SimpleNamespace(peer_id="b", is_self=False, state="alive", since_s=0.0)]

    def watch_members(self, callback: Any, selector: str) -> Any:
        return lambda: None


async def test_a_round_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is being made anew, say."""
    ctx, again = Watched(), asyncio.Event()
    keeper = Keeper(cast("Any", ctx), cast("Any", None), cast("Any", None), grace_s=0.01)
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

    store = SimpleNamespace(id=bytes(8), pins=pins)
    keeper = Keeper(cast("Any", Watched()), cast("Any", store), cast("Any", None), grace_s=60.0)
    drain = asyncio.ensure_future(keeper.drain(cast("Any", SimpleNamespace())))
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
    keeper.replicas.handed.add(id_)
    await asyncio.wait_for(drain, 10)


def asked(home: str) -> dict[str, Any]:
    return {
        "root": bytes(ROOT), "home": home, "pin": bytes(16), "copies": 2, "where": "", "bytes": 0
    }  # fmt: skip


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

    members = Members(cast("Any", Watched()), 60.0)
    members._call = call  # type: ignore[method-assign,assignment]
    with pytest.raises(InvalidArgument):
        await members.wanted("home", [bytes(32)])
