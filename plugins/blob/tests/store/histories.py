"""Random histories of a store on a disk that fails, and what has to be true after each crash."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.failing_disk import Disk, File, forget

from wetware.errors import ConfigError, NotFound, WetwareError
from wetware_blob.format.cid import Block, Cid
from wetware_blob.store.errors import Damaged
from wetware_blob.store.index import FILE, SMALL_BYTES_MAX
from wetware_blob.store.pins import Pin
from wetware_blob.store.store import Hold, Store

from .parts import ADA, node, raw, running

SPOILED = (100, 7 * 4096)
"""Of the index: what says of what kind the first page is, and that where the pins' keys begin."""


class Lost(AssertionError):
    """What was acknowledged is not there, or something wrong was served."""


async def inline(function: Callable[..., Any], *args: object) -> Any:
    """In place of a thread: histories are the same each time."""
    await asyncio.sleep(0)
    return function(*args)


class History:
    """What a store was told, and what it has acknowledged.

    Attributes:
        blocks: Everything that may ever be put, by digest.
        safe: Digests that were acknowledged, and that no collection may have taken since.
        pins: Roots whose pin was acknowledged, and not given up since.
        gone: Roots whose unpin was acknowledged.
    """

    def __init__(self, seed: int, dropped: str = "") -> None:
        self.rng = rng = random.Random(seed)
        self.disk = Disk(rng, dropped)
        self.damages = random.Random(seed)
        sizes = (0, 1, 700, 5000, SMALL_BYTES_MAX, SMALL_BYTES_MAX + 1, SMALL_BYTES_MAX + 5000)
        leaves = [raw(rng.randbytes(rng.choice(sizes))) for _ in range(12)]
        self.trees: list[list[Block]] = []
        for _ in range(8):
            some = rng.sample(leaves, rng.randrange(1, 5))
            self.trees.append([*some, node([leaf.cid for leaf in some])])
        self.blocks = {b.cid.digest: b for tree in self.trees for b in tree}
        self.safe: set[bytes] = set()
        self.pins: set[Cid] = set()
        self.gone: set[Cid] = set()
        self.refused: list[Block] = []
        self.acknowledged = 0

    async def run(self) -> None:
        """Three lives, each of which ends in its own way, and what is there after the last."""
        try:
            for _ in range(3):
                await self._live()
            await self._check()
        finally:
            forget(self.disk)

    async def _live(self) -> None:
        rng, disk = self.rng, self.disk
        if rng.random() < 0.7:
            likely = rng.choice([0.005, 0.03, 0.15])
            kinds = [("sync", "log"), ("log",), ("write",), ("sync", "log", "write", "read")]
            disk.faults = dict.fromkeys(rng.choice(kinds), likely)
            disk.faults["log's name"] = rng.choice([0, 0.5])
        disk.dies_in_commit = rng.choice([0, 0, 0.2])
        if rng.random() < 0.4:
            disk.calls_left = int(rng.expovariate(1 / 120)) + 1
        killed_when_refused = rng.random() < 0.5
        try:
            async with running(disk, run_sync=inline) as store:  # type: ignore[arg-type]
                await self._look(store)
                acts = rng.choice([1, 2, 4, 8])
                if self.refused and rng.random() < 0.7:
                    await self._again(store)
                    acts = rng.choice([0, acts])
                for _ in range(acts):
                    disk.full = rng.random() < 0.1
                    if not await self._act(store) and (killed_when_refused or disk.dead):
                        break
                disk.dead = disk.dead or not acts or rng.random() < 0.7
        except* ConfigError:
            pass  # it could not be opened
        # A process that is killed in a commit, a retry, and then a power loss: that is rare.
        disk.crash(power=rng.random() < (0.1 if disk.died_in_commit else 0.6))
        if self.damages.random() < 0.1:
            damage(disk)

    async def _act(self, store: Store) -> bool:
        """One thing that a user does; whether it was acknowledged."""
        what = self.rng.choices(
            ["put", "pin", "two", "unpin", "collect", "get"], [2, 5, 2, 2, 1, 1]
        )
        tree = self.rng.choice(self.trees)
        with contextlib.suppress(WetwareError):
            if what == ["put"]:
                async with store.hold(ADA) as hold:
                    await self._put(store, hold, tree)
            elif what == ["pin"]:
                await self._pin(store, tree)
            elif what == ["two"]:
                other = self.rng.choice(self.trees)
                done = await asyncio.gather(
                    self._pin(store, tree), self._pin(store, other), return_exceptions=True
                )
                for result in done:
                    if isinstance(result, BaseException):
                        raise result
            elif what == ["unpin"]:
                root = tree[-1].cid
                self.pins.discard(root)
                await store.unpin(ADA, root, None)
                self.gone.add(root)
            elif what == ["collect"]:
                # Of what is not pinned nothing is promised from here on.
                self.safe = {b.cid.digest for t in self.trees if t[-1].cid in self.pins for b in t}
                await store.collect(dry_run=False)
            else:
                await self._get(store, self.rng.choice(list(self.blocks.values())))
            self.acknowledged += 1
            return True
        self.refused = tree
        return False

    async def _again(self, store: Store) -> None:
        """After a crash, what may be there: nothing is to be written then, but it is promised."""
        with contextlib.suppress(WetwareError):
            async with store.hold(ADA) as hold:
                await self._put(store, hold, self.refused)

    async def _put(self, store: Store, hold: Hold, tree: list[Block]) -> None:
        await store.put(hold, tree)
        self.safe.update(b.cid.digest for b in tree)

    async def _pin(self, store: Store, tree: list[Block]) -> None:
        root = tree[-1].cid
        self.gone.discard(root)
        async with store.hold(ADA) as hold:
            await self._put(store, hold, tree)
            await store.pin(hold, Pin(ADA, root))
            self.pins.add(root)

    async def _get(self, store: Store, block: Block) -> bool:
        """Whether it is there; wrong bytes are never served."""
        try:
            data = await store.get(block.cid.digest)
        except (NotFound, Damaged):
            return False
        if data != block.data:
            raise Lost(f"wrong bytes of {block.cid}")
        return True

    async def _check(self) -> None:
        try:
            async with running(self.disk, run_sync=inline) as store:  # type: ignore[arg-type]
                await self._look(store)
        except* WetwareError as refused:
            raise Lost(f"all of it: {refused.exceptions}") from refused

    async def _look(self, store: Store) -> None:
        """All that was acknowledged is there, and nothing wrong. The disk is sound meanwhile."""
        with self._sound(), _read():
            pinned = {pin.root for pin in await store.pins(ADA)}
            if lacking := self.pins - pinned:
                raise Lost(f"{len(lacking)} pins")
            if back := self.gone & pinned:
                raise Lost(f"{len(back)} pins are back")
            lacking = [d for d in self.safe if not await self._get(store, self.blocks[d])]
            if lacking:
                raise Lost(f"{len(lacking)} blocks")
            for block in self.blocks.values():
                await self._get(store, block)

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        disk = self.disk
        before = disk.faults, disk.calls_left, disk.dead, disk.dies_in_commit
        disk.faults, disk.calls_left, disk.dead, disk.dies_in_commit = {}, None, False, 0
        try:
            yield
        finally:
            disk.faults, disk.calls_left, disk.dead, disk.dies_in_commit = before


def damage(disk: Disk) -> None:
    """Spoil pages of an index that is there of which a salvage needs none: it has all then."""
    with contextlib.suppress(FileNotFoundError):
        index = disk._entry(FILE)
        assert isinstance(index, File)
        for data in (index.data, index.disk):
            for at in SPOILED:
                if at < len(data):
                    data[at] ^= 255


@contextlib.contextmanager
def _read() -> Iterator[None]:
    try:
        yield
    except WetwareError as refused:
        raise Lost(f"the index: {refused}") from refused
