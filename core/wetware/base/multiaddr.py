"""The addresses that wetware listens on and dials: `/ip4/HOST/tcp/PORT[/p2p/PEER]`.

A small strict parser for TCP multiaddrs. The general library costs 60 ms of import in every client
command, and its errors do not say what to write instead. Source: https://multiformats.io/multiaddr/
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from wetware.errors import InvalidArgument
from wetware.identity import PeerId

_EXAMPLES = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooW… or /dns/node.example.org/tcp/4001/p2p/12D3KooW…"
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}")  # RFC 1123, and the "_" that is in use
HOST_CHARS_MAX = 253
ADDR_CHARS_MAX = 512


@dataclass(frozen=True, slots=True)
class Multiaddr:
    """One TCP address, with the peer expected there if known.

    Attributes:
        kind: "ip4", "ip6", "dns", "dns4" or "dns6".
        host: An address literal or a host name, as `kind` says.
        port: 0 to 65535; 0 only for listening.
        peer: The peer ID expected at the address, or None.
    """

    kind: str
    host: str
    port: int
    peer: PeerId | None = None

    @classmethod
    def parse(cls, text: str) -> Multiaddr:
        """Parse a multiaddr; raises InvalidArgument that names the part that is wrong."""
        if len(text) > ADDR_CHARS_MAX:
            raise _bad(text[:40] + "…", f"longer than {ADDR_CHARS_MAX} characters")
        parts = text.split("/")
        if parts[0] != "" or len(parts) not in (5, 7):
            raise _bad(text, "not of the form /ip4/HOST/tcp/PORT[/p2p/PEER]")
        _, kind, host, transport, port_text, *rest = parts
        if kind in ("ip4", "ip6"):
            try:
                parsed = ipaddress.ip_address(host)
            except ValueError:
                raise _bad(text, f"{host!r} is not an IP address") from None
            if parsed.version != int(kind[2]):
                raise _bad(text, f"{host!r} is not an {kind} address")
        elif kind in ("dns", "dns4", "dns6"):
            if not _is_host_name(host):
                raise _bad(text, f"{host!r} is not a host name")
        else:
            raise _bad(text, f"{kind!r} is not one of ip4, ip6, dns, dns4, dns6")
        if transport != "tcp":
            raise _bad(text, f"transport {transport!r} is not supported, only tcp")
        if not _is_port(port_text):
            raise _bad(text, f"{port_text!r} is not a port (0 to 65535)")
        peer = None
        if rest:
            if rest[0] != "p2p":
                raise _bad(text, f"{rest[0]!r} is not supported after the port, only p2p")
            peer = PeerId.parse(rest[1])
        return cls(kind, host, int(port_text), peer)

    def with_peer(self, peer: PeerId | None) -> Multiaddr:
        """The same address, with `peer` expected there."""
        return replace(self, peer=peer)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can dial it; no name is looked up."""
        if self.kind.startswith("dns"):
            return self.host == "localhost"
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        base = f"/{self.kind}/{self.host}/tcp/{self.port}"
        return f"{base}/p2p/{self.peer}" if self.peer else base


def _is_port(text: str) -> bool:
    """Whether it is a number from 0 to 65535, written in the one way."""
    return text.isascii() and text.isdigit() and str(int(text)) == text and int(text) <= 65535


def _is_host_name(text: str) -> bool:
    """Whether each label is one; looks at each character once, for peers choose the text."""
    labels = text.removesuffix(".").split(".")
    return len(text) <= HOST_CHARS_MAX and all(_LABEL.fullmatch(label) for label in labels)


def _bad(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"bad address {text!r}: {why}", hint=f"write it like {_EXAMPLES}", code="invalid.multiaddr"
    )
