"""The core's service `cluster`: the membership and the admission of nodes, as capabilities.

Whoever holds `Cluster` may call what their grant covers: users list, watch, ping and tunnel;
operators invite and evict. See schema/core.capnp.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio

from wetware import rpc
from wetware.base.bounds import Claim, Places
from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.broker.protocol import CORE
from wetware.errors import (
    AdmissionRefused,
    Disconnected,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    WetwareError,
    stopping,
)
from wetware.hookspecs import Service
from wetware.identity import PeerId, Principal
from wetware.overlay.membership.proof import encode_founding
from wetware.overlay.tunnel import TUNNEL_PROTOCOL, TunnelPipe, relay

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.base.finding import Finding
    from wetware.broker.limits import LoginLimits
    from wetware.broker.records import Records
    from wetware.hookspecs import PluginContext
    from wetware.member import Member
    from wetware.overlay.admission.decision import Admission
    from wetware.overlay.link import Stream
    from wetware.overlay.membership.service import Membership

log = get_logger("cluster")

LIST_MAX = 1000
"""Members in one answer of `list`, some 400 bytes each: well below the limit of a message."""
SIGNED_BYTES_MAX = 384 << 10
"""Records in one such answer, some 800 bytes each; a description is not longer than its record."""
WATCHES_MAX = 256
"""Watches of all sessions."""
WATCH_ITEMS_MAX = 16_384
"""Members whose latest state waits for one sink: four times the default of a table."""
WATCH_BYTES_MAX = 8 << 20
"""Their descriptions, which are some 600 bytes each."""
CHECK_S_MAX = 20.0
"""For `check`: what takes longer is itself a finding."""


class ClusterService(Service):
    """See `hookspecs.Service`.

    Args:
        ctx: Who is in the cluster, and its protocols.
        admission: Lets nodes in, and puts them out.
        membership: Reaches members.
        audit: Where it is recorded who ordered what.
        check: What the node finds when it looks at itself.
        limits: Of tunnels.
        closed: Whether nobody may join, as the node tries out its auth backend.
    """

    name = "cluster"
    interface = CORE.Cluster
    # Inviting and evicting are for operators.
    roles = MappingProxyType(
        {
            "reader": frozenset(
                {"Cluster.list", "Cluster.watch", "Cluster.ping", "Subscription.*"}
            ),
            "member": frozenset(
                {"Cluster.list", "Cluster.watch", "Cluster.ping", "Cluster.tunnel"}
                | {"Subscription.*", "ByteStream.*"}
            ),
        }
    )
    ending = frozenset(
        {f"Cluster.{name}" for name in ("list", "tickets", "revoke_ticket", "evict", "check")}
    )

    def __init__(
        self,
        ctx: PluginContext,
        *,
        admission: Admission,
        membership: Membership,
        audit: Records,
        check: Callable[[], Awaitable[Iterable[Finding]]],
        limits: LoginLimits,
        closed: bool,
    ) -> None:
        self.ctx, self.admission, self.membership, self.audit = ctx, admission, membership, audit
        self.limits, self.closed = limits, closed
        self.check = check
        self._watches: set[rpc.Pump] = set()
        self._tunnels = Places()
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                task_status.started()
                await anyio.sleep_forever()
        finally:
            self._tasks = None
            for watch in tuple(self._watches):
                watch.end(stopping())

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return ClusterServant(self, principal)

    # --- watches ----------------------------------------------------------------------------------

    def start_watch(self, selector: str, sink: rpc.Ref | None) -> rpc.Pump:
        """Push members to `sink`: all that match, then each change.

        Raises LimitExceeded, Disconnected, InvalidArgument.
        """
        if len(self._watches) >= WATCHES_MAX:
            raise LimitExceeded(f"{WATCHES_MAX} watches are running (WATCHES_MAX)")
        if self._tasks is None:
            raise Disconnected("the service is not running")
        watch = rpc.Pump(sink, items_max=WATCH_ITEMS_MAX, bytes_max=WATCH_BYTES_MAX)

        def show(member: Member) -> None:
            item = json.dumps(to_wire(member), separators=(",", ":")).encode()
            watch.offer(item, member.peer_id)

        unwatch = self.ctx.watch_members(show, selector)

        def ended(watch: rpc.Pump) -> None:
            self._watches.discard(watch)
            unwatch()

        self._watches.add(watch)
        watch.start(ended)
        return watch

    # --- tunnels ----------------------------------------------------------------------------------

    async def start_tunnel(
        self, session: ClusterServant, principal: Principal, peer: PeerId
    ) -> rpc.Servant:
        """A stream to the link of a member; raises DialError, LimitExceeded."""
        own, all_ = self.limits.tunnels_per_session_max, self.limits.tunnels_max
        if self._tasks is None:
            raise Disconnected("the service is not running")
        with contextlib.ExitStack() as stack:
            place = self._tunnels.hold(
                Claim(session, own, f"{own} tunnels of one session (tunnels_per_session_max)"),
                Claim(None, all_, f"{all_} tunnels are open (tunnels_max)"),
            )
            stack.enter_context(place)
            self.audit.record("tunnel.opened", principal=principal, peer=peer)
            connection = await self.membership.reach.connect(peer)
            stream = await connection.open_stream(TUNNEL_PROTOCOL)
            try:
                near = rpc.ByteStream()
            except LimitExceeded:  # as many as the connection may have
                stream.reset()
                raise
            carrying = self._carry(TunnelPipe(near), stream)
            task = self._tasks.create_task(carrying, name=f"tunnel to {peer.short}")
            held = stack.pop_all()
            task.add_done_callback(lambda _: held.close())
        return near.servant

    async def _carry(self, pipe: TunnelPipe, stream: Stream) -> None:
        try:
            await relay(pipe, stream)
        except WetwareError as exc:
            log.debug("tunnel.ended", peer=stream.peer, reason=exc)


_Labels: TypeAlias = list[dict[str, str]]


class ClusterServant(rpc.Servant, interface=CORE.Cluster):
    """See core.capnp."""

    def __init__(self, service: ClusterService, principal: Principal) -> None:
        self._service, self._principal = service, principal
        self._admission, self._membership = service.admission, service.membership
        self._audit = service.audit

    # --- for users --------------------------------------------------------------------------------

    async def list(self, selector: str, limit: int, signed: bool) -> dict[str, object]:
        """Members that match; the limit holds here, whatever the client asks for."""
        matched = self._service.ctx.members(selector)
        kept = matched[: min(limit or LIST_MAX, LIST_MAX)]
        if not signed:
            return {"members": [to_wire(member) for member in kept], "matched": len(matched)}
        members, room = [], SIGNED_BYTES_MAX
        for member in kept:
            room -= len(member.record)
            if room < 0:
                break
            members.append(to_wire(member) | {"record": member.record})
        founding = encode_founding(self._admission.founding)
        return {"members": members, "matched": len(matched), "founding": founding}

    async def watch(self, selector: str, sink: rpc.Ref | None) -> dict[str, object]:
        return {"subscription": self._service.start_watch(selector, sink)}

    async def ping(self, peer: str) -> dict[str, object]:
        return {"rtt_s": await self._membership.ping(self._member(peer))}

    async def tunnel(self, peer: str) -> dict[str, object]:
        """A stream to the link of a member."""
        target = self._member(peer)
        return {"stream": await self._service.start_tunnel(self, self._principal, target)}

    def _member(self, peer: str) -> PeerId:
        found = PeerId.parse(peer)
        if self._membership.member(found) is None:
            raise NotFound(
                f"{found} is no member of the cluster",
                hint="`ww ls --wide` shows the members",
                code="not_found.member",
            )
        return found

    async def _record(self, verb: str, **fields: object) -> None:
        """Who ordered it; admission has recorded what it did. The answer waits for both."""
        self._audit.record(f"operator.{verb}", principal=self._principal, **fields)
        await self._audit.written()

    async def _end(self, ending: Awaitable[object], verb: str, **fields: object) -> None:
        """The same of what ends something: also where that is in force and could not be saved.

        `ending` has to be in force before it waits for the first time.
        """
        try:
            await ending
        except (AdmissionRefused, asyncio.CancelledError) as exc:
            # Who ordered it may go away while the disk works.
            if getattr(exc, "code", "admission.not_saved") == "admission.not_saved":
                self._audit.ended(f"operator.{verb}", principal=self._principal, **fields)
            raise
        self._audit.ended(f"operator.{verb}", principal=self._principal, **fields)
        await self._audit.written()

    # --- for operators ----------------------------------------------------------------------------

    def _refuse_in_try_out(self) -> None:
        """Nobody joins a node whose auth backend decides by what was made for a try-out."""
        if self._service.closed:
            raise AdmissionRefused(
                "this node tries out its auth backend, for this machine alone: nobody can join it",
                hint="configure the auth backend and start a node without --dev, with a data "
                "directory of its own",
                code="admission.try_out",
            )

    def _addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(map(Multiaddr.parse, self._service.ctx.overlay.addrs()))

    async def invite(
        self, labels: _Labels, rights: Sequence[str], expires_s: int, uses: int
    ) -> dict[str, object]:
        self._refuse_in_try_out()
        ticket = await self._admission.issuer.invite(
            labels=_labels(labels),
            rights=frozenset(rights) or frozenset({"member"}),
            expires_s=expires_s or None,
            uses=uses or 1,
            addrs=self._addrs(),
        )
        await self._record("invited", ticket=ticket.id)
        return {"ticket": ticket.text, "id": ticket.id, "not_after_ms": ticket.not_after_ms}

    async def certify(
        self, peer: str, labels: _Labels, rights: Sequence[str], foreign: bool
    ) -> dict[str, object]:
        """A certificate for a known peer ID."""
        self._refuse_in_try_out()
        bundle = await self._admission.issuer.certify(
            PeerId.parse(peer),
            labels=_labels(labels),
            rights=frozenset(rights) or frozenset({"member"}),
            foreign=foreign,
            addrs=self._addrs(),
        )
        await self._record("certified", peer=peer)
        return {"bundle": bundle.text}

    async def tickets(self) -> dict[str, object]:
        return {
            "tickets": [
                {
                    "id": t.id,
                    "not_after_ms": t.not_after_ms,
                    "uses_left": t.uses_left,
                    "spent_by": [str(peer) for peer in t.spent],
                    "labels": _label_list(t.labels),
                    "rights": sorted(t.rights),
                    "revoked": t.revoked,
                }
                for t in self._admission.issuer.tickets()
            ]
        }

    async def revoke_ticket(self, id: str) -> None:
        await self._end(self._admission.issuer.revoke_ticket(id), "revoked", ticket=id[:64])

    async def evict(self, peer: str, reason: str) -> None:
        """End a membership; the record follows the effect."""
        target = PeerId.parse(peer)
        if target == self._service.ctx.overlay.peer_id:
            raise InvalidArgument(
                "a node does not evict itself",
                hint="run the command against another node, or stop this one",
            )
        await self._end(self._admission.issuer.evict(target, reason[:256]), "evicted", peer=target)

    async def check(self) -> dict[str, object]:
        """What `ww doctor` reports about this node."""
        try:
            async with asyncio.timeout(CHECK_S_MAX):
                findings = await self._service.check()
        except TimeoutError:
            raise LimitExceeded(f"the check took longer than {CHECK_S_MAX:g} s") from None
        return {
            "findings": [
                {"check": f.check, "level": f.level, "text": f.text, "remedy": f.remedy}
                for f in findings
            ]
        }


def to_wire(member: Member) -> dict[str, Any]:
    """The struct Member of core.capnp, but for `record`; its values can be written as JSON."""
    return member.as_dict() | {"labels": _label_list(member.labels)}


def _labels(labels: list[dict[str, str]]) -> dict[str, str]:
    return {label["key"]: label["value"] for label in labels}


def _label_list(labels: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in sorted(labels.items())]
