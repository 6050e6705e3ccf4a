"""What the broker is given: services, the auth backend and the recorder.

Plugins implement these, and import them from `wetware.hookspecs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.base.finding import Finding
    from wetware.broker.where import Where
    from wetware.identity import Challenge, LoginStatus, PeerId, Principal, Proof
    from wetware.rpc import Interface, Servant


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
        peer_interface: The interface of what `peer_bootstrap` makes; None: it has no siblings.
        entries: "one": what it keeps is reached through its own node alone, whose broker so sees
            every call about it, and can refuse those of a lock's earlier holders. "many": members
            have it in common; a fencing token is refused there, as no broker sees all calls.
    """

    name: str
    interface: Interface
    roles: ClassVar[Mapping[str, frozenset[str]]] = {}
    ending: frozenset[str] = frozenset()
    peer_interface: Interface | None = None
    entries: Literal["one", "many"] = "many"

    @abstractmethod
    def bootstrap(self, principal: Principal) -> Servant:
        """A fresh servant for one session. The broker guards it with the principal's grant."""

    def peer_bootstrap(self, node: Principal) -> Servant | None:
        """A fresh servant for this service at another node, which is `node:ID` by its certificate.

        It is asked for with `PluginContext.sibling`, and guarded: it ends when that node is a
        member no more, and with its connection. It does what replicas need of each other, and
        gives a node no user's rights: that node says for whom it asks, and need not say the truth.
        """
        return None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Run until cancelled; call `task_status.started()` once, when it can serve.

        anyio's cancellation is level-triggered: an `await` in a `finally` needs
        `anyio.CancelScope(shield=True)`. What is not started in time is cancelled and not offered;
        an exception ends this service alone.
        """
        import anyio  # the hooks are imported by every command

        task_status.started()
        await anyio.sleep_forever()

    async def hand_over(self, tell: Callable[[str], object]) -> None:
        """Give other members what this node alone has: it is about to leave for good.

        Returns once they have it durably, and raises a WetwareError where that comes to a halt:
        then the node stays. `tell` takes how far it is, in words. Cancelled when who asked for it
        goes away; may be called again. The node serves its users meanwhile.
        """
        return

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
