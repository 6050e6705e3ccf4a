"""Framing, bookkeeping and backpressure of the transport; hostile bytes."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Collection
from typing import Any

import capnp
import pytest

from wetware import rpc
from wetware.errors import Disconnected, OverlayError
from wetware.rpc.framing import (
    BOOTSTRAP,
    CALL,
    DATA,
    FINISH,
    GRANT,
    RETURN,
    FramingError,
    message_bytes,
    message_kind,
)
from wetware.rpc.limits import RpcLimits, wire_bytes_max
from wetware.rpc.pipes import SocketPipe
from wetware.rpc.transport import Partials, RpcTransport

pytestmark = pytest.mark.anyio
_rpc = capnp.load(
    os.path.join(os.path.dirname(capnp.__file__), "rpc.capnp"),
    imports=[os.path.dirname(os.path.dirname(capnp.__file__))],
)


def call(ident: int, data_bytes: int = 0) -> bytes:
    message = _rpc.Message.new_message()
    body = message.init("call")
    body.questionId = ident
    body.target.importedCap = 0
    if data_bytes:
        body.params.content.set_as_text("x" * data_bytes)
    return message.to_bytes()


def simple(kind: str, ident: int) -> bytes:
    message = _rpc.Message.new_message()
    body = message.init(kind)
    if kind == "return":
        body.answerId = ident
    else:
        body.questionId = ident
    return message.to_bytes()


def test_the_discriminants_are_those_of_the_schema() -> None:
    names = {
        field.discriminantValue: field.name for field in _rpc.Message.schema.node.struct.fields
    }
    assert (names[CALL], names[RETURN], names[FINISH], names[BOOTSTRAP]) == (
        "call",
        "return",
        "finish",
        "bootstrap",
    )


@pytest.mark.parametrize("ident", [0, 1, 77, 2**32 - 1])
def test_message_kind(ident: int) -> None:
    for kind, data in (
        (CALL, call(ident)),
        (CALL, call(ident, 5000)),
        (RETURN, simple("return", ident)),
        (FINISH, simple("finish", ident)),
        (BOOTSTRAP, simple("bootstrap", ident)),
    ):
        padded = b"\1" * 8 + data
        assert message_bytes(padded, 8) == len(data)
        assert message_kind(padded, 8, len(data)) == (kind, ident)
    release = _rpc.Message.new_message()
    release.init("release").id = ident
    data = release.to_bytes()
    assert message_kind(data, 0, len(data))[0] == 6


def test_a_message_of_several_segments() -> None:
    single = call(9)
    body = single[8:]
    segments = struct.pack("<IIII", 2, len(body) // 8, 1, 0) + body + bytes(8)
    assert message_bytes(segments, 0) == len(segments)
    assert message_kind(segments, 0, len(segments)) == (CALL, 9)
    assert message_bytes(segments[:12], 0) == 0


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<Q", 2),  # a far pointer as root
        struct.pack("<Q", 1),  # a list as root
        struct.pack("<Q", 0x7FFF_FFF0_0000_0000 | 0x7FFF_FFF0),  # leaves the message
        struct.pack("<Q", 0x0001_0001_FFFF_FFF0),  # points before the message
        struct.pack("<QQQ", 0x0001_0001_0000_0000, CALL, 2),  # a call behind a far pointer
        b"",
    ],
)
def test_heads_that_no_encoder_makes(body: bytes) -> None:
    data = struct.pack("<II", 0, len(body) // 8) + body
    with pytest.raises(FramingError):
        message_kind(data, 0, len(data))


class Protocol:
    """Reads like pycapnp: 8 bytes, then the rest of the message, pausing in between."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.got = bytearray()
        self.lost: list[Any] = []
        self.buffer = bytearray()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def want(self, count: int) -> None:
        self.buffer = bytearray(count)
        self.at = 0
        self.transport.resume_reading()

    def get_buffer(self, _hint: int) -> memoryview:
        return memoryview(self.buffer)[self.at :]

    def buffer_updated(self, count: int) -> None:
        self.at += count
        if self.at == len(self.buffer):
            self.transport.pause_reading()
            self.got += self.buffer

    def eof_received(self) -> None:
        raise AssertionError("pycapnp crashes on this")

    def connection_lost(self, exc: Any) -> None:
        self.lost.append(exc)


class Pipe:
    peer = "somebody"

    def __init__(self) -> None:
        self.paused: list[bool] = []
        self.sent = bytearray()
        self.takes = 1 << 30
        self.ended = ""

    def start(self, transport: RpcTransport) -> None:
        self.transport = transport

    def flush(self) -> None:
        pass

    def write(self, pieces: Collection[memoryview]) -> int:
        data = b"".join(pieces)
        count = min(self.takes, len(data))
        self.sent += data[:count]
        self.takes -= count
        return count

    def pause(self) -> None:
        self.paused.append(True)

    def resume(self) -> None:
        self.paused.append(False)

    def close(self) -> None:
        self.ended = "close"

    def abort(self) -> None:
        self.ended = "abort"


class Rig:
    def __init__(self, partials: Partials | None = None, **limits: Any) -> None:
        self.pipe, self.protocol = Pipe(), Protocol()
        self.lost: list[Any] = []
        self.sent: list[int] = []
        self.drained = 0

        def drained() -> None:
            self.drained += 1

        self.transport = RpcTransport(
            self.pipe, RpcLimits(**limits), self.lost.append, self.sent.append, drained, partials
        )
        self.transport.begin(self.protocol)

    def write(self, message: bytes) -> None:
        """As pycapnp does: the table of segments, then each segment."""
        count = struct.unpack_from("<I", message)[0] + 1
        at = (4 + 4 * count + 7) & ~7
        self.transport.write(message[:at])
        for words in struct.unpack_from(f"<{count}I", message, 4):
            self.transport.write(message[at : at + 8 * words])
            at += 8 * words


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_whole_messages_only_are_handed_over() -> None:
    rig = Rig()
    rig.protocol.want(8)
    message = call(1, 100)
    for byte in message[:-1]:
        rig.transport.feed(bytes([byte]))
    assert rig.protocol.got == b""
    rig.transport.feed(message[-1:] + message[:5])
    assert rig.protocol.got == message[:8]
    rig.protocol.want(len(message) - 8)
    assert rig.protocol.got == message
    rig.protocol.want(8)
    rig.transport.feed(memoryview(message)[5:])
    assert rig.protocol.got == message + message[:8]


def two_segments(ident: int, data_bytes: int) -> bytes:
    """As pycapnp lays out a call with much data: it has a segment of its own."""
    body = call(ident)[8:]
    words = len(body) // 8, data_bytes // 8
    return struct.pack("<IIII", 1, *words, 0) + body + os.urandom(words[1] * 8)


@pytest.mark.parametrize("make", [call, two_segments])
@pytest.mark.parametrize("size", [7, 30, 5000, 20_000, 60_000, 150_000])
async def test_a_long_message_arrives_in_its_pieces_and_its_kind_is_told(
    make: Any, size: int
) -> None:
    rig = Rig()
    stream = b"".join(make(i, 100_000) + simple("finish", 77) for i in range(1, 5))
    rig.protocol.want(len(stream))
    for at in range(0, len(stream), size):
        rig.transport.feed(stream[at : at + size])
        rest = len(stream) if at + size >= len(stream) else at + size
        held = len(rig.transport._partial)
        assert rig.protocol.at + held == rest if rig.protocol.got == b"" else held == 0
    assert rig.protocol.got == stream
    assert sorted(rig.transport._answers) == [1, 2, 3, 4]


async def test_a_short_rest_does_not_keep_what_it_came_with() -> None:
    rig = Rig()
    message = call(1, 100_000)
    data = simple("finish", 1) * 8000 + message[:40_000]
    rig.transport.feed(data)
    assert rig.transport._partial == message[:40_000]
    assert isinstance(rig.transport._partial, bytearray)  # and no view of something longer


async def test_long_pieces_leave_as_they_are_and_short_ones_together() -> None:
    rig = Rig()
    written: list[list[int]] = []
    write = rig.pipe.write

    def note(pieces: Collection[memoryview]) -> int:
        written.append([len(piece) for piece in pieces])
        return write(pieces)

    rig.pipe.write = note  # type: ignore[method-assign]
    long = two_segments(1, 100_000)
    messages = [simple("finish", 9), long, call(2), call(3)]
    first, last = len(messages[0]) + len(long) - 100_000, 2 * len(call(2))
    for message in messages:
        rig.write(message)
    await turn()
    assert written == [[first, 100_000], [len(call(2))], [len(call(3))]], "none waits: few are open"
    written.clear()
    rig.transport._asked = 10
    for message in messages:
        rig.write(message)
    await turn()
    assert written == [[first, 100_000, last]]
    rig.pipe.takes = first + 50_000
    for message in messages:
        rig.write(message)
    await turn()
    assert rig.transport.out_bytes == 50_000 + last
    rig.pipe.takes = 1 << 30
    rig.transport.writable()
    assert rig.pipe.sent == b"".join(messages) * 3
    assert rig.transport.out_bytes == 0


@pytest.mark.parametrize("make", [two_segments, call])
async def test_results_behind_long_calls_are_found(make: Any) -> None:
    rig = Rig()
    for ident in range(20):
        rig.write(make(ident, 50_000))
        rig.write(simple("return", ident))
        if ident % 3 == 0:
            await turn()
    await turn()
    assert len(rig.sent) == 20


async def test_an_oversize_message_is_refused_by_its_head() -> None:
    rig = Rig(message_bytes_max=1000)
    words = wire_bytes_max(RpcLimits(message_bytes_max=1000)) // 8 + 1
    rig.transport.feed(struct.pack("<II", 0, words))
    await turn()
    assert isinstance(rig.lost[0], FramingError)
    assert "message_bytes_max is 1000" in str(rig.lost[0])
    assert rig.pipe.ended == "abort"
    assert len(rig.protocol.lost) == 1


async def test_incomplete_messages_of_all_connections_are_bounded() -> None:
    partials = Partials()
    rigs = [Rig(partials, partial_bytes_total_max=100_000) for _ in range(6)]
    old, large, trusted, *others = rigs
    for rig in rigs:
        rig.transport.trusted = rig is trusted
    message = call(1, 60_000)
    old.transport.feed(message[:20_000])
    large.transport.feed(message[:25_000])
    trusted.transport.feed(message[:50_000])
    assert partials.total_bytes == 95_000
    others[0].transport.feed(message[:2_000])
    assert partials.total_bytes == 97_000
    others[1].transport.feed(message[:4_000])  # too much: the largest stranger gives way at once
    assert partials.total_bytes == 76_000
    assert large.transport._partial == b""
    await turn()
    assert [bool(rig.lost) for rig in rigs] == [False, True, False, False, False, False]
    assert "partial_bytes_total_max" in str(large.lost[0])
    assert large.pipe.ended == "abort"
    trusted.transport.feed(message[50_000:] + message[:10])  # complete: it holds little again
    assert partials.total_bytes == 26_010
    for rig in rigs:
        rig.transport.abort()
    await turn()
    assert partials.total_bytes == 0
    assert partials._held == {}


async def test_without_strangers_the_largest_incomplete_message_gives_way() -> None:
    partials = Partials()
    one, two = (Rig(partials, partial_bytes_total_max=100_000) for _ in range(2))
    message = call(1, 200_000)
    one.transport.feed(message[:40_000])
    two.transport.feed(message[:60_000])
    assert partials.total_bytes == 100_000
    one.transport.feed(message[40_000:60_001])
    await turn()
    assert (bool(one.lost), bool(two.lost)) == (True, False)
    assert partials.total_bytes == 60_000


async def test_a_message_that_is_never_completed() -> None:
    rig = Rig(message_s=0.1)
    message = call(1, 5000)
    rig.transport.feed(message + message[:20])
    loop = asyncio.get_running_loop()
    began, at = loop.time(), 20
    async with asyncio.timeout(60):
        while not rig.lost:  # a byte now and then is no progress
            rig.transport.feed(message[at : at + 1])
            at += 1
            await asyncio.sleep(0.01)
    assert loop.time() - began >= 0.1
    assert "message_s" in str(rig.lost[0])


async def test_messages_that_are_completed_in_time_take_as_long_as_they_like_together() -> None:
    rig = Rig(message_s=0.2)
    rig.protocol.want(1 << 20)
    message = call(1, 5000)
    loop = asyncio.get_running_loop()
    began = loop.time()
    rig.transport.feed(message[:30])
    while loop.time() - began < 0.5:  # there is an incomplete one at any time
        rig.transport.feed(message[30:] + simple("finish", 1) + message[:30])
        await asyncio.sleep(0.01)
    assert rig.lost == []
    rig.transport.feed(message[30:] + simple("finish", 1))
    await asyncio.sleep(0.3)
    assert rig.lost == []  # nothing is incomplete


async def test_a_message_that_we_hold_up_is_not_late() -> None:
    rig = Rig(message_s=0.1, call_bytes_in_max=10_000)
    first, second = call(1, 6000), call(2, 6000)
    rig.protocol.want(len(first) + 2 * len(second))
    rig.transport.feed(first + second + second[:30])
    assert rig.pipe.paused == [True]
    await asyncio.sleep(0.3)
    assert rig.lost == []
    rig.write(simple("return", 1))
    await turn()
    assert rig.pipe.paused == [True, False]
    assert rig.lost == []
    async with asyncio.timeout(60):
        while not rig.lost:
            await asyncio.sleep(0.01)
    assert "message_s" in str(rig.lost[0])


async def test_other_limits_hold_from_then_on() -> None:
    rig = Rig(message_bytes_max=1000, call_bytes_in_max=1000)
    rig.protocol.want(1 << 20)
    rig.transport.feed(call(1, 900))
    rig.transport.feed(call(2, 900))
    assert rig.pipe.paused == [True]
    rig.transport.use(RpcLimits())
    await turn()
    assert rig.pipe.paused == [True, False]
    rig.transport.feed(call(3, 500_000)[:400_000])
    assert rig.lost == []


async def test_too_many_segments() -> None:
    rig = Rig()
    rig.transport.feed(struct.pack("<II", 0xFFFF_FFFC, 0))
    await turn()
    assert "segments" in str(rig.lost[0])


async def test_the_end_is_told_once_after_everything_was_read() -> None:
    rig = Rig()
    message = call(1)
    rig.transport.feed(message)
    rig.transport.feed_eof()
    await turn()
    assert rig.lost == []
    rig.protocol.want(len(message))
    await turn()
    assert rig.protocol.got == message
    assert len(rig.lost) == len(rig.protocol.lost) == 1
    rig.transport.feed(message)
    rig.transport.feed_eof()
    rig.transport.close()
    rig.transport.abort()
    await turn()
    assert len(rig.lost) == len(rig.protocol.lost) == 1


async def test_the_end_is_told_while_reading_is_paused() -> None:
    rig = Rig()
    rig.transport.feed(call(1)[:20])
    rig.transport.feed_eof()
    await turn()
    assert len(rig.protocol.lost) == 1


async def test_calls_without_answers_stop_the_reading() -> None:
    rig = Rig(call_bytes_in_max=10_000)
    big = call(1, 6000)
    rig.protocol.want(len(big))
    rig.transport.feed(big)
    assert rig.protocol.got == big
    second = call(2, 6000)
    rig.protocol.want(len(second))
    rig.transport.feed(second)
    assert rig.protocol.got == big  # the second waits: 12 kB would be held
    assert rig.pipe.paused == [True]
    rig.write(simple("return", 1))
    await turn()
    assert rig.protocol.got == big + second
    assert rig.pipe.paused == [True, False]
    assert rig.sent == [len(simple("return", 1))]


async def test_a_call_that_is_finished_without_an_answer_is_forgotten() -> None:
    rig = Rig(call_bytes_in_max=10_000, answers_max=3)
    rig.protocol.want(1 << 20)
    for i in range(100):
        rig.transport.feed(call(i, 6000) + simple("finish", i))
    assert rig.lost == []
    assert rig.transport._in_bytes == 0
    assert rig.transport._answers == {}


async def test_calls_that_are_never_finished() -> None:
    rig = Rig(answers_max=10)
    rig.protocol.want(1 << 20)
    for i in range(10):
        rig.transport.feed(simple("bootstrap", i))
    rig.write(simple("return", 3))  # answered is not finished
    await turn()
    assert rig.lost == []
    rig.transport.feed(call(10))
    await turn()
    assert "answers_max is 10" in str(rig.lost[0])


async def test_much_unread_stops_the_reading() -> None:
    rig = Rig()
    for _ in range(10):
        rig.transport.feed(simple("finish", 1) * 1000)
    assert rig.pipe.paused == [True]
    rig.protocol.want(len(simple("finish", 1)) * 10_000)
    assert rig.pipe.paused == [True, False]


async def test_a_reader_that_has_given_up_ends_the_connection() -> None:
    """As pycapnp does after a message that makes no sense: the end would not be seen either."""
    rig = Rig(message_s=0.05, close_s=0.05)
    rig.transport.feed(simple("finish", 1) * 20_000)
    async with asyncio.timeout(60):
        while not rig.lost:
            await asyncio.sleep(0.01)
    assert "could not be read" in str(rig.lost[0])
    rig = Rig(close_s=0.05)
    rig.transport.feed(simple("finish", 1))
    rig.transport.feed_eof()
    async with asyncio.timeout(60):
        while not rig.lost:
            await asyncio.sleep(0.01)
    assert len(rig.protocol.lost) == 1


async def test_a_reader_that_goes_on_slowly_keeps_the_connection() -> None:
    rig = Rig()
    rig.transport.feed(simple("finish", 1) * 20_000)
    for _ in range(3):
        before = rig.transport._read_bytes
        rig.protocol.want(8)
        rig.transport._check_reader(before)
        await turn()
        assert rig.lost == []
    rig.transport._check_reader(rig.transport._read_bytes)
    await turn()
    assert "could not be read" in str(rig.lost[0])


async def test_results_are_found_among_calls() -> None:
    rig = Rig()
    messages = [simple("return", 1), call(5, 3000), simple("return", 2), simple("finish", 3)] * 20
    for i, message in enumerate(messages):
        rig.write(message)
        if i % 3 == 0:
            await turn()
    await turn()
    assert rig.sent == [len(simple("return", 1))] * 40
    assert rig.pipe.sent == b"".join(messages)


async def test_a_peer_that_does_not_read_is_dropped() -> None:
    rig = Rig(out_bytes_max=100_000)
    rig.pipe.takes = 10
    rig.transport.send_frame(DATA, 1, 99_000, bytes(99_000))
    await turn()
    assert rig.lost == []
    rig.write(call(1, 2000))
    await turn()
    assert "does not read" in str(rig.lost[0])


async def test_a_peer_that_stalls_is_dropped() -> None:
    rig = Rig(write_stall_s=0.05)
    rig.pipe.takes = 0
    rig.write(simple("return", 1))
    async with asyncio.timeout(60):
        while not rig.lost:
            await asyncio.sleep(0.01)
    assert "write_stall_s" in str(rig.lost[0])


async def test_a_slow_peer_is_not_dropped() -> None:
    rig = Rig(write_stall_s=0.5)
    rig.pipe.takes = 3
    data = simple("return", 1)
    rig.write(data)
    await turn()
    while len(rig.pipe.sent) < len(data):
        rig.pipe.takes = 3
        rig.transport.writable()
    assert rig.pipe.sent == data
    assert rig.transport._blocked is None
    assert rig.lost == []


async def test_closing_sends_what_is_queued_first() -> None:
    rig = Rig()
    rig.write(bytes(8))
    rig.transport.close()
    rig.write(call(1))  # not taken any more
    await turn()
    assert rig.pipe.sent == bytes(8)
    assert rig.pipe.ended == "close"
    assert rig.lost == [None]


async def test_closing_gives_up_on_a_peer_that_does_not_read() -> None:
    rig = Rig(close_s=0.05)
    rig.pipe.takes = 4
    rig.write(bytes(8))
    rig.transport.close()
    async with asyncio.timeout(60):
        while not rig.lost:
            await asyncio.sleep(0.01)
    assert rig.pipe.ended == "abort"


# --- frames
# -----------------------------------------------------------------------------------------


class Channel:
    def __init__(self) -> None:
        self.got = bytearray()
        self.ends = self.may_send = 0

    def fed(self, data: memoryview) -> None:
        self.got += data
        self.ends += not data

    def granted(self, count: int) -> None:
        self.may_send += count


def frame(kind: int, channel: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", kind, count, channel) + data


@pytest.mark.parametrize("size", [1, 7, 16, 17, 100, 100_000, 1 << 30])
async def test_frames_between_messages_reach_their_channel(size: int) -> None:
    rig = Rig()
    one, two = Channel(), Channel()
    rig.transport.channels |= {5: one, 2**64 - 1: two}
    data = os.urandom(5000)
    messages = [call(1), call(2, 5000), simple("finish", 1), two_segments(3, 4000)]
    stream = b"".join(
        (
            frame(DATA, 5, 3, b"abc"),
            messages[0],
            messages[1],
            frame(DATA, 9, 100, bytes(100)),  # nobody's
            frame(DATA, 2**64 - 1, len(data), data),
            frame(GRANT, 5, 77),
            frame(GRANT, 9, 77),
            messages[2],
            frame(DATA, 5, 2, b"de"),
            frame(DATA, 5, 0),
            messages[3],
        )
    )
    rig.protocol.want(sum(map(len, messages)))
    for at in range(0, len(stream), size):
        rig.transport.feed(stream[at : at + size])
    assert rig.protocol.got == b"".join(messages)
    assert (one.got, one.ends, one.may_send) == (b"abcde", 1, 77)
    assert (two.got, two.ends, two.may_send) == (data, 0, 0)
    assert sorted(rig.transport._answers) == [2, 3]
    assert rig.transport._queued_bytes == len(rig.transport._partial) == 0


async def test_frames_do_not_wait_behind_calls_that_do() -> None:
    rig = Rig(call_bytes_in_max=10_000)
    channel = rig.transport.channels[5] = Channel()
    rig.transport.feed(call(1, 6000) + call(2, 6000) + frame(DATA, 5, 1, b"x"))
    assert rig.pipe.paused == [True]
    assert channel.got == b"x"


async def test_frames_leave_between_messages_and_are_no_results() -> None:
    rig = Rig()
    sent = b""
    for ident in range(10):
        rig.write(simple("return", ident))
        rig.transport.send_frame(DATA, ident, 30_000, bytes(30_000))
        rig.transport.send_frame(GRANT, ident, 7)
        sent += simple("return", ident) + frame(DATA, ident, 30_000, bytes(30_000))
        sent += frame(GRANT, ident, 7)
    await turn()
    assert rig.pipe.sent == sent
    assert rig.sent == [len(simple("return", 1))] * 10


async def test_who_waits_until_bytes_have_left_is_called_once_they_have() -> None:
    rig = Rig()
    rig.pipe.takes = 10
    rig.transport.send_frame(DATA, 1, 100, bytes(100))
    called: list[int] = []
    rig.transport.when_drained(lambda: called.append(rig.transport.out_bytes))
    await turn()
    assert called == []
    rig.pipe.takes = 1000
    rig.transport.writable()
    assert called == []  # not from within
    await turn()
    assert called == [0]


# --- hostile bytes through the whole stack
# -----------------------------------------------------------


def _hostile() -> list[bytes]:
    abort = _rpc.Message.new_message()
    abort.init("abort").reason = "because"
    odd = _rpc.Message.new_message()
    odd.init("disembargo").target.importedCap = 99
    provide = _rpc.Message.new_message()
    provide.init("provide").questionId = 3
    returned = simple("return", 12345)
    good = call(1, 100)
    cut = bytearray(good)
    cut[40:44] = b"\xff\xff\xff\x7f"
    return [
        os.urandom(4096),
        bytes(4096),
        b"\xff" * 4096,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10,
        abort.to_bytes(),
        odd.to_bytes(),
        provide.to_bytes(),
        returned,
        simple("finish", 4242),
        call(1),
        bytes(cut),
        simple("bootstrap", 1) * 2,
        simple("bootstrap", 1) + call(2, 900),
    ]


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (BrokenPipeError("gone"), False),
        (OverlayError("reset", code="overlay.closed"), False),
        (TypeError("a defect"), True),
    ],
)
async def test_a_pipe_that_fails_ends_the_connection(
    error: Exception, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer that leaves is nothing to report; a defect of the pipe is, with its traceback."""
    rig = Rig()

    def write(_data: object) -> int:
        raise error

    rig.pipe.write = write  # type: ignore[method-assign]
    rig.write(call(1))
    await turn()
    assert len(rig.lost) == 1
    assert str(error) in str(rig.lost[0])
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == (
        ["rpc.write_failed"] if logged else []
    )


@pytest.mark.parametrize("case", range(len(_hostile())))
async def test_hostile_bytes_cost_the_connection_and_no_more(
    serving: Any, servants: Any, case: int
) -> None:
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        ours, theirs = socket.socketpair()
        server = asyncio.ensure_future(rpc.serve(SocketPipe(ours), servants.Zoo(), RpcLimits()))
        loop = asyncio.get_running_loop()
        theirs.setblocking(False)
        await loop.sock_sendall(theirs, _hostile()[case])
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(60):
            await server
        theirs.close()
        assert await zoo.data(data=b"still here") == {"data": b"still here"}


@pytest.mark.parametrize("case", range(len(_hostile())))
async def test_hostile_bytes_from_a_server(schema: rpc.Schema, case: int) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    async with await rpc.connect(SocketPipe(ours), RpcLimits()) as connection:
        calling = asyncio.ensure_future(connection.bootstrap(schema.Zoo).nothing())
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(theirs, _hostile()[case])
        theirs.close()
        async with asyncio.timeout(60):
            with pytest.raises(Disconnected):
                await calling
            await connection.wait_closed()
