"""Peer IDs: the names of nodes, in base58.

Source: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from wetware.errors import InvalidArgument


def from_hex(text: str) -> bytes:
    """The inverse of `bytes.hex`, of one text only; raises ValueError.

    `bytes.fromhex` takes spaces and capitals as well: what is signed or hashed would have many
    forms.
    """
    data = bytes.fromhex(text)
    if data.hex() != text:
        raise ValueError("not hex as it is written here: small letters, nothing between them")
    return data


_B58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_B58_VALUE = {char: value for value, char in enumerate(_B58)}
_ED25519_PB = b"\x08\x01\x12\x20"  # PublicKey{Type: Ed25519, Data: 32 bytes}
_IDENTITY_MULTIHASH = b"\x00\x24"  # identity, 36 bytes
_SHA256_MULTIHASH = b"\x12\x20"  # sha2-256, 32 bytes
PEER_ID_CHARS_MAX = 64


def base58_encode(data: bytes) -> str:
    """Bitcoin-alphabet base58."""
    number, out = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        out = _B58[digit] + out
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + out


def base58_decode(text: str, *, chars_max: int = 1024) -> bytes:
    """The inverse of `base58_encode`; raises ValueError on a foreign character or a long text."""
    if len(text) > chars_max:  # decoding takes time quadratic in the length
        raise ValueError(f"longer than {chars_max} characters")
    number = 0
    for char in text:
        if (digit := _B58_VALUE.get(char)) is None:
            raise ValueError(f"{char!r} is not a base58 character")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")


_multihash = lru_cache(maxsize=1024)(base58_decode)  # the same few are asked for over and over


def _inlines_a_key(data: bytes) -> bool:
    """Whether an identity multihash holds a short PublicKey{Type, Data}, as of secp256k1."""
    return (
        6 < len(data) <= 44
        and data[0] == 0
        and data[1] == len(data) - 2
        and data[2] == 0x08
        and data[3] <= 3  # RSA, Ed25519, secp256k1, ECDSA
        and data[4] == 0x12
        and data[5] == len(data) - 6
    )


class PeerId(str):
    """A libp2p peer ID in its base58 form, e.g. `12D3KooW…`. Make one with a class method."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """Validate the text form; raises InvalidArgument."""
        try:
            return cls.from_multihash(base58_decode(text, chars_max=PEER_ID_CHARS_MAX))
        except ValueError as exc:
            raise InvalidArgument(
                f"bad peer ID {text[:PEER_ID_CHARS_MAX]!r}: {exc}",
                hint="a peer ID looks like 12D3KooW…: `ww id` prints a node's, `ww key show` yours",
                code="invalid.peer_id",
            ) from None

    @classmethod
    def from_multihash(cls, data: bytes) -> PeerId:
        """From the binary form; raises ValueError."""
        if data[:2] == _IDENTITY_MULTIHASH and len(data) == 38:
            if data[2:6] != _ED25519_PB:
                raise ValueError("the inlined key is not Ed25519")
            return cls(base58_encode(data))
        hashed = data[:2] == _SHA256_MULTIHASH and len(data) == 34
        if not (hashed or _inlines_a_key(data)):
            raise ValueError("not the multihash of a public key")
        return cls(base58_encode(data))

    @classmethod
    def from_public_key(cls, public: bytes) -> PeerId:
        """Of a raw 32-byte Ed25519 public key."""
        return cls(base58_encode(_IDENTITY_MULTIHASH + _ED25519_PB + public))

    @classmethod
    def from_public_key_pb(cls, encoded: bytes) -> PeerId:
        """Of a libp2p `PublicKey` protobuf of any key type: inlined up to 42 bytes, else hashed."""
        if len(encoded) <= 42:
            return cls(base58_encode(bytes((0, len(encoded))) + encoded))
        return cls(base58_encode(_SHA256_MULTIHASH + hashlib.sha256(encoded).digest()))

    @property
    def multihash(self) -> bytes:
        """The binary form."""
        return _multihash(self)

    @property
    def public_key(self) -> bytes | None:
        """The raw Ed25519 key that the ID inlines, or None where the ID is a hash."""
        data = self.multihash
        return data[6:] if data[:6] == _IDENTITY_MULTIHASH + _ED25519_PB else None

    @property
    def short(self) -> str:
        """The last eight characters: the first ones are the same for every node."""
        return self[-8:]
