"""What a node announces for a wildcard, and what is said of addresses that lead nowhere."""

from __future__ import annotations

import errno
import socket
from types import SimpleNamespace

import ifaddr
import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.cli.app import warn_of_loopback
from wetware.node.addresses import INTERFACES_MAX, dialable


class Unrouted(socket.socket):
    def connect(self, address: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")


def adapters(*texts: str) -> list[SimpleNamespace]:
    ips = [
        SimpleNamespace(is_IPv4=":" not in t, ip=t if ":" not in t else (t, 0, 4)) for t in texts
    ]
    return [SimpleNamespace(ips=[ip]) for ip in ips]


@pytest.fixture
def unrouted(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without a default route."""
    monkeypatch.setattr("wetware.node.addresses.socket.socket", Unrouted)
    return monkeypatch


def announced(text: str) -> list[str]:
    return [addr.host for addr in dialable(Multiaddr.parse(text))]


def test_without_a_default_route_the_interfaces_are_announced(
    unrouted: pytest.MonkeyPatch,
) -> None:
    own = adapters("127.0.0.1", "::1", "10.1.2.3", "169.254.7.7", "fe80::1", "fd00::2", "10.9.0.1")
    unrouted.setattr(ifaddr, "get_adapters", lambda: own)
    assert announced("/ip4/0.0.0.0/tcp/4001") == ["10.1.2.3", "10.9.0.1", "127.0.0.1"]
    assert announced("/ip6/::/tcp/4001") == ["fd00::2", "::1"]
    assert announced("/ip4/10.1.2.3/tcp/4001") == ["10.1.2.3"]
    many = adapters(*(f"10.0.0.{i}" for i in range(1, 100)))
    unrouted.setattr(ifaddr, "get_adapters", lambda: many)
    assert len(announced("/ip4/0.0.0.0/tcp/4001")) == INTERFACES_MAX + 1
    unrouted.setattr(ifaddr, "get_adapters", lambda: [])
    assert announced("/ip4/0.0.0.0/tcp/4001") == ["127.0.0.1"]


def test_what_is_passed_on_and_leads_nowhere_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    here = Multiaddr.parse("/ip4/127.0.0.1/tcp/4001")
    warn_of_loopback("the ticket", [here, Multiaddr.parse("/ip4/192.0.2.1/tcp/4001")])
    assert capsys.readouterr().err == ""
    warn_of_loopback("the ticket", [here, Multiaddr.parse("/ip6/::1/tcp/4001")])
    said = capsys.readouterr().err
    assert said.startswith("warning: the ticket leads to this machine only")
    assert "try: ww node --listen /ip4/ADDRESS/tcp/4001" in said
