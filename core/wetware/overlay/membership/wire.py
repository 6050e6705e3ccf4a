"""The bytes of a membership frame: one CBOR map with short keys; what is many is packed.

What a frame may hold:

    k  kind                          n  sequence number of a probe
    i  node that is meant            u  Unix ms of the sender
    d  entries: node, incarnation, revision, state (45 bytes each): "I know this version of it"
    c  claims: node, incarnation, accuser, state (73 bytes each): "it does not answer"
    f  digests of facts (16 bytes each): "I have this fact"
    l h  the range of keys, from `l` up to but without `h`, that a digest covers; empty: no bound
    w  nodes whose record is wanted (32 bytes each)
    g  digests of facts that are wanted
    r  records   b  facts   z  this ends the answer to what was asked

A node is named by its raw Ed25519 key. Entries, claims and digests announce; who lacks what they
announce asks for it, so that a record crosses each node's wire about once, however many tell of it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from wetware.base import cbor
from wetware.errors import InvalidArgument
from wetware.overlay.membership.record import INCARNATION_MAX, RECORD_BYTES_MAX, Malformed

KEY_BYTES: Final = 32
DIGEST_BYTES: Final = 16
ENTRY: Final = struct.Struct(">32sQIB")
CLAIM: Final = struct.Struct(">32sQ32sB")
SEQ_MAX: Final = (1 << 53) - 1

ALIVE, SUSPECT, DEAD, LEFT = range(4)
"""The states, as on the wire."""


class Kind(IntEnum):
    """What a frame is for."""

    PING = 1
    ACK = 2
    NACK = 3
    PING_REQ = 4
    GOSSIP = 5
    SYNC = 6
    WANT = 7
    HAVE = 8


_NO_ENTRIES: Final[list[tuple[bytes, int, int, int]]] = []
_NO_CLAIMS: Final[list[tuple[bytes, int, bytes, int]]] = []
_NO_BYTES: Final[list[bytes]] = []


@dataclass(slots=True)
class Frame:
    """A decoded frame, checked: packed fields have whole items, everything is within bounds."""

    kind: Kind
    seq: int
    node: bytes
    unix_ms: int | None
    entries: list[tuple[bytes, int, int, int]]
    claims: list[tuple[bytes, int, bytes, int]]
    facts: list[bytes]
    done: bool
    low: bytes = b""
    high: bytes = b""
    covers_facts: bool = False
    wants: list[bytes] = field(default_factory=lambda: _NO_BYTES)
    fact_wants: list[bytes] = field(default_factory=lambda: _NO_BYTES)
    records: list[bytes] = field(default_factory=lambda: _NO_BYTES)
    blobs: list[bytes] = field(default_factory=lambda: _NO_BYTES)


def _packed(value: Any, size: int) -> list[bytes]:
    if type(value) is not bytes or len(value) % size:
        raise Malformed("a frame's list has not whole items")
    return [value[at : at + size] for at in range(0, len(value), size)]


def _bytes_list(value: Any, bytes_max: int) -> list[bytes]:
    if type(value) is not list:
        raise Malformed("a frame's list is none")
    for item in value:
        if type(item) is not bytes or len(item) > bytes_max:
            raise Malformed(f"a frame's item is not at most {bytes_max} bytes")
    return value


def _key(value: Any) -> bytes:
    if type(value) is not bytes or len(value) not in (0, DIGEST_BYTES, KEY_BYTES):
        raise Malformed("a frame's key has the wrong size")
    return value


_KINDS: Final = {int(kind): kind for kind in Kind}
_PROBES: Final = frozenset((Kind.PING, Kind.ACK, Kind.NACK, Kind.PING_REQ))


def digest_of(fact: bytes) -> bytes:
    """What a fact is announced by."""
    return hashlib.sha256(fact).digest()[:DIGEST_BYTES]


def encode(fields: dict[str, Any]) -> bytes:
    """The bytes of a frame."""
    return cbor.encode(fields)


def decode(data: bytes, *, bytes_max: int, fact_bytes_max: int) -> Frame:
    """Read a frame; raises Malformed. Keys that are not known are for later versions."""
    try:
        fields = cbor.decode(data, bytes_max=bytes_max)
    except InvalidArgument as exc:
        raise Malformed(f"a frame is malformed: {exc.message}") from None
    if type(fields) is not dict:
        raise Malformed("a frame is a map")
    get = fields.get
    number = get("k")
    kind = _KINDS.get(number) if type(number) is int else None
    if kind is None:
        raise Malformed("a frame of an unknown kind")
    seq = get("n", 0)
    if type(seq) is not int or not 0 <= seq <= SEQ_MAX or (kind in _PROBES and "n" not in fields):
        raise Malformed("a frame's number is out of range")
    node = get("i", b"")
    if type(node) is not bytes or len(node) not in (0, KEY_BYTES):
        raise Malformed("a frame's node is not a key")
    if kind is Kind.PING_REQ and not node:
        raise Malformed("a probe on behalf of nobody")
    unix_ms = get("u")
    if unix_ms is not None and (type(unix_ms) is not int or not 0 <= unix_ms <= SEQ_MAX):
        raise Malformed("a frame's time is out of range")
    entries, claims = _NO_ENTRIES, _NO_CLAIMS
    if (packed := get("d")) is not None:
        if type(packed) is not bytes or len(packed) % ENTRY.size:
            raise Malformed("a frame's entries are not whole")
        entries = list(ENTRY.iter_unpack(packed))
        for _, incarnation, _, state in entries:
            if state > LEFT or incarnation > INCARNATION_MAX:
                raise Malformed("a frame's entry is out of range")
    if (packed := get("c")) is not None:
        if type(packed) is not bytes or len(packed) % CLAIM.size:
            raise Malformed("a frame's claims are not whole")
        claims = list(CLAIM.iter_unpack(packed))
        for _, incarnation, _, state in claims:
            if state not in (SUSPECT, DEAD) or incarnation > INCARNATION_MAX:
                raise Malformed("a frame's claim is out of range")
    done = get("z", False)
    if type(done) is not bool:
        raise Malformed("a frame's end is true or false")
    facts = _packed(get("f"), DIGEST_BYTES) if "f" in fields else _NO_BYTES
    frame = Frame(kind, seq, node, unix_ms, entries, claims, facts, done)
    if kind not in _PROBES:  # those are the common case, and hold no more than rumours
        frame.low, frame.high = _key(get("l", b"")), _key(get("h", b""))
        frame.covers_facts = "d" not in fields and "f" in fields
        frame.wants = _packed(get("w", b""), KEY_BYTES)
        frame.fact_wants = _packed(get("g", b""), DIGEST_BYTES)
        frame.records = _bytes_list(get("r", []), RECORD_BYTES_MAX)
        frame.blobs = _bytes_list(get("b", []), fact_bytes_max)
    return frame
