"""The core's service `grants`: what operators see and end. See core.capnp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wetware.broker.ports import Service
from wetware.broker.protocol import CORE
from wetware.broker.subtree import SubtreeServant, clean, end_now, settle
from wetware.identity import Principal

if TYPE_CHECKING:
    from wetware import rpc
    from wetware.broker.records import Records
    from wetware.broker.tree import Tree


class GrantsServant(SubtreeServant, interface=CORE.Grants):
    """See core.capnp."""

    def __init__(self, service: GrantsService, principal: Principal) -> None:
        super().__init__(service.tree, service.audit, principal)
        self._confirmed = service.confirmed

    async def resume(self) -> dict[str, object]:
        """An operator has looked at what may have come back after a crash."""
        await self._audit.admit("shares.resumed", by=self._principal)
        self._confirmed()
        return {"shares": self._tree.resume()}

    async def end_sessions(self, principal: str, reason: str) -> dict[str, object]:
        """End all that comes from a principal's roles, or from everybody's."""
        who = Principal.parse(principal) if principal else None
        reason = clean(reason, f"ended by {self._principal}")
        roots = self._tree.roots(who)
        cut = end_now(roots, reason) - len(roots)
        self._audit.ended(
            "sessions.ended", principal=who or "*", by=self._principal, cut=cut, reason=reason
        )
        await settle(self._tree, self._audit, roots, reason)
        return {"cut": cut}


class GrantsService(Service):
    """The service `grants`; `confirmed` is told that an operator has looked (`resume`)."""

    name = "grants"
    interface = CORE.Grants
    ending = frozenset({"Grants.list", "Grants.revoke", "Grants.why", "Grants.end_sessions"})

    def __init__(self, tree: Tree, audit: Records, confirmed: Callable[[], None]) -> None:
        self.tree, self.audit, self.confirmed = tree, audit, confirmed

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return GrantsServant(self, principal)
