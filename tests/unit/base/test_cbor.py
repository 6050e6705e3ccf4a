"""What is not plain CBOR is refused, whatever it would have been decoded to."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.base import cbor
from wetware.errors import InvalidArgument

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)


@given(PLAIN)
def test_plain_values_survive(value: object) -> None:
    try:
        decoded = cbor.decode(cbor.encode(value), bytes_max=1 << 20)
    except InvalidArgument as exc:
        assert "depth" in exc.message  # noqa: PT017
    else:
        assert decoded == value


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidArgument):
        cbor.decode(data, bytes_max=1 << 20)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "end of stream"),
        (b"\x01\x02", "after the end"),
        (b"\x9b" + b"\xff" * 8, "CBOR"),
        (b"\x5b\x7f" + b"\xff" * 7, "CBOR"),
        (b"\x81" * 100_000, "nest"),
        (b"\xd8\x1c\x81\xd8\x1d\x00", "CBOR"),  # a list that contains itself
        (b"\xd8\x23\x63(a+", "CBOR"),  # a regular expression
        (b"\xc0\x74" + b"2013-03-21T20:04:00Z", "CBOR"),
        (b"\xc2\x49\x01" + b"\x00" * 8, "CBOR"),  # a big integer
        (b"\xd9\xd9\xf7\x01", "CBOR"),
        (b"\xda\x00\x01\x00\x00\x01", "CBOR"),
        (b"\xa1\x01\x02", "key"),
        (b"\xa2\x61a\x01\x61a\x02", "[Dd]uplicate"),
        (b"\xbf\x61a\x01\xff", "CBOR"),  # indefinite length
        (b"\xf7", "kind"),  # undefined
    ],
)
def test_what_is_not_plain_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        cbor.decode(data, bytes_max=1 << 20)


def test_the_size_is_checked_first() -> None:
    with pytest.raises(InvalidArgument, match="at most 3"):
        cbor.decode(cbor.encode("long enough"), bytes_max=3)


def test_one_tag_of_a_number_is_taken_where_it_is_named() -> None:
    value = ["m", {"to": cbor.Tag(39, 5)}]
    assert cbor.decode(cbor.encode(value), bytes_max=100, tag=39) == value
    for bad in (cbor.Tag(39, b"x"), cbor.Tag(39, [1]), cbor.Tag(39, True), cbor.Tag(40, 5)):
        with pytest.raises(InvalidArgument):
            cbor.decode(cbor.encode([bad]), bytes_max=100, tag=39)
    with pytest.raises(InvalidArgument):
        cbor.decode(cbor.encode(value), bytes_max=100)


@given(PLAIN)
def test_items_are_counted_without_decoding(value: object) -> None:
    def count(value: object) -> int:
        if isinstance(value, dict):
            return 1 + sum(1 + count(each) for each in value.values())
        return 1 + (sum(map(count, value)) if isinstance(value, list) else 0)

    assert cbor.items(cbor.encode(value), 1000) == count(value)
    assert cbor.items(cbor.encode([value] * 10), 5) == 6


@given(st.binary(max_size=200))
def test_items_of_any_bytes_are_counted(data: bytes) -> None:
    assert cbor.items(data, 1000) <= len(data)
