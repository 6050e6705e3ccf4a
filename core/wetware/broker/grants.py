"""Grants: what a principal may do, as nodes of a tree that only narrows.

A root is (principal, role). A login's session is a child of the roots of its roles; what is opened,
attenuated or shared hangs below it. A grant is at the same time the guard (`wetware.rpc.Guard`) of
every servant that is reached through it: the check runs in the servant's dispatch, and ending a
grant ends its subtree now, calls in flight included.

A call is allowed if the grant and all its ancestors allow it; of the roles of a session one is
enough. Where nothing but methods is to be checked, a call costs a lookup; what else there is
(constraints, budgets, fences) is compiled once for each grant and method.

A reference that a service passes on is held to all of that but the methods, where its interface is
none that the service's own leads to: a role of the service cannot name them, and the guard of the
object itself, where that is served, judges each call.

Two ways to end: `revoke` ends the subtree; `close` is how a session ends by itself, and leaves what
was made to outlive it (`durable`), whose ancestor it stays.

Source: Miller, "Robust Composition" (2006), ch. 9; membranes and revocation there, §9.4.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from wetware.base.log import get_logger
from wetware.broker.budgets import Budget, pay, pay_some
from wetware.broker.decisions import DECISIONS_MAX, new_id, shown
from wetware.broker.methods import ANY, all_methods, matches, pattern_within
from wetware.broker.naming import binds
from wetware.broker.packed import Several
from wetware.broker.plan import Args, Plan, Refusal, Test
from wetware.broker.protocol import CORE
from wetware.broker.store import GrantRow
from wetware.broker.terms import Terms
from wetware.broker.told import Explanation, GrantInfo, Step
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
from wetware.rpc.wire import fresh

if TYPE_CHECKING:
    from wetware.broker.clock import SteadyClock
    from wetware.broker.fences import Fences, Hold
    from wetware.broker.limits import BrokerLimits
    from wetware.broker.ports import Service
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
_HELD: Final = frozenset({"service", "attenuated", "redeemed"})
"""Kinds of grants that are over when nobody holds them."""
_NO_TERMS: Final = Terms()
_OPEN: Final[Plan[Grant]] = Plan()


class Grants:
    """The grants of a node by ID, and what all of them are judged by.

    Attributes:
        shares: What the shares among the grants have beside.
        decisions: The latest denials, with the principals of the grants that they went through.
        on_denied: Told of every denial, after its effect.
        services: What sessions can open here, by name.
        suspended: Auth backend → why nothing of its users works for now: it cannot tell who has
            which role.
        shares_suspended: Why nothing that comes from a share works: one that ended may be back.
        clock_wrong: Why expiry cannot be judged, or "".
    """

    def __init__(self, clock: SteadyClock, limits: BrokerLimits, fences: Fences) -> None:
        self.clock, self.limits, self.fences = clock, limits, fences
        self.grants: dict[str, Grant] = {}
        self.shares: dict[str, Share] = {}
        self.decisions = deque[tuple[Explanation, frozenset["Principal"]]](maxlen=DECISIONS_MAX)
        self.on_denied: Callable[[Grant, Method, Explanation], None] = lambda *_: None
        self.services: Mapping[str, Service] = {}
        self.suspended: dict[str, CapabilityError] = {}
        self.shares_suspended: CapabilityError | None = None
        self.clock_wrong = ""

    def binds(self, where: Where) -> bool:
        """Whether a constraint is about any method of its service, or of any service here.

        One that is about none denies all of it: misspelt in a document written on a machine that
        does not have the service, or about a parameter that a release of the service renamed.
        """
        names = self.services if where.service == ANY else (where.service,)
        found = [self.services[name].interface for name in names if name in self.services]
        return not found or any(binds(where, interface) for interface in found)

    def leads_to(self, service: str, method: Method) -> bool:
        """Whether a role can name the method for the service; of one that is not here, as if so."""
        found = self.services.get(service)
        return found is None or any(
            method.interface == other.interface for other in all_methods(found.interface)
        )

    def gone(self, grants: Sequence[Grant], error: WetwareError | None) -> None:
        """Grants have left the tree, and what ended them."""


@dataclass(slots=True)
class Share:
    """What a durable share has beside its grant.

    Attributes:
        grant: Its node in the tree.
        secret_hash: SHA-256 of the secret.
        uses: How often it may be redeemed in all; None: no limit.
        redeemed: How often it was.
    """

    grant: Grant
    secret_hash: bytes = field(repr=False)
    uses: int | None
    redeemed: int = 0

    @property
    def uses_left(self) -> int | None:
        return None if self.uses is None else max(0, self.uses - self.redeemed)


class Grant:
    """One node of the tree. Roots and sessions are made by the `Tree`, the rest with `derive`.

    Attributes:
        id: 16 hex digits, unguessable, so that naming a grant in a log gives nothing away.
        parents: The grants that this one ends with; () for a root.
        principal: Whose it is.
        kind: "role", "session", "service", "attenuated", "share", "redeemed" or "derived".
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

    def __init__(
        self,
        tree: Grants,
        principal: Principal,
        *,
        kind: str,
        label: str,
        services: Mapping[str, frozenset[str]],
        parents: tuple[Grant, ...] = (),
        service: str | None = None,
        terms: Terms | None = None,
        durable: bool = False,
        row: GrantRow | None = None,
    ) -> None:
        self.tree = tree
        self.id = row.id if row is not None else secrets.token_hex(8)
        self.principal, self.kind, self.label = principal, kind, label
        self.parents, self.service, self.services = parents, service, services
        self.terms = terms or _NO_TERMS
        self.durable = durable
        self.created_at = row.created_at if row is not None else tree.clock.time()
        self.expires_at = end_of(self.terms, parents)
        self.ended: WetwareError | None = None
        self._children: set[Grant] = set()
        self._calls: dict[asyncio.Task[Any], Sequence[Hold]] = {}  # with their fencing tokens
        self._callbacks: dict[object, tuple[Callable[[WetwareError], None], bool]] = {}
        self._exports = self._lent = 0
        # Of own objects, and of references that are passed on.
        self._plans: tuple[dict[Method, Plan[Grant]], dict[Method, Plan[Grant]]] = {}, {}
        self._lane: tuple[Grant, ...] = parents[0]._lane if len(parents) == 1 else ()
        self._lanes: dict[tuple[Grant, ...], Grant] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.budget = self._budget(row)
        self._of_earlier_share: bool = (durable and row is not None) or any(
            parent._of_earlier_share for parent in parents
        )  # one that was made before the node started
        # Of whoever it comes from: who redeems a share is a bearer, and of no backend.
        self._backend: str = parents[0]._backend if parents else principal.backend
        # From here to the top, roles left out: a session is the only one with several parents.
        above = parents[0]._chain if len(parents) == 1 else ()
        self._chain: tuple[Grant, ...] = () if kind == "role" else (self, *above)
        self.metered = any(budget.metered for budget in self._budgets())
        for parent in parents:
            parent._children.add(self)
        tree.grants[self.id] = self
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
        """A child no stronger than this grant, of the same principal; it ends when this one does.

        With a `service` it guards that service's servants; see the class for the rest.

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
    def payer(self) -> str:
        """See `rpc.Guard`."""
        return str((self.roots[0] if self.roots else self).principal)

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
        return len(self._calls)

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
            raise fresh(error)

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
        suspended = tree.suspended and tree.suspended.get(self._backend)
        return suspended or (tree.shares_suspended if self._of_earlier_share else None)

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
        self.tree.gone(found, error)
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
        self.tree.gone((self,), self.ended)
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
        if self._exports or self._lent or self._calls:
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
        for plans in self._plans:
            plans.clear()
        self._lanes.clear()
        for task in tuple(self._calls):
            task.cancel()
        callbacks, self._callbacks = list(self._callbacks.values()), {}
        for callback, _ in callbacks:
            try:
                callback(error)
            except Exception:  # one broken listener must not keep the others alive
                log.exception("grant.callback_failed", grant=self.id)

    # --- the guard of servants (wetware.rpc.Guard) ------------------------------------------------

    def enter(
        self, method: Method, args: dict[str, object], task: asyncio.Task[Any], passed: bool = False
    ) -> Awaitable[None] | None:
        """Admit one call, or raise Denied, Revoked, Expired or LimitExceeded.

        Packed values are judged and charged as a call each: `args` is cut to the first ones that
        may pass.
        `task` is cancelled when the grant ends. What is returned has to be awaited before the call
        runs: a write of the quota, or the calls under an older fencing token.
        """
        tree = self.tree
        if (
            self.ended is not None
            or self.expires_at is not None
            or tree.suspended
            or tree.shares_suspended is not None
        ):
            self.check_live()
        plans = self._plans[passed]
        plan = plans.get(method)
        if plan is None:
            plan = plans[method] = self._plan(method, passed=passed)
        if len(self._calls) >= CALLS_MAX:
            raise LimitExceeded(f"{CALLS_MAX} calls are in flight under grant {self.id}")
        waiting = None if plan is _OPEN else self._judge(plan, method, args, task)
        self._calls.setdefault(task, ())
        return waiting

    def onward(self, method: Method, args: Args, passed: bool = False) -> Grant:
        """The guard of what the call returns.

        Of several roles, those whose constraints the call breaks are left out of it: what was
        reached by the leave of another role is not theirs to act on. Raises LimitExceeded.
        """
        plan = self._plans[passed].get(method, _OPEN)
        if not plan.lanes or self.ended is not None or method.packed is not None:
            return self
        lane = plan.lane(args)
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
        for hold in self._calls.pop(task, ()):
            hold.release()
        if not self._exports and not self._calls and self.kind in _HELD:
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
        token = object()
        self._callbacks[token] = (callback, holds)

        def remove() -> None:
            if self._callbacks.pop(token, None) is not None and not self._exports:
                self.let_go()

        return remove

    def charge(self, method: Method, nbytes: int) -> Awaitable[None] | None:
        """Charge bytes of results and of calls on callbacks; raises LimitExceeded."""
        if not self.metered or method.interface == CORE.Session:
            return None
        budgets = [budget for budget in self._budgets() if budget.metered]
        return pay(budgets, 0, nbytes, self.check_live)

    # --- the decision -----------------------------------------------------------------------------

    def _plan(self, method: Method, *, passed: bool = False) -> Plan[Grant]:
        """What has to be checked for a method."""
        service = self.service
        if service is None:
            return Plan(denied=(self, "it is bound to no service"))
        interface, name = method.interface.name, method.name
        lacks = f"it does not cover {service} {interface}.{name}"
        unnamed = passed and not self.tree.leads_to(service, method)

        def covers(grant: Grant) -> bool:
            patterns = grant.patterns(service)
            return bool(patterns) if unnamed else matches(patterns, interface, name)

        for grant in self._chain:
            if not covers(grant):
                narrowed = grant.kind == "service" and grant.terms.services is not None
                return Plan(denied=(grant, f"{lacks} ({grant.label})" if narrowed else lacks))
        if service == SESSION_SERVICE:
            return _OPEN
        lanes = tuple((root, root._tests(service, method)) for root in self.roots)
        roles = tuple(tests for root, tests in lanes if covers(root))
        tests = tuple(test for grant in self._chain for test in grant._tests(service, method))
        if unnamed:  # which role gave it away is not known: all of them have to allow it
            tests += tuple(test for some in roles for test in some)
        if not roles:
            return Plan(denied=(self.roots[0] if self.roots else self, lacks))
        plan = Plan(
            tests=tests,
            roles=roles if all(roles) and not unnamed else (),
            budgets=self._budgets(),
            metered=self.metered,
            fences=tuple(
                (grant, fence) for grant in self._chain if (fence := grant.terms.fence) is not None
            ),
            lanes=lanes if len(lanes) > 1 and any(tests for _, tests in lanes) else (),
        )
        return _OPEN if plan == _OPEN else plan

    def _budgets(self) -> dict[Budget, Grant]:
        return {grant.budget: grant for grant in self._chain if grant.budget is not None}

    def _tests(self, service: str, method: Method) -> tuple[Test[Grant], ...]:
        tests = []
        for where in self.terms.where:
            if where.service not in (ANY, service):
                continue
            if where.applies(method):
                passes = where.compile(method)
                tests.append(Test(self, where, passes, "cannot be judged for this method"))
            elif not self.tree.binds(where):
                tests.append(Test(self, where, None, f"is about no method of {where.service}"))
        return tuple(tests)

    def _judge(
        self, plan: Plan[Grant], method: Method, args: dict[str, object], task: asyncio.Task[Any]
    ) -> Awaitable[None] | None:
        """Admit the call by a plan; see `enter`."""
        several = Several.of(method, args)
        one = args if several is None else several.one(0)
        if (refused := plan.refusal(one, self.tree.fences.refusal)) is not None:
            raise self._refuse(method, one, *refused)
        if plan.fences:
            holds: list[Hold] = []
            for _, fence in plan.fences:
                hold = self.tree.fences.enter(fence)
                if hold is None:
                    for taken in holds:
                        taken.release()
                    return self._judge_later(plan, method, args, task)
                holds.append(hold)
            self._calls[task] = holds
        if several is not None:
            several.keep(several.passing(plan))
        if not plan.budgets:
            return None
        try:
            if several is not None:
                totals = several.charged_bytes(plan)
                return pay_some(plan.budgets, totals, self.check_live, several.keep)
            return pay(plan.budgets, 1, plan.charged_bytes(args), self.check_live)
        except BaseException:
            self.leave(task)
            raise

    async def _judge_later(
        self, plan: Plan[Grant], method: Method, args: dict[str, object], task: asyncio.Task[Any]
    ) -> None:
        """With a token that is higher than any before: what was true is asked again after it."""
        for _, fence in plan.fences:
            await self.tree.fences.raise_to(fence, str(self.roots[0].principal))
        self.check_live()
        if (waiting := self._judge(plan, method, args, task)) is not None:
            await waiting

    def _refuse(self, method: Method, args: Args, by: Grant, error: Refusal) -> WetwareError:
        """The error of a denial, which gets an ID and is recorded. The effect comes first."""
        decision = new_id()
        explanation = self._explanation(method, args, by, error, decision)
        self.tree.decisions.append((explanation, frozenset(g.principal for g in self.lineage)))
        self.tree.on_denied(self, method, explanation)
        command = "ww use REF why" if self.principal.backend == BEARER else "ww why"
        hint = f"`{command} {decision}` explains it"
        if error.hint:
            hint = f"{error.hint}; {hint}"
        called, why = f"{method.interface.name}.{method.name}", error.message
        if type(error) is Denied and error.code == Denied.code:
            why = f"{self.principal} was not granted it: {why}"
        return type(error)(f"{called}: {why}", hint=hint, code=error.code)

    def explain(self, method: Method, args: Args) -> Explanation:
        """What would decide the call now; nothing is spent or recorded."""
        if (blocked := self.blocked) is not None:
            return self._explanation(method, args, self, blocked)
        refused = self._plan(method).refusal(args, self.tree.fences.refusal)
        return self._explanation(method, args, *(refused or (None, None)))

    def _explanation(
        self,
        method: Method,
        args: Args,
        by: Grant | None,
        error: WetwareError | None,
        decision: str = "",
    ) -> Explanation:
        steps, decided = [], False
        for grant in self.lineage:
            verdict, detail = "-" if decided else "allows", grant.summary
            if grant is by and error is not None:
                verdict, detail, decided = "denies", error.message, True
            steps.append(Step(grant.id, grant.label, grant.kind, verdict, detail))
        about = shown(args, frozenset(w.param for g in self.lineage for w in g.terms.where))
        return Explanation(
            allowed=error is None,
            code=error.code if error is not None else "",
            reason=error.message if error else "every grant from the call to a role allows it",
            principal=str(self.principal),
            grant=self.id,
            method=f"{method.interface.name}.{method.name} {about}".strip(),
            steps=tuple(steps),
            decision=decision,
            at=self.tree.clock.time(),
        )

    # --- forms ------------------------------------------------------------------------------------

    @functools.cached_property
    def summary(self) -> str:
        """What its terms add, shortened; made once: many decisions refer to it."""
        text = "; ".join(self.terms.describe()) or "as its parent"
        return f"{text[:SUMMARY_CHARS_MAX]}…" if len(text) > SUMMARY_CHARS_MAX else text

    @property
    def role(self) -> str:
        """Of a role's grant: its name."""
        return self.label.removeprefix("role ")

    def row(self) -> GrantRow:
        """As it is kept."""
        budget = self.budget
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
            budget.calls.reserved if budget is not None else 0,
            budget.bytes.reserved if budget is not None else 0,
        )

    def info(self) -> GrantInfo:
        """As it is shown."""
        budget, share = self.budget, self.tree.shares.get(self.id)
        return GrantInfo(
            id=self.id,
            parents=tuple(parent.id for parent in self.parents),
            principal=str(self.principal),
            kind=self.kind,
            label=self.label,
            service=self.service or "",
            state=self.state,
            created=self.created_at,
            expires_at=self.expires_at,
            terms=tuple(self.terms.describe()),
            calls_left=budget.calls.left if budget is not None else None,
            bytes_left=budget.bytes.left if budget is not None else None,
            uses_left=share.uses_left if share is not None else None,
            redeemed=share.redeemed if share is not None else 0,
            calls_in_flight=len(self._calls),
            durable=self.durable,
            reason=self.ended.message if self.ended is not None else "",
        )

    def _budget(self, row: GrantRow | None) -> Budget | None:
        terms = self.terms
        if terms.rate is None and terms.calls is None and terms.bytes is None:
            return None
        return Budget(
            terms.rate,
            terms.calls,
            terms.bytes,
            self.tree.clock.monotonic,
            spent=None if row is None else (row.calls_spent, row.bytes_spent),
        )


def end_of(terms: Terms, parents: Sequence[Grant]) -> float | None:
    """When a grant ends by itself, Unix s: never later than its parents."""
    ends = (terms.expires_at, *(parent.expires_at for parent in parents))
    return min((end for end in ends if end is not None), default=None)
