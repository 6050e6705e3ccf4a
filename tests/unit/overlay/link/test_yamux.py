"""The multiplexer alone: two sessions, or a session and hand-made frames, joined in memory."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.errors import LimitExceeded, OverlayError, StreamReset
from wetware.identity import Key
from wetware.overlay.link import LinkLimits, Stream, Violation
from wetware.overlay.link.yamux import Session, Totals

pytestmark = pytest.mark.anyio

DATA, WINDOW, PING, GOAWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER = struct.Struct("!BBHII")
KIB = 1 << 10


def frame(kind: int, flags: int, stream: int, size: int | bytes = 0) -> bytes:
    body = size if isinstance(size, bytes) else b""
    return HEADER.pack(0, kind, flags, stream, len(body) if body else size) + body


class End:
    """One session with what it was told and what it counted."""

    def __init__(self, *, initiator: bool = False, **limits: Any) -> None:
        self.accepted: list[Stream] = []
        self.refused: Counter[str] = Counter()
        self.totals = Totals()
        self.session = Session(
            SimpleNamespace(peer=Key.generate().peer_id),  # type: ignore[arg-type]
            initiator=initiator,
            limits=LinkLimits(**limits),
            totals=self.totals,
            loop=asyncio.get_running_loop(),
            on_output=lambda: None,
            on_data=lambda: None,
            on_stream=self.accepted.append,
            on_reset=lambda stream: None,
            on_violation=lambda exc: None,
            refused=self.refused,
        )

    def feed(self, *frames: bytes) -> None:
        self.session.feed(b"".join(frames))

    def sent(self, bytes_max: int = 1 << 20) -> list[tuple[int, int, int, int, bytes]]:
        data, out = b"".join(self.session.pull(bytes_max)), []
        at = 0
        while at < len(data):
            _, kind, flags, stream, size = HEADER.unpack_from(data, at)
            body = data[at + 12 : at + 12 + size] if kind == DATA else b""
            at += 12 + len(body)
            out.append((kind, flags, stream, size, body))
        return out


def join(*ends: End) -> None:
    """Carry what both have to say until both are silent."""
    while any(end.session.pending for end in ends):
        for one, other in (ends, ends[::-1]):
            other.feed(b"".join(one.session.pull(1 << 20)))


async def test_bytes_and_ends_travel_both_ways() -> None:
    a, b = End(initiator=True), End()
    stream = a.session.open()
    assert stream.write_nowait(b"hello") == 5
    stream.close()
    join(a, b)
    (remote,) = b.accepted
    assert await remote.read_exactly(5) == b"hello"
    assert await remote.read() == b""
    await remote.write(b"bye")
    remote.close()
    join(a, b)
    assert await stream.read() == b"bye"
    assert stream.ended
    assert not a.session.streams
    assert not b.session.streams
    assert (a.session.streams_out, b.session.streams_in) == (0, 0)
    with pytest.raises(OverlayError, match="closed"):
        stream.write_nowait(b"more")


async def test_frames_may_be_cut_anywhere() -> None:
    whole = frame(WINDOW, SYN, 1) + frame(DATA, 0, 1, b"abcdef") + frame(DATA, FIN, 1, b"gh")
    for step in (1, 5, 7, 13):
        end = End()
        for at in range(0, len(whole), step):
            end.session.feed(whole[at : at + step])
        (stream,) = end.accepted
        assert await stream.read_exactly(8) == b"abcdefgh"
        assert await stream.read() == b""


async def test_the_send_window_is_respected_and_refilled() -> None:
    end = End(initiator=True, stream_unsent_bytes_max=1 << 20)
    stream = end.session.open()
    assert stream.write_nowait(b"x" * 300 * KIB) == 300 * KIB
    assert sum(size for kind, *_, size, _b in end.sent() if kind == DATA) == 256 * KIB
    assert not end.session.pending
    end.feed(frame(WINDOW, 0, 1, 1000))
    assert sum(size for kind, *_, size, _b in end.sent() if kind == DATA) == 1000


async def test_an_overrun_of_the_receive_window_is_a_violation() -> None:
    end = End()
    end.feed(frame(WINDOW, SYN, 1), frame(DATA, 0, 1, b"x" * 256 * KIB))
    with pytest.raises(Violation, match="window"):
        end.feed(frame(DATA, 0, 1, b"x"))


async def test_the_window_comes_back_as_the_reader_reads_and_grows() -> None:
    end = End(stream_window_bytes=1 << 20)
    end.feed(frame(WINDOW, SYN, 1), frame(DATA, 0, 1, b"x" * 256 * KIB))
    end.sent()
    (stream,) = end.accepted
    await stream.read_exactly(30 * KIB)
    assert end.sent() == []  # not for every few bytes
    await stream.read_exactly(170 * KIB)
    ((kind, _, _, delta, _),) = end.sent()
    assert (kind, delta) == (WINDOW, 200 * KIB + 256 * KIB)
    end.feed(frame(DATA, 0, 1, b"x" * delta))  # exactly what was granted
    with pytest.raises(Violation):
        end.feed(frame(DATA, 0, 1, b"x"))


async def test_a_sender_waits_for_no_more_than_an_eighth_of_the_window() -> None:
    end = End()
    end.feed(frame(WINDOW, SYN, 1), frame(DATA, 0, 1, b"x" * 256 * KIB))
    end.sent()
    (stream,) = end.accepted
    end.session.rtt_s = 0.0  # the window does not grow
    credited = 0
    for read in range(1, 257):
        await stream.read_exactly(KIB)
        credited += sum(size for kind, *_, size, _b in end.sent() if kind == WINDOW)
        assert read * KIB - 32 * KIB < credited <= read * KIB


async def test_grown_windows_are_bounded_in_all() -> None:
    end = End(stream_window_bytes=1 << 20, buffered_per_connection_bytes_max=768 * KIB)
    for stream_id in (1, 3):
        end.feed(frame(WINDOW, SYN, stream_id), frame(DATA, 0, stream_id, b"x" * 200 * KIB))
        await end.accepted[-1].read_exactly(200 * KIB)
    deltas = [size for kind, flags, _, size, _b in end.sent() if kind == WINDOW and not flags]
    assert deltas == [200 * KIB + 256 * KIB, 200 * KIB]  # half of 768 KiB holds one growth
    end.feed(frame(WINDOW, RST, 1))
    assert end.totals.grown_bytes == 0


async def test_control_frames_leave_first_and_streams_take_turns() -> None:
    end = End(initiator=True)
    bulk, small = end.session.open(), end.session.open()
    end.sent()
    bulk.write_nowait(b"b" * 200 * KIB)
    small.write_nowait(b"s")
    end.feed(frame(PING, SYN, 0, 7))
    kinds = [(kind, stream) for kind, _, stream, _, _ in end.sent()]
    assert kinds[:3] == [(PING, 0), (DATA, bulk.id), (DATA, small.id)]


def order(end: End, bytes_max: int = 1 << 20) -> list[tuple[int, int]]:
    """(stream, bytes) of each data frame that leaves, in order."""
    return [(stream, size) for kind, _, stream, size, _b in end.sent(bytes_max) if kind == DATA]


async def test_urgent_streams_go_before_all_others_and_after_control_frames() -> None:
    end = End(initiator=True)
    bulk, probe, other = (end.session.open() for _ in range(3))
    end.sent()
    bulk.write_nowait(b"b" * 200 * KIB)
    other.write_nowait(b"o")
    probe.urgent = True
    probe.write_nowait(b"probe")
    end.feed(frame(PING, SYN, 0, 7))
    kinds = [(kind, stream) for kind, _, stream, _, _ in end.sent()]
    assert kinds[:4] == [(PING, 0), (DATA, probe.id), (DATA, bulk.id), (DATA, other.id)]


async def test_urgency_can_be_set_and_taken_back_while_data_waits() -> None:
    end = End(initiator=True)
    streams = [end.session.open() for _ in range(3)]
    first, second, third = streams
    end.sent()
    for stream in streams:
        stream.write_nowait(b"x" * 10)
    third.urgent = True
    assert third.urgent
    third.urgent = True  # no second place in the queue
    assert order(end) == [(third.id, 10), (first.id, 10), (second.id, 10)]
    for stream in streams:
        stream.write_nowait(b"x" * 10)
    third.urgent = False
    assert order(end) == [(first.id, 10), (second.id, 10), (third.id, 10)]
    second.urgent = True  # with nothing queued
    assert not end.session.pending


async def test_an_urgent_stream_keeps_its_turn_after_a_window_update() -> None:
    end = End(initiator=True, stream_unsent_bytes_max=1 << 20, urgent_flush_bytes_max=1 << 20)
    bulk, probe = end.session.open(), end.session.open()
    probe.urgent = True
    bulk.write_nowait(b"b" * 1024 * KIB)
    probe.write_nowait(b"p" * 300 * KIB)
    while end.session.pending:
        end.sent()
    end.feed(frame(WINDOW, 0, bulk.id, 100), frame(WINDOW, 0, probe.id, 100))
    assert order(end) == [(probe.id, 100), (bulk.id, 100)]


async def test_urgent_streams_share_a_bounded_part_of_each_flush() -> None:
    end = End(initiator=True, urgent_flush_bytes_max=8 * KIB)
    bulk, greedy, probe = (end.session.open() for _ in range(3))
    greedy.urgent = probe.urgent = True
    end.sent()
    bulk.write_nowait(b"b" * 250 * KIB)
    greedy.write_nowait(b"g" * 100 * KIB)
    probe.write_nowait(b"p" * 100)
    flushes = [order(end, 128 * KIB) for _ in range(3)]
    # The greedy one has its share, the others go on, and the probe is next of the urgent ones.
    assert flushes[0][0] == (greedy.id, 8 * KIB)
    assert [stream for stream, _ in flushes[0][1:]] == [bulk.id] * 2
    assert flushes[1][:2] == [(probe.id, 100), (greedy.id, 8 * KIB - 100)]
    assert flushes[1][2][0] == bulk.id
    # Once nothing else waits, there is nothing to hold it back for.
    assert flushes[2] == [(greedy.id, 64 * KIB), (greedy.id, 20 * KIB + 100)]


async def test_urgent_streams_get_at_most_half_of_a_small_flush() -> None:
    end = End(initiator=True)
    bulk, greedy = end.session.open(), end.session.open()
    greedy.urgent = True
    end.sent()
    bulk.write_nowait(b"b" * 200 * KIB)
    greedy.write_nowait(b"g" * 200 * KIB)
    for _ in range(3):
        flush = order(end, 4 * KIB)
        assert flush[0] == (greedy.id, 2 * KIB)
        assert flush[1][0] == bulk.id


async def test_an_urgent_stream_ends_like_any_other() -> None:
    a, b = End(initiator=True), End()
    stream, gone = a.session.open(), a.session.open()
    stream.urgent = gone.urgent = True
    stream.write_nowait(b"hello")
    gone.write_nowait(b"lost")
    gone.reset()
    stream.close()
    join(a, b)
    assert await b.accepted[0].read_exactly(5) == b"hello"
    assert await b.accepted[0].read() == b""
    assert a.totals.unsent_bytes == 0
    assert not a.session.pending


@pytest.mark.parametrize("parts", [1, 4])
async def test_a_window_grows_only_if_half_of_it_goes_in_a_few_round_trips(parts: int) -> None:
    for rtt_s, growths in ((0.0, 0), (1e9, 3)):
        end = End(stream_window_bytes=4 << 20)
        end.session.rtt_s = rtt_s
        end.feed(frame(WINDOW, SYN, 1))
        (stream,) = end.accepted
        end.sent()
        target = 256 * KIB
        for turn in range(4):
            half = target // 2
            end.feed(frame(DATA, 0, 1, b"x" * half))
            deltas = []
            for _ in range(parts):
                await stream.read_exactly(half // parts)
                deltas += [size for kind, *_, size, _b in end.sent() if kind == WINDOW]
            assert len(deltas) == parts
            # Since when it was not credited at all is no measure: the first one does not grow.
            grown = target if turn and growths else 0
            assert deltas[-1] == half // parts + grown
            assert sum(deltas) == half + grown
            target += grown
        assert target == 256 * KIB << growths


async def test_the_shortest_round_trip_of_pings_is_kept() -> None:
    end = End(initiator=True)
    end.feed(frame(PING, ACK, 0, 1))  # not asked for: tells nothing
    assert end.session.rtt_s == float("inf")
    end.session.ping()
    end.feed(frame(PING, ACK, 0, 1))
    assert 0 <= end.session.rtt_s < 5
    end.session.rtt_s = 0.0
    end.session.ping()
    end.feed(frame(PING, ACK, 0, 1))
    assert end.session.rtt_s == 0.0


async def test_a_pull_is_bounded() -> None:
    end = End(initiator=True)
    for _ in range(8):
        end.session.open().write_nowait(b"x" * 200 * KIB)
    assert sum(map(len, end.session.pull(128 * KIB))) <= (128 + 64 + 1) * KIB
    assert end.session.pending


async def test_writers_wait_for_room_in_order() -> None:
    end = End(initiator=True, stream_unsent_bytes_max=64 * KIB)
    stream = end.session.open()
    end.feed(frame(WINDOW, 0, 1, 10 << 20))
    first = asyncio.create_task(stream.write(b"1" * 300 * KIB))
    second = asyncio.create_task(stream.write(b"2" * 300 * KIB))
    got = b""
    async with asyncio.timeout(60):
        while len(got) < 600 * KIB:
            await asyncio.sleep(0)
            got += b"".join(body for *_, body in end.sent())
            assert stream._out_bytes <= 64 * KIB
        await first
        await second
    assert got == b"1" * 300 * KIB + b"2" * 300 * KIB


async def test_a_cancelled_writer_lets_the_next_one_write() -> None:
    end = End(initiator=True, stream_unsent_bytes_max=64 * KIB)
    stream = end.session.open()
    first = asyncio.create_task(stream.write(b"1" * 100 * KIB))
    second = asyncio.create_task(stream.write(b"2"))
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(60):
        while not second.done():
            await asyncio.sleep(0)
            end.sent()
    assert first.cancelled()


async def test_a_waiting_reader_and_writer_hear_of_a_reset() -> None:
    end = End(initiator=True, stream_unsent_bytes_max=64 * KIB)
    stream = end.session.open()
    writer = asyncio.create_task(stream.write(b"1" * 100 * KIB))
    reader = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    end.feed(frame(WINDOW, RST, 1))
    for task in (writer, reader):
        with pytest.raises(StreamReset):
            await asyncio.wait_for(task, 60)
    assert end.totals.unsent_bytes == 0


async def test_what_arrived_before_the_connection_was_lost_can_be_read() -> None:
    end = End()
    end.feed(frame(WINDOW, SYN, 1), frame(DATA, 0, 1, b"last words"))
    end.session.end(OSError("gone"))
    (stream,) = end.accepted
    assert await stream.read() == b"last words"
    with pytest.raises(StreamReset):
        await stream.read()
    assert end.totals.buffered_bytes == 0


async def test_attached_sinks_get_data_ends_and_pay_with_consumed() -> None:
    end = End()
    end.feed(frame(WINDOW, SYN, 1), frame(DATA, 0, 1, b"early"))
    (stream,) = end.accepted
    got: list[bytes] = []
    ends: list[Exception | None] = []
    stream.attach(lambda data: got.append(bytes(data)), ends.append)
    end.feed(frame(DATA, 0, 1, b"x" * 200 * KIB))
    end.sent()
    assert b"".join(got) == b"early" + b"x" * 200 * KIB
    assert end.sent() == []
    assert end.totals.buffered_bytes == 5 + 200 * KIB
    stream.consumed(5 + 200 * KIB)
    assert [kind for kind, *_ in end.sent()] == [WINDOW]
    assert end.totals.buffered_bytes == 0
    end.feed(frame(WINDOW, FIN, 1))
    assert ends == [None]


async def test_an_attached_writer_learns_of_room_after_the_call() -> None:
    end = End(initiator=True, stream_unsent_bytes_max=64 * KIB)
    stream = end.session.open()
    calls: list[int] = []
    stream.attach(lambda data: None, lambda exc: None, lambda: calls.append(1))
    assert stream.write_nowait(b"x" * 100 * KIB) == 64 * KIB
    assert calls == []
    end.sent()
    assert calls == [1]
    assert stream.write_nowait(b"x" * 36 * KIB) == 36 * KIB


async def test_a_failing_sink_costs_its_stream_only(caplog: pytest.LogCaptureFixture) -> None:
    end = End()
    end.feed(frame(WINDOW, SYN, 1), frame(WINDOW, SYN, 3))
    end.accepted[0].attach(lambda data: 1 / 0, lambda exc: None)  # type: ignore[arg-type]
    end.feed(frame(DATA, 0, 1, b"x"), frame(DATA, 0, 3, b"fine"))
    assert "sink_failed" in caplog.text
    assert await end.accepted[1].read() == b"fine"
    with pytest.raises(StreamReset):
        await end.accepted[0].read()


async def test_what_is_unread_is_read_first() -> None:
    a, b = End(initiator=True), End()
    stream = a.session.open()
    stream.write_nowait(b"rest")
    join(a, b)
    (remote,) = b.accepted
    remote.unread(b"prefix-")
    assert await remote.read_exactly(11) == b"prefix-rest"


async def test_tiny_frames_do_not_cost_an_object_each() -> None:
    end = End()
    end.feed(frame(WINDOW, SYN, 1))
    for _ in range(1000):
        end.feed(frame(DATA, 0, 1, b"x") * 20)
    (stream,) = end.accepted
    assert len(stream._in) <= 5
    assert await stream.read_exactly(20_000) == b"x" * 20_000


async def test_a_small_piece_does_not_keep_its_message_alive() -> None:
    end = End()
    end.feed(frame(WINDOW, SYN, 1), frame(WINDOW, SYN, 3))
    end.feed(frame(DATA, 0, 1, b"x" * 2000) + frame(DATA, 0, 3, b"y" * 60_000))
    assert type(end.accepted[0]._in[0]) is bytes
    assert type(end.accepted[1]._in[0]) is memoryview


async def test_read_takes_at_most_n() -> None:
    end = End()
    end.feed(frame(WINDOW, SYN, 1), frame(DATA, 0, 1, b"abcdef"))
    (stream,) = end.accepted
    assert [await stream.read(2), await stream.read(0), await stream.read(9)] == [
        b"ab",
        b"",
        b"cdef",
    ]
    assert stream.read_nowait() is None
    end.feed(frame(DATA, FIN, 1, b"g"))
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await stream.read_exactly(2)
    assert caught.value.partial == b"g"


async def test_two_readers_are_a_defect() -> None:
    end = End(initiator=True)
    stream = end.session.open()
    task = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="another task"):
        await stream.read()
    task.cancel()


async def test_unread_bytes_of_a_connection_are_bounded_by_resetting_the_worst() -> None:
    end = End(buffered_per_connection_bytes_max=512 * KIB)
    for stream_id, size in ((1, 100), (3, 250), (5, 200)):
        end.feed(frame(WINDOW, SYN, stream_id), frame(DATA, 0, stream_id, b"x" * size * KIB))
    assert end.refused == {"stream.unread": 1}
    assert [stream.closing for stream in end.accepted] == [False, True, False]
    assert end.totals.buffered_bytes == 300 * KIB
    assert (WINDOW, RST, 3, 0, b"") in end.sent()


async def test_unread_bytes_in_all_are_bounded_at_the_worst_connection() -> None:
    one = End(buffered_bytes_max=512 * KIB)
    two = End(buffered_bytes_max=512 * KIB)
    two.session.totals = one.totals
    one.totals.sessions.add(two.session)
    for stream_id in (1, 3):
        one.feed(frame(WINDOW, SYN, stream_id), frame(DATA, 0, stream_id, b"x" * 200 * KIB))
    two.feed(frame(WINDOW, SYN, 1), frame(DATA, 0, 1, b"x" * 255 * KIB))
    two.feed(frame(WINDOW, SYN, 3), frame(DATA, 0, 3, b"x" * 10 * KIB))
    assert sum(stream.closing for stream in one.accepted) == 1
    assert not any(stream.closing for stream in two.accepted)


async def test_unsent_bytes_fall_to_the_minimum_when_the_connection_is_full() -> None:
    end = End(
        initiator=True,
        unsent_per_connection_bytes_max=256 * KIB,
        stream_unsent_bytes_max=256 * KIB,
        stream_unsent_bytes_min=4 * KIB,
    )
    accepted = [end.session.open().write_nowait(b"x" * (256 * KIB)) for _ in range(4)]
    assert accepted == [256 * KIB, 256 * KIB, 4 * KIB, 4 * KIB]


async def test_streams_beyond_the_limit_are_reset_and_slots_come_back() -> None:
    end = End(streams_in_per_connection_max=2)
    end.feed(*(frame(WINDOW, SYN, n) for n in (1, 3, 5)))
    assert (WINDOW, RST, 5, 0, b"") in end.sent()
    assert end.refused == {"stream.limit": 1}
    end.feed(frame(WINDOW, RST, 1), frame(WINDOW, SYN, 7))
    assert len(end.accepted) == 3
    end.accepted[1].hold()  # a handler that still runs keeps the slot
    end.feed(frame(WINDOW, RST, 3), frame(WINDOW, SYN, 9))
    assert len(end.accepted) == 3
    end.accepted[1].release()
    end.feed(frame(WINDOW, SYN, 11))
    assert len(end.accepted) == 4


async def test_outbound_streams_are_bounded() -> None:
    end = End(initiator=True, streams_out_per_connection_max=2)
    streams = [end.session.open() for _ in range(2)]
    with pytest.raises(LimitExceeded, match="streams_out_per_connection_max"):
        end.session.open()
    streams[0].reset()
    end.session.open()


async def test_a_finished_stream_discards_and_is_reset_if_the_peer_lingers() -> None:
    end = End(linger_s=0.01)
    end.feed(frame(WINDOW, SYN, 1), frame(DATA, 0, 1, b"unread"))
    (stream,) = end.accepted
    stream.finish()
    end.feed(frame(DATA, 0, 1, b"still talking"))
    assert end.totals.buffered_bytes == 0
    async with asyncio.timeout(60):
        while end.session.streams:
            await asyncio.sleep(0.005)
    assert [flags for kind, flags, *_ in end.sent() if kind == WINDOW] == [ACK, FIN, RST]


async def test_data_for_a_stream_that_ended_here_is_skipped() -> None:
    end = End()
    end.feed(frame(WINDOW, SYN, 1), frame(DATA, 0, 1, b"a"))
    end.accepted[0].reset()
    end.feed(frame(DATA, 0, 1, b"b" * 1000), frame(WINDOW, SYN, 3), frame(DATA, 0, 3, b"c"))
    assert await end.accepted[1].read() == b"c"


@pytest.mark.parametrize(
    ("frames", "what"),
    [
        ([HEADER.pack(1, DATA, 0, 1, 0)], "version"),
        ([HEADER.pack(0, 4, 0, 0, 0)], "frame type"),
        ([frame(WINDOW, SYN, 2)], "stream ID"),
        ([frame(WINDOW, SYN, 1), frame(WINDOW, SYN, 1)], "stream ID"),
        ([frame(WINDOW, SYN, 0)], "without a stream"),
        ([frame(DATA, 0, 2, b"x")], "never opened"),
        ([frame(WINDOW, SYN, 1), HEADER.pack(0, DATA, 0, 1, 1 << 31)], "oversize"),
        ([frame(WINDOW, SYN, 1, 0xFFFFFFFF)], "4 GiB"),
        ([frame(GOAWAY, 0, 0, 2)], "error 2"),
        ([frame(PING, SYN, 0, 1)] * 11, "flood: pings"),
        ([frame(PING, ACK, 0, 1)] * 11, "flood: pings"),
        ([frame(WINDOW, SYN, 1)] + [frame(DATA, 0, 1)] * 11, "flood: empty frames"),
        ([frame(WINDOW, SYN, 1)] + [frame(WINDOW, 0, 1)] * 11, "flood: empty window"),
        ([f for n in range(1, 25, 2) for f in (frame(WINDOW, SYN, n), frame(WINDOW, RST, n))],
         "flood: streams opened and reset"),
        ([frame(WINDOW, SYN, n) for n in range(1, 41, 2)], "flood: streams opened beyond"),
    ],
)  # fmt: skip
async def test_violations_end_the_connection(frames: list[bytes], what: str) -> None:
    end = End(
        control_frames_burst=10, control_frames_per_s=0.001,
        stream_aborts_burst=10, stream_aborts_per_s=0.001, streams_in_per_connection_max=8,
    )  # fmt: skip
    with pytest.raises(Violation, match=what):
        end.feed(*frames)


async def test_a_peer_that_reads_no_answers_is_cut_off() -> None:
    end = End(control_queued_max=100)
    with pytest.raises(Violation, match="does not read"):
        end.feed(*(frame(PING, SYN, 0, n) for n in range(101)))


async def test_going_away_refuses_new_streams_and_leaves_old_ones() -> None:
    end = End(initiator=True)
    stream = end.session.open()
    end.feed(frame(GOAWAY, 0, 0, 0), frame(DATA, 0, 1, b"still here"))
    assert await stream.read() == b"still here"
    with pytest.raises(StreamReset, match="closing"):
        end.session.open()
