"""Multiaddrs: exactly the ones that can be listened on and dialled."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.base.multiaddr import Multiaddr
from wetware.errors import InvalidArgument
from wetware.identity import Key

PEER = Key.from_seed(bytes(32)).peer_id
OTHER = Key.from_seed(bytes([1]) * 32).peer_id


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/127.0.0.1/tcp/0",
        "/ip6/::1/tcp/4001",
        "/dns/example.org/tcp/1",
        "/dns4/a-b.example/tcp/65535",
        "/dns4/ec2-203-0-113-25.compute-1.amazonaws.com/tcp/4001",
        "/dns6/_db.example.org./tcp/1",
        f"/dns/{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 61}/tcp/1",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}/p2p-circuit",
        f"/dns/hub.example/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{OTHER}",
    ],
)
def test_round_trip(text: str) -> None:
    assert str(Multiaddr.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not of the form"),
        ("127.0.0.1:4001", "not of the form"),
        ("/ip4/127.0.0.1", "not of the form"),
        ("/ip4/300.0.0.1/tcp/1", "is not an IP address"),
        ("/ip6/127.0.0.1/tcp/1", "is not an ip6 address"),
        ("/ip4/127.0.0.1/udp/1", "only tcp"),
        ("/ip4/127.0.0.1/tcp/65536", "is not a port"),
        ("/ip4/127.0.0.1/tcp/-1", "is not a port"),
        ("/ip4/127.0.0.1/tcp/04001", "is not a port"),
        ("/ip4/127.0.0.1/tcp/²", "is not a port"),
        ("/unix/tmp/tcp/1", "is not one of ip4"),
        ("/dns/bad name/tcp/1", "is not a host name"),
        ("/dns//tcp/1", "is not a host name"),
        ("/dns/./tcp/1", "is not a host name"),
        ("/dns/a..b/tcp/1", "is not a host name"),
        ("/dns/-a/tcp/1", "is not a host name"),
        (f"/dns/{'a' * 64}/tcp/1", "is not a host name"),
        (f"/dns/{'a.' * 127}/tcp/1", "is not a host name"),
        ("ec2-203-0-113-25.compute-1.amazonaws.com:4001", "not of the form"),
        ("/dns4/ec2-203-0-113-25.compute-1.amazonaws.com:4001/tcp/4001", "is not a host name"),
        ("/ip4/127.0.0.1/tcp/1/ws/x", "only p2p"),
        ("/ip4/127.0.0.1/tcp/1/p2p/nonsense", "bad peer ID"),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}/p2p-circuits", "only p2p-circuit"),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}/p2p-circuit/p2p/x", "bad peer ID"),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}/p2p-circuit/tcp/{PEER}", "only p2p"),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}/p2p-circuit/p2p", "not of the form"),
        ("/" * 1000, "longer than"),
    ],
)
def test_refusals_name_the_part(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        Multiaddr.parse(text)
    assert caught.value.hint


@pytest.mark.parametrize("host", ["a" * 44 + "!", "a" * 253 + "!", "a." * 126 + "!", "a-" * 120])
def test_a_host_name_costs_no_backtracking(host: str) -> None:
    text = f"/dns4/{host}/tcp/4001/p2p/{PEER}"

    def took_s() -> float:
        started = time.thread_time()
        with pytest.raises(InvalidArgument, match="is not a host name"):
            Multiaddr.parse(text)
        return time.thread_time() - started

    assert min(took_s() for _ in range(5)) < 0.001


@given(st.text(max_size=80))
def test_nothing_but_invalid_argument(text: str) -> None:
    with contextlib.suppress(InvalidArgument):
        assert str(Multiaddr.parse(text)) == text


@given(
    st.ip_addresses().map(str),
    st.integers(0, 65535),
)
def test_every_ip_address_parses(host: str, port: int) -> None:
    kind = "ip6" if ":" in host else "ip4"
    parsed = Multiaddr.parse(f"/{kind}/{host}/tcp/{port}")
    assert (parsed.kind, parsed.host, parsed.port) == (kind, host, port)


def test_an_address_through_a_relay() -> None:
    hub = Multiaddr("ip4", "8.8.8.8", 4001, PEER)
    there = hub.through(OTHER)
    assert (there.peer, there.relay) == (OTHER, PEER)
    assert there.carrier == hub
    assert hub.is_global
    assert not there.is_global  # the relay is, not the peer
    assert there.with_peer(None) == hub.through()


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("/ip4/127.0.0.1/tcp/1", "loopback"),
        ("/dns/localhost/tcp/1", "loopback"),
        ("/ip4/192.168.1.2/tcp/1", "private"),
        ("/ip4/100.64.0.1/tcp/1", "private"),  # behind the NAT of a provider
        ("/ip6/fd00::1/tcp/1", "private"),
        ("/ip4/8.8.8.8/tcp/1", "public"),
        ("/ip6/2600::1/tcp/1", "public"),
        ("/dns/hub.example.org/tcp/1", "name"),
        (f"/ip4/8.8.8.8/tcp/1/p2p/{PEER}/p2p-circuit", "relayed"),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}/p2p-circuit", "relayed"),
    ],
)
def test_the_scope_of_an_address(text: str, scope: str) -> None:
    assert Multiaddr.parse(text).scope == scope
