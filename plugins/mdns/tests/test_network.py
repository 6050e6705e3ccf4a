"""Real sockets and real multicast, on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from zeroconf import DNSIncoming, DNSPointer, DNSText  # type: ignore[attr-defined]

from wetware.testing import FakeOverlay
from wetware_mdns import discovery as discovery_module
from wetware_mdns.discovery import FOUND_MAX
from wetware_mdns.lan import Lan
from wetware_mdns.records import SERVICE, encode

from .conftest import LOOPBACK, found, found_all, listen, make_discovery, running

pytestmark = pytest.mark.anyio
GROUP = ("224.0.0.251", 5353)
Make = Callable[..., FakeOverlay]


class Wire(asyncio.DatagramProtocol):
    """A neighbour that sends what it likes and sees every packet."""

    def __init__(self) -> None:
        self.packets: list[bytes] = []
        self.news = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.packets.append(data)
        self.news.set()

    def send(self, data: bytes) -> None:
        self.transport.sendto(data, GROUP)

    async def until(self, condition: Callable[[DNSIncoming], bool]) -> DNSIncoming:
        async with asyncio.timeout(3):
            while True:
                while self.packets:
                    packet = DNSIncoming(self.packets.pop(0))
                    if condition(packet):
                        return packet
                self.news.clear()
                await self.news.wait()


@contextlib.asynccontextmanager
async def wire() -> AsyncIterator[Wire]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK[0]))
    sock.setsockopt(
        socket.IPPROTO_IP,
        socket.IP_ADD_MEMBERSHIP,
        socket.inet_aton(GROUP[0]) + socket.inet_aton(LOOPBACK[0]),
    )
    sock.bind(GROUP)
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(Wire, sock=sock)
    try:
        yield protocol
    finally:
        transport.close()


def texts(packet: DNSIncoming) -> list[DNSText]:
    return [r for r in packet.answers() if isinstance(r, DNSText)]


def names(peer: object) -> Callable[[DNSIncoming], bool]:
    return lambda p: p.is_response() and any(str(peer).encode() in t.text for t in texts(p))


def asks(*, unicast: bool) -> Callable[[DNSIncoming], bool]:
    return lambda p: p.is_query() and any(q.unicast is unicast for q in p.questions)


def name_bytes(*labels: str) -> bytes:
    return b"".join(bytes((len(x),)) + x.encode() for x in labels) + b"\0"


QUESTION = name_bytes("_p2p", "_udp", "local") + struct.pack(">HH", 12, 1)


def response(name: str, text: bytes, ttl: int = 120) -> bytes:
    """A response as go-libp2p sends it: PTR and TXT."""
    service = name_bytes("_p2p", "_udp", "local")
    full = name_bytes(name, "_p2p", "_udp", "local")
    return (
        struct.pack(">6H", 0, 0x8400, 0, 2, 0, 0)
        + service + struct.pack(">HHIH", 12, 1, ttl, len(full)) + full
        + full + struct.pack(">HHIH", 16, 1, ttl, len(text)) + text
    )  # fmt: skip


# --- finding each other ---------------------------------------------------------------------------


async def test_two_nodes_find_each_other_within_3_s(make_overlay: Make) -> None:
    a, b = make_overlay("192.0.2.10", "127.0.0.1"), make_overlay("192.0.2.11", "fd00::11", "::1")
    async with running(a) as one, running(b) as two:
        # Never the loopback addresses, which a's and b's nodes listen on as well.
        at_one, at_two = await asyncio.gather(found(one, 2), found(two))
    assert at_one == {addr for addr in b.announced if "::1/" not in addr}
    assert at_two == {a.announced[0]}


async def test_one_that_comes_later_is_found_by_those_there(make_overlay: Make) -> None:
    first, late = make_overlay("192.0.2.10"), make_overlay("192.0.2.11")
    async with running(first) as one, wire() as neighbour:
        await neighbour.until(names(first.peer_id))
        async with running(late) as two:
            assert await found(one) == set(late.announced)
            assert await found(two) == set(first.announced)


async def test_the_first_question_is_no_copy_of_anothers(make_overlay: Make) -> None:
    """zeroconf drops a packet that equals one of the last second, unless it asks like this."""
    async with wire() as neighbour, running(make_overlay("192.0.2.10"), announce=False):
        packet = await neighbour.until(asks(unicast=True))
        assert [q.name for q in packet.questions] == [SERVICE]
        await neighbour.until(asks(unicast=False))


async def test_another_cluster_is_ignored(make_overlay: Make) -> None:
    mine, friend = make_overlay("192.0.2.10"), make_overlay("192.0.2.11")
    stranger = make_overlay("192.0.2.12", of="ff" * 20)
    async with wire() as neighbour, running(mine, foreign=True) as one, running(stranger) as other:
        await neighbour.until(names(stranger.peer_id))
        async with running(friend):
            assert not set(stranger.announced) & await found_all(one, set(friend.announced))
        assert not other._found


async def test_peers_without_a_cluster_are_foreign(make_overlay: Make) -> None:
    """What js-libp2p sends: one TXT record an address, all of the same name."""
    a, b = make_overlay("192.0.2.10"), make_overlay("192.0.2.12")
    js = make_overlay("192.0.2.11", "fd00::11")
    async with wire() as neighbour, running(a) as shy, running(b, foreign=True) as open_:
        assert await found(shy) == set(b.announced)
        await found_all(open_, set(a.announced))
        for addr in js.announced:
            text = b"dnsaddr=" + addr.encode()
            neighbour.send(response("js" * 16, bytes((len(text),)) + text))
        await found_all(open_, set(js.announced))
        async with running(friend := make_overlay("192.0.2.13")):
            heard = await found_all(shy, set(friend.announced))
            assert not set(js.announced) & heard


async def test_an_answer_is_what_js_libp2p_reads(make_overlay: Make) -> None:
    """A PTR and a TXT record in one packet, `dnsaddr=` strings with the peer ID; no host name."""
    mine = make_overlay("192.0.2.10", "127.0.0.1")
    async with wire() as neighbour, running(mine):
        await neighbour.until(names(mine.peer_id))
        # With an ID of its own, as zeroconf drops a packet that equals one of the last second.
        neighbour.send(struct.pack(">6H", random.randrange(1 << 16), 0, 1, 0, 0, 0) + QUESTION)
        packet = await neighbour.until(
            lambda p: names(mine.peer_id)(p) and p.num_additionals > 0  # an announcement has none
        )
    (pointer,) = (r for r in packet.answers() if isinstance(r, DNSPointer))
    assert pointer.name == SERVICE
    label = pointer.alias.removesuffix(f".{SERVICE}")
    assert len(label) == 32
    (text,) = texts(packet)
    assert text.name == pointer.alias
    strings = [b"dnsaddr=" + mine.announced[0].encode(), b"wwcluster=" + mine.cluster.encode()]
    assert text.text == b"".join(bytes((len(s),)) + s for s in strings)
    host = socket.gethostname().encode()
    assert bytes([len(host)]) + host not in packet.data, "as a label: a short name is in anything"


# --- coming and going -----------------------------------------------------------------------------


async def test_goodbye_on_stop_and_within_a_second(make_overlay: Make) -> None:
    mine = make_overlay("192.0.2.10")
    async with wire() as neighbour:
        async with running(mine):
            await neighbour.until(names(mine.peer_id))
            began = time.monotonic()
        assert time.monotonic() - began < 1
        packet = await neighbour.until(
            lambda p: names(mine.peer_id)(p) and all(t.ttl == 0 for t in texts(p))
        )
        assert packet.is_response()


async def test_stop_at_once_after_the_start(
    make_overlay: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, errors = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _loop, context: errors.append(context))
    opening = asyncio.Event()

    class Seen(Lan):
        async def __aenter__(self) -> Lan:
            opening.set()
            return await super().__aenter__()

    monkeypatch.setattr(discovery_module, "_import_lan", lambda: Seen)
    for turns in range(16):
        opening.clear()
        async with running(make_overlay("192.0.2.10")):
            await opening.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
    assert errors == []


async def test_a_change_of_address_is_announced(make_overlay: Make) -> None:
    mine, friend = make_overlay("192.0.2.10"), make_overlay("192.0.2.11")
    async with running(mine), running(friend) as other:
        assert await found(other) == set(mine.announced)
        listen(mine, "192.0.2.99")
        await found_all(other, {mine.announced[0]})


async def test_nothing_happens_on_loopback_alone(
    make_overlay: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = []
    monkeypatch.setattr(discovery_module, "_import_lan", lambda: imported.append(1) or Lan)
    caplog.set_level(logging.INFO, "wetware.plugin.mdns")
    mine, friend = make_overlay("127.0.0.1", "::1"), make_overlay("192.0.2.11")
    async with running(mine):
        await asyncio.sleep(0.05)  # some looks at its addresses
        assert imported == []
        (idle,) = (r for r in caplog.records if r.message == "mdns.idle")
        assert "loopback" in idle.ww["why"]  # type: ignore[attr-defined]
        listen(mine, "127.0.0.1", "192.0.2.10")
        async with running(friend) as other:
            assert await found(other) == {mine.announced[1]}


async def test_a_node_may_look_without_being_seen(make_overlay: Make) -> None:
    shy, friend = make_overlay("192.0.2.10"), make_overlay("192.0.2.11")
    async with wire() as neighbour, running(shy, announce=False) as one:
        async with running(friend):
            assert await found(one) == set(friend.announced)
        assert not any(str(shy.peer_id).encode() in packet for packet in neighbour.packets)


async def test_a_network_that_fails_is_tried_again(
    make_overlay: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery_module, "RETRY_S_MIN", 0.01)
    caplog.set_level(logging.WARNING, "wetware.plugin.mdns")
    mine, friend = make_overlay("192.0.2.10"), make_overlay("192.0.2.11")
    tries = []

    class Broken(Lan):
        async def __aenter__(self) -> Lan:
            tries.append(1)
            if len(tries) < 3:
                raise OSError("the port is taken")
            return await super().__aenter__()

    async with running(friend):
        monkeypatch.setattr(discovery_module, "_import_lan", lambda: Broken)
        async with running(mine) as one:
            assert await found(one) == set(friend.announced)
    assert [r.message for r in caplog.records] == ["mdns.failed"] * 2


async def test_an_interface_that_does_not_exist_is_said(make_overlay: Make) -> None:
    with pytest.raises(OSError, match=r"not addresses of this machine: 203\.0\.113\.77"):
        async with Lan(("203.0.113.77",), lambda text: None):
            pass


# --- hostile neighbours ---------------------------------------------------------------------------


async def test_garbage_harms_nobody(make_overlay: Make) -> None:
    loop, errors = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _loop, context: errors.append(context))
    rng = random.Random(7)
    mine, friend = make_overlay("192.0.2.10"), make_overlay("192.0.2.11")
    good = response("x" * 32, encode((), mine.cluster))
    async with wire() as neighbour, running(mine) as one:
        await neighbour.until(names(mine.peer_id))
        for i in range(400):
            torn = bytearray(good)
            for _ in range(i % 7):
                torn[rng.randrange(len(torn))] = rng.randrange(256)
            neighbour.send(bytes(torn[: rng.randrange(len(torn) + 1)]))
            neighbour.send(rng.randbytes(rng.randrange(600)))
            if i % 50 == 0:
                await asyncio.sleep(0.01)
        neighbour.send(response("y" * 32, rng.randbytes(8000)))
        neighbour.send(b"\0\0\x84\0" + b"\0\0\xff\xff" * 2 + b"\xc0\x0c" * 4000)  # loops
        async with running(friend):
            assert await found(one) == set(friend.announced)
    assert errors == []


async def test_thousands_of_names_are_bounded(make_overlay: Make) -> None:
    """The discovery's own queue, and zeroconf's cache."""
    mine = make_overlay("192.0.2.10")
    discovery = make_discovery(mine)
    async with Lan(LOOPBACK, discovery._heard) as lan:
        zeroconf = lan._zeroconf.zeroconf
        receive = zeroconf.engine.protocols[0].datagram_received
        for i in range(3000):
            ghost = make_overlay(f"10.{i >> 8}.{i & 255}.1")
            text = b"".join(
                bytes((len(s),)) + s
                for s in (
                    b"dnsaddr=" + ghost.announced[0].encode(),
                    b"wwcluster=" + mine.cluster.encode(),
                )
            )
            receive(response(f"ghost{i}", text, ttl=2**31 - 1), ("192.0.2.66", 5353))
        assert len(discovery._found) == FOUND_MAX
        assert sum(len(zeroconf.cache.entries_with_name(n)) for n in zeroconf.cache.names()) < 64
        real = make_overlay("192.0.2.11")
        text = b"dnsaddr=" + real.announced[0].encode()
        hint = b"wwcluster=" + mine.cluster.encode()
        record = bytes((len(text),)) + text + bytes((len(hint),)) + hint
        receive(response("real", record), ("192.0.2.11", 5353))
        await found_all(discovery, {real.announced[0]})


async def test_only_addresses_of_this_machine_are_spoken_from(
    make_overlay: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a forwarded port's, which the node announces as well."""
    opened: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()

    def make_lan(interfaces: tuple[str, ...], _heard: object) -> Lan:
        opened.put_nowait(interfaces)
        raise OSError("enough")

    own = (ipaddress.ip_interface("10.0.0.7/24"),)
    monkeypatch.setattr(discovery_module, "interfaces_of_this_machine", lambda: own)
    monkeypatch.setattr(discovery_module, "_import_lan", lambda: make_lan)
    overlay = make_overlay()
    listen(overlay, "5.0.0.9", "10.0.0.7")
    async with running(overlay, interfaces=()), asyncio.timeout(3):
        assert await opened.get() == ("10.0.0.7",)
