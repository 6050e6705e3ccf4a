"""The store on a disk that is full to the last byte."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from wetware.base.files import Files
from wetware_blob.format.cid import Block
from wetware_blob.store import index
from wetware_blob.store.errors import DiskFull
from wetware_blob.store.pins import Pin
from wetware_blob.store.store import Store

from .parts import ADA, BOB, node, raw, running

pytestmark = pytest.mark.anyio


class Unaware(Files):
    """Does not know beforehand: the disk fills up in the middle of a put."""

    def free_bytes(self) -> int:
        return 1 << 40


async def fill(store: Store, size: int, many: int) -> list[list[Block]]:
    """Pin trees until one is refused; returns those that were acknowledged."""
    trees: list[list[Block]] = []
    for n in range(10_000):
        leaves = [raw(os.urandom(size)) for _ in range(many)]
        tree = [*leaves, node([leaf.cid for leaf in leaves])]
        try:
            async with store.hold(ADA) as hold:
                await store.put(hold, tree)
                await store.pin(hold, Pin(ADA, tree[-1].cid, str(n)))
        except DiskFull:
            return trees
        trees.append(tree)
    raise AssertionError("it was never full")


async def check(store: Store, trees: list[list[Block]]) -> None:
    assert {pin.root for pin in await store.pins()} == {tree[-1].cid for tree in trees}
    for tree in trees:
        for block in tree:
            assert await store.get(block.cid.digest) == block.data


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize(("size", "many"), [(300_000, 3), (4096, 40), (30_000, 20)])
async def test_in_the_middle_of_a_put(small_disk: Any, size: int, many: int, aware: bool) -> None:
    path: Path = small_disk.path / "s"
    files = Files(path) if aware else Unaware(path)
    async with running(files) as store:
        trees = await fill(store, size, many)
        small_disk.fill()
        assert not small_disk.free_bytes
        await check(store, trees)
    small_disk.fill()
    async with running(files) as store:  # it opens again
        await check(store, trees)
        for tree in (trees.pop(), trees.pop(0)):
            assert await store.unpin(ADA, tree[-1].cid, None) == 1
        before = await store.collect(dry_run=True)
        assert before.blocks >= 2 * (many + 1)
        assert await store.collect(dry_run=False) == before
        await check(store, trees)
    small_disk.free()
    async with running(files) as store:
        await check(store, trees)
        async with store.hold(BOB) as hold:
            await store.put(hold, [raw(b"it goes on")])


async def test_all_of_it_can_be_given_up_one_by_one_without_any_room(
    small_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the log is emptied in between, and somebody else takes what that leaves."""
    monkeypatch.setattr(index, "IDLE_S", 0.001)
    files = Unaware(small_disk.path / "s")
    async with running(files) as store:
        trees = await fill(store, 2000, 5)
        assert len(trees) > 500
        for at, tree in enumerate(trees):
            small_disk.fill()
            assert await store.unpin(ADA, tree[-1].cid, None) == 1
            if at % 50 == 0:
                await store.collect(dry_run=False)
        await store.collect(dry_run=False)
        assert (await store.usage()).charged == 0
        assert await store.pins() == []
