"""In which order the addresses of a peer are tried.

Source: RFC 8305, "Happy Eyeballs", section 4.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Final

from wetware.base.interfaces import Interface, interfaces

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr

DIRECT_FIRST: Final = 2
"""Addresses that are tried before the first relay, a quarter of a second each."""


def in_order(
    addrs: Sequence[Multiaddr], own: Callable[[], Sequence[Interface]] = interfaces
) -> list[Multiaddr]:
    """The nearest first: networks that this machine is in, the internet, other private networks.

    What is private elsewhere leads to a stranger or nowhere, and loopback to another machine's own
    node. Within each, IPv6 and the others take turns, and otherwise the order is kept. The first
    relay comes third: half a second is what a direct connection may take.
    """
    if len(addrs) < 2:
        return list(addrs)
    mine: Sequence[Interface] = ()
    with contextlib.suppress(OSError):
        mine = own()
    ranks: list[list[Multiaddr]] = [[], [], [], []]
    relays = [addr for addr in addrs if addr.relay is not None]
    for addr in addrs:
        if addr.relay is None:
            ranks[_rank(addr, mine)].append(addr)
    turns = (
        zip_longest([a for a in rank if a.kind == "ip6"], [a for a in rank if a.kind != "ip6"])
        for rank in ranks
    )
    direct = [addr for pair in chain.from_iterable(turns) for addr in pair if addr is not None]
    return [*direct[:DIRECT_FIRST], *relays[:1], *direct[DIRECT_FIRST:], *relays[1:]]


def _rank(addr: Multiaddr, own: Sequence[Interface]) -> int:
    if addr.is_loopback:
        return 3
    if addr.kind.startswith("dns"):
        return 1
    host = ipaddress.ip_address(addr.host)
    if any(host in one.network for one in own):
        return 0
    return 2 if host.is_private else 1
