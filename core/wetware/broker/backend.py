"""The auth backends as the broker asks them: a plugin's mistake is named, and never widens.

The one place where a login is decided. The core compares the statement that the signer signed with
the challenge, field by field, so that no backend can forget to; the backend judges the signature
and names the principal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from wetware.base.log import get_logger
from wetware.broker.ports import Accept, NotMine, Reject, RoleProfile
from wetware.broker.values import TIME_MAX
from wetware.broker.where import Where
from wetware.errors import PluginError
from wetware.identity import CHALLENGE_BYTES_MAX, Challenge, LoginStatus, Principal, Proof

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.broker.ports import AuthBackend

log = get_logger("broker")

PAYLOAD_BYTES_MAX = 64 << 10
"""Of a proof: a contract wallet's signature is the largest we know of, a few KiB."""


def compare(issued: Challenge, proof: Proof, now_s: float) -> Reject | None:
    """What is wrong with the statement that was signed, or None if it is the challenge itself.

    The order matters for the reason given: a proof relayed from another connection carries the
    right nonce and the wrong channel; a replayed one another nonce.
    """
    if len(proof.payload) > PAYLOAD_BYTES_MAX or len(proof.signed) > CHALLENGE_BYTES_MAX:
        return Reject(LoginStatus.MALFORMED, "the proof is too large")
    if proof.scheme not in issued.schemes:
        return Reject(
            LoginStatus.UNSUPPORTED_SCHEME,
            f"this node accepts {', '.join(issued.schemes)}, not {proof.scheme[:64]!r}",
        )
    try:
        seen = Challenge.from_signed_bytes(proof.signed)
    except ValueError as exc:
        return Reject(LoginStatus.MALFORMED, f"the signed statement is not a challenge: {exc}")
    if seen.verifier != issued.verifier:
        return Reject(LoginStatus.WRONG_VERIFIER, f"the proof was made for {seen.verifier}")
    if seen.cluster != issued.cluster:
        return Reject(LoginStatus.WRONG_CLUSTER, "the proof was made for another cluster")
    if seen.nonce != issued.nonce:
        return Reject(LoginStatus.REPLAYED, "the proof answers another challenge")
    if seen.channel != issued.channel:
        return Reject(LoginStatus.WRONG_CHANNEL, "the proof was made on another connection")
    if now_s * 1000 > issued.not_after_ms:
        return Reject(LoginStatus.EXPIRED, "the challenge expired before the proof came")
    if seen != issued:
        return Reject(LoginStatus.MALFORMED, "the signed statement is not the challenge")
    return None


class BackendDefect(PluginError):
    """An auth backend gave something that its contract does not allow."""

    code = "plugin.auth"


class CheckedBackend:
    """An auth backend, with all that it says checked."""

    def __init__(self, backend: AuthBackend, clock: Clock) -> None:
        self._backend, self._clock = backend, clock
        self.name, self.watch = backend.name, backend.watch

    @property
    def schemes(self) -> tuple[str, ...]:
        return self._backend.schemes

    @property
    def epoch(self) -> int:
        return self._backend.epoch

    def how_to_accept(self, service: str, proposal: Mapping[str, frozenset[str]]) -> str:
        """What an operator writes where to accept it; "" where `ww role accept` signs it."""
        how: Callable[[str, Mapping[str, frozenset[str]]], str] | None
        how = getattr(self._backend, "how_to_accept", None)
        return "" if how is None else how(service, proposal)

    def roles(self, principal: Principal) -> frozenset[str]:
        """The roles of a principal now; raises BackendDefect."""
        roles = self._backend.roles(principal)
        self._expect(_are_texts(roles), f"roles({principal})", roles, "a frozenset of texts")
        return roles

    def profile(self, role: str) -> RoleProfile:
        """What a role may do now; raises BackendDefect."""
        profile, name = self._backend.profile(role), f"profile({role!r})"
        self._expect(isinstance(profile, RoleProfile), name, profile, "a RoleProfile")
        services, where = profile.services, profile.where
        self._expect(isinstance(services, Mapping), f"{name}.services", services, "a mapping")
        for service, patterns in services.items():
            what = f"{name}.services[{service!r}]"
            self._expect(_are_texts(patterns), what, patterns, "a frozenset of texts")
        are_where = isinstance(where, tuple) and all(isinstance(each, Where) for each in where)
        self._expect(are_where, f"{name}.where", where, "a tuple of Where")
        return profile

    def profile_of(self, principal: Principal, role: str) -> RoleProfile | None:
        """A role as a principal has it now; None if not."""
        return self.profile(role) if role in self.roles(principal) else None

    async def judge(self, challenge: Challenge, proof: Proof) -> Accept | Reject:
        """Decide one proof. Fails closed: an exception of the backend is a refusal."""
        if (wrong := compare(challenge, proof, self._clock.time())) is not None:
            return wrong
        try:
            return await self._ask(challenge, proof)
        except BackendDefect as exc:
            log.error("auth.backend_defect", backend=self.name, why=exc)  # noqa: TRY400  # the message says it all
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, exc.message)
        except Exception:
            log.exception("auth.backend_failed", backend=self.name)
            return Reject(
                LoginStatus.BACKEND_UNAVAILABLE, "the auth backend cannot decide; see its log"
            )

    async def _ask(self, challenge: Challenge, proof: Proof) -> Accept | Reject:
        result = await self._backend.authenticate(challenge, proof)
        match result:
            case Accept():
                return self._checked(result, challenge)
            case Reject(status=status):
                fits = isinstance(status, LoginStatus)
                self._expect(fits, "Reject.status", status, "a LoginStatus")
                granted = status is LoginStatus.GRANTED
                return replace(result, status=LoginStatus.MALFORMED) if granted else result
            case NotMine():
                return Reject(LoginStatus.UNSUPPORTED_SCHEME, "no auth backend knows the proof")
        raise self._defect("authenticate()", result, "Accept, Reject or NotMine")

    def _checked(self, accepted: Accept, challenge: Challenge) -> Accept | Reject:
        """Again after the wait, from memory: a role withdrawn meanwhile is not granted."""
        principal, roles = accepted.principal, accepted.roles
        own = isinstance(principal, Principal) and principal.backend == self.name
        self._expect(own, "Accept.principal", principal, f"a Principal of {self.name!r}")
        self._expect(_are_texts(roles), "Accept.roles", roles, "a frozenset of texts")
        now = roles & self.roles(principal)
        if not now:
            return Reject(LoginStatus.NO_ROLE, f"{principal} has no role in this cluster")
        for role in now:
            self.profile(role)
        if self._clock.time() * 1000 > challenge.not_after_ms:
            return Reject(LoginStatus.EXPIRED, "the challenge expired while it was judged")
        expires_at = accepted.expires_at
        if expires_at is not None:
            if not self._clock.time() < expires_at:  # so that what is no number has expired, too
                return Reject(LoginStatus.EXPIRED, "what the proof rests on has expired")
            expires_at = min(expires_at, TIME_MAX)
        return Accept(principal, now, expires_at)

    def _expect(self, fits: bool, what: str, value: object, wanted: str) -> None:
        if not fits:
            raise self._defect(what, value, wanted)

    def _defect(self, what: str, value: object, wanted: str) -> BackendDefect:
        return BackendDefect(
            f"the auth backend {self.name}: {what} is {repr(value)[:80]}, not {wanted}",
            hint="report it to the authors of the plugin (wetware.hookspecs.AuthBackend)",
        )


class Backends:
    """All auth backends of a node. Each decides about its own users; the first is the authority.

    Raises PluginError where two of them have a name or a scheme in common.
    """

    def __init__(self, backends: Sequence[AuthBackend], clock: Clock) -> None:
        self.all = [CheckedBackend(backend, clock) for backend in backends]
        self.authority = self.all[0]
        # The authority's last: who logged in at another one has said so.
        self.schemes = tuple(scheme for each in reversed(self.all) for scheme in each.schemes)
        self._by_name = {backend.name: backend for backend in self.all}
        self._by_scheme = {scheme: each for each in self.all for scheme in each.schemes}
        if len(self._by_name) < len(self.all) or len(self._by_scheme) < len(self.schemes):
            raise PluginError(
                f"the auth backends {', '.join(each.name for each in self.all)} have a name or a "
                f"proof scheme in common: {', '.join(self.schemes)}",
                hint="leave one of them out of [node] auth and auth_also",
                code="plugin.auth",
            )

    def profile(self, principal: Principal, role: str) -> RoleProfile:
        """What a role may do now, as the backend of its principal has it; raises BackendDefect."""
        return self._by_name[principal.backend].profile(role)

    def profile_of(self, principal: Principal, role: str) -> RoleProfile | None:
        """A role as a principal has it now; None if not, and for a backend that is not here."""
        backend = self._by_name.get(principal.backend)
        return None if backend is None else backend.profile_of(principal, role)

    async def judge(self, challenge: Challenge, proof: Proof) -> Accept | Reject:
        """Decide one proof, by the backend of its scheme: see `CheckedBackend.judge`."""
        backend = self._by_scheme.get(proof.scheme, self.authority)  # which refuses what none knows
        return await backend.judge(challenge, proof)


def _are_texts(value: object) -> bool:
    return isinstance(value, frozenset) and all(isinstance(each, str) for each in value)
