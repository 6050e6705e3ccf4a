"""The addresses of this machine, as they are now."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Final, TypeAlias

Interface: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface

_ANYWHERE: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
_SIOCGIFFLAGS, _IFF_RUNNING = 0x8913, 0x40
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Network:
    """Where this machine is.

    Attributes:
        interfaces: See `interfaces`.
        routed: The addresses that it would reach the internet from, IPv4 and IPv6; "" without a
            route.
    """

    interfaces: tuple[Interface, ...]
    routed: tuple[str, ...]

    @property
    def hosts(self) -> tuple[str, ...]:
        """The addresses as text, those with a way to the internet first."""
        texts = (str(one.ip) for one in self.interfaces)
        return tuple(sorted(texts, key=lambda text: text not in self.routed))


def look() -> Network:
    """Raises OSError where that cannot be found out now, e.g. for want of a file descriptor."""
    return Network(interfaces(), tuple(_routed(*each) for each in _ANYWHERE))


def interfaces() -> tuple[Interface, ...]:
    """The addresses that other machines may reach this one at, with their networks.

    Of all interfaces that run; without loopback, and without link-local ones, which need the name
    of an interface. Raises OSError as `look`.
    """
    import ifaddr  # 25 ms, which most commands of a client can do without

    found = []
    for adapter in ifaddr.get_adapters():
        if _runs(adapter.nice_name):
            for ip in adapter.ips:
                text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
                found.append(ipaddress.ip_interface(f"{text}/{ip.network_prefix}"))
    return tuple(one for one in found if not (one.ip.is_loopback or one.ip.is_link_local))


def _runs(name: str) -> bool:
    """Whether an interface has a carrier; one without keeps its IPv4 addresses."""
    if sys.platform != "linux":
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("256s", name.encode()))
        except OSError:  # it has just gone
            return False
    return bool(struct.unpack_from("H", answer, 16)[0] & _IFF_RUNNING)


def _routed(family: int, host: str) -> str:
    """The address that a packet to `host` would be sent from; "" if there is no way."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))  # a datagram socket only looks its route up
            return str(sock.getsockname()[0])
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            raise
        return ""
