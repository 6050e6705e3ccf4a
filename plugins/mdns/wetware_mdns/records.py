"""What is said over multicast DNS, without sockets: announcements, and what others' are worth.

libp2p's names and texts, so that its other implementations can be found and can find us: service
`_p2p._udp.local`, a random name per start, and a TXT record with one `dnsaddr=MULTIADDR` string per
address. Ours has one string more, `wwcluster=CLUSTER_ID`, which they skip.
Source: https://github.com/libp2p/specs/blob/master/discovery/mdns.md
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wetware.base.multiaddr import Multiaddr
from wetware.errors import WetwareError

if TYPE_CHECKING:
    import random

SERVICE = "_p2p._udp.local."
TTL_S = 120
"""How long others may remember a record: that of js-libp2p and of RFC 6762 for host records."""

ADDR_KEY, CLUSTER_KEY = b"dnsaddr=", b"wwcluster="
STRING_BYTES_MAX = 255
"""One string of a TXT record: its length is one byte (RFC 1035)."""
STRINGS_MAX = 64
"""Strings of a TXT record that are looked at."""
TEXT_BYTES_MAX = 1000
"""Our own TXT record: with its companions it stays within one Ethernet frame."""

_NAME_CHARS = "abcdefghijklmnopqrstuvwxyz0123456789"


def random_name(rng: random.Random) -> str:
    """A name for one start, 32 characters: it says nothing, and nobody else has it."""
    return "".join(rng.choices(_NAME_CHARS, k=32))


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
    """Of a node's addresses, those to announce: never loopback, private ones first."""
    found = {
        addr: ip.is_private
        for addr in _parsed(addrs)
        if (ip := ip_of(addr)) is not None and addr.peer is not None and addr.port
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


class Seen:
    """Which addresses were reported lately, and how many may be now: both bounded.

    Args:
        again_s: An address is reported once in this time.
        seen_max: Addresses remembered; the oldest go first.
        per_minute_max: Addresses reported in a minute, and at once after a quiet one.
        monotonic: The clock.
    """

    def __init__(
        self,
        *,
        again_s: float,
        seen_max: int,
        per_minute_max: int,
        monotonic: Callable[[], float],
    ) -> None:
        self._again_s, self._seen_max, self._per_minute_max = again_s, seen_max, per_minute_max
        self._monotonic = monotonic
        self._at: dict[Multiaddr, float] = {}
        self._tokens, self._tokens_at = float(per_minute_max), monotonic()

    def __len__(self) -> int:
        return len(self._at)

    def take(self, addr: Multiaddr) -> bool:
        """Whether to report `addr` now; if so, it counts as reported."""
        now = self._monotonic()
        last = self._at.get(addr)
        if last is not None and now - last < self._again_s:
            return False
        gained = (now - self._tokens_at) * self._per_minute_max / 60
        self._tokens = min(float(self._per_minute_max), self._tokens + gained)
        self._tokens_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        self._at.pop(addr, None)  # so that the order of the table is that of the times
        while len(self._at) >= self._seen_max:
            del self._at[next(iter(self._at))]
        self._at[addr] = now
        return True


class Waiting:
    """Addresses on their way to the node: in order, bounded; when full, a random one goes."""

    def __init__(self, size_max: int, rng: random.Random) -> None:
        self._size_max, self._rng = size_max, rng
        self._items: list[str] = []
        self.lost = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: str) -> None:
        if len(self._items) >= self._size_max:
            del self._items[self._rng.randrange(len(self._items))]
            self.lost += 1
        self._items.append(item)

    def get(self) -> str | None:
        return self._items.pop(0) if self._items else None
