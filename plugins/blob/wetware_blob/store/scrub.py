"""Scrubbing: reading everything, so that damage is found while another node still has a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wetware.errors import NotFound
from wetware_blob.store.errors import Damaged
from wetware_blob.store.pins import BadPin, read_pins

if TYPE_CHECKING:
    from wetware_blob.store.blocks import Blocks
    from wetware_blob.store.index import Index

STEP_BYTES: Final = 4 << 20
"""That are read before there is a pause."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What is damaged: a block by its digest, or a pin as its row is now."""

    digest: bytes = b""
    pin: BadPin | None = None


def step(
    index: Index, blocks: Blocks, after: int, end: int | None
) -> tuple[int | None, int, list[Damage]]:
    """Read the next blocks after this ID, up to `end`: the last ID (None: all), bytes, damage."""
    found: list[Damage] = []
    nbytes = 0
    while nbytes < STEP_BYTES:
        rows = [row for row in index.after(after, 64) if end is None or row.id <= end]
        if not rows:
            return None, nbytes, found
        for row in rows:
            after = row.id
            nbytes += row.size
            try:
                blocks.read(row.digest)
            except Damaged:
                found.append(Damage(row.digest))
            except NotFound:
                if row in index.after(row.id - 1, 1):  # not deleted meanwhile: its hash is damaged
                    index.suspect()
                    found.append(Damage(row.digest))
            if nbytes >= STEP_BYTES:
                break
    return after, nbytes, found


def bad_pins(index: Index) -> list[Damage]:
    with index.reading() as db:
        return [Damage(pin=pin) for pin in read_pins(db) if isinstance(pin, BadPin)]
