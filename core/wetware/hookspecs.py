"""The plugin contract, hook API v1, on one page.

pluggy is synchronous, so hooks *declare*, and the objects that they return are async. A plugin is
a module named by an entry point of the group `wetware.v1`; it marks its functions with `hookimpl`,
and may import the core but never another plugin. Lifecycle is not a hook: the node starts
`Service.run` in a task group and cancels it to stop it. See docs/reference/hooks.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import pluggy

from wetware.threads import Threads

if TYPE_CHECKING:
    import typer
    from anyio.abc import TaskStatus

    from wetware.access import Access
    from wetware.broker.terms import Where
    from wetware.finding import Finding
    from wetware.identity import Challenge, LoginStatus, PeerId, Principal, Proof
    from wetware.link import Stream
    from wetware.log import EventLogger
    from wetware.member import Member
    from wetware.rpc import Interface, Servant

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


class Clock(Protocol):
    """Time, injected so that tests control it."""

    def time(self) -> float:
        """Unix time, seconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...


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


class Service(ABC):
    """One service: a bootstrap capability per principal, and a task that runs beside the node.

    Attributes:
        name: What `session.open(name)` and grants call it.
        interface: The interface of the bootstrap capability.
        roles: Standard role (`reader`, `member`, `admin`) → method patterns that it should have of
            this service. A proposal: nothing is decided by it.
        ending: Names of the form "Interface.method": what ends things, or shows what there is to
            end, and gives nothing. A session may call these also while the audit log cannot be
            written; a service without any is not opened then.
    """

    name: str
    interface: Interface
    roles: ClassVar[Mapping[str, frozenset[str]]] = {}
    ending: frozenset[str] = frozenset()

    @abstractmethod
    def bootstrap(self, principal: Principal) -> Servant:
        """A fresh servant for one session. The broker guards it with the principal's grant."""

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Run until cancelled; call `task_status.started()` once, when it can serve.

        anyio's cancellation is level-triggered: an `await` in a `finally` needs
        `anyio.CancelScope(shield=True)`. What is not started in time is cancelled and not offered;
        an exception ends this service alone.
        """
        import anyio  # the hooks are imported by every command

        task_status.started()
        await anyio.sleep_forever()

    def findings(self) -> Iterable[Finding]:
        """What is wrong with the service now, for `ww doctor`; empty if nothing is."""
        return ()


@dataclass(frozen=True, slots=True)
class RoleProfile:
    """What a role may do.

    Attributes:
        services: Service name (or "*") → method patterns: "*", "Interface.*" or "Interface.method".
        where: Constraints on arguments; all of them have to pass.
    """

    services: Mapping[str, frozenset[str]] = field(default_factory=dict)
    where: tuple[Where, ...] = ()

    def patterns(self, service: str) -> frozenset[str]:
        """The patterns for a service, those for every service included; empty if none."""
        return self.services.get(service, frozenset()) | self.services.get("*", frozenset())


@dataclass(frozen=True, slots=True)
class Accept:
    """The proof is good.

    Attributes:
        principal: Whose it is.
        roles: What they have now.
        expires_at: Unix time, s, at which the session ends, with all that was made of it; None: it
            has no end of its own.
    """

    principal: Principal
    roles: frozenset[str]
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """The proof is refused; `status` is never GRANTED."""

    status: LoginStatus
    reason: str


@dataclass(frozen=True, slots=True)
class NotMine:
    """The proof's scheme belongs to another backend."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A principal lost roles; `roles=None` means all of them, `principal=None` everybody."""

    principal: Principal | None
    roles: frozenset[str] | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Suspended:
    """The backend cannot tell for now who has which role: nothing is allowed until `Resumed`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The backend knows again; what was suspended works on, but for what it withdrew meanwhile."""


class AuthBackend(Protocol):
    """Decides who a proof is from, and which roles they have. Fails closed.

    A backend may have one attribute more, `try_out: str`. Where it is not empty, the backend
    decides by something that was made for a try-out: the node then listens on loopback only, joins
    nobody and lets nobody join. `ww node` prints it: what this is, what it is not for, what to try.
    And another one, `users: str`: how somebody becomes a user, with the commands. A node that
    joined prints it, and commands of another backend name it. Where `ww role accept` cannot sign
    what roles may do, `how_to_accept(service, proposal) -> str` says what an operator writes where.
    """

    @property
    def name(self) -> str:
        """The `backend` of its principals: the plugin's name, without `auth_` if it begins so."""
        ...

    @property
    def schemes(self) -> tuple[str, ...]:
        """Proof schemes, in order of preference."""
        ...

    @property
    def founding(self) -> bytes:
        """What names the cluster, e.g. the operator's public key: hashed into the cluster's ID."""
        ...

    @property
    def epoch(self) -> int:
        """The version of the policy that decides now."""
        ...

    @property
    def services(self) -> tuple[Service, ...]:
        """Services that administer the backend, offered because the backend is selected."""
        ...

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Run until cancelled; call `task_status.started()` once, when it can decide.

        As `Service.run`; but an exception of a backend ends the node.
        """
        ...

    async def authenticate(self, challenge: Challenge, proof: Proof) -> Accept | Reject | NotMine:
        """Judge a proof. The core has compared `proof.signed` with `challenge` field by field."""
        ...

    def roles(self, principal: Principal) -> frozenset[str]:
        """The principal's roles now, from memory; empty for an unknown one."""
        ...

    def profile(self, role: str) -> RoleProfile:
        """What a role may do now; empty for an unknown one."""
        ...

    async def join_document(self) -> bytes:
        """What the backend of a joining node starts from, e.g. the policy: public, ≤ 512 KiB."""
        ...

    async def admit_node(self, peer: PeerId) -> bool:
        """Whether the backend lets a node be a member. May veto, cannot admit by itself."""
        ...

    def findings(self) -> Iterable[Finding]:
        """What is wrong with the backend's state now, for `ww doctor`; empty if nothing is."""
        ...

    def watch(
        self, callback: Callable[[Withdrawn | Suspended | Resumed], None]
    ) -> Callable[[], None]:
        """Call back, on the loop and before the change is acknowledged, when roles go.

        Also when the backend cannot decide for a time (Suspended), and when it can again (Resumed).
        """
        ...


class Recorder(Protocol):
    """Keeps a record of what the broker decides. Fails closed: what it does not take is not given.

    A record is a mapping of names to texts, numbers and booleans: `time_ms` (Unix ms), `event`, and
    what it is about. No text is longer than 1024 characters.
    """

    @property
    def name(self) -> str:
        """The plugin's name."""
        ...

    @property
    def services(self) -> tuple[Service, ...]:
        """Services that show the record, offered because the recorder is selected."""
        ...

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Run until cancelled; call `task_status.started()` once it can record.

        Started before anything is decided, cancelled when nothing is any more: then what waits has
        to be written. Where it ends before, nothing is admitted until the node is started again.
        """
        ...

    async def admit(self, record: Mapping[str, str | int | bool]) -> None:
        """Return once it is on record that something is about to be given.

        It is not given where this raises (`Unrecorded` says why to who asked), or takes over 10 s.
        """
        ...

    def report(self, record: Mapping[str, str | int | bool], *, ending: bool) -> None:
        """Record what has taken effect. Never waits: nothing is undone for want of a record.

        `ending`: an operator or the auth backend ended something. Nobody else can have such a
        record made, so space may be kept for it.
        """
        ...

    async def written(self) -> None:
        """Return once what was reported before is on record, so that it can be answered.

        Raises Unrecorded where it is not; it is answered then all the same, and after 5 s.
        """
        ...

    def findings(self) -> Iterable[Finding]:
        """What is wrong with the record now, for `ww doctor`."""
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
