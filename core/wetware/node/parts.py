"""What a node is composed of."""

from __future__ import annotations

import socket
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING

from wetware.base.interfaces import look
from wetware.node.addresses import dialable
from wetware.node.lag import LagMeter
from wetware.overlay.membership.record import ADDRS_MAX

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.base.multiaddr import Multiaddr
    from wetware.broker.broker import Broker
    from wetware.broker.proposals import Proposal
    from wetware.broker.records import Records
    from wetware.broker.tree import Tree
    from wetware.config import Config
    from wetware.hookspecs import AuthBackend, Service
    from wetware.identity import Key, PeerId
    from wetware.loader import Plugins
    from wetware.node.members import Members
    from wetware.node.siblings import Siblings
    from wetware.overlay.admission.decision import Admission
    from wetware.overlay.admission.service import Introductions
    from wetware.overlay.admission.store import Store
    from wetware.overlay.libp2p import Overlay
    from wetware.overlay.link import LinkHost
    from wetware.overlay.membership.outside import Outside
    from wetware.overlay.membership.service import Membership


class Parts:
    """The parts of a node. What is only declared here is made while the node starts.

    Args:
        config: The effective configuration.
        plugins: Loaded plugins.
    """

    key: Key
    store: Store
    admission: Admission
    audit: Records
    introductions: Introductions
    membership: Membership
    members: Members
    host: LinkHost
    outside: Outside
    overlay: Overlay
    siblings: Siblings
    backend: AuthBackend
    also: tuple[AuthBackend, ...]
    broker: Broker
    tree: Tree

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.config, self.plugins = config, plugins
        self.clock: Clock = time
        self.started_at = self.clock.monotonic()
        self.data_dir = config.node.data_dir
        self.services: dict[str, Service] = {}
        self.proposals: dict[str, Proposal] = {}
        self.name = config.node.name or socket.gethostname()
        self.cluster = ""
        self.lag = LagMeter()
        self.network = look()
        self.mapped: tuple[Multiaddr, ...] = ()  # the port of the router that leads here

    @property
    def joined(self) -> bool:
        """Whether another node founded its cluster: its operator may be no user of that."""
        return self.store.cluster_key is None

    @property
    def try_out(self) -> str:
        """What the auth backend says of a try-out; "" where it is none."""
        return str(getattr(self.backend, "try_out", ""))

    @property
    def users(self) -> str:
        """How somebody becomes a user, as the auth backends say; "" where they do not."""
        said = [str(getattr(backend, "users", "")) for backend in (self.backend, *self.also)]
        return "; or ".join(filter(None, said))

    @property
    def own_addrs(self) -> tuple[Multiaddr, ...]:
        """Where this node can be dialled by its own network, with its peer ID."""
        return tuple(
            reachable.with_peer(self.key.peer_id)
            for addr in self.host.listen_addrs
            for reachable in dialable(addr, self.network)
        )

    @property
    def direct_addrs(self) -> tuple[Multiaddr, ...]:
        """Where this node itself can be dialled: first as it is told to announce."""
        announced = (addr.with_peer(self.key.peer_id) for addr in self.config.node.announce)
        return tuple(dict.fromkeys((*announced, *self.mapped, *self.own_addrs)))[:ADDRS_MAX]

    @property
    def port_to_map(self) -> int | None:
        """What the router shall send here; None where that is no use, or done by the operator."""
        host, own = self.network.routed[0], self.config.node
        if not own.port_mapping or own.announce or not host or ip_address(host).is_global:
            return None
        ports = (
            addr.port
            for addr in self.host.listen_addrs
            if addr.host in ("0.0.0.0", host)  # noqa: S104
        )
        return next(ports, None)

    @property
    def reached(self) -> str:
        """How it is reached from the internet, in words; "" where nobody is there to reach it."""
        if not self.membership.knows_others:
            return ""
        relays = dict.fromkeys(addr.relay for addr in self.membership.reservations.addrs)
        return self.outside.describe([*map(self.called, relays)])

    def called(self, peer: PeerId | None) -> str:
        """A member's name; else what can be said of the peer."""
        known = None if peer is None else self.membership.member(peer)
        return (known and known.record.name) or (peer.short if peer else "somebody")

    @property
    def addrs(self) -> tuple[Multiaddr, ...]:
        """Where it can be reached; last through which relays."""
        relayed = self.membership.reservations.addrs
        return (*self.direct_addrs[: ADDRS_MAX - len(relayed)], *relayed)
