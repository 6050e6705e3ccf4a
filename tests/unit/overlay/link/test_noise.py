from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from wetware.identity import Key, PeerId
from wetware.overlay.link import Violation
from wetware.overlay.link.noise import (
    Cipher,
    NoiseHandshake,
    NoiseIdentity,
    protobuf_fields,
    verify_identity,
)

STATIC = bytes(range(32))
SIGNED = b"noise-libp2p-static-key:" + STATIC


def field(number: int, data: bytes) -> bytes:
    size = len(data)
    varint = bytes((size,)) if size < 128 else bytes((size & 127 | 128, size >> 7))
    return bytes((number << 3 | 2,)) + varint + data


def payload(kind: int, public: bytes, signature: bytes) -> bytes:
    return field(1, bytes((8, kind)) + field(2, public)) + field(2, signature)


def run(a: NoiseHandshake, b: NoiseHandshake) -> None:
    b.read_message(a.write_message())
    a.read_message(b.write_message())
    b.read_message(a.write_message())


def der(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def test_both_ends_authenticate_each_other_and_share_the_binding() -> None:
    keys = [Key.generate() for _ in range(2)]
    a = NoiseHandshake(NoiseIdentity(keys[0]), initiator=True)
    b = NoiseHandshake(NoiseIdentity(keys[1]), initiator=False)
    run(a, b)
    assert a.secured is not None
    assert b.secured is not None
    assert (a.secured.peer, b.secured.peer) == (keys[1].peer_id, keys[0].peer_id)
    assert a.secured.binding == b.secured.binding
    assert len(a.secured.binding) == 32
    for tx, rx in ((a.secured.send, b.secured.receive), (b.secured.send, a.secured.receive)):
        for text in (b"one", b"two"):
            assert rx.decrypt(tx.encrypt(text)) == text


def test_two_connections_of_one_pair_have_different_bindings() -> None:
    one, two = NoiseIdentity(Key.generate()), NoiseIdentity(Key.generate())
    bindings = set()
    for _ in range(2):
        a, b = NoiseHandshake(one, initiator=True), NoiseHandshake(two, initiator=False)
        run(a, b)
        assert a.secured is not None
        bindings.add(a.secured.binding)
    assert len(bindings) == 2


def test_replayed_and_reordered_messages_do_not_decrypt() -> None:
    tx, rx = Cipher(STATIC), Cipher(STATIC)
    first = tx.encrypt(b"x")
    rx.decrypt(first)
    with pytest.raises(InvalidTag):
        rx.decrypt(first)


@pytest.mark.parametrize("message", [0, 1, 2])
def test_a_tampered_handshake_message_is_refused(message: int) -> None:
    a = NoiseHandshake(NoiseIdentity(Key.generate()), initiator=True)
    b = NoiseHandshake(NoiseIdentity(Key.generate()), initiator=False)

    def carry(step: int, data: bytes) -> bytes:
        return data[:-1] + bytes((data[-1] ^ 1,)) if step == message else data

    def all_three() -> None:
        b.read_message(carry(0, a.write_message()))
        a.read_message(carry(1, b.write_message()))
        b.read_message(carry(2, a.write_message()))

    with pytest.raises(Violation):
        all_three()


@pytest.mark.parametrize("bad", [b"", b"\0" * 31, b"\0" * 32])
def test_short_and_low_order_keys_are_refused(bad: bytes) -> None:
    b = NoiseHandshake(NoiseIdentity(Key.generate()), initiator=False)

    def answer() -> None:
        b.read_message(bad)
        b.write_message()

    with pytest.raises(Violation):
        answer()


def test_an_identity_signed_by_another_key_is_refused() -> None:
    honest, forger = Key.generate(), Key.generate()
    identity = NoiseIdentity(forger)
    identity.payload = payload(
        1, honest.public, forger.sign(b"noise-libp2p-static-key:" + identity.public)
    )
    a = NoiseHandshake(identity, initiator=True)
    b = NoiseHandshake(NoiseIdentity(Key.generate()), initiator=False)
    with pytest.raises(Violation, match="wrong signature"):
        run(a, b)


def test_an_identity_of_another_connections_static_key_is_refused() -> None:
    key = Key.generate()
    identity, other = NoiseIdentity(key), NoiseIdentity(key)
    identity.payload = other.payload
    with pytest.raises(Violation, match="wrong signature"):
        run(
            NoiseHandshake(identity, initiator=True),
            NoiseHandshake(NoiseIdentity(Key.generate()), initiator=False),
        )


def test_secp256k1_ecdsa_and_rsa_identities_are_verified() -> None:
    k1 = ec.generate_private_key(ec.SECP256K1())
    point = k1.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    )
    p256 = ec.generate_private_key(ec.SECP256R1())
    big = rsa.generate_private_key(65537, 2048)
    cases = [
        (2, point, k1.sign(SIGNED, ec.ECDSA(hashes.SHA256()))),
        (3, der(p256.public_key()), p256.sign(SIGNED, ec.ECDSA(hashes.SHA256()))),
        (0, der(big.public_key()), big.sign(SIGNED, padding.PKCS1v15(), hashes.SHA256())),
    ]
    for kind, public, signature in cases:
        peer = verify_identity(payload(kind, public, signature), STATIC)
        assert peer == PeerId.from_public_key_pb(bytes((8, kind)) + field(2, public))
        assert PeerId.parse(peer) == peer
        with pytest.raises(Violation, match="not proven"):
            verify_identity(payload(kind, public, signature), STATIC[::-1])
    with pytest.raises(Violation, match="type"):  # an ECDSA key that claims to be RSA
        verify_identity(payload(0, cases[1][1], cases[1][2]), STATIC)
    with pytest.raises(Violation, match="unknown key type 9"):
        verify_identity(payload(9, point, b""), STATIC)


def test_a_short_rsa_key_is_refused() -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505  # weak on purpose
    signature = weak.sign(SIGNED, padding.PKCS1v15(), hashes.SHA256())
    with pytest.raises(Violation, match="1024 bits"):
        verify_identity(payload(0, der(weak.public_key()), signature), STATIC)


def test_the_peer_id_does_not_depend_on_the_encoding() -> None:
    key = Key.generate()
    encoded = field(2, key.public) + bytes((8, 1))  # fields swapped
    data = field(1, encoded) + field(2, key.sign(SIGNED))
    assert verify_identity(data, STATIC) == key.peer_id


def test_extensions_in_the_payload_are_ignored() -> None:
    key = Key.generate()
    extra = (
        field(4, field(2, b"/yamux/1.0.0"))
        + b"\x28\x07"
        + b"\x35"
        + b"abcd"
        + b"\x39"
        + b"8bytes!!"
    )
    data = payload(1, key.public, key.sign(SIGNED)) + extra
    assert verify_identity(data, STATIC) == key.peer_id


@pytest.mark.parametrize("data", [b"", b"\x0a", b"\x0a\x05ab", b"\x0b", b"\x08" + b"\xff" * 11])
def test_malformed_payloads_are_violations(data: bytes) -> None:
    with pytest.raises(Violation):
        verify_identity(data, STATIC)


def test_protobuf_fields_of_all_wire_types() -> None:
    data = b"\x08\x96\x01" + b"\x12\x02hi" + b"\x1d" + b"abcd" + b"\x21" + b"12345678"
    assert list(protobuf_fields(data)) == [(1, 150), (2, b"hi"), (3, b"abcd"), (4, b"12345678")]
