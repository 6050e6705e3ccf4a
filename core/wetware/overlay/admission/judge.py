"""Which certificates are valid now: checked offline, by signatures, the time and tombstones."""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from wetware.errors import AdmissionRefused
from wetware.overlay.admission.statements import (
    INVITE,
    MEMBER,
    Certificate,
    Chain,
    Fact,
    Tombstone,
    refusal,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from wetware.base.clock import Clock
    from wetware.identity import PeerId
    from wetware.overlay.admission.limits import AdmissionLimits
    from wetware.overlay.admission.store import Store

EARLY_MAX: Final = 256
"""Issuers whose certificates begin in the future, remembered as a sign of a wrong clock."""


class Judge:
    """Judges chains and facts.

    Args:
        store: Of this node; with a founding.
        me: This node.
        clock: Judges every beginning and end.
        limits: Of this node.
        opened: Called with the leaf of every chain that is seen for the first time.

    Attributes:
        root: The cluster key, as certificates name their issuer.
        skew_ms: The tolerance for clocks.
    """

    def __init__(
        self,
        store: Store,
        me: PeerId,
        clock: Clock,
        limits: AdmissionLimits,
        opened: Callable[[Certificate], None],
    ) -> None:
        self._founding, self._facts, self._opened = store.founded, store.facts, opened
        self.root = self._founding.issuer
        self.me = me
        self._mine = {me} if store.cluster_key is None else {me, self.root}
        self.skew_ms = limits.clock_skew_s_max * 1000
        self.clock, self.limits = clock, limits
        self._open = lru_cache(limits.chains_cached_max)(self._open_new)
        self._early: OrderedDict[PeerId, int] = OrderedDict()  # by issuer: the latest begin, ms
        self._excused: dict[PeerId, int] = {}  # of these, what an operator called a glitch

    @property
    def now_ms(self) -> float:
        return self.clock.time() * 1000

    def is_past(self, fact: Fact) -> bool:
        return self.now_ms > fact.not_after_ms + self.skew_ms

    # --- chains -----------------------------------------------------------------------------------

    def open(self, encoded: bytes) -> Chain:
        """A chain with good signatures (looked at once); raises AdmissionRefused."""
        if type(encoded) is not bytes:
            raise refusal("malformed", "malformed: a chain is not bytes")
        return self._open(encoded)

    def _open_new(self, encoded: bytes) -> Chain:
        chain = Chain.open(encoded, self._founding)
        self._opened(chain.leaf)
        return chain

    def verify(self, encoded: bytes) -> Chain:
        """Check a chain offline; raises AdmissionRefused, code `admission.<why>`."""
        chain = self.open(encoded)
        self.check(chain)
        return chain

    def check(self, chain: Chain) -> None:
        """Raise AdmissionRefused if a chain with good signatures is not valid now."""
        self.check_evictions(chain)
        self._note_early(chain)
        chain.judge_time(self.now_ms, self.skew_ms)

    def is_good(self, chain: Chain) -> bool:
        try:
            self.check(chain)
        except AdmissionRefused:
            return False
        return True

    # --- evictions --------------------------------------------------------------------------------

    def evicted(
        self, peer: PeerId, rights: frozenset[str] = frozenset({MEMBER})
    ) -> Tombstone | None:
        """The tombstone that keeps a peer with these rights out, if there is one."""
        known = self._facts.tombstones.get(peer, {})
        if self.root in known:
            return known[self.root]
        if INVITE in rights:
            return None
        return next(
            (known[issuer] for issuer in known if not self.is_evicted_by_root(issuer)), None
        )

    def is_evicted_by_root(self, peer: PeerId) -> bool:
        return self.root in self._facts.tombstones.get(peer, {})

    def refuse_evicted(self, peer: PeerId, rights: frozenset[str] = frozenset({MEMBER})) -> None:
        """Raise AdmissionRefused for a peer that a tombstone keeps out; it brings that along."""
        if (tombstone := self.evicted(peer, rights)) is None:
            return
        exc = refusal(
            "evicted",
            f"{peer} was evicted from the cluster: {tombstone.reason or 'no reason'}",
            "a node that shall come back needs a new key",
        )
        exc.fact = tombstone.encoded
        raise exc

    def check_evictions(self, chain: Chain) -> None:
        """Raise AdmissionRefused if a tombstone keeps a chain's peer or its inviter out."""
        self.refuse_evicted(chain.peer, chain.rights)
        if chain.inviter is not None and self.is_evicted_by_root(chain.inviter.peer):
            raise refusal(
                "void",
                f"the certificate of {chain.peer} was issued by {chain.inviter.peer}, which was "
                "evicted",
                "the node renews it where the cluster's key is",
            )

    # --- certificates that begin in the future ----------------------------------------------------

    def is_early(self, certificate: Certificate) -> bool:
        return certificate.not_before_ms > self.now_ms + self.skew_ms

    def _note_early(self, chain: Chain) -> None:
        """Who signs for a hundred peers says it once."""
        for certificate in filter(self.is_early, chain.certificates):
            issuer, begins_ms = certificate.issuer, certificate.not_before_ms
            self._early[issuer] = max(begins_ms, self._early.get(issuer, 0))
            if len(self._early) > EARLY_MAX:
                self._early.popitem(last=False)

    def early_s(self, own: Chain) -> dict[PeerId, float]:
        """Issuers of whose certificates one is said to begin only in so many seconds.

        Either their clocks were ahead, or this node's is behind: its `own` certificate is a sign as
        well. What this node signed itself says nothing of others' clocks.
        """
        self._note_early(own)
        now_ms = self.now_ms
        return {
            issuer: (at_ms - now_ms) / 1000
            for issuer, at_ms in self._early.items()
            if at_ms > max(now_ms + self.skew_ms, self._excused.get(issuer, 0))
            and issuer not in self._mine
            and not self.is_evicted_by_root(issuer)
        }

    def excuse_early(self, own: Chain) -> None:
        """This node's clock is right: what is known to begin in the future was a glitch."""
        self._note_early(own)
        self._excused = dict(self._early)
