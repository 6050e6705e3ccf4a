"""How messages are cut out of a stream.

Frames between members: four bytes of length, big-endian, then a CBOR map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wetware.base import cbor
from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    from wetware.overlay.link import Stream


async def write_frame(stream: Stream, message: Mapping[str, object]) -> None:
    """Send one frame; raises OverlayError."""
    data = cbor.encode(dict(message))
    await stream.write(len(data).to_bytes(4, "big") + data)


async def read_frame(stream: Stream, *, bytes_max: int) -> dict[str, Any]:
    """Receive one frame. The length is judged before anything of it is kept.

    Raises InvalidArgument, OverlayError, or asyncio.IncompleteReadError at an early end.
    """
    size = int.from_bytes(await stream.read_exactly(4), "big")
    if size > bytes_max:
        raise InvalidArgument(f"a frame of {size} bytes where at most {bytes_max} are expected")
    message = cbor.decode(await stream.read_exactly(size), bytes_max=bytes_max)
    if type(message) is not dict:
        raise InvalidArgument("a frame that is not a map")
    return message


def field(message: Mapping[str, Any], key: str, *, bytes_max: int) -> bytes:
    """A field of bytes; raises InvalidArgument."""
    value = message.get(key)
    if type(value) is not bytes or len(value) > bytes_max:
        raise InvalidArgument(f"a frame without {key!r}, or with too long a one")
    return value
