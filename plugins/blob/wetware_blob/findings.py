"""What `ww doctor` says of the blobs of a node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from wetware.base.finding import counted, error, size, warning

if TYPE_CHECKING:
    from wetware.hookspecs import Finding
    from wetware_blob.store.store import Usage

NEARLY: Final = 0.95
"""Of what the node may have."""
FREE_BYTES_MIN: Final = 256 << 20


def findings(
    lacking: list[str], damaged_blocks: int, damaged_pins: int, usage: Usage, free_bytes: int
) -> Iterator[Finding]:
    """Of roots of this node's own pins with too few copies, of damage, and of room, bytes."""
    if lacking:
        some = ", ".join(lacking[:3])
        yield warning(
            "blob.copies",
            f"{counted(len(lacking), 'pin')} of this node with fewer copies than wanted: "
            f"{some}{', …' if len(lacking) > 3 else ''}",
            "see who is there and may have them: `ww ls service=blob`; they are made when they can",
        )
    if damaged_blocks or damaged_pins:
        yield error(
            "blob.damage",
            f"{counted(damaged_blocks, 'block')} and {counted(damaged_pins, 'pin')} of "
            "this node are damaged",
            "`ww blob verify` names them, and fetches what others have; then look at the disk",
        )
    if usage.charged > NEARLY * usage.charged_max or free_bytes < FREE_BYTES_MIN:
        yield warning(
            "blob.disk",
            f"{size(usage.charged)} of {size(usage.charged_max)} are taken by blobs, and the "
            f"disk has {size(free_bytes)} free",
            "`ww blob gc`, unpin what is not needed, or raise `[plugins.blob] node_bytes_max`",
        )
