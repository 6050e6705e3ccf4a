"""Which addresses of a machine others can dial."""

from __future__ import annotations

import errno
import os
import socket
import sys
from types import SimpleNamespace

import ifaddr
import pytest

from wetware.base import interfaces as module
from wetware.base.interfaces import Network, interfaces, look


def adapters(**ips: tuple[str, ...]) -> list[SimpleNamespace]:
    """By the name of the interface; as `ifaddr` gives them."""
    return [
        SimpleNamespace(
            nice_name=name,
            ips=[
                SimpleNamespace(ip=t if "." in t else (t, 0, 4), network_prefix=24) for t in texts
            ],
        )
        for name, texts in ips.items()
    ]


def test_every_interface_that_runs_counts_but_loopback_and_link_local(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = adapters(
        lo=("127.0.0.1", "::1"),
        eth0=("10.1.2.3", "fd00::2", "fe80::1"),
        eth1=("10.9.0.1",),
        wlan0=("169.254.7.7", "192.0.2.9"),
    )
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: own)
    monkeypatch.setattr(module, "_runs", lambda name: name != "eth1")
    found = interfaces()
    assert [str(one.ip) for one in found] == ["10.1.2.3", "fd00::2", "192.0.2.9"]
    assert str(found[0].network) == "10.1.2.0/24"


def test_what_leads_to_the_internet_comes_first() -> None:
    own = adapters(docker0=("172.17.0.1",), eth0=("10.1.2.3",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ifaddr, "get_adapters", lambda: own)
        patch.setattr(module, "_runs", lambda name: True)
        network = Network(interfaces(), ("10.1.2.3", ""))
    assert network.hosts == ("10.1.2.3", "172.17.0.1")


class Unrouted(socket.socket):
    error = errno.ENETUNREACH

    def connect(self, address: object) -> None:
        raise OSError(self.error, os.strerror(self.error))


def test_without_a_route_there_is_none_and_without_descriptors_it_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.socket, "socket", Unrouted)
    assert look().routed == ("", "")
    monkeypatch.setattr(Unrouted, "error", errno.EMFILE)
    with pytest.raises(OSError, match="open files"):
        look()


@pytest.mark.skipif(sys.platform != "linux", reason="flags of interfaces are asked on Linux alone")
def test_loopback_runs_and_what_is_not_there_does_not() -> None:
    assert module._runs("lo")
    assert not module._runs("no-such-if0")
