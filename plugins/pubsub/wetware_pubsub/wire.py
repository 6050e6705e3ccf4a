"""The bytes of GossipSub: length-prefixed protobuf, in a strict and bounded codec.

Strict: a decoder takes what the field tables below allow and refuses the rest. Fields that they do
not name are skipped, as protobuf demands; a known field of another wire type, a repeated singular
field, a group, an overlong varint, text that is not UTF-8 or more elements than a limit allows make
the whole frame `Malformed`, which costs the peer its stream and never the node anything.

Source: libp2p specs, pubsub/README.md ("The RPC", "Message Signing") and
pubsub/gossipsub/gossipsub-v1.1.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wetware.base.varint import uvarint

SIGN_DOMAIN = b"libp2p-pubsub:"
"""What precedes a message in the bytes that its publisher signs."""


class Malformed(ValueError):
    """The bytes are not an RPC within the limits."""


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What one frame may hold.

    Attributes:
        frame_bytes_max: Length of one RPC. 4 MiB is what js-libp2p accepts; go sends at most 1 MiB.
        messages_max: Messages in one RPC. A frame of empty messages would otherwise hold half a
            million of them.
        subscriptions_max: Subscription changes in one RPC: a hello names every topic of the peer.
        controls_max: IHAVE, IWANT, GRAFT and PRUNE entries in one RPC, each kind.
        ids_max: Message IDs in one RPC, over all its IHAVEs and over all its IWANTs. The 5,000
            of go and js, with room.
        topic_bytes_max: Length of a topic on the wire.
        fields_max: Fields in one RPC, over all its parts, those that are skipped included: each
            takes a microsecond, and the loop stands still for all of them. 8,192 messages of a few
            bytes, or as many IDs as may be in one.
    """

    frame_bytes_max: int = 4 << 20
    messages_max: int = 16_384
    subscriptions_max: int = 4096
    controls_max: int = 4096
    ids_max: int = 8192
    topic_bytes_max: int = 512
    fields_max: int = 65_536


ID_BYTES_MAX = 128
"""Length of a message ID: from (≤ 42 bytes) + seqno (8), or whatever hash a peer prefers."""
FROM_BYTES_MAX = 64
SIGNATURE_BYTES_MAX = 1024  # RSA-8192; ours are 64


# --- values ---


@dataclass(slots=True)
class WireMessage:
    """A message as it travels. `author` is the binary peer ID in the field `from`."""

    author: bytes
    data: bytes
    seqno: bytes
    topic: str
    signature: bytes
    key: bytes = b""

    @property
    def id(self) -> bytes:
        """The message ID that libp2p uses by default: `from` + `seqno`."""
        return self.author + self.seqno

    def signed(self) -> bytes:
        """The canonical encoding without signature and key: with `SIGN_DOMAIN`, what is signed."""
        return encode_unsigned(self.author, self.data, self.seqno, self.topic)

    def encode(self) -> bytes:
        """The field `publish` of an RPC, tag and length included: chunks of it make an RPC."""
        return publish_chunk(self.signed(), self.signature, self.key)


@dataclass(slots=True)
class Prune:
    """Leave my mesh of `topic`; `backoff_s` is None in 1.0."""

    topic: str
    backoff_s: int | None = None


@dataclass(slots=True)
class Rpc:
    """One decoded RPC. IHAVE and IWANT keep the sender's order."""

    subscriptions: list[tuple[bool, str]]
    messages: list[WireMessage]
    ihave: list[tuple[str, list[bytes]]]
    iwant: list[bytes]
    graft: list[str]
    prune: list[Prune]


# --- encoding ---


def _field(tag: int, value: bytes) -> bytes:
    return bytes((tag,)) + uvarint(len(value)) + value


def encode_unsigned(author: bytes, data: bytes, seqno: bytes, topic: str) -> bytes:
    """A Message without signature and key, in field order as every implementation marshals it.

    The signature covers these bytes, so a field that is empty is still written: go, js and py send
    `data` whenever it is set.
    """
    name = topic.encode()
    head = _field(0x0A, author) + b"\x12" + uvarint(len(data))
    return b"".join((head, data, _field(0x1A, seqno), b"\x22", uvarint(len(name)), name))


def publish_chunk(unsigned: bytes, signature: bytes, key: bytes = b"") -> bytes:
    """The RPC field `publish`: the canonical fields, the signature, and the key where given."""
    end = _field(0x2A, signature) + (_field(0x32, key) if key else b"")
    return b"".join((b"\x12", uvarint(len(unsigned) + len(end)), unsigned, end))


def subscription_chunk(topic: str, subscribe: bool) -> bytes:
    """The RPC field `subscriptions`."""
    return _field(0x0A, (b"\x08\x01" if subscribe else b"\x08\x00") + _field(0x12, topic.encode()))


def graft_chunk(topic: str) -> bytes:
    """The ControlMessage field `graft`."""
    return _field(0x1A, _field(0x0A, topic.encode()))


def prune_chunk(topic: str, backoff_s: int | None) -> bytes:
    """The ControlMessage field `prune`, with no peers to exchange."""
    tail = b"" if backoff_s is None else b"\x18" + uvarint(backoff_s)
    return _field(0x22, _field(0x0A, topic.encode()) + tail)


def ihave_chunk(topic: str, ids: list[bytes]) -> bytes:
    """The ControlMessage field `ihave`."""
    return _field(0x0A, _field(0x0A, topic.encode()) + b"".join(_field(0x12, i) for i in ids))


def iwant_chunk(ids: list[bytes]) -> bytes:
    """The ControlMessage field `iwant`."""
    return _field(0x12, b"".join(_field(0x0A, i) for i in ids))


def control_chunk(parts: list[bytes]) -> bytes:
    """The RPC field `control`: one for all parts, as decoders need not merge several."""
    return _field(0x1A, b"".join(parts))


def frame(chunks: list[bytes]) -> bytes:
    """RPC fields as one frame: uvarint length and body."""
    return b"".join((uvarint(sum(map(len, chunks))), *chunks))


# --- decoding ---


def _varint_at(buf: bytes, at: int, end: int) -> tuple[int, int]:
    """The varint at `at` and where it ends; at most ten bytes and 64 bits."""
    value = shift = 0
    while at < end:
        byte = buf[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise Malformed("varint above 64 bits")
            return value, at
        shift += 7
        if shift > 63:
            raise Malformed("varint longer than ten bytes")
    raise Malformed("truncated varint")


@dataclass(slots=True)
class _Budget:
    """How many fields of a frame may still be looked at."""

    fields: int


def _fields(buf: bytes, at: int, end: int, budget: _Budget) -> Iterator[tuple[int, int, int, int]]:
    """Every field as (number, wire type, start of value or the varint itself, end of value)."""
    while at < end:
        budget.fields -= 1
        if budget.fields < 0:
            raise Malformed("too many fields")
        tag = buf[at]
        if tag < 0x80:
            at += 1
        else:
            tag, at = _varint_at(buf, at, end)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise Malformed(f"field number {number}")
        if kind == 2:
            length, at = _varint_at(buf, at, end)
            if length > end - at:
                raise Malformed(f"field {number} is truncated")
            yield number, kind, at, at + length
            at += length
        elif kind == 0:
            value, at = _varint_at(buf, at, end)
            yield number, kind, value, at
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            if width > end - at:
                raise Malformed(f"field {number} is truncated")
            yield number, kind, at, at + width
            at += width
        else:
            raise Malformed(f"wire type {kind}")


def _want(number: int, kind: int, wanted: int) -> None:
    if kind != wanted:
        raise Malformed(f"field {number} has wire type {kind}")


def _once(seen: int, number: int) -> int:
    bit = 1 << number
    if seen & bit:
        raise Malformed(f"field {number} is repeated")
    return seen | bit


def _topic(buf: bytes, at: int, end: int, limits: WireLimits) -> str:
    if end - at > limits.topic_bytes_max:
        raise Malformed(f"topic of {end - at} bytes")
    try:
        return buf[at:end].decode()
    except UnicodeDecodeError:
        raise Malformed("topic is not UTF-8") from None


def _message_id(buf: bytes, at: int, end: int) -> bytes:
    if not 0 < end - at <= ID_BYTES_MAX:
        raise Malformed(f"message ID of {end - at} bytes")
    return buf[at:end]


_MESSAGE_BYTES_MAX = {1: FROM_BYTES_MAX, 3: 64, 5: SIGNATURE_BYTES_MAX, 6: 4096}


def _message(buf: bytes, at: int, end: int, limits: WireLimits, budget: _Budget) -> WireMessage:
    author = data = seqno = signature = key = b""
    topic: str | None = None
    seen = 0
    for number, kind, start, stop in _fields(buf, at, end, budget):
        if number > 6:
            continue
        _want(number, kind, 2)
        seen = _once(seen, number)
        if stop - start > _MESSAGE_BYTES_MAX.get(number, limits.frame_bytes_max):
            raise Malformed(f"message field {number} of {stop - start} bytes")
        if number == 1:
            author = buf[start:stop]
        elif number == 2:
            data = buf[start:stop]
        elif number == 3:
            seqno = buf[start:stop]
        elif number == 4:
            topic = _topic(buf, start, stop, limits)
        elif number == 5:
            signature = buf[start:stop]
        else:
            key = buf[start:stop]
    if topic is None:
        raise Malformed("message without a topic")
    return WireMessage(author, data, seqno, topic, signature, key)


def _subscription(
    buf: bytes, at: int, end: int, limits: WireLimits, budget: _Budget
) -> tuple[bool, str]:
    subscribe, topic, seen = False, None, 0
    for number, kind, start, stop in _fields(buf, at, end, budget):
        if number > 2:
            continue
        _want(number, kind, 0 if number == 1 else 2)
        seen = _once(seen, number)
        if number == 1:
            subscribe = bool(start)
        else:
            topic = _topic(buf, start, stop, limits)
    if topic is None:
        raise Malformed("subscription without a topic")
    return subscribe, topic


def _ihave(
    buf: bytes, at: int, end: int, limits: WireLimits, budget: _Budget
) -> tuple[str, list[bytes]]:
    topic, ids, seen = "", [], 0
    for number, kind, start, stop in _fields(buf, at, end, budget):
        if number == 1:
            _want(number, kind, 2)
            seen = _once(seen, number)
            topic = _topic(buf, start, stop, limits)
        elif number == 2:
            _want(number, kind, 2)
            ids.append(_message_id(buf, start, stop))
            if len(ids) > limits.ids_max:
                raise Malformed("too many message IDs")
    return topic, ids


def _iwant(buf: bytes, at: int, end: int, limits: WireLimits, budget: _Budget) -> list[bytes]:
    ids = []
    for number, kind, start, stop in _fields(buf, at, end, budget):
        if number == 1:
            _want(number, kind, 2)
            ids.append(_message_id(buf, start, stop))
            if len(ids) > limits.ids_max:
                raise Malformed("too many message IDs")
    return ids


def _graft_or_prune(buf: bytes, at: int, end: int, limits: WireLimits, budget: _Budget) -> Prune:
    out, seen = Prune(""), 0
    for number, kind, start, stop in _fields(buf, at, end, budget):
        if number == 1:
            _want(number, kind, 2)
            seen = _once(seen, number)
            out.topic = _topic(buf, start, stop, limits)
        elif number == 3:
            _want(number, kind, 0)
            seen = _once(seen, number)
            out.backoff_s = start
    return out  # field 2, the peers to exchange, is skipped: nobody tells us whom to dial


def _control(buf: bytes, at: int, end: int, limits: WireLimits, budget: _Budget, rpc: Rpc) -> None:
    have_ids = 0
    for number, kind, start, stop in _fields(buf, at, end, budget):
        if number > 4:  # IDONTWANT of 1.2 and later are not negotiated
            continue
        _want(number, kind, 2)
        if number == 1:
            entry = _ihave(buf, start, stop, limits, budget)
            rpc.ihave.append(entry)
            have_ids += len(entry[1])
        elif number == 2:
            rpc.iwant.extend(_iwant(buf, start, stop, limits, budget))
        elif number == 3:
            rpc.graft.append(_graft_or_prune(buf, start, stop, limits, budget).topic)
        else:
            rpc.prune.append(_graft_or_prune(buf, start, stop, limits, budget))
        if max(have_ids, len(rpc.iwant)) > limits.ids_max:
            raise Malformed("too many message IDs")
        if max(len(rpc.ihave), len(rpc.graft), len(rpc.prune)) > limits.controls_max:
            raise Malformed("too many control entries")


def decode(body: bytes, limits: WireLimits) -> Rpc:
    """Decode the body of one frame; raises Malformed. Costs O(len(body)), whatever it holds."""
    rpc = Rpc([], [], [], [], [], [])
    seen = 0
    budget = _Budget(limits.fields_max)
    for number, kind, start, stop in _fields(body, 0, len(body), budget):
        if number > 3:
            continue
        _want(number, kind, 2)
        if number == 2:
            rpc.messages.append(_message(body, start, stop, limits, budget))
            if len(rpc.messages) > limits.messages_max:
                raise Malformed("too many messages")
        elif number == 1:
            rpc.subscriptions.append(_subscription(body, start, stop, limits, budget))
            if len(rpc.subscriptions) > limits.subscriptions_max:
                raise Malformed("too many subscriptions")
        else:
            seen = _once(seen, number)
            _control(body, start, stop, limits, budget, rpc)
    return rpc


class FrameReader:
    """Cuts a byte stream into frames. Holds at most one unfinished frame.

    Args:
        limits: `frame_bytes_max` bounds what is buffered.
    """

    def __init__(self, limits: WireLimits) -> None:
        self._max = limits.frame_bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the bodies that are complete now; raises Malformed. Exhaust it before the next."""
        self._buffer += data
        at = 0
        try:
            while True:
                length = shift = 0
                start = at
                while True:
                    if start >= len(self._buffer):
                        return
                    byte = self._buffer[start]
                    start += 1
                    length |= (byte & 0x7F) << shift
                    if length > self._max:
                        raise Malformed(f"frame above {self._max} bytes")
                    if byte < 0x80:
                        break
                    shift += 7
                    if shift > 28:
                        raise Malformed("frame length is overlong")
                if len(self._buffer) - start < length:
                    return
                at = start + length
                yield bytes(self._buffer[start:at])
        finally:
            del self._buffer[:at]

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)
