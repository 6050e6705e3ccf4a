"""The service `auth_evm`: what this node knows of the contract, for operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.errors import InvalidArgument
from wetware.hookspecs import Service
from wetware_auth_evm.chain.addresses import checksum, parse_address
from wetware_auth_evm.chain.events import NOBODY, ROOT, role_id, role_name
from wetware_auth_evm.client import SCHEMA
from wetware_auth_evm.node.roles import RESERVED

if TYPE_CHECKING:
    from wetware.identity import Principal
    from wetware_auth_evm.node.backend import EvmBackend

PAGE_MAX: Final = 1000


class EvmServant(rpc.Servant, interface=SCHEMA.EvmAuth):
    """See auth_evm.capnp."""

    def __init__(self, backend: EvmBackend) -> None:
        self._backend = backend

    async def status(self) -> dict[str, object]:
        found = self._backend.status()
        sizes = found["sizes"]
        same = (
            "chain_id", "contract", "scope", "owner", "paused", "suspended", "fault", "seq",
            "final_seq", "tip_block", "final_block", "tip_time", "finality", "roles", "principals",
            "wallets", "steps", "faults", "lies", "quorum", "endpoints", "warnings",
        )  # fmt: skip
        return {
            "status": {
                **{name: found[name] for name in same},
                "regressed": bool(found["regressed"]),
                "held": len(found["held"]),
                "grants": sizes["grants"],
                "admins": sizes["admins"],
                "keys": sizes["keys"],
                "try_out": bool(found["try_out"]),
            }
        }

    async def list(self, first: int, count: int, all: bool) -> dict[str, object]:
        """Records of the newest block, with what counts of them."""
        backend = self._backend
        replica, now = backend.replica, backend.replica.now()
        found = [
            (role_name(role) or "0x" + role.hex(), account, scope, grant, rights)
            for scope, role, account, grant in replica.tip.listing()
            if scope in (replica.scope, ROOT)
            for rights in (self._counts(scope, role, account, now),)
            if rights or all
        ]
        found.sort(key=lambda item: item[:3])
        page = found[first : first + min(count or PAGE_MAX, PAGE_MAX)]
        return {
            "records": [
                {
                    "account": checksum(account),
                    "role": role,
                    "root": scope == ROOT,
                    "not_before": grant.not_before,
                    "expiry": grant.expiry,
                    "rights": hex(rights),
                    "granted": hex(grant.rights),
                    "by": "" if grant.by == NOBODY else checksum(grant.by),
                    "configured": role in backend.rules or role in RESERVED,
                }
                for role, account, scope, grant, rights in page
            ],
            "total": len(found),
        }

    def _counts(self, scope: bytes, role: bytes, account: bytes, now: int) -> int:
        """What one record gives now: by the final and the newest block."""
        replica = self._backend.replica
        if replica.is_held(account) or replica.final.paused or replica.tip.paused:
            return 0
        mask = replica.final.held(scope, role, account, now).rights
        return mask and mask & replica.tip.held(scope, role, account, now).rights

    async def explain(self, account: str, role: str) -> dict[str, object]:
        address = parse_address(account)
        try:
            what = role_id(role)
        except ValueError as exc:
            raise InvalidArgument(str(exc)) from None
        return {"explanation": explain(self._backend, address, what)}


def explain(backend: EvmBackend, account: bytes, role: bytes) -> dict[str, Any]:
    """Why an account has a role, or does not: the struct Explanation."""
    replica, now = backend.replica, backend.replica.now()
    name = role_name(role) or ""
    steps = []
    if why := replica.unfit():
        steps.append(f"nothing is decided now: {why}")
    masks = []
    for label, state, block in (
        ("final", replica.final, replica.final_block[0]),
        ("newest", replica.tip, replica.tip_block[0]),
    ):
        mask = state.rights(replica.scope, role, account, now)
        masks.append(mask)
        paused = " (paused)" if state.paused else ""
        steps.append(f"by the {label} block {block} the mask is {mask:#x}{paused}")
        for scope in (replica.scope, ROOT):
            grant = state.grants.get(account, {}).get((scope, role))
            if grant is not None:
                held = state.held(scope, role, account, now)
                where = "ROOT" if scope == ROOT else "the scope"
                by = "the owner" if grant.by == NOBODY else checksum(grant.by)
                steps.append(
                    f"  its record in {where}: from {grant.not_before} until {grant.expiry}, mask "
                    f"{grant.rights:#x} by {by}, counts {held.rights:#x}"
                )
    mask = masks[0] & masks[1]
    if replica.is_held(account):
        mask = 0
        steps.append("a withdrawal was taken back by a reorganisation, and holds until finality")
    names = backend.rules.names({name: mask}) if mask and name not in RESERVED else frozenset()
    if name in RESERVED:
        steps.append(f"`{name}` is reserved, and gives no service")
    elif name not in backend.rules:
        steps.append(f"this node's configuration has no role {name!r}: it allows nothing")
    elif mask and not names:
        steps.append(f"the configuration gives nothing for any bit of {mask:#x}")
    known = next(iter(names), "")
    profile = backend.profile(known)
    return {
        "allowed": bool(known) and not replica.unfit(),
        "role": known,
        "steps": steps,
        "services": [
            f"{service}: {', '.join(sorted(patterns))}"
            for service, patterns in sorted(profile.services.items())
        ]
        + [f"where {where.service}/{where.text}" for where in profile.where],
    }


class EvmService(Service):
    """The service `auth_evm`."""

    name = "auth_evm"
    interface = SCHEMA.EvmAuth

    def __init__(self, backend: EvmBackend) -> None:
        self._backend = backend

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        """A fresh servant; the broker guards it."""
        return EvmServant(self._backend)
