"""From a connection to a session: Gate → Terminal → login → Session.

The one place where a login is decided. The core compares the statement that the signer signed
with the challenge, field by field, so that no auth backend can forget to; the backend judges the
signature and names the principal; the broker derives the session's grant, last.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wetware import rpc
from wetware.base.bounds import Claim, Places, Rates, address_key
from wetware.base.log import get_logger
from wetware.broker.clock import NOT_YET, Comparison
from wetware.broker.grants import BEARER
from wetware.broker.limits import LoginLimits
from wetware.broker.ports import (
    Accept,
    NotMine,
    Reject,
    Resumed,
    RoleProfile,
    Suspended,
    Withdrawn,
)
from wetware.broker.proposals import ungranted
from wetware.broker.protocol import CORE, challenge_to_wire, proof_from_wire, status_name
from wetware.broker.session import SessionServant
from wetware.broker.tree import UNKNOWN_REF, Tree
from wetware.broker.values import TIME_MAX
from wetware.broker.where import Where
from wetware.errors import (
    CapabilityError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    PluginError,
    Unrecorded,
    WetwareError,
    stopping,
)
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

if TYPE_CHECKING:
    import contextlib

    from wetware.base.clock import Clock
    from wetware.base.multiaddr import Multiaddr
    from wetware.broker.adopt import Adoptions
    from wetware.broker.decisions import Decision
    from wetware.broker.grants import Grant
    from wetware.broker.ports import AuthBackend, Service
    from wetware.broker.proposals import Proposal
    from wetware.broker.records import Records

log = get_logger("broker")

PAYLOAD_BYTES_MAX = 64 << 10
"""Of a proof: a contract wallet's signature is the largest we know of, a few KiB."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one login attempt ended; `principal`, `roles`, `expires_at` only with GRANTED."""

    status: LoginStatus
    reason: str = ""
    principal: Principal | None = None
    roles: frozenset[str] = frozenset()
    expires_at: float | None = None


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


class BackendDefect(PluginError):
    """An auth backend gave something that its contract does not allow."""

    code = "plugin.auth"


def _are_texts(value: object) -> bool:
    return isinstance(value, frozenset) and all(isinstance(each, str) for each in value)


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
        tree: The grants; None: a new tree, which nothing outlives.
    """

    def __init__(
        self,
        *,
        peer_id: PeerId,
        cluster: str,
        backend: AuthBackend,
        services: Mapping[str, Service],
        clock: Clock,
        audit: Records,
        limits: LoginLimits | None = None,
        tree: Tree | None = None,
    ) -> None:
        self.peer_id, self.cluster, self.backend = peer_id, cluster, backend
        self.services = services
        self.clock, self.audit = clock, audit
        self.limits = limits or LoginLimits()
        attempts = self.limits.attempts_per_address_max
        self._attempts = Rates(attempts / 60, attempts, self.limits.addresses_max, clock.monotonic)
        self._places = Places()
        self.tree = tree or Tree(clock)
        self.tree.on_denied = self._denied
        self.tree.services = services
        self._sessions: Counter[Principal] = Counter()
        self._unwatch = backend.watch(self._changed)
        self._closed = False
        self._comparison = Comparison(self.tree.clock, self.tree.limits.clock_skew_s_max)
        self._clock_recorded = False  # as wrong
        self.addrs: Callable[[], Iterable[Multiaddr]] = tuple
        """Where this node can be reached, for sturdy references."""
        self.adoptions: Adoptions | None = None
        """References to other nodes; None where there is no overlay."""
        self.proposals: Mapping[str, Proposal] = {}
        """What each service here proposes for the standard roles; for words alone."""
        self.confirmed: Callable[[], None] = lambda: None
        """Told that an operator has looked at what a crash may have brought back."""
        self.clock_trusted: Callable[[], None] = lambda: None
        """Told that an operator says that the machine's clock is right."""

    def restore(self) -> int:
        """Put back what was shared before the node stopped; the backend can decide by now."""
        return self.tree.restore(self._profile)

    def _profile(self, principal: Principal, role: str) -> RoleProfile | None:
        """A role as a principal has it now; None if not."""
        return self._profile_of(role) if role in self._roles(principal) else None

    # --- what the backend says: a plugin's mistake is named, and never widens or crashes ----------

    def _expect(self, fits: bool, what: str, value: object, wanted: str) -> None:
        if not fits:
            raise BackendDefect(
                f"the auth backend {self.backend.name}: {what} is {repr(value)[:80]}, not {wanted}",
                hint="report it to the authors of the plugin (wetware.hookspecs.AuthBackend)",
            )

    def _roles(self, principal: Principal) -> frozenset[str]:
        roles = self.backend.roles(principal)
        self._expect(_are_texts(roles), f"roles({principal})", roles, "a frozenset of texts")
        return roles

    def _profile_of(self, role: str) -> RoleProfile:
        profile, name = self.backend.profile(role), f"profile({role!r})"
        self._expect(isinstance(profile, RoleProfile), name, profile, "a RoleProfile")
        services, where = profile.services, profile.where
        self._expect(isinstance(services, Mapping), f"{name}.services", services, "a mapping")
        for service, patterns in services.items():
            what = f"{name}.services[{service!r}]"
            self._expect(_are_texts(patterns), what, patterns, "a frozenset of texts")
        are_where = isinstance(where, tuple) and all(isinstance(each, Where) for each in where)
        self._expect(are_where, f"{name}.where", where, "a tuple of Where")
        return profile

    def proposal(self, service: str) -> tuple[Proposal, str]:
        """What a service here proposes for the standard roles, and how an operator accepts it.

        The latter is what to write where, or "" where `ww role accept` signs it. Raises NotFound.
        """
        if service not in self.services:
            raise NotFound(
                f"this node has no service {service[:64]!r}",
                hint=f"it has {', '.join(sorted(self.services))}",
            )
        proposal = self.proposals.get(service, {})
        how: Callable[[str, Proposal], str] | None = getattr(self.backend, "how_to_accept", None)
        return proposal, how(service, proposal) if how is not None else ""

    def ungranted(self) -> list[str]:
        """The services of this node of which `is_ungranted` is true."""
        return sorted(filter(self.is_ungranted, self.services))

    def is_ungranted(self, service: str) -> bool:
        """Whether a service of this node proposes something that no operator has accepted."""
        proposal = self.proposals.get(service, {}) if service in self.services else {}
        return ungranted(service, proposal, self._profile_of)

    def judge_clock(self, others_ahead_s: float | None, *, alone: bool) -> None:
        """Refuse grants with an end while this node's clock cannot judge it.

        Args:
            others_ahead_s: By how much the other members' clocks are ahead; None if unknown.
            alone: Whether there is no other member.
        """
        why, tree = self._comparison.judge(others_ahead_s, alone=alone), self.tree
        tree.clock_wrong = why
        wrong = bool(why) and why != NOT_YET
        if wrong != self._clock_recorded and (wrong or not why):
            self._clock_recorded = wrong
            self.audit.record("clock.wrong" if wrong else "clock.right", reason=why)

    async def trust_clock(
        self, others_ahead_s: Callable[[], float | None], principal: Principal
    ) -> None:
        """Take the machine's clock as right, on an operator's word; what was later was a glitch.

        Args:
            others_ahead_s: By how much the other members' clocks, as measured, are ahead now.
            principal: The operator.

        Raises InvalidArgument where the other members' clocks say that it is wrong,
        Unrecorded where it cannot be recorded, and StoreUnavailable where a restart would
        bring the later time back.
        """
        tree = self.tree
        self._refuse_other_clock(others_ahead_s())
        back_s = round(tree.clock.ahead_s, 1)
        await self.audit.admit("clock.trusted", principal=principal, set_back_s=back_s)
        self._refuse_other_clock(others_ahead_s())  # to record it may have taken a while
        self.clock_trusted()
        self._comparison.trust()
        tree.clock_wrong = ""
        if tree.store is not None:
            await tree.store.save_clock()

    def _refuse_other_clock(self, ahead_s: float | None) -> None:
        if ahead_s is not None and abs(ahead_s) > self.tree.limits.clock_skew_s_max:
            raise InvalidArgument(
                f"the other members' clocks are {ahead_s:+.0f} s from this node's",
                hint="set the machine's clock first: `timedatectl set-ntp true`",
                code="invalid.clock",
            )

    def close(self) -> None:
        """End every session and admit no other; the node is stopping. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.tree.close()
        try:
            self._unwatch()
        except Exception:  # what ended the node, maybe the backend itself, is not hidden by it
            log.exception("auth.backend_failed", backend=self.backend.name)

    @property
    def sessions(self) -> int:
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
            return await self._ask_backend(challenge, proof)
        except BackendDefect as exc:
            log.error("auth.backend_defect", backend=self.backend.name, why=exc)  # noqa: TRY400  # the message says it all
            return Verdict(LoginStatus.BACKEND_UNAVAILABLE, exc.message)
        except Exception:
            log.exception("auth.backend_failed", backend=self.backend.name)
            return Verdict(
                LoginStatus.BACKEND_UNAVAILABLE, "the auth backend cannot decide; see its log"
            )

    async def _ask_backend(self, challenge: Challenge, proof: Proof) -> Verdict:
        result = await self.backend.authenticate(challenge, proof)
        match result:
            case Accept(principal=principal, roles=roles, expires_at=expires_at):
                pass
            case Reject(status=status, reason=reason):
                fits = isinstance(status, LoginStatus)
                self._expect(fits, "Reject.status", status, "a LoginStatus")
                refused = LoginStatus.MALFORMED if status is LoginStatus.GRANTED else status
                return Verdict(refused, reason)
            case NotMine():
                return Verdict(LoginStatus.UNSUPPORTED_SCHEME, "no auth backend knows the proof")
        wanted = "Accept, Reject or NotMine"
        self._expect(isinstance(result, Accept), "authenticate()", result, wanted)
        self._expect(isinstance(principal, Principal), "Accept.principal", principal, "a Principal")
        self._expect(_are_texts(roles), "Accept.roles", roles, "a frozenset of texts")
        # Re-checked after the await, from memory: a role withdrawn meanwhile is not granted.
        now = roles & self._roles(principal)
        if not now:
            return Verdict(LoginStatus.NO_ROLE, f"{principal} has no role in this cluster")
        for role in now:
            self._profile_of(role)
        if self.clock.time() * 1000 > challenge.not_after_ms:
            return Verdict(LoginStatus.EXPIRED, "the challenge expired while it was judged")
        if expires_at is not None:
            if not self.clock.time() < expires_at:  # so that what is no number has expired, too
                return Verdict(LoginStatus.EXPIRED, "what the proof rests on has expired")
            expires_at = min(expires_at, TIME_MAX)
        return Verdict(LoginStatus.GRANTED, "", principal, now, expires_at)

    def open_session(
        self,
        principal: Principal,
        roles: Iterable[str],
        *,
        expires_at: float | None = None,
        local: bool = False,
    ) -> Grant:
        """The grant of a new session. Synchronous: nothing can change between verdict and grant.

        Args:
            principal: Who logged in.
            roles: By which roles.
            expires_at: When it ends by itself, Unix s; None: with its connection only.
            local: Over the unix socket, for which a part of the sessions is reserved.

        Raises LimitExceeded, or Disconnected while the node stops.
        """
        self._check_place(principal, local=local)
        roots = [self.tree.root(principal, role, self._profile_of(role)) for role in sorted(roles)]
        return self._count_session(self.tree.session(principal, roots, expires_at=expires_at))

    def _check_place(self, principal: Principal, *, local: bool) -> None:
        """Raise LimitExceeded if there is no place for a session, Disconnected while stopping."""
        if self._closed:
            raise stopping()
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

    async def redeem(self, share_id: str, secret: bytes, channel: str, *, local: bool) -> Grant:
        """The grant of a session that comes from a sturdy reference, recorded first.

        Raises as `Tree.redeem` does, LimitExceeded and Disconnected.
        """
        bearer = Principal(BEARER, share_id)
        self._check_place(bearer, local=local)

        async def admit(grant: Grant) -> None:
            await self.audit.admit(
                "share.redeemed", share=share_id, grant=grant.id, channel=channel
            )

        try:
            grant = await self.tree.redeem(share_id, secret, admit=admit)
        except WetwareError as exc:
            # Who has no secret can choose the ID: it is not a key of the aggregation.
            known = share_id if exc.code != UNKNOWN_REF else ""
            self.audit.denied("share.refused", key=(exc.code, known), code=exc.code, share=known)
            raise
        try:
            self._check_place(bearer, local=local)  # asked again after the wait
        except BaseException:
            grant.close("there is no place for it")
            raise
        return self._count_session(grant)

    def _count_session(self, grant: Grant) -> Grant:
        """A grant that takes a place among the sessions until it ends."""
        principal = grant.principal
        self._sessions[principal] += 1
        grant.on_end(lambda _: self._session_ended(principal), holds=False)
        return grant

    def _session_ended(self, principal: Principal) -> None:
        self._sessions[principal] -= 1
        if self._sessions[principal] <= 0:
            del self._sessions[principal]

    def _changed(self, event: Withdrawn | Suspended | Resumed) -> None:
        """What the backend says takes effect now; the record follows."""
        match event:
            case Withdrawn(principal=principal, roles=roles, reason=reason):
                cut = self.tree.withdraw(principal, roles, reason)
                self.audit.ended(
                    "role.withdrawn",
                    principal=principal or "*",
                    roles=",".join(sorted(roles)) if roles is not None else "*",
                    cut=cut,
                    reason=reason,
                )
            case Suspended(reason=reason):
                self.tree.suspended = CapabilityError(
                    f"every capability of this node is suspended: {reason}",
                    hint="wait until the node's auth backend can decide again; `ww doctor`",
                    code="capability.suspended",
                )
                self.audit.ended("grants.suspended", reason=reason)
            case Resumed():
                self.tree.suspended = None
                self.audit.record("grants.resumed")

    def _denied(self, grant: Grant, method: rpc.Method, explanation: Decision) -> None:
        """A call was denied: one record for each grant, method and code, then their number."""
        called = f"{method.interface.name}.{method.name}"
        self.audit.denied(
            "call.denied",
            key=(grant.id, called, explanation.code),
            principal=grant.principal,
            grant=grant.id,
            method=called,
            code=explanation.code,
            reason=explanation.reason,
            decision=explanation.decision,
        )


class GateServant(rpc.Servant, interface=CORE.Gate):
    """See core.capnp."""

    def __init__(self, broker: Broker, channel: Channel, address: str | None) -> None:
        self._broker, self._channel, self._address = broker, channel, address
        self._terminals = 0

    async def terminal(self) -> dict[str, object]:
        """A fresh Terminal, bounded per connection and address."""
        self._count()
        return {"terminal": TerminalServant(self._broker, self._channel, self._address)}

    async def redeem(self, id: bytes, secret: bytes) -> dict[str, object]:
        """A session with what a sturdy reference stands for."""
        self._count()
        broker, local = self._broker, self._address is None
        async with asyncio.timeout(broker.limits.deadline_s):
            grant = await broker.redeem(id.hex()[:32], secret, self._channel.kind, local=local)
        self._give_back()
        rpc.current_connection().trust()
        session = SessionServant(broker, grant, frozenset())
        return {"session": rpc.guarded(session, grant), "grant": grant.info()}

    async def describe(self, id: bytes, secret: bytes) -> dict[str, object]:
        self._count()
        grant = self._broker.tree.peek(id.hex()[:32], secret)
        self._give_back()
        return {"grant": grant.info()}

    def _give_back(self) -> None:
        """An attempt that was right does not count."""
        self._terminals -= 1
        if self._address is not None:
            self._broker._attempts.give_back(self._address)

    def _count(self) -> None:
        """One attempt; raises LimitExceeded."""
        limit = self._broker.limits.terminals_per_connection_max
        if self._terminals >= limit:
            raise LimitExceeded(
                f"{limit} login attempts on one connection (terminals_per_connection_max)",
                hint="connect again",
            )
        if self._address is not None:
            self._broker._count_attempt(self._address)
        self._terminals += 1


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
            grant = broker.open_session(
                verdict.principal, verdict.roles, expires_at=verdict.expires_at, local=local
            )
        except LimitExceeded as exc:
            self._refused("limit", exc.message)
            raise
        if self._address is not None:
            broker._attempts.give_back(self._address)
        record = functools.partial(
            broker.audit.admit,
            "login.granted",
            principal=verdict.principal,
            roles=",".join(sorted(verdict.roles)),
            grant=grant.id,
            channel=self._channel.kind,
            took_ms=took_ms,
        )
        record_login = None
        try:
            try:
                await record()
            except Unrecorded:
                # No log keeps anybody from ending things. What gives something is recorded first,
                # and the login before it: the session sees to that.
                record_login = record
                who = verdict.principal
                broker.audit.denied("login.unrecorded", key=who, principal=who, grant=grant.id)
            grant.check_live()  # a role withdrawn meanwhile has ended it
        except BaseException:
            grant.close("the login could not be recorded")
            raise
        rpc.current_connection().trust()
        session = SessionServant(broker, grant, verdict.roles, record_login)
        return {
            "status": status_name(LoginStatus.GRANTED),
            "reason": "",
            "session": rpc.guarded(session, grant),
        }

    def _refused(self, status: str, reason: str) -> None:
        # From a stranger: counted by what was wrong, so that nobody can fill the disk.
        self._broker.audit.denied(
            "login.refused",
            key=(status, self._channel.kind),
            status=status,
            reason=reason,
            channel=self._channel.kind,
        )

    async def _attempt(self, challenge: Challenge, signer: rpc.Ref) -> Verdict:
        try:
            reply = await signer.call("sign", challenge=challenge_to_wire(challenge))
        except WetwareError as exc:
            return Verdict(LoginStatus.SIGNER_FAILED, exc.message[:256])
        return await self._broker.judge(challenge, proof_from_wire(reply["proof"]))


def _refusal(status: LoginStatus, reason: str) -> dict[str, object]:
    return {"status": status_name(status), "reason": reason}
