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
_NO_ROOT: Final = b"\xa2\x65roots\x80" + _VERSION
_HEADER_BYTES_MAX: Final = 64 << 10  # about 1,500 roots: that it has more than one is said
_HINT: Final = "write it as CAR v1 with one root of UnixFS, e.g. `ipfs dag export CID`"


def header(root: Cid | None) -> bytes:
    """What a file begins with; None: its last block is the root."""
    data = _NO_ROOT if root is None else _header(root)
    return uvarint(len(data)) + data


def section(block: Block) -> bytes:
    """A block in a file."""
    cid = bytes(block.cid)
    return uvarint(len(cid) + len(block.data)) + cid + block.data


def _header(root: Cid) -> bytes:
    cid = b"\0" + bytes(root)
    return _ROOTS + bytes((len(cid),)) + cid + _VERSION


def _root(data: bytes) -> Cid | None:
    """The inverse of `header`, without the length."""
    if data == _NO_ROOT:
        return None
    with suppress(InvalidArgument):
        root = Cid.decode(data[len(_ROOTS) + 2 : -len(_VERSION)])
        if data == _header(root):
            return root
    raise BadBlock("not a CAR of version 1 with one root of UnixFS", hint=_HINT)


class Reader:
    """Takes a file in pieces of any length.

    Its root is what its header says or, where that says none, its last block: who writes a tree
    from its leaves up knows the root last.
    """

    def __init__(self) -> None:
        self._root: Cid | None = None
        self._begun = self._named = False
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[Block]:
        """The blocks that are complete now, checked; raises BadBlock.

        Hashes them, about 1 ms a MiB: run it in a thread.
        """
        self._buffer += data
        blocks: list[Block] = []
        at = 0
        while (part := self._part(at)) is not None:
            start, at = part
            with memoryview(self._buffer)[start:at] as section:
                if self._begun:
                    blocks.append(_block(section))
                else:
                    self._begun, self._root = True, _root(bytes(section))
                    self._named = self._root is not None
        del self._buffer[:at]
        if blocks and not self._named:
            self._root = blocks[-1].cid
        return blocks

    def close(self) -> Cid:
        """There is nothing more; returns the root. Raises BadBlock for a file that is cut short."""
        if self._buffer or self._root is None:
            raise BadBlock("a CAR that is cut short", hint="fetch or copy the file again")
        return self._root

    def _part(self, at: int) -> tuple[int, int] | None:
        """Where the part at `at` begins and ends, if all of it is here."""
        head = bytes(self._buffer[at : at + 10])
        if len(head) < 10 and all(byte & 0x80 for byte in head):
            return None
        try:
            length, used = varint(head, 0)
        except ValueError as exc:
            raise BadBlock(f"not a CAR: {exc}", hint=_HINT) from None
        bytes_max = SECTION_BYTES_MAX if self._begun else _HEADER_BYTES_MAX
        if length > bytes_max:
            raise BadBlock(f"a CAR with a part of {length} bytes; at most {bytes_max} are taken")
        start = at + used
        return (start, start + length) if start + length <= len(self._buffer) else None


def _block(section: memoryview) -> Block:
    size = 34 if bytes(section[:1]) == b"\x12" else 36
    try:
        block = Block(Cid.decode(bytes(section[:size])), bytes(section[size:]))
    except InvalidArgument as exc:
        raise BadBlock(f"a CAR with a block that is not UnixFS: {exc}", hint=_HINT) from None
    block.check()
    return block
