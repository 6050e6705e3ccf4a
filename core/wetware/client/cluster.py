"""`session.cluster`: who is in the cluster, and who may join it.

for member in await session.cluster.list("zone=home,state=alive"):
    print(member.name, member.addrs)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wetware import rpc
from wetware.base.finding import Finding, level
from wetware.base.structs import from_struct
from wetware.broker.protocol import CORE
from wetware.errors import InternalError, InvalidArgument, NotFound
from wetware.identity import PeerId
from wetware.member import Member
from wetware.overlay.membership.selector import Selector
from wetware.overlay.tunnel import TunnelPipe

NAMED_MAX = 5
"""Members that the refusal of an ambiguous name lists."""


class MemberList(tuple[Member, ...]):
    """Some members, and how many matched before the limit.

    Attributes:
        matched: All that matched, those included that the limit cut off.
    """

    matched: int

    def __new__(cls, members: Sequence[Member], matched: int) -> MemberList:
        """See the class."""
        made = super().__new__(cls, members)
        made.matched = matched
        return made


@dataclass(frozen=True, slots=True)
class TicketInfo:
    """A ticket that a node has issued; its secret is not kept.

    Attributes:
        id: What `revoke_ticket` takes.
        not_after_ms: Unix time.
        uses_left: How many nodes may still redeem it.
        spent_by: Who has.
        labels: That the certificates get.
        rights: That the certificates get.
        revoked: Whether it was taken back.
    """

    id: str
    not_after_ms: int
    uses_left: int
    spent_by: tuple[str, ...]
    labels: Mapping[str, str]
    rights: tuple[str, ...]
    revoked: bool


class Cluster:
    """The service `cluster` of a session.

    Args:
        ref: A reference to a Cluster.
    """

    INTERFACE = CORE.Cluster

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    async def list(self, selector: str = "", *, limit: int = 0, signed: bool = False) -> MemberList:
        """Members that match, by name.

        Args:
            selector: e.g. "zone=home,service=pubsub,state=alive", "db*", the end of a peer ID.
            limit: At most so many; 0, and more than the node allows, is what it allows.
            signed: With what the members signed, for as many as one answer has room for.

        Raises InvalidArgument for a selector that is none.
        """
        reply = await self._ref.call("list", selector=selector, limit=limit, signed=signed)
        members = [_member(m, reply["founding"]) for m in reply["members"]]
        return MemberList(members, reply["matched"])

    async def one(self, selector: str, *, signed: bool = False) -> Member:
        """The living member that a selector stands for.

        A name, a host or an ID stands for one node. Of several that a selector without these
        matches, e.g. "zone=home", it is one with the least load.

        Raises NotFound where none matches, InvalidArgument where a name stands for several.
        """
        found = await self._meant(selector, signed=signed)
        alive = [m for m in found if m.state in ("alive", "suspect")]
        if not alive:
            states = ", ".join(f"{m.name or m.peer_id} is {m.state}" for m in found[:3])
            raise NotFound(
                f"no living member matches {selector!r}" + (f": {states}" if states else ""),
                hint="`ww ls` shows the members",
                code="not_found.member",
            )
        if len(alive) > 1 and Selector.parse(selector).names_one:
            raise _ambiguous(selector, alive)
        return min(alive, key=lambda m: (m.state != "alive", m.load, m.peer_id))

    async def only(self, selector: str) -> Member:
        """The one member that a selector matches, in whatever state; raises as `one`."""
        found = await self._meant(selector)
        if not found:
            raise NotFound(
                f"no member matches {selector!r}",
                hint="`ww ls` shows the members",
                code="not_found.member",
            )
        if len(found) > 1:
            raise _ambiguous(selector, found)
        return found[0]

    async def _meant(self, selector: str, *, signed: bool = False) -> Sequence[Member]:
        """All that match; of a bare word those alone that are called so, if there are any."""
        if not selector.strip():
            raise InvalidArgument(
                "an empty text names no node",
                hint="give a name, a peer ID or a selector: `ww ls` shows the members",
                code="invalid.selector",
            )
        found = await self.list(selector, signed=signed)
        return [m for m in found if m.name == selector.strip()] or found

    def watch(self, selector: str = "") -> rpc.Subscription[Member]:
        """Members that match, then each that changes, as it is now: `async with`, `async for`.

        One that no longer matches is shown once more; one that left the table is "removed".
        """
        return rpc.Subscription(
            lambda sink: self._ref.call("watch", selector=selector, sink=sink), _shown
        )

    async def ping(self, peer: str) -> float:
        """Round trip from the session's node to a member, s; raises DialError, NotFound."""
        reply = await self._ref.call("ping", peer=peer)
        return float(reply["rtt_s"])

    async def tunnel(self, peer: str) -> TunnelPipe:
        """A byte pipe to the link of a member, carried by the session's node."""
        reply = await self._ref.call("tunnel", peer=peer)
        if (stream := reply["stream"]) is None:
            raise InternalError("the node answered without the tunnel's other end")
        return TunnelPipe(rpc.ByteStream(stream))

    async def invite(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        rights: Sequence[str] = (),
        expires_s: int = 0,
        uses: int = 0,
    ) -> tuple[str, str, int]:
        """A ticket for `ww node --join`: its text (a secret), its ID, and when it expires (ms)."""
        reply = await self._ref.call(
            "invite", labels=_labels(labels), rights=rights, expires_s=expires_s, uses=uses
        )
        return reply["ticket"], reply["id"], reply["not_after_ms"]

    async def certify(
        self,
        peer: str,
        *,
        labels: Mapping[str, str] | None = None,
        rights: Sequence[str] = (),
        foreign: bool = False,
    ) -> str:
        """A certificate for a peer ID, as text for `ww node --join`; no secret."""
        reply = await self._ref.call(
            "certify", peer=peer, labels=_labels(labels), rights=rights, foreign=foreign
        )
        bundle: str = reply["bundle"]
        return bundle

    async def tickets(self) -> tuple[TicketInfo, ...]:
        """The tickets of the session's node."""
        reply = await self._ref.call("tickets")
        return tuple(from_struct(TicketInfo, ticket) for ticket in reply["tickets"])

    async def revoke_ticket(self, ticket_id: str) -> None:
        """Take a ticket back; nodes that have redeemed it stay."""
        await self._ref.call("revoke_ticket", id=ticket_id)

    async def evict(self, peer: str, reason: str = "") -> None:
        """End the membership of a node, everywhere."""
        await self._ref.call("evict", peer=peer, reason=reason)

    async def check(self) -> tuple[Finding, ...]:
        """What the node finds when it looks at itself: see `ww doctor`."""
        reply = await self._ref.call("check")
        return tuple(
            Finding(f["check"], level(f["level"]), f["text"], f["remedy"])
            for f in reply["findings"]
        )


def _ambiguous(selector: str, members: Sequence[Member]) -> InvalidArgument:
    named = ", ".join(f"{m.name or '-'} {m.peer_id}" for m in members[:NAMED_MAX])
    more = f" and {len(members) - NAMED_MAX} more" if len(members) > NAMED_MAX else ""
    return InvalidArgument(
        f"{selector!r} is ambiguous: it stands for {named}{more}",
        hint="give the peer ID of the one that you mean",
        code="invalid.ambiguous",
    )


def _labels(labels: Mapping[str, str] | None) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in (labels or {}).items()]


def _label_dict(labels: list[dict[str, str]]) -> dict[str, str]:
    return {str(label["key"]): str(label["value"]) for label in labels}


def _member(fields: Mapping[str, Any], founding: bytes = b"") -> Member:
    return Member(
        PeerId.parse(str(fields["peer_id"])),
        str(fields["name"]),
        str(fields["host"]),
        str(fields["state"]),
        float(fields["since_s"]),
        int(fields["incarnation"]),
        tuple(map(str, fields["addrs"])),
        _label_dict(fields["labels"]),
        str(fields["version"]),
        tuple(map(str, fields["services"])),
        float(fields["load"]),
        int(fields["memory_bytes"]),
        float(fields["rtt_s"]),
        bool(fields["connected"]),
        str(fields["via"]),
        bool(fields["self"]),
        str(fields["trouble"]),
        fields.get("record", b""),
        founding,
    )


def _shown(item: bytes) -> Member:
    """A member as a watch shows it; raises InvalidArgument for what describes none."""
    try:
        return _member(json.loads(item))
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        raise InvalidArgument(
            "the node sent what describes no member", code="invalid.member"
        ) from None
