"""What others dial to reach a node that listens on a wildcard."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import ifaddr

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr

INTERFACES_MAX = 8
"""Addresses of interfaces that a node announces: others dial all of them."""


def dialable(addr: Multiaddr) -> tuple[Multiaddr, ...]:
    """What others write to reach `addr`: a wildcard stands for the machine's own addresses.

    The address of the default route, found without sending anything, or where there is none those
    of the interfaces; then loopback.
    """
    if addr.host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return (addr,)
    family, probe, loopback = (
        (socket.AF_INET, "192.0.2.1", "127.0.0.1")
        if addr.kind == "ip4"
        else (socket.AF_INET6, "2001:db8::1", "::1")
    )
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as routed:
            routed.connect((probe, 9))  # a datagram socket only looks its route up
            hosts = [routed.getsockname()[0]]
    except OSError:
        hosts = _interface_hosts(addr.kind)
    return tuple(replace(addr, host=host) for host in dict.fromkeys([*hosts, loopback]))


def _interface_hosts(kind: str) -> list[str]:
    """The addresses of the interfaces that another machine can dial, at most INTERFACES_MAX."""
    ips = (ip for adapter in ifaddr.get_adapters() for ip in adapter.ips)
    texts = (str(ip.ip if ip.is_IPv4 else ip.ip[0]) for ip in ips if ip.is_IPv4 is (kind == "ip4"))
    hosts = [text for text in texts if not _here_alone(ipaddress.ip_address(text))]
    return hosts[:INTERFACES_MAX]


def _here_alone(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it leads to no other machine; a link-local one needs the name of an interface."""
    return host.is_loopback or host.is_link_local
