"""`[plugins.mdns]`: what is announced where."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

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
    """`[plugins.mdns]`.

    Attributes:
        enabled: False: no socket is opened, nothing is announced, nothing is found.
        announce: False: this node finds others without announcing itself. Its questions can still
            be seen.
        foreign: Report peers that name no cluster as well, e.g. those of js-libp2p and go-libp2p.
            The node still refuses whoever is no member; it only costs a dial each.
        interfaces: Addresses of the network interfaces to speak on.
    """

    enabled: bool = field(default=True, metadata={"help": "Use multicast DNS at all."})
    announce: bool = field(
        default=True, metadata={"help": "Announce this node; false: only find others."}
    )
    foreign: bool = field(
        default=False, metadata={"help": "Also report libp2p peers that name no cluster."}
    )
    interfaces: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Addresses of the interfaces to speak on. Empty: those the node listens on.",
            "check": _check_interfaces,
        },
    )
