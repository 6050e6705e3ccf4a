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
import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

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


class Adopted(NamedTuple):
    """The issuer's session behind the membrane, the grant that cuts it here, and its lease."""

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
    """All of them; this node's own `services` give the interfaces of those there."""

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
        limits = self._limits
        async with contextlib.AsyncExitStack() as undo:
            undo.enter_context(
                self._places.hold(
                    *(
                        Claim(key, limit, f"{limit} references of other nodes are held {where}")
                        for key, limit, where in (
                            (
                                session.id,
                                limits.adoptions_per_session_max,
                                "by this session (adoptions_per_session_max)",
                            ),
                            ("all", limits.adoptions_max, "here (adoptions_max)"),
                        )
                    )
                )
            )
            try:
                async with asyncio.timeout(ADOPT_S):
                    gate = await undo.enter_async_context(self._gate(ref.peer))
                    reply = await gate.call("redeem", id=bytes.fromhex(ref.id), secret=ref.secret)
                    remote = _given(reply, "session")
                    undo.callback(remote.close)
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
            held = undo.pop_all()
        task = asyncio.create_task(
            self._hold(held, remote, grant, sent + lease_s, lease_s), name="adopted reference"
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

    async def _hold(
        self,
        held: contextlib.AsyncExitStack,
        remote: rpc.Ref,
        grant: Grant,
        deadline: float,
        lease_s: float,
    ) -> None:
        """Until the local grant ends, whoever ends it."""
        async with held:
            watchers = (
                # The issuer cuts this call when the reference ends.
                asyncio.create_task(remote.call("ended")),
                asyncio.create_task(_beat(remote, deadline, lease_s)),
            )
            grant.on_end(functools.partial(_cancel, watchers), holds=False)
            try:
                done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
                grant.end(_why(next(task for task in watchers if task in done)))
            finally:
                grant.end(Revoked("the node let the reference go", code=LEASE_CODE))
                await asyncio.gather(*watchers, return_exceptions=True)

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


def _cancel(tasks: Iterable[asyncio.Task[Any]], _: object) -> None:
    for task in tasks:
        task.cancel()


async def _beat(remote: rpc.Ref, deadline: float, lease_s: float) -> None:
    """Ask again and again; raises TimeoutError when the lease has run out."""
    loop = asyncio.get_running_loop()
    while True:
        async with asyncio.timeout_at(deadline):
            await asyncio.sleep(lease_s / BEATS_PER_LEASE)
            sent = loop.time()
            await remote.call("keep")
        deadline = sent + lease_s  # from when it was asked: the answer may have been long


def _given(reply: Mapping[str, Any], name: str) -> rpc.Ref:
    ref: rpc.Ref | None = reply[name]
    if ref is None:
        raise InternalError(f"the issuer answered without a {name}")
    return ref


def _at_issuer(method: str) -> Any:
    """A method that the issuer's session answers."""

    async def call(self: AdoptedSession, **params: object) -> Any:
        return await self._remote.call(method, **params)

    return call


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

    whoami = _at_issuer("whoami")
    services = _at_issuer("services")
    logout = _at_issuer("logout")
    list = _at_issuer("list")
    revoke = _at_issuer("revoke")
    why = _at_issuer("why")
    explain = _at_issuer("explain")
    keep = _at_issuer("keep")
    ended = _at_issuer("ended")

    async def open(self, name: str) -> dict[str, object]:
        known = self._services.get(name)
        if known is None:
            raise Unsupported(
                f"this node does not have the service {name[:64]!r} and cannot pass it on",
                hint="redeem the reference directly: `ww use REF`, or wetware.connect(ref)",
                code="unsupported.service",
            )
        service = _given(await self._remote.call("open", name=name), "service")
        return {"service": rpc.guarded(service.cast(known.interface), self._grant)}

    async def attenuate(self, terms: dict[str, Any], label: str) -> dict[str, object]:
        """A weaker one, which the issuer makes and knows of."""
        reply = await self._remote.call("attenuate", terms=terms, label=label)
        session = AdoptedSession(_given(reply, "session"), self._grant, self._services)
        return {"session": rpc.guarded(session, self._grant), "grant": reply["grant"]}

    async def adopt(self, ref: str) -> dict[str, object]:
        raise Unsupported(
            "a reference is adopted with the session of one's own node", code="unsupported.adopt"
        )

    async def share(self, terms: dict[str, Any], uses: int, label: str) -> Any:
        """Not through somebody else: it would outlive the session that it hangs on here.

        When that one's user loses their role, the issuer does not hear of it.
        """
        raise Unsupported(
            "what is held through another node cannot be shared from there",
            hint="redeem the reference directly and share that: `ww use REF share …`",
            code="unsupported.share",
        )

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
    match error:
        case CapabilityError():
            return error
        case None:
            what, hint = "the issuer ended the reference", ""
        case TimeoutError():
            what = "the issuer of the reference was not heard from within the lease"
            hint = "try again when it can be reached"
        case WetwareError():
            what = f"the issuer of the reference is gone: {error.message}"
            hint = "try again when it can be reached"
        case _:
            log.error("adoption.failed", exc_info=error)
            what, hint = "the issuer ended the reference", ""
    return Revoked(what, hint=hint, code=LEASE_CODE)
