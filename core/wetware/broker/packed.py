"""A call with several packed values, as a grant judges it: as one call for each value."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from wetware.rpc.packed import LENGTH_BYTES, lengths_of
from wetware.rpc.values import payload_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wetware.broker.plan import Plan
    from wetware.rpc import Method

_BY_LENGTH = ("max", "range")
"""Kinds of constraints that look at nothing but the length of a value."""


class Several:
    """The packed values of a call. `args` are the call's: cut to what passes.

    Raises InvalidArgument where the lengths are not those of the values.
    """

    def __init__(self, params: tuple[str, str], args: dict[str, Any]) -> None:
        self._args, (self._values, self._lengths) = args, params
        self.lengths: Sequence[int] = lengths_of(len(args[self._values]), args[self._lengths])

    @classmethod
    def of(cls, method: Method, args: dict[str, Any]) -> Several | None:
        """None where the call has one value, and is judged as it is."""
        if method.packed is None or not args[method.packed[1]]:
            return None
        return cls(method.packed, args)

    def one(self, index: int) -> Mapping[str, object]:
        """The arguments of a call with this value alone."""
        start = sum(self.lengths[:index])
        return self._with(self._args[self._values][start : start + self.lengths[index]])

    def passing(self, plan: Plan[Any]) -> int:
        """How many of the values pass the constraints, of which the first one does.

        Of equal length are equal before a constraint on the length. Where one looks at the content,
        there is one value at a time: no work of its size is done here for each of many.
        """
        tests = (*plan.tests, *(test for some in plan.roles for test in some))
        about = [test.where for test in tests if test.where.param == self._values]
        if any(where.kind not in _BY_LENGTH for where in about):
            return 1
        data = self._args[self._values]
        sizes = set(self.lengths) if about else ()
        bad = {size for size in sizes if plan.broken(self._with(data[:size])) is not None}
        if not bad:
            return len(self.lengths)
        return next(index for index, size in enumerate(self.lengths) if size in bad)

    def charged_bytes(self, plan: Plan[Any]) -> Sequence[int]:
        """What the first value is charged, the first two, and so on."""
        if not plan.metered:
            return [0] * len(self.lengths)
        beside = payload_bytes(self._with(b""))
        return [
            total + beside * count for count, total in enumerate(accumulate(self.lengths), start=1)
        ]

    def keep(self, count: int) -> None:
        """Cut the call to its first values."""
        if count == len(self.lengths):
            return
        self.lengths = self.lengths[:count]
        self._args[self._values] = self._args[self._values][: sum(self.lengths)]
        self._args[self._lengths] = self._args[self._lengths][: count * LENGTH_BYTES]

    def _with(self, value: bytes) -> Mapping[str, object]:
        return {**self._args, self._values: value, self._lengths: b""}
