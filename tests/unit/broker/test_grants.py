"""Grants: they only narrow, and end with everything that hangs on them."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.broker.methods import matches, pattern_within
from wetware.broker.terms import Terms
from wetware.broker.values import Rate
from wetware.errors import (
    Amplification,
    CapabilityError,
    Denied,
    Expired,
    LimitExceeded,
    Revoked,
)
from wetware.hookspecs import RoleProfile
from wetware.identity import Principal

from .parts import ADA, JOIN, PUBLISH, Clock, call, method, narrow, root, task, tree, where

pytestmark = pytest.mark.anyio


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


@pytest.mark.parametrize(
    ("pattern", "within", "expected"),
    [
        ("Outer.Inner.get", "Outer.Inner.*", True),
        ("Outer.Inner.*", "Outer.Inner.*", True),
        ("Outer.Inner.get", "Outer.*", False),
        ("Outer.Inner.*", "Outer.*", False),
    ],
)
def test_an_interface_inside_another_is_not_covered_with_it(
    pattern: str, within: str, expected: bool
) -> None:
    assert pattern_within(pattern, frozenset({within})) is expected


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
            parent.derive(label="child", terms=narrow(**wider))
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
    on = tree()
    a, b = root(on, "a", pubsub={"*"}), root(on, "b", blob={"*"})
    session = on.session(ADA, (a, b))
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
    parent = root(tree(clock)).derive(label="p", terms=Terms(expires_at=1010.0))
    child = parent.derive(label="c", terms=Terms(expires_at=2000.0))
    assert child.expires_at == 1010.0
    assert parent.derive(label="d").expires_at == 1010.0
    clock.now = 1010.0  # no timer has run: the use itself finds out
    with pytest.raises(Expired):
        child.check_live()


async def test_an_end_at_the_beginning_of_time_is_an_end() -> None:
    parent = root(pubsub={"*"}).derive(label="p", terms=Terms(expires_at=2000.0))
    assert parent.derive(label="c", terms=Terms(expires_at=0.0)).expires_at == 0.0


async def test_expiry_cuts_without_a_use() -> None:
    ended = asyncio.Event()
    grant = root().derive(label="p", terms=Terms(expires_at=1000.0))
    grant.on_end(lambda _: ended.set())
    async with asyncio.timeout(60):
        await ended.wait()
    assert isinstance(grant.ended, Expired)


async def test_children_are_bounded() -> None:
    parent = root(tree(children_max=16))
    for _ in range(16):
        parent.derive(label="c")
    with pytest.raises(LimitExceeded, match="children_max"):
        parent.derive(label="c")


async def test_diamond_is_cut_once() -> None:
    on = tree()
    a, b = root(on, "a"), root(on, "b")
    told: list[str] = []
    session = on.session(ADA, (a, b))
    session.on_end(lambda error: told.append(error.code))
    a.revoke("1")
    b.revoke("2")
    assert len(told) == 1


async def test_depth_and_the_number_of_grants_are_bounded() -> None:
    grant = root(tree(depth_max=4))
    for _ in range(4):
        grant = grant.derive(label="c")
    with pytest.raises(LimitExceeded, match="depth_max"):
        grant.derive(label="c")
    few = root(tree(grants_max=64))
    for _ in range(63):
        few.derive(label="c")
    with pytest.raises(LimitExceeded, match="grants_max"):
        few.derive(label="c")


# --- constraints, of which every ancestor's apply -------------------------------------------------


async def test_the_constraints_of_every_ancestor_apply() -> None:
    top = root(pubsub={"*"}).derive(label="a", terms=where("topic=prefix:chat/"))
    grant = top.derive(label="b", service="pubsub", terms=where("topic=in:chat/a,chat/b,news"))
    call(grant, JOIN, topic="chat/a")
    call(grant, PUBLISH, data=b"x")
    for outside in ("news", "chat/c", "", 7, None):
        with pytest.raises(Denied, match="topic"):
            call(grant, JOIN, topic=outside)
    with pytest.raises(Denied):
        call(grant, JOIN)  # the parameter is missing


async def test_a_constraint_is_for_its_service_alone() -> None:
    grant = root(pubsub={"*"}).derive(label="a", terms=where("topic=chat", service="blob"))
    call(grant.derive(label="s", service="pubsub"), JOIN, topic="news")


async def test_a_constraint_that_cannot_be_judged_denies() -> None:
    grant = root(pubsub={"*"}).derive(
        label="a", service="pubsub", terms=where("PubSub.join:nope=chat")
    )
    with pytest.raises(Denied, match="cannot be judged"):
        call(grant, method("PubSub.join", topic="text"), topic="news")


async def test_a_constraint_that_is_about_no_method_denies_its_service() -> None:
    """Else a name that is misspelt, or that a release changed, would let everything pass."""
    on = tree()
    methods = {"join": JOIN, "publish": PUBLISH}
    reached = [SimpleNamespace(methods=methods)]
    served: Any = SimpleNamespace(interface=SimpleNamespace(reachable=lambda _: reached))
    on.services = {"pubsub": served}
    for text, service in (("topik=a", "pubsub"), ("Topic.close:topic=a", "pubsub"), ("key=a", "*")):
        grant = root(on, pubsub={"*"}, sync={"*"}).derive(
            label="a", terms=where(text, service=service)
        )
        with pytest.raises(Denied, match="is about no method"):
            call(grant.derive(label="s", service="pubsub"), JOIN, topic="a")
        with pytest.raises(Denied, match="is about no method"):
            call(grant.derive(label="s", service="pubsub"), PUBLISH, data=b"a")
    about = root(on, pubsub={"*"}).derive(label="a", terms=where("topic=a", service="pubsub"))
    call(about.derive(label="s", service="pubsub"), PUBLISH, data=b"a")


async def test_of_the_roles_of_a_session_one_is_enough_and_each_keeps_its_constraints() -> None:
    on = tree()
    roles = [
        on.root(ADA, name, RoleProfile({"pubsub": frozenset({"*"})}, where(text).where))
        for name, text in (("a", "topic=glob:a/*"), ("b", "topic=glob:b/*"))
    ]
    grant = on.session(ADA, roles).derive(label="s", service="pubsub")
    call(grant, JOIN, topic="a/1")
    call(grant, JOIN, topic="b/1")
    with pytest.raises(Denied):
        call(grant, JOIN, topic="c/1")


async def test_a_role_without_the_method_does_not_lend_another_role_its_freedom() -> None:
    on = tree()
    free = on.root(ADA, "free", RoleProfile({"blob": frozenset({"*"})}))
    bound = on.root(ADA, "b", RoleProfile({"pubsub": frozenset({"*"})}, where("topic=b").where))
    grant = on.session(ADA, (free, bound)).derive(label="s", service="pubsub")
    with pytest.raises(Denied):
        call(grant, JOIN, topic="a")


# --- rates and quotas, charged to every ancestor --------------------------------------------------


async def test_delegation_does_not_multiply_a_quota() -> None:
    top = root(pubsub={"*"}).derive(label="a", terms=Terms(calls=5))
    leaves = [top.derive(label=str(n), service="pubsub", terms=Terms(calls=3)) for n in range(3)]
    done = 0
    for leaf in leaves:
        for _ in range(3):
            with contextlib.suppress(LimitExceeded):
                call(leaf, PUBLISH, data=b"")
                done += 1
    assert done == 5
    assert top.info().calls_left == 0


async def test_a_refused_call_is_charged_to_nobody() -> None:
    top = root(pubsub={"*"}).derive(label="a", terms=Terms(calls=5))
    leaf = top.derive(label="b", service="pubsub", terms=Terms(bytes=10))
    with pytest.raises(LimitExceeded, match="bytes"):
        call(leaf, PUBLISH, data=b"x" * 11)
    assert top.info().calls_left == 5
    call(leaf, PUBLISH, data=b"x" * 10)
    assert (top.info().calls_left, leaf.info().bytes_left) == (4, 0)


async def test_results_are_charged_to_the_quota_of_bytes() -> None:
    leaf = root(pubsub={"*"}).derive(label="b", service="pubsub", terms=Terms(bytes=10))
    assert leaf.metered
    leaf.charge(PUBLISH, 6)
    with pytest.raises(LimitExceeded):
        leaf.charge(PUBLISH, 5)
    leaf.charge(PUBLISH, 4)


async def test_a_rate_is_shared_by_all_derivations_and_comes_back_with_time() -> None:
    clock = Clock()
    top = root(tree(clock), pubsub={"*"}).derive(label="a", terms=Terms(rate=Rate(2.0, 2.0)))
    one, two = (top.derive(label="c", service="pubsub") for _ in range(2))
    call(one, PUBLISH, data=b"")
    call(two, PUBLISH, data=b"")
    for leaf in (one, two):
        with pytest.raises(LimitExceeded) as refused:
            call(leaf, PUBLISH, data=b"")
        assert refused.value.code == "limit.rate"
        assert "try again in 0.5 s" in refused.value.hint
    clock.now += 0.5
    call(two, PUBLISH, data=b"")
    with pytest.raises(LimitExceeded):
        call(one, PUBLISH, data=b"")


# --- natural ends ---------------------------------------------------------------------------------


async def test_what_is_durable_outlives_the_session_with_the_terms_between() -> None:
    on = tree()
    top = root(on, pubsub={"*"})
    session = on.session(ADA, (top,))
    middle = session.derive(label="m", terms=where("topic=prefix:chat/"))
    plain = middle.derive(label="p", service="pubsub")
    share = middle.derive(label="s", kind="share", durable=True)
    session.close("logged out")
    assert {session.state, middle.state, plain.state, share.state} == {"closed", "ended", "live"}
    use = share.derive(label="u", service="pubsub")
    call(use, JOIN, topic="chat/a")
    with pytest.raises(Denied):
        call(use, JOIN, topic="news")
    for over in (session, middle, plain):
        with pytest.raises(Revoked):
            over.check_live()
    share.revoke("enough")
    assert not on.grants, "the last one takes its ancestors along"
    assert not on.roots()


async def test_revoking_a_closed_ancestor_cuts_what_it_had_shared() -> None:
    on = tree()
    session = on.session(ADA, (root(on, pubsub={"*"}),))
    middle = session.derive(label="m")
    share = middle.derive(label="s", kind="share", durable=True)
    session.close("connection lost")
    assert middle.revoke("the delegator changed their mind") == 1
    assert isinstance(share.ended, Revoked)
    assert not on.grants


async def test_a_withdrawn_role_takes_shares_of_closed_sessions_along() -> None:
    on = tree()
    session = on.session(ADA, (root(on, "member", pubsub={"*"}),))
    share = session.derive(label="s", kind="share", durable=True)
    session.close("x")
    assert on.withdraw("local", ADA, frozenset({"member"}), "fired") == 1
    with pytest.raises(Revoked, match="fired"):
        share.check_live()


async def test_what_a_withdrawal_ends_is_counted_once() -> None:
    on = tree()
    on.session(ADA, tuple(root(on, role, pubsub={"*"}) for role in ("a", "b", "c")))
    assert on.withdraw("local", ADA, None, "") == 1


# --- time -----------------------------------------------------------------------------------------


async def test_a_clock_that_is_set_back_prolongs_nothing() -> None:
    class TwoClocks(Clock):
        mono = 0.0

        def monotonic(self) -> float:
            return self.mono

    clock = TwoClocks()
    grant = root(tree(clock)).derive(label="g", terms=Terms(expires_at=1010.0))
    clock.now, clock.mono = 500.0, 9.0
    grant.check_live()
    clock.mono = 10.0
    with pytest.raises(Expired):
        grant.check_live()


async def test_a_clock_that_is_wrong_holds_up_grants_with_an_end_only() -> None:
    on = tree()
    forever = root(on).derive(label="g")
    limited = root(on).derive(label="g", terms=Terms(expires_at=2000.0))
    on.clock_wrong = "it is 40 s behind"
    forever.check_live()
    with pytest.raises(Expired) as refused:
        limited.check_live()
    assert refused.value.code == "capability.expired.clock"
    assert limited.state == "suspended"
    on.clock_wrong = ""
    limited.check_live()


async def test_suspension_holds_everything_up_and_ends_nothing() -> None:
    on = tree()
    grant = root(on, pubsub={"*"}).derive(label="g", service="pubsub")
    running = task()
    grant.enter(PUBLISH, {"data": b""}, running)
    bearer = grant.derive(label="s", principal=Principal("bearer", "x"), service="pubsub")
    other = on.root(Principal("other", "bob"), "r", RoleProfile({"pubsub": frozenset({"*"})}))
    on.suspended["local"] = CapabilityError("no contact", code="capability.suspended")
    with pytest.raises(CapabilityError) as refused:
        grant.enter(PUBLISH, {"data": b""}, task())
    assert refused.value.code == "capability.suspended"
    assert not running.done()
    assert bearer.state == "suspended", "it comes from ada"
    assert other.derive(label="g").state == "live", "whom another backend knows"
    on.suspended.clear()
    assert bearer.state == "live"
    call(grant, PUBLISH, data=b"")


# --- why ------------------------------------------------------------------------------------------


async def test_a_denial_has_an_id_under_which_it_is_explained() -> None:
    on = tree()
    told: list[tuple[Any, ...]] = []
    on.on_denied = lambda *what: told.append(what)
    top = root(on, "member", pubsub={"*"})
    middle = top.derive(label="for bob", terms=where("topic=chat"))
    leaf = middle.derive(label="service pubsub", service="pubsub")
    with pytest.raises(Denied) as refused:
        call(leaf, JOIN, topic="news")
    ((grant, called, explanation),) = told
    assert (grant, called) == (leaf, JOIN)
    assert explanation.decision in refused.value.hint
    assert on.decisions[-1] == (explanation, frozenset({ADA}))
    assert [(s.label, s.verdict) for s in explanation.steps] == [
        ("service pubsub", "allows"),
        ("for bob", "denies"),
        ("role member", "-"),
    ]
    assert "topic=news" in explanation.method
    assert "topic=chat" in explanation.steps[1].detail


async def test_explaining_spends_nothing_and_says_what_would_be() -> None:
    leaf = root(pubsub={"*"}).derive(label="l", service="pubsub", terms=Terms(calls=1))
    for _ in range(3):
        assert leaf.explain(PUBLISH, {"data": b""}).allowed
    call(leaf, PUBLISH, data=b"")
    spent = leaf.explain(PUBLISH, {"data": b""})
    assert (spent.allowed, spent.code) == (False, "limit.calls")
    leaf.revoke("enough")
    assert leaf.explain(PUBLISH, {"data": b""}).code == "capability.revoked"


async def test_decisions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wetware.broker.grants.DECISIONS_MAX", 3)
    on = tree()
    leaf = root(on, pubsub={"Topic.publish"}).derive(label="l", service="pubsub")
    for _ in range(5):
        with pytest.raises(Denied):
            call(leaf, JOIN, topic="x")
    assert len(on.decisions) == 3


async def test_what_is_remembered_of_a_denial_is_small_however_long_the_terms_above_are() -> None:
    on = tree()
    grant = root(on, pubsub={"*"})
    long = where(*(f"topic=prefix:{n:02}{'x' * 900}" for n in range(64)))
    for _ in range(20):
        grant = grant.derive(label="l", terms=long)
    leaf = grant.derive(label="l", service="pubsub")
    for _ in range(2):
        with pytest.raises(Denied):
            call(leaf, JOIN, topic="news")
    before, last = [explanation for explanation, _ in on.decisions]
    assert sum(len(step.detail) for step in last.steps) < 32 << 10
    for one, other in zip(last.steps[2:], before.steps[2:], strict=True):
        assert one.detail is other.detail, "the same text is kept once"


async def test_ten_thousand_derivations_end_together() -> None:
    on = tree()
    top = root(on, pubsub={"*"})
    told = 0

    def count(_: object) -> None:
        nonlocal told
        told += 1

    tips = []
    for _ in range(100):
        middle = top.derive(label="m")
        tips += [middle.derive(label="t", service="pubsub") for _ in range(99)]
    for tip in tips:
        tip.on_end(count)
    assert top.revoke("all") == 10_001
    assert told == 9_900
    assert not on.grants
    assert all(isinstance(tip.ended, Revoked) for tip in tips)
