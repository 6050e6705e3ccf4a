"""Who gets an inbound connection when there are not enough, and for how long."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Any

import pytest

from wetware.errors import DialError, StreamReset
from wetware.identity import Key, PeerId
from wetware.overlay.link import LinkHost, LinkLimits
from wetware.overlay.link.multistream import HELLO

pytestmark = pytest.mark.anyio

GOAWAY_FRAME = (3, 0, 0, 0, b"")
NEVER_S = 3600.0


async def turned_away(net: Any, host: LinkHost, **how: Any) -> bool:
    """Whether the host refuses another peer, before it says that all is well."""
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await net.secured(host, **how)
    return True


async def alive(raw: Any) -> bool:
    """Whether the host still answers on this connection."""
    raw.frame(2, 1, 0, 7)
    while (frame := await raw.recv_frame())[:2] != (2, 2):
        assert frame[0] != 3, "the host said goodbye"
    return True


# --- the idle deadline ----------------------------------------------------------------------------


def let_time_pass(host: LinkHost) -> None:
    """As if `stranger_idle_s` passed without a word."""
    for conn in host.connections():
        conn.opened_at -= host.limits.stranger_idle_s
        conn._session.used_at -= host.limits.stranger_idle_s
    for conn, timer in list(host._slots._idle.items()):
        timer.cancel()
        host._slots._watch_idle(conn)


async def test_an_idle_stranger_is_closed_gracefully(net: Any) -> None:
    host = await net.host(LinkLimits(stranger_idle_s=0.05))
    raw = await net.secured(host)
    assert await raw.recv_frame() == GOAWAY_FRAME
    assert await raw.cut_off()
    assert host.refused == {"connection.idle": 1}
    await net.until(lambda: not host.connections())


async def test_the_idle_deadline_begins_with_the_end_of_the_last_stream(net: Any) -> None:
    host = await net.host(LinkLimits(stranger_idle_s=NEVER_S))
    raw = await net.busy(host)
    (conn,) = host.connections()
    let_time_pass(host)
    assert not conn.closed
    raw.frame(1, 4, 1, 0)  # FIN: the handler ends, and the stream
    await net.until(lambda: not conn.in_use)
    host._slots._watch_idle(conn)
    assert not conn.closed
    let_time_pass(host)
    assert conn.closed
    assert (await raw.recv_frame())[:3] == (1, 4, 1)
    assert await raw.recv_frame() == GOAWAY_FRAME


async def test_pings_and_refused_streams_do_not_make_a_stranger_busy(net: Any) -> None:
    host = await net.host(LinkLimits(stranger_idle_s=NEVER_S))
    raw = await net.secured(host)
    (conn,) = host.connections()
    start = conn.used_at
    raw.frame(0, 1, 1, len(HELLO), HELLO)  # opened, nothing agreed, reset
    await net.until(lambda: conn.in_use)
    raw.frame(1, 8, 1, 0)
    await net.until(lambda: not conn.in_use)
    assert await alive(raw)
    assert conn.used_at == start


async def test_what_is_in_use_or_privileged_is_not_closed_when_idle(net: Any) -> None:
    key = Key.generate()
    limits = LinkLimits(stranger_idle_s=NEVER_S)
    host = await net.host(limits, privileged=lambda peer: peer == key.peer_id)
    stranger = await net.secured(host)
    member = await net.secured(host, key=key)
    busy = await net.busy(host)
    for _ in range(3):
        let_time_pass(host)
    assert await stranger.recv_frame() == GOAWAY_FRAME
    assert await alive(member)
    assert await alive(busy)


async def test_what_was_dialled_and_is_nobodys_is_closed_when_idle(net: Any) -> None:
    """Where an address leads to a stranger, e.g. as a relay, nobody else ends the connection."""
    members: set[PeerId] = set()
    idle, used, member = [await net.host() for _ in range(3)]
    host = await net.host(LinkLimits(stranger_idle_s=NEVER_S), privileged=members.__contains__)
    dialled = [await host.dial(other.listen_addrs) for other in (idle, used, member)]
    assert not host._slots.taken
    stream = await dialled[1].open_stream("/echo")
    members.add(member.peer_id)  # it has shown a certificate
    host.reconsider(member.peer_id)
    for _ in range(3):
        let_time_pass(host)
    assert [conn.closed for conn in dialled] == [True, False, False]
    async with stream:
        await stream.write(b"x")
        assert await stream.read() == b"x"
    await net.until(lambda: not dialled[1].in_use)
    let_time_pass(host)
    assert [conn.closed for conn in dialled] == [True, True, False]
    await net.until(lambda: list(host.connections()) == dialled[2:])
    assert not host._slots._idle


async def test_who_becomes_privileged_later_stays(net: Any) -> None:
    members: set[PeerId] = set()
    limits = LinkLimits(stranger_idle_s=NEVER_S)
    host = await net.host(limits, privileged=members.__contains__)
    key = Key.generate()
    raw = await net.secured(host, key=key)
    members.add(key.peer_id)
    let_time_pass(host)
    assert await alive(raw)
    members.clear()
    let_time_pass(host)
    assert await raw.recv_frame() == GOAWAY_FRAME


# --- full slots -----------------------------------------------------------------------------------


async def test_idle_strangers_make_room_the_longest_idle_first(net: Any) -> None:
    host = await net.host(LinkLimits(connections_max=8, stranger_idle_s=NEVER_S))
    # 8, less one for dials, less a quarter of these for privileged peers.
    raws = [await net.secured(host) for _ in range(6)]
    used = await net.busy(host)  # one in use: the first of the others goes instead
    assert await raws[0].cut_off()
    fresh = await net.secured(host)
    assert await raws[1].cut_off()
    assert host.refused == {"connection.evicted": 2}
    assert len(host.connections()) == 6
    for raw in (*raws[2:], used, fresh):
        assert await alive(raw)


async def test_longest_idle_is_since_the_last_stream(net: Any) -> None:
    host = await net.host(LinkLimits(connections_max=8, stranger_idle_s=NEVER_S))
    first = await net.busy(host)
    conn = host.connections()[0]
    raws = [await net.secured(host) for _ in range(5)]
    first.frame(1, 4, 1, 0)  # FIN: the handler ends, and the stream
    await net.until(lambda: not conn.in_use)
    await net.secured(host)
    assert await raws[0].cut_off()
    assert not conn.closed


async def test_a_stranger_does_not_end_what_is_in_use_at_a_less_crowded_address(net: Any) -> None:
    host = await net.host(LinkLimits(connections_max=8, stranger_idle_s=NEVER_S))
    pair = [await net.busy(host, source="127.0.0.2") for _ in range(2)]  # for longest
    crowd = [await net.busy(host, source="127.0.0.3") for _ in range(4)]
    assert await turned_away(net, host, source="127.0.0.3")
    assert host.refused["connections_max"] == 1
    newcomer = await net.busy(host, source="127.0.0.4")
    assert await crowd[0].cut_off()
    for raw in (*pair, newcomer, *crowd[1:]):
        assert await alive(raw)


async def test_a_privileged_peer_gets_a_slot_while_strangers_hold_them(net: Any) -> None:
    keys = [Key.generate() for _ in range(8)]
    members = {key.peer_id for key in keys}
    host = await net.host(
        LinkLimits(connections_max=8, stranger_idle_s=NEVER_S), privileged=members.__contains__
    )
    strangers = [await net.busy(host) for _ in range(5)]
    idle = await net.secured(host, source="127.0.0.2")
    raws = [await net.secured(host, key=keys[0])]
    assert host.refused == {}, "a slot was reserved"
    raws += [await net.secured(host, key=keys[1])]
    assert await idle.cut_off()  # before what is in use for longer
    assert await turned_away(net, host)  # all are in use, at its own address
    raws += [await net.secured(host, key=key) for key in keys[2:7]]
    for stranger in strangers:
        assert await stranger.cut_off()
    assert host.refused["connection.evicted"] == 6
    for raw in raws:  # the idle ones among them do not make room for anybody
        assert await alive(raw)
    assert await turned_away(net, host)
    assert await turned_away(net, host, key=keys[7])  # no stranger is left to end


async def test_a_raising_privileged_makes_strangers(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(peer: object) -> bool:
        raise ValueError("a defect")

    host = await net.host(LinkLimits(stranger_idle_s=0.05), privileged=broken)
    with caplog.at_level(logging.ERROR):
        raw = await net.secured(host)
        assert await raw.recv_frame() == GOAWAY_FRAME
    assert "privileged.failed" in caplog.text


async def test_a_dial_that_is_turned_away_fails(net: Any) -> None:
    host = await net.host(LinkLimits(connections_per_ip_max=1, stranger_idle_s=NEVER_S))
    await net.busy(host)
    with pytest.raises(DialError):
        await (await net.host(listen=False)).dial(host.listen_addrs)


async def test_an_evicted_dialler_hears_of_it(net: Any) -> None:
    host = await net.host(LinkLimits(connections_per_ip_max=1, stranger_idle_s=NEVER_S))
    first, second = [await net.host(listen=False) for _ in range(2)]
    conn = await first.dial(host.listen_addrs)
    assert await (await second.dial(host.listen_addrs)).open_stream("/echo")
    await asyncio.wait_for(conn.wait_closed(), net.deadline_s)
    with pytest.raises(StreamReset):
        await conn.open_stream("/echo")


# --- per address ----------------------------------------------------------------------------------


async def test_strangers_are_bounded_per_address_and_privileged_peers_are_not(net: Any) -> None:
    key = Key.generate()
    limits = LinkLimits(connections_per_ip_max=2, stranger_idle_s=NEVER_S)
    host = await net.host(limits, privileged=lambda peer: peer == key.peer_id)
    idle = await net.secured(host)
    elsewhere = await net.secured(host, source="127.0.0.2")
    used = [await net.busy(host) for _ in range(2)]
    assert await idle.cut_off()  # replaced by one of its own address
    assert await turned_away(net, host)
    assert host.refused["connections_per_ip_max"] == 1
    members = [await net.secured(host, key=key) for _ in range(3)]
    for raw in (elsewhere, *used, *members):
        assert await alive(raw)


async def test_who_is_reconsidered_no_longer_counts_as_a_stranger(net: Any) -> None:
    members: set[PeerId] = set()
    limits = LinkLimits(connections_per_ip_max=2, stranger_idle_s=NEVER_S)
    host = await net.host(limits, privileged=members.__contains__)
    keys = [Key.generate() for _ in range(2)]
    shown = [await net.busy(host, key=key) for key in keys]
    assert await turned_away(net, host)
    for key in keys:
        members.add(key.peer_id)
        host.reconsider(key.peer_id)
        host.reconsider(key.peer_id)
    strangers = [await net.busy(host) for _ in range(2)]
    assert await turned_away(net, host)  # the strangers' own limit still holds
    host.reconsider(PeerId.from_public_key(b"x" * 32))  # neither connected nor privileged
    for raw in (*shown, *strangers):
        assert await alive(raw)
    for raw in strangers:
        raw.writer.close()
    await net.until(lambda: not host._slots.strangers)


# --- handshakes -----------------------------------------------------------------------------------


async def test_hoarded_handshakes_make_room_for_another_address(net: Any) -> None:
    host = await net.host(LinkLimits(handshakes_max=4, handshakes_per_ip_max=3))
    hoard = [await net.raw(host, "127.0.0.2") for _ in range(3)]
    few = await net.raw(host, "127.0.0.3")
    await net.until(lambda: len(host._handshaking) == 4)
    assert await net.secured(host, source="127.0.0.4")
    assert await hoard[0].cut_off()
    assert host.refused["handshake.evicted"] == 1

    await net.raw(host, "127.0.0.4")
    await net.until(lambda: len(host._handshaking) == 4)
    assert await (await net.raw(host, "127.0.0.2")).cut_off()  # hoards no less than others
    assert host.refused["handshakes_max"] == 1
    assert not few.reader.at_eof()


# --- file descriptors -----------------------------------------------------------------------------


def test_limits_fit_into_the_files_that_are_left() -> None:
    usual = LinkLimits()
    assert usual.within(65_536) == usual
    for files in (-5, 1, 8, 40, 500):
        limits = usual.within(files)
        total = limits.connections_max + limits.handshakes_max + limits.dials_max
        assert total <= max(files, 3)
        assert min(limits.connections_max, limits.handshakes_max, limits.dials_max) >= 1


async def test_out_of_descriptors_the_log_stays_short_and_connections_wait(
    net: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0
    accept = socket.socket.accept

    def none_left(listener: socket.socket) -> tuple[socket.socket, Any]:
        nonlocal tries
        tries += 1
        if tries <= 20:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", none_left)
    monkeypatch.setattr("wetware.overlay.link.host._ACCEPT_AGAIN_S", 0)
    a, b = await net.host(), await net.host(listen=False)
    await b.dial(a.listen_addrs)
    assert a.refused["accept"] == 20
    assert len([r for r in caplog.records if r.message == "accept.failed"]) <= 2
