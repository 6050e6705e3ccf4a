"""Members that misbehave on the membership protocol: the node stays up, memory bounded."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import pytest

from wetware.base.access import Access
from wetware.errors import OverlayError, StreamReset, WetwareError
from wetware.overlay.frames import read_frame
from wetware.overlay.link import Stream
from wetware.overlay.membership import courier, inbound, service
from wetware.overlay.membership.courier import PROTOCOL
from wetware.overlay.membership.dial_back import DIAL_BACK_PROTOCOL

pytestmark = pytest.mark.anyio


async def ended(stream: Stream) -> bool:
    """Whether the other end resets the stream; what it still says is read."""
    try:
        async with asyncio.timeout(60):
            while await stream.read():
                pass
    except StreamReset:
        return True
    return False


async def pair(net: Any, **how: Any) -> tuple[Any, Any, Any]:
    """A node, an honest peer of it, and a hostile member that the test speaks for."""
    node, honest, hostile = [await net.node() for _ in range(3)]
    await node.start(**how)
    await honest.start(node.addr, **how)
    await hostile.start(member=False)
    await net.converged(node, honest)
    return node, honest, hostile


BAD_FRAMES = {
    "junk": b"\xff" * 50,
    "text": b"\x65hello",
    "empty_map": b"\xa0",
    "list": b"\x80",
    "kind_unknown": {"k": 99},
    "kind_text": {"k": "ping"},
    "trailing": {"k": 5},
    "tag": b"\xa1\x61k\xc1\x01",
    "deep": b"\xa1\x61k" + b"\x81" * 5000 + b"\x01",
}


@pytest.mark.parametrize("kind", BAD_FRAMES)
async def test_a_malformed_frame_costs_the_stream(net: Any, kind: str) -> None:
    node, honest, hostile = await pair(net)
    stream = await hostile.speak(node)
    frame = net.framed(BAD_FRAMES[kind])
    if kind == "trailing":
        frame = net.framed(frame[4:] + b"\x00")
    await stream.write(frame)
    assert await ended(stream)
    assert node.membership.inbound.counters["frames_malformed"] == 1
    assert node.is_up(hostile), "its connection serves others, e.g. RPC"
    assert await honest.membership.ping(node.peer) < 5.0


@pytest.mark.parametrize("size", [0, 64 * 1024 + 1, 0x7FFFFFFF, 0xFFFFFFFF])
async def test_an_oversize_frame_is_refused_by_its_length(net: Any, size: int) -> None:
    node, _honest, hostile = await pair(net)
    stream = await hostile.speak(node)
    await stream.write(size.to_bytes(4, "big"))
    assert await ended(stream)  # nothing of it was waited for
    assert node.membership.inbound.counters["frames_malformed"] == 1


async def test_who_breaks_frames_again_and_again_is_not_heard_for_a_while(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    node, honest, hostile = await pair(net)
    for _ in range(20):
        stream = await hostile.speak(node)
        await stream.write(net.framed(b"junk"))
        assert await ended(stream)
    counters = node.membership.inbound.counters
    assert counters["frames_malformed"] == inbound.PENALTY_FREE + 1
    assert counters["streams_refused"] == 20 - inbound.PENALTY_FREE - 1
    lines = [r for r in caplog.records if r.getMessage() == "frame.malformed"]
    assert len(lines) == inbound.PENALTY_FREE + 1
    assert honest.sees(node)
    assert node.sees(honest)


def test_penalties_grow_are_forgotten_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    penalties = inbound.Penalties(lambda: now)
    times = [penalties.add("peer") for _ in range(20)]  # type: ignore[arg-type]
    assert times[: inbound.PENALTY_FREE] == [0] * inbound.PENALTY_FREE
    assert times[inbound.PENALTY_FREE : 5] == [1.0, 2.0, 4.0]
    assert times[-1] == inbound.PENALTY_S_MAX
    assert penalties.muted("peer")  # type: ignore[arg-type]
    now += inbound.PENALTY_S_MAX + 1
    assert not penalties.muted("peer")  # type: ignore[arg-type]
    now += inbound.PENALTY_S_MAX
    assert penalties.add("peer") == 0  # type: ignore[arg-type]
    monkeypatch.setattr(inbound, "PENALTIES_MAX", 8)
    for number in range(100):
        penalties.add(f"peer {number}")  # type: ignore[arg-type]
    assert len(penalties._peers) == 8


async def test_a_frame_that_never_ends_costs_the_stream(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound, "FRAME_S_MAX", 0.2)
    node, honest, hostile = await pair(net)
    stream = await hostile.speak(node)
    await stream.write((5000).to_bytes(4, "big") + b"\xa1")
    assert await ended(stream)
    stream = await hostile.speak(node)
    await stream.write((5000).to_bytes(4, "big") + b"\xa1")
    stream.close()
    assert await ended(stream)
    assert node.membership.inbound.counters["frames_malformed"] == 2
    assert honest.sees(node)


async def test_a_second_stream_takes_the_place_of_the_first(net: Any) -> None:
    node, _honest, hostile = await pair(net)
    first = await hostile.speak(node)
    await net.until(lambda: hostile.peer in node.membership.inbound._streams)
    streams = [await hostile.speak(node) for _ in range(50)]
    assert await ended(first)
    await net.until(lambda: sum(not stream.ended for stream in streams) == 1)
    assert len(node.membership.inbound._streams) == 2  # its and the honest one's
    await net.until(
        lambda: (
            sum(
                stream.protocol == PROTOCOL and not stream.ended
                for stream in node.host.connection(hostile.peer).streams
                if not stream.initiator
            )
            == 1
        )
    )


async def test_a_peer_that_never_reads_costs_a_bounded_queue(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, honest, hostile = await pair(net)
    held: list[Stream] = []

    async def never_read(stream: Stream) -> None:
        held.append(stream)
        await asyncio.Event().wait()

    hostile.host.handle(PROTOCOL, never_read, access=Access.MEMBER)
    await hostile.speak(node)
    await net.until(lambda: hostile.peer in node.membership.courier._outlets)
    outlet = node.membership.courier._outlets[hostile.peer]
    await net.until(lambda: outlet.stream is not None)
    for _ in range(5000):
        node.membership.courier.send(hostile.peer, b"x" * 20)
        assert len(outlet.frames) <= courier.QUEUE_FRAMES_MAX
    for _ in range(500):
        node.membership.courier.send(hostile.peer, os.urandom(10_000))
        assert outlet.bytes <= node.net.config.queue_bytes_max
        await asyncio.sleep(0)
    assert outlet.frames
    assert node.membership.courier.counters["frames_dropped"] > 300
    assert await honest.membership.ping(node.peer) < 5.0, "nobody else waits"
    # When it goes on like this, it loses its stream.
    monkeypatch.setattr(courier, "STALL_S_MAX", 0.1)
    await net.until(lambda: node.membership.courier.counters["streams_stalled"] == 1)
    assert not outlet.frames
    # It reads again: it is spoken to again.
    for stream in held:
        stream.reset()
    await net.until(lambda: outlet.stream is None)


async def test_what_is_cut_off_in_a_frame_is_never_continued_elsewhere(net: Any) -> None:
    """A partly sent frame dies with its stream: the next stream begins with a whole one."""
    node, _honest, hostile = await pair(net)
    heads: list[bytes] = []
    slow = asyncio.Event()

    async def read(stream: Stream) -> None:
        if not heads:
            await slow.wait()
        heads.append(await stream.read_exactly(5))
        while await stream.read():
            pass

    hostile.host.handle(PROTOCOL, read, access=Access.MEMBER)
    await hostile.speak(node)
    await net.until(lambda: hostile.peer in node.membership.courier._outlets)
    outlet = node.membership.courier._outlets[hostile.peer]
    await net.until(lambda: outlet.stream is not None)
    for _ in range(200):
        node.membership.courier.send(hostile.peer, b"\xa0" + bytes(10_000))
    assert outlet.head
    outlet.stream.reset()
    slow.set()
    await net.until(lambda: heads)
    node.membership.courier.send(hostile.peer, b"\xa0")
    assert all(int.from_bytes(head[:4], "big") <= 64 * 1024 for head in heads)
    assert all(head[4] >> 5 == 5 for head in heads), "each stream begins with a map"


async def test_a_clean_end_within_a_frame_is_a_reset_and_no_offence(net: Any) -> None:
    node, _honest, hostile = await pair(net)
    ends: list[object] = []

    async def read_late(stream: Stream) -> None:
        await stop.wait()
        try:
            while await stream.read():
                pass
            ends.append("fin")
        except StreamReset:
            ends.append("reset")
            raise

    stop = asyncio.Event()
    hostile.host.handle(PROTOCOL, read_late, access=Access.MEMBER)
    await hostile.speak(node)
    outlet = node.membership.courier.outlet(hostile.peer)
    outlet.open()
    await net.until(lambda: outlet.stream is not None)
    for _ in range(200):
        node.membership.courier.send(hostile.peer, b"\xa0" + bytes(10_000))
    assert outlet.head
    node.membership.courier.drop(hostile.peer)
    stop.set()
    await net.until(lambda: ends)
    assert set(ends) == {"reset"}


async def test_a_flood_of_frames_is_read_at_its_pace(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound, "FRAMES_PER_S", 50.0)
    monkeypatch.setattr(inbound, "FRAMES_BURST", 100)
    node, honest, hostile = await pair(net)
    stream = await hostile.speak(node)
    flood = net.framed({"k": 5}) * 1000
    before = node.membership.inbound.counters["frames_in"]

    async def write() -> None:
        while True:
            await stream.write(flood)

    writer = asyncio.ensure_future(write())
    await asyncio.sleep(1.0)
    taken = node.membership.inbound.counters["frames_in"] - before
    assert taken < 100 + 50 * 4 + 200, "its frames, and the honest node's"
    assert node.membership.inbound.counters["throttled"] > 0
    assert await honest.membership.ping(node.peer) < 5.0
    # A new stream is no new allowance.
    writer.cancel()
    stream.reset()
    stream = await hostile.speak(node)
    await stream.write(flood[: 8 * 200])
    assert len(node.membership.inbound._paces) == 2
    assert node.sees(honest)


async def test_data_on_our_own_stream_costs_the_stream_and_not_the_peer(net: Any) -> None:
    """Each side speaks on the stream that it opened."""
    node, _honest, hostile = await pair(net)
    answered = asyncio.Event()

    async def talk_back(stream: Stream) -> None:
        answered.set()
        await stream.write(b"x" * 100_000)
        await stream.read()

    hostile.host.handle(PROTOCOL, talk_back, access=Access.MEMBER)
    await hostile.speak(node)
    await answered.wait()
    await net.until(
        lambda: (
            hostile.peer not in node.membership.courier._outlets
            or node.membership.courier._outlets[hostile.peer].stream is None
        )
    )
    assert node.host.totals.buffered_bytes < 1 << 20


async def test_a_peer_that_resets_every_stream_is_tried_with_pauses(net: Any) -> None:
    node, honest, hostile = await pair(net)
    opened = 0

    async def refuse(stream: Stream) -> None:
        nonlocal opened
        opened += 1
        stream.reset()

    hostile.host.handle(PROTOCOL, refuse, access=Access.MEMBER)
    await hostile.speak(node)
    loop = asyncio.get_running_loop()
    until = loop.time() + 1.5
    while loop.time() < until:
        node.membership.courier.send(hostile.peer, b"\xa0")
        await asyncio.sleep(0.005)
    assert 2 <= opened <= 12
    assert node.sees(honest)


async def test_a_peer_that_accepts_and_never_answers_holds_nobody_up(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "OPEN_S_MAX", 0.2)
    node, honest, hostile = await pair(net)
    unreachable: list[object] = []
    swim = node.membership.swim
    told = swim.unreachable
    monkeypatch.setattr(
        type(swim), "unreachable", lambda self, peer: (unreachable.append(peer), told(peer))
    )
    await hostile.speak(node)
    # Its connection lives, and its streams are never negotiated: the frames are not kept for ever.
    monkeypatch.setattr(hostile.host, "inbound", lambda stream: None)
    for connection in hostile.host.connections():
        connection._session._on_stream = lambda stream: None
    outlet = node.membership.courier.outlet(hostile.peer)
    await net.until(lambda: not outlet.opening)
    unreachable.clear()
    node.membership.courier.send(hostile.peer, b"\xa0")
    await net.until(lambda: hostile.peer in unreachable)
    await net.until(lambda: not outlet.frames)
    assert await honest.membership.ping(node.peer) < 5.0


async def test_an_answer_that_was_not_asked_for_is_ignored(net: Any) -> None:
    node, honest, hostile = await pair(net)
    stream = await hostile.speak(node)
    ping = asyncio.ensure_future(node.membership.ping(honest.peer))
    for number in range(200):
        await stream.write(net.framed({"k": 2, "n": number}))
    numbers = list(node.membership.swim._probing._pings)
    for number in numbers:  # it guesses the right one
        await stream.write(net.framed({"k": 2, "n": number}))
    assert await ping > 0.0
    assert node.membership.inbound.counters["frames_malformed"] == 0


async def test_a_defect_in_handling_a_frame_costs_one_stream(
    net: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node, honest, hostile = await pair(net)
    receive = node.membership.swim.receive

    def broken(self: object, peer: object, frame: bytes) -> None:
        if frame == b"\xa1\x61k\x18\x63":
            raise ZeroDivisionError
        receive(peer, frame)

    monkeypatch.setattr(type(node.membership.swim), "receive", broken)
    stream = await hostile.speak(node)
    await stream.write(net.framed(b"\xa1\x61k\x18\x63"))
    assert await ended(stream)
    assert [r for r in caplog.records if r.getMessage() == "membership.receive_failed"]
    assert node.sees(honest)


async def test_a_defect_in_a_tick_does_not_silence_the_node(
    net: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "HOUSEKEEP_S", 0.05)
    nodes = await net.cluster(2)
    await net.converged(*nodes)
    membership = nodes[0].membership
    tick, failed = membership.swim.tick, 0

    def broken(self: object) -> float:
        nonlocal failed
        if self is membership.swim and failed < 3:
            failed += 1
            raise ZeroDivisionError
        return tick() if self is membership.swim else others(self)

    others = type(membership.swim).tick
    monkeypatch.setattr(type(membership.swim), "tick", broken)
    await net.until(lambda: failed == 3)
    assert [r for r in caplog.records if r.getMessage() == "membership.tick_failed"]
    monkeypatch.undo()
    assert await nodes[1].membership.ping(nodes[0].peer) < 5.0
    await net.converged(*nodes)


@pytest.mark.parametrize(
    "request_",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x01\xff",
        b"\x00\x00\x00\x01\xa0",
        b"\x00\x00\x00\x0a\xa1\x65addrs\x61x",
        b"\x00\x00\x00\x03\xa1",
    ],
)
async def test_a_bad_request_to_dial_back_costs_its_stream(
    net: Any, request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    node, honest, hostile = await pair(net)
    await hostile.speak(node)
    stream = await hostile.host.open_stream(node.peer, DIAL_BACK_PROTOCOL)
    await stream.write(request_)
    stream.close()
    assert await ended(stream)
    assert node.membership.dial_backs._running == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert node.sees(honest)


async def test_a_node_is_not_made_to_knock_at_doors_of_others(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, _honest, hostile = await pair(net)
    knocked = 0

    class Door(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            nonlocal knocked
            knocked += 1

    server = await asyncio.get_running_loop().create_server(Door, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await hostile.speak(node)
    stream = await hostile.host.open_stream(node.peer, DIAL_BACK_PROTOCOL)
    await stream.write(net.framed({"addrs": [f"/ip4/127.0.0.1/tcp/{port}"] * 8}))
    answer = await read_frame(stream, bytes_max=1 << 16)
    assert [why for _addr, why, _took in answer["results"]] == ["unknown"] * 8
    stream = await hostile.host.open_stream(node.peer, DIAL_BACK_PROTOCOL)
    await stream.write(net.framed({"addrs": ["/ip4/127.0.0.1/tcp/1"] * 9}))
    assert await ended(stream)
    assert knocked == 0
    server.close()


@pytest.mark.parametrize(
    "answer",
    [b"\xff", b"\xa0", b"\x80", b"\xa1\x67results\x61x", b"\xa1\x67results\x81\x83\x61x\x61y\x61z"],
)
async def test_a_senseless_answer_to_a_dial_back_is_an_error(net: Any, answer: bytes) -> None:
    node, _honest, hostile = await pair(net)

    async def serve(stream: Stream) -> None:
        await stream.read()
        await stream.write(net.framed(answer))

    hostile.host.handle(DIAL_BACK_PROTOCOL, serve, access=Access.MEMBER)
    await hostile.speak(node)
    with pytest.raises(WetwareError):
        await node.membership.dial_backs.ask(hostile.peer, [node.addr])


async def test_who_is_no_member_cannot_open_the_protocols(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    node, _honest, _hostile = await pair(net)
    stranger = await net.node(certified=False)
    from wetware.overlay.link import LinkHost

    async with LinkHost(stranger.key) as host:
        connection = await host.dial([node.addr])
        with caplog.at_level(logging.INFO, "wetware"):
            for protocol in (PROTOCOL, DIAL_BACK_PROTOCOL):
                with pytest.raises(OverlayError):
                    await connection.open_stream(protocol)
    refused = [r.ww for r in caplog.records if r.getMessage() == "protocol.refused"]  # type: ignore[attr-defined]
    assert {one["protocol"] for one in refused} == {PROTOCOL, DIAL_BACK_PROTOCOL}
