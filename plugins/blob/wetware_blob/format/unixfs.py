"""UnixFS: what the data of a dag-pb block says, and how names are spread over a large directory.

Mode and time of modification are read and dropped: no CID here depends on them.
Source: https://specs.ipfs.tech/unixfs/
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import mmh3

from wetware.base.varint import uvarint
from wetware_blob.format.cid import BadBlock
from wetware_blob.format.dagpb import field, fields

# Tags: the number of a field, and how it is written.
_TYPE, _DATA, _SIZE, _SIZES, _HASH, _FANOUT = 0x08, 0x12, 0x18, 0x20, 0x28, 0x30
_MODE, _MTIME = 0x38, 0x42
MURMUR3: Final = 0x22
"""murmur3-x64-64, the one hash of names that is used."""
HASH_BITS: Final = 64
FANOUT_MAX: Final = 1024


class Type(IntEnum):
    """What a block is."""

    RAW = 0  # part of a file, as old versions wrote it
    DIRECTORY = 1
    FILE = 2
    SYMLINK = 4
    HAMT = 5  # a directory of several blocks


@dataclass(frozen=True, slots=True)
class UnixFs:
    """The data of a block; None where a field is not there.

    Attributes:
        type: What it is.
        data: Bytes of a file, the target of a symlink, or the bits of a HAMT.
        size: Of a file, in bytes: its data, and all below.
        sizes: Of what each link leads to, in bytes.
        hash: MURMUR3.
        fanout: Slots of a HAMT.
    """

    type: Type
    data: bytes | None = None
    size: int | None = None
    sizes: tuple[int, ...] = ()
    hash: int | None = None
    fanout: int | None = None


def encode(value: UnixFs) -> bytes:
    out = bytearray((_TYPE, value.type))
    if value.data is not None:
        out += field(_DATA, value.data)
    if value.size is not None:
        out += bytes((_SIZE,)) + uvarint(value.size)
    for size in value.sizes:
        out += bytes((_SIZES,)) + uvarint(size)
    if value.hash is not None:
        out += bytes((_HASH,)) + uvarint(value.hash)
    if value.fanout is not None:
        out += bytes((_FANOUT,)) + uvarint(value.fanout)
    return bytes(out)


def decode(message: bytes) -> UnixFs:
    """Of the data of a block; raises BadBlock."""
    try:
        return _decode(message)
    except ValueError as exc:
        raise BadBlock(f"not UnixFS: {exc}") from None


def _decode(message: bytes) -> UnixFs:
    found: dict[int, int] = {}
    data: bytes | None = None
    sizes = []
    last = 0
    for tag, number, value in fields(message):
        if tag < last or (tag == last and tag != _SIZES):
            raise ValueError("a field twice or out of order")
        last = tag
        if tag == _DATA:
            data = value
        elif tag == _SIZES:
            sizes.append(number)
        elif tag in (_TYPE, _SIZE, _HASH, _FANOUT, _MODE, _MTIME):
            found[tag] = number
        else:
            raise ValueError(f"a field that is not known (tag {tag})")
    kind = Type(found[_TYPE]) if _TYPE in found else None
    if kind is None:
        raise ValueError("no type")
    return UnixFs(kind, data, found.get(_SIZE), tuple(sizes), found.get(_HASH), found.get(_FANOUT))


# --- HAMT: a name's hash is its way down, a few bits a level, the highest first ---


def name_hash(name: bytes) -> int:
    """64 bits."""
    high: int = mmh3.hash64(name, x64arch=True, signed=False)[0]
    return high


def slot_bits(fanout: int) -> int:
    """The bits of a hash that one level takes."""
    return fanout.bit_length() - 1


def path_of(hashed: int, fanout: int, levels: int) -> int:
    """The first bits of a hash: the slots of that many levels, one number."""
    return hashed >> (HASH_BITS - slot_bits(fanout) * levels)


def slot_prefix(slot: int, fanout: int) -> bytes:
    """What the name of a link begins with, e.g. b"0A"."""
    return b"%0*X" % (len(f"{fanout - 1:X}"), slot)


def slot_of(prefix: bytes, fanout: int) -> int | None:
    """The inverse of `slot_prefix`; None for what it does not return."""
    try:
        slot = int(prefix, 16)
    except ValueError:
        return None
    return slot if 0 <= slot < fanout and slot_prefix(slot, fanout) == prefix else None
