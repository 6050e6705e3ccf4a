"""The codec: it agrees with protobuf, and takes whatever bytes it is given."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.base.varint import uvarint
from wetware_pubsub import wire
from wetware_pubsub.wire import FrameReader, Malformed, WireLimits, WireMessage, decode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from libp2p.pubsub.pb import rpc_pb2

LIMITS = WireLimits()

topics = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
ids = st.binary(min_size=1, max_size=60)
messages = st.builds(
    WireMessage,
    author=st.binary(max_size=42),
    data=st.binary(max_size=300),
    seqno=st.binary(max_size=8),
    topic=topics,
    signature=st.binary(max_size=70),
    key=st.binary(min_size=1, max_size=40) | st.just(b""),
)


@st.composite
def rpcs(draw: st.DrawFn) -> wire.Rpc:
    return wire.Rpc(
        draw(st.lists(st.tuples(st.booleans(), topics), max_size=5)),
        draw(st.lists(messages, max_size=5)),
        draw(st.lists(st.tuples(topics, st.lists(ids, max_size=5)), max_size=3)),
        draw(st.lists(ids, min_size=1, max_size=5) | st.just([])),
        draw(st.lists(topics, max_size=3)),
        draw(
            st.lists(
                st.builds(wire.Prune, topics, st.none() | st.integers(0, 2**64 - 1)), max_size=3
            )
        ),
    )


def encode(rpc: wire.Rpc) -> bytes:
    chunks = [wire.subscription_chunk(t, s) for s, t in rpc.subscriptions]
    chunks += [m.encode() for m in rpc.messages]
    parts = [wire.ihave_chunk(t, i) for t, i in rpc.ihave]
    parts += [wire.iwant_chunk(rpc.iwant)] if rpc.iwant else []
    parts += [wire.graft_chunk(t) for t in rpc.graft]
    parts += [wire.prune_chunk(p.topic, p.backoff_s) for p in rpc.prune]
    if parts:
        chunks.append(wire.control_chunk(parts))
    (body,) = FrameReader(LIMITS).feed(wire.frame(chunks))
    return body


@given(rpcs())
def test_what_is_encoded_is_decoded(rpc: wire.Rpc) -> None:
    assert decode(encode(rpc), LIMITS) == rpc


@given(rpcs())
def test_protobuf_reads_what_we_encode(rpc: wire.Rpc) -> None:
    other = rpc_pb2.RPC.FromString(encode(rpc))
    assert [(s.subscribe, s.topicid) for s in other.subscriptions] == rpc.subscriptions
    assert [
        WireMessage(m.from_id, m.data, m.seqno, m.topicIDs[0], m.signature, m.key)
        for m in other.publish
    ] == rpc.messages
    assert [(h.topicID, list(h.messageIDs)) for h in other.control.ihave] == rpc.ihave
    assert [i for w in other.control.iwant for i in w.messageIDs] == rpc.iwant
    assert [g.topicID for g in other.control.graft] == rpc.graft
    assert [
        wire.Prune(p.topicID, p.backoff if p.HasField("backoff") else None)
        for p in other.control.prune
    ] == rpc.prune


@given(messages)
def test_the_signed_bytes_are_protobufs(message: WireMessage) -> None:
    other = rpc_pb2.Message(
        from_id=message.author, data=message.data, seqno=message.seqno, topicIDs=[message.topic]
    )
    assert message.signed() == other.SerializeToString()


@given(rpcs(), st.integers(0, 3), st.binary(max_size=20))
def test_unknown_fields_are_skipped(rpc: wire.Rpc, count: int, value: bytes) -> None:
    unknown = b"".join(
        uvarint(200 + i << 3 | 2) + uvarint(len(value)) + value for i in range(count)
    )
    unknown += uvarint(99 << 3 | 5) + b"1234" + uvarint(98 << 3 | 1) + b"12345678"
    assert decode(unknown + encode(rpc) + unknown, LIMITS) == rpc


@given(st.binary(max_size=400))
def test_any_bytes_are_an_rpc_or_malformed(body: bytes) -> None:
    try:
        decode(body, LIMITS)
    except Malformed:
        return


@given(rpcs(), st.data())
def test_a_damaged_rpc_is_an_rpc_or_malformed(rpc: wire.Rpc, data: st.DataObject) -> None:
    body = bytearray(encode(rpc))
    for _ in range(data.draw(st.integers(1, 4))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(body[: data.draw(st.integers(0, len(body)))]), LIMITS)
    except Malformed:
        return


@pytest.mark.parametrize(
    "body",
    [
        b"\x12",  # tag without a length
        b"\x12\x05ab",  # longer than what follows
        b"\x12" + b"\xff" * 10,  # overlong varint
        b"\x98\x06" + b"\xff" * 9 + b"\x7f",  # a varint above 64 bits, in an unknown field
        b"\x00\x01",  # field 0
        b"\x0b\x0c",  # a group
        b"\x10\x01",  # publish as a varint
        b"\x12\x00",  # a message without a topic
        b"\x0a\x02\x08\x01",  # a subscription without a topic
        b"\x12\x04\x22\x02\xff\xfe",  # a topic that is not UTF-8
        b"\x12\x06\x22\x01a\x22\x01b",  # two topics
        b"\x1a\x00\x1a\x00",  # two controls
        b"\x1a\x04\x12\x02\x0a\x00",  # an empty message ID
    ],
)
def test_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        decode(body, LIMITS)


def test_limits_on_elements() -> None:
    small = WireLimits(messages_max=2, subscriptions_max=2, controls_max=2, ids_max=2)
    message = WireMessage(b"a", b"", b"", "t", b"").encode()
    for chunks in (
        [message] * 3,
        [wire.subscription_chunk("t", True)] * 3,
        [wire.control_chunk([wire.graft_chunk("t")] * 3)],
        [wire.control_chunk([wire.prune_chunk("t", 1)] * 3)],
        [wire.control_chunk([wire.ihave_chunk("t", [])] * 3)],
        [wire.control_chunk([wire.ihave_chunk("t", [b"1", b"2"]), wire.ihave_chunk("t", [b"3"])])],
        [wire.control_chunk([wire.iwant_chunk([b"1"])] * 3)],
    ):
        body = b"".join(chunks)
        decode(body, LIMITS)
        with pytest.raises(Malformed):
            decode(body, small)


@given(st.lists(st.binary(max_size=300), max_size=10), st.integers(1, 50))
def test_frames_survive_any_fragmentation(bodies: list[bytes], step: int) -> None:
    stream = b"".join(uvarint(len(b)) + b for b in bodies)
    reader = FrameReader(LIMITS)
    got = [
        body for at in range(0, len(stream), step) for body in reader.feed(stream[at : at + step])
    ]
    assert got == bodies
    assert reader.buffered_bytes == 0


def test_a_frame_above_the_limit_is_refused_by_its_length() -> None:
    reader = FrameReader(WireLimits(frame_bytes_max=100))
    assert list(reader.feed(b"\x64" + b"x" * 100)) == [b"x" * 100]
    with pytest.raises(Malformed):
        list(reader.feed(b"\x65"))
    with pytest.raises(Malformed):
        list(FrameReader(LIMITS).feed(b"\x80\x80\x80\x80\x80\x80"))
