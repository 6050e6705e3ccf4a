"""What the roles of the contract allow on this node: `[plugins.auth_evm.roles.NAME]`.

The contract says who has which role, with a mask of rights; what a role means is each node's own
policy. A role is called by its name where the mask covers all that the configuration defines, and
`NAME/0x3` where it covers a part. What is not configured allows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from wetware.errors import InvalidArgument
from wetware.hookspecs import RoleProfile, Where, role_services, role_where

NODE_ROLE: Final = "node"
GUARDIAN_ROLE: Final = "guardian"
RESERVED: Final = frozenset({NODE_ROLE, GUARDIAN_ROLE})
"""`node` is for peers, and `guardian` has its meaning in the contract."""
STANDARD: Final = frozenset({"reader", "member", "admin"})
"""What services propose for, and a try-out has where no roles are configured."""
ROLES_MAX: Final = 256
BIT_MAX: Final = 127
_ROLE = re.compile(r"[A-Za-z][\w.-]{0,31}", re.ASCII)
_BIT = re.compile(r"0|[1-9]\d{0,2}", re.ASCII)
_FIELDS: Final = ("services", "where", "bits")

Services = Mapping[str, frozenset[str]]

Config = Mapping[str, Mapping[str, Any]]
"""`[plugins.auth_evm.roles]`, as TOML has it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One role.

    Attributes:
        bits: Bit of the mask → what it gives.
        where: Constraints on all of it.
        mask: The bits that give something.
    """

    bits: Mapping[int, Services]
    where: tuple[Where, ...]
    mask: int

    def profile(self, mask: int) -> RoleProfile:
        """What the bits of a mask give together."""
        found: dict[str, frozenset[str]] = {}
        for bit, services in self.bits.items():
            if mask >> bit & 1:
                for name, patterns in services.items():
                    found[name] = found.get(name, frozenset()) | patterns
        if not found:
            return RoleProfile()
        return RoleProfile(found, self.where)


class Rules:
    """All roles of a node; raises InvalidArgument that names the setting."""

    def __init__(self, config: Config) -> None:
        if len(config) > ROLES_MAX:
            raise _bad("", f"{len(config)} roles; at most {ROLES_MAX}")
        self._rules = {name: _rule(name, table) for name, table in config.items()}
        self._profiles: dict[str, RoleProfile] = {}

    def __len__(self) -> int:
        return len(self._rules)

    def __contains__(self, role: object) -> bool:
        return role in self._rules

    @property
    def known(self) -> tuple[str, ...]:
        return tuple(sorted(self._rules))

    def names(self, masks: Mapping[str, int]) -> frozenset[str]:
        """Roles as the broker knows them, of role → mask as the contract has them."""
        found = set()
        for role, mask in masks.items():
            rule = self._rules.get(role)
            if rule is not None and (counts := mask & rule.mask):
                found.add(role if counts == rule.mask else f"{role}/0x{counts:x}")
        return frozenset(found)

    def profile(self, name: str) -> RoleProfile:
        """What a role as the broker knows it allows; nothing for an unknown one."""
        known = self._profiles.get(name)
        if known is not None:
            return known
        role, slash, hex_ = name.partition("/0x")
        rule = self._rules.get(role)
        if rule is None:
            return RoleProfile()
        try:
            mask = int(hex_, 16) if slash else rule.mask
        except ValueError:
            return RoleProfile()
        if slash and name != f"{role}/0x{mask:x}":
            return RoleProfile()
        found = rule.profile(mask & rule.mask)
        if len(self._profiles) < ROLES_MAX * 4:
            self._profiles[name] = found
        return found


def base(name: str) -> str:
    """The contract's role of one as the broker knows it."""
    return name.partition("/")[0]


def check(config: Config) -> None:
    """Raise InvalidArgument for what is no configuration of roles."""
    Rules(config)


def _bad(where: str, what: str, hint: str = "") -> InvalidArgument:
    return InvalidArgument(
        f"{where}: {what}" if where else what,
        hint=hint or 'e.g. services = { SERVICE = ["*"] }; see docs/how-to/evm-real-chain.md',
    )


def _rule(name: str, table: Mapping[str, Any]) -> Rule:
    if not _ROLE.fullmatch(name):
        raise _bad(name[:40], "is not a role's name", "a letter, then letters, digits, `_`, `.`, -")
    if name in RESERVED:
        raise _bad(name, "is reserved", "nodes and guardians have no services; name another role")
    for key in table:
        if key not in _FIELDS:
            raise _bad(f"{name}.{key[:40]}", "no such setting", f"one of {', '.join(_FIELDS)}")
    bits: dict[int, Services] = {}
    if "services" in table:
        bits[0] = role_services(f"{name}.services", table["services"])
    more = table.get("bits", {})
    if not isinstance(more, Mapping):
        raise _bad(f"{name}.bits", "is not a section")
    for key, value in more.items():
        at = f"{name}.bits.{key[:40]}"
        if not _BIT.fullmatch(key) or int(key) > BIT_MAX:
            raise _bad(at, f"is not a bit of the mask, 0 to {BIT_MAX}")
        if int(key) in bits:
            raise _bad(at, "bit 0 is `services`", "write it in one place")
        bits[int(key)] = role_services(at, value)
    every: dict[str, frozenset[str]] = {}
    for services in bits.values():
        every.update(services)
    if not every:
        raise _bad(name, "gives nothing", f'write services = {{ SERVICE = ["*"] }} in [{name}]')
    where = role_where(f"{name}.where", table.get("where", []), every)
    return Rule(bits, where, sum(1 << bit for bit, services in bits.items() if services))
