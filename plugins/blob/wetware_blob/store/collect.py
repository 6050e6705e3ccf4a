"""Collecting garbage: what no pin, no hold and no unfinished download reaches is deleted.

The mark is a bit for each row, in memory: nothing is written before the first block is deleted, so
a full disk can be collected. What a hold is given meanwhile, written or found to be there already,
gets its bit in the same transaction (`Index.keep`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wetware.errors import NotFound, WetwareError
from wetware_blob.format.cid import DAG_PB, Cid
from wetware_blob.format.read import children
from wetware_blob.store.bits import Bits

if TYPE_CHECKING:
    from wetware_blob.store.blocks import Blocks
    from wetware_blob.store.index import Index

WALK_BLOCKS: Final = 64
"""Blocks with links that one call in a thread reads."""
DELETED_MAX: Final = 64
"""Blocks of one transaction that deletes: each may be in a page of its own, and all of them have to
fit into the reserve."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What was deleted, or would be: blocks, and the bytes that they were charged."""

    blocks: int = 0
    charged: int = 0


class Walk:
    """Everything below some roots, as far as it is here. Blocks: call it in a thread.

    Args:
        keep: Is given every row that is seen, before any of them can be deleted.
        whole: Whether a block that lacks ends the walk: NotFound, or Damaged.

    Attributes:
        charged: Of all that was seen, each block once.
        lacking: Blocks that are not here.
    """

    def __init__(self, index: Index, blocks: Blocks, keep: Bits, *, whole: bool) -> None:
        self._index, self._blocks = index, blocks
        self._keep, self._whole = keep, whole
        self._seen, self._followed = Bits(), Bits()  # a block has a CID for each codec
        self._left: list[Cid] = []
        self.charged = 0
        self.lacking: list[Cid] = []

    def add(self, cids: Collection[Cid]) -> None:
        """Go on below these, too."""
        rows = self._index.find({cid.digest for cid in cids}, self._keep)
        for cid in cids:
            row = rows.get(cid.digest)
            if row is None:
                if self._whole:
                    raise NotFound(f"block {cid} is not here", code="not_found.blob")
                self.lacking.append(cid)
                continue
            if self._seen.add(row.id):
                self.charged += row.charged
            if cid.codec == DAG_PB and self._followed.add(row.id):
                self._left.append(cid)

    def step(self) -> bool:
        """A part of it; returns whether there is more."""
        for _ in range(WALK_BLOCKS):
            if not self._left:
                return False
            cid = self._left.pop()
            try:
                below = children(cid, self._blocks.read(cid.digest))
            except WetwareError:
                if self._whole:
                    raise
                continue
            self.add(below)
        return bool(self._left)
