"""`[plugins.auth_oidc]`: whose accounts these are, and what their groups may do here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from wetware.errors import ConfigError, InvalidArgument
from wetware.hookspecs import RoleProfile, role_services, role_where, setting

ROLES_MAX: Final = 256
CLAIMS_MAX: Final = 64
WORKLOADS_MAX: Final = 8
CLIENT: Final = "client"
"""Where a service account is from that is a client of the provider; others name their issuer."""
RECHECK_S: Final = 60.0
UNREACHABLE_S: Final = 60.0
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_ROLE: Final = re.compile(r"[A-Za-z][\w.-]{0,31}", re.ASCII)
_WORKLOAD: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_FIELDS: Final = ("claims", "services", "where")
_EXAMPLE: Final = 'e.g. claims = ["groups=engineering"]; see docs/how-to/oidc.md'


def check_url(url: str) -> None:
    """Raise ValueError where a URL is not https, or http on this machine."""
    parts = urlsplit(url)
    if parts.hostname is None or not url.isascii() or not url.isprintable() or parts.port == 0:
        raise ValueError(f"{url[:100]!r} is no URL")
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ValueError(f"{url[:100]!r} is not https")
    if parts.username is not None or parts.fragment:
        raise ValueError(f"{url[:100]!r} has a user or a fragment")


@dataclass(frozen=True, slots=True)
class Role:
    """One role.

    Attributes:
        claims: (source, name, value); who has one of them has the role. The source is "" for
            people, and `client` or the name of a workload's issuer for service accounts.
        profile: What it may do.
    """

    claims: tuple[tuple[str, str, str], ...]
    profile: RoleProfile

    def has(self, claims: Mapping[str, Any], source: str = "") -> str:
        """The claim by which an account of a source has it, as it is configured; "" if none.

        Claims of one source count for no other: what is a client's `sub` may be a person's, too.
        """
        return next(
            (written(*each) for each in self.claims
             if each[0] == source and each[2] in values(claims, each[1])), "",
        )  # fmt: skip


def written(source: str, name: str, value: str) -> str:
    """A claim as it is configured."""
    return f"{source}:{name}={value}" if source else f"{name}={value}"


def values(claims: Mapping[str, Any], name: str) -> frozenset[str]:
    """The texts of a claim, one or a list of them; of `a.b` also b within a, as in Keycloak.

    An address that the provider has not verified is none: some let people write what they like.
    """
    if name == "email" and claims.get("email_verified") is not True:
        return frozenset()
    found: Any = claims
    if name in claims:
        found = claims[name]
    else:
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    each = found if isinstance(found, list) else [found]
    return frozenset(
        str(value).lower() if isinstance(value, bool) else str(value)
        for value in each
        if isinstance(value, str | int | bool)
    )


def parse_roles(config: Mapping[str, Any], workloads: Iterable[str] = ()) -> dict[str, Role]:
    """`[plugins.auth_oidc.roles]`, as TOML has it; raises InvalidArgument."""
    if len(config) > ROLES_MAX:
        raise InvalidArgument(f"{len(config)} roles; at most {ROLES_MAX}")
    sources = {CLIENT, *workloads}
    return {name: _role(name, table, sources) for name, table in config.items()}


def _role(name: str, table: Any, sources: Collection[str]) -> Role:
    if not _ROLE.fullmatch(name):
        raise InvalidArgument(
            f"{name[:40]!r} is not a role's name",
            hint="a letter, then letters, digits, `_`, `.`, -",
        )
    if not isinstance(table, Mapping):
        raise InvalidArgument(f"{name}: is not a section", hint=_EXAMPLE)
    for key in table:
        if key not in _FIELDS:
            raise InvalidArgument(
                f"{name}.{key[:40]}: no such setting", hint=f"one of {', '.join(_FIELDS)}"
            )
    claims = tuple(_claims(f"{name}.claims", table.get("claims"), sources))
    services = role_services(f"{name}.services", table.get("services"))
    return Role(
        claims, RoleProfile(services, role_where(f"{name}.where", table.get("where", []), services))
    )


def _claims(at: str, given: Any, sources: Collection[str]) -> Iterable[tuple[str, str, str]]:
    if not isinstance(given, list) or not 1 <= len(given) <= CLAIMS_MAX:
        raise InvalidArgument(f"{at}: is not a list of 1 to {CLAIMS_MAX} claims", hint=_EXAMPLE)
    for text in given:
        name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
        if not (name and equals and value):
            raise InvalidArgument(f"{at}: {str(text)[:60]!r} is no NAME=VALUE", hint=_EXAMPLE)
        source, _, rest = name.partition(":")
        # Some providers have colons in names, as `cognito:groups` and `https://acme.org/team`.
        yield (source, rest, value) if rest and source in sources else ("", name, value)


def _check_roles(config: Mapping[str, Any]) -> None:
    parse_roles(config)


def _check_issuer(value: str) -> None:
    try:
        check_url(value)
    except ValueError as exc:
        raise InvalidArgument(str(exc), hint="the issuer as its tokens name it, https") from None


def check_workloads(given: tuple[str, ...]) -> None:
    """Raise InvalidArgument for what is no NAME=ISSUER."""
    if len(given) > WORKLOADS_MAX:
        raise InvalidArgument(f"{len(given)} issuers; at most {WORKLOADS_MAX}")
    for text in given:
        name, _, issuer = text.partition("=")
        if not _WORKLOAD.fullmatch(name) or name == CLIENT:
            raise InvalidArgument(
                f"{text[:60]!r} does not begin with a name",
                hint=f"NAME=ISSUER: small letters, digits and -; not {CLIENT!r}",
            )
        _check_issuer(issuer)


@dataclass(frozen=True, slots=True)
class AuthOidcConfig:
    """Which provider decides who somebody is, and by which claims they have which role."""

    issuer: str = setting(
        "",
        "URL of the OpenID provider, exactly as its tokens name it (`iss`).",
        check=_check_issuer,
        default_text="has to be set",
    )
    client_id: str = setting(
        "", "The client that is registered there for this cluster.", default_text="has to be set"
    )
    client_secret: str = setting(
        "",
        "Of that client, on machines where users log in, for a provider that wants one even for "
        "command-line clients (Google). Nodes need none.",
        secret=True,
    )
    scopes: tuple[str, ...] = setting(
        ("openid", "profile", "email", "offline_access"),
        "What a login asks for: some providers give groups only with a scope of their own.",
    )
    roles: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        metadata={
            "help": "Who has which role, and what it may do: `claims`, `services` and `where` in "
            "`[plugins.auth_oidc.roles.NAME]`. A claim is NAME=VALUE, e.g. `groups=engineering`, "
            "`sub=248289761001`; one of them is enough. Of service accounts it is "
            "`client:NAME=VALUE`, or `ISSUER:NAME=VALUE` by `workloads`.",
            "check": _check_roles,
        },
    )
    audience: str = setting(
        "",
        "Whom access tokens of service accounts have to be for (`aud`). A URI is asked for as the "
        "`resource` (RFC 8707).",
        default_text="`client_id`",
    )
    service_scopes: tuple[str, ...] = setting(
        (), "What service accounts ask for, at providers that want that."
    )
    workloads: tuple[str, ...] = setting(
        (),
        "Platforms whose workloads are service accounts here: a name for each, and the issuer of "
        'its tokens, e.g. `["github=https://token.actions.githubusercontent.com"]`.',
        check=check_workloads,
    )
    recheck_s: float = setting(
        RECHECK_S,
        "Within this the sessions of somebody end whom the provider no longer knows, or whose "
        "token it withdrew.",
        min=1,
        max=3600,
    )
    unreachable_s: float = setting(
        UNREACHABLE_S,
        "Where the provider cannot be asked for this much longer, nobody is allowed anything until "
        "it can be.",
        min=1,
        max=3600,
    )

    @property
    def workload_issuers(self) -> dict[str, str]:
        """Name → issuer."""
        return {name: url for name, _, url in (each.partition("=") for each in self.workloads)}

    def checked(self, *, users: bool = False) -> AuthOidcConfig:
        """This, if a cluster can be run with it, or its `users` log in; raises ConfigError."""
        for name in ("issuer", "client_id"):
            if not getattr(self, name):
                raise ConfigError(
                    f"[plugins.auth_oidc] {name} is not set",
                    hint="docs/how-to/oidc.md says what each provider calls it",
                )
        issuers = self.workload_issuers
        if len({self.issuer, *issuers.values()}) <= len(self.workloads):
            raise ConfigError(
                "[plugins.auth_oidc] workloads has a name or an issuer twice, or the provider",
                hint="whose token one is has to be known by its issuer; clients of the provider "
                f"are `{CLIENT}:` without an entry",
            )
        if not self.roles and not users:
            raise ConfigError(
                "[plugins.auth_oidc.roles] is empty: nobody would be allowed anything",
                hint='e.g. [plugins.auth_oidc.roles.member] with claims = ["groups=engineering"]',
            )
        return self
