"""A node of the cluster, as another one sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wetware.base.multiaddr import Multiaddr
from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    from wetware.identity import PeerId


@dataclass(frozen=True, slots=True)
class Member:
    """A node of the cluster, as the node that was asked sees it.

    Attributes:
        peer_id: Its peer ID.
        name: What people call it.
        host: Its host's name.
        state: "alive", "suspect", "dead", "left", or "foreign": a libp2p peer with a certificate,
            of which nothing else is known. In a watch also "removed": it is in the table no more.
        since_s: Seconds in this state.
        incarnation: Grows with each start of the node, and when it refutes its own death.
        addrs: Multiaddrs with its peer ID.
        labels: Of its certificate and, where those are silent, its own.
        version: Of wetware.
        services: What it offers.
        load: Load average over a minute, per processor.
        memory_bytes: Resident set size of the node.
        rtt_s: Round trip from the node that was asked; 0 if it has not measured one.
        connected: Whether the node that was asked has a connection to it.
        via: The peer ID of the member that carries that connection; "" where it is direct.
        is_self: Whether it is the node that was asked.
        trouble: What is wrong with it, e.g. its clock, as the node that was asked sees it, or "".
        record: What it signed, where that was asked for; see `wetware.overlay.membership.proof`.
        founding: With that, what names the cluster.
    """

    peer_id: PeerId
    name: str = ""
    host: str = ""
    state: str = "alive"
    since_s: float = 0.0
    incarnation: int = 0
    addrs: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    services: tuple[str, ...] = ()
    load: float = 0.0
    memory_bytes: int = 0
    rtt_s: float = 0.0
    connected: bool = False
    via: str = ""
    is_self: bool = False
    trouble: str = ""
    record: bytes = field(default=b"", repr=False)
    founding: bytes = field(default=b"", repr=False)

    @property
    def scopes(self) -> tuple[str, ...]:
        """Who can dial it at each of `addrs`, see `Multiaddr.scope`; "other" where that is new."""
        return tuple(map(_scope, self.addrs))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "peer_id": str(self.peer_id),
            "name": self.name,
            "host": self.host,
            "state": self.state,
            "since_s": round(self.since_s, 3),
            "incarnation": self.incarnation,
            "addrs": list(self.addrs),
            "labels": dict(self.labels),
            "version": self.version,
            "services": list(self.services),
            "load": round(self.load, 2),
            "memory_bytes": self.memory_bytes,
            "rtt_s": self.rtt_s,
            "connected": self.connected,
            "via": self.via,
            "self": self.is_self,
            "trouble": self.trouble,
        }


def _scope(addr: str) -> str:
    try:
        return Multiaddr.parse(addr).scope
    except InvalidArgument:
        return "other"
