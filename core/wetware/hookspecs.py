"""The plugin contract, hook API v1, on one page.

pluggy is synchronous, so hooks *declare*, and the objects that they return are async. A plugin is
a module named by an entry point of the group `wetware.v1`; it marks its functions with `hookimpl`,
and may import the core but never another plugin. Lifecycle is not a hook: the node starts
`Service.run` in a task group and cancels it to stop it. See docs/reference/hooks.md.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pluggy

from wetware.base.access import Access
from wetware.base.clock import Clock
from wetware.base.finding import Finding
from wetware.base.log import EventLogger
from wetware.base.setting import setting
from wetware.base.threads import Threads
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
from wetware.broker.proposals import Proposal
from wetware.broker.role_config import role_services, role_where
from wetware.broker.where import Where
from wetware.errors import NotFound
from wetware.overlay.peers import Overlay, PeerDown, PeerUp

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    import typer

    from wetware.broker.derived import Deriver
    from wetware.errors import WetwareError
    from wetware.identity import Key, PeerId
    from wetware.member import Member
    from wetware.rpc import Guard, Ref

__all__ = [
    "GROUP",
    "PROJECT",
    "Accept",
    "Access",
    "AuthBackend",
    "Clock",
    "Derived",
    "Discovery",
    "EventLogger",
    "Finding",
    "NotMine",
    "Overlay",
    "PeerDown",
    "PeerUp",
    "PluginContext",
    "Proposal",
    "Recorder",
    "Reject",
    "Resumed",
    "RoleProfile",
    "Service",
    "Suspended",
    "Where",
    "Withdrawn",
    "hookimpl",
    "hookspec",
    "role_services",
    "role_where",
    "setting",
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
def ww_register_recorder(ctx: PluginContext, sign: Callable[[bytes], bytes]) -> Recorder | None:
    """The recorder of decisions, if the plugin is one. Called only for the `[node] audit` one.

    `sign(data)` is the node's Ed25519 signature over `wetware-NAME-checkpoint:2`, a newline and
    `data`, NAME being the plugin's: for words on the record that others can keep.
    """


@hookspec
def ww_register_commands(app: typer.Typer) -> None:
    """Mount commands on `ww`. Import heavy modules inside the commands."""


@hookspec
def ww_register_discovery(ctx: PluginContext) -> Discovery | None:
    """A way to find peers of the cluster."""


# --- what hooks receive ---------------------------------------------------------------------------


async def _nowhere(peer: PeerId, service: str) -> Ref:
    """For a context that no node gives."""
    raise NotFound(f"{peer} is no other member of the cluster", code="not_found.member")


def _deriver() -> Deriver:
    from wetware.broker.derived import Deriver  # the hooks are imported by every command

    return Deriver()


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
        joined: Whether another node let this one into the cluster.
        founding: What the cluster of this data directory was founded on, `AuthBackend.founding` of
            its first start; None before there is a cluster.
        authority: False for an auth backend of `[node] auth_also`: it decides about its own users
            and nothing else. Its configuration alone says where it gets what it decides by: it has
            no `join_document` and no `founding`, and founds nothing.
        configured: The names of the settings in `config` that somebody gave: in the file, the
            environment or a flag. The others are defaults.
        dev: Whether the node was started with `--dev`: a try-out is wanted, and nothing else.
        evicted: Whether a node was evicted from the cluster.
        proposals: Service → standard role → method patterns: what the services of this node propose
            (`Service.roles`), empty until an auth backend's `run`. A backend that founds a cluster
            with this start writes it into its roles; nothing is ever decided by it.
        threads: Of the plugin's own, for `run_sync`.
        open_sibling: What `sibling` calls.
        deriver: Makes grants: `derive` and what follows it.
    """

    name: str
    config: Any
    log: EventLogger
    data_dir: Path
    clock: Clock
    overlay: Overlay
    join_document: bytes | None = None
    joined: bool = False
    founding: bytes | None = None
    authority: bool = True
    configured: frozenset[str] = frozenset()
    dev: bool = False
    evicted: Callable[[PeerId], bool] = lambda _: False
    proposals: Mapping[str, Mapping[str, frozenset[str]]] = field(default_factory=dict)
    threads: Threads = field(default_factory=Threads)
    open_sibling: Callable[[PeerId, str], Awaitable[Ref]] = _nowhere
    deriver: Deriver = field(default_factory=_deriver)

    async def run_sync(self, function: Callable[..., T], *args: object) -> T:
        """Call a function that blocks in a thread; of each plugin four run at a time.

        Where the caller is cancelled a function that has begun goes on, and keeps its place.
        """
        return await self.threads.run(function, *args)

    async def sibling(self, peer: PeerId, service: str = "") -> Ref:
        """What the same service of this plugin has at another member, for this node as itself.

        That is what `Service.peer_bootstrap` makes there, under `Service.peer_interface`; by
        default of the service that has the plugin's name. Members are connected to where needed,
        and all plugins share the connection. It is over when either node is a member no more, and
        when the connection ends: ask again then, and for each piece of work, since a new reference
        takes the best path that there is.

        Raises NotFound where `peer` is no other member, DialError where it is not alive or cannot
        be reached, Unsupported "unsupported.service" where the service is not running at either
        end, Denied where that node does not take this one for a member, Disconnected and TimedOut.
        """
        return await self.open_sibling(peer, service or self.name)

    def derive(self, guard: Guard, label: str) -> Derived:
        """A grant below that of a call (`rpc.current_guard`), for what outlives the call.

        It is shown as `label` in `ww grants`, and ends with the session of the call, too: nothing
        of it is kept. Raises what ended the grant above, LimitExceeded.
        """
        return self.deriver.derive(guard, label)

    async def admit(self, guard: Guard | None, event: str, **fields: object) -> None:
        """Record what is about to be begun under the grant of a call (`rpc.current_guard`).

        Raises Unrecorded where that cannot be written: then do not begin it.
        """
        await self.deriver.admit(guard, event, **fields)

    async def derive_durable(
        self,
        session: Ref,
        label: str,
        asked: Mapping[str, tuple[str, Iterable[str]]],
        keep: Callable[[str], Awaitable[object]],
    ) -> Derived:
        """The same below a session that a caller hands in, to outlive it and the node's process.

        `asked` is name → ("SERVICE" or "SERVICE:OBJECT", constraints), of what the session has. It
        is recorded, and on disk, when this returns. Its ID, which is no secret, is given to `keep`
        before: so no crash leaves a grant that its service does not know of. What `keep` has kept
        may have no grant then, or not all of it: end that, and start again.

        Raises what `keep` does, Amplification for what the session has not, InvalidArgument for
        what is no session of this node or cannot be granted, Denied for a sealed one,
        LimitExceeded, Unrecorded.
        """
        return await self.deriver.derive_durable(session, label, asked, keep)

    async def derived(self, id_: str) -> Derived:
        """What `derive_durable` made, after a restart too: waits until the node has it again.

        Raises what ended it, also while the node was down, or NotFound.
        """
        return await self.deriver.derived(id_)

    def fence(self, key: Key, lock: str, *, epoch: int, counter: int) -> bytes:
        """A fencing token of a lock, for `Session.attenuate(…, fence=token)`.

        A broker refuses calls under it from when it has seen a higher (epoch, counter) of that
        lock by that key: the key is of the store that has the lock, and moves with it.
        """
        from wetware.broker.fences import Fence  # the hooks are imported by every command

        return Fence.issue(key, lock, epoch=epoch, counter=counter).encode()

    def members(self, selector: str = "") -> tuple[Member, ...]:
        """See `Overlay.members`."""
        return self.overlay.members(selector)

    def watch_members(
        self, callback: Callable[[Member], None], selector: str = ""
    ) -> Callable[[], None]:
        """See `Overlay.watch_members`."""
        return self.overlay.watch_members(callback, selector)


# --- what hooks return ----------------------------------------------------------------------------


class Derived(Protocol):
    """A grant that a service holds for something, until it is ended: see `PluginContext.derive`.

    It ends as well with its role, its user and every grant above, and when somebody revokes it.
    """

    @property
    def id(self) -> str:
        """16 hex digits, as in `ww grants`; no secret."""
        ...

    @property
    def ended(self) -> WetwareError | None:
        """Why nothing works any more; None while it lives."""
        ...

    def under(self, name: str, ref: Ref) -> Ref:
        """What came with the call as `ref`, under a grant of its own below: NAME in `ww grants`.

        Its calls end with that, those in flight included. Raises what ended it, LimitExceeded.
        """
        ...

    def opened(self) -> AbstractAsyncContextManager[dict[str, Ref]]:
        """What a durable one has by name, for the block; without what was revoked by itself.

        Raises Unsupported where a service is not running, and what the services raise.
        """
        ...

    def on_end(self, callback: Callable[[WetwareError], None]) -> Callable[[], None]:
        """Call back once when it ends, at once if it has; returns a remover.

        Of a durable one not when the node stops: it is there again after the start.
        """
        ...

    def end(self, why: str) -> None:
        """End it, and all calls under it, now. Idempotent."""
        ...


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
