"""Two and more real hosts on loopback."""

from __future__ import annotations

import array
import asyncio
import fcntl
import logging
import sys
from typing import Any

import pytest

from tests.ports import free_port
from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.errors import (
    Busy,
    ConfigError,
    DialError,
    InvalidArgument,
    PeerMismatch,
    ProtocolRefused,
    StreamReset,
)
from wetware.identity import Key, PeerId
from wetware.overlay.link import Connection, LinkHost, LinkLimits, Stream, check_free
from wetware.overlay.link.multistream import HELLO, encode_line

pytestmark = pytest.mark.anyio

KIB, MIB = 1 << 10, 1 << 20


async def no_delay(net: Any, host: LinkHost) -> None:
    """Have the windows of what arrives stay as they are, as on a path without delay.

    They grow with the round trip of the handshake, and on a machine under load that is long: then
    more is under way in front of a small message, and rightly so.
    """
    await net.until(host.connections)
    for conn in host.connections():
        conn._session.rtt_s = 0.0


async def test_an_echo_and_what_a_connection_knows(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    conn = await b.dial(a.listen_addrs)
    await net.until(a.connections)
    (other,) = a.connections()
    assert (conn.peer, other.peer) == (a.peer_id, b.peer_id)
    assert (conn.initiator, other.initiator) == (True, False)
    assert conn.channel_binding == other.channel_binding
    assert len(conn.channel_binding) == 32
    assert conn.remote == a.listen_addrs[0]
    assert str(conn.local) in str(other.remote)
    async with await conn.open_stream("/nope", "/echo") as stream:
        assert (stream.protocol, stream.peer) == ("/echo", a.peer_id)
        await stream.write(b"hello")
        assert await stream.read_exactly(5) == b"hello"
    await net.until(lambda: not (net.streams(a) or net.streams(b) or a._serving.tasks))
    assert conn.bytes_out == other.bytes_in


async def test_megabytes_both_ways_at_once_on_many_streams(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    conn = await b.dial(a.listen_addrs)
    payload = bytes(range(256)) * 4096

    async def one() -> bool:
        stream = await conn.open_stream("/echo")

        async def send() -> None:
            for _ in range(3):
                await stream.write(payload)
            stream.close()

        sending, got = asyncio.create_task(send()), bytearray()
        while data := await stream.read():
            got += data
        await sending
        return bytes(got) == payload * 3

    assert all(await asyncio.gather(*(one() for _ in range(8))))
    await net.until(lambda: not (net.streams(a) or net.streams(b)))
    for host in (a, b):
        assert (host.totals.buffered_bytes, host.totals.unsent_bytes) == (0, 0)
        assert host.totals.grown_bytes == 0


async def test_all_frames_of_one_turn_leave_in_one_write(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    conn = await b.dial(a.listen_addrs)
    streams = [await conn.open_stream("/echo") for _ in range(20)]
    writes: list[int] = []
    transport = conn._transport
    assert transport is not None

    class Counting:
        def write(self, data: bytes) -> None:
            writes.append(len(data))
            transport.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(transport, name)

    conn._transport = Counting()  # type: ignore[assignment]
    for round_ in range(3):
        writes.clear()
        for stream in streams:
            stream.write_nowait(b"x" * 100)
        for stream in streams:
            assert await stream.read_exactly(100) == b"x" * 100
        # The first round may let a lone frame go ahead; then it is known that there are many.
        assert len(writes) <= (2 if round_ == 0 else 1)


async def test_a_bulk_stream_does_not_starve_a_small_one(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    read = 0

    async def sink(stream: Stream) -> None:
        nonlocal read
        while data := await stream.read():
            read += len(data)

    a.handle("/sink", sink, access=Access.PUBLIC)
    conn = await b.dial(a.listen_addrs)
    await no_delay(net, a)
    bulk, small = await conn.open_stream("/sink"), await conn.open_stream("/echo")
    pump_on = True

    async def pump() -> None:
        while pump_on:
            await bulk.write(b"x" * 64 * KIB)

    task = asyncio.create_task(pump())
    await net.until(lambda: read > 8 * MIB)
    before, rounds = read, 50
    for _ in range(rounds):
        await small.write(b"ping")
        assert await small.read_exactly(4) == b"ping"
    # A round trip waits for what is in flight, but never for the whole backlog of a window.
    assert (read - before) / rounds < 4 * MIB
    pump_on = False
    await task


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what its socket holds")
async def test_little_waits_in_front_of_an_urgent_frame_on_a_full_path(net: Any) -> None:
    host = await net.host()
    flowing = asyncio.Event()

    async def source(stream: Stream) -> None:
        while True:
            await stream.write(b"x" * 64 * KIB)
            flowing.set()

    host.handle("/source", source, access=Access.PUBLIC)
    raw = await net.secured(host)
    raw.writer.transport.pause_reading()
    data = HELLO + encode_line("/source")
    raw.frame(0, 1, 1, len(data), data)
    raw.frame(1, 0, 1, 1 << 30)
    await flowing.wait()
    (conn,) = host.connections()
    await net.until(lambda: conn._paused)
    transport = conn._transport
    assert transport is not None
    kernel = array.array("i", [0])
    fcntl.ioctl(transport.get_extra_info("socket").fileno(), 0x894B, kernel)  # SIOCOUTQNSD
    # A message more than the limit may slip in; without a limit it would be megabytes.
    assert kernel[0] <= host.limits.notsent_bytes_max + 64 * KIB
    assert transport.get_write_buffer_size() <= (64 + 256 + 1) * KIB  # _WAITING_BYTES and a flush


async def test_an_urgent_stream_answers_beside_saturated_transfers(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    read = 0

    async def sink(stream: Stream) -> None:
        nonlocal read
        while data := await stream.read():
            read += len(data)

    async def probe(stream: Stream) -> None:
        stream.urgent = True
        await net.echo(stream)

    a.handle("/sink", sink, access=Access.PUBLIC)
    a.handle("/probe", probe, access=Access.PUBLIC)
    conn = await b.dial(a.listen_addrs)
    await no_delay(net, a)
    bulk = [await conn.open_stream("/sink") for _ in range(4)]
    urgent = await conn.open_stream("/probe")
    urgent.urgent = True

    async def pump(stream: Stream) -> None:
        while True:
            await stream.write(b"x" * 256 * KIB)

    tasks = [asyncio.create_task(pump(stream)) for stream in bulk]
    await net.until(lambda: read > 8 * MIB)
    before, rounds = read, 50
    for _ in range(rounds):
        await urgent.write(b"ping")
        assert await urgent.read_exactly(4) == b"ping"
    between = (read - before) / rounds
    for task in tasks:
        task.cancel()
    assert before < read, "the transfers went on"
    assert between < 4 * MIB


async def test_a_reader_that_never_reads_bounds_the_sender_and_others_go_on(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)

    async def lazy(stream: Stream) -> None:
        await asyncio.Event().wait()

    a.handle("/lazy", lazy, access=Access.PUBLIC)
    conn = await b.dial(a.listen_addrs)
    stuck = await conn.open_stream("/lazy")
    written = 0

    async def pump() -> None:
        nonlocal written
        while True:
            await stuck.write(b"x" * 16 * KIB)
            written += 16 * KIB

    task = asyncio.create_task(pump())
    await net.until(lambda: a.totals.buffered_bytes > 255 * KIB)
    await net.until(lambda: b.totals.unsent_bytes >= 256 * KIB)
    async with await conn.open_stream("/echo") as stream:
        await stream.write(b"alive")
        assert await stream.read_exactly(5) == b"alive"
    assert a.totals.buffered_bytes <= 256 * KIB
    assert written <= 512 * KIB
    task.cancel()
    stuck.reset()
    await net.until(lambda: a.totals.buffered_bytes == 0)


async def test_a_refused_protocol_is_na_and_logged(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wetware")
    a, b = await net.host(), await net.host(listen=False)
    a.handle("/members", net.echo, access=Access.MEMBER)
    conn = await b.dial(a.listen_addrs)
    for _ in range(12):
        with pytest.raises(ProtocolRefused, match="/members"):
            await conn.open_stream("/members")
    refusals = [r for r in caplog.records if r.getMessage() == "stream.refused"]
    assert len(refusals) == 8  # then it stops filling the log
    assert vars(refusals[0])["ww"]["protocol"] == "/members"
    assert a.refused["stream.protocol"] == 12
    assert (await conn.open_stream("/members", "/echo")).protocol == "/echo"


async def test_a_raising_admit_refuses(net: Any) -> None:
    def broken(peer: PeerId, protocol: str, access: Access) -> bool:
        raise KeyError(peer)

    a = await net.stack.enter_async_context(LinkHost(Key.generate(), admit=broken))
    await a.listen([Multiaddr("ip4", "127.0.0.1", 0)])
    a.handle("/echo", net.echo, access=Access.PUBLIC)
    b = await net.host(listen=False)
    with pytest.raises(ProtocolRefused):
        await (await b.dial(a.listen_addrs)).open_stream("/echo")


async def test_a_handlers_exception_resets_its_stream_only(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await net.host(), await net.host(listen=False)

    async def broken(stream: Stream) -> None:
        await stream.read()
        raise ZeroDivisionError

    a.handle("/broken", broken, access=Access.PUBLIC)
    conn = await b.dial(a.listen_addrs)
    good, bad = await conn.open_stream("/echo"), await conn.open_stream("/broken")
    await bad.write(b"x")
    with pytest.raises(StreamReset):
        await bad.read()
    assert "handler.failed" in caplog.text
    await good.write(b"x")
    assert await good.read() == b"x"


async def test_a_handler_that_outlives_its_connection_is_cancelled(net: Any) -> None:
    a = await net.host(LinkLimits(handler_grace_s=0.02))
    b = await net.host(listen=False)
    cancelled = asyncio.Event()

    async def stubborn(stream: Stream) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    a.handle("/stubborn", stubborn, access=Access.PUBLIC)
    conn = await b.dial(a.listen_addrs)
    await conn.open_stream("/stubborn")
    assert len(a._serving.tasks) == 1
    conn.close()
    await asyncio.wait_for(cancelled.wait(), net.deadline_s)
    await net.until(lambda: not a._serving.tasks)


async def test_what_was_written_before_a_close_arrives(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def collect(stream: Stream) -> None:
        data = b""
        while more := await stream.read():
            data += more
        got.set_result(data)

    a.handle("/collect", collect, access=Access.PUBLIC)
    conn = await b.dial(a.listen_addrs)
    stream = await conn.open_stream("/collect")
    await stream.write(b"x" * 200 * KIB)
    stream.close()
    conn.close()
    assert conn.closed
    assert await asyncio.wait_for(got, net.deadline_s) == b"x" * 200 * KIB
    await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    await net.until(lambda: not a.connections())
    assert b.connection(a.peer_id) is None
    with pytest.raises(StreamReset):
        await conn.open_stream("/echo")
    with pytest.raises(DialError, match="not connected"):
        await b.open_stream(a.peer_id, "/echo")


async def test_watchers_hear_of_connections(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    events: list[tuple[str, Connection]] = []
    end = a.watch(lambda c: events.append(("up", c)), lambda c: events.append(("down", c)))
    a.watch(lambda c: 1 / 0, lambda c: None)  # type: ignore[arg-type,return-value]  # a defect
    conn = await b.dial(a.listen_addrs)
    await net.until(lambda: events)
    conn.close()
    await net.until(lambda: len(events) == 2)
    assert [kind for kind, _ in events] == ["up", "down"]
    assert events[0][1].peer == b.peer_id
    end()
    await b.dial(a.listen_addrs)
    await net.until(a.connections)
    assert len(events) == 2


# --- listening ------------------------------------------------------------------------------------


async def test_a_taken_port_is_said_with_a_hint_and_may_be_free_later(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    taken = Multiaddr("ip4", "127.0.0.1", a.listen_addrs[0].port)
    for listen in (b.listen, check_free):
        with pytest.raises(Busy, match="taken") as caught:
            await listen([Multiaddr("ip4", "127.0.0.1", 0), taken])
        assert caught.value.code == "config.busy.port"
        assert caught.value.hint
        assert b.listen_addrs == ()
        with pytest.raises(Busy, match="no such address"):
            await listen([Multiaddr("ip4", "192.0.2.1", 0)])
    await a.aclose()
    await check_free([taken])
    assert await b.listen([taken])  # the check holds nothing


async def test_ip6_and_names(net: Any) -> None:
    a, b = await net.host(listen=False), await net.host(listen=False)
    try:
        (addr,) = await a.listen([Multiaddr("ip6", "::1", 0)])
    except ConfigError as exc:
        pytest.skip(f"no IPv6 here: {exc}")
    assert str(addr).startswith("/ip6/::1/tcp/")
    (named,) = await a.listen([Multiaddr("ip4", "127.0.0.1", 0)])
    conn = await b.dial([addr])
    assert conn.remote.kind == "ip6"
    conn.close()
    await conn.wait_closed()
    again = await b.dial([Multiaddr("dns4", "localhost", named.port)])
    assert again.peer == a.peer_id


# --- dialling -------------------------------------------------------------------------------------


async def test_a_failed_dial_names_every_address_and_why(net: Any) -> None:
    host, peer = await net.host(listen=False), Key.generate().peer_id
    other = await net.host()
    addrs = [
        Multiaddr("ip4", "127.0.0.1", free_port()),
        Multiaddr("dns", "does-not-exist.invalid", 4001),
        other.listen_addrs[0].with_peer(None),
    ]
    with pytest.raises(DialError) as caught:
        await host.dial(addrs, peer=peer)
    for addr, why in zip(addrs, ("refused", "resolved", "not"), strict=True):
        assert str(addr) in caught.value.message
        assert why in caught.value.message.partition(str(addr))[2]
    assert str(other.peer_id) in caught.value.message
    assert caught.value.hint
    assert not host._handshaking
    with pytest.raises(DialError, match="no address"):
        await host.dial([], peer=peer)


async def test_another_peer_than_dialled_is_a_mismatch(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    with pytest.raises(PeerMismatch, match=str(a.peer_id)):
        await b.dial([a.listen_addrs[0].with_peer(None)], peer=Key.generate().peer_id)
    await net.until(lambda: not a.connections())
    assert b.connections() == ()


async def test_a_node_does_not_dial_itself(net: Any) -> None:
    a = await net.host()
    with pytest.raises(DialError, match="itself"):
        await a.dial(a.listen_addrs)
    with pytest.raises(PeerMismatch, match="own") as caught:
        await a.dial([a.listen_addrs[0].with_peer(None)])
    assert caught.value.code == "overlay.dial_self"


async def test_a_dead_address_is_overtaken_by_a_good_one(net: Any) -> None:
    a = await net.host()
    b = await net.host(LinkLimits(dial_stagger_s=0.02), listen=False)
    dead = await net.hung()
    conn = await asyncio.wait_for(b.dial([dead, *a.listen_addrs], peer=a.peer_id), 60)
    assert conn.peer == a.peer_id
    assert not b._handshaking


async def test_a_dial_times_out_and_says_where(net: Any) -> None:
    host = await net.host(listen=False)
    dead = await net.hung()
    with pytest.raises(DialError, match="no answer in time") as caught:
        await host.dial([dead], timeout_s=0.05)
    assert str(dead) in caught.value.message
    await net.until(lambda: not host._handshaking)


async def test_concurrent_dials_to_one_peer_share_a_connection(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    conns = await asyncio.gather(*(b.dial(a.listen_addrs) for _ in range(10)))
    assert len(set(conns)) == 1
    assert await b.dial([], peer=a.peer_id) is conns[0]
    await net.until(a.connections)
    assert len(a.connections()) == 1


async def test_a_cancelled_dial_does_not_cancel_the_others(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    first = asyncio.create_task(b.dial(a.listen_addrs))
    second = asyncio.create_task(b.dial(a.listen_addrs))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).peer == a.peer_id
    assert first.cancelled()
    third = asyncio.create_task(b.dial(a.listen_addrs, peer=Key.generate().peer_id))
    await asyncio.sleep(0)
    third.cancel()
    await asyncio.wait([third])
    await net.until(lambda: not b._handshaking)


@pytest.mark.parametrize("turns", range(10))
async def test_a_caller_cancelled_as_the_connection_gets_ready_leaves_none(
    net: Any, turns: int
) -> None:
    a, b = await net.host(), await net.host(listen=False)
    dialling = asyncio.create_task(b.dial(a.listen_addrs))
    net.cancel_after(b, dialling, turns)
    await asyncio.wait([dialling])
    if dialling.cancelled():
        await net.until(lambda: not b.connections())
        await net.until(lambda: not a.connections())
    else:
        assert not dialling.result().closed
    other = asyncio.create_task(b.dial(a.listen_addrs))  # nor does it take another's away
    assert (await other).peer == a.peer_id


async def test_both_ends_dialling_at_once_agree_on_one_connection(net: Any) -> None:
    for _ in range(5):
        a, b = await net.host(LinkLimits(duplicate_idle_s=0.05)), await net.host()
        await asyncio.gather(a.dial(b.listen_addrs), b.dial(a.listen_addrs))
        await net.until(lambda a=a, b=b: a.connection(b.peer_id) and b.connection(a.peer_id))
        await net.until(lambda a=a, b=b: len(a.connections()) == len(b.connections()) == 1)
        one, other = a.connection(b.peer_id), b.connection(a.peer_id)
        assert one is not None
        assert other is not None
        assert one.channel_binding == other.channel_binding
        stream = await a.open_stream(b.peer_id, "/echo")
        await stream.write(b"x")
        assert await stream.read() == b"x"


# --- handlers -------------------------------------------------------------------------------------


async def test_a_protocol_is_served_once_and_can_be_given_back(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    with pytest.raises(InvalidArgument) as caught:
        a.handle("/echo", net.echo, access=Access.PUBLIC)
    assert caught.value.code == "invalid.protocol_taken"
    for bad in ("echo", "/a\n", "/" + "x" * 2000, "/multistream/1.0.0"):
        with pytest.raises(InvalidArgument):
            a.handle(bad, net.echo, access=Access.PUBLIC)
    end = a.handle("/two", net.echo, access=Access.PUBLIC)
    assert a.protocols == ("/echo", "/two")
    end()
    end()
    conn = await b.dial(a.listen_addrs)
    with pytest.raises(ProtocolRefused):
        await conn.open_stream("/two")


async def test_closing_a_host_ends_everything(net: Any) -> None:
    a, b = await net.host(), await net.host(listen=False)
    conn = await b.dial(a.listen_addrs)
    stream = await conn.open_stream("/echo")
    await a.aclose()
    with pytest.raises(StreamReset):
        await stream.read()
    await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    assert not a.connections()
    assert not a._serving.tasks
    with pytest.raises(DialError, match="refused"):
        await b.dial(a.listen_addrs)
    with pytest.raises(DialError, match="stopping"):
        await a.dial(a.listen_addrs, peer=b.peer_id)


async def test_writing_from_within_a_flush_keeps_the_order(net: Any) -> None:
    """What `on_writable` writes, and asks to flush, goes after what is being sent."""
    got = bytearray()
    done = asyncio.Event()
    total = 24 << 20

    async def sink(stream: Stream) -> None:
        while len(got) < total:
            got.extend(await stream.read())
        done.set()

    a, b = await net.host(), await net.host(listen=False)
    a.handle("/sink", sink, access=Access.PUBLIC)
    stream = await (await b.dial(a.listen_addrs)).open_stream("/sink")
    pattern = b"".join(n.to_bytes(4, "big") for n in range(total // 4))
    left = memoryview(pattern)

    def write() -> None:
        nonlocal left
        while left:
            count = stream.write_nowait(left[:30_000])
            left = left[count:]
            stream.connection.flush()
            if not count:
                return

    stream.attach(lambda data: None, lambda error: None, write)
    write()
    async with asyncio.timeout(60):
        await done.wait()
    assert got == pattern
