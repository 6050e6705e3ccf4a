"""What is announced where."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from wetware.hookspecs import setting

INTERFACES_MAX = 16
"""Each costs a socket; a machine with more addresses names the ones that matter."""


def _check_interfaces(values: tuple[str, ...]) -> None:
    if len(values) > INTERFACES_MAX:
        raise ValueError(f"at most {INTERFACES_MAX} interfaces")
    for value in values:
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise ValueError(f"{value!r} is not an IP address of this machine") from None


@dataclass(frozen=True, slots=True)
class MdnsConfig:
    """Nodes on the same network find each other."""

    enabled: bool = setting(
        True, "False: no socket is opened, nothing is announced, nothing is found."
    )
    announce: bool = setting(
        True,
        "False: this node finds others without announcing itself. Its questions can still be seen.",
    )
    foreign: bool = setting(
        False,
        "Report peers that name no cluster as well, e.g. those of js-libp2p and go-libp2p. The "
        "node still refuses whoever is no member; it only costs a dial each.",
    )
    interfaces: tuple[str, ...] = setting(
        (),
        "Addresses of the network interfaces to speak on. Empty: those the node listens on.",
        check=_check_interfaces,
    )
