"""The frame, byte by byte, and whatever bytes it is given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.errors import InvalidArgument
from wetware.identity import Principal
from wetware.rpc import packed
from wetware_pubsub import frames

ADA = Principal("local", "ada")
GOOD = frames.encode(ADA, 1.5, *packed.pack([b"one", b"", b"three"]))

TOLD = frames.encode(ADA, 1.5, *packed.pack([b"one", b"", b"three"]), "a.b")


def test_its_bytes_are_as_documented() -> None:
    head = b"\x01\x00" + (1_500_000).to_bytes(8, "little") + b"\x03\x00" + b"\x09\x00"
    lengths = b"\x03\0\0\0" + b"\0\0\0\0" + b"\x05\0\0\0"
    assert head + b"local:ada" + lengths + b"onethree" == GOOD
    about = b"\x01\x01" + GOOD[2:23] + b"\x03a.b" + lengths + b"onethree"
    assert frames.encode(ADA, 1.5, *packed.pack([b"one", b"", b"three"]), "a.b") == about == TOLD
    assert frames.encode(ADA, 0, b"hi", b"") == (
        b"\x01" + bytes(9) + b"\x01\0\x09\0" + b"local:ada" + b"\x02\0\0\0" + b"hi"
    )


@given(
    values=st.lists(st.binary(max_size=20), min_size=1, max_size=30),
    subject=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=40),
    time_us=st.integers(0, 1 << 52),
    about=st.just("") | st.from_regex(r"[a-z]{1,9}(\.[a-z]{0,9}){1,9}", fullmatch=True),
    before=st.binary(max_size=50),
)
def test_what_is_encoded_is_decoded(
    values: list[bytes], subject: str, time_us: int, about: str, before: bytes
) -> None:
    principal = Principal("evm", subject)
    frame = before + frames.encode(principal, time_us / 1e6, *packed.pack(values), about)
    found = frames.decode(frame, len(before))
    assert (found.principal, found.subject) == (principal, about)
    assert frames.subject_of(frame[len(before) :]) == about
    assert abs(round(found.time * 1e6) - time_us) <= 1
    assert packed.unpack(frame, found.lengths, found.at) == values


@given(st.data())
def test_any_bytes_are_a_frame_or_an_error(data: st.DataObject) -> None:
    frame = bytearray(data.draw(st.sampled_from([GOOD, TOLD])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame)))
        frame[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        found = frames.decode(bytes(frame))
    except (ValueError, InvalidArgument):
        return
    assert found.at + sum(found.lengths) == len(frame)
    assert 1 <= len(found.lengths) <= packed.VALUES_MAX


@pytest.mark.parametrize(
    "frame",
    {
        "empty": b"",
        "cut": GOOD[:-1],
        "longer": GOOD + b"x",
        "version": b"\x02" + GOOD[1:],
        "flags": b"\x01\x02" + GOOD[2:],
        "no subject": b"\x01\x01" + GOOD[2:],
        "a subject too many": b"\x01\0" + TOLD[2:],
        "an empty subject": TOLD[:23] + b"\0" + TOLD[27:],
        "a cut subject": TOLD[:25],
        "a pattern": TOLD.replace(b"a.b", b"a.>"),
        "a subject that is no name": TOLD.replace(b"a.b", b"a\n."),
        "a subject that is no ASCII": TOLD.replace(b"a.b", b"a.\xe4"),
        "no messages": GOOD[:10] + b"\0\0" + GOOD[12:],
        "too many messages": GOOD[:10] + b"\x01\x10" + GOOD[12:] + bytes(4 * 4096),
        "no principal": GOOD[:12] + b"\0\0" + GOOD[23:],
        "long principal": GOOD[:12] + b"\x01\x04" + b"l:" + b"a" * 1023 + GOOD[23:],
        "no name": GOOD[:14] + b"local_ada" + GOOD[23:],
        "no UTF-8": GOOD[:14] + b"local:\xffda" + GOOD[23:],
        "huge length": GOOD[:23] + b"\xff\xff\xff\xff" + GOOD[27:],
        "lengths moved": GOOD[:23] + b"\x04\0\0\0" + GOOD[27:],
    }.values(),
)
def test_what_lies_is_refused(frame: bytes) -> None:
    with pytest.raises((ValueError, InvalidArgument)):
        frames.decode(frame)


def test_a_principal_that_fits_no_frame_is_refused() -> None:
    with pytest.raises(InvalidArgument) as info:
        frames.encode(Principal("local", "a" * 1024), 0, b"", b"")
    assert info.value.code == "invalid.principal"
