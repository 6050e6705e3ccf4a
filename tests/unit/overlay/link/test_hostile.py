"""Peers that misbehave lose their connection; the host, and everybody else, goes on."""

from __future__ import annotations

import asyncio
import random
import struct
import tracemalloc
from typing import Any

import pytest

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.errors import DialError, StreamReset
from wetware.identity import Key
from wetware.overlay.link import LinkHost, LinkLimits, Stream
from wetware.overlay.link.multistream import HELLO, encode_line
from wetware.overlay.link.noise import NoiseHandshake, NoiseIdentity

pytestmark = pytest.mark.anyio

DATA, WINDOW, PING, GOAWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER = struct.Struct("!BBHII")
KIB = 1 << 10


async def still_serves(net: Any, host: LinkHost) -> bool:
    client = await net.host(listen=False)
    async with await (await client.dial(host.listen_addrs)).open_stream("/echo") as stream:
        await stream.write(b"alive")
        return bool(await stream.read_exactly(5) == b"alive")


async def test_garbage_on_a_fresh_connection(net: Any, caplog: pytest.LogCaptureFixture) -> None:
    host = await net.host(LinkLimits(handshake_s=2))
    rng = random.Random(1)  # reproducible, not secret
    prefixes = (
        b"",
        HELLO,
        HELLO + encode_line("/noise"),
        HELLO + encode_line("/noise") + b"\x00\x20" + rng.randbytes(32),
        HELLO + encode_line("/noise") + b"\xff\xff" + rng.randbytes(70_000),
    )
    for turn in range(60):
        raw = await net.raw(host)
        raw.writer.write(prefixes[turn % len(prefixes)] + rng.randbytes(rng.randrange(300)))
        if turn % 2:
            await raw.aclose()
    await net.until(lambda: not host._handshaking)
    assert host.connections() == ()
    assert await still_serves(net, host)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


class Spoiler(LinkHost):
    """Agrees on yamux and breaks noise in one chunk, as the one that is dialled."""

    def _accepted(self, carrier: Multiaddr | None = None) -> Any:
        conn = super()._accepted(carrier)
        negotiate = conn._negotiate

        async def spoil(protocol: str, admit: Any = lambda: None) -> None:
            if protocol != "/yamux/1.0.0":
                await negotiate(protocol, admit)
                return
            await conn._take()
            agreed = conn._send_cipher.encrypt(HELLO + encode_line("/yamux/1.0.0"))
            conn._transport.write(len(agreed).to_bytes(2, "big") + agreed + b"\x00\x20" + bytes(32))
            await asyncio.Event().wait()

        conn._negotiate = spoil
        return conn


async def test_a_peer_that_breaks_noise_with_its_last_word_is_no_connection(net: Any) -> None:
    host = await net.host(LinkLimits(connections_per_peer_max=2))
    async with Spoiler(Key.generate()) as spoiler:
        (addr,) = await spoiler.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        for _ in range(4):  # with two dead ones in the books, the third looked for room for ever
            with pytest.raises(DialError):
                await host.dial([addr], peer=spoiler.peer_id, timeout_s=2)
    assert not host._all
    assert host.connections() == ()
    assert await still_serves(net, await net.host())


async def test_a_dialler_that_breaks_noise_with_its_last_word_is_refused(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    host = await net.host()
    raw = await net.raw(host)
    raw.writer.write(HELLO + encode_line("/noise"))
    await raw.expect_lines("/multistream/1.0.0", "/noise")
    noise = NoiseHandshake(NoiseIdentity(raw.key), initiator=True)
    raw.send_plain_message(noise.write_message())
    noise.read_message(await raw.read_plain_message())
    raw.send_plain_message(noise.write_message())
    await asyncio.sleep(0.05)  # the host waits for the next protocol
    agreed = noise.secured.send.encrypt(HELLO + encode_line("/yamux/1.0.0"))
    raw.writer.write(len(agreed).to_bytes(2, "big") + agreed + b"\x00\x20" + bytes(32))
    await net.until(lambda: not host._handshaking)
    assert not host._all
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_refusal_after_the_end_is_not_kept(net: Any) -> None:
    host = await net.host()
    raw = await (await net.raw(host)).secure()
    proposal = HELLO + encode_line("/nothing")
    frame = HEADER.pack(0, DATA, SYN, 1, len(proposal)) + proposal
    raw.send(frame + b"\xff" * 12)  # no yamux: the connection ends before the proposal is read
    await net.until(lambda: not host._all and not host._serving.tasks)
    assert not host._serving._refusals_logged


async def test_plaintext_is_not_a_security_protocol(net: Any) -> None:
    host = await net.host()
    raw = await net.raw(host)
    raw.writer.write(HELLO + encode_line("/plaintext/2.0.0") + encode_line("/tls/1.0.0"))
    assert await raw.reader.readexactly(len(HELLO) + 8) == HELLO + encode_line("na") * 2


async def test_a_forged_identity_is_refused_both_ways(net: Any) -> None:
    victim, forger = Key.generate(), Key.generate()
    identity = NoiseIdentity(forger)
    good = NoiseIdentity(victim)
    identity.payload = good.payload  # the victim's key, with a signature over another static key
    identity.peer_id = victim.peer_id
    host = await net.host()
    raw = await net.raw(host)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await asyncio.wait_for(raw.secure(identity), net.deadline_s)
    assert host.connections() == ()
    assert host.refused["handshake.failed"] == 1

    liar = await net.host()
    liar.noise = identity
    with pytest.raises(DialError, match="not proven"):
        await host.dial([liar.listen_addrs[0].with_peer(None)], peer=victim.peer_id)


async def test_tampered_ciphertext_ends_the_connection(net: Any) -> None:
    host = await net.host()
    raw, other = await net.secured(host), await net.secured(host)
    sealed = bytearray(raw.secured.send.encrypt(b"\0" * 12))
    sealed[3] ^= 1
    raw.send_plain_message(bytes(sealed))
    assert await raw.cut_off()
    assert host.refused["connection.tampered"] == 1
    other.frame(PING, SYN, 0, 9)
    assert (await other.recv_frame())[:4] == (PING, ACK, 0, 9)


async def test_a_replayed_message_ends_the_connection(net: Any) -> None:
    host = await net.host()
    raw = await net.secured(host)
    sealed = raw.secured.send.encrypt(b"\0\2\0\1\0\0\0\0\0\0\0\1")
    for _ in range(2):
        raw.send_plain_message(sealed)
    assert await raw.cut_off()


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([(WINDOW, SYN, 1, 0), (DATA, 0, 1, 300 * KIB)], "window"),
        ([(DATA, SYN, 1, 1 << 30)], "oversize"),
        ([(9, 0, 0, 0)], "frame type"),
        ([(WINDOW, SYN, 2, 0)], "stream ID"),
    ],
)
async def test_broken_frames_end_that_connection_only(
    net: Any, frames: list[tuple[int, int, int, int]], why: str
) -> None:
    host = await net.host()
    down: list[Exception | None] = []
    host.watch(lambda conn: None, lambda conn: down.append(conn.error))
    raw = await net.secured(host)
    for frame in frames:
        raw.frame(*frame)
    assert await raw.cut_off()
    assert why in str(down[0])
    assert await still_serves(net, host)


async def test_random_frames_inside_a_secured_connection(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    host = await net.host()
    rng = random.Random(2)  # reproducible, not secret
    for _ in range(40):
        raw = await net.secured(host)
        for _ in range(6):
            raw.frame(
                rng.randrange(5),
                rng.randrange(16),
                rng.choice([0, 1, 2, 3, rng.getrandbits(32)]),
                rng.choice([0, 1, 100, 1 << 20, rng.getrandbits(32)]),
                rng.randbytes(rng.randrange(120)),
            )
        await raw.writer.drain()
        await raw.aclose()
    await net.until(lambda: not host.connections())
    assert host.totals.buffered_bytes == host.totals.unsent_bytes == 0
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert await still_serves(net, host)


async def test_hung_handshakes_time_out_and_are_bounded_per_address(net: Any) -> None:
    limits = LinkLimits(handshakes_per_ip_max=5, handshake_s=0.3)
    host = await net.host(limits)
    hung = [await net.raw(host) for _ in range(5)]
    await net.until(lambda: len(host._handshaking) == 5)
    assert await (await net.raw(host)).cut_off()
    assert host.refused["handshakes_per_ip_max"] == 1
    for raw in hung:
        assert await raw.cut_off()
    assert host.refused["handshake.timeout"] == 5
    assert not host._handshaking
    assert await still_serves(net, host)


async def test_a_peer_has_a_bounded_number_of_connections(net: Any) -> None:
    host = await net.host(LinkLimits(connections_per_peer_max=2))
    identity = NoiseIdentity(Key.generate())
    raws = [await net.raw(host) for _ in range(3)]
    for raw in raws:
        await raw.secure(identity)
    assert await raws[0].cut_off()  # the oldest makes room
    assert len(host.connections()) == 2


async def test_a_thousand_connections_leave_no_slot_taken(net: Any) -> None:
    host = await net.host(
        LinkLimits(handshakes_max=4, handshakes_per_ip_max=4, connections_per_ip_max=4)
    )
    addr = host.listen_addrs[0]
    for turn in range(1000):
        reader, writer = await asyncio.open_connection(addr.host, addr.port)
        if turn % 2:
            writer.write(HELLO)
        writer.transport.abort()
        if turn % 4 == 0:
            await net.until(lambda: not host._handshaking)
        del reader
    await net.until(lambda: not host._handshaking)
    for _ in range(20):  # and established ones
        raw = await net.secured(host)
        await raw.aclose()
        await net.until(lambda: not host.connections())
    assert not host._slots.pending
    assert not host._slots.strangers
    assert not host._slots.taken
    assert await still_serves(net, host)


async def test_a_flood_of_streams_is_bounded(net: Any) -> None:
    host = await net.host(LinkLimits(streams_in_per_connection_max=50))
    raw = await net.secured(host)
    for stream_id in range(1, 401, 2):
        raw.frame(WINDOW, SYN, stream_id, 0)
    reset = 0
    while reset < 150:
        _, flags, *_ = await raw.recv_frame()
        reset += flags == RST
    assert net.streams(host) == 50
    assert host.refused["stream.limit"] == 150


async def test_half_open_negotiations_time_out(net: Any) -> None:
    host = await net.host(LinkLimits(negotiation_s=0.2))
    raw = await net.secured(host)
    for stream_id in range(1, 101, 2):
        raw.frame(DATA, SYN, stream_id, len(HELLO), HELLO)
    await net.until(lambda: net.streams(host) == 50)
    await net.until(lambda: net.streams(host) == 0)
    assert host.refused["stream.negotiation_timeout"] == 50
    await net.until(lambda: not host._serving.tasks)
    raw.frame(PING, SYN, 0, 1)  # the connection goes on
    while (await raw.recv_frame())[0] != PING:
        pass


async def test_bad_negotiations_cost_the_stream(net: Any) -> None:
    host = await net.host()
    raw = await net.secured(host)
    bad = (b"\x05nope\n", HELLO + b"\x00", HELLO + encode_line("/no") * 40)
    for number, data in enumerate(bad):
        raw.frame(DATA, SYN, 2 * number + 1, len(data), data)
    resets = set()
    while len(resets) < 3:
        _, flags, stream_id, _, _ = await raw.recv_frame()
        if flags & RST:
            resets.add(stream_id)
    assert resets == {1, 3, 5}
    assert host.refused["stream.negotiation"] == 3


async def test_rapid_reset_is_cut_off(net: Any) -> None:
    host = await net.host(LinkLimits(stream_aborts_burst=20, stream_aborts_per_s=0.001))
    raw = await net.secured(host)
    for stream_id in range(1, 101, 2):
        raw.frame(WINDOW, SYN, stream_id, 0)
        raw.frame(WINDOW, RST, stream_id, 0)
    assert await raw.cut_off()
    assert host.refused["connection.flood"] == 1
    assert net.streams(host) == 0


async def test_a_ping_flood_is_cut_off(net: Any) -> None:
    host = await net.host(LinkLimits(control_frames_burst=100, control_frames_per_s=0.001))
    raw = await net.secured(host)
    for value in range(200):
        raw.frame(PING, SYN, 0, value)
    assert await raw.cut_off()


async def test_a_peer_that_sends_frames_too_fast_is_slowed_down(net: Any) -> None:
    host = await net.host(LinkLimits(frames_burst=300, frames_per_s=100_000))
    raw = await net.secured(host)
    raw.frame(DATA, SYN, 1, 0)
    for _ in range(5):
        raw.send(b"".join(b"\0\0\0\0\0\0\0\1\0\0\0\0" for _ in range(100)))
    raw.send(b"\0\2\0\1\0\0\0\0\0\0\0\5" * 300)
    await net.until(lambda: host.refused.get("connection.throttled"))
    pongs = 0
    while pongs < 300:  # slowed down, not cut off
        pongs += (await raw.recv_frame())[0] == PING


async def test_a_frozen_peer_is_found_by_keepalive(net: Any) -> None:
    host = await net.host(LinkLimits(keepalive_s=0.1, keepalive_timeout_s=0.1))
    raw = await net.secured(host)  # it never answers the ping
    assert (await raw.recv_frame())[:2] == (PING, SYN)
    assert await raw.cut_off()
    assert host.refused["connection.keepalive"] == 1


async def test_an_idle_peer_that_answers_pings_stays(net: Any) -> None:
    host = await net.host(LinkLimits(keepalive_s=0.05, keepalive_timeout_s=0.5))
    client = await net.host(listen=False)
    conn = await client.dial(host.listen_addrs)
    before = conn.bytes_in
    await net.until(lambda: conn.bytes_in >= before + 3 * 30)  # three pings in messages of 30 bytes
    assert not conn.closed


async def test_a_peer_that_talks_but_takes_nothing_is_found(net: Any) -> None:
    host = await net.host(LinkLimits(keepalive_s=0.1, keepalive_timeout_s=0.1))

    async def source(stream: Stream) -> None:
        while True:
            await stream.write(b"x" * 64 * KIB)

    host.handle("/source", source, access=Access.PUBLIC)
    raw = await net.secured(host)
    data = HELLO + encode_line("/source")
    raw.frame(WINDOW, SYN, 1, 1 << 30)
    raw.frame(DATA, 0, 1, len(data), data)
    raw.writer.transport.pause_reading()
    talking = True

    async def talk() -> None:
        while talking:
            raw.frame(DATA, 0, 1, 1, b".")
            await asyncio.sleep(0.02)

    task = asyncio.create_task(talk())
    await net.until(lambda: host.refused.get("connection.keepalive"))
    talking = False
    await task
    # What was waiting for it was bounded all the time, and is gone now.
    assert host.totals.unsent_bytes == 0


async def test_streams_that_are_opened_and_never_read_are_bounded(net: Any) -> None:
    limits = LinkLimits(
        unsent_per_connection_bytes_max=1 << 20,
        buffered_per_connection_bytes_max=1 << 20,
    )
    host = await net.host(limits)

    async def source(stream: Stream) -> None:
        while True:
            await stream.write(b"x" * 64 * KIB)

    async def deaf(stream: Stream) -> None:
        await asyncio.Event().wait()

    host.handle("/source", source, access=Access.PUBLIC)
    host.handle("/deaf", deaf, access=Access.PUBLIC)
    raw = await net.secured(host)
    for number in range(20):  # nobody reads what the host sends
        data = HELLO + encode_line("/source")
        raw.frame(DATA, SYN, 2 * number + 1, len(data), data)
    for number in range(20, 30):  # nobody reads what the peer sends
        data = HELLO + encode_line("/deaf")
        raw.frame(DATA, SYN, 2 * number + 1, len(data), data)
        raw.frame(DATA, 0, 2 * number + 1, 200 * KIB, b"y" * 200 * KIB)
        await raw.writer.drain()
    await net.until(lambda: host.refused.get("stream.unread", 0) >= 5)
    assert host.totals.buffered_bytes <= 1 << 20
    assert host.totals.unsent_bytes <= (1 << 20) + 256 * KIB + 20 * 16 * KIB


async def test_who_fills_windows_and_hangs_up_again_and_again_is_bounded(net: Any) -> None:
    host = await net.host(LinkLimits(buffered_bytes_max=1 << 20, handler_grace_s=60))

    async def deaf(stream: Stream) -> None:
        await asyncio.Event().wait()

    host.handle("/deaf", deaf, access=Access.PUBLIC)
    data = HELLO + encode_line("/deaf")
    for round_ in range(1, 11):
        raw = await net.secured(host)
        for number in (1, 3):
            raw.frame(DATA, SYN, number, len(data), data)
            raw.frame(DATA, 0, number, 200 * KIB, b"y" * 200 * KIB)
        await raw.writer.drain()
        await net.until(lambda: len(host._serving.tasks) == 2 * round_)  # noqa: B023
        await net.until(lambda: host.connections()[0]._session.held_bytes == 400 * KIB)
        await raw.aclose()
        await net.until(lambda: not host.connections())
        # The handlers have a while to end, and could read what came.
        held = sum(len(piece) for stream in host._serving.tasks for piece in stream._in)
        assert held <= host.totals.buffered_bytes <= 1 << 20


async def test_early_bytes_before_the_handshake_are_bounded(net: Any) -> None:
    host = await net.host()
    raw = await net.raw(host)
    flood = HELLO + encode_line("/noise") + b"\x20\x00" + b"x" * (2 << 20)
    raw.writer.write(flood)
    assert await raw.cut_off()


async def test_a_dialler_of_a_hostile_listener_survives(net: Any) -> None:
    rng = random.Random(3)  # reproducible, not secret
    host = await net.host(LinkLimits(handshake_s=1))
    answers = [b"", HELLO + encode_line("na"), HELLO + b"\xff" * 50, rng.randbytes(500)]
    answers.append(HELLO + encode_line("/noise") + b"\x00\x60" + rng.randbytes(96))

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers[0])
        writer.write_eof()
        writer.close()

    server = await asyncio.start_server(lie, "127.0.0.1", 0)
    addr = Multiaddr("ip4", "127.0.0.1", server.sockets[0].getsockname()[1])
    while answers:
        with pytest.raises(DialError):
            await host.dial([addr])
        answers.pop(0)
    server.close()
    assert not host._handshaking


async def test_streams_end_when_the_peer_is_killed(net: Any) -> None:
    host = await net.host()
    client = await net.host(listen=False)
    conn = await client.dial(host.listen_addrs)
    stream = await conn.open_stream("/echo")
    await net.until(host.connections)
    host.connections()[0].abort(OSError("pulled the plug"))
    with pytest.raises(StreamReset):
        await stream.read()
    assert client.connection(host.peer_id) is None


async def test_a_graceful_close_does_not_wait_for_a_peer_that_does_not_read(net: Any) -> None:
    host = await net.host(LinkLimits(close_s=0.1))

    async def source(stream: Stream) -> None:
        while True:
            await stream.write(b"x" * 64 * KIB)

    host.handle("/source", source, access=Access.PUBLIC)
    raw = await net.secured(host)
    data = HELLO + encode_line("/source")
    raw.frame(DATA, SYN, 1, len(data), data)
    raw.frame(WINDOW, 0, 1, 1 << 30)
    raw.writer.transport.pause_reading()
    (conn,) = host.connections()
    await net.until(lambda: conn._paused)
    conn.close()
    await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    assert host.connections() == ()


async def test_a_handler_that_ignores_its_cancellation_does_not_hang_the_host(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    host = await net.host(LinkLimits(close_s=0.1))
    released = asyncio.Event()

    async def stubborn(stream: Stream) -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    host.handle("/stubborn", stubborn, access=Access.PUBLIC)
    client = await net.host(listen=False)
    await (await client.dial(host.listen_addrs)).open_stream("/stubborn")
    await asyncio.wait_for(host.aclose(), net.deadline_s)
    assert "handler.stuck" in caplog.text
    released.set()
    await net.until(lambda: not host._serving.tasks)


# --- the list of attacks, one by name each --------------------------------------------------------
# Further up: frozen peer (keepalive), hung handshakes, a thousand connections, forged identities.


@pytest.mark.parametrize(
    ("raw_frame", "why"),
    [
        (b"\x01\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00", "version"),
        (b"\x00\x09\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00", "frame type"),
        (b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01x", "without a stream"),
        (b"\x00\x00\x00\x00\x00\x00\x00\x08\x00\x00\x00\x01x", "never opened"),
        (b"\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02", "went away with error"),
        (b"\x00\x01\x00\x01\x00\x00\x00\x04\x00\x00\x00\x00", "stream ID"),
    ],
)
async def test_malformed_frames_end_that_connection_only(
    net: Any, raw_frame: bytes, why: str
) -> None:
    host = await net.host()
    bystander, raw = await net.busy(host), await net.secured(host)
    down: list[Exception | None] = []
    host.watch(lambda conn: None, lambda conn: down.append(conn.error))
    raw.send(raw_frame)
    assert await raw.cut_off()
    assert why in str(down[0])
    assert host.refused["connection.violation"] == 1
    assert len(host.connections()) == 1
    bystander.frame(PING, SYN, 0, 3)
    assert (await bystander.recv_frame())[:2] == (PING, ACK)


async def test_oversize_frames_are_refused_before_anything_is_allocated(net: Any) -> None:
    host = await net.host()
    tracemalloc.start()
    try:
        for size in (host.limits.frame_bytes_max + 1, 0xFFFFFFFF):
            raw = await net.secured(host)
            raw.frame(WINDOW, SYN, 1, 0)
            raw.frame(DATA, 0, 1, size)
            assert await raw.cut_off()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert host.refused["connection.violation"] == 2
    assert await still_serves(net, host)


async def test_an_oversize_noise_message_in_the_handshake_is_refused(net: Any) -> None:
    host = await net.host()
    raw = await net.raw(host)
    raw.writer.write(HELLO + encode_line("/noise") + b"\xff\xff")
    assert await raw.cut_off()
    assert host.refused["handshake.failed"] == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff" * 40,
        b"\x0a\x24\x08\x01\x12\x20" + b"\x00" * 32,  # a key that is no signature's
        b"\x0a\x24\x08\x01\x12\x20" + b"\xff" * 32 + b"\x12\x40" + b"\x00" * 64,
        b"\x0a\x06\x08\x01\x12\x02ab\x12\x40" + b"\x00" * 64,  # of two bytes
        b"\x0a\x06\x08\x63\x12\x02ab\x12\x40" + b"\x00" * 64,  # of an unknown type
        b"\x0a\x06\x08\x00\x12\x02ab\x12\x40" + b"\x00" * 64,  # RSA that is no DER
        b"\x0a\xff\xff\xff\xff\x0f" + b"\x00" * 64,  # longer than it is
    ],
)
async def test_a_junk_public_key_ends_that_handshake_only(
    net: Any, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    host = await net.host()
    bystander, raw = await net.busy(host), await net.raw(host)
    identity = NoiseIdentity(raw.key)
    identity.payload = payload
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await asyncio.wait_for(raw.secure(identity), net.deadline_s)
    assert host.refused["handshake.failed"] == 1
    assert len(host.connections()) == 1
    bystander.frame(PING, SYN, 0, 3)
    assert (await bystander.recv_frame())[:2] == (PING, ACK)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_impersonation_is_refused_and_the_victim_is_not_disturbed(net: Any) -> None:
    """Who has another's public key, and all that it ever sent, is still not that peer."""
    victim, host = await net.host(), await net.host()
    conn = await victim.dial(host.listen_addrs)
    # The victim's own, validly signed payload, replayed over a static key that it does not sign.
    replayed = NoiseIdentity(Key.generate())
    replayed.payload = victim.noise.payload
    for _ in range(3):
        raw = await net.raw(host)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(raw.secure(replayed), net.deadline_s)
    assert host.refused["handshake.failed"] == 3
    (mine,) = host.connections()
    assert mine.peer == victim.peer_id
    async with await conn.open_stream("/echo") as stream:
        await stream.write(b"alive")
        assert await stream.read_exactly(5) == b"alive"


async def test_ten_thousand_streams_at_once_are_bounded_and_others_go_on(net: Any) -> None:
    limits = LinkLimits(stream_opens_burst=10_000, stranger_opens_burst=10_000)
    host = await net.host(limits)
    raw, bystander = await net.secured(host), await net.busy(host)
    most = host.limits.streams_in_per_connection_max

    def syns(first: int, count: int) -> bytes:
        """So many streams, from the number `first` on."""
        numbers = range(2 * first + 1, 2 * (first + count) + 1, 2)
        return b"".join(HEADER.pack(0, WINDOW, SYN, n, 0) for n in numbers)

    raw.send(syns(0, most))
    for _ in range(most):
        assert (await raw.recv_frame())[:2] == (WINDOW, ACK)
    raw.send(syns(most, 100))  # beyond the limit, each costs an answer
    for _ in range(100):
        assert (await raw.recv_frame())[:2] == (WINDOW, RST)
    assert net.streams(host) == most + 1
    bystander.frame(DATA, 0, 1, 5, b"alive")
    while (await bystander.recv_frame())[4] != b"alive":
        pass
    raw.send(syns(most + 100, 10_000 - most - 100))  # and so many are a flood
    assert await raw.cut_off()
    assert host.refused["connection.flood"] == 1
    assert net.streams(host) == 1
    await net.until(lambda: len(host._serving.tasks) == 1)
    bystander.frame(PING, SYN, 0, 3)
    while (await bystander.recv_frame())[:2] != (PING, ACK):
        pass
    assert await still_serves(net, host)


async def test_ten_thousand_streams_one_after_another_leave_nothing(net: Any) -> None:
    host = await net.host(LinkLimits(stream_opens_per_s=1e6, stranger_opens_per_s=1e6))
    raw = await net.secured(host)
    lines = HELLO + encode_line("/echo")
    done = 0
    for first in range(1, 20_000, 400):
        raw.send(
            b"".join(
                HEADER.pack(0, DATA, SYN, n, len(lines)) + lines + HEADER.pack(0, WINDOW, FIN, n, 0)
                for n in range(first, first + 400, 2)
            )
        )
        while done < (first + 399) // 2:
            _, flags, *_ = await raw.recv_frame()
            done += bool(flags & FIN)
            assert not flags & RST
    assert done == 10_000
    await net.until(lambda: not (net.streams(host) or host._serving.tasks))
    assert host.totals.buffered_bytes == host.totals.unsent_bytes == 0
    assert not host._serving.tasks


async def test_strangers_of_one_address_open_so_many_streams_and_no_more(net: Any) -> None:
    """A stream costs more than a protocol's own limit sees: all of an address count together."""
    friend = Key.generate()
    host = await net.host(
        LinkLimits(stranger_opens_per_s=0.001, stranger_opens_burst=20),
        privileged=lambda peer: peer == friend.peer_id,
    )
    lines = HELLO + encode_line("/echo")
    first, second = [await net.secured(host, source="127.0.0.2") for _ in range(2)]
    for number in range(1, 31, 2):  # 15 streams, and then beyond the 20
        first.frame(DATA, SYN, number, len(lines), lines)
    while (await first.recv_frame())[2] != 29:
        pass
    for number in range(1, 31, 2):
        second.frame(DATA, SYN, number, len(lines), lines)
    assert await second.cut_off()
    assert host.refused["stream.stranger_rate"] == 1
    assert [conn.closed for conn in host.connections()] == [False]
    member = await net.secured(host, key=friend, source="127.0.0.2")
    for number in range(1, 101, 2):
        member.frame(DATA, SYN, number, len(lines), lines)
    while (await member.recv_frame())[2] != 99:
        pass
    assert await net.busy(host, source="127.0.0.3")


async def test_a_window_that_is_never_opened_holds_up_its_own_stream_only(net: Any) -> None:
    host = await net.host()
    raw = await net.secured(host)
    stuck = asyncio.Event()

    async def source(stream: Stream) -> None:
        stuck.set()
        while True:
            await stream.write(b"x" * 64 * KIB)

    host.handle("/source", source, access=Access.PUBLIC)
    lines = HELLO + encode_line("/source")
    for number in range(8):
        raw.frame(DATA, SYN, 2 * number + 1, len(lines), lines)
    await stuck.wait()
    lines = HELLO + encode_line("/echo")
    raw.frame(DATA, SYN, 101, len(lines) + 5, lines + b"alive")
    got: dict[int, int] = {}
    echoed = b""
    while not echoed.endswith(b"alive") or sum(got.values()) < 8 * 256 * KIB:
        kind, _, stream_id, _, body = await raw.recv_frame()
        if kind == DATA and stream_id == 101:
            echoed += body
        elif kind == DATA:
            got[stream_id] = got.get(stream_id, 0) + len(body)
    # Nobody gets more than the window that every stream begins with, and what waits is bounded.
    assert set(got.values()) == {256 * KIB}
    limits = host.limits
    assert host.totals.unsent_bytes <= 8 * limits.stream_unsent_bytes_max
    raw.frame(PING, SYN, 0, 5)
    assert (await raw.recv_frame())[:4] == (PING, ACK, 0, 5), "nothing more came before it"
    await raw.aclose()
    await net.until(lambda: not host._serving.tasks)
    assert host.totals.unsent_bytes == 0


async def test_a_window_overrun_ends_that_connection_only(net: Any) -> None:
    host = await net.host()
    read = asyncio.Event()

    async def deaf(stream: Stream) -> None:
        await read.wait()

    host.handle("/deaf", deaf, access=Access.PUBLIC)
    bystander, raw = await net.busy(host), await net.secured(host)
    lines = HELLO + encode_line("/deaf")
    raw.frame(DATA, SYN, 1, len(lines), lines)
    for _ in range(4):
        raw.frame(DATA, 0, 1, 64 * KIB, b"x" * 64 * KIB)  # some bytes beyond the window
    assert await raw.cut_off()
    assert host.refused["connection.violation"] == 1
    assert host.totals.buffered_bytes == 192 * KIB  # which the handler may read
    bystander.frame(PING, SYN, 0, 3)
    assert (await bystander.recv_frame())[:2] == (PING, ACK)
    read.set()
    await net.until(lambda: host.totals.buffered_bytes == 0)


async def test_windows_opened_beyond_4_gib_are_a_violation(net: Any) -> None:
    host = await net.host()
    raw = await net.secured(host)
    raw.frame(WINDOW, SYN, 1, 0xFFFFFFFF)
    assert await raw.cut_off()
    assert host.refused["connection.violation"] == 1
    assert await still_serves(net, host)
