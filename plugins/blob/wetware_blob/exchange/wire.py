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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from wetware.errors import OverlayError
from wetware_blob.format.cid import BLOCK_BYTES_MAX

if TYPE_CHECKING:
    from wetware.overlay.link import Stream
    from wetware.overlay.link.yamux import Bytes

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


class Answers:
    """Cuts answers out of what a provider sends. The pieces of a block are not copied.

    Args:
        on_head: Called with the length of a block that begins, None for one that is absent.
            It raises for an answer that nobody asked for.
        on_block: Called with the pieces of a block that is complete; nobody has checked it.
    """

    def __init__(
        self,
        on_head: Callable[[int | None], None],
        on_block: Callable[[list[Bytes]], None],
    ) -> None:
        self._on_head, self._on_block = on_head, on_block
        self._head = bytearray()
        self._pieces: list[Bytes] = []
        self._left = 0  # of the block that is being received

    def feed(self, data: Bytes) -> None:
        """Take what has come. Raises Malformed."""
        view, at = memoryview(data), 0
        while at < len(view):
            if self._left:
                piece = view[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                self._pieces.append(piece)
                if not self._left:
                    self._complete()
                continue
            missing = _LENGTH.size - len(self._head)
            self._head += view[at : at + missing]
            at += missing
            if len(self._head) == _LENGTH.size:
                (length,) = _LENGTH.unpack(self._head)
                self._head.clear()
                self._begin(length)

    def _begin(self, length: int) -> None:
        if length == ABSENT:
            self._on_head(None)
            return
        if length > BLOCK_BYTES_MAX:
            raise Malformed(f"a block of {length} bytes (BLOCK_BYTES_MAX: {BLOCK_BYTES_MAX})")
        self._on_head(length)
        self._left = length
        if not length:
            self._complete()

    def _complete(self) -> None:
        pieces, self._pieces = self._pieces, []
        self._on_block(pieces)
