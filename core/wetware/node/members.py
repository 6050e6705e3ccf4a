"""Who is in the cluster, as plugins and clients see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from wetware.base.finding import span
from wetware.base.watchers import Watchers
from wetware.errors import AdmissionRefused
from wetware.member import Member
from wetware.overlay.admission.statements import FOUND
from wetware.overlay.membership.known import Change, ChangeKind, Known
from wetware.overlay.membership.selector import Selector, selected

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.identity import PeerId
    from wetware.overlay.admission.decision import Admission
    from wetware.overlay.link import LinkHost
    from wetware.overlay.membership.service import Membership


class Members:
    """The nodes of the membership, and libp2p peers that have a certificate.

    Args:
        membership: Of this node.
        admission: Of this node.
        host: Its link.
        clock: Its clock.
        clock_wrong: Why that is in doubt, or "".
        skew_s_max: Beyond it another's clock is wrong.
    """

    def __init__(
        self,
        membership: Membership,
        admission: Admission,
        host: LinkHost,
        *,
        clock: Clock,
        clock_wrong: Callable[[], str],
        skew_s_max: float,
    ) -> None:
        self._membership, self._admission, self._host = membership, admission, host
        self._clock, self._clock_wrong, self._skew_s_max = clock, clock_wrong, skew_s_max
        self._watchers: Watchers[Member] = Watchers()
        self._founder: PeerId | None = None
        membership.watch(self._changed)

    def list(self, selector: str) -> tuple[Member, ...]:
        """Everybody that matches: nodes by name, then foreign peers by peer ID.

        Raises InvalidArgument.
        """
        meant, admission = Selector.parse(selector), self._admission
        foreign = (
            Member(peer, state="foreign", labels=chain.labels, connected=self._connected(peer))
            for peer in sorted(admission.members)
            if admission.members.is_foreign(peer) and (chain := admission.chain(peer)) is not None
        )
        return (
            *filter(meant.matches, map(self._describe, self._membership.members())),
            *filter(meant.matches, foreign),
        )

    def _connected(self, peer: PeerId) -> bool:
        return self._host.connection(peer) is not None

    def founder(self) -> PeerId | None:
        """See `hookspecs.Overlay.founder`."""
        judge = self._admission.judge
        found, own = self._founder, self._host.peer_id
        # Some ask at each call of theirs, and nobody else becomes it: it is looked for once.
        if found is None or (found != own and self._membership.member(found) is None):
            self._founder = None
            for known in self._membership.members():
                with contextlib.suppress(AdmissionRefused):
                    if FOUND in judge.open(known.record.chain).rights:
                        self._founder = known.peer
                        break
        return self._founder

    def watch(self, callback: Callable[[Member], None], selector: str) -> Callable[[], None]:
        """See `hookspecs.Overlay.watch_members`."""
        tell = selected(Selector.parse(selector), callback)
        for member in self.list(selector):
            tell(member)
        return self._watchers.add(tell)

    def _changed(self, change: Change) -> None:
        if change.kind is ChangeKind.DUPLICATE:
            return
        member = self._describe(change.member)
        if change.kind is ChangeKind.REMOVED:
            member = replace(member, state="removed")
        self._watchers.tell(member)

    def _describe(self, known: Known) -> Member:
        return replace(
            known.record.describe(state=known.state.value, labels=known.labels),
            since_s=max(0.0, self._clock.monotonic() - known.since),
            rtt_s=known.rtt_s or 0.0,
            connected=(connection := self._host.connection(known.peer)) is not None,
            via=connection.remote.relay or "" if connection is not None else "",
            is_self=known.peer == self._host.peer_id,
            trouble=self._trouble(known),
        )

    def _trouble(self, known: Known) -> str:
        """What is wrong with one that is there, in a few words; "" if nothing is known to be."""
        own = known.peer == self._host.peer_id
        if (twin := self._membership.twins.of(known.peer)) is not None:
            who = "another process uses this key" if own else "two processes use its key"
            return f"{who}: {twin.name} at {twin.addrs[0] if twin.addrs else 'no address'}"
        if own:
            return f"its clock is in doubt: {wrong}" if (wrong := self._clock_wrong()) else ""
        ahead_s = known.clock_offset_s or 0.0
        if abs(ahead_s) <= self._skew_s_max:
            return ""
        return f"its clock is {span(abs(ahead_s))} {'ahead' if ahead_s > 0 else 'behind'}"
