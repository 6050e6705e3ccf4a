"""Numbers as libp2p writes them: seven bits a byte, the lowest first."""

from __future__ import annotations


def uvarint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def uvarint_at(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends.

    ValueError: it is cut short, or has more than 64 bits.
    """
    number = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("a varint that is cut short")
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80 and number < 1 << 64:
            return number, at
    raise ValueError("a varint of more than 64 bits")
