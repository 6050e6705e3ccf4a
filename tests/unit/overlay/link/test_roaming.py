"""Connections after the machine has moved, slept, or lost its network for a moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.errors import StreamReset
from wetware.identity import Key
from wetware.overlay.link import host as module
from wetware.overlay.link.connection import NoiseConnection
from wetware.overlay.link.yamux import ACK, PING, SYN

pytestmark = pytest.mark.anyio

BEFORE, AFTER = "10.0.0.1", "10.9.0.1"


def come_from(conn: Any, address: str) -> None:
    """Have a connection look as if it was made from that address of this machine."""
    conn.local = Multiaddr("ip4", address, conn.local.port)


async def test_whoever_answers_a_probe_stays(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.1)
    a, b = await net.host(), await net.host(listen=False)
    conn = await b.dial(a.listen_addrs)
    assert isinstance(conn, NoiseConnection)
    stream = await conn.open_stream("/echo")
    b.network_changed(frozenset((AFTER,)))  # loopback is there in every network
    assert conn.doubted
    await net.until(lambda: not conn.doubted)
    await asyncio.sleep(0.2)
    await stream.write(b"x")
    assert await stream.read() == b"x"


async def test_whoever_does_not_answer_is_ended_and_told(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.1)
    host = await net.host()
    raw = await net.secured(host)
    await net.until(host.connections)
    host.network_changed(frozenset((AFTER,)))
    host.network_changed(frozenset((AFTER,)))  # again: it does not have longer because of that
    assert (await raw.recv_frame())[:2] == (PING, SYN)
    with pytest.raises(ConnectionResetError):  # not an end that waits behind what was sent
        await asyncio.wait_for(raw.reader.read(), 60)
    assert host.refused["connection.keepalive"] == 1
    assert host.connections() == ()


async def test_an_answer_to_an_earlier_probe_says_nothing_of_what_came_after_it(net: Any) -> None:
    host = await net.host()
    raw = await net.secured(host)
    await net.until(host.connections)
    (conn,) = host.connections()
    conn.probe(60.0)
    kind, flags, _, ping = (await raw.recv_frame())[:4]
    assert (kind, flags) == (PING, SYN)
    raw.frame(PING, ACK, 0, ping)
    await net.until(lambda: not conn.doubted)
    conn.probe(0.1)  # now it is silent
    assert conn.doubted
    await net.until(lambda: conn.closed)


async def test_a_lost_address_has_a_moment_to_come_back(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.1)
    monkeypatch.setattr(module, "FLAP_S", 0.5)
    a, b = await net.host(), await net.host(listen=False)
    conn = await b.dial(a.listen_addrs)
    stream = await conn.open_stream("/echo")
    come_from(conn, BEFORE)
    b.network_changed(frozenset())
    assert b.connection(a.peer_id) is None, "nothing new is begun on it"
    assert not conn.closed
    b.network_changed(frozenset((BEFORE,)))
    assert b.connection(a.peer_id) is conn
    await stream.write(b"x")
    assert await stream.read() == b"x"


async def test_an_address_that_stays_away_ends_its_connections(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.05)
    monkeypatch.setattr(module, "FLAP_S", 0.05)
    host = await net.host()
    raw = await net.secured(host)
    await net.until(host.connections)
    (conn,) = host.connections()
    come_from(conn, BEFORE)
    host.network_changed(frozenset())
    assert await raw.cut_off()
    assert conn.closed


async def test_a_peer_is_dialled_anew_from_another_address_and_the_old_streams_end(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from one that came after the last look at the addresses."""
    a, b, c = await net.host(), await net.host(listen=False), await net.host()
    old, other = await b.dial(a.listen_addrs), await b.dial(c.listen_addrs)
    stream = await old.open_stream("/echo")
    for conn in (old, other):
        come_from(conn, BEFORE)
    b.network_changed(frozenset())
    monkeypatch.setattr(Multiaddr, "is_loopback", False)
    new = await b.dial(a.listen_addrs)
    assert new is not old
    assert b.connection(a.peer_id) is new
    with pytest.raises(StreamReset, match="lost the address"):
        await stream.read()
    assert other.closed, "that it led to another peer makes no difference"


async def test_a_newer_connection_casts_doubt_on_an_older_one(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 60.0)
    host, key = await net.host(), Key.generate()
    await net.secured(host, key=key)  # it answers nothing any more
    await net.until(host.connections)
    (old,) = host.connections()
    client = await net.host(listen=False, key=key)
    await client.dial(host.listen_addrs)
    await net.until(lambda: len(host.connections()) == 2)
    new = next(conn for conn in host.connections() if conn is not old)
    assert host.connection(key.peer_id) is new, "not the oldest, which may be dead"
    await net.until(lambda: old.closed)
    assert not new.closed


async def test_dials_that_crossed_are_both_alive(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.3)
    a, b = await net.host(), await net.host()
    await asyncio.gather(a.dial(b.listen_addrs), b.dial(a.listen_addrs))
    await net.until(lambda: a.connections() and b.connections())
    await asyncio.sleep(0.5)
    assert a.refused["connection.keepalive"] == b.refused["connection.keepalive"] == 0


async def test_a_dead_connection_that_looks_crossed_is_asked_as_well(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.3)
    monkeypatch.setattr(module, "_CROSSED_S", 60.0)
    host, key = await net.host(), Key.generate()
    silent = await net.host(key=key)
    old = await host.dial(silent.listen_addrs)  # as one that was punched a moment ago
    (far,) = silent.connections()
    far._transport.pause_reading()
    client = await net.host(listen=False, key=key)
    await client.dial(host.listen_addrs)
    await net.until(lambda: old.closed)
    assert host.connection(key.peer_id) is not None


async def test_a_dial_under_way_begins_again_in_another_network(net: Any) -> None:
    host = await net.host(listen=False)
    met: list[asyncio.BaseTransport] = []

    class Silent(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            met.append(transport)

    server = await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", 0)
    addr = Multiaddr("ip4", "127.0.0.1", server.sockets[0].getsockname()[1])
    dial = asyncio.ensure_future(host.dial([addr]))
    await net.until(lambda: len(met) == 1)
    host.network_changed(frozenset((AFTER,)))
    await net.until(lambda: len(met) == 2)
    assert not dial.done()
    dial.cancel()
    await asyncio.wait([dial])
    server.close()
