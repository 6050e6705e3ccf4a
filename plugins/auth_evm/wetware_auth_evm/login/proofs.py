"""The two proofs of a login, as they travel: what is signed, and how it is packed.

`evm-session`: a wallet has signed that a session key may act for its account (`statements`), and
that key answers the node's challenge. `evm-key`: a key that an account bound on chain answers it.
What a key signs begins with a domain of its own, so that an answer is of use for one scheme only;
that of a session also names what the wallet signed, so that it cannot be put beside another grant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from wetware.base import cbor
from wetware.errors import InvalidArgument
from wetware_auth_evm.login.statements import SessionGrant

if TYPE_CHECKING:
    from wetware.identity import Challenge

SESSION_SCHEME: Final = "evm-session"
KEY_SCHEME: Final = "evm-key"
SCHEMES: Final = (SESSION_SCHEME, KEY_SCHEME)
SIGNATURE_BYTES_MAX: Final = 16 << 10
"""Of a wallet: a Safe with a hundred owners, or a passkey's, stays well below."""
PAYLOAD_BYTES_MAX: Final = 32 << 10
FORMS: Final = ("eip712", "eip4361", "erc1271")
_SESSION_DOMAIN: Final = b"wetware-evm-session:1\n"
_KEY_DOMAIN: Final = b"wetware-evm-key:1\n"
_ANSWER_BYTES: Final = 64

Form = Literal["eip712", "eip4361", "erc1271"]
"""How a wallet signed: typed data, the text, or typed data by a contract that judges it itself."""


@dataclass(frozen=True, slots=True)
class SessionProof:
    """What a session shows: a wallet's grant, and the session key's answer of 64 bytes."""

    grant: SessionGrant
    form: Form
    signature: bytes
    answer: bytes = b""

    @property
    def digest(self) -> bytes:
        return self.grant.text_digest() if self.form == "eip4361" else self.grant.digest()

    def encode(self) -> bytes:
        text = self.form == "eip4361"
        return cbor.encode(
            {
                "form": self.form,
                "grant": self.grant.text() if text else self.grant.plain(),
                "signature": self.signature,
                "answer": self.answer,
            }
        )

    @classmethod
    def decode(cls, payload: bytes) -> SessionProof:
        """The inverse, checked; raises InvalidArgument."""
        value = _table(payload, ("form", "grant", "signature", "answer"))
        form, signature, answer = value["form"], value["signature"], value["answer"]
        if form not in FORMS:
            raise _bad("its form is unknown")
        if type(signature) is not bytes or not 1 <= len(signature) <= SIGNATURE_BYTES_MAX:
            raise _bad(f"a wallet's signature has 1 to {SIGNATURE_BYTES_MAX} bytes")
        if type(answer) is not bytes or len(answer) != _ANSWER_BYTES:
            raise _bad(f"a session key's answer has {_ANSWER_BYTES} bytes")
        if form == "eip4361":
            if type(value["grant"]) is not str:
                raise _bad("its grant is not a text")
            grant = SessionGrant.parse_text(value["grant"])
        else:
            grant = SessionGrant.from_plain(value["grant"])
        return cls(grant, form, signature, answer)


def session_statement(challenge: Challenge, digest: bytes) -> bytes:
    """What a session key signs: the challenge, and which signature of a wallet it goes with."""
    return _SESSION_DOMAIN + digest + challenge.signed_bytes()


@dataclass(frozen=True, slots=True)
class KeyProof:
    """What a bound key shows.

    Attributes:
        key: Ed25519, 32 bytes.
        answer: Its signature, 64 bytes.
        account: For whom, 20 bytes; b"": the one account that bound it.
    """

    key: bytes
    answer: bytes
    account: bytes = b""

    def encode(self) -> bytes:
        return cbor.encode({"key": self.key, "answer": self.answer, "account": self.account})

    @classmethod
    def decode(cls, payload: bytes) -> KeyProof:
        """The inverse, checked; raises InvalidArgument."""
        value = _table(payload, ("key", "answer", "account"))
        for name, sizes in (("key", (32,)), ("answer", (_ANSWER_BYTES,)), ("account", (0, 20))):
            if type(value[name]) is not bytes or len(value[name]) not in sizes:
                raise _bad(f"its {name} has the wrong size")
        return cls(value["key"], value["answer"], value["account"])


def key_statement(challenge: Challenge, account: bytes) -> bytes:
    """What a bound key signs: the challenge, and for which account."""
    return _KEY_DOMAIN + account.rjust(20, b"\0") + challenge.signed_bytes()


def _table(payload: bytes, names: tuple[str, ...]) -> dict[str, Any]:
    value = cbor.decode(payload, bytes_max=PAYLOAD_BYTES_MAX)
    if not isinstance(value, dict) or value.keys() != set(names):
        raise _bad("it has other fields")
    return value


def _bad(why: str) -> InvalidArgument:
    return InvalidArgument(f"not a proof of this scheme: {why}", code="invalid.proof")
