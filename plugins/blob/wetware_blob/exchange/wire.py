"""Frames of `/wetware/blob/1`: what one member wants of another, and its answers. No I/O policy.

A stream belongs to one fetch and one provider. The fetcher says which blocks it wants:

    count (2 bytes) · count × digest (32 bytes)

and the provider answers each digest, in the order in which they were asked for:

    length (4 bytes) · the block          or ABSENT (4 bytes): it does not have it

Numbers are big-endian. Closing the stream is cancelling.
"""

from __future__ import annotations

import struct
from asyncio import IncompleteReadError
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from wetware.errors import OverlayError
from wetware_blob.format.cid import BLOCK_BYTES_MAX

if TYPE_CHECKING:
    from wetware.overlay.link import Stream

PROTOCOL: Final = "/wetware/blob/1"
DIGEST_BYTES: Final = 32
WANTS_MAX: Final = 256
"""Digests that are not answered yet, on one stream; so many fit into one frame, too."""
ABSENT: Final = 0xFFFFFFFF
ABSENT_FRAME: Final = struct.pack("!I", ABSENT)

_COUNT: Final = struct.Struct("!H")
_LENGTH: Final = struct.Struct("!I")


class Malformed(OverlayError):
    """The peer sent what is no frame of this protocol."""

    code = "overlay.malformed"


def want_frame(digests: Sequence[bytes]) -> bytes:
    """A frame for 1 to WANTS_MAX digests."""
    return _COUNT.pack(len(digests)) + b"".join(digests)


def head(block: bytes) -> bytes:
    """What goes before a block."""
    return _LENGTH.pack(len(block))


async def read_want(stream: Stream) -> list[bytes]:
    """The digests of the next frame; none at the end of the stream.

    Raises Malformed, IncompleteReadError for an end within a frame, and what the stream raises.
    """
    try:
        (count,) = _COUNT.unpack(await stream.read_exactly(_COUNT.size))
    except IncompleteReadError as exc:
        if exc.partial:
            raise
        return []
    if not 0 < count <= WANTS_MAX:
        raise Malformed(f"a frame wants {count} blocks (WANTS_MAX: {WANTS_MAX})")
    digests = await stream.read_exactly(count * DIGEST_BYTES)
    return [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]


async def read_head(stream: Stream) -> int | None:
    """The length of the block that comes next; None where the provider does not have it.

    Raises Malformed, IncompleteReadError at the end of the stream, and what the stream raises.
    """
    (length,) = _LENGTH.unpack(await stream.read_exactly(_LENGTH.size))
    if length == ABSENT:
        return None
    if length > BLOCK_BYTES_MAX:
        raise Malformed(f"a block of {length} bytes (BLOCK_BYTES_MAX: {BLOCK_BYTES_MAX})")
    return int(length)
