"""What is owed to copies where a pin, a block or another member is not as it should be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wetware.errors import Denied
from wetware.testing import FakeClock
from wetware_blob.format.cid import RAW, Cid
from wetware_blob.replicas.duties import LEASE_S, Copy, Kept, Replicas, Wanted
from wetware_blob.store.errors import Damaged, StoreFailed

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
        self.store, self.wants, self.lease_s = bytes(8), 3, 0.0

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
        return self.lease_s

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


@pytest.mark.parametrize("members", [1, 2])
async def test_what_is_pinned_anew_while_its_end_is_told_counts_no_copy_that_goes(
    members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who made it anew would be told of copies that are dropped a moment later."""
    copy, disk, others = copy_of("me", 1), Disk(), Others()
    disk.copies = [copy]
    peers = {"b", "c"} if members == 2 else {"b"}
    seen: list[list[str]] = []

    async def holding(ids: list[bytes]) -> dict[str, set[bytes]]:
        return {peer: set(ids) for peer in peers}

    async def drop(peer: str, ids: list[bytes]) -> None:
        others.told.append((peer, ids))
        disk.copies = [copy]
        await replicas.refresh()
        await replicas.survey([copy.id])
        seen.append(replicas.holders(copy))

    monkeypatch.setattr(others, "alive", lambda where="": {"me", *peers})
    monkeypatch.setattr(others, "holding", holding)
    monkeypatch.setattr(others, "drop", drop)
    replicas = await replicas_of(disk, others)
    await replicas.survey([copy.id])
    disk.copies = []
    await replicas.refresh()
    ((first, _),) = others.told
    assert seen == [["me", *(peers - {first})]]
    assert replicas.holders(copy) == ["me", *(peers - {first})]


async def test_who_drains_says_that_it_keeps_none() -> None:
    """Else its home would go on asking it, and nobody else."""
    copy = copy_of("home", 1)
    replicas = await replicas_of(Disk(copy), Others())
    assert (await replicas.keep("home", copy)).done
    replicas.draining = 1
    assert await replicas.keep("home", copy) == Kept(room=False)


@pytest.mark.parametrize(("alive", "handed"), [("b", True), ("b c", False), ("", False)])
async def test_who_leaves_hands_over_to_all_that_there_are(alive: str, handed: bool) -> None:
    """Two copies are wanted, and b has one; c could, and does not come to it."""
    copy = copy_of("me", 1)
    others = Others()
    others.lease_s = LEASE_S
    others.alive = lambda where="": {"me", *alive.split()}  # type: ignore[method-assign]
    replicas = await replicas_of(Disk(copy), others)
    replicas.draining = 1
    if alive:
        await replicas.survey([copy.id])
    await replicas.tend(copy.id)
    assert (copy.id in replicas.handed) == handed


async def test_a_member_that_says_too_much_makes_no_progress() -> None:
    mib = 1 << 20
    copy = replace(copy_of("me", 1), charged=3 * mib)
    others = Others()
    said = [0, 1, mib - 1, mib, mib + 1, 3 * mib, 4 * mib, 1 << 60]

    async def keep(peer: str, copy: Copy) -> Kept:
        return Kept(room=True, bytes=said.pop())

    others.keep = keep  # type: ignore[method-assign]
    replicas = await replicas_of(Disk(copy), others)
    replicas.pinned(copy.id)
    assert {await replicas.tend(copy.id) for _ in said[:]} == {0, mib, 3 * mib}


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
