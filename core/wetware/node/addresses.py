"""What others dial to reach a node that listens on a wildcard."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wetware.base.interfaces import Network
    from wetware.base.multiaddr import Multiaddr

HOSTS_MAX = 8
"""Addresses that a wildcard stands for: others dial all of them."""


def dialable(addr: Multiaddr, network: Network) -> tuple[Multiaddr, ...]:
    """What others write to reach `addr`: a wildcard stands for every address of the machine.

    Those with a way to the internet come first. Where there is none at all it is loopback.
    """
    if addr.host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return (addr,)
    is_ip6 = addr.kind == "ip6"
    hosts = [host for host in network.hosts if (":" in host) is is_ip6]
    loopback = "::1" if is_ip6 else "127.0.0.1"
    return tuple(replace(addr, host=host) for host in hosts[:HOSTS_MAX] or [loopback])
