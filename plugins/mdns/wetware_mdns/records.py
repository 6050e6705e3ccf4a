"""What is said over multicast DNS, without sockets: announcements, and what others' are worth.

libp2p's names and texts, so that its other implementations can be found and can find us: service
`_p2p._udp.local`, a random name per start, and a TXT record with one `dnsaddr=MULTIADDR` string per
address. Ours has one string more, `wwcluster=CLUSTER_ID`, which they skip.
Source: https://github.com/libp2p/specs/blob/master/discovery/mdns.md
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from wetware.base.multiaddr import Multiaddr
from wetware.errors import WetwareError

SERVICE = "_p2p._udp.local."
TTL_S = 120
"""How long others may remember a record: that of js-libp2p and of RFC 6762 for host records."""

ADDR_KEY, CLUSTER_KEY = b"dnsaddr=", b"wwcluster="
STRINGS_MAX = 64
"""Strings of a TXT record that are looked at."""
TEXT_BYTES_MAX = 1000
"""Our own TXT record: with its companions it stays within one Ethernet frame."""


def ip_of(addr: Multiaddr) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address literal, if it means the same machine to every neighbour; None otherwise.

    Names are left out: to look them up on a stranger's word would tell the resolver about it.
    """
    if addr.kind not in ("ip4", "ip6"):
        return None
    ip = ipaddress.ip_address(addr.host)
    if isinstance(ip, ipaddress.IPv6Address):
        mapped = ip.ipv4_mapped
        if mapped is not None or ip.scope_id is not None or ip.is_link_local:
            return None  # link-local needs the number of an interface, which differs by machine
    if ip.is_loopback or ip.is_unspecified or ip.is_multicast or ip.is_reserved:
        return None
    return None if str(ip) == "255.255.255.255" else ip


def announceable(addrs: Iterable[str], addrs_max: int) -> tuple[Multiaddr, ...]:
    """Of a node's addresses, those to announce: never loopback or a relay's, private ones first."""
    found = {
        addr: ip.is_private
        for addr in _parsed(addrs)
        if (ip := ip_of(addr)) is not None and addr.peer and addr.port and not addr.relay
    }
    return tuple(sorted(found, key=lambda addr: not found[addr])[:addrs_max])


def _parsed(addrs: Iterable[str]) -> Iterator[Multiaddr]:
    for text in addrs:
        try:
            yield Multiaddr.parse(text)
        except WetwareError:  # of a form that the link cannot dial
            continue


def encode(addrs: Sequence[Multiaddr], cluster: str) -> bytes:
    """The TXT record that announces `addrs`; the last ones are left out if it grows too long."""
    hint = CLUSTER_KEY + cluster.encode()
    strings: list[bytes] = []
    left = TEXT_BYTES_MAX - 1 - len(hint)
    for addr in addrs:
        string = ADDR_KEY + str(addr).encode()
        left -= 1 + len(string)
        if left < 0:
            break
        strings.append(string)
    return b"".join(bytes((len(s),)) + s for s in (*strings, hint))


@dataclass(frozen=True, slots=True)
class Sighting:
    """One TXT record of another peer.

    Attributes:
        cluster: The cluster that it names, or "" if it names none.
        addrs: Its addresses, all of one peer.
    """

    cluster: str
    addrs: tuple[Multiaddr, ...]


def decode(text: bytes, addrs_max: int) -> Sighting:
    """Read a TXT record, whatever its bytes are; what is not understood is skipped."""
    cluster, peer = "", None
    addrs: dict[Multiaddr, None] = {}
    for string in _strings(text):
        if string.startswith(CLUSTER_KEY):
            cluster = string[len(CLUSTER_KEY) :].decode("ascii", "replace")
        elif string.startswith(ADDR_KEY) and len(addrs) < addrs_max:
            for addr in _parsed((string[len(ADDR_KEY) :].decode("ascii", "replace"),)):
                if addr.peer is None or not addr.port or ip_of(addr) is None:
                    continue
                peer = peer or addr.peer
                if addr.peer == peer:
                    addrs[addr] = None
    return Sighting(cluster, tuple(addrs))


def _strings(text: bytes) -> Iterator[bytes]:
    at = 0
    for _ in range(STRINGS_MAX):
        if at >= len(text):
            return
        end = at + 1 + text[at]
        if end > len(text):
            return
        yield text[at + 1 : end]
        at = end
