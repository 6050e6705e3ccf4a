"""Connections through somebody else: noise end to end over a stream of another connection."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import pytest

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.errors import DialError, OverlayError, PeerMismatch, StreamReset
from wetware.identity import Key
from wetware.overlay.link import Connection, LinkHost, LinkLimits, Stream
from wetware.overlay.link.connection import NoiseConnection
from wetware.overlay.link.multistream import HELLO, encode_line
from wetware.overlay.link.pipe import PipeTransport

pytestmark = pytest.mark.anyio

KIB, MIB = 1 << 10, 1 << 20
CARRIER = Multiaddr("ip4", "192.0.2.1", 4001)


class MemoryPipe:
    """One end of a pipe in this process, which holds `pieces_max` pieces each way."""

    def __init__(self, incoming: asyncio.Queue[bytes], outgoing: asyncio.Queue[bytes]) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self.finished = self.was_reset = False
        self.written: list[int] = []

    @classmethod
    def pair(cls, pieces_max: int = 4) -> tuple[MemoryPipe, MemoryPipe]:
        one: asyncio.Queue[bytes] = asyncio.Queue(pieces_max)
        two: asyncio.Queue[bytes] = asyncio.Queue(pieces_max)
        return cls(one, two), cls(two, one)

    async def read(self) -> bytes:
        return await self.incoming.get()

    async def write(self, data: bytes) -> None:
        self.written.append(len(data))
        await self.outgoing.put(data)

    def finish(self) -> None:
        self.finished = True
        with contextlib.suppress(asyncio.QueueFull):
            self.outgoing.put_nowait(b"")

    def reset(self) -> None:
        self.was_reset = True
        with contextlib.suppress(asyncio.QueueFull):
            self.outgoing.put_nowait(b"")


class Tunnel:
    """A reaches C through B alone; `seen` is all that B relayed."""

    def __init__(self, net: Any) -> None:
        self.net, self.seen = net, bytearray()
        self.accepted: list[Connection] = []
        self.carriers: list[Stream] = []  # at B, towards A and towards C
        self.record = True

    async def open(self, limits: LinkLimits | None = None, inner: LinkLimits | None = None) -> None:
        net = self.net
        self.a = await net.host(inner, listen=False)
        self.b, self.c = await net.host(limits), await net.host(limits)
        self.b.handle("/relay", self._relay, access=Access.PUBLIC)
        self.c.handle("/tunnel", self._accept, access=Access.PUBLIC)
        await self.b.dial(self.c.listen_addrs)
        self.outer = await self.a.dial(self.b.listen_addrs)

    async def connect(self) -> Connection:
        stream = await self.outer.open_stream("/relay")
        return await self.a.connect_pipe(stream, self.c.peer_id, self.outer.remote)

    async def _accept(self, stream: Stream) -> None:
        conn = self.c.accept_pipe(stream, stream.connection.remote)
        self.accepted.append(conn)
        await conn.wait_closed()

    async def _relay(self, near: Stream) -> None:
        async with await self.b.open_stream(self.c.peer_id, "/tunnel") as far:
            self.carriers = [near, far]

            async def pump(source: Stream, target: Stream) -> None:
                while data := await source.read():
                    if self.record:
                        self.seen += data
                    await target.write(data)
                target.close()

            async with asyncio.TaskGroup() as group:
                group.create_task(pump(near, far))
                group.create_task(pump(far, near))


@pytest.fixture
def tunnel(net: Any) -> Tunnel:
    return Tunnel(net)


async def test_the_far_end_authenticates_the_near_one_and_the_carrier_sees_ciphertext(
    net: Any, tunnel: Tunnel
) -> None:
    await tunnel.open()
    conn = await tunnel.connect()
    assert conn.peer == tunnel.c.peer_id
    assert conn.tunnelled
    secret = b"attack at dawn, " * 64
    async with await conn.open_stream("/echo") as stream:
        await stream.write(secret)
        assert await stream.read_exactly(len(secret)) == secret
    (inner,) = tunnel.accepted
    assert inner.peer == tunnel.a.peer_id
    assert inner.channel_binding == conn.channel_binding
    assert inner.channel_binding != tunnel.outer.channel_binding
    assert tunnel.c.connection(tunnel.a.peer_id) is inner
    # It is known under the carrier's address, and says that this is not the peer's.
    assert inner.tunnelled
    assert inner.remote.host == tunnel.b.connection(tunnel.c.peer_id).local.host
    assert tunnel.a.peer_id not in tunnel.c.connection(tunnel.b.peer_id).remote.host
    assert len(tunnel.seen) > 2 * len(secret)
    for plain in (b"attack", b"/echo", b"/yamux"):
        assert plain not in tunnel.seen
    assert b"/noise" in tunnel.seen  # the recording works


async def test_megabytes_both_ways_through_a_carrier(net: Any, tunnel: Tunnel) -> None:
    await tunnel.open()
    tunnel.record = False
    conn = await tunnel.connect()
    payload = os.urandom(8 * MIB)

    async with await conn.open_stream("/echo") as stream:

        async def send() -> None:
            view = memoryview(payload)
            for at in range(0, len(view), 100_000):
                await stream.write(view[at : at + 100_000])
            stream.close()

        sending = asyncio.create_task(send())
        got = bytearray()
        while data := await stream.read():
            got += data
        await sending
    assert got == payload
    await net.until(lambda: not conn.streams)
    for host in (tunnel.a, tunnel.b, tunnel.c):
        # Both at rest: the inner connection's last window update (30 bytes of ciphertext) is the
        # carrier's payload, which may still be on its way when the echo is whole.
        await net.until(
            lambda host=host: not host.totals.unsent_bytes and not host.totals.buffered_bytes
        )


async def test_a_reader_that_stops_does_not_make_memory_grow(net: Any, tunnel: Tunnel) -> None:
    await tunnel.open()
    tunnel.record = False
    conn = await tunnel.connect()
    sunk = 0

    async def sink(stream: Stream) -> None:
        nonlocal sunk
        while data := await stream.read():
            sunk += len(data)

    tunnel.c.handle("/sink", sink, access=Access.PUBLIC)
    stream = await conn.open_stream("/sink")
    written = 0

    async def pump() -> None:
        nonlocal written
        while True:
            await stream.write(b"x" * 64 * KIB)
            written += 64 * KIB

    task = asyncio.create_task(pump())
    await net.until(lambda: sunk > MIB)
    (inner,) = tunnel.accepted
    assert inner._transport is not None
    inner._transport.pause_reading()  # C reads the carrier no more
    stopped = -1
    while stopped != written:  # until nothing moves for a while
        stopped = written
        await asyncio.sleep(0.3)
    # On the way: the inner stream's own queue and one flush, and a window and a queue per hop.
    hop = tunnel.a.limits.stream_window_bytes + 2 * tunnel.a.limits.stream_unsent_bytes_max
    held = written - sunk
    assert held <= 2 * hop + MIB
    assert conn._transport is not None
    assert conn._transport.get_write_buffer_size() <= 512 * KIB
    for host in (tunnel.a, tunnel.b, tunnel.c):
        assert host.totals.unsent_bytes <= MIB
        assert host.totals.buffered_bytes <= 5 * MIB
    # The carrier itself goes on, and so does the tunnel once it is read again.
    async with await tunnel.outer.open_stream("/echo") as other:
        await other.write(b"alive")
        assert await other.read_exactly(5) == b"alive"
    inner._transport.resume_reading()
    await net.until(lambda: sunk >= stopped + MIB)
    task.cancel()


async def test_a_carried_stream_has_as_much_on_its_way_as_two_hops(
    net: Any, tunnel: Tunnel
) -> None:
    await tunnel.open()
    tunnel.record = False
    conn = await tunnel.connect()
    sinks: list[Stream] = []

    async def sink(stream: Stream) -> None:
        sinks.append(stream)
        stream.connection._session.rtt_s = math.inf  # so that a window grows as far as it may
        while await stream.read():
            pass

    tunnel.c.handle("/sink", sink, access=Access.PUBLIC)
    async with await conn.open_stream("/sink") as stream:
        for _ in range(32):
            await stream.write(bytes(MIB))
        stream.close()
        assert await stream.read() == b""  # the sink has all
    assert sinks[0]._target == 2 * tunnel.c.limits.stream_window_bytes


async def test_the_end_of_the_carrier_ends_what_it_carries(net: Any, tunnel: Tunnel) -> None:
    await tunnel.open()
    conn = await tunnel.connect()
    stream = await conn.open_stream("/echo")
    (inner,) = tunnel.accepted
    for conn_b in tunnel.b.connections():
        conn_b.abort(OSError("pulled the plug"))
    async with asyncio.timeout(net.deadline_s):
        with pytest.raises(StreamReset, match="what carried the connection ended"):
            await stream.read()
        await conn.wait_closed()
        await inner.wait_closed()
    for end in (conn, inner):
        assert isinstance(end.error, OverlayError)
        assert end.error.code == "overlay.carrier"
    assert tunnel.c.connection(tunnel.a.peer_id) is None


async def test_a_reset_of_the_carrying_stream_leaves_the_carrier(net: Any, tunnel: Tunnel) -> None:
    await tunnel.open()
    conn = await tunnel.connect()
    tunnel.carriers[0].reset()
    await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    assert conn.error is not None
    assert "reset" in str(conn.error)
    assert not tunnel.outer.closed
    again = await tunnel.connect()
    assert again.accepts_streams


async def test_a_graceful_close_ends_both_ends_and_the_carrying_stream(
    net: Any, tunnel: Tunnel
) -> None:
    await tunnel.open()
    conn = await tunnel.connect()
    got = bytearray()

    async def sink(stream: Stream) -> None:
        while data := await stream.read():
            got.extend(data)

    tunnel.c.handle("/sink", sink, access=Access.PUBLIC)
    stream = await conn.open_stream("/sink")
    await stream.write(b"last words" * 1000)
    conn.close()
    (inner,) = tunnel.accepted
    async with asyncio.timeout(net.deadline_s):
        await conn.wait_closed()
        await inner.wait_closed()
    assert conn.error is None
    assert got == b"last words" * 1000
    await net.until(lambda: not tunnel.outer.streams)
    assert not tunnel.outer.closed


async def test_a_tunnel_that_never_answers_times_out(net: Any) -> None:
    host = await net.host(listen=False)
    pipe, _ = MemoryPipe.pair()
    with pytest.raises(DialError, match=r"192\.0\.2\.1.*no answer in time"):
        await host.connect_pipe(pipe, Key.generate().peer_id, CARRIER, timeout_s=0.05)
    assert pipe.was_reset
    await net.until(lambda: not host._handshaking)


@pytest.mark.parametrize("turns", range(4))
async def test_a_caller_cancelled_as_the_tunnel_gets_ready_leaves_none(
    net: Any, tunnel: Tunnel, turns: int
) -> None:
    await tunnel.open()
    connecting = asyncio.create_task(tunnel.connect())
    net.cancel_after(tunnel.a, connecting, turns)
    await asyncio.wait([connecting])
    if connecting.cancelled():
        await net.until(lambda: tunnel.a.connection(tunnel.c.peer_id) is None)
        await net.until(lambda: not tunnel.outer.in_use)
    else:
        assert not connecting.result().closed


async def test_a_far_end_that_falls_silent_is_found(net: Any) -> None:
    a = await net.host(LinkLimits(keepalive_s=0.1, keepalive_timeout_s=0.1), listen=False)
    c = await net.host()
    near, far = MemoryPipe.pair()
    c.accept_pipe(far, CARRIER)
    conn = await a.connect_pipe(near, c.peer_id, CARRIER)
    far.outgoing = asyncio.Queue()  # whatever it says from here on is lost
    await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    assert isinstance(conn.error, OverlayError)
    assert conn.error.code == "overlay.keepalive"


async def test_another_peer_at_the_far_end_is_a_mismatch(net: Any) -> None:
    host, other = await net.host(listen=False), await net.host(listen=False)
    near, far = MemoryPipe.pair()
    conn = other.accept_pipe(far, CARRIER)
    with pytest.raises(PeerMismatch):
        await host.connect_pipe(near, Key.generate().peer_id, CARRIER)
    await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    assert host.connections() == other.connections() == ()


async def test_a_node_does_not_tunnel_to_itself(net: Any) -> None:
    host = await net.host(listen=False)
    near, _ = MemoryPipe.pair()
    with pytest.raises(DialError, match="this node itself"):
        await host.connect_pipe(near, host.peer_id, CARRIER)
    assert near.was_reset


async def test_a_direct_connection_is_preferred_to_a_tunnelled_one(net: Any) -> None:
    a, c = await net.host(listen=False), await net.host()
    near, far = MemoryPipe.pair()
    c.accept_pipe(far, CARRIER)
    tunnelled = await a.connect_pipe(near, c.peer_id, CARRIER)
    assert a.connection(c.peer_id) is tunnelled
    await asyncio.wait_for(until_up(c, 1), net.deadline_s)
    direct = await connect(a, c.listen_addrs[0])
    assert a.connection(c.peer_id) is direct


async def until_up(host: LinkHost, count: int) -> None:
    while len(host.connections()) < count:
        await asyncio.sleep(0.002)


async def connect(host: LinkHost, addr: Multiaddr) -> Connection:
    """A connection by TCP, even if there is another."""
    conn = NoiseConnection(host, initiator=True, expect=addr.peer)
    host._handshaking.add(conn)
    await asyncio.get_running_loop().create_connection(lambda: conn, addr.host, addr.port)
    return await asyncio.shield(conn.ready)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 300,
        HELLO + encode_line("/plaintext/2.0.0") * 40,
        HELLO + encode_line("/noise") + b"\x00\x20" + b"\xff" * 32 + b"\x00\x10" + b"\x01" * 16,
        HELLO + encode_line("/noise") + b"\xff\xff" + os.urandom(70_000),
        HELLO + encode_line("/noise") + b"\x00\x20" + b"\x00" * 32,
    ],
    ids=["zeroes", "plaintext", "tampered", "oversize", "junk public key"],
)
async def test_hostile_bytes_in_a_pipe_are_refused(net: Any, data: bytes) -> None:
    host = await net.host(listen=False)
    near, far = MemoryPipe.pair(pieces_max=64)
    conn = host.accept_pipe(far, CARRIER)
    await near.write(data)
    await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    assert far.was_reset
    assert host.connections() == ()
    assert host.refused["handshake.failed"] == 1


async def test_tampered_bytes_in_an_established_tunnel_end_it(net: Any) -> None:
    a, c = await net.host(listen=False), await net.host(listen=False)
    near, far = MemoryPipe.pair()
    inner = c.accept_pipe(far, CARRIER)
    conn = await a.connect_pipe(near, c.peer_id, CARRIER)
    await near.write(b"\x00\x20" + os.urandom(32))  # injected by who carries it
    async with asyncio.timeout(net.deadline_s):
        await inner.wait_closed()
        await conn.wait_closed()
    assert c.refused["connection.tampered"] == 1


async def test_a_failing_pipe_is_an_error_with_its_reason(net: Any) -> None:
    class Broken(MemoryPipe):
        async def read(self) -> bytes:
            raise OSError("the cable is cut")

    host = await net.host(listen=False)
    _, far = MemoryPipe.pair()
    pipe = Broken(far.incoming, far.outgoing)
    with pytest.raises(DialError, match="the cable is cut"):
        await host.connect_pipe(pipe, Key.generate().peer_id, CARRIER)
    assert pipe.was_reset


async def test_tunnelled_strangers_count_under_the_address_of_their_carrier(net: Any) -> None:
    limits = LinkLimits(connections_per_ip_max=2, handshakes_per_ip_max=3)
    host = await net.host(limits, listen=False)

    async def through(carrier: Multiaddr) -> Connection:
        near, far = MemoryPipe.pair()
        host.accept_pipe(far, carrier)
        client = await net.host(listen=False)
        conn = await client.connect_pipe(near, host.peer_id, carrier)
        stream = await conn.open_stream("/echo")
        await stream.write(b"x")
        assert await stream.read_exactly(1) == b"x"
        return conn

    for _ in range(2):
        await through(CARRIER)
    with pytest.raises(DialError):
        await through(CARRIER)
    assert host.refused["connections_per_ip_max"] == 1
    await through(Multiaddr("ip4", "192.0.2.2", 4001))
    assert host._slots.strangers == {"192.0.2.1": 2, "192.0.2.2": 1}

    hung = [host.accept_pipe(MemoryPipe.pair()[0], CARRIER) for _ in range(4)]
    assert [conn.closed for conn in hung] == [False, False, False, True]
    assert host.refused["handshakes_per_ip_max"] == 1
    for conn in hung:
        conn.close()
        await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    assert not host._slots.pending


async def test_closing_the_host_ends_tunnels_and_their_tasks(net: Any, tunnel: Tunnel) -> None:
    await tunnel.open()
    conns = [await tunnel.connect() for _ in range(3)]
    await asyncio.wait_for(tunnel.c.aclose(), net.deadline_s)
    for conn in conns:
        await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    assert not tunnel.c._tasks
    near, far = MemoryPipe.pair()
    assert tunnel.c.accept_pipe(far, CARRIER).closed
    with pytest.raises(DialError, match="stopping"):
        await tunnel.c.connect_pipe(near, tunnel.a.peer_id, CARRIER)


# --- the transport alone --------------------------------------------------------------------------


class Recorder(asyncio.Protocol):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.got = bytearray()
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.got += data

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


def transport(net: Any, pipe: Any, spawn: Callable[..., Any]) -> tuple[Any, Recorder]:
    protocol = Recorder()
    made = PipeTransport(pipe, protocol, spawn)
    made.set_write_buffer_limits(high=100)
    return made, protocol


async def test_the_transport_pauses_its_writer_and_joins_what_it_writes(net: Any) -> None:
    near, far = MemoryPipe.pair(pieces_max=1)
    made, protocol = transport(net, near, asyncio.create_task)
    made.write(b"a" * 100)
    assert protocol.events == []
    made.write(memoryview(b"b" * 10))
    assert protocol.events == ["pause"]
    await net.until(lambda: near.written)
    made.write(b"c")
    made.write(b"d" * 200)
    async with asyncio.timeout(net.deadline_s):
        assert await far.read() == b"a" * 100 + b"b" * 10
        assert made.get_write_buffer_size() > 0
        assert await far.read() == b"c" + b"d" * 200
    await net.until(lambda: not made.get_write_buffer_size())
    assert protocol.events[-1] == "resume"
    assert near.written == [110, 201]
    made.close()
    assert await protocol.lost is None
    assert near.finished


async def test_what_a_stream_said_before_its_end_waits_for_a_reader_that_paused(net: Any) -> None:
    a, b = await net.host(listen=False), await net.host()
    made: list[tuple[Any, Recorder]] = []

    async def carried(stream: Stream) -> None:
        made.append(transport(net, stream, asyncio.create_task))
        await made[0][1].lost

    b.handle("/tunnel", carried, access=Access.PUBLIC)
    stream = await (await a.dial(b.listen_addrs)).open_stream("/tunnel")
    await net.until(lambda: bool(made))
    ((pipe, protocol),) = made
    await stream.write(b"first")
    await net.until(lambda: protocol.got == b"first")
    pipe.pause_reading()
    await stream.write(b", last")
    stream.close()
    await net.until(lambda: b.totals.buffered_bytes == len(b", last"))
    assert protocol.got == b"first"
    pipe.resume_reading()
    assert await asyncio.wait_for(protocol.lost, net.deadline_s) is None
    assert protocol.got == b"first, last"
    assert b.totals.buffered_bytes == 0


async def test_the_transport_reads_and_stops_when_told(net: Any) -> None:
    near, far = MemoryPipe.pair(pieces_max=2)
    made, protocol = transport(net, near, asyncio.create_task)
    await far.write(b"0123456789" * 3 + b"end")
    await net.until(lambda: protocol.got.endswith(b"end"))
    made.pause_reading()
    for _ in range(3):  # one is on its way, two fit the pipe
        await far.write(b"x")
    await asyncio.sleep(0.02)
    assert protocol.got.endswith(b"end")
    assert far.outgoing.full()
    made.resume_reading()
    await net.until(lambda: protocol.got.endswith(b"endxxx"))
    await far.write(b"")
    assert await protocol.lost is None
    made.write(b"too late")
    assert made.get_write_buffer_size() == 0


async def test_an_aborted_transport_drops_what_is_queued(net: Any) -> None:
    near, _ = MemoryPipe.pair(pieces_max=1)
    made, protocol = transport(net, near, asyncio.create_task)
    made.write(b"a" * 300_000)
    await net.until(lambda: near.outgoing.full())
    made.abort()
    assert await protocol.lost is None
    assert near.was_reset
    assert made.get_write_buffer_size() == 0
    await net.until(lambda: all(task.done() for task in made._tasks))
