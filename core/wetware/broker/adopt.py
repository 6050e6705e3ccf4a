"""References to other nodes that this node holds for its users.

A user hands in a sturdy reference of another member of the cluster; this node redeems it there,
over the one RPC connection that it keeps to that member, and gives the session that comes of it
through a membrane: a grant of its own, below the user's session, cuts everything that came through
when it ends. It ends with the user's session; as soon as the issuer says that the reference has
ended; and, where the issuer says nothing, when the lease has run out: a node that is cut off
refuses by then.

Source: Gray & Cheriton, "Leases: An Efficient Fault-Tolerant Mechanism for Distributed File Cache
Consistency" (SOSP 1989).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.base.bounds import Claim, Places
from wetware.base.log import get_logger
from wetware.broker.protocol import CORE
from wetware.errors import (
    CapabilityError,
    DialError,
    InternalError,
    InvalidArgument,
    Revoked,
    Unsupported,
    WetwareError,
)

if TYPE_CHECKING:
    from wetware.broker.grants import Grant
    from wetware.broker.limits import BrokerLimits
    from wetware.broker.ports import Service
    from wetware.broker.sturdy import SturdyRef
    from wetware.identity import PeerId

log = get_logger("broker")

ADOPT_S: Final = 10.0
"""For reaching the issuer and redeeming together."""
BEATS_PER_LEASE: Final = 3
LEASE_CODE: Final = "capability.revoked.lease"

Connect = Callable[["PeerId"], Awaitable[rpc.RpcConnection]]
"""Opens an RPC connection to a member's Gate; raises OverlayError or AdmissionRefused."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """A reference of another node, as its holder here gets it.

    Attributes:
        session: To be returned: the issuer's session behind the membrane.
        grant: The local one.
        lease_s: How long it works without hearing from the issuer.
    """

    session: rpc.Guarded
    grant: Grant
    lease_s: float


class _Peer:
    """The connection to one member, shared by all that is held from there."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.connection: rpc.RpcConnection | None = None
        self.users = 0


class Adoptions:
    """All of them.

    Args:
        peer_id: This node.
        connect: See Connect.
        limits: Bounds.
        services: Of this node, which give the interfaces of the services there.
    """

    def __init__(
        self,
        peer_id: PeerId,
        connect: Connect,
        limits: BrokerLimits,
        services: Mapping[str, Service],
    ) -> None:
        self._peer_id, self._connect, self._limits = peer_id, connect, limits
        self._services = services
        self._peers: dict[PeerId, _Peer] = {}
        self._places = Places()
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    async def adopt(self, ref: SturdyRef, session: Grant) -> Adopted:
        """Redeem `ref` at its issuer, for the holder of `session`.

        Raises what the issuer answers, DialError or AdmissionRefused if it cannot be reached as a
        member, LimitExceeded.
        """
        if ref.peer == self._peer_id:
            raise InvalidArgument(
                "this node issued the reference itself",
                hint="use it directly: `ww use REF`, or wetware.connect(ref)",
                code="invalid.reference",
            )
        stack = contextlib.AsyncExitStack()
        async with contextlib.AsyncExitStack() as undo:
            await undo.enter_async_context(stack)
            limits = self._limits
            stack.enter_context(
                self._places.hold(
                    Claim(
                        session.id,
                        limits.adoptions_per_session_max,
                        f"{limits.adoptions_per_session_max} references of other nodes are held by "
                        "this session (adoptions_per_session_max)",
                    ),
                    Claim(
                        "all",
                        limits.adoptions_max,
                        f"{limits.adoptions_max} references of other nodes are held here "
                        "(adoptions_max)",
                    ),
                )
            )
            try:
                async with asyncio.timeout(ADOPT_S):
                    gate = await stack.enter_async_context(self._gate(ref.peer))
                    reply = await gate.call("redeem", id=bytes.fromhex(ref.id), secret=ref.secret)
                    remote: rpc.Ref | None = reply["session"]
                    if remote is None:
                        raise InternalError("the issuer answered without a session")
                    stack.callback(remote.close)
                    sent = asyncio.get_running_loop().time()
                    lease_s = float((await remote.call("keep"))["lease_s"])
            except TimeoutError:
                raise DialError(
                    f"the issuer {ref.peer} did not answer within {ADOPT_S:g} s",
                    hint="`ww ping` shows whether it is there",
                    code="overlay.dial.timeout",
                ) from None
            if not 0 < lease_s <= limits.lease_s:  # never longer than this node allows
                lease_s = limits.lease_s
            grant = session.derive(
                kind="adopted", label=f"{reply['grant']['label']} of {ref.peer}"[:128]
            )
            undo.pop_all()
        task = asyncio.create_task(
            self._hold(stack, remote, grant, sent + lease_s, lease_s), name="adopted reference"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        session_here = AdoptedSession(remote, grant, self._services, top=True)
        return Adopted(rpc.guarded(session_here, grant), grant, lease_s)

    async def aclose(self) -> None:
        """End all of them. Idempotent."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- while it is held -------------------------------------------------------------------------

    async def _hold(
        self,
        stack: contextlib.AsyncExitStack,
        remote: rpc.Ref,
        grant: Grant,
        deadline: float,
        lease_s: float,
    ) -> None:
        """Until the local grant ends, whoever ends it."""
        over = asyncio.Event()
        grant.on_end(lambda _: over.set(), holds=False)
        async with stack:
            watchers = [
                asyncio.create_task(self._told(remote)),
                asyncio.create_task(self._beat(remote, deadline, lease_s)),
            ]
            waiting = asyncio.create_task(over.wait())
            try:
                done, _ = await asyncio.wait(
                    [*watchers, waiting], return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    if task is not waiting:
                        grant.end(_why(task))
            finally:
                grant.end(Revoked("the node let the reference go", code=LEASE_CODE))
                for task in (*watchers, waiting):
                    task.cancel()
                await asyncio.gather(*watchers, waiting, return_exceptions=True)

    async def _told(self, remote: rpc.Ref) -> None:
        """The issuer cuts this call when the reference ends."""
        await remote.call("ended")

    async def _beat(self, remote: rpc.Ref, deadline: float, lease_s: float) -> None:
        """Ask again and again; raises TimeoutError when the lease has run out."""
        loop = asyncio.get_running_loop()
        while True:
            async with asyncio.timeout_at(deadline):
                await asyncio.sleep(lease_s / BEATS_PER_LEASE)
                sent = loop.time()
                await remote.call("keep")
            deadline = sent + lease_s  # from when it was asked: the answer may have been long

    # --- connections ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _gate(self, peer_id: PeerId) -> Any:
        """The Gate of a member, over a connection that ends with its last user."""
        peer = self._peers.setdefault(peer_id, _Peer())
        peer.users += 1
        try:
            async with peer.lock:
                if peer.connection is None or peer.connection.closed:
                    old, peer.connection = peer.connection, None
                    if old is not None:
                        await old.aclose()
                    peer.connection = await self._connect(peer_id)
            yield peer.connection.bootstrap(CORE.Gate)
        finally:
            peer.users -= 1
            if not peer.users and self._peers.get(peer_id) is peer:
                del self._peers[peer_id]
                if peer.connection is not None:
                    await peer.connection.aclose()


class AdoptedSession(rpc.Servant, interface=CORE.Session):
    """The issuer's session, behind the membrane. See core.capnp.

    A service whose interface this node does not know is not passed on: nothing could say which of
    the things that come through are capabilities.

    Args:
        remote: The issuer's session, or one that was attenuated from it.
        grant: What cuts it here.
        services: Of this node.
        top: It is the one that was adopted: when its holder lets go, all of it ends.
    """

    def __init__(
        self, remote: rpc.Ref, grant: Grant, services: Mapping[str, Service], *, top: bool = False
    ) -> None:
        self._remote, self._grant, self._services = remote, grant, services
        self._top = top

    async def open(self, name: str) -> dict[str, object]:
        known = self._services.get(name)
        if known is None:
            raise Unsupported(
                f"this node does not have the service {name[:64]!r} and cannot pass it on",
                hint="redeem the reference directly: `ww use REF`, or wetware.connect(ref)",
                code="unsupported.service",
            )
        service: rpc.Ref | None = (await self._remote.call("open", name=name))["service"]
        if service is None:
            raise InternalError("the issuer answered without a service")
        return {"service": rpc.guarded(service.cast(known.interface), self._grant)}

    async def attenuate(self, terms: dict[str, Any], label: str) -> dict[str, object]:
        """A weaker one, which the issuer makes and knows of."""
        reply = await self._remote.call("attenuate", terms=terms, label=label)
        if (remote := reply["session"]) is None:
            raise InternalError("the issuer answered without a session")
        session = AdoptedSession(remote, self._grant, self._services)
        return {"session": rpc.guarded(session, self._grant), "grant": reply["grant"]}

    async def adopt(self, ref: str) -> dict[str, object]:
        raise Unsupported(
            "a reference is adopted with the session of one's own node", code="unsupported.adopt"
        )

    async def whoami(self) -> Any:
        return await self._remote.call("whoami")

    async def services(self) -> Any:
        return await self._remote.call("services")

    async def logout(self) -> None:
        """At the issuer, which ends it here as well."""
        await self._remote.call("logout")

    async def share(self, terms: dict[str, Any], uses: int, label: str) -> Any:
        """Not through somebody else: it would outlive the session that it hangs on here.

        When that one's user loses their role, the issuer does not hear of it.
        """
        raise Unsupported(
            "what is held through another node cannot be shared from there",
            hint="redeem the reference directly and share that: `ww use REF share …`",
            code="unsupported.share",
        )

    async def grants(self) -> Any:
        return await self._remote.call("grants")

    async def revoke(self, id: str, reason: str) -> Any:
        return await self._remote.call("revoke", id=id, reason=reason)

    async def why(self, decision: str) -> Any:
        return await self._remote.call("why", decision=decision)

    async def explain(
        self, service: str, interface: str, method: str, args: list[dict[str, str]]
    ) -> Any:
        return await self._remote.call(
            "explain", service=service, interface=interface, method=method, args=args
        )

    async def keep(self) -> Any:
        return await self._remote.call("keep")

    async def ended(self) -> None:
        """At the issuer; cut here as well."""
        await self._remote.call("ended")

    def released(self) -> None:
        """The holder let go of this one; the issuer hears of it.

        Not of the top one: what came from it may be held, and its lease hangs on it.
        """
        if self._top:
            self._grant.let_go()
        else:
            self._remote.close()


def _why(task: asyncio.Task[Any]) -> CapabilityError:
    """What ended a watcher, as the reason for the holders here."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, CapabilityError):
        return error
    if isinstance(error, TimeoutError):
        return Revoked(
            "the issuer of the reference was not heard from within the lease",
            hint="try again when it can be reached",
            code=LEASE_CODE,
        )
    if isinstance(error, WetwareError):
        return Revoked(
            f"the issuer of the reference is gone: {error.message}",
            hint="try again when it can be reached",
            code=LEASE_CODE,
        )
    if error is not None:
        log.error("adoption.failed", exc_info=error)
    return Revoked("the issuer ended the reference", code=LEASE_CODE)
