"""What services propose for the standard roles, as a configuration of roles.

A proposal decides nothing. A try-out writes those of its first start into ROLES_FILE, which is its
configuration from then on; to any other node its operator copies what `ww role accept` prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.base.disk import remedy
from wetware.broker.methods import pattern_within
from wetware.errors import ConfigError, InvalidArgument
from wetware.identity import replace_private_file
from wetware_auth_evm.node.roles import Config, Rules, check

if TYPE_CHECKING:
    from wetware.hookspecs import Proposal

ROLES_FILE: Final = "roles.json"
"""What the roles of a try-out allow where none are configured."""


def load(directory: Path) -> Config:
    """The roles that a try-out has kept; {} before its first start. Raises ConfigError."""
    path = directory / ROLES_FILE
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        check(found)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, InvalidArgument) as exc:
        raise ConfigError(
            f"{path} is damaged ({exc})",
            hint="restore it; or begin another try-out, with --data-dir",
            code="config.dev_damaged",
        ) from None
    return found


def write(directory: Path, proposals: Mapping[str, Proposal]) -> Config:
    """The standard roles with what the services propose for them (by service), kept for good.

    Raises ConfigError.
    """
    roles: Config = {"admin": {"services": {"*": ["*"]}}}
    for service, proposal in sorted(proposals.items()):
        roles = {**roles, **_accepted(roles, service, proposal)}
    path = directory / ROLES_FILE
    try:
        check(roles)
        replace_private_file(path, json.dumps(roles, indent=1).encode())
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}", hint=remedy(exc)) from exc
    except InvalidArgument as exc:
        raise ConfigError(f"no roles can be made: {exc.message}", hint=exc.hint) from exc
    return roles


def how_to_accept(roles: Config, service: str, proposal: Proposal, *, every: bool) -> str:
    """What to write into ww.toml, so that the roles have what a service proposes for them.

    With `every`, the roles that stay as they are, too: they are configured nowhere yet.
    """
    if not (changed := _accepted(roles, service, proposal)):
        return f"# The roles have all that {service} proposes.\n"
    lines = ["# For ww.toml of each node, in place of the sections with these names; then restart."]
    for name, table in sorted(({**roles, **changed} if every else changed).items()):
        lines += ["", f"[plugins.auth_evm.roles.{_key(name)}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _accepted(roles: Config, service: str, proposal: Proposal) -> Config:
    """The roles that have not all that a service proposes for them, as they are with it."""
    rules, changed = Rules(roles), {}
    for role, patterns in sorted(proposal.items()):
        have = rules.profile(role).patterns(service)
        if new := {pattern for pattern in patterns if not pattern_within(pattern, have)}:
            table = roles.get(role, {})
            services = table.get("services", {})
            added = sorted({*services.get(service, ()), *new})
            changed[role] = {**table, "services": {**services, service: added}}
    return changed


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name)


def _toml(value: object) -> str:
    """Of texts, lists and tables, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
