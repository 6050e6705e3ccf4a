"""The members: who has shown a valid certificate, and the auth backend did not veto."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wetware.base.bounds import less
from wetware.base.log import get_logger
from wetware.base.watchers import Watchers
from wetware.errors import AdmissionRefused
from wetware.identity import PeerId
from wetware.overlay.admission.statements import Chain, refusal

if TYPE_CHECKING:
    from wetware.overlay.admission.judge import Judge

log = get_logger("admission.members")

Veto = Callable[[PeerId], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A peer became a member, or shows a new certificate."""

    peer: PeerId
    chain: Chain


@dataclass(frozen=True, slots=True)
class Removed:
    """A peer is a member no more; `reason` is "evicted", "expired", "vetoed" or "void"."""

    peer: PeerId
    reason: str


@dataclass(slots=True)
class _Member:
    chain: Chain
    until_ms: float  # with the tolerance for clocks
    foreign: bool  # by a fact, not because it showed its certificate
    failures: int = 0  # of the backend's re-check, in a row


class Members:
    """The table of them, this node not included.

    `veto` is `AuthBackend.admit_node`: False, an error or no answer in time is a veto. `changes`
    tells of every member that comes, renews or goes.
    """

    def __init__(self, judge: Judge, veto: Veto, record: Callable[..., None]) -> None:
        self._judge, self._limits, self._veto, self._record = judge, judge.limits, veto, record
        self._questions = asyncio.Semaphore(judge.limits.vetoes_max)
        self._members: dict[PeerId, _Member] = {}
        self._certified: Counter[PeerId] = Counter()  # members by who certified them
        self.changes = Watchers[Admitted | Removed]()

    def _valid(self, peer: PeerId) -> _Member | None:
        member = self._members.get(peer)
        return member if member is not None and self._judge.now_ms <= member.until_ms else None

    def __contains__(self, peer: PeerId) -> bool:
        return self._valid(peer) is not None

    def __iter__(self) -> Iterator[PeerId]:
        return filter(self.__contains__, tuple(self._members))

    def is_foreign(self, peer: PeerId) -> bool:
        """Whether `peer` is a member by a fact: it speaks none of our protocols."""
        member = self._valid(peer)
        return member is not None and member.foreign

    def chain(self, peer: PeerId) -> Chain | None:
        """What a member has shown, or was certified with by a fact."""
        member = self._valid(peer)
        return None if member is None else member.chain

    async def admit(self, peer: PeerId, encoded: bytes) -> Chain:
        """Let a peer in that shows this chain, on a connection on which it proved who it is.

        Raises AdmissionRefused.
        """
        chain = self._judge.verify(encoded)
        if chain.peer != peer:
            raise refusal("wrong_peer", f"the certificate is of {chain.peer}, not of {peer}")
        if peer not in self:
            await self.ask(peer)
            self._judge.check(chain)  # the answer may have taken a while
        self.enter(chain)
        return chain

    async def ask(self, peer: PeerId) -> None:
        """Ask the auth backend; raises AdmissionRefused. Fails closed."""
        try:
            async with asyncio.timeout(self._limits.veto_s), self._questions:
                allowed = await self._veto(peer)
        except TimeoutError:
            raise refusal(
                "veto_unavailable",
                f"the auth backend did not say within {self._limits.veto_s:g} s whether {peer} may "
                "be a member",
            ) from None
        except Exception:
            log.exception("veto.failed", peer=peer)
            raise refusal(
                "veto_unavailable", "the auth backend cannot decide; the node's log says why"
            ) from None
        if allowed is not True:
            raise refusal(
                "vetoed",
                f"the auth backend does not let {peer} be a member",
                "have its peer ID entered where the backend keeps its nodes; if that was done just "
                "now, try again in a minute",
            )

    def enter(self, chain: Chain, *, foreign: bool = False) -> None:
        """Make a peer a member that may be one; raises AdmissionRefused at a limit."""
        peer, inviter, known = chain.peer, chain.leaf.issuer, self._members.get(chain.peer)
        if peer == self._judge.me:
            return
        if known is not None and not chain.is_newer(known.chain):
            known.foreign = known.foreign and foreign
            return
        limits, count = self._limits, len(self._members)
        if known is None and count >= limits.members_max:
            raise refusal("full", f"{count} members are admitted (members_max)")
        if inviter != self._judge.root and (known is None or known.chain.leaf.issuer != inviter):
            others = self._certified[inviter]
            if others >= limits.members_per_inviter_max:
                raise refusal(
                    "full",
                    f"{others} members that {inviter} certified are admitted "
                    "(members_per_inviter_max)",
                )
        end_ms = min(certificate.not_after_ms for certificate in chain.certificates)
        self._members[peer] = _Member(chain, end_ms + self._judge.skew_ms, foreign)
        self._certified[inviter] += 1
        if known is not None:
            less(self._certified, known.chain.leaf.issuer)
        else:
            self._record("node.admitted", peer=peer, issuer=inviter, foreign=foreign)
        self.changes.tell(Admitted(peer, chain))

    def _remove(self, peer: PeerId, reason: str) -> None:
        if (member := self._members.pop(peer, None)) is not None:
            less(self._certified, member.chain.leaf.issuer)
            self._record("node.removed", peer=peer, reason=reason)
            self.changes.tell(Removed(peer, reason))

    def remove_evicted(self, peer: PeerId) -> None:
        """Remove whom a new tombstone of `peer` keeps out: that one, and those it certified."""
        for other in tuple(self._members) if self._certified[peer] else (peer,):
            if (member := self._members.get(other)) is not None:
                try:
                    self._judge.check_evictions(member.chain)
                except AdmissionRefused as exc:
                    self._remove(other, exc.code.removeprefix("admission."))

    def remove_expired(self) -> None:
        for peer in tuple(self._members):
            if peer not in self:
                self._remove(peer, "expired")

    async def recheck(self, peer: PeerId) -> None:
        """Ask again; no answer is a veto once it has not come several times."""
        try:
            await self.ask(peer)
            failure = None
        except AdmissionRefused as exc:
            failure = exc
        member = self._members.get(peer)
        if member is None:
            return
        member.failures = member.failures + 1 if failure else 0
        vetoed = failure is not None and failure.code == "admission.vetoed"
        if vetoed or member.failures >= self._limits.veto_failures_max:
            log.warning("node.vetoed", peer=peer, why=failure)
            self._remove(peer, "vetoed")
