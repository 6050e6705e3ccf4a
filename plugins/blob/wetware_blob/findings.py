"""What `ww doctor` says of the blobs of a node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from wetware.base.finding import counted, error, size, warning

if TYPE_CHECKING:
    from wetware.hookspecs import Finding
    from wetware_blob.replicas.keeper import Seen

NEARLY: Final = 0.95
"""Of what the node may have."""
FREE_BYTES_MIN: Final = 256 << 20


def findings(seen: Seen) -> Iterator[Finding]:
    """Of what was seen in the last round of looking after copies."""
    if seen.lacking:
        some = ", ".join(str(copy.root) for copy in seen.lacking[:3])
        yield warning(
            "blob.copies",
            f"{counted(len(seen.lacking), 'pin')} of this node with fewer copies than wanted: "
            f"{some}{', …' if len(seen.lacking) > 3 else ''}",
            "see who is there and may have them: `ww ls service=blob`; they are made when they can",
        )
    if seen.damaged_blocks or seen.damaged_pins:
        yield error(
            "blob.damage",
            f"{counted(seen.damaged_blocks, 'block')} and {counted(seen.damaged_pins, 'pin')} of "
            "this node are damaged",
            "`ww blob verify` names them, and fetches what others have; then look at the disk",
        )
    if seen.used_bytes > NEARLY * seen.used_bytes_max or seen.free_bytes < FREE_BYTES_MIN:
        yield warning(
            "blob.disk",
            f"{size(seen.used_bytes)} of {size(seen.used_bytes_max)} are taken by blobs, and the "
            f"disk has {size(seen.free_bytes)} free",
            "`ww blob gc`, unpin what is not needed, or raise `[plugins.blob] node_bytes_max`",
        )
