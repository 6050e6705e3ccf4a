"""Frames of the admission protocols: four bytes of length, then a CBOR map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from wetware import cbor
from wetware.errors import AdmissionRefused, InvalidArgument, WetwareError, from_wire

if TYPE_CHECKING:
    from wetware.link import Stream

TEXT_CHARS_MAX: Final = 400
"""Of a refusal's message and hint, as a peer sends them."""


async def write_frame(stream: Stream, value: dict[str, Any]) -> None:
    """Send one frame; raises OverlayError."""
    data = cbor.encode(value)
    await stream.write(len(data).to_bytes(4, "big") + data)


async def read_frame(stream: Stream, *, bytes_max: int) -> dict[str, Any]:
    """Receive one frame. The length is judged before anything of it is kept.

    Raises InvalidArgument, OverlayError, or asyncio.IncompleteReadError at an early end.
    """
    size = int.from_bytes(await stream.read_exactly(4), "big")
    if size > bytes_max:
        raise InvalidArgument(f"a frame of {size} bytes where at most {bytes_max} are expected")
    value = cbor.decode(await stream.read_exactly(size), bytes_max=bytes_max)
    if type(value) is not dict:
        raise InvalidArgument("a frame that is not a map")
    return value


def field(message: dict[str, Any], key: str, *, bytes_max: int) -> bytes:
    """A field of bytes; raises InvalidArgument."""
    value = message.get(key)
    if type(value) is not bytes or len(value) > bytes_max:
        raise InvalidArgument(f"a frame without {key!r}, or with too long a one")
    return value


async def write_refusal(stream: Stream, exc: WetwareError) -> None:
    """Send a refusal."""
    frame: dict[str, Any] = {
        "code": exc.code,
        "message": exc.message[:TEXT_CHARS_MAX],
        "hint": exc.hint[:TEXT_CHARS_MAX],
    }
    if isinstance(exc, AdmissionRefused) and exc.fact:
        frame["fact"] = exc.fact
    await write_frame(stream, frame)


def raise_refusal(message: dict[str, Any]) -> None:
    """Raise what the peer refused with, if it did. Its words are text of a stranger."""
    if "code" not in message:
        return
    code, text, hint = (
        "".join(c if c.isprintable() else "?" for c in str(message.get(key, ""))[:TEXT_CHARS_MAX])
        for key in ("code", "message", "hint")
    )
    exc = from_wire(code, text or "refused", hint)
    if not isinstance(exc, AdmissionRefused):
        exc = AdmissionRefused(f"{text or 'refused'} ({code})", hint=hint)
    if type(fact := message.get("fact")) is bytes:
        exc.fact = fact
    raise exc
