"""Texts that people pass on: one value has one text, and any change of it is noticed."""

from __future__ import annotations

import string

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.broker.sturdy import SturdyRef
from wetware.errors import InvalidArgument
from wetware.identity import Key, from_hex

PEER = Key.from_seed(bytes(32)).peer_id
ADDR = Multiaddr.parse("/ip4/192.0.2.1/tcp/4001")
REFS = [
    SturdyRef(PEER, (ADDR.with_peer(PEER),) * count, "00112233445566ff", bytes(range(32)))
    for count in range(3)  # so that one, two and no characters are left over at the end
]


@pytest.mark.parametrize("ref", REFS)
def test_a_changed_character_is_noticed_wherever_it_is(ref: SturdyRef) -> None:
    text = ref.text
    assert SturdyRef.parse(f" {text}\n") == ref
    for at in range(len(text)):
        last = at == len(text) - 1
        for char in string.ascii_letters + string.digits + "-_+/=" if last else "-A=\xe9":
            if char != text[at]:
                with pytest.raises(InvalidArgument):
                    SturdyRef.parse(text[:at] + char + text[at + 1 :])


@pytest.mark.parametrize("ref", REFS)
def test_what_a_decoder_of_base64_passes_over_is_refused(ref: SturdyRef) -> None:
    text = ref.text
    for other in (text + "=", text + "==", text.replace("-", "+"), text.replace("_", "/")):
        if other != text:
            with pytest.raises(InvalidArgument, match="characters that do not belong there"):
                SturdyRef.parse(other)


def test_hex_has_one_form() -> None:
    assert from_hex("00ff") == b"\x00\xff"
    for text in ("00FF", "00 ff", " 00ff", "0xff", "00f", "٠٠"):
        with pytest.raises(ValueError, match="hex"):
            from_hex(text)
