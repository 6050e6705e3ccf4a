"""CAR v1: what is written is read, however it is cut; anything else is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.base.varint import uvarint
from wetware_blob.format.build import Profile
from wetware_blob.format.car import _HEADER_BYTES_MAX, Reader, header, section
from wetware_blob.format.cid import BLOCK_BYTES_MAX, DAG_PB, RAW, BadBlock, Block, Cid
from wetware_blob.format.read import walk

from .trees import TINY, Blocks, collected, run, unhurried

CID = Cid.of(RAW, b"x")
SMALL = header(CID) + section(Block(CID, b"x"))


def taken(data: bytes, size: int = 1 << 20) -> tuple[Cid, list[Block]]:
    """What a reader makes of a file that comes in pieces of `size` bytes."""
    reader, blocks = Reader(), []
    for at in range(0, len(data), size):
        blocks += reader.feed(data[at : at + size])
    return reader.close(), blocks


@unhurried
@given(st.binary(max_size=300), st.sampled_from(TINY), st.integers(1, 100))
def test_a_tree_comes_back_from_its_file(content: bytes, profile: Profile, size: int) -> None:
    blocks = Blocks()
    root = blocks.file(content, profile).cid
    found = run(collected(walk(root, blocks.get)))
    data = header(root) + b"".join(section(block) for block in found)
    found_root, again = taken(data, size)
    assert found_root == root
    assert again == found
    assert {block.cid for block in again} == set(blocks.data)


def test_without_a_root_the_last_block_is_the_root() -> None:
    blocks = [Block(Cid.of(RAW, data), data) for data in (b"x", b"y")]
    data = header(None) + b"".join(map(section, blocks))
    for size in (1, 60, 1000):
        assert taken(data, size) == (blocks[1].cid, blocks)
    for cut in (header(None), data[:-1], b""):
        with pytest.raises(BadBlock, match="cut short"):
            taken(cut)


def test_the_header_is_dag_cbor() -> None:
    """The example of the specification has another root; its bytes are laid out like this."""
    v1 = header(CID)
    assert v1[0] == 0x3A == len(v1) - 1  # as all files with one root of version 1
    assert v1[1:13] == b"\xa2\x65roots\x81\xd8\x2a\x58\x25"
    assert v1[13:50] == b"\0" + bytes(CID)
    assert v1[50:] == b"\x67version\x01"
    assert len(header(Cid.of(DAG_PB, b"", version=0))) == 1 + 0x38


@pytest.mark.parametrize("count", [2, 23, 24, 255, 256, 1500])
def test_any_other_number_of_roots_is_refused(count: int) -> None:
    head = {24: b"\x98\x18", 255: b"\x98\xff", 256: b"\x99\x01\0", 1500: b"\x99\x05\xdc"}
    link = header(CID)[9:50]
    roots = head.get(count, bytes((0x80 + count % 128,))) + link * count
    data = b"\xa2\x65roots" + roots + b"\x67version\x01"
    with pytest.raises(BadBlock, match="one root"):
        taken(uvarint(len(data)) + data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cut short"),
        (SMALL[:1], "cut short"),
        (SMALL[:-1], "cut short"),
        (SMALL + b"\x80", "cut short"),
        (b"\x0a\xa1\x67version\x02", "version 1"),
        (b"\x0a\xa1\x67version\x01", "not a CAR of version 1"),
        (b"\x01\xa2", "not a CAR"),
        (b"\0", "not a CAR"),
        (header(CID).replace(b"version\x01", b"version\x02"), "not a CAR of version 1"),
        (header(CID).replace(b"\x81", b"\x82", 1), "not a CAR of version 1"),
        (header(CID).replace(b"\x81", b"\x98\x01", 1).replace(b"\x3a", b"\x3b", 1), "version 1"),
        (header(CID).replace(b"\x01\x55\x12", b"\x01\x71\x12"), "one root of UnixFS"),
        (uvarint(_HEADER_BYTES_MAX + 1), "at most"),
        (b"\xff" * 10, "not a CAR"),
        (b"\xba\x00" + SMALL[1:], "not a CAR"),
        (SMALL[:-1] + b"y", "another hash"),
        (header(CID) + b"\0", "not UnixFS"),
        (header(CID) + uvarint(41) + b"\x01\x71\x12\x20" + bytes(37), "not UnixFS"),
        (header(CID) + uvarint(9) + b"\x01\x55\x00\x05hello", "not UnixFS"),
        (header(CID) + uvarint(BLOCK_BYTES_MAX + 65), "at most"),
        (SMALL + SMALL, "not UnixFS"),
    ],
)
def test_anything_else_is_refused(data: bytes, why: str) -> None:
    for size in (1, 7, 1 << 20):
        with pytest.raises(BadBlock, match=why):
            taken(data, size)


def test_a_block_that_is_too_large_is_refused() -> None:
    large = Block(Cid.of(RAW, bytes(BLOCK_BYTES_MAX + 1)), bytes(BLOCK_BYTES_MAX + 1))
    with pytest.raises(BadBlock, match="at most"):
        taken(header(large.cid) + section(large))


def test_what_is_not_complete_is_all_that_is_kept() -> None:
    reader = Reader()
    data = random.Random(0).randbytes(1 << 16)
    block = Block(Cid.of(RAW, data), data)
    reader.feed(header(block.cid))
    for _ in range(100):
        assert reader.feed(section(block)) == [block]
        assert not reader._buffer
