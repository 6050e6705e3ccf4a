"""The frame: messages that were published together, as they are signed, sent, kept and handed on.

    offset      bytes   what it is; all numbers little-endian
    0           1       version: 1
    1           1       flags: 1 if it has a subject, else 0
    2           8       time: when the node took it, Unix time in microseconds
    10          2       n: how many messages, 1 to 4096
    12          2       p: bytes of the principal, 1 to 1024
    14          p       the principal by whose grant they were published, in UTF-8
    14 + p      1 + s   with a subject: its bytes s, 1 to 255, and it, in ASCII
    …           4 n     the length of each message
    …                   the messages, end to end

The subject is the name that they were published to, where several share a topic of GossipSub
(names.py).

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
from wetware_pubsub.names import is_name

VERSION: Final = 1
FRAMED: Final = f"#{VERSION}"
"""What a topic ends with on the wire whose messages are frames; no name of a topic has it."""
PACK_BYTES: Final = 256 << 10
"""Bytes of messages that are packed into one frame; a longer message is alone in its own."""
PRINCIPAL_BYTES_MAX: Final = 1024
SUBJECT_BYTES_MAX: Final = 255

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
        subject: The name that they were published to; "" where no other name shares the topic.
    """

    principal: Principal
    time: float
    lengths: tuple[int, ...]
    at: int
    subject: str


def bytes_max(message_bytes_max: int) -> int:
    """How long a frame can be."""
    head = _HEAD.size + PRINCIPAL_BYTES_MAX + 1 + SUBJECT_BYTES_MAX + LENGTH_BYTES * VALUES_MAX
    return head + max(PACK_BYTES, message_bytes_max)


def encode(
    principal: Principal, time: float, data: bytes, lengths: bytes, subject: str = ""
) -> bytes:
    """The frame of packed messages; raises InvalidArgument for a principal that is too long."""
    who = str(principal).encode()
    if len(who) > PRINCIPAL_BYTES_MAX:
        raise InvalidArgument(f"a principal of {len(who)} bytes", code="invalid.principal")
    lengths = lengths or struct.pack("<I", len(data))
    count = len(lengths) // LENGTH_BYTES
    head = _HEAD.pack(VERSION, bool(subject), int(time * 1e6), count, len(who))
    about = bytes((len(subject),)) + subject.encode("ascii") if subject else b""
    return b"".join((head, who, about, lengths, data))


def decode(frame: bytes, start: int = 0) -> Frame:
    """What begins at `start` and goes to the end; raises ValueError or InvalidArgument."""
    if len(frame) < start + _HEAD.size:
        raise ValueError("a frame without a head")
    version, flags, time_us, count, size = _HEAD.unpack_from(frame, start)
    if version != VERSION or flags not in (0, 1):
        raise ValueError(f"a frame of version {version}, flags {flags}")
    if not 1 <= count <= VALUES_MAX or not 1 <= size <= PRINCIPAL_BYTES_MAX:
        raise ValueError(f"a frame of {count} messages, by a principal of {size} bytes")
    at = start + _HEAD.size
    principal = Principal.parse(frame[at : at + size].decode())
    at += size
    subject = ""
    if flags:
        subject = _subject(frame, at)
        at += 1 + len(subject)
    ends = at + count * LENGTH_BYTES
    lengths = lengths_of(len(frame) - ends, frame[at:ends])
    return Frame(principal, time_us / 1e6, lengths, ends, subject)


def subject_of(frame: bytes) -> str:
    """The subject of what `decode` takes."""
    _, flags, _, _, size = _HEAD.unpack_from(frame)
    return _subject(frame, _HEAD.size + size) if flags else ""


def _subject(frame: bytes, at: int) -> str:
    size = frame[at] if at < len(frame) else 0
    subject = frame[at + 1 : at + 1 + size].decode("ascii")
    if len(subject) != size or not is_name(subject):
        raise ValueError("a frame without the subject that it has")
    return subject


def signed(topic: str, unsigned: bytes) -> bytes:
    """What is signed of a message, beside the domain."""
    if topic.endswith(FRAMED):
        return _SIGNED_AS + hashlib.sha256(unsigned).digest()
    return unsigned
