"""What the calls of one method have to pass, compiled once for a grant: tests, fences, budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from wetware.broker.decisions import shown
from wetware.errors import CapabilityError, Denied, LimitExceeded
from wetware.rpc.values import payload_bytes

if TYPE_CHECKING:
    from wetware.broker.budgets import Budget
    from wetware.broker.fences import Fence
    from wetware.broker.where import Passes, Where

G = TypeVar("G")
"""A grant; a plan says which one refuses, and does not look into it."""
Refusal: TypeAlias = CapabilityError | LimitExceeded
Args: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Test(Generic[G]):
    """A constraint of a grant.

    Attributes:
        grant: Whose it is.
        where: The constraint.
        passes: The test; None where it cannot be judged, which is a denial.
        unjudged: Why it cannot.
    """

    grant: G
    where: Where
    passes: Passes | None
    unjudged: str = ""

    def allows(self, args: Args) -> bool:
        return self.passes is not None and self.passes(args)

    def denied(self, args: Args) -> Denied:
        if self.passes is None:
            return Denied(f"its constraint {self.where.text} {self.unjudged}")
        return Denied(
            f"{shown(args, frozenset({self.where.param}))} is outside of {self.where.text}"
        )


@dataclass(frozen=True, slots=True)
class Plan(Generic[G]):
    """What has to be checked for a method; empty: nothing.

    Attributes:
        denied: No grant covers the method: which one says so, and why.
        tests: Constraints that all have to pass.
        roles: The constraints of each role that covers the method: one role's have to pass; ()
            where a role has none.
        budgets: To be charged, with their grants.
        fences: Tokens, each with its grant.
        lanes: Of several roles, each with its constraints on the method, covered by it or not: who
            breaks one is no role of what the call returns. () where there are none.
        metered: A quota of bytes is among the budgets.
    """

    denied: tuple[G, str] | None = None
    tests: tuple[Test[G], ...] = ()
    roles: tuple[tuple[Test[G], ...], ...] = ()
    budgets: Mapping[Budget, G] = field(default_factory=dict)
    fences: tuple[tuple[G, Fence], ...] = ()
    lanes: tuple[tuple[G, tuple[Test[G], ...]], ...] = ()
    metered: bool = False

    def charged_bytes(self, args: Args) -> int:
        """What the arguments count in quotas of bytes; 0 if there are none."""
        return payload_bytes(args) if self.metered else 0

    def refusal(
        self, args: Args, fenced: Callable[[Fence], Denied | None]
    ) -> tuple[G, Refusal] | None:
        """Which grant refuses the call, and with what; None if none does. Nothing is spent.

        Args:
            args: Of the call.
            fenced: Whether a token has been overtaken.
        """
        if self.denied is not None:
            grant, why = self.denied
            return grant, Denied(why)
        if (broken := self.broken(args)) is not None:
            return broken.grant, broken.denied(args)
        for grant, fence in self.fences:
            if (refused := fenced(fence)) is not None:
                return grant, refused
        nbytes = self.charged_bytes(args)
        for budget, grant in self.budgets.items():
            if (short := budget.refusal(1, nbytes)) is not None:
                return grant, short
        return None

    def broken(self, args: Args) -> Test[G] | None:
        """A constraint that the arguments do not pass; None if they pass."""
        for test in self.tests:
            if not test.allows(args):
                return test
        if self.roles and not any(all(t.allows(args) for t in some) for some in self.roles):
            return next(t for some in self.roles for t in some if not t.allows(args))
        return None

    def lane(self, args: Args) -> tuple[G, ...]:
        """The roles that what the call returns may come from."""
        return tuple(root for root, tests in self.lanes if all(t.allows(args) for t in tests))
