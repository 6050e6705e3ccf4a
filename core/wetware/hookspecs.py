"""The plugin contract, hook API v1, on one page.

pluggy is synchronous, so hooks *declare*, and the objects that they return are async. A plugin is
a module named by an entry point of the group `wetware.v1`; it marks its functions with `hookimpl`,
and may import the core but never another plugin. Lifecycle is not a hook: the node starts
`Service.run` in a task group and cancels it to stop it. See docs/reference/hooks.md.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pluggy

from wetware.broker.ports import (
    Accept,
    AuthBackend,
    NotMine,
    Recorder,
    Reject,
    Resumed,
    RoleProfile,
    Service,
    Suspended,
    Withdrawn,
)
from wetware.clock import Clock
from wetware.threads import Threads

if TYPE_CHECKING:
    import typer

    from wetware.access import Access
    from wetware.identity import PeerId
    from wetware.link import Stream
    from wetware.log import EventLogger
    from wetware.member import Member

__all__ = [
    "GROUP",
    "PROJECT",
    "Accept",
    "AuthBackend",
    "Clock",
    "Discovery",
    "NotMine",
    "Overlay",
    "PeerDown",
    "PeerUp",
    "PluginContext",
    "Recorder",
    "Reject",
    "Resumed",
    "RoleProfile",
    "Service",
    "Suspended",
    "Withdrawn",
    "hookimpl",
    "hookspec",
]

T = TypeVar("T")

PROJECT = "wetware"
GROUP = "wetware.v1"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# --- the hooks ------------------------------------------------------------------------------------


@hookspec
def ww_register_config() -> type | None:
    """A frozen dataclass for `[plugins.NAME]` in ww.toml; every field has a default."""


@hookspec
def ww_register_services(ctx: PluginContext) -> Iterable[Service]:
    """Services that this node offers. Called once, before the node listens."""
    return ()


@hookspec
def ww_register_auth(ctx: PluginContext) -> AuthBackend | None:
    """The auth backend, if the plugin is one. Called only for the backend that `--auth` selects."""


@hookspec
def ww_register_recorder(
    ctx: PluginContext,
    sign: Callable[[bytes], bytes],
    copy: Callable[[Mapping[str, Any]], None],
) -> Recorder | None:
    """The recorder of decisions, if the plugin is one. Called only for the `[node] audit` one.

    `sign(data)` is the node's Ed25519 signature over `wetware-NAME-checkpoint:2`, a newline and
    `data`, NAME being the plugin's: for words on the record that others can keep. `copy(record)`
    hands a record, as it was written, to every `ww_audit`; it never waits.
    """


@hookspec
def ww_register_commands(app: typer.Typer) -> None:
    """Mount commands on `ww`. Import heavy modules inside the commands."""


@hookspec
def ww_register_discovery(ctx: PluginContext) -> Discovery | None:
    """A way to find peers of the cluster."""


@hookspec
def ww_audit(event: Mapping[str, object]) -> None:
    """A copy of an audit record. Must return at once; a slow plugin loses records, counted."""


# --- what hooks receive ---------------------------------------------------------------------------


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
        """See `PluginContext.members`."""
        ...

    def watch_members(
        self, callback: Callable[[Member], None], selector: str = ""
    ) -> Callable[[], None]:
        """See `PluginContext.watch_members`."""
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


@dataclass(frozen=True, slots=True)
class PluginContext:
    """What a plugin gets of the node: these, and not the node itself.

    Attributes:
        name: The plugin's name, as in `ww plugin list`.
        config: An instance of what `ww_register_config` returned, or None.
        log: The plugin's event logger.
        data_dir: A directory of the plugin's own (0700), created.
        clock: The node's clock.
        overlay: Streams, protocols and peers.
        join_document: What `AuthBackend.join_document` gave at the node that let this one into the
            cluster; None for a node that founds one. The same at every start.
        founding: What the cluster of this data directory was founded on, `AuthBackend.founding` of
            its first start; None before there is a cluster.
        configured: The names of the settings in `config` that somebody gave: in the file, the
            environment or a flag. The others are defaults.
        dev: Whether the node was started with `--dev`: a try-out is wanted, and nothing else.
        evicted: Whether a node was evicted from the cluster.
        proposals: Service → standard role → method patterns: what the services of this node propose
            (`Service.roles`), empty until an auth backend's `run`. A backend that founds a cluster
            with this start writes it into its roles; nothing is ever decided by it.
        threads: Of the plugin's own, for `run_sync`.
    """

    name: str
    config: Any
    log: EventLogger
    data_dir: Path
    clock: Clock
    overlay: Overlay
    join_document: bytes | None = None
    founding: bytes | None = None
    configured: frozenset[str] = frozenset()
    dev: bool = False
    evicted: Callable[[PeerId], bool] = lambda _: False
    proposals: Mapping[str, Mapping[str, frozenset[str]]] = field(default_factory=dict)
    threads: Threads = field(default_factory=Threads)

    async def run_sync(self, function: Callable[..., T], *args: object) -> T:
        """Call a function that blocks in a thread; of each plugin four run at a time.

        Where the caller is cancelled a function that has begun goes on, and keeps its place.
        """
        return await self.threads.run(function, *args)

    def members(self, selector: str = "") -> tuple[Member, ...]:
        """Who is in the cluster, as this node sees it: nodes by name, then foreign libp2p peers.

        Itself included, and in any state unless the selector names one, e.g.
        "service=pubsub,state=alive". Raises InvalidArgument for a selector that is none.
        """
        return self.overlay.members(selector)

    def watch_members(
        self, callback: Callable[[Member], None], selector: str = ""
    ) -> Callable[[], None]:
        """Call back, on the loop, for each member that matches, and whenever one of them changes.

        Those there already come first. One that no longer matches is told of once more, and one
        that is forgotten has the state "removed". Returns a function that ends the watch.
        """
        return self.overlay.watch_members(callback, selector)


# --- what hooks return ----------------------------------------------------------------------------


class Discovery(Protocol):
    """A way to find peers of the cluster."""

    @property
    def name(self) -> str:
        """For logs and `ww status`."""
        ...

    async def advertise(self, addrs: tuple[str, ...]) -> None:
        """Announce this node under its multiaddrs until cancelled."""
        ...

    def find_peers(self) -> AsyncIterator[str]:
        """Multiaddrs with peer IDs, as they are found; the node dials them, bounded."""
        ...
