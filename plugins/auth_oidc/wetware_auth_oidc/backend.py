"""The auth backend: who somebody is, by an ID token; what they may do, by its claims.

Service accounts have no ID token: theirs names the session's key by itself, or this node. Nobody
can be asked about them, so their sessions are as long as the token is good.

A token says how things were when it was issued. So as long as somebody is here the provider is
asked again with their access token: whoever it no longer knows is out within `recheck_s`, and so
are groups that its answer no longer has. Where it cannot be asked, nobody is allowed anything after
`unreachable_s` more, until it can be. What is decided is decided from memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base.watchers import Watchers
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
from wetware_auth_oidc.config import CLIENT, Role, parse_roles
from wetware_auth_oidc.errors import BadToken, ProviderError
from wetware_auth_oidc.proofs import SCHEME, OidcProof, statement
from wetware_auth_oidc.provider import Provider
from wetware_auth_oidc.tokens import (
    SERVICE_S_MAX,
    check_access_token,
    nonce_of,
    part_of,
    verified,
    verified_service,
)

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware_auth_oidc.config import AuthOidcConfig

LIVE_MAX: Final = 16_384
"""Sessions' keys that are here; somebody who logs in beyond them is refused."""
KEYS_MAX: Final = 16
"""Of one person: machines and terminals. One more takes the place of the one shown least lately."""
ASKED_MAX: Final = 16
"""Questions to the provider at a time: for logins so many, and so many for asking again."""
NAMES_MAX: Final = 256
BINDING_S_MAX: Final = 7 * 24 * 3600.0
"""A key acts for so long after its owner logged in at the provider, by refreshed tokens."""
MARGIN: Final = 0.75
"""Of `recheck_s`: a token is asked about after this, so that the answer is there in time."""
SILENT_MAX: Final = 2
"""Times in a row that the provider answers about others, and not about one."""
_CLIENT_NAMES: Final = ("client_id", "azp", "cid")  # RFC 9068; Keycloak; Okta

Event = Withdrawn | Suspended | Resumed


@dataclass(slots=True)
class _Here:
    """A session's key that is here, and the latest tokens that it showed."""

    access_token: str = field(repr=False)  # what the provider is asked with
    expires_at: float  # Unix time, s: then the sessions end that it let in
    good_at: float  # when the provider was last asked and knew it; monotonic, s
    silent: int = 0  # times in a row that it said nothing of this one, and something of others


@dataclass(slots=True)
class _Person:
    """Somebody who is here."""

    token: dict[str, Any] = field(repr=False)  # the claims of their latest ID token
    said: dict[str, Any] = field(repr=False)  # the provider's latest answer about them
    roles: frozenset[str] = frozenset()
    keys: dict[bytes, _Here] = field(default_factory=dict)


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
        workloads = self._config.workload_issuers
        self._roles: dict[str, Role] = parse_roles(self._config.roles, workloads)
        self._clock, self._log = ctx.clock, ctx.log
        self._provider = Provider(self._config.issuer, now=ctx.clock.monotonic)
        self._issuers = {self._config.issuer: (CLIENT, self._provider)} | {
            issuer: (name, Provider(issuer, now=ctx.clock.monotonic))
            for name, issuer in workloads.items()
        }
        self._people: dict[Principal, _Person] = {}
        self._count = 0
        self._services: dict[Principal, dict[str, float]] = {}  # role → until when, Unix time, s
        self._watchers = Watchers[Event]()
        self._names: set[str] = set()  # of the claims that the provider's answers ever had
        self._login_places = asyncio.Semaphore(ASKED_MAX)
        self._places = asyncio.Semaphore(ASKED_MAX)
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
        step_s = min(1.0, self._config.recheck_s / 8)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_the_clock(step_s))
                while True:
                    await self._look_again()
                    await anyio.sleep(step_s)
        finally:
            with anyio.CancelScope(shield=True):
                for _, provider in self._issuers.values():
                    await provider.close()

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
            if shown.id_token:
                return await self._judge(shown)
            return await self._judge_service(shown, challenge.verifier)
        except BadToken as exc:
            status = LoginStatus.EXPIRED if exc.late else LoginStatus.UNKNOWN_PRINCIPAL
            kind = "ID token" if shown.id_token else "service account's token"
            return Reject(status, f"the {kind} is refused: {exc.message}")
        except ProviderError as exc:
            self._log.warning("auth_oidc.provider_failed", why=exc.message)
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, exc.message)

    async def _judge(self, shown: OidcProof) -> Accept | Reject:
        """By what the tokens say, and the provider; raises BadToken, ProviderError."""
        claims = await self._claims(shown)
        principal = Principal(self.name, claims["sub"])
        person = self._people.get(principal)
        known = None if person is None else person.keys.get(shown.key)
        said = None
        if known is None or known.access_token != shown.access_token or not self._fresh(known):
            asked_at = self._clock.monotonic()
            async with self._login_places:
                said = await self._ask(principal, shown.access_token)
            if said is None:
                raise BadToken("the provider no longer knows its owner, or withdrew it", late=True)
            known = _Here(shown.access_token, claims["exp"], asked_at)
        person = self._people.get(principal)  # the provider was waited for
        if person is None or shown.key not in person.keys:
            if self._count >= LIVE_MAX:
                return _full(f"{LIVE_MAX} sessions are here")
            if person is None:
                person = _Person(claims, said or {})
        if claims["iat"] >= person.token["iat"]:
            person.token = claims
        if said is not None:
            person.said = said
        # Before anything else: it may be that roles of theirs have gone.
        self._update(principal, person)
        if not person.roles:
            return Reject(LoginStatus.NO_ROLE, f"{principal} has none of the claims of a role")
        self._people[principal] = person
        self._keep(principal, person, shown.key, known)
        return Accept(principal, person.roles, claims["exp"])

    async def _judge_service(self, shown: OidcProof, verifier: PeerId) -> Accept | Reject:
        """By the one token of a service account; raises BadToken, ProviderError."""
        token, config = shown.access_token, self._config
        issuer = part_of(token, 1).get("iss")
        if not isinstance(issuer, str) or issuer not in self._issuers:
            raise BadToken(f"nobody's accounts are by {str(issuer)[:100]!r} here")
        source, provider = self._issuers[issuer]
        async with self._login_places:
            claims = await verified_service(
                provider, token, key=shown.key, verifier=verifier,
                audience=config.audience or config.client_id, now=self._clock.time(),
            )  # fmt: skip
        # People have access tokens by it, and are no service accounts.
        if source == CLIENT and config.client_id in [claims.get(n) for n in _CLIENT_NAMES]:
            raise BadToken("it is of the client that people log in with")
        principal = Principal(self.name, f"{source}:{claims['sub']}")
        # By this token alone: jobs of one account (`sub`) may differ in all else that it says.
        roles = self._roles_by(claims, source)
        if not roles:
            return Reject(LoginStatus.NO_ROLE, f"{principal} has none of the claims of a role")
        if principal not in self._services and len(self._services) >= LIVE_MAX:
            return _full(f"{LIVE_MAX} service accounts are here")
        until = min(claims["exp"], claims["iat"] + SERVICE_S_MAX)
        ends = self._services.setdefault(principal, {})
        for role in roles:
            ends[role] = max(until, ends.get(role, 0))
        return Accept(principal, roles, until)

    def _keep(self, principal: Principal, person: _Person, key: bytes, here: _Here) -> None:
        """Ask about a session's key from now on, by its latest tokens."""
        before = person.keys.pop(key, None)
        if before is not None and before.expires_at > here.expires_at:
            here = before
        elif before is None:
            self._count += 1
        person.keys[key] = here
        if len(person.keys) > KEYS_MAX:
            self._drop(principal, next(iter(person.keys)))
            self._withdraw(principal, None, f"they are here with {KEYS_MAX} keys (KEYS_MAX)")

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
        if claims["sub"].startswith(tuple(f"{name}:" for name, _ in self._issuers.values())):
            raise BadToken("its owner has a name of service accounts (sub)")
        check_access_token(claims, part_of(shown.id_token, 0)["alg"], shown.access_token)
        return claims

    def roles(self, principal: Principal) -> frozenset[str]:
        now = self._clock.time()
        if (ends := self._services.get(principal)) is not None:
            return frozenset(role for role, until in ends.items() if until > now)
        person = self._people.get(principal)
        if person is None:
            return frozenset()
        here = any(each.expires_at > now for each in person.keys.values())
        return person.roles if here else frozenset()

    def _roles_by(self, claims: Mapping[str, Any], source: str = "") -> frozenset[str]:
        return frozenset(name for name, role in self._roles.items() if role.has(claims, source))

    def _update(self, principal: Principal, person: _Person) -> None:
        """Judge somebody by the provider's latest word, and tell of roles that went."""
        before, person.roles = person.roles, self._roles_by(self._merged(person))
        if lost := before - person.roles:
            why = f"the provider's claims no longer have {', '.join(sorted(lost))}"
            self._withdraw(principal, lost, why)

    def _merged(self, person: _Person) -> dict[str, Any]:
        """The provider's answer, and of the ID token the claims that its answers never have.

        What an answer leaves out that others had is gone, as the last group that somebody was in.
        """
        said = person.said
        token = {name: each for name, each in person.token.items() if name not in self._names}
        if "email" in said:  # whether it is verified is of the same source
            token.pop("email_verified", None)
        return token | said

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
        return self._watchers.add(callback)

    # --- asking again -----------------------------------------------------------------------------

    def _fresh(self, here: _Here) -> bool:
        """Whether the provider knew it lately enough for the promise of `recheck_s`."""
        return self._clock.monotonic() - here.good_at < self._config.recheck_s * MARGIN

    def _late(self, here: _Here) -> bool:
        """Whether nothing is known of it for longer than anybody may stay for."""
        age_s = self._clock.monotonic() - here.good_at
        return age_s > self._config.recheck_s + self._config.unreachable_s

    def _all(self) -> list[tuple[Principal, bytes, _Here]]:
        people = self._people.items()
        return [(who, key, here) for who, one in people for key, here in one.keys.items()]

    def _drop(self, principal: Principal, key: bytes) -> None:
        person = self._people[principal]
        del person.keys[key]
        self._count -= 1
        if not person.keys:
            del self._people[principal]

    async def _look_again(self) -> None:
        """Ask about each key whose time it is; forget those that have expired."""
        now = self._clock.time()
        for principal, key, here in self._all():
            if here.expires_at <= now:  # its sessions have ended with it
                self._drop(principal, key)
        for principal, ends in tuple(self._services.items()):
            if max(ends.values()) <= now:
                del self._services[principal]
        due = [each for each in self._all() if not self._fresh(each[2])]
        asked = await asyncio.gather(*(self._look_at(*each) for each in due))
        if not any(asked):
            return
        if all(asked):
            self._failure = ""
        for (principal, key, here), answered in zip(due, asked, strict=True):
            here.silent = 0 if answered else here.silent + 1
            person = self._people.get(principal)
            mine = person is not None and person.keys.get(key) is here
            if mine and here.silent >= SILENT_MAX and self._late(here):
                self._drop(principal, key)
                why = "the provider says of others whether it knows them, and not of them"
                self._withdraw(principal, None, why)

    async def _look_at(self, principal: Principal, key: bytes, here: _Here) -> bool:
        """Ask about one; whether there was an answer."""
        asked_at = self._clock.monotonic()
        try:
            async with self._places:
                said = await self._ask(principal, here.access_token)
        except ProviderError as exc:
            self._failure = exc.message
            return False
        except Exception as exc:  # whatever the provider did: the node goes on, and knows nothing
            self._failure = f"{self._config.issuer}: {type(exc).__name__}"
            self._log.exception("auth_oidc.ask_failed")
            return False
        person = self._people.get(principal)
        if person is None or person.keys.get(key) is not here:
            return True  # it has shown later tokens meanwhile
        if said is None:
            self._drop(principal, key)
            # Sessions of one person are not told apart: those that are good log in again.
            why = "the provider no longer knows them, or withdrew a token of theirs"
            self._withdraw(principal, None, why)
        else:
            here.good_at, person.said = asked_at, said
            self._update(principal, person)
        return True

    async def _ask(self, principal: Principal, access_token: str) -> dict[str, Any] | None:
        """The claims of whose token it is, by the provider; None where it does not know it.

        Raises ProviderError.
        """
        said = await self._provider.userinfo(access_token)
        if said is None or said["sub"] != principal.subject:
            return None
        if len(self._names) < NAMES_MAX:
            self._names.update(said)
        return said

    async def _watch_the_clock(self, step_s: float) -> None:
        """Suspend everything where the provider has been silent for too long; resume it after."""
        while True:
            late = any(self._late(here) for _, _, here in self._all())
            if late and not self._suspended:
                self._suspended = True
                self._log.error("auth_oidc.suspended", why=self._failure)
                self._tell(Suspended(f"the provider cannot be asked: {self._failure}"))
            elif self._suspended and not late:
                self._suspended = False
                self._log.info("auth_oidc.resumed")
                self._tell(Resumed())
            await anyio.sleep(step_s)

    def _tell(self, event: Event) -> None:
        self._watchers.tell_all(event)


def _full(why: str) -> Reject:
    return Reject(LoginStatus.BACKEND_UNAVAILABLE, f"{why} (LIVE_MAX)")
