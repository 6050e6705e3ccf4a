"""What a service proposes for the standard roles: checked when it is loaded, and shown.

No decision reads a proposal. Founding a cluster and `ww role accept` write it into what is signed,
and that decides: so a plugin that is installed, upgraded or fails to load changes nobody's rights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

from wetware.broker.methods import ANY, PATTERNS_MAX, known_patterns
from wetware.errors import PluginError

if TYPE_CHECKING:
    from wetware.broker.ports import RoleProfile, Service

STANDARD_ROLES: Final = ("reader", "member", "admin")
"""Each should have what the one before it has."""

Proposal: TypeAlias = Mapping[str, frozenset[str]]
"""Standard role → method patterns of one service; none of them is empty."""


def proposal_of(service: Service) -> Proposal:
    """A copy of what a service proposes, checked against its schema; raises PluginError."""
    roles, name = service.roles, service.name
    if not isinstance(roles, Mapping):
        raise PluginError(f"service {name!r}: roles is {type(roles).__name__}, not a mapping")
    if unknown := [role for role in roles if role not in STANDARD_ROLES]:
        raise PluginError(
            f"service {name!r} proposes something for a role {unknown[0]!r:.80}: "
            f"there are {', '.join(STANDARD_ROLES)}"
        )
    looked = ((role, roles.get(role)) for role in STANDARD_ROLES)  # once: it is foreign code
    found = {role: patterns for role, patterns in looked if patterns is not None}
    known = {ANY, *known_patterns(service.interface)} if found else {ANY}
    for role, patterns in found.items():
        if not isinstance(patterns, frozenset):
            kind = type(patterns).__name__
            raise PluginError(f"service {name!r}: roles[{role!r}] is {kind}, not a frozenset")
        if len(patterns) > PATTERNS_MAX:
            raise PluginError(
                f"service {name!r} proposes {len(patterns)} patterns for {role!r}; "
                f"{PATTERNS_MAX} are allowed"
            )
        if strange := [pattern for pattern in patterns if pattern not in known]:
            raise PluginError(
                f"service {name!r} proposes {strange[0]!r:.80} for {role!r}, which is no method "
                "of it"
            )
    return {role: frozenset(patterns) for role, patterns in found.items() if patterns}


def ungranted(name: str, proposal: Proposal, profile: Callable[[str], RoleProfile]) -> bool:
    """Whether a service has not been accepted: no standard role in use has anything of it.

    `profile` says what a role may do now. A cluster that has roles of its own in place of the
    standard ones is not told to accept anything.
    """
    used = [now for role in proposal if role != "admin" and (now := profile(role)).services]
    return bool(used) and not any(now.patterns(name) for now in used)
