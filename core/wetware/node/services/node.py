"""The core's service `node`: what a node is doing. See schema/core.capnp."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import MappingProxyType
from typing import TYPE_CHECKING

from wetware import rpc
from wetware.base.log import get_logger
from wetware.broker.protocol import CORE
from wetware.hookspecs import Service

if TYPE_CHECKING:
    from wetware.broker.proposals import Proposal
    from wetware.identity import Principal

log = get_logger("node")


class NodeServant(rpc.Servant, interface=CORE.Node):
    """See core.capnp."""

    def __init__(self, service: NodeService, principal: Principal) -> None:
        self._service, self._principal = service, principal

    async def status(self) -> dict[str, object]:
        return {"status": self._service.status(False)}

    async def details(self) -> dict[str, object]:
        """The same, and what is for operators."""
        return {"status": self._service.status(True)}

    async def restart_overlay(self) -> None:
        """End the libp2p guest as a crash would."""
        log.warning("overlay.restart_requested")
        self._service.restart_overlay()

    async def trust_clock(self) -> None:
        """The machine's clock is right: an operator has looked at it."""
        await self._service.trust_clock(self._principal)

    async def proposal(self, service: str) -> dict[str, object]:
        """What a service proposes for the standard roles."""
        proposal, how = self._service.proposal(service)
        roles = [{"role": role, "methods": sorted(each)} for role, each in proposal.items()]
        return {"roles": roles, "how": how}


class NodeService(Service):
    """The service `node`.

    Args:
        status: Gives the struct NodeStatus of core.capnp, with what is for operators or without.
        restart_overlay: Ends the libp2p guest, which starts again.
        trust_clock: The machine's clock is right, says a principal.
        proposal: What a service proposes, and how that is accepted.
    """

    name = "node"
    interface = CORE.Node
    roles = MappingProxyType(dict.fromkeys(("reader", "member"), frozenset({"Node.status"})))
    ending = frozenset({"Node.status"})

    def __init__(
        self,
        *,
        status: Callable[[bool], dict[str, object]],
        restart_overlay: Callable[[], None],
        trust_clock: Callable[[Principal], Awaitable[None]],
        proposal: Callable[[str], tuple[Proposal, str]],
    ) -> None:
        self.status, self.restart_overlay = status, restart_overlay
        self.trust_clock, self.proposal = trust_clock, proposal

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return NodeServant(self, principal)
