"""The auth backend: who somebody is, by an ID token; what they may do, by its claims.

A token says how things were when it was issued. So as long as somebody is here the provider is
asked again with their access token: whoever it no longer knows is out within `recheck_s`, and so
are groups that its answer no longer has. Where it cannot be asked, nobody is allowed anything after
`unreachable_s` more, until it can be. What is decided is decided from memory.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.errors import InvalidArgument
from wetware.hookspecs import (
    Accept,
    Finding,
    NotMine,
    PluginContext,
    Reject,
    Resumed,
    RoleProfile,
    Service,
    Suspended,
    Withdrawn,
)
from wetware.identity import Challenge, LoginStatus, PeerId, Principal, Proof, verify
from wetware_auth_oidc.config import Role, parse_roles
from wetware_auth_oidc.errors import BadToken, ProviderError
from wetware_auth_oidc.proofs import SCHEME, OidcProof, statement
from wetware_auth_oidc.provider import Provider
from wetware_auth_oidc.tokens import check_access_token, header_of, nonce_of, verified

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware_auth_oidc.config import AuthOidcConfig

LIVE_MAX: Final = 16_384
"""Tokens that are asked about again; somebody who logs in beyond them is refused."""
ASKED_MAX: Final = 16
"""Questions to the provider at a time."""
BINDING_S_MAX: Final = 7 * 24 * 3600.0
"""A key acts for so long after its owner logged in at the provider, by refreshed tokens."""
MARGIN: Final = 0.75
"""Of `recheck_s`: a token is asked about after this, so that the answer is there in time."""

Event = Withdrawn | Suspended | Resumed


@dataclass(slots=True)
class _Token:
    """An access token that somebody came with.

    Attributes:
        text: What the provider is asked with.
        expires_at: Unix time, s, at which the sessions end that it let in.
        good_at: When the provider was last asked and knew it, by the monotonic clock.
    """

    text: str = field(repr=False)
    expires_at: float
    good_at: float


@dataclass(slots=True)
class _Person:
    """Somebody who is here.

    Attributes:
        claims: The provider's latest word about them.
        roles: What they have by these.
        tokens: By a hash of each.
    """

    claims: dict[str, Any] = field(repr=False)
    roles: frozenset[str]
    tokens: dict[bytes, _Token] = field(default_factory=dict)


class OidcBackend:
    """See the module. Raises ConfigError for settings that no cluster can be run with."""

    name = "oidc"
    schemes = (SCHEME,)
    epoch = 1
    services: tuple[Service, ...] = ()
    users = (
        "an account at the provider, in a group that `[plugins.auth_oidc.roles]` names; "
        "`ww auth oidc login` logs in"
    )

    def __init__(self, ctx: PluginContext) -> None:
        self._config: AuthOidcConfig = ctx.config.checked()
        self._roles: dict[str, Role] = parse_roles(self._config.roles)
        self._clock, self._log = ctx.clock, ctx.log
        self._provider = Provider(self._config.issuer, now=ctx.clock.monotonic)
        self._people: dict[Principal, _Person] = {}
        self._count = 0
        self._watchers: dict[object, Callable[[Event], None]] = {}
        self._places = asyncio.Semaphore(ASKED_MAX)
        self._answered_at = float("-inf")
        self._failure = ""
        self._suspended = False

    # --- AuthBackend ------------------------------------------------------------------------------

    @property
    def founding(self) -> bytes:
        """Issuer and client: two clients of one provider are two clusters."""
        return f"oidc:1\n{self._config.issuer}\n{self._config.client_id}".encode()

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Ask again about who is here, until cancelled."""
        task_status.started()
        try:
            while True:
                await self._look_again()
                await anyio.sleep(min(1.0, self._config.recheck_s / 8))
        finally:
            with anyio.CancelScope(shield=True):
                await self._provider.close()

    async def authenticate(self, challenge: Challenge, proof: Proof) -> Accept | Reject | NotMine:
        """By an ID token of the provider that names the key which answers the challenge."""
        if proof.scheme != SCHEME:
            return NotMine()
        try:
            shown = OidcProof.decode(proof.payload)
        except InvalidArgument as exc:
            return Reject(LoginStatus.MALFORMED, exc.message)
        signed = statement(challenge, shown.id_token, shown.bound_token, shown.access_token)
        if not verify(shown.key, shown.answer, signed):
            return Reject(LoginStatus.BAD_SIGNATURE, "the session's key did not sign this")
        if self._suspended:
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, self._failure)
        try:
            return await self._judge(shown)
        except BadToken as exc:
            status = LoginStatus.EXPIRED if exc.late else LoginStatus.UNKNOWN_PRINCIPAL
            return Reject(status, f"the ID token is refused: {exc.message}")
        except ProviderError as exc:
            self._log.warning("auth_oidc.provider_failed", why=exc.message)
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, exc.message)

    async def _judge(self, shown: OidcProof) -> Accept | Reject:
        """By what the tokens say, and the provider; raises BadToken, ProviderError."""
        claims = await self._claims(shown)
        principal = Principal(self.name, claims["sub"])
        person, name = self._people.get(principal), _name(shown.access_token)
        token = None if person is None else person.tokens.get(name)
        if token is None or not self._fresh(token):
            token = _Token(shown.access_token, claims["exp"], 0.0)
            found = await self._ask(principal, token)
            if found is None:
                raise BadToken("the provider no longer knows its owner, or withdrew it", late=True)
            claims |= found
        elif person is not None:
            claims = person.claims  # its own, and what the provider said of them since
        if not (roles := self._roles_by(claims)):
            return Reject(LoginStatus.NO_ROLE, f"{principal} has none of the claims of a role")
        person = self._people.get(principal)  # the provider was waited for
        if (person is None or name not in person.tokens) and self._count >= LIVE_MAX:
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, f"{LIVE_MAX} tokens are live (LIVE_MAX)")
        if person is None:
            person = self._people[principal] = _Person(claims, roles)
        self._count += name not in person.tokens
        person.tokens[name] = token
        self._update(principal, person, claims)
        return Accept(principal, roles, token.expires_at)

    async def _claims(self, shown: OidcProof) -> dict[str, Any]:
        """Of the ID token, which is bound to the key by its own nonce or an earlier one's."""
        client_id, now = self._config.client_id, self._clock.time()
        nonce = nonce_of(shown.key)
        claims = await verified(
            self._provider, shown.id_token, client_id=client_id, nonce=nonce, now=now,
            nonce_needed=not shown.bound_token,
        )  # fmt: skip
        if shown.bound_token:
            bound = await verified(
                self._provider, shown.bound_token, client_id=client_id, nonce=nonce, now=now,
                expired_ok=True,
            )  # fmt: skip
            if bound["sub"] != claims["sub"]:
                raise BadToken("the key is of somebody else")
            if now - bound["iat"] > BINDING_S_MAX:
                raise BadToken("the login at the provider is too long ago", late=True)
        check_access_token(claims, header_of(shown.id_token)["alg"], shown.access_token)
        return claims

    def roles(self, principal: Principal) -> frozenset[str]:
        person = self._people.get(principal)
        if person is None:
            return frozenset()
        now = self._clock.time()
        here = any(token.expires_at > now for token in person.tokens.values())
        return person.roles if here else frozenset()

    def _roles_by(self, claims: Mapping[str, Any]) -> frozenset[str]:
        return frozenset(name for name, role in self._roles.items() if role.has(claims))

    def _update(self, principal: Principal, person: _Person, claims: dict[str, Any]) -> None:
        """Take the provider's latest word, and tell of roles that went."""
        lost = person.roles - (roles := self._roles_by(claims))
        person.claims, person.roles = claims, roles
        if lost:
            why = f"the provider's claims no longer have {', '.join(sorted(lost))}"
            self._withdraw(principal, lost, why)

    def _withdraw(self, principal: Principal, roles: frozenset[str] | None, why: str) -> None:
        self._log.info("auth_oidc.withdrawn", principal=principal, why=why)
        self._tell(Withdrawn(principal, roles, why))

    def profile(self, role: str) -> RoleProfile:
        found = self._roles.get(role)
        return RoleProfile() if found is None else found.profile

    async def join_document(self) -> bytes:
        """Nothing: each node is configured by its operator, and the founding names the provider."""
        return b""

    async def admit_node(self, peer: PeerId) -> bool:
        """No veto: nodes are admitted by the cluster's own means."""
        return True

    def findings(self) -> Iterable[Finding]:
        if self._failure:
            yield Finding(
                "auth_oidc",
                "error" if self._suspended else "warning",
                f"the provider cannot be asked: {self._failure}",
                f"is {self._config.issuer} up, and can this machine reach it?",
            )

    def watch(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        token = object()
        self._watchers[token] = callback
        return lambda: self._watchers.pop(token, None) and None

    # --- asking again -----------------------------------------------------------------------------

    def _fresh(self, token: _Token) -> bool:
        """Whether the provider knew it lately enough for the promise of `recheck_s`."""
        return self._clock.monotonic() - token.good_at < self._config.recheck_s * MARGIN

    def _all(self) -> list[tuple[Principal, bytes, _Token]]:
        people = self._people.items()
        return [(who, name, token) for who, one in people for name, token in one.tokens.items()]

    def _drop(self, principal: Principal, name: bytes) -> None:
        person = self._people[principal]
        if person.tokens.pop(name, None) is not None:
            self._count -= 1
        if not person.tokens:
            del self._people[principal]

    async def _look_again(self) -> None:
        """Ask about each token whose time it is; forget those that have expired."""
        now = self._clock.time()
        for principal, name, token in self._all():
            if token.expires_at <= now:  # its sessions have ended with it
                self._drop(principal, name)
        async with asyncio.TaskGroup() as tasks:
            for principal, name, token in self._all():
                if not self._fresh(token):
                    tasks.create_task(self._look_at(principal, name, token))
        self._say_how_it_is()

    async def _look_at(self, principal: Principal, name: bytes, token: _Token) -> None:
        try:
            found = await self._ask(principal, token)
        except ProviderError as exc:
            self._failure = exc.message
            return
        person = self._people.get(principal)
        if person is None or name not in person.tokens:
            return
        if found is None:
            self._drop(principal, name)
            # Sessions of one person are not told apart: those that are good log in again.
            why = "the provider no longer knows them, or withdrew a token of theirs"
            self._withdraw(principal, None, why)
        else:
            # Some providers leave groups out of this answer: those of the ID token count then.
            self._update(principal, person, person.claims | found)

    async def _ask(self, principal: Principal, token: _Token) -> dict[str, Any] | None:
        """The claims of whose token it is, by the provider; None where it does not know it.

        Raises ProviderError.
        """
        async with self._places:
            asked_at = self._clock.monotonic()
            found = await self._provider.userinfo(token.text)
        self._answered_at = self._clock.monotonic()
        if found is None or found.get("sub") != principal.subject:
            return None
        token.good_at = asked_at
        return found

    def _say_how_it_is(self) -> None:
        """Suspend everything where the provider has been silent for too long; resume it after."""
        now, config = self._clock.monotonic(), self._config
        limit = config.recheck_s + config.unreachable_s
        late = [each for each in self._all() if now - each[2].good_at > limit]
        if now - self._answered_at < config.recheck_s:
            # It answers, and about others: so it is these tokens that nothing is known of.
            for principal, name, _ in late:
                self._drop(principal, name)
                why = f"the provider did not say for {limit:g} s whether it knows them"
                self._withdraw(principal, None, why)
            late = []
        if late and not self._suspended:
            self._suspended = True
            self._log.error("auth_oidc.suspended", why=self._failure)
            self._tell(Suspended(f"the provider cannot be asked: {self._failure}"))
        elif all(self._fresh(token) for _, _, token in self._all()):
            self._failure = ""
            if self._suspended:
                self._suspended = False
                self._log.info("auth_oidc.resumed")
                self._tell(Resumed())

    def _tell(self, event: Event) -> None:
        for callback in tuple(self._watchers.values()):
            callback(event)


def _name(access_token: str) -> bytes:
    return hashlib.sha256(access_token.encode()).digest()
