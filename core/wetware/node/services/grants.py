"""The core's service `grants`: what operators see and end. See core.capnp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wetware import rpc
from wetware.broker.ports import Service
from wetware.broker.protocol import CORE
from wetware.broker.session import (
    GRANTS_MAX,
    end_now,
    listed,
    revoke,
    settle,
    why,
)
from wetware.errors import NotFound
from wetware.identity import Principal

if TYPE_CHECKING:
    from wetware.broker.records import Records
    from wetware.broker.tree import Tree


class GrantsServant(rpc.Servant, interface=CORE.Grants):
    """See core.capnp."""

    def __init__(self, service: GrantsService, principal: Principal) -> None:
        self._tree, self._audit = service.tree, service.audit
        self._confirmed, self._principal = service.confirmed, principal

    async def list(self, principal: str, limit: int) -> dict[str, object]:
        """The grants of a principal, or all."""
        who = Principal.parse(principal) if principal else None
        infos, matched = listed(self._tree.roots(who), min(limit or GRANTS_MAX, GRANTS_MAX))
        return {"grants": infos, "matched": matched}

    async def revoke(self, id: str, reason: str) -> dict[str, object]:
        grant = self._tree.get(id)
        if grant is None:
            if self._tree.has_ended(id):
                await settle(self._tree, self._audit, (), reason)
                return {"cut": 0}
            raise NotFound(
                f"this node has no grant {id[:32]!r}",
                hint="`ww grants --all` shows them",
                code="not_found.grant",
            )
        by = str(self._principal)
        return {"cut": await revoke(self._audit, grant, reason, by, operator=True)}

    async def why(self, decision: str) -> dict[str, object]:
        return {"explanation": why(self._tree, decision, lambda _: True).wire()}

    async def resume(self) -> dict[str, object]:
        """An operator has looked at what may have come back."""
        await self._audit.admit("shares.resumed", by=self._principal)
        self._confirmed()
        return {"shares": self._tree.resume()}

    async def end_sessions(self, principal: str, reason: str) -> dict[str, object]:
        """End all that comes from a principal's roles, or from everybody's."""
        who = Principal.parse(principal) if principal else None
        reason = reason[:256] or f"ended by {self._principal}"
        roots = self._tree.roots(who)
        cut = end_now(roots, reason) - len(roots)
        self._audit.ended(
            "sessions.ended", principal=who or "*", by=self._principal, cut=cut, reason=reason
        )
        await settle(self._tree, self._audit, roots, reason)
        return {"cut": cut}


class GrantsService(Service):
    """The service `grants`.

    Args:
        tree: The grants of this node.
        audit: Where ends are recorded.
        confirmed: Called when an operator has looked at what may have come back after a crash.
    """

    name = "grants"
    interface = CORE.Grants
    ending = frozenset({"Grants.list", "Grants.revoke", "Grants.why", "Grants.end_sessions"})

    def __init__(self, tree: Tree, audit: Records, confirmed: Callable[[], None]) -> None:
        self.tree, self.audit, self.confirmed = tree, audit, confirmed

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return GrantsServant(self, principal)
