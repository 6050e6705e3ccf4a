"""The checker, on recorded histories with verdicts and on defects of our own planting."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import permutations
from math import inf
from pathlib import Path
from typing import Any

import pytest

from .linearizability import Model, Operation, Undecided, first_wrong, linearizable

VECTORS = Path(__file__).parents[4] / "shared" / "vectors" / "linearizability"
vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason=f"the vectors are not at {VECTORS}")


def register(state: Any, operation: Operation) -> Any:
    """A register with read, write and compare-and-set; the state is its value in a tuple."""
    (value,) = state
    match operation.asked:
        case ("read", _):
            return state if not operation.known or operation.answer == value else None
        case ("write", new):
            return (new,)
        case ("cas", (old, new)):
            done = value == old
            if operation.known and operation.answer != done:
                return None
            return (new,) if done else state
    raise AssertionError(operation.asked)


REGISTER = Model((None,), register)


def strings(state: str, operation: Operation) -> str | None:
    """One key that is put, appended to and read."""
    kind, _, value = operation.asked
    if kind == "get":
        return state if operation.answer == state else None
    return value if kind == "put" else state + value


def jepsen(path: Path) -> Iterator[Operation]:
    """A log of etcd under Jepsen."""
    pending: dict[str, tuple[int, Any]] = {}
    lines = [
        match.groups()
        for line in path.read_text().splitlines()
        if (match := re.match(r"INFO\s+jepsen\.util - (\d+)\s+:(\w+)\s+:(\w+)\s+(.*)$", line))
    ]
    for time, (process, kind, name, shown) in enumerate(lines):
        if kind == "invoke":
            pending[process] = (time, (name, _value(shown)))
            continue
        called, asked = pending.pop(process)
        if kind == "info":
            yield Operation(called, inf, asked)
        elif kind == "ok":
            yield Operation(called, time, asked, _value(shown) if name == "read" else True)
        elif name == "cas":
            yield Operation(called, time, asked, False)
        else:  # a read that timed out said nothing
            assert (name, shown) == ("read", ":timed-out")
    yield from (Operation(called, inf, asked) for called, asked in pending.values())


def _value(shown: str) -> Any:
    if pair := re.fullmatch(r"\[(\d+) (\d+)\]", shown):
        return tuple(map(int, pair.groups()))
    return int(shown) if shown.isdigit() else None


def porcupine(path: Path) -> Iterator[Operation]:
    """A log of the key-value store."""
    pending: dict[str, tuple[int, tuple[str, str, str]]] = {}
    for time, line in enumerate(path.read_text().splitlines()):
        match = re.fullmatch(
            r'\{:process (\d+), :type :(\w+), :f :(\w+), :key "(.*?)", :value (nil|"(.*)")\}', line
        )
        assert match is not None, line
        process, kind, name, key, _, value = match.groups()
        if kind == "invoke":
            pending[process] = (time, (name, key, value or ""))
        else:
            called, asked = pending.pop(process)
            yield Operation(called, time, asked, value)


@vectors
def test_recorded_histories_of_etcd_get_their_verdicts() -> None:
    verdicts = json.loads((VECTORS / "verdicts.json").read_text())
    logs = sorted(VECTORS.glob("etcd_*.log"))
    assert len(logs) > 50
    found = {log.name: linearizable(REGISTER, jepsen(log)) for log in logs}
    assert found == {name: verdicts[name] for name in found}
    assert set(found.values()) == {True, False}


@vectors
@pytest.mark.parametrize("name", ["c01-ok", "c01-bad", "c10-ok", "c10-bad"])
def test_recorded_histories_of_keys_get_their_verdicts(name: str) -> None:
    history = list(porcupine(VECTORS / f"kv-{name}.txt"))
    assert len(history) > 30
    wrong = first_wrong(Model("", strings), history, lambda operation: [operation.asked[1]])
    assert (wrong is None) == name.endswith("ok")


def test_the_verdict_is_that_of_trying_every_order() -> None:
    """Small random histories, three clients at once, a third of the answers lost."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    verdicts = set()
    for _ in range(400):
        history = [_random(rng) for _ in range(rng.randint(1, 6))]
        verdict = linearizable(REGISTER, history)
        verdicts.add(verdict)
        assert verdict == _by_force(history), f"seed {seed}: {history}"
    assert verdicts == {True, False}


def _random(rng: random.Random) -> Operation:
    called = rng.randrange(12)
    returned = rng.choice([called + rng.randint(1, 6), called + rng.randint(1, 6), inf])
    match rng.choice(["read", "write", "cas"]):
        case "read":
            return Operation(called, returned, ("read", None), rng.choice([None, 1, 2]))
        case "write":
            return Operation(called, returned, ("write", rng.choice([1, 2])), True)
        case _:
            pair = (rng.choice([1, 2]), rng.choice([1, 2]))
            return Operation(called, returned, ("cas", pair), rng.choice([True, False]))


def _by_force(history: list[Operation]) -> bool:
    known = [operation for operation in history if operation.known]
    lost = [operation for operation in history if not operation.known]
    for count in range(len(lost) + 1):
        for some in permutations(lost, count):
            for order in permutations([*known, *some]):
                if any(b.returned < a.called for i, a in enumerate(order) for b in order[i + 1 :]):
                    continue
                state: Any = REGISTER.initial
                for operation in order:
                    if (state := register(state, operation)) is None:
                        break
                else:
                    return True
    return False


def test_a_lost_write_may_have_happened_or_not() -> None:
    lost = Operation(0, inf, ("write", 1))
    assert linearizable(REGISTER, [lost, Operation(1, 2, ("read", None), 1)])
    assert linearizable(REGISTER, [lost, Operation(1, 2, ("read", None), None)])
    seen_then_gone = [Operation(1, 2, ("read", None), 1), Operation(3, 4, ("read", None), None)]
    assert not linearizable(REGISTER, [lost, *seen_then_gone])


def test_a_stale_read_after_a_write_is_found() -> None:
    write, read = Operation(0, 1, ("write", 1), True), Operation(2, 3, ("read", None), None)
    assert not linearizable(REGISTER, [write, read])


def test_what_is_not_decided_is_no_verdict() -> None:
    writes = [Operation(0, 100, ("write", number), True) for number in range(12)]
    with pytest.raises(Undecided):
        linearizable(REGISTER, [*writes, Operation(101, 102, ("read", None), 99)], steps_max=1000)


def test_keys_that_one_operation_names_are_searched_together() -> None:
    """A transaction over two keys, half of which is seen, is wrong in neither key alone."""

    def pair(state: Any, operation: Operation) -> Any:
        values = dict(state)
        match operation.asked:
            case ("put", keys):
                return tuple(sorted({**values, **dict.fromkeys(keys, 1)}.items()))
            case ("get", (key,)):
                return state if values.get(key) == operation.answer else None
        raise AssertionError

    history = [
        Operation(0, 9, ("put", ("a", "b")), True),
        Operation(1, 2, ("get", ("a",)), 1),
        Operation(3, 4, ("get", ("b",)), None),
    ]
    assert first_wrong(Model((), pair), history, lambda operation: operation.asked[1]) == history
