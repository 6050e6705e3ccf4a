"""What both ends of an admission protocol need: exchanges with a bound, and how they are refused.

`/wetware/certificate/1.0.0`, opened by who dialled, and by either side after a renewal:

    → {v, chain}    ← {v, chain} or {code, message, hint}    → {ack} or {code, message, hint}

Only after the ack is a peer "up" for who was dialled, so that neither side opens streams for
members before the other lets them in.

`/wetware/join/1.0.0`, served by issuers and, for `chain`, by every member:

    → {v, secret}, {v, chain} or {v, renew}
    ← {founding, chain, document, addrs}, {chain} for renew, or {code, message, hint}
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import (
    AdmissionRefused,
    InvalidArgument,
    OverlayError,
    ProtocolRefused,
    WetwareError,
    from_wire,
)
from wetware.overlay.admission.statements import CHAIN_BYTES_MAX, FACT_BYTES_MAX, refusal
from wetware.overlay.admission.store import DOCUMENT_BYTES_MAX
from wetware.overlay.frames import read_frame, write_frame

if TYPE_CHECKING:
    from wetware.overlay.link import Connection, Stream

CERTIFICATE_PROTOCOL: Final = "/wetware/certificate/1.0.0"
JOIN_PROTOCOL: Final = "/wetware/join/1.0.0"
FRAME_BYTES_MAX: Final = CHAIN_BYTES_MAX + 2048
"""Of what is asked: a chain."""
ANSWER_BYTES_MAX: Final = FACT_BYTES_MAX + 2048
"""Of everything but the answer to a join: a refusal may bring the tombstone that it rests on."""
JOIN_FRAME_BYTES_MAX: Final = DOCUMENT_BYTES_MAX + 32_768
"""Of the answer to a join: the backend's document, a chain and addresses."""
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


@contextlib.asynccontextmanager
async def exchange(
    connection: Connection, protocol: str, *, timeout_s: float
) -> AsyncIterator[Stream]:
    """A stream for one exchange. What goes wrong in it is an AdmissionRefused or OverlayError."""
    peer = connection.peer
    try:
        async with asyncio.timeout(timeout_s), await connection.open_stream(protocol) as stream:
            yield stream
    except ProtocolRefused:
        raise refusal("not_ours", f"{peer} speaks no protocol of this cluster") from None
    except TimeoutError:
        raise OverlayError(
            f"{peer} did not answer within {timeout_s:g} s", code="overlay.timeout"
        ) from None
    except EOFError:
        raise OverlayError(f"{peer} ended the exchange early") from None
    except InvalidArgument as exc:
        raise refusal("malformed", f"{peer} sent {exc.message}") from None


async def ask_to_join(
    connection: Connection, message: dict[str, Any], *, bytes_max: int, timeout_s: float
) -> dict[str, Any]:
    """Ask on the join protocol; raises AdmissionRefused as the peer said it, or OverlayError."""
    async with exchange(connection, JOIN_PROTOCOL, timeout_s=timeout_s) as stream:
        await write_frame(stream, {"v": 1, **message})
        answer = await read_frame(stream, bytes_max=bytes_max)
        raise_refusal(answer)
        return answer
