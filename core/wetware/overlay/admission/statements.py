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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar

from wetware.base import cbor
from wetware.errors import AdmissionRefused, InvalidArgument
from wetware.identity import Key, PeerId, verify
from wetware.overlay.admission.limits import LIFE_S_MAX

T = TypeVar("T")

MEMBER, INVITE = "member", "invite"
RIGHTS: Final = frozenset({MEMBER, INVITE})

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
_CERTIFICATE_DOMAIN = b"wetware-certificate:1\n"
_TOMBSTONE_DOMAIN = b"wetware-tombstone:1\n"


def refusal(why: str, message: str, hint: str = "") -> AdmissionRefused:
    """An AdmissionRefused with the code `admission.<why>`."""
    return AdmissionRefused(message, hint=hint, code=f"admission.{why}")


def _malformed(what: str) -> AdmissionRefused:
    return refusal("malformed", f"malformed: {what}")


def _decode(data: bytes, bytes_max: int, what: str) -> dict[str, Any]:
    if type(data) is not bytes:
        raise _malformed(f"{what} is not bytes")
    try:
        value = cbor.decode(data, bytes_max=bytes_max)
    except InvalidArgument as exc:
        raise _malformed(f"{what}: {exc.message}") from None
    if type(value) is not dict:
        raise _malformed(f"{what} is not a map")
    return value


def _take(value: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """A field of exactly this type: True is no number here."""
    found = value.get(key)
    if type(found) is not kind:
        raise _malformed(f"{key!r} is not of type {kind.__name__}")
    return found


def _take_ticket(value: Mapping[str, Any]) -> bytes:
    ticket = _take(value, "ticket", bytes)
    if len(ticket) not in (0, TICKET_BYTES):
        raise _malformed("the name of a ticket has a wrong length")
    return ticket


def _check_keys(value: Mapping[str, Any], keys: Iterable[str]) -> None:
    if value.keys() != set(keys):
        raise _malformed("fields that do not belong there, or missing ones")


def _check_version(value: Mapping[str, Any], what: str) -> None:
    if type(version := value.get("v")) is not int or version != VERSION:
        raise refusal(
            "version",
            f"a {what} of version {str(version)[:20]!r}, which this node does not know",
            "upgrade wetware here",
        )


def _peer(data: bytes) -> PeerId:
    try:
        return PeerId.from_multihash(data)
    except ValueError as exc:
        raise _malformed(f"a peer ID: {exc}") from None


def _time(value: Mapping[str, Any], key: str) -> int:
    at = _take(value, key, int)
    if not 0 <= at <= TIME_MS_MAX:
        raise _malformed(f"the time {key!r} is out of range")
    return at


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise InvalidArgument for labels that a certificate cannot hold."""
    if len(labels) > LABELS_MAX:
        raise InvalidArgument(f"{len(labels)} labels; at most {LABELS_MAX}")
    for key, value in labels.items():
        if type(key) is not str or not _LABEL_KEY.match(key):
            raise InvalidArgument(
                f"{str(key)[:64]!r} is not a label's name",
                hint="up to 63 letters, digits, '_', '.', '/' and '-'",
            )
        if type(value) is not str or len(value) > LABEL_VALUE_CHARS_MAX or not _printable(value):
            raise InvalidArgument(
                f"the value of label {key!r} is not at most {LABEL_VALUE_CHARS_MAX} printable "
                "characters"
            )


def _printable(text: str) -> bool:
    return not text or text.isprintable()


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


# --- certificates ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Certificate:
    """One signed statement: this peer is of this cluster, with these rights, for this long.

    Attributes:
        cluster: The cluster's ID.
        peer: Who is certified.
        rights: Of RIGHTS.
        labels: Name → value; they win over what the node says of itself.
        not_before_ms: Unix time, ms.
        not_after_ms: Unix time, ms.
        issuer: The cluster key's name, or the peer ID of an inviter.
        serial: 16 random bytes.
        foreign: Whether the peer speaks none of our protocols: the cluster knows it by this alone.
        ticket: The name of the ticket that it was given for, so that every member knows that it is
            spent; b"" if there was none.
        payload: The bytes that are signed.
        signature: 64 bytes.
    """

    cluster: str
    peer: PeerId
    rights: frozenset[str]
    labels: Mapping[str, str]
    not_before_ms: int
    not_after_ms: int
    issuer: PeerId
    serial: bytes
    foreign: bool
    ticket: bytes
    payload: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @classmethod
    def issue(
        cls,
        key: Key,
        *,
        cluster: str,
        peer: PeerId,
        rights: frozenset[str],
        labels: Mapping[str, str],
        not_before_ms: int,
        not_after_ms: int,
        foreign: bool = False,
        ticket: bytes = b"",
    ) -> Certificate:
        """Sign a new one; raises InvalidArgument where it would be too large or contradictory."""
        check_labels(labels)
        if not rights <= RIGHTS or MEMBER not in rights:
            raise InvalidArgument(f"rights are {', '.join(sorted(RIGHTS))}; {MEMBER} is one of any")
        payload = cbor.encode(
            {
                "v": VERSION,
                "cluster": bytes.fromhex(cluster),
                "peer": peer.multihash,
                "rights": sorted(rights),
                "labels": dict(sorted(labels.items())),
                "from": not_before_ms,
                "to": not_after_ms,
                "issuer": key.peer_id.multihash,
                "serial": secrets.token_bytes(SERIAL_BYTES),
                "foreign": foreign,
                "ticket": ticket,
            }
        )
        if len(payload) > CERTIFICATE_BYTES_MAX:
            raise InvalidArgument(
                f"the labels make a certificate of {len(payload)} bytes; at most "
                f"{CERTIFICATE_BYTES_MAX}",
                hint="use fewer or shorter labels",
            )
        return cls.open(payload, key.sign(_CERTIFICATE_DOMAIN + payload))

    @classmethod
    def open(cls, payload: bytes, signature: bytes) -> Certificate:
        """Decode; checks the form, not the signature. Raises AdmissionRefused."""
        value = _decode(payload, CERTIFICATE_BYTES_MAX, "a certificate")
        _check_version(value, "certificate")
        _check_keys(
            value,
            (
                *("v", "cluster", "peer", "rights", "labels"),
                *("from", "to", "issuer", "serial", "foreign", "ticket"),
            ),
        )
        cluster, serial = _take(value, "cluster", bytes), _take(value, "serial", bytes)
        ticket = _take_ticket(value)
        if len(cluster) != 20 or len(serial) != SERIAL_BYTES or len(signature) != 64:
            raise _malformed("a field of a certificate has a wrong length")
        rights, labels = _take(value, "rights", list), _take(value, "labels", dict)
        for right in rights:
            if type(right) is not str or right not in RIGHTS:
                raise refusal(
                    "right",
                    f"a certificate with the right {str(right)[:40]!r}, which this node does not "
                    "know",
                    "upgrade wetware here",
                )
        if rights != sorted(set(rights)) or MEMBER not in rights:
            raise _malformed("the rights of a certificate")
        try:
            check_labels(labels)
        except InvalidArgument as exc:
            raise _malformed(exc.message) from None
        start, end = _time(value, "from"), _time(value, "to")
        if not start < end <= start + LIFE_S_MAX * 1000:
            raise _malformed("a certificate ends before it begins, or lasts for more than a year")
        return cls(
            cluster=cluster.hex(),
            peer=_peer(_take(value, "peer", bytes)),
            rights=frozenset(rights),
            labels=labels,
            not_before_ms=start,
            not_after_ms=end,
            issuer=_peer(_take(value, "issuer", bytes)),
            serial=serial,
            foreign=_take(value, "foreign", bool),
            ticket=ticket,
            payload=payload,
            signature=signature,
        )

    def is_signed(self) -> bool:
        """Whether the issuer that it names signed it."""
        public = self.issuer.public_key
        return public is not None and verify(
            public, self.signature, _CERTIFICATE_DOMAIN + self.payload
        )

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

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.encoded).digest()

    @classmethod
    def decode(cls, encoded: bytes) -> Chain:
        """Check the form; no signature. Raises AdmissionRefused."""
        value = _decode(encoded, CHAIN_BYTES_MAX, "a chain")
        _check_version(value, "chain")
        _check_keys(value, ("v", "c"))
        pairs = _take(value, "c", list)
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
        for certificate in reversed(chain.certificates):
            if not certificate.is_signed():
                raise refusal("signature", "the signature of a certificate is wrong")
        return chain

    def judge_time(self, now_ms: float, skew_ms: float) -> None:
        """Raise AdmissionRefused if one of the certificates is not valid now."""
        for certificate in self.certificates:
            certificate.judge_time(now_ms, skew_ms)


# --- facts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tombstone:
    """The end of a membership: whatever the peer has, it is not let in.

    By the cluster key it holds for everybody. By an inviter it holds for peers without the right
    `invite`, and only while the inviter itself is not evicted.

    Attributes:
        cluster: The cluster's ID.
        peer: Who is evicted.
        issuer: The cluster key's name, or the peer ID of an inviter.
        chain: The inviter's own chain; None for the cluster key.
        reason: For people.
        ticket: The name of the ticket that let the peer in, if the issuer knows it: it lets nobody
            in any more, as its holder could give it to another key. Else b"".
        at_ms: Unix time, ms.
        not_after_ms: Until when it is kept; nothing that the peer had lasts longer.
        payload: The bytes that are signed.
        signature: 64 bytes.
    """

    cluster: str
    peer: PeerId
    issuer: PeerId
    chain: Chain | None
    reason: str
    ticket: bytes
    at_ms: int
    not_after_ms: int
    payload: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @classmethod
    def issue(
        cls,
        key: Key,
        *,
        cluster: str,
        peer: PeerId,
        chain: Chain | None,
        reason: str,
        at_ms: int,
        not_after_ms: int,
        ticket: bytes = b"",
    ) -> Tombstone:
        """Sign a new one; raises InvalidArgument for a reason that is too long or not printable."""
        if len(reason) > REASON_CHARS_MAX or not _printable(reason):
            raise InvalidArgument(f"a reason is at most {REASON_CHARS_MAX} printable characters")
        payload = cbor.encode(
            {
                "v": VERSION,
                "cluster": bytes.fromhex(cluster),
                "peer": peer.multihash,
                "issuer": key.peer_id.multihash,
                "chain": b"" if chain is None else chain.encoded,
                "reason": reason,
                "ticket": ticket,
                "at": at_ms,
                "to": not_after_ms,
            }
        )
        return cls._open(payload, key.sign(_TOMBSTONE_DOMAIN + payload))

    @classmethod
    def _open(cls, payload: bytes, signature: bytes) -> Tombstone:
        value = _decode(payload, TOMBSTONE_BYTES_MAX, "a tombstone")
        _check_version(value, "tombstone")
        _check_keys(
            value, ("v", "cluster", "peer", "issuer", "chain", "reason", "ticket", "at", "to")
        )
        chain, reason = _take(value, "chain", bytes), _take(value, "reason", str)
        cluster = _take(value, "cluster", bytes)
        if len(cluster) != 20 or len(signature) != 64:
            raise _malformed("a field of a tombstone has a wrong length")
        if len(reason) > REASON_CHARS_MAX or not _printable(reason):
            raise _malformed("the reason of a tombstone")
        start, end = _time(value, "at"), _time(value, "to")
        if not start < end <= start + 3 * LIFE_S_MAX * 1000:
            raise _malformed("a tombstone ends before it begins, or never")
        return cls(
            cluster=cluster.hex(),
            peer=_peer(_take(value, "peer", bytes)),
            issuer=_peer(_take(value, "issuer", bytes)),
            chain=Chain.decode(chain) if chain else None,
            reason=reason,
            ticket=_take_ticket(value),
            at_ms=start,
            not_after_ms=end,
            payload=payload,
            signature=signature,
        )

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
        public = self.issuer.public_key
        if public is None or not verify(public, self.signature, _TOMBSTONE_DOMAIN + self.payload):
            raise refusal("signature", "the signature of a tombstone is wrong")

    @property
    def rank(self) -> tuple[int, bytes]:
        """Of two for the same peer by the same issuer, every node keeps the greater one."""
        return self.not_after_ms, fact_digest(self.encoded)


@dataclass(frozen=True)
class ForeignFact:
    """The certificate of a foreign peer, as a fact that every member has."""

    chain: Chain

    @property
    def peer(self) -> PeerId:
        return self.chain.peer

    @cached_property
    def encoded(self) -> bytes:
        return cbor.encode({"k": "foreign", "c": self.chain.encoded})

    def check(self, founding: Founding) -> None:
        """Check signatures and form; raises AdmissionRefused."""
        Chain.open(self.chain.encoded, founding)

    @property
    def rank(self) -> tuple[int, bytes]:
        """Of two for the same peer, every node keeps the greater one."""
        return self.chain.not_after_ms, fact_digest(self.encoded)


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
            _check_keys(value, ("k", "p", "s"))
            fact = Tombstone._open(_take(value, "p", bytes), _take(value, "s", bytes))
        case "foreign":
            _check_keys(value, ("k", "c"))
            fact = ForeignFact(Chain.decode(_take(value, "c", bytes)))
            if not fact.chain.leaf.foreign:
                raise refusal("not_allowed", "the certificate is not one of a foreign peer")
        case kind:
            raise refusal(
                "version",
                f"a fact of the kind {str(kind)[:40]!r}, which this node does not know",
                "upgrade wetware here",
            )
    if fact.encoded != encoded:
        raise _malformed("not the encoding that facts have")
    return fact
