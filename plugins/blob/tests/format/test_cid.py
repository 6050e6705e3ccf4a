"""CIDs: one text each, and nothing else is taken."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.errors import InvalidArgument
from wetware.identity.peer_id import base58_encode
from wetware_blob.format.cid import BLOCK_BYTES_MAX, DAG_PB, RAW, BadBlock, Block, Cid

from .trees import unhurried

HELLO = "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"  # ipfs/kubo
EMPTY_V0, EMPTY_V1 = (
    "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n",
    "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",
)  # of the dag-pb specification

cids = st.builds(
    lambda codec, version, digest: Cid(version if codec == DAG_PB else 1, codec, digest),
    st.sampled_from((RAW, DAG_PB)),
    st.sampled_from((0, 1)),
    st.binary(min_size=32, max_size=32),
)


def test_known_cids() -> None:
    assert str(Cid.of(RAW, b"hello world")) == HELLO
    assert str(Cid.of(DAG_PB, b"", version=0)) == EMPTY_V0
    assert str(Cid.of(DAG_PB, b"")) == EMPTY_V1
    assert Cid.parse(EMPTY_V0).digest == Cid.parse(EMPTY_V1).digest == hashlib.sha256().digest()


@unhurried
@given(cids)
def test_a_cid_comes_back_from_its_text_and_its_bytes(cid: Cid) -> None:
    assert Cid.parse(str(cid)) == cid
    assert Cid.decode(bytes(cid)) == cid


def _base32(data: bytes) -> str:
    return "b" + base64.b32encode(data).decode().rstrip("=").lower()


DIGEST = bytes(range(32))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither"),
        ("b", "cut short"),
        ("Qm", "cut short|version"),
        (HELLO.upper(), "neither"),
        ("B" + HELLO[1:].upper(), "neither"),
        ("b" + HELLO[1:].upper(), "is written"),
        (HELLO + "=", "padding|is written"),
        (HELLO[:-1] + "f", "is written"),  # bits after the end
        (HELLO + " ", "padding|alphabet|base32|Non-base32"),
        ("\N{LATIN SMALL LETTER LONG S}" + HELLO[1:], "neither"),
        ("z" + base58_encode(bytes(Cid(1, RAW, DIGEST))), "neither"),
        (EMPTY_V0 + "1", "version"),
        (_base32(b"\x12\x20" + DIGEST), "is written"),  # v0 in base32
        (_base32(b"\x01\x71\x12\x20" + DIGEST), "neither raw nor dag-pb"),
        (_base32(b"\x01\x55\x1e\x20" + DIGEST), "not sha2-256"),  # blake3
        (_base32(b"\x01\x55\x00\x05hello"), "not sha2-256"),  # identity
        (_base32(b"\x01\x55\x12\x14" + DIGEST[:20]), "not sha2-256"),
        (_base32(b"\x01\x55\x12\x20" + DIGEST[:31]), "cut short"),
        (_base32(b"\x01\x55\x12\x20" + DIGEST + b"\0"), "bytes after it"),
        (_base32(b"\x81\x00\x55\x12\x20" + DIGEST), "neither raw nor dag-pb"),
        (_base32(b"\x02\x55\x12\x20" + DIGEST), "version 2"),
        ("Qm" + "1" * 127, "longer than 128"),
        ("b" + "a" * 128, "longer than 128"),
        ("Qm\0", "not a base58"),
        ("bä", "ASCII"),
    ],
)
def test_anything_else_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as refused:
        Cid.parse(text)
    assert refused.value.code == "invalid.cid"
    assert refused.value.hint


def test_a_block_is_checked() -> None:
    Block(Cid.of(RAW, b"x"), b"x").check()
    with pytest.raises(BadBlock, match="another hash"):
        Block(Cid.of(RAW, b"x"), b"y").check()
    large = bytes(BLOCK_BYTES_MAX + 1)
    with pytest.raises(BadBlock, match="at most"):
        Block(Cid.of(RAW, large), large).check()
