"""All grants of a node: roots and sessions, what is kept over a restart, and sturdy references.

A share is a durable grant with a secret, of which the hash is kept; whoever has the secret redeems
it, here, for a capability under a grant of its own. Shares are on disk with all their ancestors
before anybody gets their secret. After a restart they live on below their ancestors, which are
closed: nobody speaks through those any more, and their terms and budgets still bind.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Final

from wetware.base.log import get_logger
from wetware.broker.clock import SteadyClock
from wetware.broker.fences import Fences
from wetware.broker.grants import BEARER, SESSION_SERVICE, Grant, Grants, Share, end_of
from wetware.broker.limits import BrokerLimits
from wetware.broker.methods import pattern_within
from wetware.broker.store import ENDED_KEPT_MAX, GrantRow, GrantStore, Kept, ShareRow
from wetware.broker.sturdy import SECRET_BYTES
from wetware.broker.terms import Terms
from wetware.errors import (
    LOG_IN_AGAIN,
    CapabilityError,
    Denied,
    Expired,
    LimitExceeded,
    NotFound,
    Revoked,
    WetwareError,
    stopping,
)
from wetware.identity import Principal

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.broker.ports import RoleProfile

log = get_logger("broker")

UNKNOWN_REF: Final = "capability.denied.unknown_ref"
_NOBODY: Final = hashlib.sha256(b"").digest()

Admit = Callable[[Grant], Awaitable[object]]
ProfileOf = Callable[[Principal, str], "RoleProfile | None"]
"""A role of a principal as it is now; None if it has it no more."""


def unknown_ref() -> Denied:
    """The one answer to a wrong ID and to a wrong secret."""
    return Denied(
        "this node has not issued the reference, or its secret is wrong",
        hint="ask for a new one (`ww share`)",
        code=UNKNOWN_REF,
    )


class Tree(Grants):
    """The grants of one node; without a `store` nothing outlives the process, for tests."""

    def __init__(
        self, clock: Clock, *, store: GrantStore | None = None, limits: BrokerLimits | None = None
    ) -> None:
        kept = store.kept if store is not None else Kept()
        super().__init__(
            store.clock if store is not None else SteadyClock(clock),
            limits or BrokerLimits(),
            Fences(store, kept.fences),
        )
        self.store = store
        self._roots: dict[Principal, list[Grant]] = {}
        self._shares_of: Counter[Principal] = Counter()
        self._kept_ids: set[str] = set()
        self._ended: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        self._closing = False

    # --- roots and sessions -----------------------------------------------------------------------

    def root(self, principal: Principal, role: str, profile: RoleProfile) -> Grant:
        """The root for a role of a principal, as the role is now.

        A role that was widened since has a second root: what is under the first keeps what it was
        granted, and both are found when the role is withdrawn.
        """
        services, where = dict(profile.services), tuple(profile.where)
        for known in self.roots(principal):
            if (known.role, known.services, known.terms.where) == (role, services, where):
                return known
        terms = Terms(where=where)
        root = Grant(
            self, principal, kind="role", label=f"role {role}", services=services, terms=terms
        )
        self._roots.setdefault(principal, []).append(root)
        return root

    def roots(self, principal: Principal | None = None) -> list[Grant]:
        """The roots of a principal, or all."""
        if principal is not None:
            return list(self._roots.get(principal, ()))
        return [root for held in self._roots.values() for root in held]

    def session(
        self, principal: Principal, roots: Iterable[Grant], *, expires_at: float | None = None
    ) -> Grant:
        """The grant of a login: what any of its roles allows, and the Session itself."""
        roots = tuple(roots)
        services: dict[str, frozenset[str]] = {SESSION_SERVICE: frozenset({"Session.*"})}
        for root in roots:
            for name, patterns in root.services.items():
                if name != SESSION_SERVICE:
                    services[name] = services.get(name, frozenset()) | patterns
        return Grant(
            self,
            principal,
            kind="session",
            label="session",
            services=services,
            parents=roots,
            service=SESSION_SERVICE,
            # In its terms: what is shared from it is put back under the same end.
            terms=Terms(expires_at=expires_at),
        )

    def withdraw(
        self,
        backend: str,
        principal: Principal | None,
        roles: frozenset[str] | None,
        why: str,
    ) -> int:
        """End what hangs on roles (None: all) of a principal (None: everybody) of a backend."""
        cut = 0
        for root in self.roots(principal):
            if root.principal.backend == backend and (roles is None or root.role in roles):
                reason = why or f"role {root.role} was withdrawn from {root.principal}"
                # 0 where the session that it shared with another role has taken it along.
                cut += max(0, root.revoke(reason) - 1)
        return cut

    def has_ended(self, grant_id: str) -> bool:
        """Whether it is known that a share of that ID has ended."""
        return grant_id in self._ended

    def close(self) -> None:
        """The node stops: everything ends here, and what is durable stays on disk. Idempotent."""
        if self._closing:
            return
        self._closing = True
        kept = [self.grants[id_] for id_ in self._kept_ids if id_ in self.grants]
        for root in self.roots():
            root.end(stopping())
        if self.store is not None:  # an orderly end gives back what was left of reserved blocks
            self.store.settle(
                (grant.id, grant.budget.calls.spent, grant.budget.bytes.spent)
                for grant in kept
                if grant.budget is not None
            )

    # --- sturdy references ------------------------------------------------------------------------

    async def share(
        self,
        parent: Grant,
        terms: Terms,
        *,
        kind: str = "share",
        label: str = "",
        uses: int | None = None,
        admit: Admit | None = None,
    ) -> tuple[Grant, bytes]:
        """A durable grant below `parent`, and the secret to redeem it with.

        One of another `kind` is for a service of this node, which drops the secret. `admit` records
        it; it is on disk, with its ancestors, before this returns. Raises what `Grant.derive` and
        `admit` raise, StoreUnavailable, LimitExceeded, and Revoked if an ancestor ended meanwhile;
        then there is no share.
        """
        owner = parent.principal
        if self._shares_of[owner] >= self.limits.shares_per_principal_max:
            raise LimitExceeded(
                f"{owner} has {self._shares_of[owner]} living shares (shares_per_principal_max)",
                hint="`ww grants` shows them, `ww revoke ID` ends one",
            )
        grant = parent.derive(
            kind=kind, label=label or kind, terms=terms, service=SESSION_SERVICE, durable=True
        )
        self._shares_of[owner] += 1
        secret = secrets.token_bytes(SECRET_BYTES)
        share = Share(grant, hashlib.sha256(secret).digest(), uses)
        try:
            if admit is not None:
                await admit(grant)
                grant.check_live()
            if self.store is not None:
                self._kept_ids.update(above.id for above in grant.lineage)
                for above in grant.lineage:
                    self._keep_budget(above)
                await self.store.save_share(
                    [above.row() for above in grant.lineage],
                    ShareRow(grant.id, share.secret_hash, uses, 0),
                )
            grant.check_live()
        except BaseException:
            grant.revoke("the share could not be made")
            self._drop_share(owner)
            if self.store is not None:  # what ended meanwhile was forgotten before it was kept
                self.store.forget([g.id for g in grant.lineage if g.id not in self.grants], ())
            raise
        self.shares[grant.id] = share
        return grant, secret

    async def redeem(self, share_id: str, secret: bytes, *, admit: Admit | None = None) -> Grant:
        """The grant of one use of a share.

        `admit` records it before anything is given. Raises `unknown_ref` for an unknown ID and a
        wrong secret alike; Revoked, Expired or LimitExceeded "limit.uses" to who has the secret.
        """
        share = self._shared(share_id, secret)
        self._check_use(share)
        # The use is spent here, before any await, and is not given back: whoever asks at the same
        # time finds one fewer.
        share.redeemed += 1
        if self.store is not None:
            await self.store.save_redeemed(share_id, share.redeemed)
        share.grant.check_live()
        grant = share.grant.derive(
            kind="redeemed",
            label=share.grant.label,
            service=SESSION_SERVICE,
            principal=Principal(BEARER, share_id),
        )
        try:
            if admit is not None:
                await admit(grant)
            grant.check_live()
        except BaseException:
            grant.close("it could not be recorded")
            raise
        return grant

    def peek(self, share_id: str, secret: bytes) -> Grant:
        """The grant of a share, for who has its secret; spends nothing.

        Raises like `redeem`, except for uses: the grant says how many are left.
        """
        return self._shared(share_id, secret).grant

    def kept(self, grant_id: str) -> Grant:
        """A durable grant that lives; raises why it has ended, or NotFound."""
        if (share := self.shares.get(grant_id)) is not None:
            return share.grant
        if (ended := self._ended.get(grant_id)) is not None:
            raise _ended_error(ended[1])
        raise NotFound(f"no durable grant {grant_id[:32]!r} is known at this node")

    def _shared(self, share_id: str, secret: bytes) -> Share:
        """The share, for who has its secret; raises `unknown_ref`, or why it has ended."""
        share, ended = self.shares.get(share_id), self._ended.get(share_id)
        expected = share.secret_hash if share is not None else ended[0] if ended else _NOBODY
        right = hmac.compare_digest(hashlib.sha256(secret).digest(), expected)
        if not right or (share is None and ended is None):
            raise unknown_ref()
        if share is None:
            raise _ended_error(ended[1] if ended else "")
        return share

    def _check_use(self, share: Share) -> None:
        share.grant.check_live()
        if share.uses_left == 0:
            raise LimitExceeded(
                f"the reference was used {share.redeemed} times, which is all it allows",
                hint="ask for a new one (`ww share --uses N`)",
                code="limit.uses",
            )

    def _drop_share(self, owner: Principal) -> None:
        self._shares_of[owner] -= 1
        if self._shares_of[owner] <= 0:
            del self._shares_of[owner]

    def _keep_budget(self, grant: Grant) -> None:
        store, budget = self.store, grant.budget
        if store is None or budget is None:
            return

        async def save(calls: int, nbytes: int) -> None:
            await store.save_spent(grant.id, calls, nbytes)

        budget.keep(save)

    # --- over a restart ---------------------------------------------------------------------------

    def restore(self, profile: ProfileOf) -> int:
        """Put back what the store has; returns how many shares live.

        What hung on a role that its principal has no more, or that allows less now, ended while the
        node was down.
        """
        if self.store is None:
            return 0
        if self.store.unsure:
            log.error("shares.suspended", why=self.store.unsure, hint="`ww doctor`")
            self.shares_suspended = CapabilityError(
                f"every share of this node is suspended since its start: {self.store.unsure}",
                hint="an operator of the node ends with `ww revoke` what should have ended, and "
                "then runs `ww grants --resume`",
                code="capability.suspended.not_durable",
            )
        kept = self.store.kept
        shares = {row.id: row for row in kept.shares}
        for known in kept.shares:
            if known.ended:
                self._ended[known.id] = (known.secret_hash, known.ended)
        rows = {row.id: row for row in kept.grants}
        void: list[str] = []
        ended: list[tuple[str, str, float]] = []
        for row in _parents_first(rows):
            if (error := self._restore(row, shares.get(row.id), profile)) is not None:
                void.append(row.id)
                if (share := shares.get(row.id)) is not None and not share.ended:
                    self._remember_ended(share.id, share.secret_hash, _why(error))
                    ended.append((share.id, _why(error), self.clock.time()))
        self.store.forget(void, ended)
        for grant in tuple(self.grants.values()):
            grant._prune()
        return len(self.shares)

    def resume(self) -> int:
        """An operator has looked at the shares: they work again. Returns how many there are.

        Idempotent.
        """
        if self.shares_suspended is not None and self.store is not None:
            self.shares_suspended = None
            self.store.confirm()
        return len(self.shares)

    def _restore(
        self, row: GrantRow, share: ShareRow | None, profile: ProfileOf
    ) -> CapabilityError | None:
        """One grant; returns why it is over instead."""
        if share is not None and share.ended:
            return Revoked("it ended before the node stopped")
        principal = Principal.parse(row.principal)
        parents = tuple(self.grants[id_] for id_ in row.parents if id_ in self.grants)
        if len(parents) != len(row.parents):
            return Revoked("what it was derived from ended while the node was down")
        services = {name: frozenset(patterns) for name, patterns in row.services.items()}
        terms = Terms.from_plain(row.terms)
        if row.kind == "role":
            role = row.label.removeprefix("role ")
            now = profile(principal, role)
            if now is None or not _covers(now, services, terms):
                return Revoked(f"role {role} of {principal} was withdrawn while the node was down")
        expires_at = end_of(terms, parents)
        if expires_at is not None and self.clock.time() >= expires_at:
            return Expired(f"grant {row.id} ({row.label}) expired")
        live = row.kind == "role" or share is not None
        grant = Grant(
            self,
            principal,
            kind=row.kind,
            label=row.label,
            services=services,
            parents=parents,
            service=row.service,
            terms=terms,
            durable=row.durable,
            row=row,
        )
        self._kept_ids.add(row.id)
        self._keep_budget(grant)
        if not live:
            grant.ended = Revoked(
                f"grant {row.id} ({row.label}) is over: the node was restarted",
                hint=LOG_IN_AGAIN,
                code="capability.revoked.closed",
            )
            grant._cut(grant.ended)
        elif row.kind == "role":
            self._roots.setdefault(principal, []).append(grant)
        elif share is not None:
            self.shares[row.id] = Share(grant, share.secret_hash, share.uses, share.redeemed)
            self._shares_of[principal] += 1
        return None

    # --- what grants tell -------------------------------------------------------------------------

    def gone(self, grants: Sequence[Grant], error: WetwareError | None) -> None:
        """Forget them, and remember why the shares among them ended."""
        forget: list[str] = []
        ended: list[tuple[str, str, float]] = []
        why = _why(error or Revoked("it is over"))
        for grant in grants:
            if grant.kind == "role":
                self._drop_root(grant)
            if grant.id in self._kept_ids and not self._closing:
                self._kept_ids.discard(grant.id)
                forget.append(grant.id)
            if (share := self.shares.pop(grant.id, None)) is not None:
                self._drop_share(grant.principal)
                if not self._closing:
                    self._remember_ended(grant.id, share.secret_hash, why)
                    ended.append((grant.id, why, self.clock.time()))
        if self.store is not None and forget:
            self.store.forget(forget, ended)

    def _drop_root(self, root: Grant) -> None:
        held = self._roots.pop(root.principal, [])
        if others := [other for other in held if other is not root]:
            self._roots[root.principal] = others

    def _remember_ended(self, share_id: str, secret_hash: bytes, why: str) -> None:
        self._ended[share_id] = (secret_hash, why)
        while len(self._ended) > ENDED_KEPT_MAX:
            self._ended.popitem(last=False)


def _why(error: WetwareError) -> str:
    """What is kept of why a share ended: its redeemers are told the same after a restart."""
    return f"{error.code}: {error.message}"


def _ended_error(kept: str) -> CapabilityError:
    """The inverse of `_why`."""
    code, _, why = kept.partition(": ")
    error = Expired if code.startswith(Expired.code) else Revoked
    return error(why or "the reference has ended", hint="ask for a new one")


def _parents_first(rows: Mapping[str, GrantRow]) -> Iterator[GrantRow]:
    """Each after its parents; what refers to itself is left out."""
    order = TopologicalSorter({row.id: row.parents for row in rows.values()})
    with contextlib.suppress(CycleError):  # what is outside of the cycle has its order
        order.prepare()
    while ready := order.get_ready():
        yield from (rows[id_] for id_ in ready if id_ in rows)
        order.done(*ready)


def _covers(now: RoleProfile, services: Mapping[str, frozenset[str]], terms: Terms) -> bool:
    """Whether a role as it is now allows all that a root of it was granted."""
    if not set(now.where) <= set(terms.where):
        return False
    return all(
        pattern_within(pattern, now.patterns(name))
        for name, patterns in services.items()
        for pattern in patterns
    )
