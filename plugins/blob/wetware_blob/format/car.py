"""CAR, version 1: the blocks of a tree in one file.

Source: https://ipld.io/specs/transport/car/carv1/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from wetware.base.varint import uvarint
from wetware.errors import InvalidArgument
from wetware_blob.format.cid import BLOCK_BYTES_MAX, BadBlock, Block, Cid
from wetware_blob.format.dagpb import varint

HEADER_BYTES_MAX: Final = 64 << 10
"""About 1,500 roots."""
SECTION_BYTES_MAX: Final = BLOCK_BYTES_MAX + 64
"""A CID and its block."""
_VERSION: Final = b"\x67version"
_HINT: Final = "write it as CAR v1 of UnixFS, e.g. `ipfs dag export CID`"


def header(roots: Sequence[Cid]) -> bytes:
    """What a file begins with."""
    data = _dag_cbor(roots)
    return uvarint(len(data)) + data


def section(block: Block) -> bytes:
    """A block in a file."""
    cid = bytes(block.cid)
    return uvarint(len(cid) + len(block.data)) + cid + block.data


def _dag_cbor(roots: Sequence[Cid]) -> bytes:
    """{"roots": [CID, …], "version": 1}, in the one way in which DAG-CBOR has it."""
    count = len(roots)
    head = bytes((0x80 + count,)) if count < 24 else b"\x99" + count.to_bytes(2, "big")
    if 24 <= count < 256:
        head = bytes((0x98, count))
    links = (b"\xd8\x2a\x58" + bytes((len(bytes(cid)) + 1, 0)) + bytes(cid) for cid in roots)
    return b"\xa2\x65roots" + head + b"".join(links) + _VERSION + b"\x01"


def _roots(data: bytes) -> tuple[Cid, ...]:
    """The inverse of `_dag_cbor`."""
    if data == b"\xa1" + _VERSION + b"\x02":
        raise BadBlock("a CAR of version 2", hint=_HINT)
    at = 7 + {0x98: 2, 0x99: 3}.get(data[7] if len(data) > 7 else 0, 1)
    roots = []
    try:
        while data[at : at + 3] == b"\xd8\x2a\x58":
            length = data[at + 3]
            roots.append(Cid.decode(data[at + 5 : at + 4 + length]))
            at += 4 + length
    except InvalidArgument as exc:
        raise BadBlock(f"a CAR with a root that is not UnixFS: {exc}", hint=_HINT) from None
    if data != _dag_cbor(roots):
        raise BadBlock("not a CAR of version 1", hint=_HINT)
    return tuple(roots)


class Reader:
    """Takes a file in pieces of any length.

    Attributes:
        roots: Of the file, once its header has come; None before.
    """

    def __init__(self) -> None:
        self.roots: tuple[Cid, ...] | None = None
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Block]:
        """The blocks that are complete now, checked; raises BadBlock.

        Hashes them, about 1 ms a MiB: run it in a thread.
        """
        self._buffer += data
        blocks: list[Block] = []
        at = 0
        while (part := self._part(at)) is not None:
            start, at = part
            section = bytes(memoryview(self._buffer)[start:at])
            if self.roots is None:
                self.roots = _roots(section)
            else:
                blocks.append(_block(section))
        del self._buffer[:at]
        return blocks

    def close(self) -> None:
        """There is nothing more; raises BadBlock for a file that is cut short."""
        if self._buffer or self.roots is None:
            raise BadBlock("a CAR that is cut short", hint="fetch or copy the file again")

    def _part(self, at: int) -> tuple[int, int] | None:
        """Where the part at `at` begins and ends, if all of it is here."""
        head = bytes(self._buffer[at : at + 10])
        if len(head) < 10 and all(byte & 0x80 for byte in head):
            return None
        try:
            length, used = varint(head, 0)
        except ValueError as exc:
            raise BadBlock(f"not a CAR: {exc}", hint=_HINT) from None
        bytes_max = HEADER_BYTES_MAX if self.roots is None else SECTION_BYTES_MAX
        if length > bytes_max:
            raise BadBlock(f"a CAR with a part of {length} bytes; at most {bytes_max} are taken")
        start = at + used
        return (start, start + length) if start + length <= len(self._buffer) else None


def _block(section: bytes) -> Block:
    size = 34 if section[:1] == b"\x12" else 36
    try:
        block = Block(Cid.decode(section[:size]), section[size:])
    except InvalidArgument as exc:
        raise BadBlock(f"a CAR with a block that is not UnixFS: {exc}", hint=_HINT) from None
    block.check()
    return block
