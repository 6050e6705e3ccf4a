"""The proof of a login as it travels: the tokens of a person, and the answer of a session's key.

The ID token names the key (its nonce is the key's hash), and the key signs the node's challenge: so
a node that has seen a token cannot use it at another one. The access token is there for one
question, whether its owner is still somebody (`Provider.userinfo`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from wetware.base import cbor
from wetware.errors import InvalidArgument
from wetware_auth_oidc.tokens import TOKEN_CHARS_MAX

if TYPE_CHECKING:
    from wetware.identity import Challenge

SCHEME: Final = "oidc-session"
PAYLOAD_BYTES_MAX: Final = 56 << 10
_DOMAIN: Final = b"wetware-oidc-session:1\n"
_SIZES: Final = {"key": 32, "answer": 64}
_TOKENS: Final = ("id_token", "bound_token", "access_token")


@dataclass(frozen=True, slots=True)
class OidcProof:
    """What a session shows.

    Attributes:
        key: The session's public key, Ed25519, 32 bytes.
        answer: Its signature, 64 bytes.
        id_token: Who its owner is, now.
        bound_token: The ID token that names the key, where a refresh brought one without; else "".
        access_token: For asking the provider about its owner.
    """

    key: bytes
    answer: bytes
    id_token: str = field(repr=False)
    bound_token: str = field(repr=False)
    access_token: str = field(repr=False)

    def encode(self) -> bytes:
        names = (*_SIZES, *_TOKENS)
        return cbor.encode({name: getattr(self, name) for name in names})

    @classmethod
    def decode(cls, payload: bytes) -> OidcProof:
        """The inverse, checked; raises InvalidArgument."""
        value = cbor.decode(payload, bytes_max=PAYLOAD_BYTES_MAX)
        if not isinstance(value, dict) or value.keys() != {*_SIZES, *_TOKENS}:
            raise _bad("it has other fields")
        for name, size in _SIZES.items():
            if type(value[name]) is not bytes or len(value[name]) != size:
                raise _bad(f"its {name} has not {size} bytes")
        for name in _TOKENS:
            if type(value[name]) is not str or len(value[name]) > TOKEN_CHARS_MAX:
                raise _bad(f"its {name} is no text of at most {TOKEN_CHARS_MAX} characters")
        return cls(**value)


def statement(challenge: Challenge, id_token: str, bound_token: str, access_token: str) -> bytes:
    """What the key signs: the challenge, and with which tokens it goes."""
    tokens = "\n".join((id_token, bound_token, access_token)).encode()
    return _DOMAIN + hashlib.sha256(tokens).digest() + challenge.signed_bytes()


def _bad(why: str) -> InvalidArgument:
    return InvalidArgument(f"not a proof of this scheme: {why}", code="invalid.proof")
