"""A set of small numbers, a bit for each: a million blocks take 125 KB."""

from __future__ import annotations


class Bits:
    """A set of numbers from 0. One thread adds at a time; others may look meanwhile."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __contains__(self, number: int) -> bool:
        at = number >> 3
        return at < len(self._bytes) and bool(self._bytes[at] >> (number & 7) & 1)

    def add(self, number: int) -> bool:
        """Whether it was not there."""
        at = number >> 3
        if at >= len(self._bytes):
            self._bytes.extend(bytes(max(at + 1, len(self._bytes) * 2) - len(self._bytes)))
        new = not self._bytes[at] >> (number & 7) & 1
        self._bytes[at] |= 1 << (number & 7)
        return new

    def update(self, other: Bits) -> None:
        size = max(len(self._bytes), len(other._bytes))
        both = int.from_bytes(self._bytes, "little") | int.from_bytes(other._bytes, "little")
        self._bytes[:] = both.to_bytes(size, "little")
