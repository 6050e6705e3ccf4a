"""dag-pb: the good blocks come back as they were, the bad ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.base.varint import uvarint
from wetware_blob.format import dagpb, unixfs
from wetware_blob.format.cid import BLOCK_BYTES_MAX, DAG_PB, RAW, BadBlock, Cid
from wetware_blob.format.dagpb import Link, Node
from wetware_blob.format.read import children

from .trees import unhurried

VECTORS = Path(__file__).parents[5] / "shared" / "vectors" / "dag-pb"
vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason=f"the vectors are not at {VECTORS}")

A, B = Cid.of(RAW, b"a"), Cid.of(DAG_PB, b"")
HASH = dagpb.field(0x0A, bytes(A))
NAME = dagpb.field(0x12, b"a")
TSIZE = b"\x18\x01"
LINK = dagpb.field(0x12, HASH + NAME + TSIZE)
DATA = dagpb.field(0x0A, b"data")


@vectors
def test_good_blocks_come_back_as_they_were() -> None:
    paths = sorted(VECTORS.glob("*.dag-pb"))
    assert len(paths) == 17
    for path in paths:
        block = path.read_bytes()
        assert dagpb.encode(dagpb.decode(block)) == block, path
        assert str(Cid.of(DAG_PB, block)) == path.stem.rpartition("--")[2]


@vectors
def test_bad_blocks_are_refused() -> None:
    cases = json.loads((VECTORS / "negative-decode.json").read_text())
    assert len(cases) == 9
    for case in cases:
        with pytest.raises(BadBlock):
            dagpb.decode(bytes.fromhex(case["hex"]))


def test_what_a_block_says() -> None:
    assert dagpb.decode(LINK + LINK + DATA) == Node((Link(bytes(A), b"a", 1),) * 2, b"data")
    assert dagpb.decode(b"") == Node((), None)
    assert dagpb.decode(b"\x0a\0") == Node((), b"")


def test_an_old_block_with_the_data_first_is_read() -> None:
    assert dagpb.decode(DATA + LINK) == dagpb.decode(LINK + DATA)


@pytest.mark.parametrize(
    "block",
    [
        LINK + DATA + LINK,
        DATA + DATA,
        LINK + b"\x18\x01",  # an unknown field
        LINK + dagpb.field(0x1A, b""),
        b"\x08\x01",  # the number of Data, as a varint
        b"\x10\x01",
        b"\x0d" + bytes(4),  # fixed32
        b"\x0b\x0c",  # a group
        DATA[:-1],
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\x0a",
        b"\x8a\x00\x00",  # an overlong tag
        b"\x0a\x80\x00",  # an overlong length
        b"\x0a" + b"\xff" * 10,
        dagpb.field(0x12, b""),
        dagpb.field(0x12, NAME + HASH),
        dagpb.field(0x12, HASH + HASH),
        dagpb.field(0x12, HASH + NAME + NAME),
        dagpb.field(0x12, HASH + TSIZE + NAME),
        dagpb.field(0x12, HASH + TSIZE + TSIZE),
        dagpb.field(0x12, HASH + b"\x18\x81\x00"),
        dagpb.field(0x12, HASH + dagpb.field(0x1A, b"")),
        dagpb.field(0x12, HASH + b"\x20\x00"),
        dagpb.field(0x12, dagpb.field(0x0A, bytes(A)[:-1])),
        dagpb.field(0x12, dagpb.field(0x0A, bytes(A) + b"\0")),
        dagpb.field(0x12, dagpb.field(0x0A, b"\x12\x20")),
        dagpb.field(0x0A, bytes(BLOCK_BYTES_MAX)),
    ],
)
def test_what_is_not_canonical_is_refused(block: bytes) -> None:
    with pytest.raises(BadBlock):
        dagpb.decode(block)


links = st.builds(
    Link,
    st.binary(min_size=32, max_size=32).map(lambda digest: bytes(Cid(1, RAW, digest))),
    st.none() | st.binary(max_size=200),
    st.none() | st.integers(0, 2**64 - 1),
)


@unhurried
@given(st.builds(Node, st.lists(links, max_size=5).map(tuple), st.none() | st.binary()))
def test_a_node_comes_back_from_its_block(node: Node) -> None:
    assert dagpb.decode(dagpb.encode(node)) == node


@unhurried
@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: LINK + tail))
def test_what_is_decoded_is_encoded_to_the_same_bytes(block: bytes) -> None:
    try:
        node = dagpb.decode(block)
    except BadBlock:
        return
    links, data = dagpb.encode(Node(node.links, None)), dagpb.encode(Node((), node.data))
    assert block in (links + data, data + links)


numbers = st.none() | st.integers(0, 2**64 - 1)


@unhurried
@given(
    st.builds(
        unixfs.UnixFs,
        st.sampled_from(unixfs.Type),
        st.none() | st.binary(),
        numbers,
        st.lists(st.integers(0, 2**64 - 1), max_size=5).map(tuple),
        numbers,
        numbers,
    )
)
def test_unixfs_comes_back_from_its_bytes(value: unixfs.UnixFs) -> None:
    assert unixfs.decode(unixfs.encode(value)) == value


def test_the_children_of_a_block() -> None:
    block = dagpb.encode(Node(tuple(Link(bytes(c), b"", n) for n, c in enumerate((B, A, B))), None))
    assert children(Cid.of(DAG_PB, block), block) == [B, A]
    assert children(Cid.of(RAW, block), block) == []


@pytest.mark.parametrize("codec_and_hash", [b"\x01\x71\x12", b"\x01\x55\x1e"])
def test_a_link_out_of_unixfs_is_decoded_and_not_followed(codec_and_hash: bytes) -> None:
    block = dagpb.encode(Node((Link(codec_and_hash + b"\x20" + bytes(32), b"", 1),), None))
    assert dagpb.encode(dagpb.decode(block)) == block
    with pytest.raises(BadBlock, match="cannot be followed"):
        children(Cid.of(DAG_PB, block), block)


def test_a_large_number_of_links_is_read() -> None:
    count = BLOCK_BYTES_MAX // len(LINK)
    assert len(dagpb.decode(LINK * count).links) == count
    assert len(uvarint(count)) == 3
