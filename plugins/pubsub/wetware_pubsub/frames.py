"""The frame: messages that were published together, as they are signed, sent, kept and handed on.

    offset      bytes   what it is; all numbers little-endian
    0           1       version: 1
    1           1       flags: 0
    2           8       time: when the node took it, Unix time in microseconds
    10          2       n: how many messages, 1 to 4096
    12          2       p: bytes of the principal, 1 to 1024
    14          p       the principal by whose grant they were published, in UTF-8
    14 + p      4 n     the length of each message
    14 + p + 4n         the messages, end to end

The first message has the sequence number of the GossipSub message that carries the frame (order.py:
its epoch and counter), the next ones those that follow. A frame does not pass the end of an epoch.
The signature covers the SHA-256 of that message, where GossipSub's covers the message itself:
hashing is what costs when much is sent.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from wetware.errors import InvalidArgument
from wetware.identity import Principal
from wetware.rpc.packed import LENGTH_BYTES, VALUES_MAX, lengths_of

VERSION: Final = 1
FRAMED: Final = f"#{VERSION}"
"""What a topic ends with on the wire whose messages are frames; no name of a topic has it."""
PACK_BYTES: Final = 256 << 10
"""Bytes of messages that are packed into one frame; a longer message is alone in its own."""
PRINCIPAL_BYTES_MAX: Final = 1024

_HEAD = struct.Struct("<BBQHH")
_SIGNED_AS: Final = b"wetware frame 1:"
"""No GossipSub message begins so: what is signed as the one is never the other."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a frame says of its messages.

    Attributes:
        principal: By whose grant they were published, as the node says that signed them.
        time: When that node took them, Unix time in seconds.
        lengths: How long each message is.
        at: Where the first one begins.
    """

    principal: Principal
    time: float
    lengths: tuple[int, ...]
    at: int


def bytes_max(message_bytes_max: int) -> int:
    """How long a frame can be."""
    head = _HEAD.size + PRINCIPAL_BYTES_MAX + LENGTH_BYTES * VALUES_MAX
    return head + max(PACK_BYTES, message_bytes_max)


def encode(principal: Principal, time: float, data: bytes, lengths: bytes) -> bytes:
    """The frame of packed messages; raises InvalidArgument for a principal that is too long."""
    who = str(principal).encode()
    if len(who) > PRINCIPAL_BYTES_MAX:
        raise InvalidArgument(f"a principal of {len(who)} bytes", code="invalid.principal")
    lengths = lengths or struct.pack("<I", len(data))
    count = len(lengths) // LENGTH_BYTES
    head = _HEAD.pack(VERSION, 0, int(time * 1e6), count, len(who))
    return b"".join((head, who, lengths, data))


def decode(frame: bytes, start: int = 0) -> Frame:
    """What begins at `start` and goes to the end; raises ValueError or InvalidArgument."""
    if len(frame) < start + _HEAD.size:
        raise ValueError("a frame without a head")
    version, flags, time_us, count, size = _HEAD.unpack_from(frame, start)
    if version != VERSION or flags:
        raise ValueError(f"a frame of version {version}, flags {flags}")
    if not 1 <= count <= VALUES_MAX or not 1 <= size <= PRINCIPAL_BYTES_MAX:
        raise ValueError(f"a frame of {count} messages, by a principal of {size} bytes")
    at = start + _HEAD.size
    ends = at + size + count * LENGTH_BYTES
    principal = Principal.parse(frame[at : at + size].decode())
    lengths = lengths_of(len(frame) - ends, frame[at + size : ends])
    return Frame(principal, time_us / 1e6, lengths, ends)


def signed(topic: str, unsigned: bytes) -> bytes:
    """What is signed of a message, beside the domain."""
    if topic.endswith(FRAMED):
        return _SIGNED_AS + hashlib.sha256(unsigned).digest()
    return unsigned
