"""The framing of a connection's bytes: Cap'n Proto's messages, and frames of bytes between them."""

from __future__ import annotations

import struct
from typing import Any, Final

_SEGMENTS_MAX: Final = 512
"""As in Cap'n Proto's own reader."""

# Discriminants of `Message` in rpc.capnp (capnproto.org, rpc.capnp).
CALL, RETURN, FINISH, BOOTSTRAP = 2, 3, 4, 8
_COUNTED: Final = frozenset({CALL, RETURN, FINISH, BOOTSTRAP})

# Segment count - 1, words of segment 0, root pointer, discriminant, pointer to the union's struct,
# and that struct's first field: the question or answer ID. This is how every known encoder lays it
# out.
_HEAD: Final = struct.Struct("<IIQHxxxxxxQI")
_SEGMENT_HEAD: Final = struct.Struct("<QHxxxxxxQI")
_ROOT: Final = 0x0001_0001_0000_0000  # a struct right behind the pointer: 1 word of data, 1 pointer
_U32: Final = struct.Struct("<I")
_U16: Final = struct.Struct("<H")
_U64: Final = struct.Struct("<Q")
_U32_MAX: Final = 0xFFFF_FFFF
_unpack_head = _HEAD.unpack_from
_HEAD_BYTES: Final = _HEAD.size
_HEAD_WORDS: Final = (_HEAD_BYTES - 8 + 7) // 8

# Where a message has its segment count - 1, a frame has one of these; then bytes and channel. The
# bytes of a DATA frame follow, none is the end; GRANT lets the other end send so many more, or, of
# none, a file in their place. Behind FILE is how many bytes it has: its descriptor came before.
DATA, GRANT, FILE = 0xFFFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFD
FRAME: Final = struct.Struct("<IIQ")
LENGTH: Final = struct.Struct("<Q")


class FramingError(ConnectionError):
    """The peer broke the framing or a limit that a well-behaved peer keeps."""


def message_bytes(data: Any, at: int) -> int:
    """The length of the message at `at`, framing included; 0 while its head is incomplete."""
    if len(data) - at < 8:
        return 0
    count, words = _U32.unpack_from(data, at)[0] + 1, _U32.unpack_from(data, at + 4)[0]
    if count == 1:
        return 8 + 8 * int(words)
    if count > FILE:
        return 0  # the head of a frame, and not all of it
    if count > _SEGMENTS_MAX:
        raise FramingError(f"a message of {count} segments: more than {_SEGMENTS_MAX}")
    table = _table_bytes(count)
    if len(data) - at < table:
        return 0
    return table + 8 * sum(struct.unpack_from(f"<{count}I", data, at + 4))


def message_head(data: Any, at: int, end: int) -> tuple[int, int, int]:
    """(bytes, discriminant, ID) of the message at `at`; bytes is 0 while its head is incomplete.

    The discriminant is -1 if the message is not all there yet and its kind cannot be told.
    """
    if end - at >= _HEAD_BYTES:
        segments, words, root, kind, body, ident = _unpack_head(data, at)
        usual = segments == 0 and root == _ROOT and words >= _HEAD_WORDS
        if usual and body > _U32_MAX and not body & _U32_MAX:
            return 8 * words + 8, kind, ident
    if end - at >= FRAME.size:
        mark, count, channel = FRAME.unpack_from(data, at)
        if mark >= FILE:
            return FRAME.size + (0 if mark == GRANT else count), mark, channel
    size = message_bytes(data, at)
    if size == 0 or at + size > end:
        return size, -1, 0
    return size, *message_kind(data, at, size)


def _table_bytes(segments: int) -> int:
    return (4 + 4 * segments + 7) & ~7


def segment_kind(segment: bytes) -> tuple[int, int]:
    """(discriminant, question or answer ID) of the message whose first segment pycapnp wrote."""
    if len(segment) < _SEGMENT_HEAD.size:
        return -1, 0
    _, kind, _, ident = _SEGMENT_HEAD.unpack_from(segment)
    return kind, ident


def message_kind(data: Any, at: int, size: int) -> tuple[int, int]:
    """(discriminant, question or answer ID) of a whole message; ID 0 for kinds without one."""
    count = _U32.unpack_from(data, at)[0] + 1
    start = at + _table_bytes(count)
    end = min(start + 8 * _U32.unpack_from(data, at + 4)[0], at + size)  # of segment 0
    message = _struct_at(data, start, start, end)
    if message is None:
        return 0, 0
    where, words = message
    kind = _U16.unpack_from(data, where)[0] if words else 0
    if kind not in _COUNTED:
        return kind, 0
    body = _struct_at(data, where + 8 * words, start, end)
    if body is None:
        return kind, 0
    return kind, _U32.unpack_from(data, body[0])[0] if body[1] else 0


def _struct_at(data: Any, pointer_at: int, start: int, end: int) -> tuple[int, int] | None:
    """(offset, words of data) of the struct that the pointer leads to; None for a null pointer."""
    if pointer_at + 8 > end:
        raise FramingError("a message without a root")
    pointer = _U64.unpack_from(data, pointer_at)[0]
    if pointer == 0:
        return None
    if pointer & 3:
        raise FramingError("the head of a message is not in its first segment")
    offset = (pointer & 0xFFFF_FFFF) >> 2
    offset -= (offset & (1 << 29)) << 1  # 30 bits, signed
    words = pointer >> 32 & 0xFFFF
    where = pointer_at + 8 + 8 * offset
    if where < start or where + 8 * (words + (pointer >> 48)) > end:
        raise FramingError("a pointer leaves its message")
    return where, words
