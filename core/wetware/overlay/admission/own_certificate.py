"""This node's own certificate: what it permits, what is signed with it, and its renewal."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from wetware.base.backoff import Backoff
from wetware.base.log import get_logger
from wetware.errors import AdmissionRefused, ConfigError, InvalidArgument, WetwareError
from wetware.overlay.admission.files import CERTIFICATE_FILE
from wetware.overlay.admission.statements import (
    FOUND,
    INVITE,
    MEMBER,
    RIGHTS,
    Certificate,
    Chain,
    refusal,
)

if TYPE_CHECKING:
    from wetware.identity import Key, PeerId
    from wetware.overlay.admission.judge import Judge
    from wetware.overlay.admission.store import Store

log = get_logger("admission.own_certificate")

Renew = Callable[[Chain], Awaitable[bytes]]


class OwnCertificate:
    """Calls `renewed` with every new one; where the cluster's key is, it makes the first one.

    Raises ConfigError where there is none, or one of another node.

    Attributes:
        chain: What this node shows.
        renew: Gets a new one from an issuer, where this node cannot sign it; None without a link.
    """

    def __init__(
        self, store: Store, key: Key, judge: Judge, renewed: Callable[[Chain], None]
    ) -> None:
        self._store, self._key, self._judge, self._renewed = store, key, judge, renewed
        self._limits = judge.limits
        self.renew: Renew | None = None
        self._wake = asyncio.Event()
        self._doubted_at = float("-inf")
        self.chain = self._load()
        self._plan()

    def _load(self) -> Chain:
        store, me = self._store, self._key.peer_id
        chain: Chain | None = None
        if store.certificate is not None:
            try:
                chain = self._judge.open(store.certificate)
            except AdmissionRefused as exc:
                raise store.files.damaged(CERTIFICATE_FILE, exc) from None
            if chain.peer != me:
                raise ConfigError(
                    f"{store.files.directory / CERTIFICATE_FILE} is of {chain.peer}, and this node "
                    f"is {me}",
                    hint="restore node.key from the same backup, or move the certificate away and "
                    "join again with `ww node --join TICKET`",
                )
        if store.cluster_key is not None and (
            chain is None
            or FOUND not in chain.rights  # of a release before
            or self._judge.is_early(chain.leaf)  # signed in a glitch: nobody takes it yet
            or self._judge.now_ms >= chain.leaf.when_ms(1 / 3)
        ):
            chain = self._mint_own()
            store.write_certificate(chain.encoded)
        if chain is None:
            raise ConfigError(
                "this node has no certificate of its cluster",
                hint="join with `ww node --join TICKET`",
            )
        return chain

    # --- what it permits --------------------------------------------------------------------------

    @property
    def can_invite(self) -> bool:
        """Whether what this node signs now is worth anything."""
        if self._store.cluster_key is not None:
            return True
        return INVITE in self.chain.rights and self._judge.is_good(self.chain)

    def need_invite(self, rights: frozenset[str] = frozenset({MEMBER})) -> None:
        """Raise AdmissionRefused unless this node may grant these rights."""
        if not rights <= (granted := RIGHTS - {FOUND}):
            raise InvalidArgument(
                f"{min(rights - granted)!r} is no right that is granted; those are "
                f"{', '.join(sorted(granted))}"
            )
        if self._store.cluster_key is not None:
            return
        if INVITE in rights:
            raise refusal(
                "not_allowed",
                "only a node with the cluster's key can grant the right to invite",
                "run this at the node where the cluster was founded",
            )
        if not self.can_invite:
            raise refusal(
                "not_allowed",
                "this node may not invite or evict anybody",
                "run this at the node where the cluster was founded, or at one with the right "
                "`invite`",
            )

    def mint(
        self,
        peer: PeerId,
        rights: frozenset[str],
        labels: Mapping[str, str],
        *,
        foreign: bool = False,
        ticket: bytes = b"",
    ) -> Chain:
        """Sign a certificate; the caller has decided that the peer may have it."""
        limits, now_ms = self._limits, int(self._judge.now_ms)
        life_s = limits.certificate_s
        if foreign:
            life_s = limits.foreign_certificate_s
        elif INVITE in rights:
            life_s = limits.inviter_certificate_s
        end_ms, cluster_key = now_ms + int(life_s * 1000), self._store.cluster_key
        if cluster_key is None:
            self.need_invite(rights)
            end_ms = min(end_ms, self.chain.not_after_ms)
        leaf = Certificate(
            cluster=self._store.founded.cluster_id,
            peer=peer,
            rights=rights,
            labels=labels,
            not_before_ms=now_ms,
            not_after_ms=end_ms,
            foreign=foreign,
            ticket=ticket,
        ).signed(cluster_key or self._key)
        return Chain((leaf,) if cluster_key is not None else (leaf, self.chain.leaf))

    def _mint_own(self) -> Chain:
        return self.mint(self._key.peer_id, RIGHTS, {})

    # --- renewal ----------------------------------------------------------------------------------

    def renew_soon(self) -> None:
        """Try to renew it now."""
        self._renew_at_ms = 0.0
        self._wake.set()

    def doubted(self) -> bool:
        """A peer says that it is void or has expired.

        Anybody can say so: it is believed where it is plainly true, else once in
        `renew_retry_s_max`, since the eviction of the inviter may not have come here yet.
        Returns whether a renewal was begun.
        """
        now = self._judge.clock.monotonic()
        if self._judge.is_good(self.chain):
            if now - self._doubted_at < self._limits.renew_retry_s_max:
                return False
            self._doubted_at = now
        self.renew_soon()
        return True

    def _plan(self) -> None:
        # Members that joined together do not renew together.
        self._renew_at_ms = self.chain.leaf.when_ms(random.uniform(0.9, 1.1) / 3)  # noqa: S311 - jitter

    async def run(self) -> None:
        """Renew it in time, until cancelled."""
        limits = self._limits
        backoff = Backoff(limits.renew_retry_s, limits.renew_retry_s_max, random.Random())  # noqa: S311 - jitter
        while True:
            possible = self._store.cluster_key is not None or self.renew is not None
            if not possible or self._judge.now_ms < self._renew_at_ms:
                await self._pause(limits.sweep_s)
                continue
            self._renew_at_ms = float("inf")  # `renew_soon` meanwhile counts for the next round
            try:
                await self._renew()
                backoff.reset()
            except (WetwareError, OSError, TimeoutError) as exc:
                again_s = backoff.pause_s()
                self._log_not_renewed(exc, again_s)
                at_least_s = min(again_s, limits.renew_retry_s)  # whoever asks for it
                await asyncio.sleep(at_least_s)
                await self._pause(again_s - at_least_s)
                self._renew_at_ms = 0.0

    async def _pause(self, timeout_s: float) -> None:
        """Until somebody wants a renewal, or that long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _renew(self) -> None:
        if self._store.cluster_key is not None:
            chain = self._mint_own()
        else:
            assert self.renew is not None  # noqa: S101  # the caller looks
            chain = self._judge.verify(await self.renew(self.chain))
            if chain.peer != self._key.peer_id:
                raise refusal("wrong_peer", "the issuer sent somebody else's certificate")
        await self._store.files.threads.run(self._store.write_certificate, chain.encoded)
        self.chain = chain
        self._plan()
        log.info("certificate.renewed", issuer=chain.leaf.issuer)
        self._renewed(chain)

    def _log_not_renewed(self, exc: Exception, again_s: float) -> None:
        left_s = (self.chain.not_after_ms - self._judge.now_ms) / 1000
        (log.error if left_s <= 0 else log.warning)(
            "certificate.not_renewed",
            why=exc,
            left_s=round(left_s),
            again_s=round(again_s, 1),
            next=getattr(exc, "hint", ""),
        )
