"""What a member of the cluster has here as the node that it is: its plugins' siblings.

A node never acts for a user: what it holds is under no role, session or grant, only under this:
that it is a member, on that connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.broker.protocol import CORE
from wetware.errors import Denied, Unsupported, WetwareError
from wetware.identity import PeerId, Principal
from wetware.rpc.wire import fresh

if TYPE_CHECKING:
    import asyncio

    from wetware.broker.ports import Service
    from wetware.rpc import Method


def no_peer(who: str) -> Denied:
    """The refusal of `Gate.peer`."""
    return Denied(
        f"{who}: only nodes of the cluster have siblings here",
        hint="log in (`wetware.connect`), as every client does",
        code="capability.denied.peer",
    )


class PeerGuard:
    """`wetware.rpc.Guard` of all that one member holds by one RPC connection: it is alive, or not.

    That connection's `RpcLimits` bound the calls, and the objects that are held.
    """

    payer = None
    metered = False

    def __init__(self) -> None:
        self.ended: WetwareError | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        self._callbacks: dict[object, Callable[[WetwareError], None]] = {}

    @property
    def blocked(self) -> WetwareError | None:
        return self.ended

    def end(self, error: WetwareError) -> None:
        """Nothing passes from here on, and what is in flight is cut. Idempotent."""
        if self.ended is None:
            self.ended = error
            for task in tuple(self._calls):
                task.cancel()
            callbacks, self._callbacks = self._callbacks, {}
            for callback in callbacks.values():
                callback(error)

    def enter(
        self,
        _method: Method,
        _args: Mapping[str, object],
        task: asyncio.Task[Any],
        _passed: bool = False,
    ) -> None:
        if self.ended is not None:
            raise fresh(self.ended)
        self._calls.add(task)

    def leave(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)

    def charge(self, _method: Method, _nbytes: int) -> None:
        """Nothing is metered."""

    def onward(
        self, _method: Method, _args: Mapping[str, object], _passed: bool = False
    ) -> PeerGuard:
        return self

    def on_end(self, callback: Callable[[WetwareError], None]) -> Callable[[], None]:
        if self.ended is not None:
            callback(self.ended)
            return lambda: None
        token = object()
        self._callbacks[token] = callback
        return lambda: self._callbacks.pop(token, None) and None

    def exported(self) -> None:
        """It does not depend on who holds what."""

    def unexported(self) -> bool:
        return False

    def let_go(self) -> None:
        """See `exported`."""


class PeerServant(rpc.Servant, interface=CORE.Peer):
    """See core.capnp.

    Args:
        node: Whose it is.
        services: Of this node, by name.
        opened: Told of the name of each service that is opened, once.
    """

    def __init__(
        self, node: PeerId, services: Mapping[str, Service], opened: Callable[[str], None]
    ) -> None:
        self._principal = Principal("node", str(node))
        self._services, self._told = services, opened
        self._opened: set[str] = set()

    async def open(self, service: str) -> dict[str, object]:
        found = self._services.get(service)
        servant = None if found is None else found.peer_bootstrap(self._principal)
        if servant is None:
            why = "is not running there" if found is None else "has no siblings"
            raise Unsupported(
                f"the service {service[:64]!r} {why}",
                hint="`ww plugin list` on that node says why a plugin is not loaded",
                code="unsupported.service",
            )
        if service not in self._opened:
            self._opened.add(service)
            self._told(service)
        return {"service": servant}
