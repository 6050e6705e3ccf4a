"""Admission: who is a member and who may speak what. The one decision.

Asked for every stream, so `is_member` is a look into a table. What fills the table is checked
before: signatures, the time, tombstones, and the auth backend's veto. Removals take effect first
and are written down afterwards; a ticket is written down as spent before anything is handed out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, NoReturn

from wetware.base.access import Access
from wetware.base.bounds import Throttle
from wetware.base.log import get_logger
from wetware.base.watchers import Watchers
from wetware.errors import AdmissionRefused
from wetware.overlay.admission.issuing import Issuer
from wetware.overlay.admission.judge import Judge
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.members import Admitted, Members, Veto
from wetware.overlay.admission.own_certificate import OwnCertificate
from wetware.overlay.admission.statements import (
    Certificate,
    Chain,
    ForeignFact,
    Tombstone,
    decode_fact,
    fact_digest,
)

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.identity import Key, PeerId
    from wetware.overlay.admission.store import Store

log = get_logger("admission")

REFUSALS_REMEMBERED_MAX: Final = 1024
"""A refusal of the same peer and protocol is logged once a minute: logs are finite."""


async def nobody_vetoes(peer: PeerId) -> bool:
    """For a backend that admits every node that the cluster certified."""
    return True


def _ignore(event: str, **fields: object) -> None:
    """For who keeps no record."""


class Admission:
    """Decides whether a peer may open a stream, and who is a member. The only place that does.

    Args:
        store: What the data directory holds; with a founding.
        key: The node's key.
        clock: Judges every beginning and end.
        limits: See AdmissionLimits.
        open_protocols: Protocol IDs of class OPEN that the configuration names.
        veto: See Members.
        record: `Audit.record`.

    Raises ConfigError where the store has no founding, no certificate, or one of another node.

    Attributes:
        founding: What names the cluster.
        cluster_id: Its ID.
        limits: Of this node.
        facts: That are kept.
        judge: Says which certificates are valid.
        members: Of the cluster, this node not included.
        certificate: This node's own.
        issuer: Invites, certifies, renews and evicts.
        new_facts: For every new fact, this node's own included.
    """

    def __init__(
        self,
        store: Store,
        key: Key,
        *,
        clock: Clock,
        limits: AdmissionLimits | None = None,
        open_protocols: Iterable[str] = (),
        veto: Veto = nobody_vetoes,
        record: Callable[..., None] = _ignore,
    ) -> None:
        self.store, self.founding = store, store.founded
        self.cluster_id = self.founding.cluster_id
        self.limits = limits or AdmissionLimits()
        self.facts = store.facts
        self._key, self._record, self._open = key, record, frozenset(open_protocols)
        self._refusals = Throttle(1, REFUSALS_REMEMBERED_MAX, time.monotonic)
        self._ended = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self.new_facts = Watchers[bytes]()
        me = key.peer_id
        self.judge = Judge(store, me, clock, self.limits, self._learn_spent)
        self._trusted = (self.judge.root, me)  # of tickets of this node
        for fact in self.facts:
            if self.judge.is_past(fact) or (
                isinstance(fact, ForeignFact) and not self.judge.is_good(fact.chain)
            ):
                self.facts.drop(fact)
        self.members = Members(self.judge, veto, record)
        self.certificate = OwnCertificate(
            store, key, self.judge, lambda own: self.members.changes.tell(Admitted(me, own))
        )
        self.issuer = Issuer(
            store,
            key,
            self.judge,
            self.certificate,
            self.members,
            adopt=self.adopt,
            record=record,
        )

    # --- the decision -----------------------------------------------------------------------------

    def __call__(self, peer: PeerId, protocol: str, access: Access) -> bool:
        """Whether `peer` may open a stream for `protocol`; refusals are logged."""
        match access:
            case Access.PUBLIC:
                allowed = True
            case Access.MEMBER:
                allowed = peer in self.members
            case Access.OPEN:
                allowed = protocol in self._open
        if not allowed and (unlogged := self._refusals.lines((peer, protocol))) is not None:
            log.warning(
                "protocol.refused",
                peer=peer,
                protocol=protocol,
                access=access.value,
                unlogged=unlogged,
            )
        return allowed

    # --- questions --------------------------------------------------------------------------------

    def is_member(self, peer: PeerId) -> bool:
        """Whether `peer` has shown that it is a member, and still is."""
        return peer in self.members

    @property
    def own(self) -> Chain:
        """This node's own chain."""
        return self.certificate.chain

    def chain(self, peer: PeerId) -> Chain | None:
        """What a member has shown, or was certified with by a fact; this node's own for itself."""
        return self.own if peer == self._key.peer_id else self.members.chain(peer)

    def early_s(self) -> dict[PeerId, float]:
        """See `Judge.early_s`."""
        return self.judge.early_s(self.own)

    def forget_early(self) -> None:
        """This node's clock is right: what begins in the future was signed in a glitch.

        Where the cluster key is, the node certifies itself anew: nobody takes what is not valid.
        """
        self.judge.excuse_early(self.own)
        if self.store.cluster_key is not None and self.judge.is_early(self.own.leaf):
            self.certificate.renew_soon()

    # --- facts ------------------------------------------------------------------------------------

    def adopt(self, encoded: bytes) -> bool:
        """Take over a fact: check it, act on it, keep it.

        Returns whether it is new; what is known, has ended or was superseded is not.
        Raises AdmissionRefused, also where a limit on facts is reached.
        """
        if type(encoded) is bytes and fact_digest(encoded) in self.facts.encoded:
            return False
        fact = decode_fact(encoded)
        if self.judge.is_past(fact) or self.facts.is_superseded(fact):
            return False
        fact.check(self.founding)
        if isinstance(fact, ForeignFact):
            self.judge.check(fact.chain)
        self.facts.check_room(fact, self.judge.root, self.limits)
        self.facts.put(fact)
        self.facts.save_soon(fact)
        if isinstance(fact, Tombstone):
            self._bury(fact)
        elif self._tasks is not None:
            self._tasks.create_task(self._admit_foreign(fact.peer))
        self.new_facts.tell(encoded)
        return True

    def _bury(self, tombstone: Tombstone) -> None:
        peer, judge, store = tombstone.peer, self.judge, self.store
        ended = judge.evicted(peer) is not None
        if ended:
            reason = tombstone.reason or "no reason"
            self._record("node.evicted", peer=peer, by=tombstone.issuer, reason=reason)
        self.members.remove_evicted(peer)
        entry = store.ledger.get(peer)
        if entry is not None and judge.evicted(peer, entry.rights) is not None:
            del store.ledger[peer]
            store.ledger.file.save_soon()
        for foreign in tuple(self.facts.foreign.values()):
            try:
                judge.check_evictions(foreign.chain)
            except AdmissionRefused:
                self.facts.drop(foreign)
                self.facts.save_soon(foreign)
        if ended:
            self._cut_tickets(tombstone)
        if (why := self.own_ended()) is not None:
            log.error("node.own_certificate_ended", why=why, next=why.hint)
            if why.code == "admission.void":
                self.certificate.renew_soon()
            self._ended.set()

    def _cut_tickets(self, tombstone: Tombstone) -> None:
        """Take back the tickets that let the peer in: it could give them to another key."""
        tickets = self.store.tickets
        named = tickets.named(tombstone, self._trusted)
        for ticket in tuple(tickets.values()):
            if not ticket.revoked and (ticket is named or tombstone.peer in ticket.spent):
                tickets.revoke(ticket)
                tickets.file.save_soon(ends=True)

    def _learn_spent(self, leaf: Certificate) -> None:
        """A ticket that let somebody in is spent, whether or not this node remembers it.

        It does not where its data directory was restored from a backup.
        """
        tickets, peer = self.store.tickets, leaf.peer
        ticket = tickets.named(leaf, self._trusted)
        if ticket is not None and peer not in ticket.spent and ticket.uses_left:
            tickets.spend(ticket, peer)
            tickets.file.save_soon()
            log.warning("ticket.was_spent", ticket=ticket.id, peer=peer)
            self._record("ticket.was_spent", ticket=ticket.id, peer=peer)

    async def _admit_foreign(self, peer: PeerId) -> None:
        """Ask the backend about a foreign peer; a veto keeps it out until the next re-check."""
        fact = self.facts.foreign.get(peer)
        if fact is None:
            return
        try:
            await self.members.ask(peer)
            if self.facts.foreign.get(peer) is fact:
                self.judge.check(fact.chain)
                self.members.enter(fact.chain, foreign=True)
        except AdmissionRefused as exc:
            log.warning("foreign.refused", peer=peer, why=exc)

    # --- the end of this node's own membership ----------------------------------------------------

    def own_ended(self) -> AdmissionRefused | None:
        """Why the tombstones that this node knows keep it out of the cluster; None if they do not.

        One by an inviter holds until the cluster's key evicts that one. One by the cluster's key is
        for good.
        """
        try:
            self.judge.check_evictions(self.own)
        except AdmissionRefused as exc:
            return exc
        return None

    def judge_own(self) -> None:
        """Raise AdmissionRefused if the cluster's key has evicted this node."""
        why = self.own_ended()
        if why is not None and self.judge.is_evicted_by_root(self._key.peer_id):
            raise why

    async def wait_evicted(self) -> NoReturn:
        """Wait until this node learns that the cluster's key has evicted it; AdmissionRefused."""
        while True:
            self.judge_own()
            self._ended.clear()
            await self._ended.wait()

    def learn_own_end(self, encoded: bytes) -> None:
        """Take over the tombstone of this node, which came with a refusal; nothing else.

        The node that is evicted is told by nobody else: from then on no member speaks to it.
        """
        with contextlib.suppress(AdmissionRefused):
            fact = decode_fact(encoded)
            if isinstance(fact, Tombstone) and fact.peer == self._key.peer_id:
                self.adopt(encoded)

    # --- life -------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None]) -> None:
        """Renew, expire, re-check until cancelled; then write what waits to be written."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.certificate.run(), name="admission renewal")
                tasks.create_task(self._keep_checked(), name="admission re-check")
                self._tasks = tasks
                try:
                    await asyncio.gather(*map(self._admit_foreign, self.facts.foreign))
                    ready()
                    while True:
                        self._sweep()
                        await asyncio.sleep(self.limits.sweep_s)
                finally:
                    self._tasks = None
        finally:
            await self.store.files.flush()

    def _sweep(self) -> None:
        self.members.remove_expired()
        for fact in self.facts:
            if self.judge.is_past(fact):
                self.facts.drop(fact)
                self.facts.save_soon(fact)
            elif isinstance(fact, ForeignFact):
                self.issuer.renew_foreign(fact.chain)

    async def _keep_checked(self) -> None:
        while True:
            await asyncio.sleep(self.limits.veto_recheck_s)
            absent = [peer for peer in self.facts.foreign if peer not in self.members]
            await asyncio.gather(
                *map(self.members.recheck, self.members), *map(self._admit_foreign, absent)
            )
