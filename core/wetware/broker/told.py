"""What a session is told: who it is, what it may use, grants, and why a call was decided so.

Each has the fields of its struct in core.capnp (`wetware.base.structs`).
"""

from __future__ import annotations

from dataclasses import dataclass


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
        kind: "role", "session", "service", "attenuated", "share", "redeemed" or "derived".
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


@dataclass(frozen=True, slots=True)
class Step:
    """One grant on the way from a call to a role.

    Attributes:
        grant: Its ID.
        label: What it is for.
        kind: See `GrantInfo`.
        verdict: "allows", "denies" or "-" (not asked: something before it denied).
        detail: Which pattern, constraint, quota or end decided.
    """

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
        principal: Who called.
        grant: ID of the grant that was called.
        method: "Interface.method", with the arguments that constraints are about.
        steps: From that grant to a role.
        decision: ID of a denial; "" if it was only asked about.
        at: When, Unix time, s.
    """

    allowed: bool
    code: str
    reason: str
    principal: str
    grant: str
    method: str
    steps: tuple[Step, ...]
    decision: str = ""
    at: float = 0.0
