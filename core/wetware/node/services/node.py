"""The core's service `node`: what a node is doing. See schema/core.capnp."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import anyio

from wetware import rpc
from wetware.base.log import get_logger
from wetware.broker.protocol import CORE
from wetware.errors import Disconnected, InternalError, LimitExceeded, WetwareError, stopping
from wetware.hookspecs import Service

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.broker.proposals import Proposal
    from wetware.broker.records import Records
    from wetware.identity import Principal

log = get_logger("node")

TOLD_CHARS_MAX: Final = 200
"""Of how far a service is with handing over."""
TOLD_ITEMS_MAX: Final = 64
"""Services whose latest words wait for who asked."""
TOLD_BYTES_MAX: Final = 64 << 10


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

    async def hand_over(self, sink: rpc.Ref | None) -> dict[str, object]:
        """The services give others what this node alone has."""
        await self._service.audit.admit("operator.handing_over", principal=self._principal)
        return {"subscription": self._service.start_hand_over(sink)}


class NodeService(Service):
    """The service `node`.

    Args:
        status: Gives the struct NodeStatus of core.capnp, with what is for operators or without.
        restart_overlay: Ends the libp2p guest, which starts again.
        trust_clock: The machine's clock is right, says a principal.
        proposal: What a service proposes, and how that is accepted.
        hand_over: Has the services give others what this node alone has; is given where a service
            says how far it is.
        audit: Where it is recorded who ordered that.
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
        hand_over: Callable[[Callable[[str, str], object]], Awaitable[None]],
        audit: Records,
    ) -> None:
        self.status, self.restart_overlay = status, restart_overlay
        self.trust_clock, self.proposal = trust_clock, proposal
        self._hand_over, self.audit = hand_over, audit
        self._tasks: asyncio.TaskGroup | None = None
        self._handing_over = False

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                task_status.started()
                await anyio.sleep_forever()
        finally:
            self._tasks = None

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return NodeServant(self, principal)

    def start_hand_over(self, sink: rpc.Ref | None) -> rpc.Pump:
        """See core.capnp. Raises LimitExceeded, Disconnected, InvalidArgument."""
        if self._tasks is None:
            raise Disconnected("the service is not running")
        if self._handing_over:
            raise LimitExceeded("this node is handing over already", hint="wait until it has")
        pump = rpc.Pump(sink, items_max=TOLD_ITEMS_MAX, bytes_max=TOLD_BYTES_MAX)
        self._handing_over = True
        task = self._tasks.create_task(self._tell(pump), name="handing over")
        task.add_done_callback(self._handed_over)

        def ended(_: rpc.Pump) -> None:
            task.cancel()

        pump.start(ended)
        return pump

    def _handed_over(self, _: asyncio.Task[None]) -> None:
        self._handing_over = False

    async def _tell(self, pump: rpc.Pump) -> None:
        def tell(service: str, text: str) -> None:
            pump.offer(f"{service}: {text[:TOLD_CHARS_MAX]}".encode(), service)

        try:
            await self._hand_over(tell)
        except WetwareError as exc:
            pump.end(exc)
        except asyncio.CancelledError:
            pump.end(stopping())
            raise
        except Exception:
            log.exception("node.hand_over_failed")
            pump.end(InternalError("a service failed to hand over; the node's log says how"))
        else:
            pump.offer(b"")
