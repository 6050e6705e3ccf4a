"""Asking a peer to carry a connection to another one: `/wetware/relay/1.0.0`.

The dialler says whom it wants, one byte of length and the bytes of the peer ID, and hears one byte,
a `Verdict`. After `CARRIED` the stream is a pipe to that peer: noise runs end to end inside, and
the relay sees ciphertext, sizes and times. Without a peer (length 0) it asks for the opposite: that
strangers may be carried to it, for as long as the stream is open. See `wetware.overlay.relay`.

Source: circuit relay v2 of libp2p is the model, without its vouchers and limits in the answer.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Final

from wetware.errors import DialError, InvalidArgument, OverlayError
from wetware.identity import PeerId

if TYPE_CHECKING:
    from wetware.overlay.link.yamux import Connection, Stream

RELAY_PROTOCOL: Final = "/wetware/relay/1.0.0"
ANSWER_S_MAX: Final = 5.0
PEER_BYTES_MAX: Final = 64


class Verdict(enum.IntEnum):
    """What a relay answers."""

    CARRIED = 1
    NOT_CONNECTED = 2
    FULL = 3
    OFF = 4


_WHY: Final[dict[int, str]] = {
    Verdict.NOT_CONNECTED: "it has no connection to that peer that it would share",
    Verdict.FULL: "it carries as much as it may already",
    Verdict.OFF: "it does not relay",
}


async def ask_to_carry(relay: Connection, peer: PeerId | None) -> Stream:
    """The pipe to `peer`; without one, the stream that holds the reservation.

    Raises DialError where the relay does not carry, and what `Connection.open_stream` raises.
    """
    if relay.tunnelled:
        raise DialError("the relay itself is reached through another one")
    stream = await relay.open_stream(RELAY_PROTOCOL)
    try:
        raw = b"" if peer is None else peer.multihash
        await stream.write(bytes([len(raw)]) + raw)
        async with asyncio.timeout(ANSWER_S_MAX):
            answer = (await stream.read_exactly(1))[0]
    except BaseException as exc:
        stream.reset()
        if isinstance(exc, TimeoutError | EOFError):
            raise DialError(f"the relay {relay.peer} did not answer") from None
        raise
    if answer != Verdict.CARRIED:
        stream.reset()
        raise DialError(f"the relay {relay.peer} says: {_WHY.get(answer, 'no')}")
    return stream


async def read_target(stream: Stream) -> PeerId | None:
    """Whom a dialler wants; raises OverlayError, EOFError."""
    size = (await stream.read_exactly(1))[0]
    if size > PEER_BYTES_MAX:
        raise OverlayError("no peer ID is so long")
    raw = await stream.read_exactly(size)
    if not raw:
        return None
    try:
        return PeerId.from_multihash(raw)
    except (ValueError, InvalidArgument) as exc:
        raise OverlayError(f"not a peer ID: {exc}") from None
