"""The core's service `grants`: what operators see and end. See core.capnp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wetware import rpc
from wetware.broker.session import (
    GRANTS_MAX,
    end_now,
    explanation_to_wire,
    listed,
    revoke,
    settle,
    why,
)
from wetware.errors import NotFound
from wetware.hookspecs import Service
from wetware.identity import Principal
from wetware.protocol import CORE

if TYPE_CHECKING:
    from wetware.broker.gate import Broker


class GrantsServant(rpc.Servant, interface=CORE.Grants):
    """See core.capnp."""

    def __init__(self, broker: Broker, principal: Principal) -> None:
        self._broker, self._principal = broker, principal

    async def list(self, principal: str, limit: int) -> dict[str, object]:
        """The grants of a principal, or all."""
        who = Principal.parse(principal) if principal else None
        infos, matched = listed(self._broker.tree.roots(who), min(limit or GRANTS_MAX, GRANTS_MAX))
        return {"grants": infos, "matched": matched}

    async def revoke(self, id: str, reason: str) -> dict[str, object]:
        """End any grant."""
        tree = self._broker.tree
        grant = tree.get(id)
        if grant is None:
            if tree.has_ended(id):
                await settle(self._broker, (), reason)
                return {"cut": 0}
            raise NotFound(
                f"this node has no grant {id[:32]!r}",
                hint="`ww grants --all` shows them",
                code="not_found.grant",
            )
        return {
            "cut": await revoke(self._broker, grant, reason, str(self._principal), operator=True)
        }

    async def why(self, decision: str) -> dict[str, object]:
        """What decided any denial."""
        return {
            "explanation": explanation_to_wire(why(self._broker.tree, decision, lambda _: True))
        }

    async def resume(self) -> dict[str, object]:
        """An operator has looked at what may have come back."""
        await self._broker.audit.admit("shares.resumed", by=self._principal)
        self._broker.confirmed()
        return {"shares": self._broker.tree.resume()}

    async def end_sessions(self, principal: str, reason: str) -> dict[str, object]:
        """End all that comes from a principal's roles, or from everybody's."""
        who = Principal.parse(principal) if principal else None
        tree, reason = self._broker.tree, reason[:256] or f"ended by {self._principal}"
        roots = tree.roots(who)
        cut = end_now(roots, reason) - len(roots)
        self._broker.audit.ended(
            "sessions.ended", principal=who or "*", by=self._principal, cut=cut, reason=reason
        )
        await settle(self._broker, roots, reason)
        return {"cut": cut}


class GrantsService(Service):
    """The service `grants`."""

    name = "grants"
    interface = CORE.Grants
    ending = frozenset({"Grants.list", "Grants.revoke", "Grants.why", "Grants.end_sessions"})

    def __init__(self, broker: Callable[[], Broker]) -> None:
        self._broker = broker

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        """A Grants for one session."""
        return GrantsServant(self._broker(), principal)
