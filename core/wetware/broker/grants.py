"""Grants: what a principal may do, as nodes of a tree that only narrows.

A root is (principal, role). A session is a child of the roots of its roles, an opened service a
child of its session. A grant is at the same time the guard (`wetware.rpc.Guard`) of every servant
that is reached through it: the check runs in the servant's dispatch, and ending a grant ends its
subtree now, calls in flight included.

Source: Miller, "Robust Composition" (2006), ch. 9; membranes and revocation there, §9.4.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from wetware.errors import Amplification, CapabilityError, Denied, Expired, LimitExceeded, Revoked
from wetware.log import get_logger

if TYPE_CHECKING:
    from wetware.hookspecs import Clock
    from wetware.identity import Principal
    from wetware.rpc import Method

log = get_logger("broker")

ANY = "*"
CHILDREN_MAX = 4096
"""Derivations of one grant that may live at a time: a holder cannot fill the node's memory."""
CALLS_MAX = 4096
"""Calls in flight under one grant; connections have their own, lower limit."""


def matches(patterns: frozenset[str], interface: str, method: str) -> bool:
    """Whether "*", "Interface.*" or "Interface.method" is among the patterns."""
    return ANY in patterns or f"{interface}.*" in patterns or f"{interface}.{method}" in patterns


def pattern_within(pattern: str, patterns: frozenset[str]) -> bool:
    """Whether everything that `pattern` allows is allowed by `patterns`."""
    if ANY in patterns or pattern in patterns:
        return True
    interface, dot, _ = pattern.partition(".")
    return bool(dot) and f"{interface}.*" in patterns


class Grant:
    """One node of the tree. Make roots with the broker, children with `derive`.

    Attributes:
        id: 16 hex digits, unguessable, so that naming a grant in a log gives nothing away.
        parents: The grants that this one ends with; () for a root.
        principal: Whose it is.
        label: What it is for, e.g. "role member", "session", "service pubsub".
        services: Service name or "*" → method patterns.
        expires_at: Unix time in seconds, never later than a parent's, or None.
        ended: None while the grant lives, then the error that every call gets.
    """

    __slots__ = (
        "_allowed",
        "_callbacks",
        "_children",
        "_clock",
        "_tasks",
        "_timer",
        "ended",
        "expires_at",
        "id",
        "label",
        "parents",
        "principal",
        "service",
        "services",
    )

    def __init__(
        self,
        principal: Principal,
        services: Mapping[str, frozenset[str]],
        *,
        clock: Clock,
        label: str,
        parents: tuple[Grant, ...] = (),
        service: str | None = None,
        expires_at: float | None = None,
    ) -> None:
        self.id = secrets.token_hex(8)
        self.principal = principal
        self.label = label
        self.parents = parents
        self.service = service
        self.services = dict(services)
        self.expires_at = expires_at
        self.ended: CapabilityError | None = None
        self._clock = clock
        self._children: set[Grant] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._callbacks: dict[int, Callable[[CapabilityError], None]] = {}
        self._allowed: dict[Method, bool] = {}
        self._timer: asyncio.TimerHandle | None = None
        for parent in parents:
            parent._children.add(self)
        if expires_at is not None:
            delay = max(0.0, expires_at - clock.time())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def __repr__(self) -> str:
        return f"<Grant {self.id} {self.label} of {self.principal}>"

    # --- the tree ---------------------------------------------------------------------------------

    def derive(
        self,
        *,
        label: str,
        services: Mapping[str, Iterable[str]] | None = None,
        service: str | None = None,
        expires_at: float | None = None,
    ) -> Grant:
        """A child no stronger than this grant; it ends when this one does.

        Args:
            label: What the child is for.
            services: Narrower patterns; None keeps this grant's.
            service: Bind the child to one service: it guards that service's servants.
            expires_at: Unix time, s; capped by this grant's.

        Raises Revoked or Expired if this grant has ended, Amplification if a pattern is not within
        this grant's, LimitExceeded beyond CHILDREN_MAX living children.
        """
        self.check_live()
        if len(self._children) >= CHILDREN_MAX:
            raise LimitExceeded(f"grant {self.id} has {CHILDREN_MAX} living derivations")
        narrowed = self.services
        if services is not None:
            narrowed = {name: frozenset(patterns) for name, patterns in services.items()}
            for name, patterns in narrowed.items():
                mine = self.patterns(name)
                if excess := [p for p in sorted(patterns) if not pattern_within(p, mine)]:
                    raise Amplification(f"{name} {excess[0]!r} is more than grant {self.id} allows")
        if self.expires_at is not None:
            expires_at = min(self.expires_at, expires_at or self.expires_at)
        return Grant(
            self.principal,
            narrowed,
            clock=self._clock,
            label=label,
            parents=(self,),
            service=service,
            expires_at=expires_at,
        )

    def patterns(self, service: str) -> frozenset[str]:
        """The method patterns that this grant has for a service; empty if none."""
        return self.services.get(service, frozenset()) | self.services.get(ANY, frozenset())

    @property
    def children(self) -> frozenset[Grant]:
        """Living derivations."""
        return frozenset(self._children)

    # --- ending -----------------------------------------------------------------------------------

    def check_live(self) -> None:
        """Raise what ended the grant, if it has ended."""
        if self.ended is None and self._expired():
            self._expire()
        if self.ended is not None:
            raise _fresh(self.ended)

    def _expired(self) -> bool:
        # Judged at each use as well: a timer may be late, and the wall clock may have been set.
        return self.expires_at is not None and self._clock.time() >= self.expires_at

    def _expire(self) -> None:
        if self.ended is not None:
            return
        if self.expires_at is not None and not self._expired():
            # The loop's clock ran ahead of the wall clock: look again when it is due.
            delay = max(0.05, self.expires_at - self._clock.time())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)
            return
        self.end(Expired(f"grant {self.id} ({self.label}) expired"))

    def revoke(self, reason: str) -> None:
        """End the grant and everything derived from it, now. Idempotent."""
        self.end(
            Revoked(f"grant {self.id} ({self.label}) was revoked: {reason}", hint="log in again")
        )

    def end(self, error: CapabilityError) -> None:
        """End the subtree with `error`: mark all of it first, then cut what is under way."""
        ending = [grant for grant in self._subtree() if grant.ended is None]
        for grant in ending:  # nothing may be admitted by any of them from here on
            grant.ended = error
        for grant in ending:
            grant._cut(error)

    def _subtree(self) -> list[Grant]:
        seen: dict[Grant, None] = {}
        todo = [self]
        while todo:
            grant = todo.pop()
            if grant not in seen:
                seen[grant] = None
                todo.extend(grant._children)
        return list(seen)

    def _cut(self, error: CapabilityError) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for parent in self.parents:
            parent._children.discard(self)
        self._children.clear()
        self._allowed.clear()
        for task in tuple(self._tasks):
            task.cancel()
        callbacks, self._callbacks = list(self._callbacks.values()), {}
        for callback in callbacks:
            try:
                callback(error)
            except Exception:  # one broken listener must not keep the others alive
                log.exception("grant.callback_failed", grant=self.id)

    # --- the guard of servants (wetware.rpc.Guard) ------------------------------------------------

    def enter(self, method: Method, args: Mapping[str, object], task: asyncio.Task[object]) -> None:
        """Admit one call, or raise Denied, Revoked or Expired. `task` is cancelled at the end."""
        if self.ended is not None or self.expires_at is not None:
            self.check_live()
        allowed = self._allowed.get(method)
        if allowed is None:
            allowed = self._allowed[method] = self._allows(method)
        if not allowed:
            raise Denied(
                f"{method.interface.name}.{method.name} is not among what {self.principal} was "
                f"granted ({self.label})",
                hint="ask an operator for a role that has it; `ww whoami` shows yours",
            )
        if len(self._tasks) >= CALLS_MAX:
            raise LimitExceeded(f"{CALLS_MAX} calls are in flight under grant {self.id}")
        self._tasks.add(task)

    def leave(self, task: asyncio.Task[object]) -> None:
        """The call that `enter` admitted is over."""
        self._tasks.discard(task)

    def on_end(self, callback: Callable[[CapabilityError], None]) -> Callable[[], None]:
        """Call back once when the grant ends (at once if it has); returns a remover."""
        if self.ended is not None:
            callback(self.ended)
            return lambda: None
        token = id(callback)
        while token in self._callbacks:
            token += 1
        self._callbacks[token] = callback
        return lambda: self._callbacks.pop(token, None) and None

    def _allows(self, method: Method) -> bool:
        patterns = self.patterns(self.service) if self.service is not None else frozenset()
        return matches(patterns, method.interface.name, method.name)


def _fresh(error: CapabilityError) -> CapabilityError:
    """A copy to raise: one exception object raised in many tasks would collect their frames."""
    return type(error)(error.message, hint=error.hint, code=error.code)
