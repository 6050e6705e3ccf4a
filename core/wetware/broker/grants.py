"""Grants: what a principal may do, as nodes of a tree that only narrows.

A root is (principal, role). A login's session is a child of the roots of its roles; what is opened,
attenuated or shared hangs below it. A grant is at the same time the guard (`wetware.rpc.Guard`) of
every servant that is reached through it: the check runs in the servant's dispatch, and ending a
grant ends its subtree now, calls in flight included.

A call is allowed if the grant and all its ancestors allow it; of the roles of a session one is
enough. Where nothing but methods is to be checked, a call costs a lookup; what else there is
(constraints, budgets, fences) is compiled once for each grant and method.

Two ways to end: `revoke` ends the subtree; `close` is how a session ends by itself, and leaves what
was made to outlive it (`durable`), whose ancestor it stays.

Source: Miller, "Robust Composition" (2006), ch. 9; membranes and revocation there, §9.4.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from wetware.base.log import get_logger
from wetware.broker.budgets import Budget
from wetware.broker.decisions import Decision, Decisions, shown
from wetware.broker.explanation import Step
from wetware.broker.methods import ANY, matches, pattern_within
from wetware.broker.protocol import CORE
from wetware.broker.store import GrantRow
from wetware.broker.terms import Terms
from wetware.errors import (
    LOG_IN_AGAIN,
    Amplification,
    CapabilityError,
    Denied,
    Expired,
    LimitExceeded,
    Revoked,
    WetwareError,
)
from wetware.rpc.values import payload_bytes

if TYPE_CHECKING:
    from wetware.broker.fences import Hold
    from wetware.broker.tree import Tree
    from wetware.broker.where import Where
    from wetware.identity import Principal
    from wetware.rpc import Method

log = get_logger("broker")

SESSION_SERVICE: Final = "session"
"""Reserved: the name under which a grant covers the Session interface itself. Roles do not speak of
it, and it is not charged."""
BEARER: Final = "bearer"
"""Backend of the principal of who redeemed a share: its subject is the share's ID."""
CALLS_MAX: Final = 4096
"""Calls in flight under one grant; connections have their own, lower limit."""
LENT_S: Final = 2.0
"""A capability that was given out counts as held for so long, whether it arrives or is lost."""
SUMMARY_CHARS_MAX: Final = 512
"""Of a grant's terms, in the explanations of denials that are remembered."""
_TIMER_S_MIN: Final = 0.05
_HELD: Final = frozenset({"service", "attenuated", "redeemed", "adopted"})
"""Kinds of grants that are over when nobody holds them."""


class _Test(NamedTuple):
    """A compiled constraint. `passes` is None where it cannot be judged: a denial."""

    grant: Grant
    where: Where
    passes: Callable[[Mapping[str, object]], bool] | None

    def allows(self, args: Mapping[str, object]) -> bool:
        return self.passes is not None and self.passes(args)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What has to be checked for a method; None in its place means nothing.

    Attributes:
        denied: No grant covers the method: why, and which grant says so.
        tests: Constraints that all have to pass.
        roles: The constraints of each role that covers the method: one role's have to pass; ()
            where a role has none.
        budgets: To be charged, each with its grant.
        fences: Grants with a fencing token.
        lanes: Of several roles, each with its constraints on the method, covered by it or not: who
            breaks one is no role of what the call returns. () where there are none.
        metered: A quota of bytes is among the budgets.
    """

    denied: tuple[Grant, str] | None = None
    tests: tuple[_Test, ...] = ()
    roles: tuple[tuple[_Test, ...], ...] = ()
    budgets: tuple[tuple[Grant, Budget], ...] = ()
    fences: tuple[Grant, ...] = ()
    lanes: tuple[tuple[Grant, tuple[_Test, ...]], ...] = ()
    metered: bool = False


_OPEN: Final = _Plan()


class Grant:
    """One node of the tree. Roots and sessions are made by the `Tree`, the rest with `derive`.

    Attributes:
        id: 16 hex digits, unguessable, so that naming a grant in a log gives nothing away.
        parents: The grants that this one ends with; () for a root.
        principal: Whose it is.
        kind: "role", "session", "service", "attenuated", "share", "redeemed" or "adopted".
        label: What it is for, in words, e.g. "role member", "service pubsub".
        service: The service whose servants it guards, or None.
        services: Service name or "*" → method patterns, those of the terms resolved.
        terms: What it adds to its parents' terms.
        durable: It outlives the session that it was made in, and the node's process.
        created_at: Unix time, s.
        expires_at: Unix time, s, never later than a parent's, or None.
        budget: What its terms let it use up, or None.
        ended: None while the grant lives, then the error that every call gets.
        tree: Where it is.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_chain",
        "_children",
        "_exports",
        "_holds",
        "_lane",
        "_lanes",
        "_lent",
        "_of_earlier_share",
        "_plans",
        "_summary",
        "_tasks",
        "_timer",
        "budget",
        "created_at",
        "durable",
        "ended",
        "expires_at",
        "id",
        "kind",
        "label",
        "metered",
        "parents",
        "principal",
        "service",
        "services",
        "terms",
        "tree",
    )

    def __init__(
        self,
        tree: Tree,
        principal: Principal,
        *,
        kind: str,
        label: str,
        services: Mapping[str, frozenset[str]],
        parents: tuple[Grant, ...] = (),
        service: str | None = None,
        terms: Terms | None = None,
        durable: bool = False,
        expires_at: float | None = None,
        row: GrantRow | None = None,
    ) -> None:
        self.tree = tree
        self.id = row.id if row is not None else secrets.token_hex(8)
        self.principal, self.kind, self.label = principal, kind, label
        self.parents, self.service, self.services = parents, service, services
        self.terms = terms or _NO_TERMS
        self.durable = durable
        self.created_at = row.created_at if row is not None else tree.clock.time()
        self.expires_at = expires_at
        self.ended: WetwareError | None = None
        self._children: set[Grant] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._holds: dict[asyncio.Task[object], list[Hold]] = {}
        self._callbacks: dict[int, tuple[Callable[[WetwareError], None], bool]] = {}
        self._exports = self._lent = 0
        self._plans: dict[Method, _Plan] = {}
        self._lane: tuple[Grant, ...] = parents[0]._lane if len(parents) == 1 else ()
        self._lanes: dict[tuple[Grant, ...], Grant] = {}
        self._summary = ""
        self._timer: asyncio.TimerHandle | None = None
        self.budget = _budget(self.terms, tree, row)
        self._of_earlier_share: bool = (kind == "share" and row is not None) or any(
            parent._of_earlier_share for parent in parents
        )  # one that was made before the node started
        # From here to the top, roles left out: a session is the only one with several parents.
        above = parents[0]._chain if len(parents) == 1 else ()
        self._chain: tuple[Grant, ...] = () if kind == "role" else (self, *above)
        self.metered = any(
            grant.budget is not None and grant.budget.bytes is not None for grant in self._chain
        )
        for parent in parents:
            parent._children.add(self)
        tree.grants[self.id] = self
        if expires_at is not None:
            self._set_timer()

    def __repr__(self) -> str:
        return f"<Grant {self.id} {self.label} of {self.principal}>"

    # --- the tree ---------------------------------------------------------------------------------

    def derive(
        self,
        *,
        kind: str = "attenuated",
        label: str,
        terms: Terms | None = None,
        service: str | None = None,
        principal: Principal | None = None,
        durable: bool = False,
    ) -> Grant:
        """A child no stronger than this grant; it ends when this one does.

        Args:
            kind: See the class.
            label: What the child is for.
            terms: What it adds; its methods have to be within this grant's.
            service: Bind the child to one service: it guards that service's servants.
            principal: Whose it is, if not this grant's.
            durable: See the class.

        Raises Revoked or Expired if this grant has ended, Amplification if a pattern is not within
        this grant's, LimitExceeded beyond `children_max`, `depth_max` and `grants_max`.
        """
        self.check_live()
        tree, terms = self.tree, terms or _NO_TERMS
        limits = tree.limits
        for name, count, limit in (
            ("children_max", len(self._children), limits.children_max),
            ("depth_max", len(self._chain), limits.depth_max),
            ("grants_max", len(tree.grants), limits.grants_max),
        ):
            if count >= limit:
                raise LimitExceeded(
                    f"grant {self.id}: {name} ({limit}) is reached",
                    hint="`ww grants` shows them, `ww revoke ID` ends one",
                )
        services = self.services
        if terms.services is not None:
            services = terms.services
            for name, patterns in services.items():
                mine = self.patterns(name)
                if excess := [p for p in sorted(patterns) if not pattern_within(p, mine)]:
                    raise Amplification(
                        f"{name} {excess[0]!r} is more than grant {self.id} ({self.label}) allows",
                        hint="`ww services` shows what you may do",
                    )
        expires_at = terms.expires_at
        if expires_at is None or (self.expires_at is not None and self.expires_at < expires_at):
            expires_at = self.expires_at
        return Grant(
            tree,
            principal or self.principal,
            kind=kind,
            label=label,
            services=services,
            parents=(self,),
            service=service,
            terms=terms,
            durable=durable,
            expires_at=expires_at,
        )

    def patterns(self, service: str) -> frozenset[str]:
        """The method patterns that this grant has for a service; empty if none."""
        everywhere = self.services.get(ANY, frozenset())
        if service == SESSION_SERVICE:  # "*" is about services
            everywhere = frozenset()
        return self.services.get(service, frozenset()) | everywhere

    @property
    def children(self) -> frozenset[Grant]:
        """Derivations that are still in the tree."""
        return frozenset(self._children)

    @property
    def roots(self) -> tuple[Grant, ...]:
        """The roles that it comes from; one is enough for a call."""
        if self.kind == "role":
            return (self,)
        return self._lane or self._chain[-1].parents

    @property
    def lineage(self) -> tuple[Grant, ...]:
        """The grant and all its ancestors, roles last."""
        return (*self._chain, *self.roots)

    def subtree(self) -> Iterator[Grant]:
        """The grant and everything below it that is in the tree."""
        seen: dict[Grant, None] = {}
        todo = [self]
        while todo:
            grant = todo.pop()
            if grant not in seen:
                seen[grant] = None
                yield grant
                todo.extend(grant._children)

    @property
    def calls_in_flight(self) -> int:
        """Calls that go on under this grant itself."""
        return len(self._tasks)

    @property
    def state(self) -> str:
        """One of live, suspended, closed (its session is over, what was shared lives), ended."""
        if self.ended is not None:
            return "closed" if self.id in self.tree.grants else "ended"
        return "live" if self.blocked is None else "suspended"

    # --- ending -----------------------------------------------------------------------------------

    def check_live(self) -> None:
        """Raise what ended the grant, or what holds it up now."""
        if self.ended is None and self._expired():
            self._expire()
        if (error := self.blocked) is not None:
            raise _fresh(error)

    @property
    def blocked(self) -> WetwareError | None:
        """Why nothing may pass now, be it for good or not; None while the grant works."""
        if self.ended is not None:
            return self.ended
        tree = self.tree
        if self.expires_at is not None:
            if self._expired():
                return self._expired_error()
            if tree.clock_wrong:
                return Expired(
                    f"grant {self.id} ({self.label}) has an end, and this node's clock is wrong: "
                    f"{tree.clock_wrong}",
                    hint="an operator sets the clock of the node's machine, or says with `ww clock "
                    "--right` that it is right; grants without an end go on",
                    code="capability.expired.clock",
                )
        return tree.suspended or (tree.shares_suspended if self._of_earlier_share else None)

    def _expired(self) -> bool:
        # Judged at each use as well: a timer may be late, and the wall clock may have been set.
        return self.expires_at is not None and self.tree.clock.time() >= self.expires_at

    def _expired_error(self) -> Expired:
        return Expired(f"grant {self.id} ({self.label}) expired")

    def _set_timer(self) -> None:
        if self.expires_at is not None:
            delay = max(_TIMER_S_MIN, self.expires_at - self.tree.clock.time())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        if self.id not in self.tree.grants:
            return
        if not self._expired():  # the loop's clock ran ahead of the wall clock
            self._set_timer()
            return
        self.end(self._expired_error())

    def revoke(self, reason: str) -> int:
        """End the grant and everything derived from it, now. Idempotent; returns how many ended."""
        return self.end(
            Revoked(f"grant {self.id} ({self.label}) was revoked: {reason}", hint=LOG_IN_AGAIN)
        )

    def end(self, error: WetwareError) -> int:
        """End the subtree with `error`: mark all of it first, then cut what is under way."""
        found = list(self.subtree())
        if self.id not in self.tree.grants:
            return 0
        ending = [grant for grant in found if grant.ended is None]
        for grant in ending:  # nothing may be admitted by any of them from here on
            grant.ended = error
        for grant in found:
            self.tree.grants.pop(grant.id, None)
        for grant in ending:
            grant._cut(error)
        self.tree._gone(found, error)
        for grant in found:
            grant._children.clear()
            for parent in grant.parents:
                parent._children.discard(grant)
                parent._prune()
                parent.let_go()
        return len(ending)

    def close(self, reason: str) -> int:
        """End by itself: what is durable below lives on. Idempotent; returns how many ended."""
        if self.ended is not None:
            return 0
        error = Revoked(
            f"grant {self.id} ({self.label}) is over: {reason}",
            hint=LOG_IN_AGAIN,
            code="capability.revoked.closed",
        )
        ending: list[Grant] = []
        todo = [self]
        while todo:
            grant = todo.pop()
            if grant.durable or grant.ended is not None:
                continue
            ending.append(grant)
            todo.extend(grant._children)
        for grant in ending:
            grant.ended = error
        for grant in ending:
            grant._cut(error)
        for grant in reversed(ending):  # leaves first: ancestors stay while something hangs on them
            grant._prune()
        for parent in self.parents:
            parent.let_go()
        return len(ending)

    def _prune(self) -> None:
        """Leave the tree if nothing hangs on this grant any more: a role, or what is closed."""
        idle = self.kind == "role" or self.ended is not None
        if not idle or self._children or self.tree.grants.pop(self.id, None) is None:
            return
        self.tree._gone((self,), self.ended)
        for parent in self.parents:
            parent._children.discard(self)
            parent._prune()
            parent.let_go()

    # --- who holds it -----------------------------------------------------------------------------

    def exported(self) -> None:
        """A peer holds one more object under this grant."""
        self._exports += 1

    def unexported(self) -> bool:
        """One fewer; returns whether it was the last one, so that `let_go` has to be called."""
        self._exports -= 1
        return self._exports == 0

    def lend(self) -> None:
        """It is on its way: for LENT_S it counts as held, and no longer if it is lost."""
        self._lent += 1
        asyncio.get_running_loop().call_later(LENT_S, self._returned)

    def _returned(self) -> None:
        self._lent -= 1
        self.let_go()

    def let_go(self) -> None:
        """Close it if nobody holds it any more, nor anything that came from it.

        A session that was logged in to, a share and a role do not depend on it.
        """
        if self.kind not in _HELD or self.ended is not None:
            return
        if self._exports or self._lent or self._tasks:
            return
        if any(holds for _, holds in self._callbacks.values()):
            return
        if any(child.ended is None and not child.durable for child in self._children):
            return
        self.close("nobody holds it any more")

    def _cut(self, error: WetwareError) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._plans.clear()
        self._lanes.clear()
        for task in tuple(self._tasks):
            task.cancel()
        callbacks, self._callbacks = list(self._callbacks.values()), {}
        for callback, _ in callbacks:
            try:
                callback(error)
            except Exception:  # one broken listener must not keep the others alive
                log.exception("grant.callback_failed", grant=self.id)

    # --- the guard of servants (wetware.rpc.Guard) ------------------------------------------------

    def enter(
        self, method: Method, args: Mapping[str, object], task: asyncio.Task[Any]
    ) -> Awaitable[None] | None:
        """Admit one call, or raise Denied, Revoked, Expired or LimitExceeded.

        `task` is cancelled when the grant ends. What is returned has to be awaited before the call
        runs: a write of the quota, or the calls under an older fencing token.
        """
        tree = self.tree
        if (
            self.ended is not None
            or self.expires_at is not None
            or tree.suspended is not None
            or tree.shares_suspended is not None
        ):
            self.check_live()
        plan = self._plans.get(method)
        if plan is None:
            plan = self._plans[method] = self._plan(method)
        if len(self._tasks) >= CALLS_MAX:
            raise LimitExceeded(f"{CALLS_MAX} calls are in flight under grant {self.id}")
        waiting = None
        if plan is not _OPEN:
            waiting = self._judge(plan, method, args, task)
        self._tasks.add(task)
        return waiting

    def onward(self, method: Method, args: Mapping[str, object]) -> Grant:
        """The guard of what the call returns.

        Of several roles, those whose constraints the call breaks are left out of it: what was
        reached by the leave of another role is not theirs to act on. Raises LimitExceeded.
        """
        plan = self._plans.get(method, _OPEN)
        if not plan.lanes or self.ended is not None:
            return self
        lane = tuple(root for root, tests in plan.lanes if all(t.allows(args) for t in tests))
        if len(lane) == len(plan.lanes):
            return self
        found = self._lanes.get(lane)
        if found is None or found.ended is not None:
            names = ", ".join(sorted(root.label for root in lane))
            found = self.derive(
                kind="service", label=f"{self.label} by {names}", service=self.service
            )
            found._lane = lane
            self._lanes[lane] = found
            found.lend()
        return found

    def leave(self, task: asyncio.Task[Any]) -> None:
        """The call that `enter` admitted is over."""
        self._tasks.discard(task)
        if self._holds:
            for hold in self._holds.pop(task, ()):
                hold.release()
        if not self._exports and not self._tasks and self.kind in _HELD:
            self.lend()  # what the call returns is not with its caller yet

    def on_end(
        self, callback: Callable[[WetwareError], None], *, holds: bool = True
    ) -> Callable[[], None]:
        """Call back once when the grant ends (at once if it has); returns a remover.

        Until then, or until it is removed, it counts as a use of the grant if it `holds`.
        """
        if self.ended is not None:
            callback(self.ended)
            return lambda: None
        token = id(callback)
        while token in self._callbacks:
            token += 1
        self._callbacks[token] = (callback, holds)

        def remove() -> None:
            if self._callbacks.pop(token, None) is not None and not self._exports:
                self.let_go()

        return remove

    def charge(self, method: Method, nbytes: int) -> Awaitable[None] | None:
        """Charge bytes of results and of calls on callbacks; raises LimitExceeded."""
        if not self.metered or method.interface == CORE.Session:
            return None
        budgets = tuple(
            (grant, grant.budget)
            for grant in self._chain
            if grant.budget is not None and grant.budget.bytes is not None
        )
        return self._pay(budgets, 0, nbytes)

    # --- the decision -----------------------------------------------------------------------------

    def _plan(self, method: Method) -> _Plan:
        """What has to be checked for a method."""
        service = self.service
        interface, name = method.interface.name, method.name
        if self.kind == "adopted" and method.interface == CORE.Session:
            return _OPEN  # a session's own methods are no payload, wherever they are served
        if self.kind == "adopted":  # what it allows is judged by its issuer
            budgets = tuple((g, g.budget) for g in self._chain if g.budget is not None)
            metered = any(budget.bytes is not None for _, budget in budgets)
            return _Plan(budgets=budgets, metered=metered) if budgets else _OPEN
        if service is None:
            return _Plan(denied=(self, "it is bound to no service"))
        for grant in self._chain:
            if not matches(grant.patterns(service), interface, name):
                narrowed = grant.kind == "service" and grant.terms.services is not None
                why = f" ({grant.label})" if narrowed else ""
                return _Plan(denied=(grant, _lacks(service, method) + why))
        if service == SESSION_SERVICE:
            return _OPEN
        roles = [
            root._tests(service, method)
            for root in self.roots
            if matches(root.patterns(service), interface, name)
        ]
        if not roles:
            return _Plan(denied=(self.roots[0] if self.roots else self, _lacks(service, method)))
        tests = tuple(test for grant in self._chain for test in grant._tests(service, method))
        budgets = tuple((g, g.budget) for g in self._chain if g.budget is not None)
        fences = tuple(grant for grant in self._chain if grant.terms.fence is not None)
        lanes = tuple((root, root._tests(service, method)) for root in self.roots)
        if len(lanes) == 1 or not any(some for _, some in lanes):
            lanes = ()
        alternatives = () if any(not some for some in roles) else tuple(roles)
        if not (tests or alternatives or budgets or fences or lanes):
            return _OPEN
        return _Plan(
            tests=tests,
            roles=alternatives,
            budgets=budgets,
            fences=fences,
            lanes=lanes,
            metered=any(budget.bytes is not None for _, budget in budgets),
        )

    def _tests(self, service: str, method: Method) -> tuple[_Test, ...]:
        return tuple(
            _Test(self, where, where.compile(method) if where.applies(method) else None)
            for where in self.terms.where
            if where.service in (ANY, service)
            and (where.applies(method) or not self.tree.binds(where))
        )

    def _verdict(
        self, plan: _Plan, args: Mapping[str, object]
    ) -> tuple[Grant, CapabilityError | LimitExceeded, str] | None:
        """Which grant refuses the call, with what, and in which words; None if none does.

        Nothing is spent.
        """
        if plan.denied is not None:
            grant, why = plan.denied
            return grant, Denied(why), why
        for test in plan.tests:
            if not test.allows(args):
                return test.grant, Denied(_broken(test, args)), _broken(test, args)
        if plan.roles and not any(all(t.allows(args) for t in some) for some in plan.roles):
            test = next(t for some in plan.roles for t in some if not t.allows(args))
            return test.grant, Denied(_broken(test, args)), _broken(test, args)
        for grant in plan.fences:
            if grant.terms.fence is not None:
                refused = self.tree.fences.refusal(grant.terms.fence)
                if refused is not None:
                    return grant, refused, refused.message
        nbytes = payload_bytes(args) if plan.metered else 0
        for grant, budget in plan.budgets:
            if (short := budget.refusal(1, nbytes)) is not None:
                return grant, short, short.message
        return None

    def _judge(
        self, plan: _Plan, method: Method, args: Mapping[str, object], task: asyncio.Task[Any]
    ) -> Awaitable[None] | None:
        if (refused := self._verdict(plan, args)) is not None:
            raise self._refuse(method, args, *refused)
        if plan.fences:
            holds: list[Hold] = []
            for grant in plan.fences:
                fence = grant.terms.fence
                hold = self.tree.fences.enter(fence) if fence is not None else None
                if hold is None:
                    for taken in holds:
                        taken.release()
                    return self._judge_later(plan, method, args, task)
                holds.append(hold)
            self._holds[task] = holds
        if not plan.budgets:
            return None
        nbytes = payload_bytes(args) if plan.metered else 0
        try:
            return self._pay(plan.budgets, 1, nbytes)
        except BaseException:
            self.leave(task)
            raise

    async def _judge_later(
        self, plan: _Plan, method: Method, args: Mapping[str, object], task: asyncio.Task[Any]
    ) -> None:
        """With a token that is higher than any before: what was true is asked again after it."""
        holds = self._holds.setdefault(task, [])
        for grant in plan.fences:
            if grant.terms.fence is not None:
                owner = str(self.roots[0].principal)
                holds.append(await self.tree.fences.raise_to(grant.terms.fence, owner))
        self.check_live()
        if (refused := self._verdict(plan, args)) is not None:
            raise self._refuse(method, args, *refused)
        nbytes = payload_bytes(args) if plan.metered else 0
        if (waiting := self._pay(plan.budgets, 1, nbytes)) is not None:
            await waiting

    def _pay(
        self, budgets: Sequence[tuple[Grant, Budget]], calls: int, nbytes: int
    ) -> Awaitable[None] | None:
        """Charge every budget or none; raises LimitExceeded."""
        for _, budget in budgets:
            if (short := budget.refusal(calls, nbytes)) is not None:
                raise short
        if not all(budget.covers(calls, nbytes) for _, budget in budgets):
            return self._pay_later(budgets, calls, nbytes)
        for _, budget in budgets:
            budget.take(calls, nbytes)
        return None

    async def _pay_later(
        self, budgets: Sequence[tuple[Grant, Budget]], calls: int, nbytes: int
    ) -> None:
        while True:
            for _, budget in budgets:
                if not budget.covers(calls, nbytes):
                    await budget.reserve(calls, nbytes)
            self.check_live()
            for _, budget in budgets:
                if (short := budget.refusal(calls, nbytes)) is not None:
                    raise short
            if all(budget.covers(calls, nbytes) for _, budget in budgets):
                break
        for _, budget in budgets:
            budget.take(calls, nbytes)

    def _refuse(
        self,
        method: Method,
        args: Mapping[str, object],
        grant: Grant,
        error: CapabilityError | LimitExceeded,
        why: str,
    ) -> WetwareError:
        """The error of a denial, which gets an ID and is recorded. The effect comes first."""
        decision = Decisions.new_id()
        explanation = self._explanation(method, args, grant, error, why, decision)
        self.tree.decisions.keep(explanation)
        self.tree._denied(self, method, explanation)
        command = "ww use REF why" if self.principal.backend == BEARER else "ww why"
        hint = f"`{command} {decision}` explains it"
        if error.hint:
            hint = f"{error.hint}; {hint}"
        if type(error) is Denied and error.code == Denied.code:
            message = (
                f"{method.interface.name}.{method.name}: {self.principal} was not granted it: {why}"
            )
            return Denied(message, hint=hint)
        return type(error)(
            f"{method.interface.name}.{method.name}: {why}", hint=hint, code=error.code
        )

    def explain(self, method: Method, args: Mapping[str, object]) -> Decision:
        """What would decide the call now; nothing is spent or recorded."""
        if (blocked := self.blocked) is not None:
            return self._explanation(method, args, self, blocked, blocked.message, "")
        refused = self._verdict(self._plan(method), args)
        if refused is None:
            return self._explanation(method, args, None, None, "", "")
        return self._explanation(method, args, *refused, "")

    def _explanation(
        self,
        method: Method,
        args: Mapping[str, object],
        by: Grant | None,
        error: WetwareError | None,
        why: str,
        decision: str,
    ) -> Decision:
        steps, decided = [], False
        names = frozenset(where.param for g in self.lineage for where in g.terms.where)
        for grant in self.lineage:
            if grant is by:
                verdict, detail, decided = "denies", why, True
            elif decided:
                verdict, detail = "-", grant.summary
            else:
                verdict, detail = "allows", grant.summary
            steps.append(Step(grant.id, grant.label, grant.kind, verdict, detail))
        called = f"{method.interface.name}.{method.name}"
        about = shown(args, names)
        return Decision(
            allowed=error is None,
            code=error.code if error is not None else "",
            reason=why or "every grant from the call to a role allows it",
            principal=str(self.principal),
            principals=frozenset(grant.principal for grant in self.lineage),
            grant=self.id,
            method=f"{called} {about}".strip(),
            steps=tuple(steps),
            decision=decision,
            at=self.tree.clock.time(),
        )

    # --- forms ------------------------------------------------------------------------------------

    @property
    def summary(self) -> str:
        """What its terms add, shortened; made once: many decisions refer to it."""
        if not self._summary:
            text = "; ".join(self.terms.describe()) or "as its parent"
            cut = len(text) > SUMMARY_CHARS_MAX
            self._summary = f"{text[:SUMMARY_CHARS_MAX]}…" if cut else text
        return self._summary

    def row(self) -> GrantRow:
        calls, nbytes = self.budget.reserved if self.budget is not None else (0, 0)
        return GrantRow(
            self.id,
            tuple(parent.id for parent in self.parents),
            self.kind,
            str(self.principal),
            self.label,
            self.service,
            {name: sorted(patterns) for name, patterns in sorted(self.services.items())},
            self.terms.plain(),
            self.durable,
            self.created_at,
            calls,
            nbytes,
        )

    def info(self) -> dict[str, object]:
        budget, share = self.budget, self.tree.shares.get(self.id)
        calls_left = budget.calls_left if budget is not None else None
        bytes_left = budget.bytes_left if budget is not None else None
        uses_left = share.uses_left if share is not None else None
        return {
            "id": self.id,
            "parents": [parent.id for parent in self.parents],
            "principal": str(self.principal),
            "kind": self.kind,
            "label": self.label,
            "service": self.service or "",
            "state": self.state,
            "created_ms": round(self.created_at * 1000),
            "expires_at_ms": round((self.expires_at or 0) * 1000),
            "terms": self.terms.describe(),
            "calls_left": -1 if calls_left is None else calls_left,
            "bytes_left": -1 if bytes_left is None else bytes_left,
            "uses_left": -1 if uses_left is None else uses_left,
            "redeemed": share.redeemed if share is not None else 0,
            "calls_in_flight": len(self._tasks),
            "durable": self.durable,
            "reason": self.ended.message if self.ended is not None else "",
        }


_NO_TERMS: Final = Terms()


def _lacks(service: str, method: Method) -> str:
    return f"it does not cover {service} {method.interface.name}.{method.name}"


def _broken(test: _Test, args: Mapping[str, object]) -> str:
    if not test.grant.tree.binds(test.where):
        return f"its constraint {test.where.text} is about no method of {test.where.service}"
    if test.passes is None:
        return f"its constraint {test.where.text} cannot be judged for this method"
    return f"{shown(args, frozenset({test.where.param}))} is outside of {test.where.text}"


def _budget(terms: Terms, tree: Tree, row: GrantRow | None) -> Budget | None:
    if terms.rate is None and terms.calls is None and terms.bytes is None:
        return None
    return Budget(
        terms.rate,
        terms.calls,
        terms.bytes,
        tree.clock.monotonic,
        calls_spent=row.calls_spent if row is not None else 0,
        bytes_spent=row.bytes_spent if row is not None else 0,
        fresh=row is None,
    )


def _fresh(error: WetwareError) -> WetwareError:
    """A copy to raise: one exception object raised in many tasks would collect their frames."""
    return type(error)(error.message, hint=error.hint, code=error.code)
