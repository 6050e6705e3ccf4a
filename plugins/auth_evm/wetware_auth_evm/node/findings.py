"""What `ww doctor` says of the backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from wetware.base.finding import error, warning
from wetware_auth_evm.chain.endpoints import LATE_MAX
from wetware_auth_evm.chain.events import ROOT, role_name
from wetware_auth_evm.node.roles import RESERVED, Rules

if TYPE_CHECKING:
    from wetware.hookspecs import Finding
    from wetware_auth_evm.chain.endpoints import Endpoints
    from wetware_auth_evm.chain.replica import Replica
    from wetware_auth_evm.node.config import Settings

CHECK: Final = "evm"
NAMES_MAX: Final = 8
_STATUS: Final = "`ww auth evm status`"


def findings(
    replica: Replica, endpoints: Endpoints, settings: Settings, rules: Rules, *, try_out: bool
) -> Iterator[Finding]:
    """What is wrong now; nothing if nothing is."""
    if try_out:
        yield warning(
            CHECK,
            "this node tries out auth_evm on a chain of its own: nobody else sees its contract",
            "for a cluster: set [plugins.auth_evm], see docs/how-to/evm-real-chain.md",
        )
    if replica.regressed:
        yield error(
            CHECK,
            f"nobody is admitted: {replica.regressed}",
            "find out what happened to the chain or the endpoints; then `ww auth evm forget` on "
            "this machine: the node reads everything anew",
        )
    elif why := replica.unfit():
        yield error(CHECK, f"nobody is admitted, and capabilities are suspended: {why}", _STATUS)
    elif replica.fault:
        yield warning(CHECK, f"the last look at the chain failed: {replica.fault}", _STATUS)
    yield from (warning(CHECK, why, "[plugins.auth_evm]") for why in settings.warnings)
    for endpoint in endpoints.each:
        if not endpoint.available:
            yield warning(
                CHECK,
                f"the endpoint {endpoint.name} does not answer: {endpoint.error}",
                "look at it, or replace it in [plugins.auth_evm] endpoints",
            )
        elif endpoint.late >= LATE_MAX:
            yield warning(
                CHECK,
                f"the endpoint {endpoint.name} is slower than the others, {endpoint.late} times in "
                "a row",
                "look at it, or replace it in [plugins.auth_evm] endpoints",
            )
        if endpoint.dissents:
            yield warning(
                CHECK,
                f"the endpoint {endpoint.name} contradicted the others {endpoint.dissents} times",
                "it lies, lags or is on another fork: replace it in [plugins.auth_evm] endpoints",
            )
    if replica.final.paused or replica.tip.paused:
        yield warning(CHECK, "the contract is paused: nobody has any role", "`ww auth evm unpause`")
    if replica.held:
        who = "everybody" if None in replica.held else f"{len(replica.held)} accounts"
        yield warning(
            CHECK,
            f"withdrawals from {who} were taken back by a reorganisation, and hold until finality "
            "has passed them",
            _STATUS,
        )
    if unknown := unknown_roles(replica, rules):
        shown = ", ".join(unknown[:NAMES_MAX])
        yield warning(
            CHECK,
            f"the contract grants roles that this node's configuration does not know: {shown}",
            "add [plugins.auth_evm.roles.NAME] with what it allows",
        )


def unknown_roles(replica: Replica, rules: Rules) -> list[str]:
    """Roles that somebody has in this cluster, and the configuration does not name."""
    seen = set()
    for scope, role, _, _ in replica.final.listing():
        if scope in (replica.scope, ROOT):
            seen.add(role)
    names = {role_name(role) or "0x" + role.hex() for role in seen}
    return sorted(name for name in names if name not in RESERVED and name not in rules)
