"""What an operator sets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from wetware.hookspecs import setting
from wetware.identity import PeerId


def _check_forgotten(values: tuple[str, ...]) -> None:
    for value in values:
        home, slash, store = value.partition("/")
        PeerId.parse(home)
        if slash and not re.fullmatch("[0-9a-f]{16}", store):
            raise ValueError(f"{store!r} is not the ID of a store: 16 hex digits")


@dataclass(frozen=True, slots=True)
class BlobConfig:
    """Blobs of the cluster: `[plugins.blob]` of ww.toml."""

    node_bytes_max: int = setting(
        100 << 30,
        "Of this node's disk, for all blocks, with what the disk needs for them. What nothing "
        "keeps is collected before it is full; beyond it nothing is taken.",
        min=64 << 20,
    )
    owner_bytes_max: int = setting(
        50 << 30,
        "What one principal may have at this node, over all their pins and uploads; a block that "
        "two pins reach counts for each.",
        min=1 << 20,
    )
    grace_s: float = setting(
        900.0,
        "Seconds for which a member may be away before its copies of pins are made again "
        "elsewhere: more than it takes to start a machine again.",
        min=1,
    )
    forgotten: tuple[str, ...] = setting(
        (),
        "Peer IDs of members that will not come back: this node gives up the copies of pins that "
        "were made there, and takes none. PEER/STORE means those of one store alone, which was "
        "lost: the name of such a pin in `ww blob pin ls --all` begins with it.",
        check=_check_forgotten,
    )
    scrub_rate: int = setting(
        8 << 20,
        "Bytes a second at which all blocks are read once a day, to find damage while another "
        "node still has a copy; what is found is fetched from there. 0: never.",
    )
