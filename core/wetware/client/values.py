"""What a session tells of: who it is, what it may use, and grants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


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

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Identity:
        """From the answer of Session.whoami."""
        return cls(
            wire["principal"], tuple(wire["roles"]), wire["node"], wire["cluster"], wire["grant"]
        )


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
