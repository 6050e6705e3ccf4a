"""What a node announces for a wildcard, and what is said of addresses that lead nowhere."""

from __future__ import annotations

import ipaddress

import pytest

from wetware.base.interfaces import Network
from wetware.base.multiaddr import Multiaddr
from wetware.cli.app import warn_of_loopback
from wetware.node.addresses import HOSTS_MAX, dialable


def announced(text: str, *own: str) -> list[str]:
    network = Network(tuple(map(ipaddress.ip_interface, own)), ())
    return [addr.host for addr in dialable(Multiaddr.parse(text), network)]


def test_a_wildcard_stands_for_every_address_of_its_kind() -> None:
    own = ("10.1.2.3/24", "fd00::2/64", "10.9.0.1/24")
    assert announced("/ip4/0.0.0.0/tcp/4001", *own) == ["10.1.2.3", "10.9.0.1"]
    assert announced("/ip6/::/tcp/4001", *own) == ["fd00::2"]
    assert announced("/ip4/10.1.2.3/tcp/4001", *own) == ["10.1.2.3"]
    many = [f"10.0.0.{i}/24" for i in range(1, 100)]
    assert len(announced("/ip4/0.0.0.0/tcp/4001", *many)) == HOSTS_MAX


def test_a_machine_without_a_network_is_reached_by_itself() -> None:
    assert announced("/ip4/0.0.0.0/tcp/4001") == ["127.0.0.1"]
    assert announced("/ip6/::/tcp/4001", "10.1.2.3/24") == ["::1"]


def test_what_is_passed_on_and_leads_nowhere_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    here = Multiaddr.parse("/ip4/127.0.0.1/tcp/4001")
    warn_of_loopback("the ticket", [here, Multiaddr.parse("/ip4/192.0.2.1/tcp/4001")])
    assert capsys.readouterr().err == ""
    warn_of_loopback("the ticket", [here, Multiaddr.parse("/ip6/::1/tcp/4001")])
    said = capsys.readouterr().err
    assert said.startswith("warning: the ticket leads to this machine only")
    assert "try: ww node --listen /ip4/ADDRESS/tcp/4001" in said
