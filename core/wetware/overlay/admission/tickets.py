"""The tickets that this node issued, as it keeps them: hashes, never secrets.

From a backup they may not say which are spent; certificates of members say it again.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wetware.errors import LimitExceeded
from wetware.identity import PeerId
from wetware.overlay.admission.files import TICKETS_FILE, File, Files
from wetware.overlay.admission.statements import TICKET_BYTES, Statement, refusal


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """A ticket as its issuer keeps it.

    Attributes:
        id: What people call it.
        digest: SHA-256 of the secret.
        not_after_ms: Unix time, ms.
        uses: How many nodes it may let in.
        spent: Those that it has let in.
        labels: Of the certificates.
        rights: Of the certificates.
        revoked: Whether it was taken back.
    """

    id: str
    digest: bytes
    not_after_ms: int
    uses: int
    spent: tuple[PeerId, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    rights: frozenset[str] = frozenset()
    revoked: bool = False

    @property
    def name(self) -> bytes:
        """What certificates call it: known to nobody before, and of no use without the secret."""
        return self.digest[:TICKET_BYTES]

    @property
    def uses_left(self) -> int:
        """How many nodes it may still let in."""
        return max(0, self.uses - len(self.spent))

    def plain(self) -> dict[str, object]:
        return asdict(self) | {"digest": self.digest.hex(), "rights": sorted(self.rights)}

    @classmethod
    def from_plain(cls, item: Mapping[str, Any]) -> TicketRecord:
        """The inverse of `plain`."""
        digest, rights = bytes.fromhex(item["digest"]), frozenset(item["rights"])
        spent = tuple(map(PeerId.parse, item["spent"]))
        return cls(**{**item, "digest": digest, "rights": rights, "spent": spent})


class Tickets(dict[str, TicketRecord]):
    """By ID. What changes them here is in memory; `file` makes it durable.

    Attributes:
        old: The IDs of those from before the start.
    """

    def __init__(self, files: Files) -> None:
        found = files.load(TICKETS_FILE, lambda data: [*map(TicketRecord.from_plain, data)])
        super().__init__({ticket.id: ticket for ticket in found or ()})
        self.old = frozenset(self)
        self.file = File(files, TICKETS_FILE, lambda: [t.plain() for t in list(self.values())])

    def of(self, peer: PeerId) -> bytes:
        """The name of the ticket that let a peer in; b"" if this node does not know of one."""
        return next((ticket.name for ticket in self.values() if peer in ticket.spent), b"")

    def redeemable(self, secret: bytes, peer: PeerId, now_ms: float) -> TicketRecord:
        """The ticket that `peer` may redeem now; raises AdmissionRefused."""
        digest, found = hashlib.sha256(secret).digest(), None
        for record in self.values():  # all of them: the time says nothing
            if hmac.compare_digest(record.digest, digest):
                found = record
        if found is None:
            raise refusal(
                "ticket_unknown",
                "this node has issued no such ticket",
                "ask for a new one: `ww invite`",
            )
        if found.revoked:
            raise refusal("ticket_revoked", "the ticket was taken back", "ask for a new one")
        if now_ms > found.not_after_ms:
            raise refusal(
                "ticket_expired",
                f"the ticket expired {(now_ms - found.not_after_ms) / 1000:.0f} s ago",
                "ask for a new one: `ww invite`",
            )
        if peer not in found.spent and not found.uses_left:
            raise refusal(
                "ticket_spent",
                "the ticket was used by another node",
                "ask for a new one; if nobody should have used it, `ww evict` that node",
            )
        return found

    def spend(self, ticket: TicketRecord, peer: PeerId) -> None:
        self[ticket.id] = replace(ticket, spent=(*ticket.spent, peer))

    def unspend(self, ticket_id: str, peer: PeerId) -> None:
        """Nothing was handed out: the ticket is as good as before."""
        if (ticket := self.get(ticket_id)) is not None:
            spent = tuple(other for other in ticket.spent if other != peer)
            self[ticket_id] = replace(ticket, spent=spent)

    def revoke(self, ticket: TicketRecord) -> None:
        self[ticket.id] = replace(ticket, revoked=True)

    def named(self, statement: Statement, trusted: Collection[PeerId]) -> TicketRecord | None:
        """The ticket that a statement names, if the statement is to be believed.

        Nobody can name a ticket before its first use: of one that is not spent yet as far as this
        node remembers, everybody's word is good, also an inviter's who renewed the certificate. Of
        one that is, an inviter could make its word up, to use up or end another's ticket: it takes
        a `trusted` issuer.
        """
        for ticket in self.values():
            if ticket.name == statement.ticket and (
                not ticket.spent or statement.issuer in trusted
            ):
                return ticket
        return None

    def make_room(self, tickets_max: int, now_ms: float) -> None:
        """For one more; raises LimitExceeded.

        Ended tickets are kept as long as there is room, to say what they are.
        """
        ended = sorted(
            (t for t in self.values() if t.revoked or t.not_after_ms < now_ms),
            key=lambda t: t.not_after_ms,
        )
        for ticket in ended[: max(0, len(self) + 1 - tickets_max)]:
            del self[ticket.id]
        if len(self) >= tickets_max:
            raise LimitExceeded(
                f"{len(self)} tickets are open (tickets_max)",
                hint="revoke some, or wait until they expire",
            )
