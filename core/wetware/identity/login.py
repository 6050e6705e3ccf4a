"""Principals, and the words of a login."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Protocol

from wetware.errors import InvalidArgument
from wetware.identity.peer_id import PeerId

NONCE_BYTES = 32
_CHALLENGE_DOMAIN = b"wetware-login-challenge:1\n"
CHALLENGE_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True, order=True)
class Principal:
    """Who is speaking: `(backend, subject)`, e.g. `local:12D3Koo…` or `evm:1:0xAb…`."""

    backend: str
    subject: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.subject}"

    @classmethod
    def parse(cls, text: str) -> Principal:
        """From the text form; raises InvalidArgument."""
        backend, colon, subject = text.partition(":")
        if not (backend.isidentifier() and colon and subject and subject.isprintable()):
            raise InvalidArgument(f"bad principal {text!r}", hint="write BACKEND:SUBJECT")
        return cls(backend, subject)


class LoginStatus(enum.StrEnum):
    """How a login ended, as `core.capnp` names it; what it does not name never grants."""

    UNINITIALIZED = "uninitialized"
    GRANTED = "granted"
    BAD_SIGNATURE = "badSignature"
    UNKNOWN_PRINCIPAL = "unknownPrincipal"
    EXPIRED = "expired"
    REPLAYED = "replayed"
    WRONG_VERIFIER = "wrongVerifier"
    WRONG_CHANNEL = "wrongChannel"
    WRONG_CLUSTER = "wrongCluster"
    UNSUPPORTED_SCHEME = "unsupportedScheme"
    MALFORMED = "malformed"
    NO_ROLE = "noRole"
    TOO_MANY_TRIES = "tooManyTries"
    BACKEND_UNAVAILABLE = "backendUnavailable"
    SIGNER_FAILED = "signerFailed"

    @classmethod
    def _missing_(cls, value: object) -> LoginStatus:
        """What a newer peer names is unknown here."""
        return cls.UNINITIALIZED


@dataclass(frozen=True, slots=True)
class Channel:
    """What a connection is bound to.

    Attributes:
        kind: "noise" (the handshake hash of the connection) or "unix" (the node's peer ID).
        value: 32 bytes of handshake hash, or the peer ID's multihash.
    """

    kind: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a node asks a user's signer to sign.

    Attributes:
        nonce: 32 random bytes, used once.
        verifier: The peer ID of the node that asks.
        cluster: The cluster's ID.
        channel: What the node's end of the connection is bound to.
        schemes: Proof schemes that the node accepts, in its order of preference.
        policy_epoch: The version of the policy that will decide.
        not_after_ms: Unix time, milliseconds, by the node's clock.
    """

    nonce: bytes
    verifier: PeerId
    cluster: str
    channel: Channel
    schemes: tuple[str, ...]
    policy_epoch: int
    not_after_ms: int

    def signed_bytes(self) -> bytes:
        """The canonical bytes that are signed: a domain, then every field with its length."""
        fields = (
            self.nonce,
            self.verifier.encode(),
            self.cluster.encode(),
            self.channel.kind.encode(),
            self.channel.value,
            "\0".join(self.schemes).encode(),
            struct.pack("!QQ", self.policy_epoch, self.not_after_ms),
        )
        return _CHALLENGE_DOMAIN + b"".join(struct.pack("!I", len(f)) + f for f in fields)

    @classmethod
    def from_signed_bytes(cls, data: bytes) -> Challenge:
        """Parse what `signed_bytes` made; raises ValueError on anything else."""
        if len(data) > CHALLENGE_BYTES_MAX or not data.startswith(_CHALLENGE_DOMAIN):
            raise ValueError("not a login challenge")
        at, fields = len(_CHALLENGE_DOMAIN), []
        for _ in range(7):
            if at + 4 > len(data):
                raise ValueError("truncated")
            (length,) = struct.unpack_from("!I", data, at)
            at += 4
            if at + length > len(data):
                raise ValueError("truncated")
            fields.append(data[at : at + length])
            at += length
        nonce, verifier, cluster, kind, value, schemes, numbers = fields
        if at != len(data) or len(nonce) != NONCE_BYTES or len(numbers) != 16:
            raise ValueError("malformed")
        epoch, not_after = struct.unpack("!QQ", numbers)
        try:
            peer = PeerId.parse(verifier.decode())
        except InvalidArgument as exc:
            raise ValueError(exc.message) from None
        return cls(
            nonce,
            peer,
            cluster.decode(),
            Channel(kind.decode(), value),
            tuple(schemes.decode().split("\0")),
            epoch,
            not_after,
        )


@dataclass(frozen=True, slots=True)
class Proof:
    """A signer's answer.

    Attributes:
        scheme: e.g. "local-ed25519".
        payload: Scheme-specific: keys and signatures, never a secret.
        signed: `Challenge.signed_bytes()` as the signer saw it, so that a refusal can say which
            field differs. The verifier decides by its own copy.
    """

    scheme: str
    payload: bytes
    signed: bytes


class Signer(Protocol):
    """Answers challenges for one user. The client has checked verifier and channel before.

    It may have more: `hints: Mapping[LoginStatus, str]`, what the user does about a refusal;
    `unattended = True`: it signs without asking anybody, so a client that has lost its connection
    may log in again by it; `ready(challenge) -> bool`: whether the user has made the login that it
    answers by. Of several schemes that a node offers, one that is ready goes first, then one
    without `ready`: a key.
    """

    async def sign(self, challenge: Challenge) -> Proof:
        """Prove who the user is; raises AuthError if no offered scheme fits."""
        ...
