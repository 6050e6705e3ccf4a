"""How the admission protocols refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from wetware.errors import AdmissionRefused, WetwareError, from_wire
from wetware.overlay.frames import write_frame

if TYPE_CHECKING:
    from wetware.overlay.link import Stream

TEXT_CHARS_MAX: Final = 400
"""Of a refusal's message and hint, as a peer sends them."""


async def write_refusal(stream: Stream, exc: WetwareError) -> None:
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
