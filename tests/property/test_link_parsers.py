"""Whatever bytes come: a parser yields values or raises Violation, in time linear in the input."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import Counter
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from wetware.errors import ProtocolRefused
from wetware.identity import Key
from wetware.overlay.link import LinkLimits, Stream, Violation
from wetware.overlay.link.multistream import HELLO, LineReader, Proposer, Responder, encode_line
from wetware.overlay.link.noise import (
    NoiseHandshake,
    NoiseIdentity,
    protobuf_fields,
    verify_identity,
)
from wetware.overlay.link.yamux import Session, Totals

KEY = Key.generate()
IDENTITY = NoiseIdentity(KEY)
HEADER = struct.Struct("!BBHII")

names = st.text(st.characters(exclude_characters="\n", exclude_categories=("Cs",)), max_size=40)
cuts = st.lists(st.integers(1, 50), min_size=1, max_size=20)


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    out, at, turn = [], 0, 0
    while at < len(data):
        out.append(data[at : at + sizes[turn % len(sizes)]])
        at += sizes[turn % len(sizes)]
        turn += 1
    return out


@given(st.lists(names, max_size=10), cuts)
def test_lines_survive_any_cutting(lines: list[str], sizes: list[int]) -> None:
    reader, got = LineReader(), []
    for piece in pieces(b"".join(map(encode_line, lines)), sizes):
        reader.feed(piece)
        while (line := reader.line()) is not None:
            got.append(line)
    assert got == lines
    assert reader.rest() == b""


@given(st.lists(names, min_size=1, max_size=5), st.sets(names), cuts, st.binary(max_size=20))
def test_negotiation_agrees_on_the_first_common_protocol(
    wanted: list[str], served: set[str], sizes: list[int], tail: bytes
) -> None:
    wanted = [f"/{name}" for name in wanted]
    proposer = Proposer(wanted)
    responder = Responder({f"/{name}" for name in served}.__contains__, proposals_max=6)
    expected = next((name for name in wanted if name[1:] in served), None)
    out = proposer.start()
    refused = False
    while responder.chosen is None and not refused:
        answer = b"".join(responder.receive(piece) for piece in pieces(out, sizes))
        if responder.chosen is not None:
            answer += tail
        out = b""
        try:
            for piece in pieces(answer, sizes):
                out += proposer.receive(piece)
        except ProtocolRefused:
            refused = True
    assert responder.chosen == proposer.chosen == expected
    assert refused is (expected is None)
    if expected is not None:
        assert proposer.rest() == tail


@given(st.binary(max_size=400), cuts, st.booleans())
def test_garbage_lines_are_violations_or_wait(data: bytes, sizes: list[int], hello: bool) -> None:
    for machine in (Proposer(("/x",)), Responder(lambda name: False, proposals_max=8)):
        with contextlib.suppress(Violation, ProtocolRefused):
            for piece in pieces((HELLO if hello else b"") + data, sizes):
                machine.receive(piece)
        assert machine.chosen in (None, "/x")


@given(st.binary(max_size=300))
def test_any_protobuf_is_parsed_or_a_violation(data: bytes) -> None:
    with contextlib.suppress(Violation):
        for number, value in protobuf_fields(data):
            assert number >= 0
            assert isinstance(value, int | bytes)


@given(st.one_of(st.binary(max_size=300), st.just(IDENTITY.payload)), st.data())
def test_no_payload_is_accepted_for_another_static_key(payload: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, max(len(payload) - 1, 0)))
    flipped = (
        payload[:at] + bytes((payload[at] ^ data.draw(st.integers(0, 255)),)) if payload else b""
    )
    flipped += payload[at + 1 :]
    for candidate in (payload, flipped):
        try:
            peer = verify_identity(candidate, b"\x01" * 32)
        except Violation:
            continue
        raise AssertionError(f"accepted as {peer}")


@given(st.binary(max_size=200), st.booleans())
def test_garbage_handshake_messages_are_violations(message: bytes, initiator: bool) -> None:
    handshake = NoiseHandshake(IDENTITY, initiator=initiator)
    if initiator:
        handshake.write_message()
    try:
        handshake.read_message(message)
        handshake.write_message()
    except Violation:
        pass
    assert handshake.secured is None


frames = st.builds(
    lambda version, kind, flags, stream, size, body: (
        HEADER.pack(version, kind, flags, stream, len(body) if body else size) + body
    ),
    st.sampled_from([0] * 20 + [1]),
    st.integers(0, 4),
    st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4, 5, 8, 9, 15, 0xFFFF]),
    st.sampled_from([0, 1, 1, 1, 3, 3, 5, 2, 4, 0xFFFFFFFF]),
    st.sampled_from([0, 1, 100, 1 << 18, (1 << 18) + 1, 0xFFFFFFFF]),
    st.binary(max_size=60),
)


@settings(max_examples=300)
@given(st.lists(frames, max_size=30), cuts, st.data())
def test_any_frames_end_at_most_the_session(
    sent: list[bytes], sizes: list[int], data: st.DataObject
) -> None:
    loop = asyncio.new_event_loop()
    try:
        accepted: list[Stream] = []
        totals = Totals()
        session = Session(
            SimpleNamespace(peer=KEY.peer_id),  # type: ignore[arg-type]
            initiator=False,
            limits=LinkLimits(streams_in_per_connection_max=2),
            totals=totals,
            loop=loop,
            on_output=lambda: None,
            on_data=lambda: None,
            on_stream=accepted.append,
            on_reset=lambda stream: None,
            on_violation=lambda exc: None,
            refused=Counter(),
        )
        outbound = session.open()
        try:
            for piece in pieces(b"".join(sent), sizes):
                session.feed(piece)
                if accepted and data.draw(st.booleans()):
                    stream = accepted[-1]
                    with contextlib.suppress(Exception):
                        stream.read_nowait()
                    with contextlib.suppress(Exception):
                        stream.write_nowait(b"reply")
                    if data.draw(st.booleans()):
                        stream.close()
                    stream.urgent = data.draw(st.booleans())
                session.pull(1 << 20)
                assert totals.buffered_bytes == sum(
                    stream._held for stream in {*accepted, outbound}
                )
        except Violation:
            pass
        session.end(OSError("over"))
        assert (session.streams_in, session.streams_out) == (0, 0)
        assert (totals.buffered_bytes, totals.unsent_bytes, totals.grown_bytes) == (0, 0, 0)
    finally:
        loop.close()
