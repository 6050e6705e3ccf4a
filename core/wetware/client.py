"""The client library: log in to a node and use its services.

    async with wetware.connect() as session:
        topic = await session.pubsub.join("chat")
        await topic.publish(b"hello")

`connect()` uses the unix socket of this machine's node; `connect("/ip4/…/p2p/…")` dials a remote
one over the encrypted overlay, without importing libp2p. Plain asyncio, or anyio on asyncio.
Everything that a session gives out ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from wetware import contexts, paths, rpc
from wetware.contexts import Context
from wetware.errors import (
    AuthError,
    ConfigError,
    DialError,
    InternalError,
    InvalidArgument,
    KeyFileError,
    OverlayError,
    Unsupported,
    WetwareError,
)
from wetware.identity import Challenge, Channel, Key, LoginStatus, PeerId, Signer
from wetware.protocol import (
    CORE,
    GATE_PROTOCOL,
    challenge_from_wire,
    proof_to_wire,
    status_from_name,
)
from wetware.sturdy import SturdyRef, is_ref

if TYPE_CHECKING:
    from types import TracebackType

    from wetware.cluster_client import Member
    from wetware.link import Connection

CLIENT_GROUP = "wetware.client.v1"
"""Entry points: service name → the class that an application sees as `session.NAME`."""
SIGNER_GROUP = "wetware.signer.v1"
"""Entry points: proof scheme → a factory of signers for it."""

RUNTIME_BYTES_MAX = 64 << 10
"""Of a node's runtime file."""

CALL_S = 30.0
"""For a call, where neither `Session.timeout_s` nor `wetware.time_limit` says otherwise."""
CONNECT_S = 10.0
"""Default time for dialling and logging in together."""
DIRECT_S_MAX = 3.0
"""For dialling a node that can be reached through a tunnel as well."""

_HINTS = {
    LoginStatus.UNKNOWN_PRINCIPAL: "somebody who administers the cluster has to add you",
    LoginStatus.NO_ROLE: "somebody who administers the cluster has to give you a role",
    LoginStatus.EXPIRED: "try again; if it persists, compare the clocks of both machines",
    LoginStatus.BACKEND_UNAVAILABLE: "try again; the node's log says why",
    LoginStatus.TOO_MANY_TRIES: "wait a minute, then try again",
}


class LoginRefused(AuthError):
    """The node refused the login; `status` says which check failed."""

    code = "auth.refused"

    def __init__(self, status: LoginStatus, reason: str, hint: str = "") -> None:
        name = status.name.lower().replace("_", " ")
        super().__init__(
            f"login refused ({name}): {reason}",
            hint=hint or _HINTS.get(status, ""),
            code=f"auth.refused.{status.name.lower()}",
        )
        self.status = status


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a session speaks as, and where.

    Attributes:
        principal: e.g. "local:12D3KooW…".
        roles: Roles that the session was granted by.
        node: Peer ID of the node.
        cluster: The cluster's ID.
        grant: ID of the session's grant.
    """

    principal: str
    roles: tuple[str, ...]
    node: str
    cluster: str
    grant: str


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A service that the session's grant covers."""

    name: str
    interface: str
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GrantInfo:
    """A grant, as its node tells of it.

    Attributes:
        id: 16 hex digits; `revoke` takes it.
        parents: IDs of the grants that it hangs on.
        principal: Whose it is.
        kind: "role", "session", "service", "attenuated", "share", "redeemed" or "adopted".
        label: What it is for.
        service: The service that it was opened for, or "".
        state: "live", "suspended", "closed" (its session is over, what was shared lives), "ended".
        created: Unix time, s.
        expires_at: Unix time, s, or None.
        terms: What it adds to its parents, a line each.
        calls_left: Of its own quota, or None. Likewise `bytes_left` and `uses_left`.
        redeemed: How often a share was redeemed.
        calls_in_flight: Calls that go on under it.
        durable: It outlives its session.
        reason: Why it ended, or "".
    """

    id: str
    parents: tuple[str, ...]
    principal: str
    kind: str
    label: str
    service: str
    state: str
    created: float
    expires_at: float | None
    terms: tuple[str, ...]
    calls_left: int | None
    bytes_left: int | None
    uses_left: int | None
    redeemed: int
    calls_in_flight: int
    durable: bool
    reason: str

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> GrantInfo:
        """From the struct of core.capnp."""
        fields = {
            name: wire[name]
            for name in (
                "id", "principal", "kind", "label", "service", "state", "redeemed",
                "calls_in_flight", "durable", "reason",
            )
        }  # fmt: skip
        for name in ("calls_left", "bytes_left", "uses_left"):
            fields[name] = None if wire[name] < 0 else wire[name]
        return cls(
            **fields,
            parents=tuple(wire["parents"]),
            terms=tuple(wire["terms"]),
            created=wire["created_ms"] / 1000,
            expires_at=wire["expires_at_ms"] / 1000 or None,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One grant on the way from a call to a role; `verdict` is "allows", "denies" or "-"."""

    grant: str
    label: str
    kind: str
    verdict: str
    detail: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What decided a call, or would; see `Session.why`.

    Attributes:
        allowed: Whether it is.
        code: Of the error; "" if it is allowed.
        reason: In words.
        decision: ID of a denial; "" if it was only asked about.
        at: When, Unix time, s.
        principal: Who called.
        grant: ID of the grant that was called.
        method: Of which interface, with the arguments that constraints are about.
        steps: From that grant to a role.
    """

    allowed: bool
    code: str
    reason: str
    decision: str
    at: float
    principal: str
    grant: str
    method: str
    steps: tuple[Step, ...]

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Explanation:
        """From the struct of core.capnp."""
        same = ("allowed", "code", "reason", "decision", "principal", "grant", "method")
        return cls(
            **{name: wire[name] for name in same},
            at=wire["at_ms"] / 1000,
            steps=tuple(Step(**step) for step in wire["steps"]),
        )


Where: TypeAlias = Mapping[str, str] | Iterable[str]
"""Constraints: {"topic": "glob:chat/*"} or ["topic=glob:chat/*"]; docs/reference/constraints.md."""


def terms_to_wire(
    services: Mapping[str, Iterable[str]] | None = None,
    where: Where = (),
    *,
    expires_s: float = 0.0,
    rate: str = "",
    calls: int = 0,
    nbytes: int = 0,
    fence: bytes = b"",
    sealed: bool = False,
) -> dict[str, Any]:
    """The struct Terms of core.capnp; see `Session.attenuate` for the arguments."""
    if isinstance(where, Mapping):
        where = [f"{param}={value}" for param, value in where.items()]
    return {
        "services": [
            {"name": name, "methods": texts(methods)} for name, methods in (services or {}).items()
        ],
        "where": [{"service": "", "text": text} for text in texts(where)],
        "expires_in_s": expires_s,
        "rate": rate,
        "calls": calls,
        "bytes": nbytes,
        "fence": fence,
        "sealed": sealed,
    }


def texts(values: Iterable[str]) -> list[str]:
    """A list of texts; TypeError for one text, whose characters would be taken for them."""
    if isinstance(values, str):
        raise TypeError("expected several texts, e.g. a list, not a str")
    return list(values)


class _SignerServant(rpc.Servant, interface=CORE.Signer):
    """Answers one challenge, if it is from the node that was dialled, on our own connection.

    This comparison is what stops a malicious node from relaying a login to another one; it uses
    only what this end knows, never what the challenge says.
    """

    def __init__(self, login: _Login, verifier: PeerId, channel: Channel) -> None:
        self._login, self._verifier, self._channel = login, verifier, channel
        self._signer: Signer | None = None
        self.failure: WetwareError | None = None
        self.spent = False

    async def sign(self, challenge: dict[str, Any]) -> dict[str, object]:
        """Check, then sign, once: a node that keeps the signer gets nothing more out of it."""
        if self.spent:
            raise AuthError("a signer answers one challenge", code="auth.signer")
        self.spent = True
        try:
            parsed = challenge_from_wire(challenge)
            if parsed.verifier != self._verifier:
                raise AuthError(
                    f"the challenge is from {parsed.verifier}, not from {self._verifier} that was "
                    "dialled: this node may be relaying your login",
                    hint="do not use this node; tell its operator",
                    code="auth.wrong_verifier",
                )
            if parsed.channel != self._channel:
                raise AuthError(
                    "the challenge is bound to another connection than this one: this node may be "
                    "relaying your login",
                    hint="do not use this node; tell its operator",
                    code="auth.wrong_channel",
                )
            self._login.check_cluster(parsed.cluster, self._verifier)
            self._signer = self._login.choose(parsed)
            proof = await self._signer.sign(parsed)
        except WetwareError as exc:
            self.failure = exc
            # Only that it failed: the node need not know paths or key names of this machine.
            raise AuthError("the signer refused", code="auth.signer") from None
        return {"proof": proof_to_wire(proof)}

    def hint(self, status: LoginStatus) -> str:
        """What its kind of user does about a refusal; "" if it does not say."""
        hints: Mapping[LoginStatus, str] = getattr(self._signer, "hints", {})
        return hints.get(status, "")


class _Opening:
    """A service's capability that is opened at its first use; looks like a Ref."""

    def __init__(self, session: Session, name: str, interface: rpc.Interface) -> None:
        self._session, self._name, self.interface = session, name, interface
        self._ref: asyncio.Future[rpc.Ref] | None = None

    async def _open(self) -> rpc.Ref:
        ref = self._ref
        if ref is None or ref.cancelled() or (ref.done() and ref.exception() is not None):
            ref = self._ref = asyncio.ensure_future(self._session.open(self._name, self.interface))
            # Whoever waited may be cancelled meanwhile: then nobody asks how it ended.
            ref.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(ref)

    async def call(self, method: str, /, **params: object) -> Any:
        """Open if need be, then call."""
        return await (await self._open()).call(method, **params)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or method not in self.interface.methods:
            raise AttributeError(f"{self.interface.name} has no method {method!r}")

        async def call(**params: object) -> Any:
            return await self.call(method, **params)

        return call


class Session:
    """A logged-in connection. `session.NAME` is the client of the service NAME.

    Made by `connect`. Ends with its `async with` block, or when the node revokes its grant; from
    then on calls raise Revoked, Expired or Disconnected.

    Attributes:
        identity: Who it speaks as, and where.
        notice: For the person: that the login was the first one there, and pinned a cluster; or "".
    """

    notice = ""

    def __init__(self, ref: rpc.Ref, identity: Identity, login: _Login | None) -> None:
        self._ref, self._login = ref, login
        self._clients: dict[str, Any] = {}
        self.identity = identity

    @property
    def timeout_s(self) -> float | None:
        """How long a call may take before TimedOut, 30 s at first; None: for ever.

        Of its connection, so also for what was attenuated from the session. For some calls alone:
        `with wetware.time_limit(120): …`.
        """
        return self._ref.connection.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float | None) -> None:
        self._ref.connection.timeout_s = seconds

    async def whoami(self) -> Identity:
        """Ask the node who this session is; raises Revoked if it has ended."""
        return _identity(await self._ref.call("whoami"))

    async def services(self) -> tuple[ServiceInfo, ...]:
        """The services that this session may open."""
        reply = await self._ref.call("services")
        return tuple(
            ServiceInfo(s["name"], s["interface"], tuple(s["methods"])) for s in reply["services"]
        )

    async def open(self, name: str, interface: rpc.Interface) -> rpc.Ref:
        """The bootstrap capability of a service.

        Raises Denied if no grant covers it, Unsupported if the node does not have it.
        """
        try:
            reply = await self._ref.call("open", name=name)
        except Unsupported as exc:
            if exc.code == "unsupported.service" and name in _installed():
                exc.hint = (
                    "its plugin is installed here, not running at the node: restart the node, or "
                    f"install it there; {exc.hint}"
                )
            raise
        service: rpc.Ref | None = reply["service"]
        if service is None:
            raise InternalError(f"the node answered without a capability for {name!r}")
        return service.cast(interface)

    async def close(self) -> None:
        """End the session; what was shared from it lives on. Idempotent."""
        with contextlib.suppress(WetwareError):
            await self._ref.call("logout")
        self._ref.close()

    # --- passing parts of it on -------------------------------------------------------------------

    async def attenuate(
        self,
        services: Mapping[str, Iterable[str]] | None = None,
        where: Where = (),
        *,
        expires_s: float = 0.0,
        rate: str = "",
        calls: int = 0,
        nbytes: int = 0,
        fence: bytes = b"",
        sealed: bool = False,
        label: str = "",
    ) -> Session:
        """A weaker session, to hand to other code. It ends with this one, or with `close`.

        Args:
            services: Service → methods ("*", "Interface.*", "Interface.method"; none: all that
                this session has of it). "SERVICE:NAME" is one object of a service, "pubsub:chat".
                None: every service of this session.
            where: Constraints on arguments.
            expires_s: Seconds from now; 0: no end of its own.
            rate: "10/s", "100/m:20"; "" for none.
            calls: How many calls in all; 0: no quota.
            nbytes: How many bytes of payload in all; 0: no quota.
            fence: A fencing token of a lock.
            sealed: It cannot be attenuated or shared further.
            label: What it is for, in `ww grants`.

        Raises Amplification for what this session has not, InvalidArgument for a constraint that
        the service's schema does not know.
        """
        terms = terms_to_wire(
            services, where, expires_s=expires_s, rate=rate, calls=calls, nbytes=nbytes,
            fence=fence, sealed=sealed,
        )  # fmt: skip
        reply = await self._ref.call("attenuate", terms=terms, label=label)
        return await _opened(reply["session"], self._login, PeerId(self.identity.node))

    async def share(
        self,
        services: Mapping[str, Iterable[str]] | None = None,
        where: Where = (),
        *,
        expires_s: float = 86_400.0,
        uses: int = 0,
        rate: str = "",
        calls: int = 0,
        nbytes: int = 0,
        sealed: bool = False,
        label: str = "",
    ) -> tuple[str, GrantInfo]:
        """A sturdy reference `ww1…`: whoever has it may do this, without an account.

        A secret: treat it as a password. It outlives this session; `revoke` with the ID of its
        grant ends it. See `attenuate` for the arguments; `uses` is how often it may be redeemed
        (0: no limit), and `expires_s` 0 is no end.
        """
        terms = terms_to_wire(
            services, where, expires_s=expires_s, rate=rate, calls=calls, nbytes=nbytes,
            sealed=sealed,
        )  # fmt: skip
        reply = await self._ref.call("share", terms=terms, uses=uses, label=label)
        return reply["ref"], GrantInfo.from_wire(reply["grant"])

    async def adopt(self, ref: str) -> Session:
        """Redeem another member's reference through this session's node.

        It works as long as that node hears from the issuer; raises Denied, Revoked, Expired,
        AdmissionRefused, DialError.
        """
        issuer = SturdyRef.parse(ref).peer
        reply = await self._ref.call("adopt", ref=ref)
        return await _opened(reply["session"], None, issuer)

    async def grants(self) -> tuple[GrantInfo, ...]:
        """What was derived from this session, parents first; of a login, from all its roles."""
        reply = await self._ref.call("grants")
        return tuple(GrantInfo.from_wire(wire) for wire in reply["grants"])

    async def revoke(self, grant_id: str, reason: str = "") -> int:
        """End one of `grants` and all below it, now; returns how many ended.

        Raises NotFound for one that is not of this session's.
        """
        reply = await self._ref.call("revoke", id=grant_id, reason=reason)
        cut: int = reply["cut"]
        return cut

    async def why(self, decision: str = "") -> Explanation:
        """What decided a denial; "" is the latest one. Raises NotFound."""
        reply = await self._ref.call("why", decision=decision)
        return Explanation.from_wire(reply["explanation"])

    async def explain(self, service: str, method: str, **args: object) -> Explanation:
        """What would decide a call of "Interface.method" (or a bootstrap "method") now."""
        interface, _, name = method.rpartition(".")
        reply = await self._ref.call(
            "explain",
            service=service,
            interface=interface,
            method=name,
            args=[{"key": key, "value": str(value)} for key, value in args.items()],
        )
        return Explanation.from_wire(reply["explanation"])

    @contextlib.asynccontextmanager
    async def node(
        self, selector: str, *, timeout_s: float = CONNECT_S, direct: bool | None = None
    ) -> AsyncIterator[Session]:
        """Log in to another node of the cluster, with the same key or signer.

        The connection is encrypted end to end, and the login is bound to it: this session's node
        may carry the bytes, and learns nothing from them. Nor does it choose who answers: that is
        the peer that was named, or a member of this session's cluster, by its own signature and its
        certificate, that the selector means by what it signed. Whether it lives, and which of
        several is taken, is the word of this session's node.

        Args:
            selector: Which one: a name, a peer ID, or e.g. "zone=home,service=blob", and of several
                that match this a living one with the least load. See `session.cluster.one`.
            timeout_s: For dialling and logging in together.
            direct: True: dial it from here; False: through a tunnel of this session's node; None:
                dial, and where that fails use the tunnel.

        Raises NotFound where no living member matches, InvalidArgument where a name stands for
        several, AuthError "auth.unproven" where this session's node answers with another node than
        was asked for, and otherwise as `connect`.
        """
        member = await self.cluster.one(selector, signed=True)
        peer, addrs = self._meant(selector, member)
        if peer == self.identity.node:
            yield self
            return
        login = self._login
        if login is None:
            raise Unsupported(
                "a session that comes from a reference cannot log in to other nodes",
                hint="log in with a key of your own",
            )
        async with contextlib.AsyncExitStack() as stack:
            async with _Timeout(timeout_s, f"the node {peer} ({selector})"):
                place = None
                if direct is not False:
                    dial_s = None if direct else min(DIRECT_S_MAX, timeout_s / 2)
                    try:
                        place = await _remote(stack, addrs, peer, timeout_s=dial_s)
                    except OverlayError:
                        if direct:
                            raise
                if place is None:
                    place = await _tunnelled(stack, self, peer)
                session = await login.open(place)
            try:
                yield session
            finally:
                session._ref.close()

    def _meant(self, selector: str, member: Member) -> tuple[PeerId, tuple[str, ...]]:
        """Who is meant, and where that is, without believing the node that answered.

        A peer ID says all: whoever answers at an address has to have it. Any other member has to be
        proven.
        """
        from wetware.membership.proof import prove
        from wetware.membership.selector import is_peer_id

        if is_peer_id(selector):
            return PeerId(selector), member.addrs
        try:
            proven = prove(
                member.record,
                member.founding,
                cluster=self.identity.cluster,
                selector=selector,
                state=member.state,
                now_s=time.time(),
            )
        except WetwareError as exc:
            raise AuthError(
                f"the node {self.identity.node} gave no proof that what it found for {selector!r} "
                f"is that: {exc.message}",
                hint=exc.hint or "do not use this node; tell its operator",
                code="auth.unproven",
            ) from exc
        return proven.peer, proven.record.addrs

    async def status(self, *, details: bool = False) -> dict[str, Any]:
        """What the node is doing: the struct NodeStatus of core.capnp; what is unknown is None.

        Args:
            details: What is for operators, too.
        """
        method = "details" if details else "status"
        reply = await _Opening(self, "node", CORE.Node).call(method)
        status: dict[str, Any] = reply["status"]
        if math.isnan(status["clock_offset_s"]):
            status["clock_offset_s"] = None
        return status

    async def trust_clock(self) -> None:
        """Say that the clock of the node's machine is right, after a glitch; for operators."""
        await _Opening(self, "node", CORE.Node).call("trust_clock")

    async def restart_overlay(self) -> None:
        """End the node's libp2p guest as a crash would; it comes back by itself."""
        await _Opening(self, "node", CORE.Node).call("restart_overlay")

    def __getattr__(self, name: str) -> Any:
        """The client of a service, e.g. `session.pubsub`; opened at its first use."""
        if name.startswith("_"):
            raise AttributeError(name)
        if (client := self._clients.get(name)) is None:
            name = name.removesuffix("_service")  # for one whose name is a method's here: `grants`
            cls = _client_class(name)
            client = self._clients[name] = cls(_Opening(self, name, cls.INTERFACE))
        return client


async def _opened(ref: rpc.Ref | None, login: _Login | None, node: PeerId) -> Session:
    """The session behind a reference, which has to be of the node that was meant."""
    if ref is None:
        raise InternalError("the node answered without a session")
    identity = _identity(await ref.call("whoami"))
    if identity.node != node:
        raise AuthError(
            f"the session is of the node {identity.node[:64]}, not of {node}",
            hint="do not use this node; tell its operator",
            code="auth.wrong_node",
        )
    if login is not None:
        login.check_cluster(identity.cluster, node)
    return Session(ref, identity, login)


def _bundled_first(point: metadata.EntryPoint) -> tuple[bool, str]:
    dist = point.dist.name if point.dist is not None else ""
    return dist != "wetware", dist


@functools.cache  # a look takes milliseconds, and a program may ask for much that is not there
def _installed() -> frozenset[str]:
    """The services that have a client class on this machine."""
    return frozenset(point.name for point in metadata.entry_points(group=CLIENT_GROUP))


def _client_class(name: str) -> Any:
    points = sorted(metadata.entry_points(group=CLIENT_GROUP, name=name), key=_bundled_first)
    if not points:
        known = ", ".join(sorted({p.name for p in metadata.entry_points(group=CLIENT_GROUP)}))
        raise AttributeError(
            f"no client for a service {name!r} is installed here (there are: {known}); "
            f"`session.open({name!r}, INTERFACE)` needs none"
        )
    return points[0].load()


def _identity(reply: dict[str, Any]) -> Identity:
    return Identity(
        reply["principal"],
        tuple(reply["roles"]),
        reply["node"],
        reply["cluster"],
        reply["grant"],
    )


@dataclass(frozen=True, slots=True)
class KeyChoice:
    """Which key a signer shall use.

    Attributes:
        key: A key, a file, the name of a key in `keys_dir`, or None for WW_KEY or "default".
        keys_dir: Where named keys are; None: in the user's home.
        passphrase: Asked if the key is encrypted; None means WW_PASSPHRASE or an error.
    """

    key: Key | Path | str | None
    keys_dir: Path | None
    passphrase: Callable[[], str] | None

    @property
    def chosen(self) -> Key | Path | str:
        """`key`, else what WW_KEY names, else "default"; raises InvalidArgument if empty."""
        if self.key == "":
            raise InvalidArgument(
                "the name of the key is empty", hint="leave it out", code="invalid.empty"
            )
        return self.key if self.key is not None else paths.variable("WW_KEY") or "default"

    @property
    def path(self) -> Path:
        """The key's file; only where `key` is not a Key."""
        chosen = self.chosen
        if isinstance(chosen, Key):
            raise TypeError("the key was given as an object")
        if isinstance(chosen, str) and os.sep not in chosen:
            return (self.keys_dir or paths.keys_dir()) / chosen
        return paths.absolute(chosen, "the key")

    def load(self) -> Key:
        """The key; raises KeyFileError."""
        if isinstance(self.key, Key):
            return self.key
        given = paths.variable("WW_PASSPHRASE")
        passphrase = self.passphrase if given is None else (lambda: str(given))
        try:
            return Key.load(self.path, passphrase=passphrase)
        except KeyFileError as exc:
            if exc.code == "key.missing":
                exc.hint = f"make it with `{self.new_command}`"
            raise

    @property
    def new_command(self) -> str:
        """The command that makes the key; only where `key` is not a Key."""
        name = "" if self.chosen == "default" else f" {shlex.quote(str(self.chosen))}"
        return f"ww key new{name}"


def _chooser(signer: Signer | None, choice: KeyChoice) -> Callable[[Challenge], Signer]:
    def choose(challenge: Challenge) -> Signer:
        if signer is not None:
            return signer
        for scheme in challenge.schemes:
            points = metadata.entry_points(group=SIGNER_GROUP, name=scheme)
            if points:
                made: Signer = sorted(points, key=_bundled_first)[0].load()(choice)
                return made
        raise AuthError(
            f"the node accepts {', '.join(challenge.schemes)}, and no signer for it is installed",
            hint="install the plugin of the node's auth backend, e.g. pip install 'wetware[evm]'",
            code="auth.no_signer",
        )

    return choose


@dataclass(frozen=True, slots=True)
class LocalNode:
    """What a running node says of itself in its data directory (`node.json`, 0600)."""

    peer_id: PeerId
    socket: Path
    pid: int
    cluster: str
    auth: str
    plugins: frozenset[str]

    @classmethod
    def find(cls, data_dir: Path) -> LocalNode:
        """Read it; raises DialError if no node has run there."""
        file = data_dir / paths.RUNTIME_FILE
        try:
            with file.open("rb") as opened:
                owner, text = os.fstat(opened.fileno()).st_uid, opened.read(RUNTIME_BYTES_MAX)
            if owner not in (os.getuid(), 0):
                raise ConfigError(
                    f"{file} belongs to another user", hint="choose your own with --data-dir"
                )
            data = json.loads(text)
            return cls(
                PeerId.parse(data["peer_id"]),
                Path(data["socket"]),
                int(data["pid"]),
                contexts.check_cluster(data["cluster"]),
                str(data["auth"]),
                frozenset(map(str, data["plugins"])),
            )
        except FileNotFoundError:
            raise DialError(
                f"no node is running here (nothing in {data_dir})",
                hint="start one with `ww node`, or name one with --node /ip4/…/p2p/…",
                code="overlay.dial.no_node",
            ) from None
        except (ValueError, KeyError, TypeError, OSError, InvalidArgument) as exc:
            raise ConfigError(f"cannot read {file}: {exc}", hint="restart the node") from exc


_Place: TypeAlias = tuple[rpc.RpcConnection, PeerId, Channel]
"""A connection to a Gate, who is at its other end, and what a login on it is bound to."""


@dataclass(frozen=True, slots=True)
class _Login:
    """How a user logs in, here and at other nodes.

    Attributes:
        choose: The signer for a challenge.
        cluster: The ID of the cluster that is expected; "" before the first login.
        pinned: By what name `contexts` has that; "" at other nodes than the first.
    """

    choose: Callable[[Challenge], Signer]
    cluster: str
    pinned: str = ""

    def check_cluster(self, cluster: str, node: PeerId) -> None:
        """Raise AuthError where a node says that it is of another cluster than is expected."""
        hint = "do not use this node; tell its operator"
        try:
            contexts.check_cluster(cluster)
        except InvalidArgument as exc:
            what = f"names no cluster: {exc.message}"
        else:
            if cluster == (self.cluster or cluster):
                return
            what = f"says that it is of cluster {cluster}, not of {self.cluster}"
            if self.pinned:
                what += ", which was pinned at the first login"
                hint = "ask its operator; if the cluster was founded anew, accept the new one: "
                hint += f"ww context accept {self.pinned} {cluster}"
        raise AuthError(f"the node {node} {what}", hint=hint, code="auth.wrong_cluster")

    async def open(self, place: _Place) -> Session:
        """Log in; raises LoginRefused, or what the signer raised."""
        connection, verifier, channel = place
        signing = _SignerServant(self, verifier, channel)
        gate = connection.bootstrap(CORE.Gate)
        terminal = (await gate.call("terminal"))["terminal"]
        try:
            reply = await terminal.call("login", signer=signing)
        finally:
            signing.spent = True
        status = status_from_name(reply["status"])
        if status is not LoginStatus.GRANTED:
            raise signing.failure or LoginRefused(status, reply["reason"], signing.hint(status))
        connection.timeout_s = CALL_S
        session = await _opened(reply["session"], self, verifier)
        session._login = replace(self, cluster=session.identity.cluster, pinned="")
        return session


async def _redeem(place: _Place, ref: SturdyRef) -> Session:
    """The session that a reference stands for; the place is its issuer's Gate."""
    connection, _, _ = place
    gate = connection.bootstrap(CORE.Gate)
    reply = await gate.call("redeem", id=bytes.fromhex(ref.id), secret=ref.secret)
    connection.timeout_s = CALL_S
    return await _opened(reply["session"], None, ref.peer)


async def _issuer(stack: contextlib.AsyncExitStack, ref: SturdyRef, data_dir: Path) -> _Place:
    """The Gate of a reference's issuer: over the unix socket if it is on this machine."""
    with contextlib.suppress(WetwareError):
        if (node := LocalNode.find(data_dir)).peer_id == ref.peer:
            return await _local(stack, node)
    if not ref.addrs:
        raise DialError(
            f"the reference says nothing of where its node {ref.peer} is",
            hint="use it on the machine of that node",
        )
    return await _remote(stack, map(str, ref.addrs), ref.peer)


async def describe(
    ref: str, *, data_dir: Path | None = None, timeout_s: float = CONNECT_S
) -> GrantInfo:
    """What a sturdy reference would give, without spending a use; raises as `connect` does."""
    parsed = SturdyRef.parse(ref)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(rpc.runtime())
        async with _Timeout(timeout_s, f"the node {parsed.peer}"):
            connection, _, _ = await _issuer(stack, parsed, data_dir or paths.data_dir())
            gate = connection.bootstrap(CORE.Gate)
            reply = await gate.call("describe", id=bytes.fromhex(parsed.id), secret=parsed.secret)
        return GrantInfo.from_wire(reply["grant"])


async def _local(stack: contextlib.AsyncExitStack, node: LocalNode) -> _Place:
    connection = await rpc.connect_unix(node.socket)
    stack.push_async_callback(connection.aclose)
    return connection, node.peer_id, Channel("unix", node.peer_id.multihash)


def peer_in(target: str) -> PeerId:
    """The node that addresses, comma-separated, end at; raises InvalidArgument."""
    from wetware.multiaddr import Multiaddr

    expected = {Multiaddr.parse(part).peer for part in target.split(",")}
    if len(expected) != 1 or (peer := expected.pop()) is None:
        raise InvalidArgument(
            f"{target!r} does not say which node is expected there",
            hint="add /p2p/PEER to the address; `ww id` on the node prints it",
            code="invalid.multiaddr",
        )
    return peer


async def _remote(
    stack: contextlib.AsyncExitStack,
    addrs: Iterable[str],
    peer: PeerId,
    *,
    timeout_s: float | None = None,
) -> _Place:
    """The Gate of `peer`; raises AuthError for addresses that lead to another node."""
    from wetware.link import LinkHost
    from wetware.multiaddr import Multiaddr

    addresses = [Multiaddr.parse(addr) for addr in addrs]
    if any(address.peer != peer for address in addresses):
        raise AuthError(
            f"an address that was given for the node {peer} ends at another one",
            hint="do not use the node that gave it; tell its operator",
            code="auth.wrong_address",
        )
    # A client is no node: its link key is made for this connection and forgotten.
    host = await stack.enter_async_context(LinkHost(Key.generate()))
    link = await host.dial(addresses, peer=peer, timeout_s=timeout_s)
    return await _over_link(stack, link)


async def _tunnelled(stack: contextlib.AsyncExitStack, session: Session, peer: PeerId) -> _Place:
    """The far node's Gate, over a byte tunnel of the session's node."""
    from wetware.link import LinkHost
    from wetware.multiaddr import Multiaddr

    host = await stack.enter_async_context(LinkHost(Key.generate()))
    pipe = await session.cluster.tunnel(peer)
    carrier = Multiaddr("ip4", "127.0.0.1", 0, PeerId(session.identity.node))  # for messages only
    return await _over_link(stack, await host.connect_pipe(pipe, peer, carrier))


async def _over_link(stack: contextlib.AsyncExitStack, link: Connection) -> _Place:
    connection = await rpc.connect(await link.open_stream(GATE_PROTOCOL))
    stack.push_async_callback(connection.aclose)
    return connection, link.peer, Channel("noise", link.channel_binding)


class _Timeout:
    """The time for connecting; unlike `asyncio.timeout` it says what it was for."""

    def __init__(self, seconds: float, target: str) -> None:
        self._seconds, self._target = seconds, target
        self._scope = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._scope.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self._scope.__aexit__(kind, exc, tb)
        except TimeoutError:
            raise DialError(
                f"{self._target} did not answer within {self._seconds:g} s",
                hint="is the node running, and the address right?",
                code="overlay.dial.timeout",
            ) from None


async def _enter(
    stack: contextlib.AsyncExitStack, choose: Callable[[Challenge], Signer], context: Context
) -> Session:
    """Log in at a context's node, or at this machine's if the context names another by a selector.

    The cluster is the one that is pinned, or is pinned now.
    """
    if is_address(context.node):
        peer = peer_in(context.node)
        pinned = context.cluster or contexts.load().clusters.get(peer, "")
        place = await _remote(stack, context.node.split(","), peer)
        name = context.name or peer
    else:
        node = LocalNode.find(_data_dir(context))
        pinned, name = context.cluster or node.cluster, context.name
        place = await _local(stack, node)
    session = await _Login(choose, pinned, name).open(place)
    cluster = session.identity.cluster
    if name and not (context.cluster if context.name else pinned):
        what = f"in the context {name}" if context.name else f"at {name}"
        session.notice = f"first login {what}: from now on the cluster there has to be {cluster}"
        try:
            contexts.update(lambda known: known.pin(name, cluster))
        except ConfigError as exc:
            session.notice = f"the cluster {cluster} {what} is not remembered: {exc.message}"
    return session


def is_address(text: str) -> bool:
    """Whether a text wants to be an address of a node, and not a selector."""
    _, colon, port = text.rpartition(":")
    return text.startswith("/") or (bool(colon) and port.isdecimal())


def _data_dir(context: Context) -> Path:
    return Path(context.data_dir) if context.data_dir else paths.data_dir()


@contextlib.asynccontextmanager
async def connect(
    target: str | None = None,
    *,
    context: Context | str | None = None,
    key: Key | Path | str | None = None,
    signer: Signer | None = None,
    data_dir: Path | None = None,
    passphrase: Callable[[], str] | None = None,
    timeout_s: float = CONNECT_S,
) -> AsyncIterator[Session]:
    """Log in to a node.

    Args:
        target: A multiaddr with the node's peer ID (several, comma-separated, for one node), a
            sturdy reference `ww1…` (then no key is needed), or what `Session.node` takes, a name or
            "zone=cloud": then the login here leads to one there. None for WW_NODE, or else the
            context's node.
        context: Its name, or an object of one's own. None for WW_CONTEXT, or else the one that
            `ww context use` chose; without that, this machine's node.
        key: The user's key: an object, a file, or a name under `~/.wetware/keys`; default
            WW_KEY, the context's, or "default".
        signer: Answers the challenge instead of `key`.
        data_dir: Of this machine's node, instead of the context's node.
        passphrase: Called if the key is encrypted; default: WW_PASSPHRASE. It is called on the
            loop, during the login: where a person has to type, ask beforehand.
        timeout_s: For dialling and logging in together, at each node.

    Raises DialError, LoginRefused (with `.status`), AuthError from the signer, or where the cluster
    is not the pinned one, KeyFileError, NotFound for a context or a node of no such name,
    InvalidArgument for a bad address.
    """
    if target == "":
        raise InvalidArgument(
            "the node's address is empty",
            hint="leave it out for this machine's node",
            code="invalid.empty",
        )
    if context is None:
        target = target or paths.variable("WW_NODE")
    chosen = context if isinstance(context, Context) else contexts.choose(context)
    if key is None:
        key = (chosen.key if context else "") or paths.variable("WW_KEY") or chosen.key or None
    if data_dir is not None:
        chosen = Context(data_dir=str(data_dir))
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(rpc.runtime())
        if target is not None and is_ref(target):
            ref = SturdyRef.parse(target)
            async with _Timeout(timeout_s, f"the node {ref.peer}"):  # never the secret itself
                place = await _issuer(stack, ref, _data_dir(chosen))
                session = await _redeem(place, ref)
        else:
            if target is not None and is_address(target):
                chosen, target = Context(node=target), None
            by_address = is_address(chosen.node)
            goal = target or ("" if by_address else chosen.node)
            choose = _chooser(signer, KeyChoice(key, None, passphrase))
            async with _Timeout(timeout_s, chosen.node if by_address else "the local node"):
                session = await _enter(stack, choose, chosen)
            if goal:
                entry, far = session, session.node(goal, timeout_s=timeout_s)
                session = await stack.enter_async_context(far)
                session.notice = entry.notice
        try:
            yield session
        finally:
            session._ref.close()
