"""Packed values against the same values one by one: what passes, what is charged, what is refused.

A client that sends packed values sends what was not taken again, and after an error goes on behind
the value that met with it; see `replay`. Between the two no difference may be seen.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.broker.grants import Grant
from wetware.broker.terms import Terms
from wetware.broker.values import Rate
from wetware.broker.where import Where
from wetware.errors import Denied, InvalidArgument, LimitExceeded
from wetware.rpc import packed

from ..unit.broker.parts import Clock, method, root, task, tree

PUBLISH = method("Packed.publish", data="data", lengths="data", topic="text")
PUBLISH.packed = ("data", "lengths")
PUBLISH.constrainable = frozenset({"data", "topic"})

CONSTRAINTS = (
    "data=max:3", "data=max:1", "data=range:1..4", "data=range:2..2", "data=prefix:a", "data=ab",
    "data=in:a,ab,abc", "topic=chat", "topic=prefix:c", "lengths=max:0",
)  # fmt: skip
values = st.lists(st.sampled_from([b"", b"a", b"b", b"ab", b"abc", b"aaaa", b"z" * 9]), max_size=12)
terms = st.builds(
    Terms,
    where=st.lists(st.sampled_from(CONSTRAINTS), max_size=2).map(
        lambda texts: tuple(Where.parse(text, "pubsub") for text in texts)
    ),
    rate=st.none() | st.builds(Rate, st.sampled_from([1.0, 4.0]), st.sampled_from([1.0, 3.0, 7.0])),
    calls=st.none() | st.integers(1, 9),
    bytes=st.none() | st.integers(1, 60),
)


def grant(chain: list[Terms], role: list[Terms] | None = None, clock: Clock | None = None) -> Grant:
    """What was derived from a role, in several steps; every second budget is kept on a disk."""
    made = root(tree(clock or Clock()), pubsub={"*"})
    made.terms = role[0] if role else made.terms
    for number, some in enumerate(chain):
        made = made.derive(label=str(number), service="pubsub", terms=some)
        if made.budget is not None and number % 2:

            async def save(calls: int, nbytes: int) -> None:
                await asyncio.sleep(0)

            made.budget.keep(save)
    return made.derive(label="service", service="pubsub") if not chain else made


async def ask(of: Grant, data: bytes, lengths: bytes) -> tuple[bytes, bytes]:
    """What is handed on."""
    args: dict[str, Any] = {"data": data, "lengths": lengths, "topic": "chat"}
    running = task()
    waiting = of.enter(PUBLISH, args, running)
    try:
        if waiting is not None:
            await waiting
    finally:
        of.leave(running)
    return args["data"], args["lengths"]


async def one_by_one(of: Grant, some: list[bytes]) -> list[object]:
    out: list[object] = []
    for value in some:
        try:
            await ask(of, value, b"")
            out.append(value)
        except (Denied, LimitExceeded) as exc:
            out.append((type(exc), exc.code))
    return out


async def replay(of: Grant, some: list[bytes]) -> list[object]:
    out: list[object] = []
    while some:
        try:
            data, lengths = await ask(of, *packed.pack(some))
        except (Denied, LimitExceeded) as exc:
            out.append((type(exc), exc.code))
            some = some[1:]
            continue
        taken = packed.unpack(data, packed.lengths_of(len(data), lengths))
        assert taken == some[: len(taken)]
        out += taken
        some = some[len(taken) :]
    return out


@given(some=values, chain=st.lists(terms, max_size=3), role=st.lists(terms, max_size=1))
def test_values_that_are_packed_are_judged_as_one_by_one(
    some: list[bytes], chain: list[Terms], role: list[Terms]
) -> None:
    async def both() -> None:
        first, second = grant(chain, role), grant(chain, role)
        assert await replay(second, some) == await one_by_one(first, some)
        for one, other in zip(first.lineage, second.lineage, strict=True):
            if one.budget is not None and other.budget is not None:
                assert one.budget.calls.spent == other.budget.calls.spent
                assert one.budget.bytes.spent == other.budget.bytes.spent

    asyncio.run(both())


@pytest.mark.parametrize(
    ("text", "passes"), [("data=max:2", 3), ("data=prefix:a", 1), ("data=range:0..9", 5)]
)
def test_what_passes_a_constraint_is_the_beginning(text: str, passes: int) -> None:
    async def first() -> None:
        of = grant([Terms(where=(Where.parse(text, "pubsub"),))])
        some = [b"a", b"ab", b"", b"abc", b"a"]
        data, lengths = await ask(of, *packed.pack(some))
        assert packed.unpack(data, packed.lengths_of(len(data), lengths)) == some[:passes]

    asyncio.run(first())


def test_a_batch_above_the_rate_passes_in_part_and_not_again_before_its_time() -> None:
    async def rated() -> None:
        clock = Clock()
        of = grant([Terms(rate=Rate.parse("100/s"))], clock=clock)
        some = [b"x"] * 128
        assert len((await ask(of, *packed.pack(some)))[0]) == 100
        with pytest.raises(LimitExceeded, match="more than 100/s"):
            await ask(of, *packed.pack(some[100:]))
        clock.now += 0.105
        assert len((await ask(of, *packed.pack(some[100:])))[0]) == 10

    asyncio.run(rated())


@pytest.mark.parametrize(
    "lengths", [b"\1", b"\1\0\0\0" * 3, b"\2\0\0\0" * 2, b"\xff\xff\xff\xff" * 2, bytes(4 * 4097)]
)
def test_lengths_that_lie_are_refused(lengths: bytes) -> None:
    async def lie() -> None:
        of = grant([Terms(calls=5)])
        with pytest.raises(InvalidArgument) as info:
            await ask(of, b"ab", lengths)
        assert info.value.code == "invalid.packed"
        assert of.budget is not None
        assert of.budget.calls.spent == 0

    asyncio.run(lie())
