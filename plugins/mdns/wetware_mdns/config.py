"""`[plugins.mdns]`: what is announced where, and every limit with its reason."""

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
        addrs_max: Addresses announced. One peer's answer is read up to the same number.
        addrs_poll_s: How often this node's addresses are looked at; after a change it announces
            itself anew.
        query_s_alone: Time between two questions while no member is connected.
        query_s_max: … and otherwise. The first questions come after 0, 1, 2, 4, … s, doubling up to
            here. Nodes that start announce themselves unasked, so that questions only make up for
            lost packets; RFC 6762 (5.2) allows up to an hour.
        again_s: An address is reported at most once in this time.
        seen_max: Addresses that are remembered for it; the oldest go first.
        found_waiting_max: Addresses that wait for the node to dial them. When it is full, a random
            one goes: a flood of made-up peers cannot keep a real one out for good.
        found_per_minute_max: Addresses reported in a minute. What is heard is not authenticated,
            and each address is dialled: this bounds what a stranger can make this node dial.
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
    addrs_max: int = field(
        default=8, metadata={"help": "Addresses of one peer.", "min": 1, "max": 8}
    )
    addrs_poll_s: float = field(
        default=5.0,
        metadata={"help": "How often own addresses are looked at.", "min": 0.01, "max": 3600},
    )
    query_s_alone: float = field(
        default=30.0,
        metadata={"help": "Time between questions without a peer.", "min": 1, "max": 3600},
    )
    query_s_max: float = field(
        default=600.0, metadata={"help": "Time between questions.", "min": 1, "max": 3600}
    )
    again_s: float = field(
        default=60.0,
        metadata={"help": "An address is reported once in this time.", "min": 1, "max": 86_400},
    )
    seen_max: int = field(
        default=1024, metadata={"help": "Addresses remembered for it.", "min": 1, "max": 65_536}
    )
    found_waiting_max: int = field(
        default=256,
        metadata={"help": "Addresses that wait to be dialled.", "min": 1, "max": 65_536},
    )
    found_per_minute_max: int = field(
        default=120, metadata={"help": "Addresses reported a minute.", "min": 1, "max": 60_000}
    )
