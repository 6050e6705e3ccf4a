"""dag-pb: a block of bytes and links, in a strict codec.

A decoder of protobuf takes many encodings of one value, and this one takes what the specification
calls canonical: no unknown field, none twice, none out of order, no overlong varint. Of links and
data either may come first, as old blocks have it the other way round; what is encoded here has the
links first. Links need no order in a block that is read.
Source: https://ipld.io/specs/codecs/dag-pb/spec/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wetware.base.varint import uvarint, uvarint_at
from wetware_blob.format.cid import BLOCK_BYTES_MAX, BadBlock, check_cid

# Tags: the number of a field, and how it is written (0: a varint, 2: a length and bytes).
_DATA, _LINK = 0x0A, 0x12
_HASH, _NAME, _TSIZE = 0x0A, 0x12, 0x18


@dataclass(frozen=True, slots=True)
class Link:
    """A link to a block.

    Attributes:
        cid: A CID in binary, of any hash and codec: `Cid.decode` takes those of this store.
        name: None where the block has none; what is encoded in UnixFS always has one, b"" as well.
        tsize: The bytes of all blocks below, each as often as it is linked to, as its parent
            claims. Nothing checks that: it is good for a progress bar.
    """

    cid: bytes
    name: bytes | None
    tsize: int | None


@dataclass(frozen=True, slots=True)
class Node:
    """What a block says."""

    links: tuple[Link, ...]
    data: bytes | None


def fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(tag, number, bytes) of each field of a protobuf message; raises ValueError.

    A varint is the number, and has no bytes. No other kind of field is in dag-pb or UnixFS.
    """
    at, size = 0, len(data)
    while at < size:
        tag, at = varint(data, at)
        number, at = varint(data, at)
        if tag & 7 == 0:
            yield tag, number, b""
        elif tag & 7 != 2:
            raise ValueError(f"a field of wire type {tag & 7}")
        elif number > size - at:
            raise ValueError("a field that is cut short")
        else:
            yield tag, number, data[at : at + number]
            at += number


def varint(data: bytes, at: int) -> tuple[int, int]:
    """As `uvarint_at`, in the shortest form alone."""
    if at < len(data) and (byte := data[at]) < 0x80:  # nearly all are
        return byte, at + 1
    value, end = uvarint_at(data, at)
    if data[end - 1] == 0:
        raise ValueError("a varint that is longer than it needs to be")
    return value, end


def field(tag: int, value: bytes) -> bytes:
    """A field of bytes."""
    return bytes((tag,)) + uvarint(len(value)) + value


def decode(block: bytes) -> Node:
    """What a dag-pb block says; raises BadBlock."""
    if len(block) > BLOCK_BYTES_MAX:
        raise BadBlock(f"a dag-pb block of {len(block)} bytes; at most {BLOCK_BYTES_MAX} are taken")
    try:
        return _decode(block)
    except ValueError as exc:
        raise BadBlock(f"not a dag-pb block: {exc}") from None


def _decode(block: bytes) -> Node:
    links: list[Link] = []
    data: bytes | None = None
    before_data = 0
    for tag, _, value in fields(block):
        if tag == _LINK:
            links.append(_link(value))
        elif tag == _DATA and data is None:
            data, before_data = value, len(links)
        else:
            raise ValueError(f"a field that is there twice or not known (tag {tag})")
    if data is not None and before_data not in (0, len(links)):
        raise ValueError("data between links")
    return Node(tuple(links), data)


def _link(message: bytes) -> Link:
    cid, name, tsize, last = b"", None, None, 0
    for tag, number, value in fields(message):
        if tag <= last:
            raise ValueError("a link with a field twice or out of order")
        last = tag
        if tag == _HASH:
            cid = value
        elif tag == _NAME:
            name = value
        elif tag == _TSIZE:
            tsize = number
        else:
            raise ValueError(f"a link with a field that is not known (tag {tag})")
    check_cid(cid)
    return Link(cid, name, tsize)


def encode(node: Node) -> bytes:
    """The block, with the links in the order in which they are: whoever makes one sorts them."""
    parts = []
    for link in node.links:
        message = field(_HASH, link.cid)
        if link.name is not None:
            message += field(_NAME, link.name)
        if link.tsize is not None:
            message += bytes((_TSIZE,)) + uvarint(link.tsize)
        parts.append(field(_LINK, message))
    if node.data is not None:
        parts.append(field(_DATA, node.data))
    return b"".join(parts)
