"""What a node says of itself, signed by its own key, so that anybody may pass it on.

A `Record` is carried as the bytes that its node signed: `{"p": payload, "s": signature}` in CBOR,
never encoded anew. `(incarnation, revision)` orders the records of one node; the incarnation grows
with every start and with every refuted suspicion, the revision with every change in between. The
node's admission chain is part of it, so that a record is judged without asking anybody.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from wetware.base import cbor
from wetware.errors import InvalidArgument
from wetware.identity import Key, PeerId, verify
from wetware.member import Member

if TYPE_CHECKING:
    from wetware.overlay.admission.statements import Chain

VERSION: Final = 1
RECORD_BYTES_MAX: Final = 8 << 10
"""One encoded record: a full chain (4 KiB) and as much again for what the node says of itself."""
CHAIN_BYTES_MAX: Final = 4 << 10
ADDRS_MAX: Final = 16
LABELS_MAX: Final = 32
SERVICES_MAX: Final = 64
ADDR_CHARS_MAX: Final = 256
HOST_CHARS_MAX: Final = 253  # a DNS name
NAME_CHARS_MAX: Final = 63
TEXT_CHARS_MAX: Final = 128  # a label's value, a version, a service
INSTANCE_BYTES: Final = 8
INCARNATION_MAX: Final = 1 << 62
"""Far above Unix ms, so that only the node's own key could exhaust its incarnations."""
REVISION_MAX: Final = (1 << 32) - 1
_TIME_MAX: Final = 1 << 53
_DOMAIN: Final = b"wetware membership record v1\0"
_LABEL_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}", re.ASCII)
_NONE: Final[Mapping[str, str]] = MappingProxyType({})


class Malformed(InvalidArgument):
    """What a peer sent is no frame or record of this protocol."""

    code = "invalid.membership"


class Forged(Malformed):
    """A record that its node did not sign."""

    code = "invalid.membership.forged"


@lru_cache(maxsize=8192)
def key_of(peer: PeerId) -> bytes:
    """The raw Ed25519 key that names a node on the wire; Malformed for a peer of another kind."""
    public = peer.public_key
    if public is None:
        raise Malformed(f"{peer} is not an Ed25519 peer")
    return public


@lru_cache(maxsize=8192)
def peer_of(key: bytes) -> PeerId:
    """The inverse of `key_of`."""
    return PeerId.from_public_key(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A node's own description. Make one with `sign` or `open`.

    Attributes:
        peer: Who signed it.
        incarnation: Grows with every start and every refutation; Unix ms at first.
        revision: Grows with every change within an incarnation.
        instance: Random, of the process: two processes with one key differ in it.
        issued_ms: Unix time of the signature.
        addrs: Multiaddrs under which the node can be dialled.
        host: The machine's name.
        name: The node's name.
        labels: Self-declared; those of the certificate win over them.
        version: Of the software.
        services: Names of the services that the node offers.
        load: Load of the last minute by the number of CPUs.
        memory_bytes: Memory that is available.
        chain: The encoded admission chain.
        left: Whether this is a farewell.
        encoded: What is carried.
    """

    peer: PeerId
    incarnation: int
    revision: int
    instance: bytes
    issued_ms: int
    addrs: tuple[str, ...] = ()
    host: str = ""
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: _NONE)
    version: str = ""
    services: tuple[str, ...] = ()
    load: float = 0.0
    memory_bytes: int = 0
    chain: bytes = b""
    left: bool = False
    encoded: bytes = field(default=b"", repr=False)

    @property
    def order(self) -> tuple[int, int]:
        """Which of two records of one node is newer."""
        return self.incarnation, self.revision

    @classmethod
    def sign(
        cls,
        key: Key,
        *,
        incarnation: int,
        instance: bytes,
        issued_ms: int,
        revision: int = 0,
        addrs: Sequence[str] = (),
        host: str = "",
        name: str = "",
        labels: Mapping[str, str] = _NONE,
        version: str = "",
        services: Sequence[str] = (),
        load: float = 0.0,
        memory_bytes: int = 0,
        chain: bytes = b"",
        left: bool = False,
    ) -> Record:
        """Sign a description; raises InvalidArgument if it is beyond a bound."""
        fields: dict[str, Any] = {
            "v": VERSION,
            "i": key.public,
            "n": incarnation,
            "r": revision,
            "x": instance,
            "t": issued_ms,
            "a": list(addrs),
            "h": host,
            "m": name,
            "l": dict(labels),
            "e": version,
            "s": list(services),
            "o": float(load),
            "y": memory_bytes,
            "c": chain,
            "q": left,
        }
        payload = cbor.encode(fields)
        encoded = cbor.encode({"p": payload, "s": key.sign(_DOMAIN + payload)})
        if len(encoded) > RECORD_BYTES_MAX:
            raise InvalidArgument(
                f"the node's description takes {len(encoded)} bytes, at most {RECORD_BYTES_MAX}",
                hint="give the node fewer or shorter labels, addresses or services",
            )
        return _from_payload(fields, encoded)

    @classmethod
    def parse(cls, encoded: bytes) -> Record:
        """Read a record without checking its signature; raises Malformed."""
        if type(encoded) is not bytes:
            raise Malformed("a record is bytes")
        payload, _ = _open_envelope(encoded)
        return _from_payload(_decode(payload), encoded)

    def check_chain(self, chain: Chain) -> None:
        """Raise Malformed if its admission chain, decoded, is of somebody else."""
        if chain.peer != self.peer:
            raise Malformed(f"the record of {self.peer} carries the certificate of {chain.peer}")

    def describe(self, *, state: str, labels: Mapping[str, str]) -> Member:
        """The member that says this, in a state that others see it in.

        Args:
            state: See Member.
            labels: Of its certificate: they win over those that it says.
        """
        return Member(
            peer_id=self.peer,
            name=self.name,
            host=self.host,
            state=state,
            incarnation=self.incarnation,
            addrs=self.addrs,
            labels={**self.labels, **labels},
            version=self.version,
            services=self.services,
            load=self.load,
            memory_bytes=self.memory_bytes,
            record=self.encoded,
        )

    def verify(self) -> None:
        """Check the signature; raises Forged."""
        payload, signature = _open_envelope(self.encoded)
        if not verify(key_of(self.peer), signature, _DOMAIN + payload):
            raise Forged(f"a record of {self.peer} that it did not sign")

    @classmethod
    def open(cls, encoded: bytes) -> Record:
        """Read a record and check its signature; raises Malformed, Forged."""
        record = cls.parse(encoded)
        record.verify()
        return record


def _decode(data: bytes) -> dict[str, Any]:
    try:
        value = cbor.decode(data, bytes_max=RECORD_BYTES_MAX)
    except InvalidArgument as exc:
        raise Malformed(f"a record is malformed: {exc.message}") from None
    if type(value) is not dict:
        raise Malformed("a record is a map")
    return value


def _open_envelope(encoded: bytes) -> tuple[bytes, bytes]:
    envelope = _decode(encoded)
    payload, signature = envelope.get("p"), envelope.get("s")
    if len(envelope) != 2 or type(payload) is not bytes or type(signature) is not bytes:
        raise Malformed("a record is a payload and a signature")
    if len(signature) != 64:
        raise Malformed("a signature has 64 bytes")
    if cbor.encode({"p": payload, "s": signature}) != encoded:
        raise Malformed("not the encoding that records have")  # one record has one encoding
    return payload, signature


def _int(fields: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not low <= value <= high:
        raise Malformed(f"a record's {name!r} is not a number from {low} to {high}")
    return value


def _text(value: Any, what: str, chars_max: int) -> str:
    # What is not printable (a terminal's escape sequences) is not shown to anybody either.
    if type(value) is not str or len(value) > chars_max or not value.isprintable():
        raise Malformed(f"a record's {what} is not at most {chars_max} printable characters")
    return value


def _texts(value: Any, what: str, count_max: int, chars_max: int) -> tuple[str, ...]:
    if type(value) is not list or len(value) > count_max:
        raise Malformed(f"a record's {what} are not a list of at most {count_max}")
    return tuple([_text(item, what, chars_max) for item in value])


def _bytes(value: Any, what: str, low: int, high: int) -> bytes:
    if type(value) is not bytes or not low <= len(value) <= high:
        raise Malformed(f"a record's {what} has not {low} to {high} bytes")
    return value


def _labels(value: Any) -> Mapping[str, str]:
    if type(value) is not dict or len(value) > LABELS_MAX:
        raise Malformed(f"a record's labels are not a map of at most {LABELS_MAX}")
    for key, text in value.items():
        if not _LABEL_KEY.fullmatch(key):
            raise Malformed("a label's key is letters, digits and ._/-, at most 63")
        _text(text, "label", TEXT_CHARS_MAX)
    return MappingProxyType(value)


def _from_payload(fields: dict[str, Any], encoded: bytes) -> Record:
    """The record of a decoded payload; unknown keys are for later versions and are ignored."""
    if fields.get("v") != VERSION:
        raise Malformed("a record of an unknown version")
    load, left = fields.get("o"), fields.get("q")
    if type(load) is not float or not math.isfinite(load) or not 0 <= load <= 1e6:
        raise Malformed("a record's load is not a number from 0 to 1000000")
    if type(left) is not bool:
        raise Malformed("a record's farewell is true or false")
    return Record(
        peer=peer_of(_bytes(fields.get("i"), "key", 32, 32)),
        incarnation=_int(fields, "n", 0, INCARNATION_MAX),
        revision=_int(fields, "r", 0, REVISION_MAX),
        instance=_bytes(fields.get("x"), "instance", INSTANCE_BYTES, INSTANCE_BYTES),
        issued_ms=_int(fields, "t", 0, _TIME_MAX),
        addrs=_texts(fields.get("a"), "addresses", ADDRS_MAX, ADDR_CHARS_MAX),
        host=_text(fields.get("h"), "host", HOST_CHARS_MAX),
        name=_text(fields.get("m"), "name", NAME_CHARS_MAX),
        labels=_labels(fields.get("l")),
        version=_text(fields.get("e"), "version", TEXT_CHARS_MAX),
        services=_texts(fields.get("s"), "services", SERVICES_MAX, TEXT_CHARS_MAX),
        load=load,
        memory_bytes=_int(fields, "y", 0, (1 << 63) - 1),
        chain=_bytes(fields.get("c"), "chain", 0, CHAIN_BYTES_MAX),
        left=left,
        encoded=encoded,
    )
