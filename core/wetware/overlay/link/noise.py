"""The Noise XX handshake as libp2p uses it: who the peer is, and keys for both directions. No I/O.

`Noise_XX_25519_ChaChaPoly_SHA256`; each side's payload carries its identity key and a signature of
that key over its Noise static key, which is what authenticates the peer.
Sources: https://noiseprotocol.org/noise.html, https://github.com/libp2p/specs/blob/master/noise/
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from wetware.base.varint import uvarint, uvarint_at
from wetware.identity import Key, PeerId, verify
from wetware.overlay.link.limits import Violation

MESSAGE_BYTES_MAX = 65535
TAG_BYTES = 16
PLAINTEXT_BYTES_MAX = MESSAGE_BYTES_MAX - TAG_BYTES
HANDSHAKE_BYTES_MAX = 8192
"""Of one handshake message: an RSA-8192 identity with its signature and extensions fits."""

_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
_SIGNED_PREFIX = b"noise-libp2p-static-key:"
_RSA_BITS_MIN, _RSA_BITS_MAX = 2048, 8192  # below: breakable; above: verification as a CPU attack
_FIXED_BYTES = {1: 8, 5: 4}  # protobuf's wire types of a fixed width
_RSA, _ED25519, _SECP256K1, _ECDSA = 0, 1, 2, 3  # KeyType of libp2p's PublicKey


def protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message; fixed-width values as bytes.

    Raises Violation on anything malformed. Unknown fields are the caller's to ignore.
    """
    at = 0
    while at < len(data):
        try:
            tag, at = uvarint_at(data, at)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = uvarint_at(data, at)
                yield number, value
                continue
            size, at = uvarint_at(data, at) if wire == 2 else (_FIXED_BYTES[wire], at)
        except (ValueError, KeyError) as exc:
            raise Violation(f"protobuf: malformed: {exc}") from None
        if at + size > len(data):
            raise Violation("protobuf: truncated")
        yield number, data[at : at + size]
        at += size


def _field(number: int, data: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + uvarint(len(data)) + data


def _bad_identity(why: str) -> NoReturn:
    raise Violation(f"noise: the peer's identity is not proven: {why}")


def verify_identity(payload: bytes, static: bytes) -> PeerId:
    """The peer that signed the Noise static key `static` (32 bytes) in a handshake payload.

    Ed25519, secp256k1, ECDSA and RSA (2048 to 8192 bits) identities. Raises Violation.
    """
    values = dict(protobuf_fields(payload))
    encoded, signature = values.get(1), values.get(2)
    if not isinstance(encoded, bytes) or not isinstance(signature, bytes):
        _bad_identity("no key or no signature")
    key = dict(protobuf_fields(encoded))
    kind, data = key.get(1, 0), key.get(2)
    if not isinstance(kind, int) or not isinstance(data, bytes):
        _bad_identity("malformed key")
    signed = _SIGNED_PREFIX + static
    try:
        if kind == _ED25519:
            if not verify(data, signature, signed):
                _bad_identity("wrong signature, or no Ed25519 key")
        elif kind == _SECP256K1:
            point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), data)
            point.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
        elif kind in (_ECDSA, _RSA):
            public = serialization.load_der_public_key(data)
            if kind == _ECDSA and isinstance(public, ec.EllipticCurvePublicKey):
                public.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
            elif kind == _RSA and isinstance(public, rsa.RSAPublicKey):
                if not _RSA_BITS_MIN <= public.key_size <= _RSA_BITS_MAX:
                    _bad_identity(f"an RSA key of {public.key_size} bits")
                public.verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
            else:
                _bad_identity("the key is not of the type that it claims")
        else:
            _bad_identity(f"unknown key type {kind}")
    except InvalidSignature:
        _bad_identity("wrong signature")
    except (ValueError, UnsupportedAlgorithm) as exc:
        _bad_identity(str(exc) or "malformed key")
    # Encoded anew: the ID must depend on the key alone, not on how the peer happened to encode it.
    return PeerId.from_public_key_pb(bytes((0x08, kind)) + _field(2, data))


class Cipher:
    """One direction's ChaCha20-Poly1305 with its counter. Not for more than 2**64 - 1 messages."""

    __slots__ = ("_aead", "_count")

    def __init__(self, key: bytes) -> None:
        self._aead = ChaCha20Poly1305(key)
        self._count = 0

    def encrypt(self, data: bytes | bytearray | memoryview, ad: bytes | None = None) -> bytes:
        nonce = b"\0\0\0\0" + self._count.to_bytes(8, "little")
        self._count += 1
        return self._aead.encrypt(nonce, data, ad)

    def decrypt(self, data: bytes | bytearray | memoryview, ad: bytes | None = None) -> bytes:
        """The plaintext; raises cryptography's InvalidTag if the data was tampered with."""
        nonce = b"\0\0\0\0" + self._count.to_bytes(8, "little")
        self._count += 1
        return self._aead.decrypt(nonce, data, ad)


def _kdf(chaining: bytes, material: bytes) -> tuple[bytes, bytes]:
    secret = hmac.digest(chaining, material, "sha256")
    first = hmac.digest(secret, b"\x01", "sha256")
    return first, hmac.digest(secret, first + b"\x02", "sha256")


class NoiseIdentity:
    """A node's Noise static key with the payload that vouches for it: made once per host."""

    __slots__ = ("payload", "peer_id", "public", "static")

    def __init__(self, key: Key) -> None:
        self.static = X25519PrivateKey.generate()
        self.public = self.static.public_key().public_bytes_raw()
        self.peer_id = key.peer_id
        identity = b"\x08\x01" + _field(2, key.public)
        self.payload = _field(1, identity) + _field(2, key.sign(_SIGNED_PREFIX + self.public))


@dataclass(frozen=True, slots=True)
class Secured:
    """What a handshake yields.

    Attributes:
        peer: Who the other side proved to be.
        binding: The handshake hash, 32 bytes, equal at both ends and unique to the connection.
        send: Encrypts what this side sends.
        receive: Decrypts what the peer sends.
    """

    peer: PeerId
    binding: bytes
    send: Cipher
    receive: Cipher


class NoiseHandshake:
    """One side of XX. The initiator writes, reads, writes; the responder reads, writes, reads.

    Messages are without their length prefix. `secured` is set after the third.
    """

    __slots__ = (
        "_chain",
        "_cipher",
        "_ephemeral",
        "_hash",
        "_identity",
        "_initiator",
        "_peer",
        "_remote_ephemeral",
        "_step",
        "secured",
    )

    def __init__(self, identity: NoiseIdentity, *, initiator: bool) -> None:
        self._identity, self._initiator, self._step = identity, initiator, 0
        self._ephemeral = X25519PrivateKey.generate()
        self._remote_ephemeral = b""
        self._peer: PeerId | None = None
        self._cipher: Cipher | None = None
        self._hash = self._chain = _NAME  # exactly 32 bytes: used as it is
        self._mix_hash(b"")  # the empty prologue
        self.secured: Secured | None = None

    def _mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _mix_key(self, private: X25519PrivateKey, public: bytes) -> None:
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as exc:  # a point of low order, or of the wrong length
            raise Violation(f"noise: {exc}") from None
        self._chain, key = _kdf(self._chain, shared)
        self._cipher = Cipher(key)

    def _seal(self, data: bytes) -> bytes:
        sealed = self._cipher.encrypt(data, self._hash) if self._cipher else data
        self._mix_hash(sealed)
        return sealed

    def _open(self, data: bytes) -> bytes:
        opened = self._cipher.decrypt(data, self._hash) if self._cipher else data
        self._mix_hash(data)
        return opened

    def write_message(self) -> bytes:
        step, self._step = self._step, self._step + 1
        me = self._identity
        if step == 2:
            out = self._seal(me.public)
            self._mix_key(me.static, self._remote_ephemeral)
            out += self._seal(me.payload)
            self._finish()
            return out
        public = self._ephemeral.public_key().public_bytes_raw()
        self._mix_hash(public)
        if step == 0:
            return public + self._seal(b"")
        self._mix_key(self._ephemeral, self._remote_ephemeral)
        out = public + self._seal(me.public)
        self._mix_key(me.static, self._remote_ephemeral)
        return out + self._seal(me.payload)

    def read_message(self, message: bytes) -> None:
        """Take the peer's next message; raises Violation if it is not what it should be."""
        step, self._step = self._step, self._step + 1
        try:
            if step < 2:
                if len(message) < 32:
                    raise Violation("noise: short handshake message")
                self._remote_ephemeral, message = message[:32], message[32:]
                self._mix_hash(self._remote_ephemeral)
                if step == 0:
                    self._open(message)
                    return
                self._mix_key(self._ephemeral, self._remote_ephemeral)
            static = self._open(message[:48])
            self._mix_key(self._ephemeral, static)
            self._peer = verify_identity(self._open(message[48:]), static)
        except InvalidTag:
            raise Violation("noise: a handshake message was tampered with") from None
        if step == 2:
            self._finish()

    def _finish(self) -> None:
        first, second = (Cipher(key) for key in _kdf(self._chain, b""))
        send, receive = (first, second) if self._initiator else (second, first)
        if self._peer is None:
            raise Violation("noise: handshake out of order")
        self.secured = Secured(self._peer, self._hash, send, receive)
