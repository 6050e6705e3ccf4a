"""Reading what others built: the links of a block."""

from __future__ import annotations

from wetware.errors import InvalidArgument
from wetware_blob.format import dagpb
from wetware_blob.format.cid import RAW, BadBlock, Cid


def children(cid: Cid, block: bytes) -> list[Cid]:
    """The blocks that a block links to, each once, in the order of the links.

    Raises BadBlock for a block that is none of its codec, or that links to what is not UnixFS: a
    hash other than sha2-256, a codec other than raw and dag-pb.
    """
    if cid.codec == RAW:
        return []
    links = dagpb.decode(block).links
    return list(dict.fromkeys(target(link) for link in links))


def target(link: dagpb.Link) -> Cid:
    """What a link points to; raises BadBlock."""
    try:
        return Cid.decode(link.cid)
    except InvalidArgument as exc:
        raise BadBlock(f"a link that cannot be followed: {exc}") from None
