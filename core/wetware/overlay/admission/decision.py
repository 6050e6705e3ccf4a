"""Admission: who is a member, who may speak what, and what an issuer signs. The one decision.

Asked for every stream, so `is_member` is a look into a table. What fills the table is checked
before: signatures, the time, tombstones, and the auth backend's veto. Removals take effect first
and are written down afterwards; a ticket is written down as spent before anything is handed out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import random
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NoReturn

from wetware.base.access import Access
from wetware.base.log import get_logger
from wetware.base.texts import ADDRS_MAX
from wetware.errors import (
    AdmissionRefused,
    ConfigError,
    InvalidArgument,
    LimitExceeded,
    WetwareError,
)
from wetware.identity import Key, PeerId
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.statements import (
    INVITE,
    MEMBER,
    RIGHTS,
    Certificate,
    Chain,
    Fact,
    ForeignFact,
    Founding,
    Tombstone,
    check_labels,
    decode_fact,
    fact_digest,
    refusal,
)
from wetware.overlay.admission.store import (
    CERTIFICATE_FILE,
    FOREIGN_FILE,
    LEDGER_FILE,
    TICKETS_FILE,
    TOMBSTONES_FILE,
    LedgerEntry,
    Store,
    TicketRecord,
    facts_document,
)
from wetware.overlay.admission.texts import SECRET_BYTES, Bundle, Ticket

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.base.multiaddr import Multiaddr

log = get_logger("admission")

REFUSALS_LOGGED_S: Final = 60.0
"""A refusal of the same peer and protocol is logged once in this time: logs are finite."""
EARLY_MAX: Final = 256
"""Issuers whose certificates begin in the future, remembered as a sign of a wrong clock."""
REFUSALS_REMEMBERED_MAX: Final = 1024
HEARD_S: Final = 20.0
"""After a start, members show their certificates and with them which tickets are spent: a ticket
from before the start is honoured so much later, which leaves a third of `join_s`."""
LEDGER_DELAY_S: Final = 1.0
"""Members that connect within this time are written to the ledger together."""

Veto = Callable[[PeerId], Awaitable[bool]]
Renew = Callable[[Chain], Awaitable[bytes]]


async def nobody_vetoes(peer: PeerId) -> bool:
    """For a backend that admits every node that the cluster certified."""
    return True


def _ignore(event: str, **fields: object) -> None:
    """For who keeps no record."""


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
    foreign: bool = False  # by a fact, not because it showed its certificate
    failures: int = 0  # of the backend's re-check, in a row


def _evicted(tombstone: Tombstone) -> AdmissionRefused:
    exc = refusal(
        "evicted",
        f"{tombstone.peer} was evicted from the cluster: {tombstone.reason or 'no reason'}",
        "a node that shall come back needs a new key",
    )
    exc.fact = tombstone.encoded
    return exc


class Admission:
    """Decides whether a peer may open a stream, and who is a member. The only place that does.

    Args:
        store: What the data directory holds; with a founding.
        key: The node's key.
        clock: Judges every beginning and end.
        limits: See AdmissionLimits.
        open_protocols: Protocol IDs of class OPEN that the configuration names.
        veto: `AuthBackend.admit_node`: False, an error or no answer in time is a veto.
        record: `Audit.record`.

    Raises ConfigError where the store has no founding, no certificate, or one of another node.

    Attributes:
        founding: What names the cluster.
        cluster_id: Its ID.
        has_cluster_key: Whether this node holds the cluster's key.
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
        if store.founding is None:
            raise ConfigError("this node belongs to no cluster yet")
        self.store = store
        self.founding: Founding = store.founding
        self.cluster_id = self.founding.cluster_id
        self.limits = limits or AdmissionLimits()
        self.has_cluster_key = store.cluster_key is not None
        self._root = self.founding.issuer
        self._key, self._clock, self._veto, self._record = key, clock, veto, record
        self._open = frozenset(open_protocols)
        self._skew_ms = self.limits.clock_skew_s_max * 1000
        self._refused: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._opened: OrderedDict[bytes, Chain] = OrderedDict()
        self._early: OrderedDict[PeerId, int] = OrderedDict()  # by issuer: the latest begin, ms
        self._excused: dict[PeerId, int] = {}  # of these, what an operator called a glitch
        self._members: dict[PeerId, _Member] = {}
        self._via: Counter[PeerId] = Counter()
        self._tombstones: dict[PeerId, dict[PeerId, Tombstone]] = {}  # peer → issuer → it
        self._buried: Counter[PeerId] = Counter()  # by issuer
        self._foreign: dict[PeerId, ForeignFact] = {}
        self._facts: dict[bytes, bytes] = {}
        self._unchecked: dict[PeerId, None] = {}  # foreign peers that wait for the veto
        self._watchers: dict[object, Callable[[Admitted | Removed], None]] = {}
        self._fact_watchers: dict[object, Callable[[bytes], None]] = {}
        self._renew: Renew | None = None
        self._wake = asyncio.Event()
        self._renew_now = asyncio.Event()
        self._ended = asyncio.Event()
        self._renew_at = 0.0
        self._old_tickets = frozenset(store.tickets)
        self._heard_at = clock.monotonic() + HEARD_S
        self._doubted_at = float("-inf")
        self._vetoes = asyncio.Semaphore(self.limits.vetoes_max)
        self._load_facts()
        self._own = self._load_own()
        self._plan_renewal()

    def _load_facts(self) -> None:
        now_ms = self._now_ms()
        for fact in self.store.tombstones:
            if isinstance(fact, Tombstone) and now_ms <= fact.not_after_ms + self._skew_ms:
                self._bury(fact)
        for fact in self.store.foreign:
            if isinstance(fact, ForeignFact) and self._is_good(fact.chain):
                self._keep_foreign(fact)

    def _load_own(self) -> Chain:
        """The node's own chain; where the cluster key is, a new one if need be."""
        store, me = self.store, self._key.peer_id
        chain: Chain | None = None
        if store.certificate is not None:
            try:
                chain = Chain.open(store.certificate, self.founding)
            except AdmissionRefused as exc:
                raise store.damaged(CERTIFICATE_FILE, exc) from None
            if chain.peer != me:
                raise ConfigError(
                    f"{store.data_dir / CERTIFICATE_FILE} is of {chain.peer}, and this node is "
                    f"{me}",
                    hint="restore node.key from the same backup, or move the certificate away and "
                    "join again with `ww node --join TICKET`",
                )
        if self.has_cluster_key and (
            chain is None
            or self._is_early(chain.leaf)  # signed in a glitch: nobody takes it yet
            or self._now_ms() >= self._renewal_ms(chain)
        ):
            chain = self._mint_own()
            try:
                store.write_certificate(chain.encoded)
            except OSError as exc:
                raise ConfigError(
                    f"cannot write to {store.data_dir}: {exc.strerror}",
                    hint="make room on the disk",
                ) from exc
        if chain is None:
            raise ConfigError(
                "this node has no certificate of its cluster",
                hint="join with `ww node --join TICKET`",
            )
        return chain

    # --- the decision -----------------------------------------------------------------------------

    def __call__(self, peer: PeerId, protocol: str, access: Access) -> bool:
        """Whether `peer` may open a stream for `protocol`; refusals are logged."""
        match access:
            case Access.PUBLIC:
                allowed = True
            case Access.MEMBER:
                allowed = self.is_member(peer)
            case Access.OPEN:
                allowed = protocol in self._open
        if not allowed:
            self._log_refusal(peer, protocol, access)
        return allowed

    def is_member(self, peer: PeerId) -> bool:
        """Whether `peer` has shown that it is a member, and still is."""
        member = self._members.get(peer)
        return member is not None and self._now_ms() <= member.until_ms

    def is_foreign(self, peer: PeerId) -> bool:
        """Whether `peer` is a member by a fact: it speaks none of our protocols."""
        member = self._members.get(peer)
        return member is not None and member.foreign and self._now_ms() <= member.until_ms

    def _log_refusal(self, peer: PeerId, protocol: str, access: Access) -> None:
        now, key = time.monotonic(), (str(peer), protocol)
        last = self._refused.get(key)
        if last is not None and now - last < REFUSALS_LOGGED_S:
            return
        self._refused[key] = now
        self._refused.move_to_end(key)
        if len(self._refused) > REFUSALS_REMEMBERED_MAX:
            self._refused.popitem(last=False)
        log.warning("protocol.refused", peer=peer, protocol=protocol, access=access.value)

    # --- questions --------------------------------------------------------------------------------

    @property
    def own(self) -> Chain:
        return self._own

    @property
    def can_invite(self) -> bool:
        """Whether what this node signs now is worth anything."""
        if self.has_cluster_key:
            return True
        return INVITE in self._own.rights and self._is_good(self._own)

    @property
    def members(self) -> tuple[PeerId, ...]:
        """All that are members now, this node not included."""
        return tuple(peer for peer in self._members if self.is_member(peer))

    def chain(self, peer: PeerId) -> Chain | None:
        """What a member has shown, or was certified with by a fact; this node's own for itself."""
        if peer == self._key.peer_id:
            return self._own
        member = self._members.get(peer)
        return member.chain if member is not None and self.is_member(peer) else None

    def evicted(
        self, peer: PeerId, rights: frozenset[str] = frozenset({MEMBER})
    ) -> Tombstone | None:
        """The tombstone that keeps a peer with these rights out, if there is one."""
        known = self._tombstones.get(peer, {})
        if self._root in known:
            return known[self._root]
        if INVITE in rights:
            return None
        return next((known[issuer] for issuer in known if not self._by_root(issuer)), None)

    def _by_root(self, peer: PeerId) -> bool:
        """Whether the cluster key evicted the peer."""
        return self._root in self._tombstones.get(peer, {})

    def _now_ms(self) -> float:
        return self._clock.time() * 1000

    def _is_good(self, chain: Chain) -> bool:
        try:
            self.judge(chain)
        except AdmissionRefused:
            return False
        return True

    def verify(self, encoded: bytes) -> Chain:
        """Check a chain offline: signatures (once per chain), the time, tombstones.

        Raises AdmissionRefused, code `admission.<why>`.
        """
        chain = self._opened_chain(encoded)
        self.judge(chain)
        return chain

    def judge(self, chain: Chain) -> None:
        """Raise AdmissionRefused if a chain with good signatures is not valid now."""
        self._judge_tombstones(chain)
        self._note_early(chain)
        chain.judge_time(self._now_ms(), self._skew_ms)

    def _is_early(self, certificate: Certificate) -> bool:
        return certificate.not_before_ms > self._now_ms() + self._skew_ms

    def _note_early(self, chain: Chain) -> None:
        """Who signs for a hundred peers says it once."""
        for certificate in filter(self._is_early, chain.certificates):
            issuer, begins_ms = certificate.issuer, certificate.not_before_ms
            self._early[issuer] = max(begins_ms, self._early.get(issuer, 0))
            if len(self._early) > EARLY_MAX:
                self._early.popitem(last=False)

    def early_s(self) -> dict[PeerId, float]:
        """Issuers of whose certificates one is said to begin only in so many seconds.

        Either their clocks were ahead, or this node's is behind. What this node signed itself says
        nothing of others' clocks.
        """
        self._note_early(self._own)
        own = {self._key.peer_id, *([self._root] if self.has_cluster_key else [])}
        now_ms = self._now_ms()
        return {
            issuer: (at_ms - now_ms) / 1000
            for issuer, at_ms in self._early.items()
            if at_ms > max(now_ms + self._skew_ms, self._excused.get(issuer, 0))
            and issuer not in own
            and not self._by_root(issuer)
        }

    def forget_early(self) -> None:
        """This node's clock is right: what begins in the future was signed in a glitch.

        Where the cluster key is, the node certifies itself anew: nobody takes what is not valid.
        """
        self._note_early(self._own)
        self._excused = dict(self._early)
        if self.has_cluster_key and self._is_early(self._own.leaf):
            self.renew_soon()

    def _judge_tombstones(self, chain: Chain) -> None:
        if (tombstone := self.evicted(chain.peer, chain.rights)) is not None:
            raise _evicted(tombstone)
        if chain.inviter is not None and self._by_root(chain.inviter.peer):
            raise refusal(
                "void",
                f"the certificate of {chain.peer} was issued by {chain.inviter.peer}, which was "
                "evicted",
                "the node renews it where the cluster's key is",
            )

    def _opened_chain(self, encoded: bytes) -> Chain:
        if type(encoded) is not bytes:
            raise refusal("malformed", "malformed: a chain is not bytes")
        digest = hashlib.sha256(encoded).digest()
        chain = self._opened.get(digest)
        if chain is None:
            chain = Chain.open(encoded, self.founding)
            self._opened[digest] = chain
            self._learn_spent(chain.leaf)
            while len(self._opened) > self.limits.chains_cached_max:
                self._opened.popitem(last=False)
        else:
            self._opened.move_to_end(digest)
        return chain

    def _learn_spent(self, leaf: Certificate) -> None:
        """A ticket that let somebody in is spent, whether or not this node remembers it.

        It does not where its data directory was restored from a backup.
        """
        for ticket in self.store.tickets.values():
            spent = ticket.spent
            if self._is_about(leaf, ticket) and leaf.peer not in spent and len(spent) < ticket.uses:
                self.store.spend(ticket, leaf.peer)
                self.store.save_soon(TICKETS_FILE, self.store.tickets_document)
                log.warning("ticket.was_spent", ticket=ticket.id, peer=leaf.peer)
                self._record("ticket.was_spent", ticket=ticket.id, peer=leaf.peer)
                return

    def _is_about(self, statement: Certificate | Tombstone, ticket: TicketRecord) -> bool:
        """Whether a statement that names a ticket of this node is to be believed.

        Nobody can name a ticket before its first use: of one that is not spent yet as far as this
        node remembers, everybody's word is good, also an inviter's who renewed the certificate. Of
        one that is, an inviter could make its word up, to use up or end another's ticket.
        """
        if statement.ticket != ticket.name:
            return False
        return not ticket.spent or statement.issuer in (self._root, self._key.peer_id)

    # --- members ----------------------------------------------------------------------------------

    async def admit(self, peer: PeerId, encoded: bytes) -> Chain:
        """Let a peer in that shows this chain, on a connection on which it proved who it is.

        Raises AdmissionRefused.
        """
        chain = self.verify(encoded)
        if chain.peer != peer:
            raise refusal("wrong_peer", f"the certificate is of {chain.peer}, not of {peer}")
        known = self._members.get(peer)
        if known is None or not self.is_member(peer):
            await self._ask(peer)
            self.judge(chain)  # the answer may have taken a while
        self._enter(chain)
        return chain

    async def _ask(self, peer: PeerId) -> None:
        """Ask the auth backend; raises AdmissionRefused. Fails closed."""
        try:
            async with asyncio.timeout(self.limits.veto_s), self._vetoes:
                allowed = await self._veto(peer)
        except TimeoutError:
            raise refusal(
                "veto_unavailable",
                f"the auth backend did not say within {self.limits.veto_s:g} s whether {peer} may "
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

    def _enter(self, chain: Chain, *, foreign: bool = False) -> None:
        peer, known = chain.peer, self._members.get(chain.peer)
        if peer == self._key.peer_id:
            return
        if known is not None and not _is_newer(chain, known.chain):
            known.foreign = known.foreign and foreign
            return
        inviter = chain.leaf.issuer
        if known is None or known.chain.leaf.issuer != inviter:
            if known is None and len(self._members) >= self.limits.members_max:
                raise refusal("full", f"{len(self._members)} members are admitted (members_max)")
            if inviter != self._root and self._via[inviter] >= self.limits.members_per_inviter_max:
                raise refusal(
                    "full",
                    f"{self._via[inviter]} members that {inviter} certified are admitted "
                    "(members_per_inviter_max)",
                )
            if known is not None:
                self._uncount(known)
            self._via[inviter] += 1
        end_ms = min(certificate.not_after_ms for certificate in chain.certificates)
        self._members[peer] = _Member(chain, end_ms + self._skew_ms, foreign)
        self._note(chain)
        if known is None:
            self._record("node.admitted", peer=peer, issuer=inviter, foreign=foreign)
        self._tell(Admitted(peer, chain))

    def _uncount(self, member: _Member) -> None:
        inviter = member.chain.leaf.issuer
        self._via[inviter] -= 1
        if self._via[inviter] <= 0:
            del self._via[inviter]

    def _remove(self, peer: PeerId, reason: str) -> None:
        member = self._members.pop(peer, None)
        if member is None:
            return
        self._uncount(member)
        self._record("node.removed", peer=peer, reason=reason)
        self._tell(Removed(peer, reason))

    def watch(self, callback: Callable[[Admitted | Removed], None]) -> Callable[[], None]:
        """Call back for every member that comes, renews or goes; this node's own renewals too.

        Returns a function that ends the watch.
        """
        token = object()
        self._watchers[token] = callback
        return lambda: self._watchers.pop(token, None) and None

    def _tell(self, event: Admitted | Removed) -> None:
        for callback in tuple(self._watchers.values()):
            try:
                callback(event)
            except Exception:  # a watcher's defect changes no decision
                log.exception("watcher.failed")

    # --- facts ------------------------------------------------------------------------------------

    def facts(self) -> Mapping[bytes, bytes]:
        """What every member has to have: digest (16 bytes) → tombstone or foreign certificate."""
        return self._facts

    def adopt(self, encoded: bytes) -> bool:
        """Take over a fact: check it, act on it, keep it.

        Returns whether it is new; what is known, has ended or was superseded is not.
        Raises AdmissionRefused, also where a limit on facts is reached.
        """
        if type(encoded) is bytes and fact_digest(encoded) in self._facts:
            return False
        fact = decode_fact(encoded)
        if self._is_past(fact) or self._is_superseded(fact):
            return False
        fact.check(self.founding)
        if isinstance(fact, Tombstone):
            self._adopt_tombstone(fact)
        else:
            self._adopt_foreign(fact)
        for callback in tuple(self._fact_watchers.values()):
            try:
                callback(encoded)
            except Exception:
                log.exception("watcher.failed")
        return True

    def watch_facts(self, callback: Callable[[bytes], None]) -> Callable[[], None]:
        """Call back with every new fact, this node's own included; returns what ends the watch."""
        token = object()
        self._fact_watchers[token] = callback
        return lambda: self._fact_watchers.pop(token, None) and None

    def _is_past(self, fact: Fact) -> bool:
        if isinstance(fact, Tombstone):
            return self._now_ms() > fact.not_after_ms + self._skew_ms
        return self._now_ms() > fact.chain.not_after_ms + self._skew_ms

    def _is_superseded(self, fact: Fact) -> bool:
        known: Fact | None
        if isinstance(fact, Tombstone):
            known = self._tombstones.get(fact.peer, {}).get(fact.issuer)
        else:
            known = self._foreign.get(fact.peer)
        return known is not None and known.rank >= fact.rank

    def _adopt_tombstone(self, fact: Tombstone) -> None:
        known = self._tombstones.get(fact.peer, {}).get(fact.issuer)
        if known is None:
            limits = self.limits
            name, limit = (
                ("tombstones_max", limits.tombstones_max)
                if fact.issuer == self._root
                else ("tombstones_per_inviter_max", limits.tombstones_per_inviter_max)
            )
            if self._buried[fact.issuer] >= limit:
                raise refusal("full", f"{limit} evictions by {fact.issuer} are known ({name})")
        self._bury(fact)
        if self.evicted(fact.peer) is not None:
            self._record(
                "node.evicted", peer=fact.peer, by=fact.issuer, reason=fact.reason or "no reason"
            )
        if fact.issuer == self._root:
            # What this peer said as an inviter holds no longer.
            for peer, foreign in tuple(self._foreign.items()):
                if foreign.chain.leaf.issuer == fact.peer:
                    self._drop_foreign(peer)
        self._enforce()
        self._cut_tickets(fact)
        self.store.save_soon(TOMBSTONES_FILE, self._tombstones_document, ends=True)

    def _bury(self, fact: Tombstone) -> None:
        mine = self._tombstones.setdefault(fact.peer, {})
        if (known := mine.get(fact.issuer)) is not None:
            del self._facts[fact_digest(known.encoded)]
        else:
            self._buried[fact.issuer] += 1
        mine[fact.issuer] = fact
        self._facts[fact_digest(fact.encoded)] = fact.encoded

    def _enforce(self) -> None:
        """Remove every member that the tombstones, as they are now, keep out."""
        for peer, member in tuple(self._members.items()):
            try:
                self._judge_tombstones(member.chain)
            except AdmissionRefused as exc:
                self._remove(peer, exc.code.removeprefix("admission."))
        for peer in [peer for peer in self.store.ledger if peer in self._tombstones]:
            if self.evicted(peer, self.store.ledger[peer].rights) is not None:
                del self.store.ledger[peer]
                self._save_ledger()
        for peer, foreign in tuple(self._foreign.items()):
            if self.evicted(peer, foreign.chain.rights) is not None:
                self._drop_foreign(peer)
        if (why := self.own_ended()) is not None:
            log.error("node.own_certificate_ended", why=why, next=why.hint)
            if why.code == "admission.void":
                self.renew_soon()
            self._ended.set()

    def own_ended(self) -> AdmissionRefused | None:
        """Why the tombstones that this node knows keep it out of the cluster; None if they do not.

        One by an inviter holds until the cluster's key evicts that one. One by the cluster's key is
        for good.
        """
        try:
            self._judge_tombstones(self._own)
        except AdmissionRefused as exc:
            return exc
        return None

    def judge_own(self) -> None:
        """Raise AdmissionRefused if the cluster's key has evicted this node."""
        why = self.own_ended()
        if why is not None and self._by_root(self._key.peer_id):
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

    def _cut_tickets(self, fact: Tombstone) -> None:
        """Take back the tickets that let the peer in: it could give them to another key."""
        if self.evicted(fact.peer) is None:
            return
        for ticket in tuple(self.store.tickets.values()):
            let_in = fact.peer in ticket.spent or self._is_about(fact, ticket)
            if let_in and not ticket.revoked:
                self.store.tickets[ticket.id] = replace(ticket, revoked=True)
                self.store.save_soon(TICKETS_FILE, self.store.tickets_document, ends=True)

    def _adopt_foreign(self, fact: ForeignFact) -> None:
        self.judge(fact.chain)
        inviter = fact.chain.leaf.issuer
        if fact.peer not in self._foreign:
            others = [f for f in self._foreign.values() if f.chain.leaf.issuer == inviter]
            if len(self._foreign) >= self.limits.foreign_max:
                raise refusal("full", f"{len(self._foreign)} foreign peers (foreign_max)")
            if inviter != self._root and len(others) >= self.limits.foreign_per_inviter_max:
                raise refusal(
                    "full",
                    f"{len(others)} foreign peers that {inviter} certified "
                    "(foreign_per_inviter_max)",
                )
        self._keep_foreign(fact)
        self.store.save_soon(FOREIGN_FILE, self._foreign_document)

    def _keep_foreign(self, fact: ForeignFact) -> None:
        if (known := self._foreign.get(fact.peer)) is not None:
            del self._facts[fact_digest(known.encoded)]
        self._foreign[fact.peer] = fact
        self._facts[fact_digest(fact.encoded)] = fact.encoded
        self._unchecked[fact.peer] = None  # the backend is asked first, in `run`
        self._wake.set()

    def _drop_foreign(self, peer: PeerId) -> None:
        fact = self._foreign.pop(peer)
        del self._facts[fact_digest(fact.encoded)]
        self._unchecked.pop(peer, None)
        self.store.save_soon(FOREIGN_FILE, self._foreign_document)

    def _tombstones_document(self) -> bytes:
        return facts_document([t for mine in self._tombstones.values() for t in mine.values()])

    def _foreign_document(self) -> bytes:
        return facts_document(list(self._foreign.values()))

    async def _admit_foreign(self, peer: PeerId) -> None:
        """Ask the backend about a foreign peer; a veto keeps it out until the next re-check."""
        fact = self._foreign.get(peer)
        if fact is None:
            return
        try:
            await self._ask(peer)
            if self._foreign.get(peer) is fact:
                self.judge(fact.chain)
                self._enter(fact.chain, foreign=True)
        except AdmissionRefused as exc:
            log.warning("foreign.refused", peer=peer, why=exc)

    # --- issuing ----------------------------------------------------------------------------------

    def _mint(
        self,
        peer: PeerId,
        rights: frozenset[str],
        labels: Mapping[str, str],
        *,
        foreign: bool,
        ticket: bytes = b"",
    ) -> Chain:
        """Sign a certificate; the caller has decided that the peer may have it."""
        limits, now_ms = self.limits, int(self._now_ms())
        life_s = limits.certificate_s
        if foreign:
            life_s = limits.foreign_certificate_s
        elif INVITE in rights:
            life_s = limits.inviter_certificate_s
        end_ms, key = now_ms + int(life_s * 1000), self.store.cluster_key
        if key is None:
            self._need_invite(rights)
            end_ms = min(end_ms, self._own.not_after_ms)
        leaf = Certificate.issue(
            key or self._key,
            cluster=self.cluster_id,
            peer=peer,
            rights=rights,
            labels=labels,
            not_before_ms=now_ms,
            not_after_ms=end_ms,
            foreign=foreign,
            ticket=ticket,
        )
        return Chain((leaf,) if key is not None else (leaf, self._own.leaf))

    def _mint_own(self) -> Chain:
        return self._mint(self._key.peer_id, RIGHTS, {}, foreign=False)

    def _need_invite(self, rights: frozenset[str] = frozenset({MEMBER})) -> None:
        """Raise AdmissionRefused unless this node may grant these rights."""
        if not rights <= RIGHTS:
            raise InvalidArgument(
                f"{min(rights - RIGHTS)!r} is not a right; rights are {', '.join(sorted(RIGHTS))}"
            )
        if self.has_cluster_key:
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

    def _refuse_evicted(self, peer: PeerId, rights: frozenset[str]) -> None:
        if (tombstone := self.evicted(peer, rights)) is not None:
            raise _evicted(tombstone)

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
        granted = frozenset(rights) | {MEMBER}
        self._need_invite(granted)
        check_labels(labels or {})
        life_s = self.limits.ticket_s if expires_s is None else expires_s
        if not 0 < life_s <= self.limits.ticket_s_max:
            raise InvalidArgument(
                f"a ticket lasts for up to {self.limits.ticket_s_max:g} s (ticket_s_max)"
            )
        if not 1 <= uses <= self.limits.ticket_uses_max:
            raise InvalidArgument(
                f"a ticket lets in 1 to {self.limits.ticket_uses_max} nodes (ticket_uses_max)"
            )
        self._forget_tickets()
        # Signed once, to nobody's use: labels that make too large a certificate are refused now.
        self._mint(self._key.peer_id, frozenset({MEMBER}), labels or {}, foreign=False)
        secret = secrets.token_bytes(SECRET_BYTES)
        record = TicketRecord(
            id=secrets.token_hex(4),
            digest=hashlib.sha256(secret).digest(),
            not_after_ms=int(self._now_ms() + life_s * 1000),
            uses=uses,
            labels=dict(labels or {}),
            rights=granted,
        )
        self.store.tickets[record.id] = record
        try:
            await self.store.save_tickets()
        except OSError as exc:
            self.store.tickets.pop(record.id, None)
            raise _not_saved("the ticket", exc) from exc
        self._record("ticket.issued", ticket=record.id, uses=uses, rights=",".join(sorted(granted)))
        return Ticket(
            founding=self.founding,
            issuer=self._key.peer_id,
            addrs=tuple(addrs)[:ADDRS_MAX],
            secret=secret,
            not_after_ms=record.not_after_ms,
            id=record.id,
        )

    def _forget_tickets(self) -> None:
        """Make room: ended tickets are kept as long as there is room, to say what they are."""
        tickets, now_ms = self.store.tickets, self._now_ms()
        room = self.limits.tickets_max - 1
        ended = sorted(
            (t for t in tickets.values() if t.revoked or t.not_after_ms < now_ms),
            key=lambda t: t.not_after_ms,
        )
        for ticket in ended[: max(0, len(tickets) - room)]:
            del tickets[ticket.id]
        if len(tickets) > room:
            raise LimitExceeded(
                f"{len(tickets)} tickets are open (tickets_max)",
                hint="revoke some, or wait until they expire",
            )

    def tickets(self) -> list[TicketRecord]:
        return list(self.store.tickets.values())

    async def revoke_ticket(self, ticket_id: str) -> None:
        """Take a ticket back: it lets nobody in any more. Idempotent.

        Takes effect at once. Raises InvalidArgument for an unknown one, AdmissionRefused
        "admission.not_saved" where the disk fails.
        """
        record = self.store.tickets.get(ticket_id)
        if record is None:
            raise InvalidArgument(
                f"this node has issued no ticket {ticket_id[:40]!r}", hint="`ww invite --list`"
            )
        if not record.revoked:
            self.store.tickets[ticket_id] = replace(record, revoked=True)
            self._record("ticket.revoked", ticket=ticket_id)
        try:
            await self.store.save_tickets(ends=True)
        except OSError as exc:
            raise _not_saved("that the ticket is revoked", exc) from exc

    def _refuse_unsure(self) -> None:
        """Nobody gets in by what may have been ended before a crash."""
        if self.store.unsure:
            raise refusal(
                "not_durable",
                f"this node lets nobody join or renew since its start: {self.store.unsure}",
                "an operator of the node repeats `ww evict` and `ww invite --revoke` where they "
                "were, and then runs `ww grants --resume`",
            )

    def _ticket(self, peer: PeerId, secret: bytes) -> TicketRecord:
        """The ticket that `peer` may redeem now; raises AdmissionRefused."""
        self._refuse_unsure()
        digest, found = hashlib.sha256(secret).digest(), None
        for record in self.store.tickets.values():  # all of them: the time says nothing
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
        if self._now_ms() > found.not_after_ms:
            raise refusal(
                "ticket_expired",
                f"the ticket expired {(self._now_ms() - found.not_after_ms) / 1000:.0f} s ago",
                "ask for a new one: `ww invite`",
            )
        if peer not in found.spent and len(found.spent) >= found.uses:
            raise refusal(
                "ticket_spent",
                "the ticket was used by another node",
                "ask for a new one; if nobody should have used it, `ww evict` that node",
            )
        return found

    async def redeem(self, peer: PeerId, secret: bytes) -> Chain:
        """The certificate that a ticket stands for, for the peer that redeems it.

        The ticket is spent durably first. The same peer may ask again, should the answer get lost.
        Raises AdmissionRefused.
        """
        record = self._ticket(peer, secret)
        self._need_invite(record.rights)
        self._refuse_evicted(peer, frozenset({MEMBER}))
        if record.id in self._old_tickets and peer not in record.spent:
            wait_s = self._heard_at - self._clock.monotonic()
            if wait_s > 0:
                log.info("ticket.from_before_the_start", ticket=record.id, wait_s=round(wait_s, 1))
                await asyncio.sleep(wait_s)
        await self._ask(peer)
        # All again, since that took a while; from here to the mark nobody else gets a turn.
        record = self._ticket(peer, secret)
        self._need_invite(record.rights)
        self._refuse_evicted(peer, frozenset({MEMBER}))
        if peer not in record.spent:
            self.store.spend(record, peer)
        try:
            await self.store.save_tickets()
        except OSError as exc:
            self._unspend(record.id, peer, was_spent=peer in record.spent)
            raise _not_saved("that the ticket is spent", exc) from exc
        self._refuse_evicted(peer, frozenset({MEMBER}))
        chain = self._mint(peer, record.rights, record.labels, foreign=False, ticket=record.name)
        self._note(chain, at_once=True)
        self._record("ticket.redeemed", ticket=record.id, peer=peer)
        return chain

    def _unspend(self, ticket_id: str, peer: PeerId, *, was_spent: bool) -> None:
        """Nothing was handed out: the ticket is as good as before."""
        record = self.store.tickets.get(ticket_id)
        if record is not None and not was_spent:
            self.store.tickets[ticket_id] = replace(
                record, spent=tuple(other for other in record.spent if other != peer)
            )

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
        self._need_invite(granted)
        self._refuse_evicted(peer, frozenset({MEMBER}))
        await self._ask(peer)
        self._refuse_evicted(peer, frozenset({MEMBER}))
        chain = self._mint(peer, granted, labels or {}, foreign=foreign)
        if foreign:
            self.adopt(ForeignFact(chain).encoded)
            try:
                await self.store.save(FOREIGN_FILE, self._foreign_document)
            except OSError as exc:
                raise _not_saved("the certificate", exc) from exc
        else:
            self._note(chain, at_once=True)
        self._record("node.certified", peer=peer, foreign=foreign)
        return Bundle(self.founding, chain, tuple(addrs)[:ADDRS_MAX])

    async def evict(self, peer: PeerId, reason: str = "") -> Tombstone:
        """End a membership everywhere, whatever certificate or ticket the peer has. Idempotent.

        Takes effect here at once, and durably when this returns. Raises AdmissionRefused
        ("admission.not_allowed"; "admission.not_saved", in force all the same), InvalidArgument.
        """
        self._need_invite()
        if peer == self._key.peer_id:
            raise InvalidArgument(
                "a node does not evict itself", hint="run this at another inviter, or stop the node"
            )
        known = self._members.get(peer)
        entry = self.store.ledger.get(peer)
        rights = known.chain.rights if known else entry.rights if entry else frozenset[str]()
        if not self.has_cluster_key and INVITE in rights:
            raise refusal(
                "not_allowed",
                f"{peer} may invite: only a node with the cluster's key evicts it",
                "run this at the node where the cluster was founded",
            )
        me = self._root if self.has_cluster_key else self._key.peer_id
        tombstone = self._tombstones.get(peer, {}).get(me)
        if tombstone is None:
            now_ms = int(self._now_ms())
            life_s, margin_s = self.limits.tombstone_s, self.limits.renew_grace_s
            margin_s += 2 * self.limits.clock_skew_s_max
            # An issuer with other limits than this node's may have signed what the peer has.
            latest_ms = max(
                known.chain.not_after_ms if known else 0, entry.not_after_ms if entry else 0
            )
            end_ms = max(now_ms + int(life_s * 1000), latest_ms + int(margin_s * 1000))
            tombstone = Tombstone.issue(
                self.store.cluster_key or self._key,
                cluster=self.cluster_id,
                peer=peer,
                chain=None if self.has_cluster_key else self._own,
                reason=reason,
                ticket=self._ticket_of(peer, known),
                at_ms=now_ms,
                not_after_ms=end_ms,
            )
            self.adopt(tombstone.encoded)
        try:
            await self.store.save(TOMBSTONES_FILE, self._tombstones_document, ends=True)
            await self.store.save_tickets(ends=True)
        except OSError as exc:
            raise _not_saved("the eviction is in force, but it", exc) from exc
        return tombstone

    def _ticket_of(self, peer: PeerId, known: _Member | None) -> bytes:
        """The name of the ticket that let a peer in; b"" if this node does not know of one."""
        if known is not None:
            return known.chain.leaf.ticket
        mine = (t.name for t in self.store.tickets.values() if peer in t.spent)
        return next(mine, b"")

    # --- renewal, as an issuer --------------------------------------------------------------------

    def _note(self, chain: Chain, *, at_once: bool = False) -> None:
        """As an issuer, remember a member, to renew its certificate."""
        ledger, peer, leaf = self.store.ledger, chain.peer, chain.leaf
        if peer == self._key.peer_id or leaf.foreign or not self.can_invite:
            return
        known = ledger.get(peer)
        if known is not None and known.not_after_ms >= leaf.not_after_ms:
            return
        inviter = leaf.issuer
        if known is None:
            own = (self._root, self._key.peer_id)
            others = sum(entry.inviter == inviter for entry in ledger.values())
            full = len(ledger) >= self.limits.ledger_max or (
                inviter not in own and others >= self.limits.members_per_inviter_max
            )
            if full and not self._shrink_ledger():
                log.warning("ledger.full", peer=peer, entries=len(ledger))
                return
        ledger[peer] = LedgerEntry(leaf.rights, leaf.labels, leaf.not_after_ms, inviter)
        self._save_ledger(0.0 if at_once else LEDGER_DELAY_S)

    def _shrink_ledger(self) -> bool:
        """Forget who can renew no more; whether that made room."""
        ledger, grace_ms = self.store.ledger, self.limits.renew_grace_s * 1000
        gone = [p for p, e in ledger.items() if e.not_after_ms + grace_ms < self._now_ms()]
        for peer in gone:
            del ledger[peer]
        return bool(gone)

    def _save_ledger(self, delay_s: float = LEDGER_DELAY_S) -> None:
        self.store.save_soon(LEDGER_FILE, self.store.ledger_document, delay_s)

    async def renew(self, peer: PeerId, encoded: bytes) -> Chain:
        """A new certificate for a member that shows its old one, also within the grace after it.

        Raises AdmissionRefused.
        """
        old = self._opened_chain(encoded)
        if old.peer != peer:
            raise refusal("wrong_peer", f"the certificate is of {old.peer}, not of {peer}")
        entry = self._renewable(peer, old)
        await self._ask(peer)
        entry = self._renewable(peer, old)
        chain = self._mint(peer, entry.rights, entry.labels, foreign=False, ticket=old.leaf.ticket)
        self._note(chain, at_once=True)
        self._record("certificate.renewed", peer=peer)
        return chain

    def _renewable(self, peer: PeerId, old: Chain) -> LedgerEntry:
        if not self.can_invite:
            raise refusal("not_issuer", "this node renews no certificates")
        self._refuse_unsure()
        entry = self.store.ledger.get(peer)
        rights = old.rights if entry is None else entry.rights
        self._refuse_evicted(peer, rights)
        if entry is None:
            raise refusal(
                "not_known",
                f"this node does not know {peer} as a member",
                "join again with `ww node --join TICKET`",
            )
        self._need_invite(rights)
        now_ms = self._now_ms()
        if now_ms < old.leaf.not_before_ms - self._skew_ms:
            old.leaf.judge_time(now_ms, self._skew_ms)
        late_s = (now_ms - old.not_after_ms) / 1000 - self.limits.clock_skew_s_max
        if late_s > self.limits.renew_grace_s:
            raise refusal(
                "expired",
                f"the certificate of {peer} ended more than {self.limits.renew_grace_s:g} s ago "
                "(renew_grace_s)",
                "join again with `ww node --join TICKET`",
            )
        return entry

    # --- this node's own certificate --------------------------------------------------------------

    def set_renewer(self, renew: Renew | None) -> None:
        """How this node gets a new certificate where it cannot sign one: from an issuer."""
        self._renew = renew

    def renew_soon(self) -> None:
        """Try to renew the node's own certificate now."""
        self._renew_at = 0.0
        self._renew_now.set()

    def doubted(self) -> bool:
        """A peer says that the node's own certificate is void or has expired.

        Anybody can say so: it is believed where it is plainly true, else once in
        `renew_retry_s_max`, since the eviction of the inviter may not have come here yet.
        Returns whether a renewal was begun.
        """
        now = self._clock.monotonic()
        if self._is_good(self._own):
            if now - self._doubted_at < self.limits.renew_retry_s_max:
                return False
            self._doubted_at = now
        self.renew_soon()
        return True

    def _renewal_ms(self, chain: Chain, part: float = 1 / 3) -> float:
        """When this part of its life is over."""
        leaf = chain.leaf
        return leaf.not_before_ms + (leaf.not_after_ms - leaf.not_before_ms) * part

    def _plan_renewal(self) -> None:
        due_ms, start_ms = self._renewal_ms(self._own), self._own.leaf.not_before_ms
        # Members that joined together do not renew together.
        self._renew_at = (start_ms + (due_ms - start_ms) * random.uniform(0.9, 1.1)) / 1000  # noqa: S311 - jitter

    async def _renew_own(self) -> None:
        """Get a new certificate, or say when to try again."""
        if self.has_cluster_key:
            chain = self._mint_own()
        else:
            assert self._renew is not None  # noqa: S101  # the caller looks
            chain = self.verify(await self._renew(self._own))
            if chain.peer != self._key.peer_id:
                raise refusal("wrong_peer", "the issuer sent somebody else's certificate")
        await asyncio.to_thread(self.store.write_certificate, chain.encoded)
        self._own = chain
        self._plan_renewal()
        log.info("certificate.renewed", issuer=chain.leaf.issuer)
        self._tell(Admitted(chain.peer, chain))

    # --- life -------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None]) -> None:
        """Renew, expire, re-check until cancelled; then write what waits to be written."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_renewed(), name="admission renewal")
                tasks.create_task(self._keep_checked(), name="admission re-check")
                await self._check_foreign()
                ready()
                while True:
                    self._sweep()
                    await self._check_foreign()
                    self._wake.clear()
                    if not self._unchecked:
                        await self._pause(self._wake, self.limits.sweep_s)
        finally:
            await self.store.flush()

    @staticmethod
    async def _pause(event: asyncio.Event, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            pass

    async def _check_foreign(self) -> None:
        peers = tuple(self._unchecked)
        self._unchecked.clear()
        await asyncio.gather(*map(self._admit_foreign, peers))

    def _sweep(self) -> None:
        now_ms = self._now_ms()
        for peer, member in tuple(self._members.items()):
            if now_ms > member.until_ms:
                self._remove(peer, "expired")
        for peer, foreign in tuple(self._foreign.items()):
            if self._is_past(foreign):
                self._drop_foreign(peer)
            elif now_ms >= self._renewal_ms(foreign.chain, 2 / 3):
                self._renew_foreign(foreign.chain)
        for peer, mine in tuple(self._tombstones.items()):
            for issuer, tombstone in tuple(mine.items()):
                if self._is_past(tombstone):
                    del mine[issuer], self._facts[fact_digest(tombstone.encoded)]
                    self._buried[issuer] -= 1
                    self.store.save_soon(TOMBSTONES_FILE, self._tombstones_document)
            if not mine:
                del self._tombstones[peer]

    def _renew_foreign(self, old: Chain) -> None:
        """A foreign peer cannot ask: who issued its certificate makes a new one in time."""
        issuer = self._root if self.has_cluster_key else self._key.peer_id
        if old.leaf.issuer != issuer or not self.can_invite or not self.is_member(old.peer):
            return
        new = self._mint(old.peer, old.rights, old.labels, foreign=True)
        # An inviter's own end may be near: no new one for the sake of a few days.
        life_ms = old.not_after_ms - old.leaf.not_before_ms
        if new.not_after_ms >= old.not_after_ms + life_ms / 6:
            self.adopt(ForeignFact(new).encoded)
            self._record("certificate.renewed", peer=old.peer)

    async def _keep_renewed(self) -> None:
        limits = self.limits
        retry_s = limits.renew_retry_s
        while True:
            possible = self.has_cluster_key or self._renew is not None
            if not possible or self._clock.time() < self._renew_at:
                await self._pause(self._renew_now, limits.sweep_s)
                self._renew_now.clear()
                continue
            self._renew_at = float("inf")  # `renew_soon` meanwhile counts for the next round
            try:
                await self._renew_own()
                retry_s = limits.renew_retry_s
            except (WetwareError, OSError, TimeoutError) as exc:
                self._log_not_renewed(exc, retry_s)
                # Not more often than this, whoever asks for it.
                await asyncio.sleep(limits.renew_retry_s * random.uniform(0.75, 1.25))  # noqa: S311 - jitter
                await self._pause(self._renew_now, retry_s - limits.renew_retry_s)
                self._renew_now.clear()
                retry_s = min(limits.renew_retry_s_max, retry_s * 2)
                self._renew_at = 0.0

    def _log_not_renewed(self, exc: Exception, again_s: float) -> None:
        left_s = self._own.not_after_ms / 1000 - self._clock.time()
        (log.error if left_s <= 0 else log.warning)(
            "certificate.not_renewed",
            why=exc,
            left_s=round(left_s),
            again_s=round(again_s, 1),
            next=getattr(exc, "hint", ""),
        )

    async def _keep_checked(self) -> None:
        while True:
            await asyncio.sleep(self.limits.veto_recheck_s)
            self._unchecked |= dict.fromkeys(set(self._foreign) - set(self._members))
            await asyncio.gather(*map(self._recheck, tuple(self._members)))

    async def _recheck(self, peer: PeerId) -> None:
        """Ask again; no answer is a veto once it has not come several times."""
        try:
            await self._ask(peer)
        except AdmissionRefused as exc:
            member = self._members.get(peer)
            if member is None:
                return
            member.failures += 1
            if exc.code == "admission.vetoed" or member.failures >= self.limits.veto_failures_max:
                log.warning("node.vetoed", peer=peer, why=exc)
                self._remove(peer, "vetoed")
        else:
            if (member := self._members.get(peer)) is not None:
                member.failures = 0


def _is_newer(chain: Chain, than: Chain) -> bool:
    """Whether it was issued later: what an issuer said last counts."""
    return (chain.leaf.not_before_ms, chain.not_after_ms) > (
        than.leaf.not_before_ms,
        than.not_after_ms,
    )


def _not_saved(what: str, exc: OSError) -> AdmissionRefused:
    log.error("admission.not_saved", what=what, why=exc)
    return refusal(
        "not_saved",
        f"{what} could not be written to disk: {exc.strerror}",
        "make room on the node's disk and try again",
    )
