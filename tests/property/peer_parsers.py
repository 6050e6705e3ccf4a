"""Every parser of what a peer sends, or of text that somebody else wrote: the table for the fuzz.

Each has valid encodings, which are what the mutants are made of, and the errors that it documents.
What is signed or has a checksum is signed again after it was changed, so that what is behind the
check is reached: whoever sends it may hold the key.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from wetware import rpc
from wetware.base import cbor
from wetware.base.multiaddr import Multiaddr
from wetware.broker.backend import compare
from wetware.broker.fences import FENCE_BYTES_MAX, Fence
from wetware.broker.glob import glob
from wetware.broker.methods import patterns_of
from wetware.broker.sturdy import SturdyRef
from wetware.broker.terms import Terms
from wetware.broker.values import Rate, parse_duration, parse_size
from wetware.broker.where import Where
from wetware.client.cluster import _shown
from wetware.errors import (
    AdmissionRefused,
    AuthError,
    InvalidArgument,
    OverlayError,
    ProtocolRefused,
    StreamReset,
    from_wire,
)
from wetware.identity import (
    CHALLENGE_BYTES_MAX,
    Challenge,
    Channel,
    Key,
    PeerId,
    Principal,
    Proof,
    from_hex,
)
from wetware.identity.peer_id import base58_decode
from wetware.member import Member
from wetware.overlay import frames
from wetware.overlay.admission.exchange import raise_refusal
from wetware.overlay.admission.statements import (
    VERSION,
    Certificate,
    Chain,
    ForeignFact,
    Founding,
    Tombstone,
    decode_fact,
)
from wetware.overlay.admission.texts import Bundle, Ticket, parse_join
from wetware.overlay.link import LinkLimits, Violation
from wetware.overlay.link.multistream import HELLO, LineReader, Proposer, Responder, encode_line
from wetware.overlay.link.noise import (
    HANDSHAKE_BYTES_MAX,
    NoiseHandshake,
    NoiseIdentity,
    _field,
    protobuf_fields,
    verify_identity,
)
from wetware.overlay.link.relaying import read_target
from wetware.overlay.link.yamux import Session, Totals
from wetware.overlay.membership import wire as membership_wire
from wetware.overlay.membership.dial_back import parse_question
from wetware.overlay.membership.proof import encode_founding, prove
from wetware.overlay.membership.record import RECORD_BYTES_MAX, Malformed, Record, key_of
from wetware.overlay.membership.selector import Selector
from wetware.overlay.punching import public_addr
from wetware.rpc.framing import FramingError, message_bytes, message_head
from wetware.rpc.transport import RpcTransport
from wetware.rpc.wire import from_kj
from wetware_audit import chain as audit_chain
from wetware_audit import held
from wetware_audit.chain import Checkpoint, continues, seq_of
from wetware_audit.client import parse_record
from wetware_audit.spread import Checkpoints
from wetware_audit.verify import _header
from wetware_auth_local.policy import DOCUMENT_BYTES_MAX, DOMAIN, Policy, Signed, User
from wetware_auth_local.spread import Claim, Misbehaviour
from wetware_blob.exchange import wire as blob_wire
from wetware_blob.format import dagpb
from wetware_blob.format import read as blob_read
from wetware_blob.format.build import V1_2025, Entry, FileTree, directory
from wetware_blob.format.car import Reader, header, section
from wetware_blob.format.cid import DAG_PB, RAW, BadBlock, Block, Cid
from wetware_mdns import records as mdns
from wetware_pubsub import frames as pubsub_frames
from wetware_pubsub import wire as pubsub
from wetware_pubsub.client import _batch

from .test_membership_frames import CONFIG, Node, record
from .test_rpc_values import Zoo, schema

NOW_MS = 1_800_000_000_000
KEY, OTHER, THIRD = (Key.from_seed(bytes([n]) * 32) for n in range(3))
PEER = KEY.peer_id
FRAME = pubsub_frames.encode(
    Principal("local", "ada"), 1.5, *rpc.packed.pack([b"one", b"", b"three"])
)
FOUNDING = Founding(KEY.public, "local", b"operator")
HOST = "ec2-203-0-113-25.compute-1.amazonaws.com"
ADDRS = tuple(
    Multiaddr.parse(text)
    for text in ("/ip4/192.0.2.1/tcp/4001", "/ip6/2001:db8::1/tcp/4001", f"/dns4/{HOST}/tcp/4001")
)


@dataclass(frozen=True)
class Parser:
    """One parser.

    Attributes:
        name: Unique.
        parse: Takes the bytes that came; returns if they are used.
        seeds: Valid encodings.
        refuses: What it raises for what it does not take.
        bytes_max: The longest input that reaches it, about.
        form: "cbor", "json": mutants are made of the decoded value, too. "text": UTF-8.
        grow: Encodings of about so many bytes, as deep inside as anybody gets.
    """

    name: str
    parse: Callable[[bytes], object]
    seeds: Sequence[bytes]
    refuses: tuple[type[Exception], ...] = ()
    bytes_max: int = 4096
    form: str = ""
    grow: Sequence[Callable[[int], bytes]] = ()

    def __str__(self) -> str:
        return self.name


def text_of(data: bytes) -> str:
    """As a decoder of texts gives it."""
    return data.decode("utf-8", "replace")


def texts(*values: str) -> tuple[bytes, ...]:
    """As seeds."""
    return tuple(value.encode() for value in values)


def on_text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    """A parser of text."""
    return lambda data: parse(text_of(data))


def on_json(parse: Callable[[Any], object]) -> Callable[[bytes], object]:
    """A parser of what JSON decodes to."""

    def run(data: bytes) -> object:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return parse(value)

    return run


def as_json(*values: object) -> tuple[bytes, ...]:
    """As seeds."""
    return tuple(json.dumps(value, separators=(",", ":")).encode() for value in values)


def on_cbor(parse: Callable[[Any], object]) -> Callable[[bytes], object]:
    """A parser of what CBOR decodes to."""
    return lambda data: parse(cbor.decode(data, bytes_max=1 << 20))


class Received:
    """A stream of which everything has arrived."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    peer = PEER

    async def write(self, data: bytes) -> None: ...

    async def read_exactly(self, n: int) -> bytes:
        data = self._data[self._at : self._at + n]
        self._at += n
        if len(data) < n:
            raise asyncio.IncompleteReadError(data, n)
        return data


def done(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def framed(data: bytes) -> bytes:
    """With four bytes of length."""
    return len(data).to_bytes(4, "big") + data


def repeated(head: bytes, item: bytes, tail: bytes = b"") -> Callable[[int], bytes]:
    """Of about `n` bytes: as many items as fit."""
    return lambda n: head + item * max((n - len(head) - len(tail)) // len(item), 0) + tail


# --- the base: addresses, peer IDs, CBOR, texts ---------------------------------------------------


def checked_text(parse: Callable[[str], object], prefix: str) -> Callable[[bytes], object]:
    """A parser of a text, of which the CBOR inside was changed: the checksum fits again."""

    def run(payload: bytes) -> object:
        data = payload + hashlib.sha256(payload).digest()[:4]
        return parse(prefix + base64.urlsafe_b64encode(data).decode().rstrip("="))

    return run


def payload_of(text: str) -> bytes:
    """The CBOR inside a text."""
    body = text.removeprefix("ww1").removeprefix("wwt1").removeprefix("wwc1")
    return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))[:-4]


REF = SturdyRef(PEER, tuple(a.with_peer(PEER) for a in ADDRS), "00112233445566ff", bytes(32))
TICKET = Ticket(FOUNDING, PEER, ADDRS, bytes(32), NOW_MS)


def certificate(key: Key, peer: Key, *rights: str, foreign: bool = False) -> Certificate:
    return Certificate(
        cluster=FOUNDING.cluster_id,
        peer=peer.peer_id,
        rights=frozenset(rights),
        labels={"zone": "home", "k8s.io/role": "x"},
        not_before_ms=NOW_MS,
        not_after_ms=NOW_MS + 1000,
        foreign=foreign,
    ).signed(key)


INVITER = Chain((certificate(KEY, OTHER, "member", "invite"),))
CHAIN = Chain((certificate(OTHER, THIRD, "member"), INVITER.leaf))
BUNDLE = Bundle(FOUNDING, CHAIN, ADDRS)
TOMBSTONE = Tombstone(
    cluster=FOUNDING.cluster_id,
    peer=THIRD.peer_id,
    chain=INVITER,
    reason="lost",
    at_ms=NOW_MS,
    not_after_ms=NOW_MS + 10,
).signed(OTHER)
FOREIGN = ForeignFact(Chain((certificate(KEY, THIRD, "member", foreign=True),)))


def _lib_addr(data: bytes) -> object:
    """An address as libp2p hands it on."""
    from multiaddr import Multiaddr as LibAddr

    from wetware.overlay.libp2p._adapter import to_link_addr

    try:
        addr = LibAddr(data)
    except Exception:  # the library's own affair: the guest is supervised
        return None
    return to_link_addr(addr)


def _lib_seeds() -> list[bytes]:
    from multiaddr import Multiaddr as LibAddr

    return [LibAddr(str(addr.with_peer(PEER))).to_bytes() for addr in ADDRS]


BASE = [
    Parser(
        "multiaddr",
        on_text(Multiaddr.parse),
        texts(
            *(str(a) for a in ADDRS),
            *(str(a.with_peer(PEER)) for a in ADDRS),
            *(str(a.with_peer(PEER).through(OTHER.peer_id)) for a in ADDRS),
        ),
        (InvalidArgument,),
        600,
        "text",
    ),
    Parser("libp2p's multiaddr", _lib_addr, _lib_seeds(), (), 1024),
    Parser(
        "peer ID",
        on_text(PeerId.parse),
        texts(PEER, OTHER.peer_id),
        (InvalidArgument,),
        600,
        "text",
    ),
    Parser("peer ID, binary", PeerId.from_multihash, [PEER.multihash], (ValueError,), 600),
    Parser("base58", on_text(base58_decode), texts(PEER), (ValueError,), 2048, "text"),
    Parser("hex", on_text(from_hex), texts("00ff" * 8), (ValueError,), 1 << 16, "text"),
    Parser(
        "CBOR",
        partial(cbor.decode, bytes_max=64 << 10),
        [CHAIN.encoded, cbor.encode([1, -1, 0.5, None, True, "a", b"b", {"a": [[[]]]}])],
        (InvalidArgument,),
        64 << 10,
        "cbor",
        [
            lambda n: cbor.encode([0] * n),
            lambda n: cbor.encode({f"{i:06}": i for i in range(n // 10)}),
            lambda n: cbor.encode("a" * n),
            repeated(b"", b"\x81"),
            repeated(b"", b"\xc1"),
            repeated(b"\x9f", b"\x9f"),
        ],
    ),
    Parser(
        "reference",
        checked_text(SturdyRef.parse, "ww1"),
        [payload_of(REF.text)],
        (InvalidArgument,),
        12 << 10,
        "cbor",
    ),
    Parser(
        "reference, as text",
        on_text(SturdyRef.parse),
        texts(REF.text),
        (InvalidArgument,),
        20 << 10,
        "text",
    ),
    Parser(
        "ticket",
        checked_text(Ticket.parse, "wwt1"),
        [payload_of(TICKET.text)],
        (InvalidArgument,),
        12 << 10,
        "cbor",
    ),
    Parser(
        "bundle",
        checked_text(Bundle.parse, "wwc1"),
        [payload_of(BUNDLE.text)],
        (InvalidArgument,),
        12 << 10,
        "cbor",
    ),
    Parser(
        "--join",
        on_text(parse_join),
        texts(TICKET.text, BUNDLE.text),
        (InvalidArgument,),
        20 << 10,
        "text",
    ),
    Parser(
        "error code",
        on_text(lambda text: from_wire(text, "")),
        texts("admission.refused", "capability.revoked.x"),
        (),
        400,
        "text",
        [repeated(b"", b"a."), repeated(b"", b".")],
    ),
]

# --- admission ------------------------------------------------------------------------------------


def _resigned(parse: Callable[[bytes], object], domain: bytes, key: Key, wrap: Any) -> Any:
    """A parser of a statement, of which the payload was changed by who can sign it."""
    return lambda payload: parse(wrap(payload, key.sign(domain + payload)))


def _refused_by_peer(message: Any) -> None:
    if isinstance(message, dict):
        with contextlib.suppress(AdmissionRefused):  # that is what it says
            raise_refusal(message)


def _admission_frame(data: bytes) -> object:
    message = done(frames.read_frame(Received(data), bytes_max=8192))  # type: ignore[arg-type]
    return frames.field(message, "chain", bytes_max=4096)


ADMISSION = [
    Parser(
        "certificate",
        _resigned(
            lambda encoded: Chain.open(encoded, FOUNDING).judge_time(NOW_MS, 0),
            b"wetware-certificate:1\n",
            KEY,
            lambda payload, signature: cbor.encode({"v": VERSION, "c": [[payload, signature]]}),
        ),
        [INVITER.leaf.payload],
        (AdmissionRefused,),
        3000,
        "cbor",
    ),
    Parser(
        "chain",
        lambda data: Chain.open(data, FOUNDING),
        [CHAIN.encoded, INVITER.encoded],
        (AdmissionRefused,),
        5000,
        "cbor",
    ),
    Parser(
        "fact",
        lambda data: decode_fact(data).check(FOUNDING),
        [TOMBSTONE.encoded, FOREIGN.encoded],
        (AdmissionRefused,),
        7000,
        "cbor",
    ),
    Parser(
        "tombstone",
        _resigned(
            lambda encoded: decode_fact(encoded).check(FOUNDING),
            b"wetware-tombstone:1\n",
            OTHER,
            lambda payload, signature: cbor.encode(
                {"k": "tombstone", "p": payload, "s": signature}
            ),
        ),
        [TOMBSTONE.payload],
        (AdmissionRefused,),
        7000,
        "cbor",
    ),
    Parser(
        "admission frame",
        _admission_frame,
        [framed(cbor.encode({"v": 1, "chain": CHAIN.encoded}))],
        (InvalidArgument, EOFError),
        10_000,
    ),
    Parser(
        "admission refusal",
        on_cbor(_refused_by_peer),
        [cbor.encode({"code": "admission.void", "message": "gone", "hint": "join again"})],
        (InvalidArgument,),
        8192,
        "cbor",
    ),
]

# --- membership -----------------------------------------------------------------------------------

RECORD = Record.sign(
    KEY,
    incarnation=1,
    instance=bytes(8),
    issued_ms=NOW_MS,
    addrs=[str(addr) for addr in ADDRS],
    host="db1",
    name="büro",
    labels={"zone": "home", "k8s.io/role": "x"},
    version="0.1.0",
    services=["pubsub", "blob"],
    chain=CHAIN.encoded,
)
RECORD_PAYLOAD = cbor.decode(RECORD.encoded, bytes_max=RECORD_BYTES_MAX)["p"]
MEMBERS = [key_of(Key.from_seed(bytes([n]) * 32).peer_id) for n in range(8)]
FRAMES = [
    cbor.encode(
        {"k": 1, "n": 7, "u": NOW_MS, "d": membership_wire.ENTRY.pack(MEMBERS[1], 1, 0, 0)}
    ),
    cbor.encode({"k": 4, "n": 7, "i": MEMBERS[2]}),
    cbor.encode({"k": 5, "c": membership_wire.CLAIM.pack(MEMBERS[1], 1, MEMBERS[2], 1)}),
    cbor.encode({"k": 6, "d": b"", "f": bytes(32), "l": b"", "h": MEMBERS[3]}),
    cbor.encode({"k": 7, "w": b"".join(MEMBERS[:3]), "g": bytes(16)}),
    cbor.encode({"k": 8, "r": [record(n).encoded for n in (1, 2)], "b": [b"x"], "z": True}),
]


def _packed(kind: int, key: str, item: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """A frame that is full of one kind of item, no two of them alike."""
    size = len(item(0))
    return lambda n: cbor.encode(
        {"k": kind, "n": 7, key: b"".join(item(i) for i in range(n // size))}
    )


def _member(i: int) -> bytes:
    return hashlib.sha256(b"%d" % i).digest()


FULL_FRAMES = [
    _packed(5, "d", lambda i: membership_wire.ENTRY.pack(_member(i), 1, 0, 0)),
    _packed(6, "d", lambda i: membership_wire.ENTRY.pack(_member(i), 1, 0, 0)),
    _packed(5, "c", lambda i: membership_wire.CLAIM.pack(_member(i), 1, MEMBERS[2], 1)),
    _packed(5, "c", lambda i: membership_wire.CLAIM.pack(MEMBERS[1], 1, _member(i), 1)),
    _packed(7, "w", _member),
    _packed(7, "w", lambda i: MEMBERS[i % 3]),
    _packed(7, "g", lambda i: _member(i)[:16]),
    _packed(5, "f", lambda i: _member(i)[:16]),
    _packed(6, "f", lambda i: _member(i)[:16]),
    lambda n: cbor.encode({"k": 8, "r": [record(1).encoded] * (n // 250)}),
    lambda n: cbor.encode({"k": 8, "b": [_member(i)[:16] for i in range(n // 17)]}),
]


def _swim(data: bytes) -> object:
    return Node().feed(data)


MEMBER = Record.sign(
    THIRD, incarnation=1, instance=bytes(8), issued_ms=NOW_MS, name="db1", chain=CHAIN.encoded
)


def _proven(value: Any) -> object:
    """A member, as a node that may lie answers a client; the member may lie as well."""
    if not (isinstance(value, list) and [type(v) for v in value] == [bytes, bytes, str]):
        return None
    payload, founding, selector = value
    signature = THIRD.sign(b"wetware membership record v1\0" + payload)
    return prove(
        cbor.encode({"p": payload, "s": signature}),
        founding,
        cluster=FOUNDING.cluster_id,
        selector=selector,
        state="alive",
        now_s=NOW_MS / 1000,
    )


def _dial_back_question(data: bytes) -> object:
    asked = done(frames.read_frame(Received(data), bytes_max=8 << 10))  # type: ignore[arg-type]
    return parse_question(asked)


def _relay_question(data: bytes) -> object:
    return done(read_target(Received(data)))  # type: ignore[arg-type]


def _observed(data: bytes) -> object:
    return public_addr(done(frames.read_frame(Received(data), bytes_max=1024)))  # type: ignore[arg-type]


def _selected(text: str) -> object:
    found = Selector.parse(text)
    member = Member(
        PEER,
        host="a" * 253,
        name="a" * 63,
        version="0.1.0",
        labels={"zone": "a" * 128},
        services=("a" * 128,) * 64,
        state="alive",
    )
    return found.matches(member), found.names_one


MEMBERSHIP = [
    Parser(
        "record",
        _resigned(
            Record.open,
            b"wetware membership record v1\0",
            KEY,
            lambda payload, signature: cbor.encode({"p": payload, "s": signature}),
        ),
        [RECORD_PAYLOAD],
        (Malformed,),
        RECORD_BYTES_MAX + 500,
        "cbor",
    ),
    Parser(
        "record's envelope",
        Record.open,
        [RECORD.encoded],
        (Malformed,),
        RECORD_BYTES_MAX + 500,
        "cbor",
    ),
    Parser(
        "membership frame",
        partial(membership_wire.decode, bytes_max=64 << 10, fact_bytes_max=8192),
        FRAMES,
        (Malformed,),
        (64 << 10) + 500,
        "cbor",
        FULL_FRAMES,
    ),
    Parser(
        "membership frame, received", _swim, FRAMES, (), CONFIG.frame_bytes_max, "cbor", FULL_FRAMES
    ),
    Parser(
        "proof of a member",
        on_cbor(_proven),
        [
            cbor.encode(
                [
                    cbor.decode(MEMBER.encoded, bytes_max=RECORD_BYTES_MAX)["p"],
                    encode_founding(FOUNDING),
                    "name=db*",
                ]
            )
        ],
        (InvalidArgument, AdmissionRefused),
        RECORD_BYTES_MAX + 2000,
        "cbor",
    ),
    Parser(
        "dial-back request",
        _dial_back_question,
        [framed(cbor.encode({"addrs": [str(addr) for addr in ADDRS]}))],
        (InvalidArgument, EOFError),
        8 << 10,
    ),
    Parser(
        "relay's question",
        _relay_question,
        [b"\0", *(bytes([len(raw)]) + raw for raw in (PEER.multihash, OTHER.peer_id.multihash))],
        (OverlayError, EOFError),
        128,
    ),
    Parser(
        "observed address",
        _observed,
        [framed(cbor.encode({"addr": text})) for text in ("/ip4/8.8.8.8/tcp/4001",)],
        (InvalidArgument, OverlayError, EOFError),
        2048,
    ),
    Parser(
        "selector",
        on_text(_selected),
        texts(
            "zone=home,service=pubsub,host=db*",
            "state!=dead,version=0*,id=12D3*,name=[!b]*",
            "a*a*a*?[ab]",
            PEER[:9],
        ),
        (InvalidArgument,),
        2048,
        "text",
        [repeated(b"", b"a*", b"b"), repeated(b"", b"a" * 40 + b"*,"), repeated(b"[", b"a")],
    ),
]

# --- the link -------------------------------------------------------------------------------------

IDENTITY = NoiseIdentity(KEY)
EPHEMERAL = X25519PrivateKey.generate()
STATIC = IDENTITY.static.public_key().public_bytes_raw()
LOOP = asyncio.new_event_loop()
"""For what is made on a loop; it runs nothing by itself."""


def _identities() -> list[bytes]:
    """Handshake payloads of keys of every type."""
    signed = b"noise-libp2p-static-key:" + STATIC
    secp256k1, p256 = (
        ec.generate_private_key(ec.SECP256K1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    big = rsa.generate_private_key(65537, 2048)
    hashed = ec.ECDSA(hashes.SHA256())
    der = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    point = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    found = []
    for kind, public, signature in (
        (2, secp256k1.public_key().public_bytes(*point), secp256k1.sign(signed, hashed)),
        (3, p256.public_key().public_bytes(*der), p256.sign(signed, hashed)),
        (
            0,
            big.public_key().public_bytes(*der),
            big.sign(signed, padding.PKCS1v15(), hashes.SHA256()),
        ),
    ):
        key = bytes((8, kind)) + _field(2, public)
        found.append(_field(1, key) + _field(2, signature))
    return found


def _lines(data: bytes) -> object:
    reader, found = LineReader(), []
    reader.feed(data)
    while (line := reader.line()) is not None:
        found.append(line)
    return found


def _proposer(data: bytes) -> object:
    proposer = Proposer(["/a/1", "/b/1"])
    proposer.start()
    return proposer.receive(data), proposer.rest()


def _responder(data: bytes) -> object:
    responder = Responder("/a/1".__eq__, proposals_max=8)
    return responder.receive(data), responder.receive(b"x" * 10), responder.rest()


def _dialling() -> NoiseHandshake:
    """Always with the same first message, so that one answer fits."""
    handshake = NoiseHandshake(IDENTITY, initiator=True)
    handshake._ephemeral = EPHEMERAL
    return handshake


def _noise_answer() -> bytes:
    theirs = NoiseHandshake(NoiseIdentity(OTHER), initiator=False)
    theirs.read_message(_dialling().write_message())
    return theirs.write_message()


def _noise_answered(data: bytes) -> object:
    handshake = _dialling()
    handshake.write_message()
    return handshake.read_message(data)


def _yamux(data: bytes) -> object:
    accepted: list[Any] = []
    session = Session(
        SimpleNamespace(peer=PEER),  # type: ignore[arg-type]
        initiator=False,
        limits=LinkLimits(),
        totals=Totals(),
        loop=LOOP,
        on_output=lambda: None,
        on_data=lambda: None,
        on_stream=accepted.append,
        on_reset=lambda stream: None,
        on_violation=lambda exc: None,
        refused=Counter(),
    )
    session.open()
    try:
        session.feed(data)
        for stream in accepted:
            with contextlib.suppress(StreamReset):
                while stream.read_nowait():
                    pass
        return session.pull(1 << 20)
    finally:
        session.end(OSError("over"))


def yamux_frame(kind: int, flags: int, stream: int, body: bytes | int) -> bytes:
    length = body if isinstance(body, int) else len(body)
    head = struct.pack("!BBHII", 0, kind, flags, stream, length)
    return head if isinstance(body, int) else head + body


YAMUX = [
    yamux_frame(1, 1, 1, 0) + yamux_frame(0, 0, 1, b"hello" * 20) + yamux_frame(0, 4, 1, b""),
    yamux_frame(0, 1, 1, b"hi") + yamux_frame(1, 0, 1, 1000) + yamux_frame(1, 8, 1, 0),
    yamux_frame(2, 1, 0, 7) + yamux_frame(2, 2, 0, 7) + yamux_frame(1, 2, 2, 0),
    yamux_frame(3, 0, 0, 0),
]

LINK = [
    Parser(
        "multistream line",
        _lines,
        [HELLO + encode_line("/a/1"), encode_line("na")],
        (Violation,),
        64 << 10,
        grow=[repeated(b"", b"\x02a\n"), repeated(b"", b"\x01\n")],
    ),
    Parser(
        "multistream, dialled",
        _responder,
        [
            HELLO + encode_line("/a/1") + b"rest",
            HELLO + encode_line("/b/1"),
            HELLO + encode_line("x"),
        ],
        (Violation,),
        16 << 10,
    ),
    Parser(
        "multistream, dialling",
        _proposer,
        [HELLO + encode_line("/a/1") + b"rest", HELLO + encode_line("na") + encode_line("/b/1")],
        (Violation, ProtocolRefused),
        16 << 10,
    ),
    Parser(
        "protobuf",
        lambda data: list(protobuf_fields(data)),
        [IDENTITY.payload, b"\x08\x01\x11" + bytes(8) + b"\x1d" + bytes(4)],
        (Violation,),
        HANDSHAKE_BYTES_MAX,
        grow=[repeated(b"", b"\x08\x01"), repeated(b"", b"\x0a\x00"), repeated(b"\x08", b"\xff")],
    ),
    Parser(
        "noise identity",
        lambda data: verify_identity(data, STATIC),
        [IDENTITY.payload, *_identities()],
        (Violation,),
        HANDSHAKE_BYTES_MAX,
    ),
    Parser(
        "noise, dialled",
        lambda data: NoiseHandshake(IDENTITY, initiator=False).read_message(data),
        [NoiseHandshake(IDENTITY, initiator=True).write_message()],
        (Violation,),
        HANDSHAKE_BYTES_MAX,
    ),
    Parser(
        "noise, dialling",
        _noise_answered,
        [_noise_answer()],
        (Violation,),
        HANDSHAKE_BYTES_MAX,
    ),
    Parser(
        "yamux",
        _yamux,
        YAMUX,
        (Violation,),
        64 << 10,
        grow=[
            repeated(YAMUX[0][:12], yamux_frame(0, 0, 1, b"")),
            repeated(YAMUX[0][:12], yamux_frame(0, 0, 1, b"a")),
            repeated(b"", yamux_frame(2, 1, 0, 7)),
            repeated(b"", yamux_frame(1, 0, 9, 0)),
            lambda n: b"".join(yamux_frame(1, 1, 2 * i + 1, 0) for i in range(n // 12)),
        ],
    ),
]

# --- RPC ------------------------------------------------------------------------------------------


class Recorded:
    """A pipe to nobody: keeps what is sent, and gives what it was told to."""

    peer = "nobody"

    def __init__(self, data: bytes = b"") -> None:
        self._data, self.sent = data, bytearray()

    def start(self, transport: Any) -> None:
        if self._data:
            self._task = asyncio.ensure_future(self._feed(transport))

    async def _feed(self, transport: Any) -> None:
        transport.feed(self._data)
        for _ in range(20):  # until the calls have run: the end would cut them
            await asyncio.sleep(0)
        transport.feed_eof()

    def write(self, pieces: Iterable[memoryview]) -> int:
        data = b"".join(pieces)
        self.sent += data
        return len(data)

    def flush(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


def _rpc_call(**values: Any) -> bytes:
    """What a client sends for one call, the bootstrap included."""

    async def record() -> bytes:
        async with rpc.runtime():
            pipe = Recorded()
            connection = await rpc.connect(pipe, rpc.RpcLimits())
            call = asyncio.ensure_future(connection.bootstrap(schema.Zoo).echo(**values))
            for _ in range(20):
                await asyncio.sleep(0)
            sent = bytes(pipe.sent)
            call.cancel()
            await asyncio.wait([call])
            await connection.aclose()
            return sent

    return asyncio.run(record())


def _aliased(n: int) -> bytes:
    """A list of lists that are all the same one: few bytes that are many values."""
    items, lists = n // 2, n // 32
    data = _rpc_call(grid=[[1] * items] + [[2]] * lists)
    words = list(struct.unpack(f"<{len(data) // 8}Q", data))
    pointer = 2 | items << 3  # to a list of bytes; the other half says where
    (first,) = (i for i, word in enumerate(words) if word >> 32 == pointer and word & 3 == 1)
    target = first + 1 + ((words[first] & 0xFFFF_FFFF) >> 2)
    for at in range(first + 1, first + 1 + lists):
        assert words[at] >> 32 == 2 | 1 << 3, "the list of lists is somewhere else"
        words[at] = pointer << 32 | (target - at - 1) << 2 | 1
    return struct.pack(f"<{len(words)}Q", *words)


def _rpc(data: bytes) -> object:
    """All of it: framing, Cap'n Proto's reader, values, dispatch."""

    async def serve() -> None:
        async with rpc.runtime(), asyncio.timeout(60):
            await rpc.serve(Recorded(data or b"\0"), Zoo(), rpc.RpcLimits())

    return asyncio.run(serve())


def _unread(data: bytes) -> object:
    """Small messages to a peer that takes none, and then all."""

    async def send() -> int:
        pipe = Recorded()
        write, pipe.write = pipe.write, lambda _: 0  # type: ignore[method-assign]
        ended = [lambda *_: None] * 3
        transport = RpcTransport(pipe, rpc.RpcLimits(), *ended)
        for at in range(0, len(data), 64):
            transport._queue(data[at : at + 64])
            transport._flush()
        pipe.write = write  # type: ignore[method-assign]
        transport.writable()
        transport._fail(None)
        await asyncio.sleep(0)
        return len(pipe.sent)

    return asyncio.run(send())


def _heads(data: bytes) -> object:
    return message_head(data, 0, len(data)), message_bytes(data, 0)


def _foreign_error(text: str) -> object:
    return from_kj(SimpleNamespace(type="FAILED", description=text), "Zoo.echo")


RPC_CALLS = [
    _rpc_call(),
    _rpc_call(text="a", data=b"b" * 50, color="red"),
    _rpc_call(texts=["a", "b"], numbers=[1] * 8, inner={"name": "n"}, grid=[[1, 2], [3]]),
    _rpc_call(tree={"left": {"value": 1}, "right": {"left": {"value": 2}}}),
]
FRAMES = struct.pack("<IIQ5sIIQ", 0xFFFF_FFFF, 5, 7, b"bytes", 0xFFFF_FFFE, 9, 7)
FRAMES += struct.pack("<IIQQ", 0xFFFF_FFFD, 8, 7, 3 << 20)
RETURNED = struct.pack("<IIQHHIQIIQ", 0, 4, 1 << 48 | 1 << 32, 3, 0, 0, 1 << 32, 9, 0, 0)

RPC = [
    Parser(
        "RPC message",
        _heads,
        [*RPC_CALLS, FRAMES],
        (FramingError,),
        1 << 20,
        grow=[repeated(b"", RETURNED), repeated(b"", bytes(8)), repeated(b"", FRAMES)],
    ),
    Parser(
        "RPC messages that wait",
        _unread,
        [RETURNED * 3],
        (),
        1 << 20,
        grow=[repeated(b"", RETURNED)],
    ),
    Parser("RPC connection", _rpc, [*RPC_CALLS, FRAMES + RPC_CALLS[0]], (), 1 << 20),
    Parser("RPC values", _rpc, RPC_CALLS, (), 7000, grow=[_aliased]),
    Parser(
        "RPC error",
        on_text(_foreign_error),
        texts("ww/1: capability.revoked\x1fit is\x1fask", "remote exception: Failed: boom"),
        (),
        64 << 10,
        "text",
    ),
]

# --- the broker -----------------------------------------------------------------------------------

FENCE = Fence.issue(KEY, "locks/a", epoch=1, counter=2)
CHALLENGE = Challenge(
    bytes(32), PEER, "c" * 40, Channel("noise", bytes(32)), ("local-ed25519",), 1, NOW_MS
)


def _fence(payload: bytes) -> object:
    """A token whose authority is the sender: it can sign what it likes."""
    value = cbor.decode(payload, bytes_max=FENCE_BYTES_MAX)
    if isinstance(value, dict) and all(type(value.get(n)) is int for n in ("epoch", "counter")):
        with contextlib.suppress(Exception):
            unsigned = Fence(PEER, value["epoch"], value["lock"], value["counter"], b"")
            value["signature"] = KEY.sign(unsigned._signed_bytes())
    return Fence.decode(cbor.encode(value))


def _where(text: str) -> object:
    where = Where.parse(text)
    again = Where.parse(where.text)
    assert again == where
    return where


def _globbed(text: str) -> object:
    pattern, _, value = text.partition("\n")
    return glob(pattern[:1024])(value)


def _challenged(data: bytes) -> object:
    return compare(CHALLENGE, Proof("local-ed25519", b"", data), 0.0)


def _any_of(*parse: Callable[[str], object]) -> Callable[[str], object]:
    def run(text: str) -> object:
        for each in parse:
            with contextlib.suppress(InvalidArgument):
                each(text)
        return None

    return run


TERMS = {
    "v": 1,
    "services": {"pubsub": ["*", "Topic.publish"]},
    "where": [["pubsub", "topic=glob:chat/*"], ["*", "data=max:1024"]],
    "expires_at": 1_800_000_000.5,
    "rate": [10.0, 20.0],
    "calls": 5,
    "bytes": 1024,
    "fence": FENCE.encode().hex(),
}

BROKER = [
    Parser(
        "constraint",
        on_text(_where),
        texts(
            "topic=glob:chat/*",
            "PubSub.join:topic=in:a,b\\,c",
            "data=max:64k",
            "count=range:-1..1e3",
            "data=hex:00ff",
        ),
        (InvalidArgument,),
        2048,
        "text",
        [
            repeated(b"a=in:", b"a,", b"a"),
            repeated(b"", b"a.", b"b:c=d"),
            repeated(b"a=max:", b"1"),
        ],
    ),
    Parser(
        "constraint, as typed",
        on_text(lambda text: Where.parse_option(text, ("pubsub", "blob"))),
        texts("pubsub/topic=a", "blob/data=max:1M"),
        (InvalidArgument,),
        2048,
        "text",
    ),
    Parser(
        "glob",
        on_text(_globbed),
        texts("chat/*\nchat/a", "a?b*c\naxbyc", "*a*a*a*b\n" + "a" * 50),
        (),
        6000,
        "text",
        [repeated(b"*a" * 300 + b"b\n", b"a"), repeated(b"*?" * 300 + b"b\n", b"a")],
    ),
    Parser(
        "rate, duration, size",
        on_text(_any_of(Rate.parse, parse_duration, parse_size)),
        texts("10/s:20", "1.5h", "64 MiB", "7d"),
        (),
        4096,
        "text",
        [repeated(b"1", b" ", b"s"), repeated(b"", b"1", b"/s"), repeated(b"1.", b"1", b"k")],
    ),
    Parser(
        "terms",
        on_json(Terms.from_plain),
        as_json(TERMS, {"v": 1}),
        (InvalidArgument,),
        64 << 10,
        "json",
    ),
    Parser(
        "method patterns",
        on_json(lambda value: patterns_of(value) if isinstance(value, dict) else None),
        as_json({"pubsub": ["*", "Topic.*", "Topic.publish"], "*": []}),
        (InvalidArgument, TypeError),
        64 << 10,
        "json",
    ),
    Parser(
        "fencing token",
        _fence,
        [FENCE.encode()],
        (InvalidArgument,),
        2048,
        "cbor",
    ),
    Parser(
        "login challenge",
        Challenge.from_signed_bytes,
        [CHALLENGE.signed_bytes()],
        (ValueError,),
        CHALLENGE_BYTES_MAX + 100,
    ),
    Parser(
        "login statement", _challenged, [CHALLENGE.signed_bytes()], (), CHALLENGE_BYTES_MAX + 100
    ),
]

# --- audit and policy -----------------------------------------------------------------------------

CHECKPOINT = Checkpoint("0011223344556677", PEER, 9, bytes(32), NOW_MS).sign(
    lambda data: KEY.sign(audit_chain.CHECKPOINT_DOMAIN + data)
)
OPENED = {
    "seq": 1,
    "time_ms": NOW_MS,
    "event": "log.opened",
    "log": "00",
    "node": str(PEER),
    "prev": "00" * 32,
    "file": 1,
    "oldest": 1,
}
LOGIN = {"seq": 2, "time_ms": NOW_MS, "event": "login.granted", "principal": "local:a"}
MEMBER = {
    "peer_id": str(PEER),
    "name": "n",
    "host": "h",
    "state": "alive",
    "since_s": 1.5,
    "incarnation": 1,
    "addrs": [str(ADDRS[0])],
    "labels": [{"key": "zone", "value": "home"}],
    "version": "0.1",
    "services": ["pubsub"],
    "load": 0.5,
    "memory_bytes": 1 << 26,
    "rtt_s": 0.01,
    "connected": True,
    "self": False,
    "trouble": "",
    "via": "",
}
LINES = [audit_chain.encode(entry, bytes(32))[0] for entry in (OPENED, LOGIN)]


def _log_line(data: bytes) -> object:
    body, stated = audit_chain.split(data)
    with contextlib.suppress(ValueError, KeyError, TypeError, InvalidArgument, RecursionError):
        _header(json.loads(data))
    return seq_of(body), stated


def _told(data: bytes) -> object:
    """What a member answers when it is asked for its log."""
    older = Checkpoint(CHECKPOINT.log, PEER, 7, bytes(32), 1)
    fake: Any = SimpleNamespace()
    new, digests = done(Checkpoints._read(fake, Received(data), older))  # type: ignore[arg-type]
    return continues(older, new, digests)


def _held_line(data: bytes) -> object:
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        return held._parse(data)
    return None


def _checkpoint(data: bytes) -> object:
    """Of the node itself: it signs what it likes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return Checkpoint.parse(data)
    if isinstance(value, dict) and value.keys() == json.loads(CHECKPOINT.text).keys():
        unsigned = json.dumps(
            {key: item for key, item in value.items() if key != "signature"},
            separators=(",", ":"),
            sort_keys=True,
        )
        signature = KEY.sign(audit_chain.CHECKPOINT_DOMAIN + unsigned.encode())
        value["signature"] = signature.hex()
        data = json.dumps(value, separators=(",", ":")).encode()
    return Checkpoint.parse(data)


_first = Policy.first(PEER)
_roles: dict[str, Any] = {**_first.roles, "chat": {"pubsub": frozenset({"Topic.*"})}}
POLICY = _first.next(
    users={**_first.users, "ada": User(OTHER.peer_id, frozenset({"member", "chat"}))},
    roles=_roles,
    where={"chat": {"pubsub": ("topic=glob:chat/*",)}},
)


def _policy_from_peer(canonical: bytes) -> object:
    return Signed.unpack(canonical, KEY.sign(DOMAIN + canonical), PEER)


def _policy_of(n: int, **more: Callable[[int], Any]) -> bytes:
    """A canonical policy of about `n` bytes."""
    data = POLICY.as_dict() | {key: make(n) for key, make in more.items()}
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _many_users(n: int) -> dict[str, Any]:
    users = {"operator": {"key": str(PEER), "roles": ["admin"]}}
    for i in range(n // 2 // 90):
        key = PeerId.from_public_key(_member(i))
        users[f"u{i:05}"] = {"key": str(key), "roles": ["admin", "member"]}
    return users


def _many_roles(n: int) -> dict[str, Any]:
    roles: dict[str, Any] = {"admin": {"*": ["*"]}, "member": {"pubsub": ["*"]}}
    return roles | {f"r{i:05}": {} for i in range(n // 2 // 12)}


def _many_services(n: int) -> dict[str, Any]:
    services = {f"s{i:05}": [f"A.m{i:05}"] for i in range(n // 2 // 24)}
    return {"admin": {"*": ["*"]}, "member": services, "chat": services}


AUDIT_AND_POLICY = [
    Parser(
        "audit checkpoint",
        _checkpoint,
        texts(CHECKPOINT.text),
        (InvalidArgument,),
        2048,
        "json",
    ),
    Parser(
        "audit record",
        _log_line,
        LINES,
        (ValueError,),
        audit_chain.LINE_BYTES_MAX + 1,
        "json",
        [repeated(b'{"seq":', b"1", LINES[0][-74:]), repeated(b"", b"[", LINES[0][-74:])],
    ),
    Parser(
        "audit record that is shown",
        on_text(parse_record),
        LINES,
        (InvalidArgument,),
        audit_chain.LINE_BYTES_MAX,
        "json",
        [repeated(b"", b"["), repeated(b'{"seq":', b"1")],
    ),
    Parser(
        "pubsub message of a raw topic that is pushed",
        partial(_batch, "news", raw=True),
        [bytes(8) + bytes((len(PEER),)) + PEER.encode() + b"data"],
        (InvalidArgument,),
        16 << 10,
    ),
    Parser(
        "pubsub messages that are pushed",
        partial(_batch, "news", raw=False),
        [bytes(8) + bytes((len(PEER),)) + PEER.encode() + FRAME],
        (InvalidArgument,),
        16 << 10,
    ),
    Parser(
        "member that is shown",
        _shown,
        [json.dumps(MEMBER).encode()],
        (InvalidArgument,),
        16 << 10,
        "json",
        [repeated(b"", b"["), repeated(b'{"labels":', b"1")],
    ),
    Parser(
        "audit proof",
        _told,
        [
            framed(cbor.encode({"checkpoint": CHECKPOINT.text, "records": n})) + bytes(32 * n)
            for n in (0, 2)
        ],
        (InvalidArgument, EOFError),
        130 << 10,
        grow=[
            lambda n: (
                framed(cbor.encode({"checkpoint": CHECKPOINT.text, "records": n // 32})) + bytes(n)
            )
        ],
    ),
    Parser(
        "audit checkpoint that is held",
        _held_line,
        as_json({"v": held.VERSION, "checkpoint": CHECKPOINT.text, "broken": "rewritten"}),
        (InvalidArgument,),
        audit_chain.LINE_BYTES_MAX,
        "json",
    ),
    Parser(
        "policy document",
        Signed.open,
        [POLICY.sign(KEY)],
        (InvalidArgument, AuthError),
        DOCUMENT_BYTES_MAX,
        "json",
    ),
    Parser(
        "policy of a peer",
        _policy_from_peer,
        [POLICY.canonical()],
        (InvalidArgument, AuthError),
        DOCUMENT_BYTES_MAX,
        "json",
        [
            lambda n: _policy_of(n, users=_many_users, roles=_many_roles),
            lambda n: _policy_of(n, users=_many_users),
            lambda n: _policy_of(n, roles=_many_services),
        ],
    ),
    Parser(
        "policy claim",
        on_cbor(Claim.parse),
        [cbor.encode({"version": 2, "digest": bytes(32)})],
        (Misbehaviour, InvalidArgument),
        1024,
        "cbor",
    ),
]

# --- discovery and pub-sub ------------------------------------------------------------------------

MESSAGE = pubsub.WireMessage(
    PEER.multihash, b"hello", bytes(8), "/wetware/c/chat", bytes(64), b"key"
)
PUBSUB = [
    pubsub.frame([MESSAGE.encode()] * 2),
    pubsub.frame([pubsub.subscription_chunk("chat", True), pubsub.subscription_chunk("b", False)]),
    pubsub.frame(
        [
            pubsub.control_chunk(
                [
                    pubsub.graft_chunk("chat"),
                    pubsub.prune_chunk("chat", 60),
                    pubsub.ihave_chunk("chat", [b"a" * 8, b"b" * 8]),
                    pubsub.iwant_chunk([b"a" * 8]),
                ]
            )
        ]
    ),
]
PUBSUB_LIMITS = pubsub.WireLimits()


def _pubsub(data: bytes) -> object:
    reader, found = pubsub.FrameReader(PUBSUB_LIMITS), []
    for at in range(0, len(data), 4096):
        found += [pubsub.decode(body, PUBSUB_LIMITS) for body in reader.feed(data[at : at + 4096])]
    return found


def _blocks(data: bytes) -> object:
    """What a provider answers, to the end of its stream."""
    stream: Any = Received(data)
    found: list[Any] = []
    with contextlib.suppress(EOFError):
        while True:
            length = done(blob_wire.read_head(stream))
            found.append(length if length is None else done(stream.read_exactly(length)))
    return found


def _one_frame(item: bytes) -> Callable[[int], bytes]:
    return lambda n: pubsub.frame([item] * (n // len(item)))


PEERS = [
    Parser(
        "mDNS record",
        partial(mdns.decode, addrs_max=16),
        [mdns.encode([addr.with_peer(PEER) for addr in ADDRS], "c" * 40)],
        (),
        9000,
    ),
    Parser(
        "wants of blocks",
        lambda data: done(blob_wire.read_want(Received(data))),
        [blob_wire.want_frame([bytes(32)]), blob_wire.want_frame([bytes(32), b"a" * 32])],
        (blob_wire.Malformed, EOFError),
        9000,
    ),
    Parser(
        "blocks that were wanted",
        _blocks,
        [blob_wire.head(b"abc") + b"abc" + blob_wire.ABSENT_FRAME + blob_wire.head(b"")],
        (blob_wire.Malformed,),
        1 << 20,
        grow=[
            repeated(b"", blob_wire.ABSENT_FRAME),
            repeated(b"", blob_wire.head(b"")),
            repeated(b"", blob_wire.head(b"a") + b"a"),
            lambda n: blob_wire.head(bytes(n)) + bytes(n),
        ],
    ),
    Parser(
        "pub-sub frame of messages",
        pubsub_frames.decode,
        [FRAME],
        (InvalidArgument, ValueError),
        64 << 10,
        grow=[
            lambda n: pubsub_frames.encode(
                Principal("local", "a"), 1.0, b"", bytes(min(n, 16_384) // 4 * 4)
            )
        ],
    ),
    Parser(
        "pub-sub frame",
        _pubsub,
        PUBSUB,
        (pubsub.Malformed,),
        1 << 20,
        grow=[
            _one_frame(MESSAGE.encode()),
            _one_frame(pubsub.subscription_chunk("chat", True)),
            lambda n: pubsub.frame([pubsub.control_chunk([pubsub.iwant_chunk([b"a"] * (n // 3))])]),
            lambda n: pubsub.frame([pubsub.control_chunk([pubsub.graft_chunk("a")] * (n // 5))]),
            repeated(b"", b"\x02\x0a\x00"),
        ],
    ),
]


# --- blob -----------------------------------------------------------------------------------------

CHUNK = Block(Cid.of(RAW, b"x"), b"x")
BLOB_ENTRIES = [Entry(f"{n}.txt", CHUNK.cid, 1) for n in range(5)]
FILE_TREE = FileTree(replace(V1_2025, links_max=3))
BLOB_BLOCKS = [
    *(block for _ in range(3) for block in FILE_TREE.add(CHUNK.cid, 1, 1)),
    *directory(BLOB_ENTRIES, V1_2025)[1],
    *directory(BLOB_ENTRIES, replace(V1_2025, threshold_bytes=0))[1],
]
DAG_PB_LINK = dagpb.field(0x12, dagpb.field(0x0A, b"\x01\x55\0\0"))


def _blob_block(data: bytes) -> object:
    cid = Cid(1, DAG_PB, bytes(32))
    blob_read.children(cid, data)
    return blob_read.judge(blob_read.Claim(cid), data)


def _car(data: bytes) -> object:
    reader, found = Reader(), []
    for at in range(0, len(data), 4096):
        found += reader.feed(data[at : at + 4096])
    reader.close()
    return found


BLOB = [
    Parser(
        "CID",
        on_text(Cid.parse),
        texts(str(CHUNK.cid), str(Cid.of(DAG_PB, b"", 0))),
        (InvalidArgument,),
        600,
        "text",
    ),
    Parser(
        "CID, binary",
        Cid.decode,
        [bytes(CHUNK.cid), bytes(Cid.of(DAG_PB, b"", 0))],
        (InvalidArgument,),
        600,
    ),
    Parser(
        "dag-pb",
        dagpb.decode,
        [block.data for block in BLOB_BLOCKS],
        (BadBlock,),
        2 << 20,
        grow=[repeated(b"", DAG_PB_LINK), lambda n: dagpb.field(0x0A, bytes(n))],
    ),
    Parser(
        "UnixFS",
        _blob_block,
        [block.data for block in BLOB_BLOCKS],
        (BadBlock,),
        2 << 20,
        grow=[
            lambda n: (
                directory(
                    [Entry(f"{i:08}", CHUNK.cid, 1) for i in range(n // 55)],
                    replace(V1_2025, threshold_bytes=1 << 30),
                )[1][0].data
            ),
            lambda n: dagpb.field(0x0A, b"\x08\x02" + b"\x20\x00" * (n // 2)),
            lambda n: dagpb.field(
                0x0A, b"\x08\x05" + dagpb.field(0x12, b"\xff" * n) + b"\x28\x22\x30\x80\x02"
            ),
        ],
    ),
    Parser(
        "CAR",
        _car,
        [header(CHUNK.cid) + section(CHUNK) * 3],
        (BadBlock,),
        1 << 20,
        grow=[repeated(header(CHUNK.cid), section(CHUNK))],
    ),
]


def of_auth_evm() -> Iterator[Parser]:
    """The parsers of auth_evm; ImportError where its packages are missing."""
    from eth_utils.abi import function_abi_to_4byte_selector

    from wetware.errors import ConfigError
    from wetware_auth_evm.chain import events
    from wetware_auth_evm.chain.addresses import parse_address
    from wetware_auth_evm.chain.endpoints import Block, _parse, data, quantity
    from wetware_auth_evm.chain.errors import BadLog
    from wetware_auth_evm.chain.replica import parse_state, read_logs
    from wetware_auth_evm.cli import abi
    from wetware_auth_evm.login.proofs import PAYLOAD_BYTES_MAX, KeyProof, SessionProof
    from wetware_auth_evm.login.statements import SessionGrant, recover
    from wetware_auth_evm.node.config import Public

    contract, account, word = b"\x11" * 20, b"\x22" * 20, bytes(31) + b"\1"
    grant = SessionGrant(
        chain_id=1,
        contract=contract,
        account=account,
        session_key=PEER,
        cluster="c" * 40,
        scope=b"team".ljust(32, b"\0"),
        roles=("member", "publisher"),
        epochs=(1, 2, 3),
        issued_at=1_800_000_000,
        expires_at=1_800_003_600,
        nonce=bytes(16),
    )
    logs = [
        {
            "address": "0x" + contract.hex(),
            "topics": ["0x" + each.hex() for each in (first, word, word, bytes(32))],
            "data": "0x" + (word * len(layout.fields)).hex(),
            "removed": False,
        }
        for first, layout in events.LAYOUTS.items()
    ]
    block = {
        "number": "0x10",
        "hash": "0x" + word.hex(),
        "parentHash": "0x" + word.hex(),
        "timestamp": "0x6b49d200",
    }

    def session(payload: bytes) -> object:
        proof = SessionProof.decode(payload)
        with contextlib.suppress(ValueError):
            recover(proof.digest, proof.signature)
        return proof.grant

    def answer(body: bytes) -> object:
        return _parse(bytearray(body))

    def address(text: str) -> object:
        return parse_address(text)

    def hexes(value: Any) -> object:
        for each in (quantity, data):
            with contextlib.suppress(ValueError):
                each(value)
        return None

    lib = (ValueError, KeyError, TypeError)
    json_rpc = as_json({"jsonrpc": "2.0", "id": 1, "result": logs[:2]}, {"error": {"code": 3}})
    yield Parser(
        "EVM session",
        session,
        [
            SessionProof(grant, f, bytes(64) + b"\x1b", bytes(64)).encode()
            for f in ("eip712", "eip4361")
        ],
        (InvalidArgument,),
        PAYLOAD_BYTES_MAX,
        "cbor",
    )
    yield Parser(
        "EIP-4361 text",
        on_text(lambda text: SessionGrant.parse_text(text).text_digest()),
        texts(grant.text()),
        (InvalidArgument,),
        5000,
        "text",
    )
    yield Parser(
        "EVM key proof",
        KeyProof.decode,
        [KeyProof(bytes(32), bytes(64), account).encode()],
        (InvalidArgument,),
        1024,
        "cbor",
    )
    yield Parser(
        "wallet's signature",
        partial(recover, bytes(32)),
        [bytes(31) + b"\1" + bytes(31) + b"\1\x1b", b"\1" * 64 + b"\x1c"],
        (ValueError,),
        1024,
    )
    yield Parser(
        "EVM address",
        on_text(address),
        texts("0x" + account.hex(), "0x52908400098527886E0F7030069857D2E4169EE7"),
        (InvalidArgument,),
        1024,
        "text",
    )
    yield Parser("JSON-RPC answer", answer, json_rpc, (ValueError,), 256 << 10, "json", [
        repeated(b"", b"["), repeated(b"", b'{"a":'), repeated(b"", b'{"}":'),
        repeated(b"[", b"[],", b"1]"), repeated(b'"', b'\\"'), repeated(b"", b'"'),
    ])  # fmt: skip
    yield Parser(
        "EVM logs",
        on_json(lambda value: read_logs(value, contract)),
        as_json(logs, logs[:1]),
        (BadLog,),
        256 << 10,
        "json",
        [lambda n: as_json(logs[:1] * (n // 700))[0]],
    )
    yield Parser("EVM block", on_json(Block.parse), as_json(block), lib, 4096, "json")
    yield Parser(
        "EVM quantity", on_json(hexes), as_json("0x10", "0x" + "00" * 40), (), 64 << 10, "json"
    )
    yield Parser("contract's state", parse_state, [word * 7], (ValueError,), 4096)
    yield Parser(
        "contract's refusal",
        abi.refusal,
        [
            function_abi_to_4byte_selector(abi._entries("error")[name]) + word * 4
            for name in ("NotOwner", "ExceedsAdmin", "NoKey")
        ],
        (),
        4096,
    )
    yield Parser(
        "join document of auth_evm",
        Public.parse,
        [Public(1, contract, "team", word, 9).document()],
        (ConfigError,),
        8192,
        "json",
    )


CORE = [*BASE, *ADMISSION, *MEMBERSHIP, *LINK, *RPC, *BROKER, *AUDIT_AND_POLICY, *PEERS, *BLOB]

__all__ = ["CORE", "Parser", "of_auth_evm"]
