"""The overlay as its users see it: peers that come and go, streams to them, members, the DHT."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from wetware.base.access import Access
    from wetware.identity import PeerId
    from wetware.member import Member
    from wetware.overlay.link import Stream


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A peer connected."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The last connection to a peer ended."""

    peer: PeerId


class Overlay(Protocol):
    """The overlay's verbs, as plugins see them: asyncio only."""

    @property
    def peer_id(self) -> PeerId:
        """This node."""
        ...

    @property
    def cluster(self) -> str:
        """The cluster's ID."""
        ...

    def addrs(self) -> tuple[str, ...]:
        """Multiaddrs under which this node can be dialled, with its peer ID; they may change."""
        ...

    def peers(self) -> tuple[PeerId, ...]:
        """Connected members of the cluster: each side has admitted the other."""
        ...

    def watch_peers(self, callback: Callable[[PeerUp | PeerDown], None]) -> Callable[[], None]:
        """Call back for every member that connects (those already there first) or disconnects.

        Returns a function that ends the watch.
        """
        ...

    def members(self, selector: str = "") -> tuple[Member, ...]:
        """Who is in the cluster, as this node sees it: nodes by name, then foreign libp2p peers.

        Itself included, and in any state unless the selector names one, e.g.
        "service=pubsub,state=alive". Raises InvalidArgument for a selector that is none.
        """
        ...

    def founder(self) -> PeerId | None:
        """The node where the cluster was founded, by its certificate; None where it is not known.

        It is known from when this node has first heard of it, as long as it is in the table.
        """
        ...

    def watch_members(
        self, callback: Callable[[Member], None], selector: str = ""
    ) -> Callable[[], None]:
        """Call back, on the loop, for each member that matches, and whenever one of them changes.

        Those there already come first. One that no longer matches is told of once more, and one
        that is forgotten has the state "removed". Returns a function that ends the watch.
        """
        ...

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        """Open a stream to a connected peer for the first protocol that it speaks.

        Raises ProtocolRefused or DialError.
        """
        ...

    def handle(
        self,
        protocol: str,
        handler: Callable[[Stream], Coroutine[Any, Any, None]],
        *,
        access: Access,
    ) -> Callable[[], None]:
        """Serve a protocol. An exception in `handler` resets its stream, never the node.

        Returns a function that ends the registration.
        """
        ...

    async def provide(self, key: bytes) -> bool:
        """Announce in the DHT that this node provides `key`; whether some peer took the record.

        Raises OverlayError while libp2p is not running.
        """
        ...

    async def find_providers(self, key: bytes) -> tuple[str, ...]:
        """Multiaddrs, with peer IDs, of peers that provide `key`: a hint, not a proof.

        Raises OverlayError while libp2p is not running.
        """
        ...

    def sign(self, domain: bytes, data: bytes) -> bytes:
        """The node's Ed25519 signature over `domain + data`; the core's own domains are refused."""
        ...
