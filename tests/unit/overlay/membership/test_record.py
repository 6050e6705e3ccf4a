from __future__ import annotations

from typing import Any

import pytest

from wetware.base import cbor
from wetware.errors import InvalidArgument
from wetware.identity import Key
from wetware.overlay.membership.record import (
    RECORD_BYTES_MAX,
    Forged,
    Malformed,
    Record,
    key_of,
    peer_of,
)

KEY = Key.from_seed(bytes(32))
BASE: dict[str, Any] = {"incarnation": 7, "instance": b"instance", "issued_ms": 1_800_000_000_000}
FULL: dict[str, Any] = BASE | {
    "revision": 3,
    "addrs": ("/ip4/10.0.0.1/tcp/4001",),
    "host": "büro.example",
    "name": "n1",
    "labels": {"zone": "home", "k8s.io/role": "x"},
    "version": "0.1.0",
    "services": ("pubsub", "blob"),
    "load": 0.5,
    "memory_bytes": 1 << 40,
    "chain": b"chain",
    "left": True,
}


def test_what_is_signed_is_what_is_opened() -> None:
    signed = Record.sign(KEY, **FULL)
    opened = Record.open(signed.encoded)
    assert opened == signed
    assert {name: getattr(opened, name) for name in FULL} == FULL
    assert opened.peer == KEY.peer_id
    assert opened.order == (7, 3)


def test_the_carried_bytes_are_kept() -> None:
    signed = Record.sign(KEY, **BASE)
    assert Record.open(signed.encoded).encoded == signed.encoded


def test_any_changed_byte_is_noticed() -> None:
    encoded = Record.sign(KEY, **FULL).encoded
    for at in range(len(encoded)):
        changed = bytearray(encoded)
        changed[at] ^= 1
        with pytest.raises(Malformed):
            Record.open(bytes(changed))


def test_a_record_has_one_encoding() -> None:
    envelope = cbor.decode(Record.sign(KEY, **BASE).encoded, bytes_max=RECORD_BYTES_MAX)
    turned = cbor.encode({"s": envelope["s"], "p": envelope["p"]})
    with pytest.raises(Malformed, match="encoding"):
        Record.parse(turned)


def test_somebody_elses_signature_is_a_forgery() -> None:
    other = Key.from_seed(b"\1" * 32)
    mine, theirs = (
        cbor.decode(Record.sign(k, **BASE).encoded, bytes_max=9999) for k in (KEY, other)
    )
    forged = cbor.encode({"p": mine["p"], "s": theirs["s"]})
    assert Record.parse(forged).peer == KEY.peer_id  # only the signature is wrong
    with pytest.raises(Forged):
        Record.open(forged)


def test_a_signature_without_the_domain_does_not_count() -> None:
    payload = cbor.decode(Record.sign(KEY, **BASE).encoded, bytes_max=9999)["p"]
    with pytest.raises(Forged):
        Record.open(cbor.encode({"p": payload, "s": KEY.sign(payload)}))


def test_later_versions_may_add_fields() -> None:
    def signed(**changes: Any) -> bytes:
        payload = cbor.decode(Record.sign(KEY, **BASE).encoded, bytes_max=9999)["p"]
        fields = cbor.decode(payload, bytes_max=9999) | changes
        data = cbor.encode(fields)
        return cbor.encode({"p": data, "s": KEY.sign(b"wetware membership record v1\0" + data)})

    assert Record.open(signed(zz="later")).incarnation == 7
    with pytest.raises(Malformed, match="version"):
        Record.open(signed(v=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"addrs": ["/x"] * 17},
        {"addrs": ["x" * 257]},
        {"addrs": [1]},
        {"host": "x" * 254},
        {"host": "a\x1b[31m"},
        {"name": "two\nlines"},
        {"labels": {f"k{n}": "" for n in range(33)}},
        {"labels": {"a b": ""}},
        {"labels": {"a": "\x07"}},
        {"labels": {"a": "x" * 129}},
        {"services": ["s"] * 65},
        {"load": float("nan")},
        {"load": -1.0},
        {"memory_bytes": -1},
        {"memory_bytes": True},
        {"instance": b"short"},
        {"incarnation": (1 << 62) + 1},
        {"incarnation": -1},
        {"revision": 1 << 32},
        {"issued_ms": 1 << 60},
        {"chain": bytes(4097)},
        {"left": 1},
    ],
)
def test_bounds_hold_for_the_signer_too(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Record.sign(KEY, **(BASE | changes))


def test_the_whole_is_bounded() -> None:
    labels = {f"label-{n}": "x" * 128 for n in range(32)}
    with pytest.raises(InvalidArgument, match="bytes"):
        Record.sign(KEY, **BASE, labels=labels, chain=bytes(4096))
    with pytest.raises(Malformed):
        Record.open(bytes(RECORD_BYTES_MAX + 1))


def test_keys_and_peers() -> None:
    assert peer_of(key_of(KEY.peer_id)) == KEY.peer_id
    hashed = type(KEY.peer_id).from_public_key_pb(b"\x08\x00\x12\x40" + bytes(64))
    with pytest.raises(Malformed):
        key_of(hashed)
