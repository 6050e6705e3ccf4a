"""A checker of histories: is there an order of the operations that the model of the object allows?

Each operation takes effect at one moment between its call and its return; one whose answer was lost
may take effect at any moment after its call, or never.

Source: Wing & Gong (1993) with the memory of Lowe, "Testing for linearizability" (2017), as it is
in Porcupine (Athalye, 2017); partitioning by key is Herlihy & Wing's locality.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final, NamedTuple

STEPS_MAX: Final = 5_000_000
"""Of one search. Beyond it nothing is known, and that is an error, not a verdict."""


class Undecided(Exception):
    """The search was given up: the history is neither right nor wrong, as far as is known."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a client.

    Attributes:
        called: When it was sent, by a clock that all clients share.
        returned: When its answer came; `inf` where none did.
        asked: What was asked.
        answer: What was answered; not looked at where `returned` is `inf`.
    """

    called: float
    returned: float
    asked: Any
    answer: Any = None

    @property
    def known(self) -> bool:
        return self.returned != inf


class Model(NamedTuple):
    """An object that one client at a time calls.

    `step(state, operation)` is the state after it, or None where an answer that is known is another
    than the object in that state would give. No state is None.
    """

    initial: Hashable
    step: Callable[[Any, Operation], Hashable | None]


def linearizable(model: Model, history: Iterable[Operation], *, steps_max: int = STEPS_MAX) -> bool:
    """Whether the operations have such an order; raises Undecided after `steps_max` steps.

    Exponential in the operations that go on at once, linear in those one after another.
    """
    operations = sorted(history, key=lambda operation: operation.called)
    entries = _entries(operations)
    end = len(entries)  # of a ring of what is still to be placed, and where it begins
    after = [*range(1, end + 1), 0]
    before = [end, *range(end)]
    state, placed = model.initial, 0
    seen = {(placed, state)}
    taken: list[tuple[int, Hashable]] = []

    def leave_out(at: int) -> None:
        after[before[at]], before[after[at]] = after[at], before[at]

    def put_back(at: int) -> None:
        after[before[at]] = before[after[at]] = at

    place = after[end]
    for _ in range(steps_max):
        if place == end:  # whoever got an answer is placed
            return True
        number, is_call, its_return = entries[place]
        if is_call:
            following = model.step(state, operations[number])
            with_it = placed | 1 << number
            if following is not None and (with_it, following) not in seen:
                seen.add((with_it, following))
                taken.append((place, state))
                state, placed = following, with_it
                leave_out(place)
                if its_return < end:
                    leave_out(its_return)
                place = after[end]
            else:
                place = after[place]
        elif not taken:
            return False
        else:  # it returned, and is not placed: take the last one back, and try what is behind that
            place, state = taken.pop()
            number, _, its_return = entries[place]
            placed ^= 1 << number
            if its_return < end:
                put_back(its_return)
            put_back(place)
            place = after[place]
    raise Undecided(f"{len(operations)} operations, after {steps_max} steps")


def _entries(operations: Sequence[Operation]) -> list[tuple[int, bool, int]]:
    """Calls and returns in their order: (operation, is a call, place of its return).

    A call that has no return has one behind the end. Calls go before returns of the same moment.
    """
    events = sorted(
        [(operation.called, 0, number) for number, operation in enumerate(operations)]
        + [
            (operation.returned, 1, number)
            for number, operation in enumerate(operations)
            if operation.known
        ]
    )
    returns = {number: place for place, (_, kind, number) in enumerate(events) if kind}
    return [(number, not kind, returns.get(number, len(events))) for _, kind, number in events]


def first_wrong(
    model: Model,
    history: Iterable[Operation],
    keys_of: Callable[[Operation], Iterable[Hashable]],
    **bounds: int,
) -> list[Operation] | None:
    """The operations of the first group of keys that have no such order; None where all have one.

    Keys that one operation names belong together, and so on; each group is searched by itself.
    """
    group: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while (above := group.setdefault(key, key)) != key:
            key = above
        return key

    operations = list(history)
    for operation in operations:
        first, *others = keys_of(operation)
        for key in others:
            group[root(key)] = root(first)
    groups: dict[Hashable, list[Operation]] = {}
    for operation in operations:
        groups.setdefault(root(next(iter(keys_of(operation)))), []).append(operation)
    return next((each for each in groups.values() if not linearizable(model, each, **bounds)), None)
