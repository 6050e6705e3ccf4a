"""CAR, version 1: the blocks of a tree in one file.

Source: https://ipld.io/specs/transport/car/carv1/
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from wetware.base.varint import uvarint
from wetware.errors import InvalidArgument
from wetware_blob.format.cid import BLOCK_BYTES_MAX, BadBlock, Block, Cid
from wetware_blob.format.dagpb import varint

SECTION_BYTES_MAX: Final = BLOCK_BYTES_MAX + 64
"""A CID and its block."""
_ROOTS: Final = b"\xa2\x65roots\x81\xd8\x2a\x58"  # {"roots": [CID], "version": 1} in DAG-CBOR
_VERSION: Final = b"\x67version\x01"
_HEADER_BYTES_MAX: Final = 64 << 10  # about 1,500 roots: that it has more than one is said
_HINT: Final = "write it as CAR v1 with one root of UnixFS, e.g. `ipfs dag export CID`"


def header(root: Cid) -> bytes:
    """What a file begins with."""
    data = _header(root)
    return uvarint(len(data)) + data


def section(block: Block) -> bytes:
    """A block in a file."""
    cid = bytes(block.cid)
    return uvarint(len(cid) + len(block.data)) + cid + block.data


def _header(root: Cid) -> bytes:
    cid = b"\0" + bytes(root)
    return _ROOTS + bytes((len(cid),)) + cid + _VERSION


def _root(data: bytes) -> Cid:
    """The inverse of `_header`."""
    with suppress(InvalidArgument):
        root = Cid.decode(data[len(_ROOTS) + 2 : -len(_VERSION)])
        if data == _header(root):
            return root
    raise BadBlock("not a CAR of version 1 with one root of UnixFS", hint=_HINT)


class Reader:
    """Takes a file in pieces of any length.

    Attributes:
        root: Of the file, once its header has come; None before.
    """

    def __init__(self) -> None:
        self.root: Cid | None = None
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
            if self.root is None:
                self.root = _root(section)
            else:
                blocks.append(_block(section))
        del self._buffer[:at]
        return blocks

    def close(self) -> Cid:
        """There is nothing more; returns the root. Raises BadBlock for a file that is cut short."""
        if self._buffer or self.root is None:
            raise BadBlock("a CAR that is cut short", hint="fetch or copy the file again")
        return self.root

    def _part(self, at: int) -> tuple[int, int] | None:
        """Where the part at `at` begins and ends, if all of it is here."""
        head = bytes(self._buffer[at : at + 10])
        if len(head) < 10 and all(byte & 0x80 for byte in head):
            return None
        try:
            length, used = varint(head, 0)
        except ValueError as exc:
            raise BadBlock(f"not a CAR: {exc}", hint=_HINT) from None
        bytes_max = _HEADER_BYTES_MAX if self.root is None else SECTION_BYTES_MAX
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
