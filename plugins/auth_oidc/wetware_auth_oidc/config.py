"""`[plugins.auth_oidc]`: whose accounts these are, and what their groups may do here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from wetware.errors import ConfigError, InvalidArgument
from wetware.hookspecs import RoleProfile, role_services, role_where, setting

ROLES_MAX: Final = 256
CLAIMS_MAX: Final = 64
RECHECK_S: Final = 60.0
UNREACHABLE_S: Final = 60.0
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_ROLE: Final = re.compile(r"[A-Za-z][\w.-]{0,31}", re.ASCII)
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
        claims: (name, value); who has one of them has the role.
        profile: What it may do.
    """

    claims: tuple[tuple[str, str], ...]
    profile: RoleProfile

    def has(self, claims: Mapping[str, Any]) -> str:
        """The claim by which somebody has it, as it is configured; "" if none."""
        return next((f"{n}={v}" for n, v in self.claims if v in values(claims, n)), "")


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


def parse_roles(config: Mapping[str, Any]) -> dict[str, Role]:
    """`[plugins.auth_oidc.roles]`, as TOML has it; raises InvalidArgument."""
    if len(config) > ROLES_MAX:
        raise InvalidArgument(f"{len(config)} roles; at most {ROLES_MAX}")
    return {name: _role(name, table) for name, table in config.items()}


def _role(name: str, table: Any) -> Role:
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
    claims = tuple(_claims(f"{name}.claims", table.get("claims")))
    services = role_services(f"{name}.services", table.get("services"))
    return Role(
        claims, RoleProfile(services, role_where(f"{name}.where", table.get("where", []), services))
    )


def _claims(at: str, given: Any) -> Iterable[tuple[str, str]]:
    if not isinstance(given, list) or not 1 <= len(given) <= CLAIMS_MAX:
        raise InvalidArgument(f"{at}: is not a list of 1 to {CLAIMS_MAX} claims", hint=_EXAMPLE)
    for text in given:
        name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
        if not (name and equals and value):
            raise InvalidArgument(f"{at}: {str(text)[:60]!r} is no NAME=VALUE", hint=_EXAMPLE)
        yield name, value


def _check_roles(config: Mapping[str, Any]) -> None:
    parse_roles(config)


def _check_issuer(value: str) -> None:
    try:
        check_url(value)
    except ValueError as exc:
        raise InvalidArgument(str(exc), hint="the issuer as its tokens name it, https") from None


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
            "`sub=248289761001`; one of them is enough.",
            "check": _check_roles,
        },
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

    def checked(self, *, users: bool = False) -> AuthOidcConfig:
        """This, if a cluster can be run with it, or its `users` log in; raises ConfigError."""
        for name in ("issuer", "client_id"):
            if not getattr(self, name):
                raise ConfigError(
                    f"[plugins.auth_oidc] {name} is not set",
                    hint="docs/how-to/oidc.md says what each provider calls it",
                )
        if not self.roles and not users:
            raise ConfigError(
                "[plugins.auth_oidc.roles] is empty: nobody would be allowed anything",
                hint='e.g. [plugins.auth_oidc.roles.member] with claims = ["groups=engineering"]',
            )
        return self
