"""Grants: they only narrow, and end with everything that hangs on them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.broker.grants import CHILDREN_MAX, Grant, matches, pattern_within
from wetware.errors import Amplification, Denied, Expired, LimitExceeded, Revoked
from wetware.identity import Principal

pytestmark = pytest.mark.anyio
ADA = Principal("local", "ada")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class Method(SimpleNamespace):
    __hash__ = object.__hash__


def method(name: str) -> Any:
    interface, _, short = name.partition(".")
    return Method(name=short, interface=SimpleNamespace(name=interface))


def root(clock: Clock | None = None, **services: set[str]) -> Grant:
    return Grant(
        ADA,
        {name: frozenset(patterns) for name, patterns in services.items()},
        clock=clock or Clock(),
        label="role",
    )


def task() -> Any:
    return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        ({"*"}, "A.b", True),
        ({"A.*"}, "A.b", True),
        ({"A.b"}, "A.b", True),
        ({"A.b"}, "A.c", False),
        ({"A.*"}, "B.b", False),
        ({"A"}, "A.b", False),
        (set(), "A.b", False),
    ],
)
def test_matches(patterns: set[str], name: str, expected: bool) -> None:
    interface, _, short = name.partition(".")
    assert matches(frozenset(patterns), interface, short) is expected


_PATTERN = st.sampled_from(["*", "A.*", "B.*", "A.x", "A.y", "B.x"])


@given(st.sets(_PATTERN), st.sets(_PATTERN))
def test_within_never_allows_more(narrow: set[str], wide: set[str]) -> None:
    if all(pattern_within(p, frozenset(wide)) for p in narrow):
        for interface in "AB":
            for name in "xy":
                if matches(frozenset(narrow), interface, name):
                    assert matches(frozenset(wide), interface, name)


async def test_a_service_grant_allows_what_its_patterns_say() -> None:
    grant = root(pubsub={"Topic.*"}).derive(label="s", service="pubsub")
    grant.enter(method("Topic.publish"), {}, task())
    with pytest.raises(Denied, match=r"PubSub\.join"):
        grant.enter(method("PubSub.join"), {}, task())


async def test_a_grant_without_a_service_guards_nothing() -> None:
    with pytest.raises(Denied):
        root(pubsub={"*"}).enter(method("Topic.publish"), {}, task())


async def test_amplification_is_refused() -> None:
    parent = root(pubsub={"Topic.publish"})
    for wider in ({"pubsub": ["*"]}, {"pubsub": ["Topic.*"]}, {"blob": ["Blob.get"]}, {"*": ["*"]}):
        with pytest.raises(Amplification):
            parent.derive(label="child", services=wider)
    assert not parent.children


async def test_revoking_an_ancestor_cuts_calls_in_flight_and_callbacks() -> None:
    top = root(pubsub={"*"})
    leaf = top.derive(label="session").derive(label="service", service="pubsub")
    running = asyncio.ensure_future(asyncio.sleep(60))
    told: list[str] = []
    leaf.enter(method("Topic.publish"), {}, running)
    leaf.on_end(lambda error: told.append(error.code))
    top.revoke("because")
    with pytest.raises(asyncio.CancelledError):
        await running
    assert told == ["capability.revoked"]
    with pytest.raises(Revoked, match="because"):
        leaf.enter(method("Topic.publish"), {}, task())
    with pytest.raises(Revoked):
        leaf.derive(label="more")


async def test_a_session_ends_with_any_of_its_roles() -> None:
    a, b = root(pubsub={"*"}), root(blob={"*"})
    session = Grant(ADA, {}, clock=Clock(), label="session", parents=(a, b))
    b.revoke("gone")
    assert isinstance(session.ended, Revoked)
    assert a.ended is None
    assert not a.children, "the parent that lives on keeps no dead child"


async def test_revocation_is_idempotent_and_late_callbacks_fire_at_once() -> None:
    grant = root()
    told: list[str] = []
    grant.revoke("one")
    grant.revoke("two")
    grant.on_end(lambda error: told.append(error.message))
    assert len(told) == 1
    assert "one" in told[0]


async def test_a_broken_callback_does_not_keep_the_others_alive() -> None:
    grant = root()
    told: list[str] = []

    def broken(_: object) -> None:
        raise RuntimeError("broken")

    grant.on_end(broken)
    grant.on_end(lambda error: told.append(error.code))
    grant.revoke("x")
    assert told == ["capability.revoked"]


async def test_removed_callbacks_stay_silent() -> None:
    grant = root()
    told: list[str] = []
    grant.on_end(lambda error: told.append(error.code))()
    grant.revoke("x")
    assert told == []


async def test_expiry_is_judged_at_each_use_and_capped_by_the_parent() -> None:
    clock = Clock()
    parent = Grant(ADA, {}, clock=clock, label="p", expires_at=1010.0)
    child = parent.derive(label="c", expires_at=2000.0)
    assert child.expires_at == 1010.0
    assert parent.derive(label="d").expires_at == 1010.0
    clock.now = 1010.0  # no timer has run: the use itself finds out
    with pytest.raises(Expired):
        child.check_live()


async def test_expiry_cuts_without_a_use() -> None:
    clock = Clock()
    ended = asyncio.Event()
    grant = Grant(ADA, {}, clock=clock, label="p", expires_at=1000.0)
    grant.on_end(lambda _: ended.set())
    async with asyncio.timeout(5):
        await ended.wait()
    assert isinstance(grant.ended, Expired)


async def test_children_are_bounded() -> None:
    parent = root()
    for _ in range(CHILDREN_MAX):
        parent.derive(label="c")
    with pytest.raises(LimitExceeded):
        parent.derive(label="c")


async def test_diamond_is_cut_once() -> None:
    a, b = root(), root()
    told: list[str] = []
    session = Grant(ADA, {}, clock=Clock(), label="s", parents=(a, b))
    session.on_end(lambda error: told.append(error.code))
    a.revoke("1")
    b.revoke("2")
    assert len(told) == 1
