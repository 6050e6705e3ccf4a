"""The addresses that wetware listens on and dials.

`/ip4/HOST/tcp/PORT[/p2p/PEER]`, and through another peer that carries the bytes:
`/ip4/HOST/tcp/PORT/p2p/RELAY/p2p-circuit[/p2p/PEER]`. A small strict parser: the general library
costs 60 ms of import in every client command, and its errors do not say what to write instead.
Source: https://multiformats.io/multiaddr/
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from wetware.errors import InvalidArgument
from wetware.identity import PeerId

_EXAMPLES = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooW… or /dns/node.example.org/tcp/4001/p2p/12D3KooW…"
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}")  # RFC 1123, and the "_" that is in use
CIRCUIT = "/p2p-circuit"
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
        relay: Who is there instead and carries the bytes to `peer`, or None.
    """

    kind: str
    host: str
    port: int
    peer: PeerId | None = None
    relay: PeerId | None = None

    @classmethod
    def parse(cls, text: str) -> Multiaddr:
        """Parse a multiaddr; raises InvalidArgument that names the part that is wrong."""
        if len(text) > ADDR_CHARS_MAX:
            raise _bad(text[:40] + "…", f"longer than {ADDR_CHARS_MAX} characters")
        parts = text.split("/")
        if parts[0] != "" or len(parts) not in (5, 7, 8, 10):
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
        peer = relay = None
        if rest:
            peer, rest = _peer(text, rest)
        if rest:
            if rest[0] != "p2p-circuit":
                raise _bad(text, f"{rest[0]!r} is not supported after a peer, only p2p-circuit")
            relay, peer = peer, None
            if len(rest) > 1:
                peer, rest = _peer(text, rest[1:])
        return cls(kind, host, int(port_text), peer, relay)

    def with_peer(self, peer: PeerId | None) -> Multiaddr:
        """The same address, with `peer` expected there."""
        return replace(self, peer=peer)

    def through(self, peer: PeerId | None = None) -> Multiaddr:
        """The address of `peer` that the peer at this one carries the bytes to."""
        return replace(self, peer=peer, relay=self.peer)

    @property
    def carrier(self) -> Multiaddr:
        """The address of the relay itself."""
        return replace(self, peer=self.relay, relay=None)

    @property
    def is_global(self) -> bool:
        """Whether the internet can dial the peer itself there, as far as the text tells."""
        if self.relay is not None or self.kind.startswith("dns"):
            return False
        return ipaddress.ip_address(self.host).is_global

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can dial it; no name is looked up."""
        if self.kind.startswith("dns"):
            return self.host == "localhost"
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def scope(self) -> str:
        """Who can dial the peer there, as far as the text tells.

        "relayed": who gets to the relay; "loopback": its machine; "private": its network; "public":
        the internet, at an address of the machine or a port of its router; "name": who knows it.
        """
        if self.relay is not None:
            return "relayed"
        if self.is_loopback:
            return "loopback"
        if self.kind.startswith("dns"):
            return "name"
        return "public" if self.is_global else "private"

    def __str__(self) -> str:
        text = f"/{self.kind}/{self.host}/tcp/{self.port}"
        if self.relay:
            text += f"/p2p/{self.relay}{CIRCUIT}"
        return f"{text}/p2p/{self.peer}" if self.peer else text


def _peer(text: str, parts: list[str]) -> tuple[PeerId, list[str]]:
    """The peer that `parts` begin with, and what follows."""
    if parts[0] != "p2p":
        raise _bad(text, f"{parts[0]!r} is not supported there, only p2p")
    return PeerId.parse(parts[1]), parts[2:]


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
