"""`session.grants_service`: the core's service `grants`, for operators."""

from __future__ import annotations

from typing import Any

from wetware.base.structs import from_struct
from wetware.broker.protocol import CORE
from wetware.broker.told import Explanation, GrantInfo


class GrantsClient:
    """All grants of a node."""

    INTERFACE = CORE.Grants

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    async def list(self, principal: str = "", *, limit: int = 0) -> tuple[GrantInfo, ...]:
        """Of a principal, or of everybody; parents first."""
        reply = await self._ref.call("list", principal=principal, limit=limit)
        return tuple(from_struct(GrantInfo, grant) for grant in reply["grants"])

    async def revoke(self, grant_id: str, reason: str = "") -> int:
        """End any grant and all below it, now; returns how many ended."""
        cut: int = (await self._ref.call("revoke", id=grant_id, reason=reason))["cut"]
        return cut

    async def why(self, decision: str = "") -> Explanation:
        """What decided any denial that is remembered; "" is the latest."""
        reply = await self._ref.call("why", decision=decision)
        return from_struct(Explanation, reply["explanation"])

    async def resume(self) -> int:
        """Let shares work again that are suspended since the node started; how many there are."""
        shares: int = (await self._ref.call("resume"))["shares"]
        return shares

    async def end_sessions(self, principal: str = "", reason: str = "") -> int:
        """End all sessions and shares at this node of a principal, or of everybody.

        Returns how many grants ended; roles are not counted, and remain.
        """
        reply = await self._ref.call("end_sessions", principal=principal, reason=reason)
        cut: int = reply["cut"]
        return cut
