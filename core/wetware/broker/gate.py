"""From a connection to a session: Gate → Terminal → login → Session.

The one place where a login is decided. The core compares the statement that the signer signed
with the challenge, field by field, so that no auth backend can forget to; the backend judges the
signature and names the principal; the broker derives the session's grant, last.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wetware import rpc
from wetware.bounds import Claim, Places, Rates, address_key
from wetware.broker.grants import Grant
from wetware.broker.limits import LoginLimits
from wetware.errors import (
    Denied,
    Disconnected,
    LimitExceeded,
    Unsupported,
    WetwareError,
)
from wetware.hookspecs import Accept, NotMine, Reject, Withdrawn
from wetware.identity import (
    CHALLENGE_BYTES_MAX,
    NONCE_BYTES,
    Challenge,
    Channel,
    LoginStatus,
    PeerId,
    Principal,
    Proof,
)
from wetware.log import get_logger
from wetware.protocol import CORE, challenge_to_wire, proof_from_wire, status_name

if TYPE_CHECKING:
    import contextlib

    from wetware.audit import Audit
    from wetware.hookspecs import AuthBackend, Clock, Service

log = get_logger("broker")

PAYLOAD_BYTES_MAX = 64 << 10
"""Of a proof: a contract wallet's signature is the largest we know of, a few KiB."""
SESSION_SERVICE = "session"
"""Reserved: the name under which a session's grant covers the Session interface itself."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one login attempt ended; `principal` and `roles` only with GRANTED."""

    status: LoginStatus
    reason: str = ""
    principal: Principal | None = None
    roles: frozenset[str] = frozenset()


def compare(issued: Challenge, proof: Proof, now_s: float) -> Verdict | None:
    """What is wrong with the statement that was signed, or None if it is the challenge itself.

    The order matters for the reason given: a proof relayed from another connection carries the
    right nonce and the wrong channel; a replayed one another nonce.
    """
    if len(proof.payload) > PAYLOAD_BYTES_MAX or len(proof.signed) > CHALLENGE_BYTES_MAX:
        return Verdict(LoginStatus.MALFORMED, "the proof is too large")
    if proof.scheme not in issued.schemes:
        return Verdict(
            LoginStatus.UNSUPPORTED_SCHEME,
            f"this node accepts {', '.join(issued.schemes)}, not {proof.scheme[:64]!r}",
        )
    try:
        seen = Challenge.from_signed_bytes(proof.signed)
    except ValueError as exc:
        return Verdict(LoginStatus.MALFORMED, f"the signed statement is not a challenge: {exc}")
    if seen.verifier != issued.verifier:
        return Verdict(LoginStatus.WRONG_VERIFIER, f"the proof was made for {seen.verifier}")
    if seen.cluster != issued.cluster:
        return Verdict(LoginStatus.WRONG_CLUSTER, "the proof was made for another cluster")
    if seen.nonce != issued.nonce:
        return Verdict(LoginStatus.REPLAYED, "the proof answers another challenge")
    if seen.channel != issued.channel:
        return Verdict(LoginStatus.WRONG_CHANNEL, "the proof was made on another connection")
    if now_s * 1000 > issued.not_after_ms:
        return Verdict(LoginStatus.EXPIRED, "the challenge expired before the proof came")
    if seen != issued:
        return Verdict(LoginStatus.MALFORMED, "the signed statement is not the challenge")
    return None


class Broker:
    """Turns proofs into sessions, and ends them.

    Args:
        peer_id: This node.
        cluster: The cluster's ID.
        backend: Decides who a proof is from.
        services: What sessions can open, by name.
        clock: Judges expiry.
        audit: Where decisions are recorded.
        limits: Bounds.
    """

    def __init__(
        self,
        *,
        peer_id: PeerId,
        cluster: str,
        backend: AuthBackend,
        services: Mapping[str, Service],
        clock: Clock,
        audit: Audit,
        limits: LoginLimits | None = None,
    ) -> None:
        self.peer_id, self.cluster, self.backend = peer_id, cluster, backend
        self.services = services
        self.clock, self.audit = clock, audit
        self.limits = limits or LoginLimits()
        attempts = self.limits.attempts_per_address_max
        self._attempts = Rates(attempts / 60, attempts, self.limits.addresses_max, clock.monotonic)
        self._places = Places()
        self._roots: dict[Principal, dict[str, list[Grant]]] = {}
        self._sessions: Counter[Principal] = Counter()
        self._unwatch = backend.watch(self._withdrawn)
        self._closed = False

    def close(self) -> None:
        """End every session and admit no other; the node is stopping. Idempotent."""
        self._closed = True
        self._unwatch()
        roots = [root for roles in self._roots.values() for some in roles.values() for root in some]
        self._roots.clear()
        for root in roots:
            root.revoke("the node is stopping")

    @property
    def sessions(self) -> int:
        """Live sessions."""
        return self._sessions.total()

    def gate(self, channel: Channel, address: str | None) -> GateServant:
        """The bootstrap object of one connection; `address` is None on the unix socket."""
        return GateServant(self, channel, None if address is None else address_key(address))

    def gate_slot(
        self, connection: object, address: str
    ) -> contextlib.AbstractContextManager[None]:
        """A place for one RPC stream from the network; entering it raises LimitExceeded."""
        limits, address = self.limits, address_key(address)
        return self._places.hold(
            *(
                Claim(key, limit, f"{limit} connections to the Gate are open (gates_{name}max)")
                for key, limit, name in (
                    (id(connection), limits.gates_per_connection_max, "per_connection_"),
                    (address, limits.gates_per_address_max, "per_address_"),
                    ("all", limits.gates_max, ""),
                )
            )
        )

    def _count_attempt(self, address: str) -> None:
        """One attempt to log in from an address; raises LimitExceeded."""
        if not self._attempts.take(address):
            raise LimitExceeded(
                f"more than {self.limits.attempts_per_address_max} failed login attempts a minute "
                f"from {address} (attempts_per_address_max)",
                hint="wait a minute",
            )

    # --- the decision -----------------------------------------------------------------------------

    async def judge(self, challenge: Challenge, proof: Proof) -> Verdict:
        """Decide one proof. Fails closed: an exception of the backend is a refusal."""
        if (wrong := compare(challenge, proof, self.clock.time())) is not None:
            return wrong
        try:
            result = await self.backend.authenticate(challenge, proof)
        except Exception:
            log.exception("auth.backend_failed", backend=self.backend.name)
            return Verdict(
                LoginStatus.BACKEND_UNAVAILABLE, "the auth backend cannot decide; see its log"
            )
        match result:
            case Accept(principal=principal, roles=roles):
                pass
            case Reject(status=status, reason=reason):
                refused = LoginStatus.MALFORMED if status is LoginStatus.GRANTED else status
                return Verdict(refused, reason)
            case NotMine():
                return Verdict(LoginStatus.UNSUPPORTED_SCHEME, "no auth backend knows the proof")
        # Re-checked after the await, from memory: a role withdrawn meanwhile is not granted.
        now = roles & self.backend.roles(principal)
        if not now:
            return Verdict(LoginStatus.NO_ROLE, f"{principal} has no role in this cluster")
        if self.clock.time() * 1000 > challenge.not_after_ms:
            return Verdict(LoginStatus.EXPIRED, "the challenge expired while it was judged")
        return Verdict(LoginStatus.GRANTED, "", principal, now)

    def open_session(
        self, principal: Principal, roles: Iterable[str], *, local: bool = False
    ) -> Grant:
        """The grant of a new session. Synchronous: nothing can change between verdict and grant.

        Args:
            principal: Who logged in.
            roles: By which roles.
            local: Over the unix socket, for which a part of the sessions is reserved.

        Raises LimitExceeded, or Disconnected while the node stops.
        """
        if self._closed:
            raise Disconnected("the node is stopping")
        limits = self.limits
        reserved = 0 if local else min(limits.sessions_local_reserved, limits.sessions_max // 2)
        sessions_max = limits.sessions_max - reserved
        if self.sessions >= sessions_max:
            raise LimitExceeded(f"{sessions_max} sessions are live (sessions_max)")
        if self._sessions[principal] >= limits.sessions_per_principal_max:
            raise LimitExceeded(
                f"{principal} has {self._sessions[principal]} live sessions "
                "(sessions_per_principal_max)",
                hint="close some",
            )
        services: dict[str, frozenset[str]] = {SESSION_SERVICE: frozenset({"Session.*"})}
        roots = []
        mine = self._roots.setdefault(principal, {})
        for role in sorted(roles):
            profile = self.backend.profile(role).services
            # A role that was widened since has a second root: the sessions under the first keep
            # what they were granted, and both are found when the role is withdrawn.
            known = mine.setdefault(role, [])
            root = next((root for root in known if root.services == profile), None)
            if root is None:
                root = Grant(principal, profile, clock=self.clock, label=f"role {role}")
                known.append(root)
            roots.append(root)
            for name, patterns in profile.items():
                services[name] = services.get(name, frozenset()) | patterns
        grant = Grant(
            principal,
            services,
            clock=self.clock,
            label="session",
            parents=tuple(roots),
            service=SESSION_SERVICE,
        )
        self._sessions[principal] += 1
        grant.on_end(lambda _: self._session_ended(principal))
        return grant

    def _session_ended(self, principal: Principal) -> None:
        self._sessions[principal] -= 1
        if self._sessions[principal] <= 0:
            del self._sessions[principal]
        roles = self._roots.get(principal, {})
        for role in tuple(roles):
            roles[role] = [root for root in roles[role] if root.children]
            if not roles[role]:
                del roles[role]
        if not roles:
            self._roots.pop(principal, None)

    def _withdrawn(self, event: Withdrawn) -> None:
        """Cut what a withdrawal covers, now; the record follows the effect."""
        cut = 0
        principals = tuple(self._roots) if event.principal is None else (event.principal,)
        for principal in principals:
            held = self._roots.get(principal, {})
            for role in tuple(held) if event.roles is None else tuple(event.roles & held.keys()):
                for root in held.pop(role, ()):
                    cut += len(root.children)
                    root.revoke(event.reason or f"role {role} was withdrawn from {principal}")
        self.audit.record(
            "role.withdrawn",
            principal=event.principal or "*",
            roles=",".join(sorted(event.roles)) if event.roles is not None else "*",
            cut=cut,
            reason=event.reason,
        )


class GateServant(rpc.Servant, interface=CORE.Gate):
    """See core.capnp."""

    def __init__(self, broker: Broker, channel: Channel, address: str | None) -> None:
        self._broker, self._channel, self._address = broker, channel, address
        self._terminals = 0

    async def terminal(self) -> dict[str, object]:
        """A fresh Terminal, bounded per connection and address."""
        limit = self._broker.limits.terminals_per_connection_max
        if self._terminals >= limit:
            raise LimitExceeded(
                f"{limit} login attempts on one connection (terminals_per_connection_max)",
                hint="connect again",
            )
        if self._address is not None:
            self._broker._count_attempt(self._address)
        self._terminals += 1
        return {"terminal": TerminalServant(self._broker, self._channel, self._address)}


class TerminalServant(rpc.Servant, interface=CORE.Terminal):
    """See core.capnp."""

    def __init__(self, broker: Broker, channel: Channel, address: str | None) -> None:
        self._broker, self._channel, self._address = broker, channel, address
        self._used = False

    async def login(self, signer: rpc.Ref | None) -> dict[str, object]:
        """Challenge, judge, and only then make the session."""
        broker = self._broker
        if self._used:
            return _refusal(LoginStatus.TOO_MANY_TRIES, "a Terminal serves one attempt")
        self._used = True
        if signer is None:
            return _refusal(LoginStatus.MALFORMED, "no signer was given")
        deadline_s = broker.limits.deadline_s
        challenge = Challenge(
            nonce=secrets.token_bytes(NONCE_BYTES),
            verifier=broker.peer_id,
            cluster=broker.cluster,
            channel=self._channel,
            schemes=broker.backend.schemes,
            policy_epoch=broker.backend.epoch,
            not_after_ms=int((broker.clock.time() + deadline_s) * 1000),
        )
        started = time.perf_counter()
        try:
            async with asyncio.timeout(deadline_s):
                verdict = await self._attempt(challenge, signer)
        except TimeoutError:
            verdict = Verdict(LoginStatus.EXPIRED, f"no proof within {deadline_s:g} s (deadline_s)")
        took_ms = round((time.perf_counter() - started) * 1000, 2)
        if verdict.status is not LoginStatus.GRANTED or verdict.principal is None:
            self._refused(status_name(verdict.status), verdict.reason)
            return _refusal(verdict.status, verdict.reason)
        local = self._address is None
        try:
            grant = broker.open_session(verdict.principal, verdict.roles, local=local)
        except LimitExceeded as exc:
            self._refused("limit", exc.message)
            raise
        if self._address is not None:
            broker._attempts.give_back(self._address)
        try:
            broker.audit.record(
                "login.granted",
                principal=verdict.principal,
                roles=",".join(sorted(verdict.roles)),
                grant=grant.id,
                channel=self._channel.kind,
                took_ms=took_ms,
            )
        except Exception:  # what cannot be recorded is not granted
            grant.revoke("the login could not be recorded")
            raise
        rpc.current_connection().trust()
        session = SessionServant(broker, grant, verdict.principal, verdict.roles)
        return {
            "status": status_name(LoginStatus.GRANTED),
            "reason": "",
            "session": rpc.guarded(session, grant),
        }

    def _refused(self, status: str, reason: str) -> None:
        self._broker.audit.record(
            "login.refused", status=status, reason=reason, channel=self._channel.kind
        )

    async def _attempt(self, challenge: Challenge, signer: rpc.Ref) -> Verdict:
        try:
            reply = await signer.call("sign", challenge=challenge_to_wire(challenge))
        except WetwareError as exc:
            return Verdict(LoginStatus.SIGNER_FAILED, exc.message[:256])
        return await self._broker.judge(challenge, proof_from_wire(reply["proof"]))


def _refusal(status: LoginStatus, reason: str) -> dict[str, object]:
    return {"status": status_name(status), "reason": reason}


class SessionServant(rpc.Servant, interface=CORE.Session):
    """See core.capnp."""

    def __init__(
        self, broker: Broker, grant: Grant, principal: Principal, roles: frozenset[str]
    ) -> None:
        self._broker, self._grant = broker, grant
        self._principal, self._roles = principal, roles
        self._opened: dict[str, Grant] = {}

    async def whoami(self) -> dict[str, object]:
        """The session's principal."""
        return {
            "principal": str(self._principal),
            "roles": sorted(self._roles),
            "node": str(self._broker.peer_id),
            "cluster": self._broker.cluster,
            "grant": self._grant.id,
        }

    async def services(self) -> dict[str, object]:
        """The services that the grant covers."""
        return {
            "services": [
                {"name": name, "interface": service.interface.name, "methods": sorted(patterns)}
                for name, service in sorted(self._broker.services.items())
                if (patterns := self._grant.patterns(name))
            ]
        }

    async def open(self, name: str) -> dict[str, object]:
        """A service's bootstrap capability under a grant of its own."""
        if name == SESSION_SERVICE or not self._grant.patterns(name):
            self._broker.audit.record("open.refused", grant=self._grant.id, service=name[:64])
            raise Denied(
                f"no grant of {self._principal} covers a service {name[:64]!r}",
                hint="`ww whoami` shows what your roles cover",
            )
        service = self._broker.services.get(name)
        if service is None:
            have = ", ".join(sorted(self._broker.services)) or "none"
            raise Unsupported(
                f"this node has no service {name[:64]!r}; it has {have}",
                hint="`ww plugin list` on the node says why a plugin is not loaded",
                code="unsupported.service",
            )
        grant = self._opened.get(name)
        if grant is None or grant.ended is not None:
            grant = self._opened[name] = self._grant.derive(label=f"service {name}", service=name)
            self._broker.audit.record(
                "service.opened", grant=grant.id, parent=self._grant.id, service=name
            )
        return {"service": rpc.guarded(service.bootstrap(self._principal), grant)}

    async def logout(self) -> None:
        """End the session. Runs under the grant it ends, so the end comes right after the reply."""
        asyncio.get_running_loop().call_soon(self._grant.revoke, "logged out")

    def released(self) -> None:
        """The client let go, or its connection ended."""
        self._grant.revoke("the session was closed")
