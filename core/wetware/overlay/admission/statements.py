"""What is signed: certificates, chains of them, tombstones; and the founding that names a cluster.

Everything is checked offline, from the founding alone. A statement is CBOR; its signature covers a
domain and the exact bytes that are carried, and an envelope has one encoding only, so that nobody
can make a second fact out of a first. An unknown version, right or field is a refusal.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Final, Self, TypeVar

from wetware.base import cbor
from wetware.errors import AdmissionRefused, InvalidArgument
from wetware.identity import Key, PeerId, verify
from wetware.overlay.admission.limits import LIFE_S_MAX

T = TypeVar("T")

MEMBER, INVITE, FOUND = "member", "invite", "found"
RIGHTS: Final = frozenset({MEMBER, INVITE, FOUND})
"""`found` has the node where the cluster was founded, by which others know it, and no other."""

VERSION: Final = 2
CERTIFICATE_BYTES_MAX: Final = 1900
"""Payload and signature of one: half a chain, with room for the frame around it."""
CHAIN_BYTES_MAX: Final = 4096
TOMBSTONE_BYTES_MAX: Final = 6144
FACT_BYTES_MAX: Final = TOMBSTONE_BYTES_MAX + 64
SERIAL_BYTES: Final = 16
TICKET_BYTES: Final = 16
"""Of the name of a ticket: the beginning of the SHA-256 of its secret."""
LABELS_MAX: Final = 32
LABEL_VALUE_CHARS_MAX: Final = 128
REASON_CHARS_MAX: Final = 200
STATEMENT_BYTES_MAX: Final = 512
"""Of the backend's founding: a key, or the address of a contract. It is part of every ticket."""
TIME_MS_MAX: Final = 2**53 - 1

_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,62}\Z")
_BACKEND = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_TOMBSTONE_SKEW_MS: Final = 3_600_000
"""When an inviter buried somebody is its own word; its clock may be a little behind."""
_CLUSTER_DOMAIN = b"wetware-cluster:2\n"


def refusal(why: str, message: str, hint: str = "") -> AdmissionRefused:
    """An AdmissionRefused with the code `admission.<why>`."""
    return AdmissionRefused(message, hint=hint, code=f"admission.{why}")


def _malformed(what: str) -> AdmissionRefused:
    return refusal("malformed", f"malformed: {what}")


def _unknown(what: str) -> AdmissionRefused:
    return refusal("version", f"{what}, which this node does not know", "upgrade wetware here")


def _take(value: object, kind: type[T], what: str) -> T:
    """What is exactly of this type: True is no number here."""
    if type(value) is not kind:
        raise _malformed(f"{what} is not of type {kind.__name__}")
    return value


def _decode(data: bytes, bytes_max: int, what: str) -> dict[str, Any]:
    try:
        value = cbor.decode(_take(data, bytes, what), bytes_max=bytes_max)
    except InvalidArgument as exc:
        raise _malformed(f"{what}: {exc.message}") from None
    return _take(value, dict, what)


def _check_keys(value: Mapping[str, Any], *keys: str) -> None:
    if value.keys() != set(keys):
        raise _malformed("fields that do not belong there, or missing ones")


def _check_version(value: Mapping[str, Any], what: str) -> None:
    if type(version := value.get("v")) is not int or version != VERSION:
        raise _unknown(f"{what} of version {str(version)[:20]!r}")


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels in order; raises InvalidArgument for those that a certificate cannot hold."""
    if len(labels) > LABELS_MAX:
        raise InvalidArgument(f"{len(labels)} labels; at most {LABELS_MAX}")
    for key, value in labels.items():
        if type(key) is not str or not _LABEL_KEY.match(key):
            raise InvalidArgument(
                f"{str(key)[:64]!r} is not a label's name",
                hint="up to 63 letters, digits, '_', '.', '/' and '-'",
            )
        if type(value) is not str or len(value) > LABEL_VALUE_CHARS_MAX or not value.isprintable():
            raise InvalidArgument(
                f"the value of label {key!r} is not at most {LABEL_VALUE_CHARS_MAX} printable "
                "characters"
            )
    return dict(sorted(labels.items()))


# --- the founding ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Founding:
    """What names a cluster for ever.

    Attributes:
        public: The cluster's raw Ed25519 public key, 32 bytes.
        backend: The auth backend's name.
        statement: `AuthBackend.founding`: what names the cluster in the backend's world.
    """

    public: bytes
    backend: str
    statement: bytes

    def __post_init__(self) -> None:
        if (
            len(self.public) != 32
            or not _BACKEND.match(self.backend)
            or len(self.statement) > STATEMENT_BYTES_MAX
        ):
            raise InvalidArgument(
                "a founding is a key of 32 bytes, a backend's name and at most "
                f"{STATEMENT_BYTES_MAX} bytes of its own"
            )

    @property
    def cluster_id(self) -> str:
        """40 hex digits of SHA-256 over the domain and every field with its length."""
        digest = hashlib.sha256(_CLUSTER_DOMAIN)
        for part in (self.public, self.backend.encode(), self.statement):
            digest.update(struct.pack("!I", len(part)) + part)
        return digest.hexdigest()[:40]

    @property
    def issuer(self) -> PeerId:
        """The cluster key, as certificates name their issuer."""
        return PeerId.from_public_key(self.public)

    def plain(self) -> list[Any]:
        return [self.public, self.backend, self.statement]

    @classmethod
    def from_plain(cls, value: object) -> Founding:
        """The inverse of `plain`; raises InvalidArgument."""
        if type(value) is not list or [type(part) for part in value] != [bytes, str, bytes]:
            raise InvalidArgument("not a founding")
        return cls(*value)


# --- what certificates and tombstones have in common ----------------------------------------------


@dataclass(frozen=True, slots=True)
class _Carried:
    """How an attribute is carried.

    Attributes:
        key: In the CBOR map.
        kind: Its type there, exactly.
        read: The attribute of a value of that type. Raises AdmissionRefused, or InvalidArgument or
            ValueError for one that is out of bounds.
        write: The inverse.
    """

    key: str
    kind: type
    read: Callable[[Any], object]
    write: Callable[[Any], object] = lambda value: value


def _lengths(*lengths: int) -> Callable[[bytes], bytes]:
    def read(data: bytes) -> bytes:
        if len(data) not in lengths:
            raise ValueError("its length is wrong")
        return data

    return read


def _read_time(at_ms: int) -> int:
    if not 0 <= at_ms <= TIME_MS_MAX:
        raise ValueError("the time is out of range")
    return at_ms


def _read_rights(rights: list[Any]) -> frozenset[str]:
    for right in rights:
        if type(right) is not str or right not in RIGHTS:
            raise refusal(
                "right",
                f"a certificate with the right {str(right)[:40]!r}, which this node does not know",
                "upgrade wetware here",
            )
    if rights != sorted(set(rights)) or MEMBER not in rights:
        raise ValueError("out of order, or without membership")
    return frozenset(rights)


def _read_reason(text: str) -> str:
    if len(text) > REASON_CHARS_MAX or not text.isprintable():
        raise InvalidArgument(f"a reason is at most {REASON_CHARS_MAX} printable characters")
    return text


def _peer(key: str) -> _Carried:
    return _Carried(key, bytes, PeerId.from_multihash, lambda peer: peer.multihash)


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a key says of a peer. Sign a new one with `signed`; `open` is for one that came.

    Attributes:
        cluster: The cluster's ID.
        peer: Whom it is about.
        issuer: The cluster key's name, or the peer ID of an inviter.
        not_after_ms: Unix time, ms.
        ticket: The name of the ticket that let the peer in, or b"". Of a certificate, so that every
            member knows that it is spent; of a tombstone, if the issuer knows it: it lets nobody in
            any more, as its holder could give it to another key.
        payload: The bytes that are signed.
        signature: 64 bytes.
    """

    what: ClassVar[str]
    domain: ClassVar[bytes]
    bytes_max: ClassVar[int]
    carried: ClassVar[Mapping[str, _Carried]] = {
        "cluster": _Carried("cluster", bytes, lambda data: _lengths(20)(data).hex(), bytes.fromhex),
        "peer": _peer("peer"),
        "issuer": _peer("issuer"),
        "not_after_ms": _Carried("to", int, _read_time),
        "ticket": _Carried("ticket", bytes, _lengths(0, TICKET_BYTES)),
    }

    cluster: str
    peer: PeerId
    issuer: PeerId = field(default=PeerId(""))
    not_after_ms: int
    ticket: bytes = b""
    payload: bytes = field(default=b"", repr=False)
    signature: bytes = field(default=b"", repr=False)

    def check_life(self) -> None:
        """Raise ValueError if it ends before it begins, or lasts too long."""

    def signed(self, key: Key) -> Self:
        """The same by `key`; raises InvalidArgument or ValueError where it is out of bounds."""
        mine = replace(self, issuer=key.peer_id)
        payload = cbor.encode(
            {"v": VERSION}
            | {how.key: how.write(getattr(mine, name)) for name, how in self.carried.items()}
        )
        if len(payload) > self.bytes_max:
            raise InvalidArgument(
                f"the labels make {self.what} of {len(payload)} bytes; at most {self.bytes_max}",
                hint="use fewer or shorter labels",
            )
        return self._read(payload, key.sign(self.domain + payload))

    @classmethod
    def open(cls, payload: bytes, signature: bytes) -> Self:
        """Decode; checks the form, not the signature. Raises AdmissionRefused."""
        try:
            return cls._read(payload, _lengths(64)(signature))
        except (InvalidArgument, ValueError) as exc:
            raise _malformed(f"{cls.what}: {exc}") from None

    @classmethod
    def _read(cls, payload: bytes, signature: bytes) -> Self:
        value = _decode(payload, cls.bytes_max, cls.what)
        _check_version(value, cls.what)
        _check_keys(value, "v", *(how.key for how in cls.carried.values()))
        found = {
            name: how.read(_take(value[how.key], how.kind, repr(how.key)))
            for name, how in cls.carried.items()
        }
        statement = cls(**found, payload=payload, signature=signature)  # type: ignore[arg-type]  # as `carried` says
        statement.check_life()
        return statement

    @property
    def is_signed(self) -> bool:
        """Whether the issuer that it names signed it."""
        public = self.issuer.public_key
        return public is not None and verify(public, self.signature, self.domain + self.payload)


# --- certificates ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Certificate(Statement):
    """This peer is of this cluster, with these rights, for this long.

    Attributes:
        rights: Of RIGHTS.
        labels: Name → value; they win over what the node says of itself.
        not_before_ms: Unix time, ms.
        serial: 16 random bytes.
        foreign: Whether the peer speaks none of our protocols: the cluster knows it by this alone.
    """

    what = "a certificate"
    domain = b"wetware-certificate:1\n"
    bytes_max = CERTIFICATE_BYTES_MAX
    carried = {  # noqa: RUF012 - a ClassVar of Statement
        **Statement.carried,
        "rights": _Carried("rights", list, _read_rights, sorted),
        "labels": _Carried("labels", dict, check_labels, check_labels),
        "not_before_ms": _Carried("from", int, _read_time),
        "serial": _Carried("serial", bytes, _lengths(SERIAL_BYTES)),
        "foreign": _Carried("foreign", bool, bool),
    }

    rights: frozenset[str]
    labels: Mapping[str, str]
    not_before_ms: int
    serial: bytes = field(default_factory=lambda: secrets.token_bytes(SERIAL_BYTES))
    foreign: bool = False

    def check_life(self) -> None:
        if not self.not_before_ms < self.not_after_ms <= self.not_before_ms + LIFE_S_MAX * 1000:
            raise ValueError("it ends before it begins, or lasts for more than a year")

    def when_ms(self, part: float) -> float:
        """When this part of its life is over."""
        return self.not_before_ms + (self.not_after_ms - self.not_before_ms) * part

    def judge_time(self, now_ms: float, skew_ms: float) -> None:
        """Raise AdmissionRefused if it is not valid now, with tolerance at both ends."""
        if now_ms < self.not_before_ms - skew_ms:
            raise refusal(
                "not_yet",
                f"the certificate of {self.peer} is valid only in "
                f"{(self.not_before_ms - now_ms) / 1000:.0f} s",
                "check the clocks of both machines",
            )
        if now_ms > self.not_after_ms + skew_ms:
            raise refusal(
                "expired",
                f"the certificate of {self.peer} expired {(now_ms - self.not_after_ms) / 1000:.0f}"
                " s ago",
                "the node renews it at an issuer; after a long absence, join again with a ticket",
            )


@dataclass(frozen=True)
class Chain:
    """What a member shows: its certificate and, unless the cluster key signed that, its inviter's.

    Attributes:
        certificates: One or two, the peer's own first.
    """

    certificates: tuple[Certificate, ...]

    @property
    def leaf(self) -> Certificate:
        return self.certificates[0]

    @property
    def inviter(self) -> Certificate | None:
        """The certificate of the inviter that issued the leaf, or None for the cluster key."""
        return self.certificates[1] if len(self.certificates) > 1 else None

    @property
    def peer(self) -> PeerId:
        return self.leaf.peer

    @property
    def rights(self) -> frozenset[str]:
        return self.leaf.rights

    @property
    def labels(self) -> Mapping[str, str]:
        return self.leaf.labels

    @property
    def not_after_ms(self) -> int:
        """Of the leaf; an inviter's own ends no earlier."""
        return self.leaf.not_after_ms

    @cached_property
    def encoded(self) -> bytes:
        return cbor.encode(
            {"v": VERSION, "c": [[c.payload, c.signature] for c in self.certificates]}
        )

    @classmethod
    def decode(cls, encoded: bytes) -> Chain:
        """Check the form; no signature. Raises AdmissionRefused."""
        value = _decode(encoded, CHAIN_BYTES_MAX, "a chain")
        _check_version(value, "a chain")
        _check_keys(value, "v", "c")
        pairs = _take(value["c"], list, "'c'")
        if not 1 <= len(pairs) <= 2 or not all(
            type(pair) is list and [type(part) for part in pair] == [bytes, bytes] for pair in pairs
        ):
            raise _malformed("a chain is one or two certificates with their signatures")
        chain = cls(tuple(Certificate.open(payload, signature) for payload, signature in pairs))
        if chain.encoded != encoded:
            raise _malformed("not the encoding that chains have")
        return chain

    @classmethod
    def open(cls, encoded: bytes, founding: Founding) -> Chain:
        """Check everything but the time: form, cluster, signatures, who may grant what.

        Raises AdmissionRefused.
        """
        chain = cls.decode(encoded)
        cluster, root = founding.cluster_id, founding.issuer
        if any(certificate.cluster != cluster for certificate in chain.certificates):
            raise refusal(
                "cluster",
                f"the certificate is of cluster {chain.leaf.cluster[:12]}…, not of {cluster[:12]}…",
            )
        leaf, inviter = chain.leaf, chain.inviter
        if chain.certificates[-1].issuer != root or (
            inviter is not None and leaf.issuer != inviter.peer
        ):
            raise refusal("issuer", "the certificate does not lead to the cluster's key")
        if inviter is not None:
            if INVITE not in inviter.rights:
                raise refusal("not_allowed", f"{inviter.peer} may not certify anybody")
            if leaf.rights != {MEMBER}:
                raise refusal("not_allowed", "an inviter grants membership and nothing else")
            if leaf.not_after_ms > inviter.not_after_ms:
                raise refusal("not_allowed", "the certificate outlives that of its inviter")
        if not all(certificate.is_signed for certificate in reversed(chain.certificates)):
            raise refusal("signature", "the signature of a certificate is wrong")
        return chain

    def judge_time(self, now_ms: float, skew_ms: float) -> None:
        """Raise AdmissionRefused if one of the certificates is not valid now."""
        for certificate in self.certificates:
            certificate.judge_time(now_ms, skew_ms)

    def is_newer(self, than: Chain) -> bool:
        """Whether it was issued later: what an issuer said last counts."""
        mine, other = self.leaf, than.leaf
        return (mine.not_before_ms, mine.not_after_ms) > (other.not_before_ms, other.not_after_ms)


# --- facts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tombstone(Statement):
    """The end of a membership: whatever the peer has, it is not let in.

    By the cluster key it holds for everybody. By an inviter it holds for peers without the right
    `invite`, and only while the inviter itself is not evicted. It is kept until `not_after_ms`:
    nothing that the peer had lasts longer.

    Attributes:
        chain: The inviter's own chain; None for the cluster key.
        reason: For people.
        at_ms: Unix time, ms.
    """

    what = "a tombstone"
    domain = b"wetware-tombstone:1\n"
    bytes_max = TOMBSTONE_BYTES_MAX
    carried = {  # noqa: RUF012 - a ClassVar of Statement
        **Statement.carried,
        "chain": _Carried(
            "chain",
            bytes,
            lambda data: Chain.decode(data) if data else None,
            lambda chain: b"" if chain is None else chain.encoded,
        ),
        "reason": _Carried("reason", str, _read_reason),
        "at_ms": _Carried("at", int, _read_time),
    }

    chain: Chain | None
    reason: str
    at_ms: int

    def check_life(self) -> None:
        if not self.at_ms < self.not_after_ms <= self.at_ms + 3 * LIFE_S_MAX * 1000:
            raise ValueError("it ends before it begins, or never")

    @cached_property
    def encoded(self) -> bytes:
        return cbor.encode({"k": "tombstone", "p": self.payload, "s": self.signature})

    def check(self, founding: Founding) -> None:
        """Check cluster, issuer and signature; raises AdmissionRefused.

        The inviter's certificate has to have been valid at the time that the tombstone names: a
        tombstone outlives the certificate of who made it.
        """
        if self.cluster != founding.cluster_id:
            raise refusal("cluster", "the tombstone is of another cluster")
        if self.chain is None:
            if self.issuer != founding.issuer:
                raise refusal("issuer", "the tombstone does not lead to the cluster's key")
        else:
            chain = Chain.open(self.chain.encoded, founding)
            if chain.peer != self.issuer or INVITE not in chain.rights:
                raise refusal("not_allowed", f"{self.issuer} may not evict anybody")
            chain.judge_time(self.at_ms, _TOMBSTONE_SKEW_MS)
        if not self.is_signed:
            raise refusal("signature", "the signature of a tombstone is wrong")


@dataclass(frozen=True)
class ForeignFact:
    """The certificate of a foreign peer, as a fact that every member has."""

    chain: Chain

    @property
    def peer(self) -> PeerId:
        return self.chain.peer

    @property
    def issuer(self) -> PeerId:
        return self.chain.leaf.issuer

    @property
    def not_after_ms(self) -> int:
        return self.chain.not_after_ms

    @cached_property
    def encoded(self) -> bytes:
        return cbor.encode({"k": "foreign", "c": self.chain.encoded})

    def check(self, founding: Founding) -> None:
        """Check signatures and form; raises AdmissionRefused."""
        Chain.open(self.chain.encoded, founding)


Fact = Tombstone | ForeignFact


def fact_digest(encoded: bytes) -> bytes:
    """16 bytes that name a fact."""
    return hashlib.sha256(encoded).digest()[:16]


def decode_fact(encoded: bytes) -> Fact:
    """Check the form of a fact, not its signatures. Raises AdmissionRefused."""
    value = _decode(encoded, FACT_BYTES_MAX, "a fact")
    fact: Fact
    match value.get("k"):
        case "tombstone":
            _check_keys(value, "k", "p", "s")
            fact = Tombstone.open(_take(value["p"], bytes, "'p'"), _take(value["s"], bytes, "'s'"))
        case "foreign":
            _check_keys(value, "k", "c")
            fact = ForeignFact(Chain.decode(_take(value["c"], bytes, "'c'")))
            if not fact.chain.leaf.foreign:
                raise refusal("not_allowed", "the certificate is not one of a foreign peer")
        case kind:
            raise _unknown(f"a fact of the kind {str(kind)[:40]!r}")
    if fact.encoded != encoded:
        raise _malformed("not the encoding that facts have")
    return fact
