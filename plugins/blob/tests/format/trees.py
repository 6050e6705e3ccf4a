"""Trees of blocks in memory, and blocks that no builder makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings

from wetware_blob.format import dagpb, unixfs
from wetware_blob.format.build import (
    V0_2015,
    V1_2025,
    Entry,
    FileTree,
    Profile,
    Root,
    directory,
    leaf,
)
from wetware_blob.format.cid import DAG_PB, RAW, Block, Cid
from wetware_blob.format.dagpb import Link
from wetware_blob.format.unixfs import Type, UnixFs

T = TypeVar("T")
TINY = tuple(
    replace(p, chunk_bytes=8, links_max=3, threshold_bytes=200) for p in (V1_2025, V0_2015)
)
"""Small enough for deep trees of a few hundred bytes."""


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure: the test's own time limit holds."""


class Blocks:
    """A store.

    Attributes:
        asked: How often each block was read.
        ahead_of: What was told to be read next.
    """

    def __init__(self) -> None:
        self.data: dict[Cid, bytes] = {}
        self.asked: Counter[Cid] = Counter()
        self.ahead_of: list[Cid] = []

    def add(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.check()
            self.data[block.cid] = block.data

    async def get(self, cid: Cid) -> bytes:
        self.asked[cid] += 1
        return self.data[cid]

    def ahead(self, cids: Sequence[Cid]) -> None:
        self.ahead_of += cids

    def file(self, content: bytes, profile: Profile) -> Root:
        tree = FileTree(profile)
        for at in range(0, len(content) or 1, profile.chunk_bytes):
            chunk = content[at : at + profile.chunk_bytes]
            block = leaf(profile, chunk)
            self.add([block, *tree.add(block.cid, len(chunk), len(block.data))])
        root, blocks = tree.finish()
        self.add(blocks)
        return root

    def directory(self, entries: Iterable[Entry], profile: Profile) -> Root:
        root, blocks = directory(entries, profile)
        self.add(blocks)
        return root

    def raw(self, data: bytes) -> Cid:
        self.add([Block(Cid.of(RAW, data), data)])
        return Cid.of(RAW, data)

    def node(self, links: Iterable[Link], said: UnixFs | bytes | None) -> Cid:
        """A block that says what it is told to."""
        data = unixfs.encode(said) if isinstance(said, UnixFs) else said
        block = dagpb.encode(dagpb.Node(tuple(links), data))
        self.add([Block(Cid.of(DAG_PB, block), block)])
        return Cid.of(DAG_PB, block)

    def parts(self, parts: Iterable[tuple[Cid, int]], **more: Any) -> Cid:
        """A file of parts, of which each is claimed to have so many bytes."""
        parts = list(parts)
        sizes = tuple(size for _, size in parts)
        said = UnixFs(**{"type": Type.FILE, "size": sum(sizes), "sizes": sizes, **more})
        return self.node((Link(bytes(cid), b"", 0) for cid, _ in parts), said)

    def shard(self, links: dict[bytes, Cid], **more: Any) -> Cid:
        """A block of a HAMT; the bits are those of the names of the links."""
        bits = sum(1 << int(name[:2], 16) for name in links)
        said = {"type": Type.HAMT, "data": bits.to_bytes(32, "big"), "hash": 0x22, "fanout": 256}
        return self.node(
            (Link(bytes(cid), name, 0) for name, cid in links.items()), UnixFs(**{**said, **more})
        )


async def collected(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for: hypothesis has no event loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waits")
