"""The bounds of admission."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from wetware.base.setting import setting

DAY_S: Final = 86_400.0
LIFE_S_MAX: Final = 366 * DAY_S
"""Of anything that is signed here: what is valid for longer is a mistake."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Who is let into the cluster, and for how long.

    What `setting` makes is in `[admission]` of ww.toml.

    Attributes:
        clock_skew_s_max: How far the clocks of two nodes may differ: certificates count as valid
            this much before their beginning and after their end.
        ticket_s: How long a ticket can be redeemed, unless `ww invite` says otherwise.
        ticket_s_max: The longest that it may say; a tombstone has to outlive tickets too.
        ticket_uses_max: How many nodes one ticket may admit.
        tickets_max: Tickets of this node that are remembered, spent and expired ones included.
        ledger_max: Members that an issuer remembers, to renew their certificates.
        members_max: Members that are admitted at once, each with a chain of some 500 bytes.
        members_per_inviter_max: Of these, those that one inviter certified, so that a malicious
            inviter cannot fill the table.
        tombstones_max: Evictions by the cluster key that are remembered until they end.
        tombstones_per_inviter_max: Evictions by one inviter.
        foreign_max: Foreign peers with a certificate; every member keeps all of them.
        foreign_per_inviter_max: Of these, those that one inviter certified.
        chains_cached_max: Chains whose signatures need no second look.
        veto_s: How long the auth backend may take to say whether it vetoes a node.
        veto_failures_max: After so many checks in a row that failed, a member is removed.
        vetoes_max: Questions to the backend at once.
        exchange_s: For two nodes to show each other their certificates.
        join_s: For a node to join: the backend's document comes with it.
        exchanges_max: Exchanges and joins in progress.
        exchanges_per_address_max: The same from one address (IPv6: one /64), behind which a whole
            site may sit.
        attempts_per_address_max: Refused exchanges and joins a minute from one address; members are
            heard all the same.
        addresses_max: Addresses whose attempts are counted; the longest silent is forgotten.
        renew_retry_s: Pause after a renewal failed; doubles, with jitter.
        renew_retry_s_max: The longest pause.
        sweep_s: How often ends of certificates are looked for.
    """

    certificate_s: float = setting(
        7 * DAY_S,
        "Life of a member's certificate; it is renewed after a third of it. Bounds how long a "
        "member that every tombstone missed is still let in.",
        min=1,
        max=LIFE_S_MAX,
    )
    inviter_certificate_s: float = setting(
        90 * DAY_S,
        "Life of a certificate with the right `invite`. Longer: what inviters sign ends with it, "
        "and only a holder of the cluster key renews it.",
        min=1,
        max=LIFE_S_MAX,
    )
    foreign_certificate_s: float = setting(
        90 * DAY_S,
        "Life of the certificate of a foreign libp2p peer. That cannot ask for a new one: its "
        "issuer makes one after two thirds of the life, until it is evicted.",
        min=1,
        max=LIFE_S_MAX,
    )
    renew_grace_s: float = setting(
        30 * DAY_S,
        "For how long after its end a certificate can still be renewed: a laptop may be closed for "
        "a holiday.",
        min=1,
    )
    clock_skew_s_max: float = 60.0
    ticket_s: float = DAY_S
    ticket_s_max: float = 30 * DAY_S
    ticket_uses_max: int = 1000
    tickets_max: int = 1024
    ledger_max: int = 8192
    members_max: int = 4096
    members_per_inviter_max: int = 1024
    tombstones_max: int = 4096
    tombstones_per_inviter_max: int = 256
    foreign_max: int = 256
    foreign_per_inviter_max: int = 64
    chains_cached_max: int = 4096
    veto_s: float = 5.0
    veto_recheck_s: float = setting(
        30.0,
        "How often the auth backend is asked again about the nodes that are admitted: how late one "
        "that it no longer admits is removed.",
        min=0.1,
    )
    veto_failures_max: int = 3
    vetoes_max: int = 32
    exchange_s: float = 10.0
    join_s: float = 30.0
    exchanges_max: int = 512
    exchanges_per_address_max: int = 128
    attempts_per_address_max: int = 120
    addresses_max: int = 4096
    renew_retry_s: float = 5.0
    renew_retry_s_max: float = 900.0
    sweep_s: float = 1.0

    @property
    def tombstone_s(self) -> float:
        """How long a tombstone holds: nothing that its peer has or can get lasts longer."""
        longest = max(
            self.certificate_s,
            self.inviter_certificate_s,
            self.foreign_certificate_s,
            self.ticket_s_max,
        )
        return longest + self.renew_grace_s + 2 * self.clock_skew_s_max
