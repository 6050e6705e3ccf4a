"""What an issuer does: tickets, certificates, renewals, evictions."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from wetware.base.log import get_logger
from wetware.base.texts import ADDRS_MAX
from wetware.errors import AdmissionRefused, InvalidArgument
from wetware.overlay.admission.members import Admitted, Members, Removed
from wetware.overlay.admission.statements import (
    INVITE,
    MEMBER,
    Certificate,
    Chain,
    ForeignFact,
    Tombstone,
    check_labels,
    refusal,
)
from wetware.overlay.admission.texts import SECRET_BYTES, Bundle, Ticket
from wetware.overlay.admission.tickets import TicketRecord

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import Key, PeerId
    from wetware.overlay.admission.judge import Judge
    from wetware.overlay.admission.own_certificate import OwnCertificate
    from wetware.overlay.admission.store import Store

log = get_logger("admission.issuing")

HEARD_S: Final = 20.0
"""After a start, members show their certificates and with them which tickets are spent: a ticket
from before the start is honoured so much later, which leaves a third of `join_s`."""


class Issuer:
    """Lets nodes in and out, as far as this node's own certificate permits.

    Members that come are noted in the ledger, to renew their certificates. `adopt` is
    `Admission.adopt`, `record` is `Audit.record`.
    """

    def __init__(
        self,
        store: Store,
        key: Key,
        judge: Judge,
        certificate: OwnCertificate,
        members: Members,
        *,
        adopt: Callable[[bytes], bool],
        record: Callable[..., None],
    ) -> None:
        self._store, self._key, self._judge, self._own = store, key, judge, certificate
        self._members, self._adopt, self._record = members, adopt, record
        self._limits = judge.limits
        self._heard_at = judge.clock.monotonic() + HEARD_S
        members.changes.add(self._changed)

    @property
    def _name(self) -> PeerId:
        """Under which this node signs."""
        return self._judge.root if self._store.cluster_key is not None else self._key.peer_id

    # --- tickets ----------------------------------------------------------------------------------

    async def invite(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        rights: Iterable[str] = (),
        expires_s: float | None = None,
        uses: int = 1,
        addrs: Sequence[Multiaddr] = (),
    ) -> Ticket:
        """A new ticket, durable before it is returned.

        Args:
            labels: Of the certificate.
            rights: Beyond membership: "invite", or nothing.
            expires_s: `ticket_s` if None.
            uses: How many nodes it may let in.
            addrs: Where this node can be reached, with its peer ID.

        Raises AdmissionRefused, InvalidArgument, LimitExceeded.
        """
        limits, granted = self._limits, frozenset(rights) | {MEMBER}
        self._own.need_invite(granted)
        life_s = limits.ticket_s if expires_s is None else expires_s
        if not 0 < life_s <= limits.ticket_s_max:
            raise InvalidArgument(
                f"a ticket lasts for up to {limits.ticket_s_max:g} s (ticket_s_max)"
            )
        if not 1 <= uses <= limits.ticket_uses_max:
            raise InvalidArgument(
                f"a ticket lets in 1 to {limits.ticket_uses_max} nodes (ticket_uses_max)"
            )
        labels = check_labels(labels or {})
        # Signed once, to nobody's use: labels that make too large a certificate are refused now.
        self._own.mint(self._key.peer_id, frozenset({MEMBER}), labels)
        tickets, secret = self._store.tickets, secrets.token_bytes(SECRET_BYTES)
        tickets.make_room(limits.tickets_max, self._judge.now_ms)
        record = TicketRecord(
            id=secrets.token_hex(4),
            digest=hashlib.sha256(secret).digest(),
            not_after_ms=int(self._judge.now_ms + life_s * 1000),
            uses=uses,
            labels=labels,
            rights=granted,
        )
        tickets[record.id] = record
        try:
            await tickets.file.save("the ticket")
        except AdmissionRefused:
            tickets.pop(record.id, None)
            raise
        self._record("ticket.issued", ticket=record.id, uses=uses, rights=",".join(sorted(granted)))
        return Ticket(
            founding=self._store.founded,
            issuer=self._key.peer_id,
            addrs=tuple(addrs)[:ADDRS_MAX],
            secret=secret,
            not_after_ms=record.not_after_ms,
            id=record.id,
        )

    def tickets(self) -> list[TicketRecord]:
        return list(self._store.tickets.values())

    async def revoke_ticket(self, ticket_id: str) -> None:
        """Take a ticket back: it lets nobody in any more. Idempotent.

        Takes effect at once. Raises InvalidArgument for an unknown one, AdmissionRefused
        "admission.not_saved" where the disk fails.
        """
        tickets = self._store.tickets
        if (ticket := tickets.get(ticket_id)) is None:
            raise InvalidArgument(
                f"this node has issued no ticket {ticket_id[:40]!r}", hint="`ww invite --list`"
            )
        if not ticket.revoked:
            tickets.revoke(ticket)
            self._record("ticket.revoked", ticket=ticket_id)
        await tickets.file.save("that the ticket is revoked", ends=True)

    def _redeemable(self, peer: PeerId, secret: bytes) -> TicketRecord:
        self._refuse_unsure()
        ticket = self._store.tickets.redeemable(secret, peer, self._judge.now_ms)
        self._own.need_invite(ticket.rights)
        self._judge.refuse_evicted(peer)
        return ticket

    async def redeem(self, peer: PeerId, secret: bytes) -> Chain:
        """The certificate that a ticket stands for, for the peer that redeems it.

        The ticket is spent durably first. The same peer may ask again, should the answer get lost.
        Raises AdmissionRefused.
        """
        tickets = self._store.tickets
        ticket = self._redeemable(peer, secret)
        wait_s = self._heard_at - self._judge.clock.monotonic()
        if ticket.id in tickets.old and peer not in ticket.spent and wait_s > 0:
            log.info("ticket.from_before_the_start", ticket=ticket.id, wait_s=round(wait_s, 1))
            await asyncio.sleep(wait_s)
        await self._members.ask(peer)
        # All again, since that took a while; from here to the mark nobody else gets a turn.
        ticket = self._redeemable(peer, secret)
        if first := peer not in ticket.spent:
            tickets.spend(ticket, peer)
        try:
            await tickets.file.save("that the ticket is spent")
        except AdmissionRefused:
            if first:
                tickets.unspend(ticket.id, peer)
            raise
        self._judge.refuse_evicted(peer)
        chain = self._own.mint(peer, ticket.rights, ticket.labels, ticket=ticket.name)
        self._note(chain)
        self._record("ticket.redeemed", ticket=ticket.id, peer=peer)
        return chain

    def _refuse_unsure(self) -> None:
        """Nobody gets in by what may have been ended before a crash."""
        if unsure := self._store.files.unsure:
            raise refusal(
                "not_durable",
                f"this node lets nobody join or renew since its start: {unsure}",
                "an operator of the node repeats `ww evict` and `ww invite --revoke` where they "
                "were, and then runs `ww grants --resume`",
            )

    # --- certificates -----------------------------------------------------------------------------

    async def certify(
        self,
        peer: PeerId,
        *,
        labels: Mapping[str, str] | None = None,
        rights: Iterable[str] = (),
        foreign: bool = False,
        addrs: Sequence[Multiaddr] = (),
    ) -> Bundle:
        """A certificate for a peer that is known beforehand.

        A foreign one becomes a fact, durable here before this returns.
        Raises AdmissionRefused, InvalidArgument.
        """
        granted = frozenset(rights) | {MEMBER}
        if foreign and INVITE in granted:
            raise InvalidArgument("a foreign peer cannot invite")
        if INVITE in granted and peer.public_key is None:
            raise InvalidArgument("only a peer with an Ed25519 key can invite")
        self._own.need_invite(granted)
        self._judge.refuse_evicted(peer)
        await self._members.ask(peer)
        self._judge.refuse_evicted(peer)
        chain = self._own.mint(peer, granted, labels or {}, foreign=foreign)
        if foreign:
            self._adopt(ForeignFact(chain).encoded)
            await self._store.facts.foreign_file.save("the certificate")
        else:
            self._note(chain)
        self._record("node.certified", peer=peer, foreign=foreign)
        return Bundle(self._store.founded, chain, tuple(addrs)[:ADDRS_MAX])

    async def renew(self, peer: PeerId, encoded: bytes) -> Chain:
        """A new certificate for a member that shows its old one, also within the grace after it.

        Raises AdmissionRefused.
        """
        old = self._judge.open(encoded)
        if old.peer != peer:
            raise refusal("wrong_peer", f"the certificate is of {old.peer}, not of {peer}")
        self._renewable(old)
        await self._members.ask(peer)
        entry = self._renewable(old)
        chain = self._own.mint(peer, entry.rights, entry.labels, ticket=old.leaf.ticket)
        self._note(chain)
        self._record("certificate.renewed", peer=peer)
        return chain

    def _renewable(self, old: Chain) -> Certificate:
        peer, judge = old.peer, self._judge
        if not self._own.can_invite:
            raise refusal("not_issuer", "this node renews no certificates")
        self._refuse_unsure()
        entry = self._store.ledger.get(peer)
        judge.refuse_evicted(peer, old.rights if entry is None else entry.rights)
        if entry is None:
            raise refusal(
                "not_known",
                f"this node does not know {peer} as a member",
                "join again with `ww node --join TICKET`",
            )
        self._own.need_invite(entry.rights)
        now_ms = judge.now_ms
        if now_ms < old.leaf.not_before_ms - judge.skew_ms:
            old.leaf.judge_time(now_ms, judge.skew_ms)
        grace_s = self._limits.renew_grace_s
        if now_ms > old.not_after_ms + judge.skew_ms + grace_s * 1000:
            raise refusal(
                "expired",
                f"the certificate of {peer} ended more than {grace_s:g} s ago (renew_grace_s)",
                "join again with `ww node --join TICKET`",
            )
        return entry

    def renew_foreign(self, old: Chain) -> None:
        """A foreign peer cannot ask: who issued its certificate makes a new one in time."""
        if (
            self._judge.now_ms < old.leaf.when_ms(2 / 3)
            or old.leaf.issuer != self._name
            or not self._own.can_invite
            or old.peer not in self._members
        ):
            return
        new = self._own.mint(old.peer, old.rights, old.labels, foreign=True)
        # An inviter's own end may be near: no new one for the sake of a few days.
        life_ms = old.not_after_ms - old.leaf.not_before_ms
        if new.not_after_ms >= old.not_after_ms + life_ms / 6:
            self._adopt(ForeignFact(new).encoded)
            self._record("certificate.renewed", peer=old.peer)

    # --- the ledger -------------------------------------------------------------------------------

    def _changed(self, event: Admitted | Removed) -> None:
        if isinstance(event, Admitted):
            self._note(event.chain)

    def _note(self, chain: Chain) -> None:
        """Remember a member, to renew its certificate."""
        entries, limits, peer, leaf = self._store.ledger, self._limits, chain.peer, chain.leaf
        if peer == self._key.peer_id or leaf.foreign or not self._own.can_invite:
            return
        known = entries.get(peer)
        if known is not None and known.not_after_ms >= leaf.not_after_ms:
            return
        if known is None:
            full = len(entries) >= limits.ledger_max
            if leaf.issuer not in (self._judge.root, self._key.peer_id):
                others = entries.issued[leaf.issuer]
                full = full or others >= limits.members_per_inviter_max
            past_ms = self._judge.now_ms - limits.renew_grace_s * 1000
            if full and not entries.forget(ended_before_ms=past_ms):
                log.warning("ledger.full", peer=peer, entries=len(entries))
                return
        entries[peer] = leaf
        entries.file.save_soon()

    # --- evictions --------------------------------------------------------------------------------

    async def evict(self, peer: PeerId, reason: str = "") -> Tombstone:
        """End a membership everywhere, whatever certificate or ticket the peer has. Idempotent.

        Takes effect here at once, and durably when this returns. Raises AdmissionRefused
        ("admission.not_allowed"; "admission.not_saved", in force all the same), InvalidArgument.
        """
        store, limits = self._store, self._limits
        self._own.need_invite()
        if peer == self._key.peer_id:
            raise InvalidArgument(
                "a node does not evict itself", hint="run this at another inviter, or stop the node"
            )
        chain, entry = self._members.chain(peer), store.ledger.get(peer)
        rights = chain.rights if chain else entry.rights if entry else frozenset[str]()
        if store.cluster_key is None and INVITE in rights:
            raise refusal(
                "not_allowed",
                f"{peer} may invite: only a node with the cluster's key evicts it",
                "run this at the node where the cluster was founded",
            )
        tombstone = store.facts.tombstones.get(peer, {}).get(self._name)
        if tombstone is None:
            now_ms = int(self._judge.now_ms)
            margin_s = limits.renew_grace_s + 2 * limits.clock_skew_s_max
            # An issuer with other limits than this node's may have signed what the peer has.
            latest_ms = max(chain.not_after_ms if chain else 0, entry.not_after_ms if entry else 0)
            tombstone = Tombstone(
                cluster=store.founded.cluster_id,
                peer=peer,
                chain=None if store.cluster_key is not None else self._own.chain,
                reason=reason,
                ticket=chain.leaf.ticket if chain else store.tickets.of(peer),
                at_ms=now_ms,
                not_after_ms=max(
                    now_ms + int(limits.tombstone_s * 1000), latest_ms + int(margin_s * 1000)
                ),
            ).signed(store.cluster_key or self._key)
            self._adopt(tombstone.encoded)
        await store.facts.tombstones_file.save("the eviction is in force, but it", ends=True)
        await store.tickets.file.save("the eviction is in force, but it", ends=True)
        return tombstone
