"""The broker's decision: it fails closed, and what is withdrawn meanwhile is not granted."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware.broker.broker import Broker
from wetware.broker.limits import LoginLimits
from wetware.broker.records import Records
from wetware.broker.values import TIME_MAX
from wetware.errors import (
    CapabilityError,
    Disconnected,
    Expired,
    LimitExceeded,
    PluginError,
    Revoked,
)
from wetware.hookspecs import (
    Accept,
    NotMine,
    Reject,
    Resumed,
    RoleProfile,
    Suspended,
    Withdrawn,
)
from wetware.identity import Challenge, Channel, Key, LoginStatus, Principal, Proof

pytestmark = pytest.mark.anyio
NODE = Key.from_seed(b"n" * 32)
ADA = Principal("fake", "ada")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class Backend:
    """Answers as the test says."""

    name = "fake"
    schemes = ("fake",)
    founding = b"x"
    epoch = 1
    services = ()

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer if answer is not None else Accept(ADA, frozenset({"member"}))
        self.current = frozenset({"member"})
        self.profiles = {"member": {"pubsub": frozenset({"*"})}}
        self.during: Callable[[], None] = lambda: None
        self.callback: Callable[[Withdrawn], None] = lambda _: None

    async def authenticate(self, challenge: Challenge, proof: Proof) -> Any:
        await asyncio.sleep(0)
        self.during()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def roles(self, principal: Principal) -> frozenset[str]:
        return self.current

    def profile(self, role: str) -> RoleProfile:
        return RoleProfile(self.profiles.get(role, {}))

    def watch(self, callback: Callable[[Withdrawn], None]) -> Callable[[], None]:
        self.callback = callback
        return lambda: None


class Other(Backend):
    """Of a second one, beside it."""

    name = "other"
    schemes = ("other",)


def broker(
    backend: Backend, clock: Clock | None = None, also: tuple[Backend, ...] = (), **limits: int
) -> Broker:
    clock = clock or Clock()
    return Broker(
        peer_id=NODE.peer_id,
        cluster="c",
        backend=backend,  # type: ignore[arg-type]  # the parts that the broker uses
        services={},
        clock=clock,
        audit=Records(clock, None),
        limits=replace(LoginLimits(), **limits),
        also=also,  # type: ignore[arg-type]
    )


def challenge(**changes: Any) -> Challenge:
    made = Challenge(
        bytes(32), NODE.peer_id, "c", Channel("noise", b"h" * 32), ("fake",), 1, 1_010_000
    )
    return replace(made, **changes)


def proof(of: Challenge, scheme: str = "fake") -> Proof:
    return Proof(scheme, b"", of.signed_bytes())


def test_statuses_are_those_of_the_schema_and_a_new_one_never_grants() -> None:
    schema = (Path(wetware.__file__).parent / "schema" / "core.capnp").read_text()
    enum = schema.partition("enum LoginStatus {")[2].partition("}")[0]
    names = re.findall(r"^  (\w+) @\d+;", enum, re.MULTILINE)
    assert names == list(LoginStatus)
    assert LoginStatus("somethingNew") is LoginStatus.UNINITIALIZED


async def refused(by: Broker) -> Reject:
    verdict = await by.backends.judge(challenge(), proof(challenge()))
    assert isinstance(verdict, Reject)
    return verdict


async def test_accept() -> None:
    verdict = await broker(Backend()).backends.judge(challenge(), proof(challenge()))
    assert verdict == Accept(ADA, frozenset({"member"}))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (RuntimeError("boom"), LoginStatus.BACKEND_UNAVAILABLE),
        (NotMine(), LoginStatus.UNSUPPORTED_SCHEME),
        (Reject(LoginStatus.UNKNOWN_PRINCIPAL, "who?"), LoginStatus.UNKNOWN_PRINCIPAL),
        (Reject(LoginStatus.GRANTED, "a bug"), LoginStatus.MALFORMED),
        (Accept(ADA, frozenset()), LoginStatus.NO_ROLE),
        (Accept(ADA, frozenset({"other"})), LoginStatus.NO_ROLE),
    ],
)
async def test_everything_else_is_a_refusal(answer: Any, expected: LoginStatus) -> None:
    assert (await refused(broker(Backend(answer)))).status is expected


class Defective(Backend):
    """A backend whose authors took lists for sets."""

    def __init__(self, answer: Any = None, *, roles: Any = None, profile: Any = None) -> None:
        super().__init__(answer)
        self.roles = lambda _: self.current if roles is None else roles  # type: ignore[method-assign]
        if profile is not None:
            self.profile = lambda _: profile  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        (Defective(profile=RoleProfile({"box": ["*"]})), "profile('member').services['box'] is"),  # type: ignore[dict-item]
        (Defective(profile=RoleProfile({"box": "*"})), "profile('member').services['box'] is"),  # type: ignore[dict-item]
        (Defective(profile=RoleProfile({}, ("a=b",))), "profile('member').where is ('a=b',)"),  # type: ignore[arg-type]
        (Defective(profile=RoleProfile([])), "profile('member').services is []"),  # type: ignore[arg-type]
        (Defective(profile={"box": ["*"]}), "profile('member') is {'box'"),
        (Defective(roles=["member"]), "roles(fake:ada) is ['member']"),
        (Defective(Accept(ADA, ["member"])), "Accept.roles is ['member']"),  # type: ignore[arg-type]
        (Defective(Accept("ada", frozenset({"member"}))), "Accept.principal is 'ada'"),  # type: ignore[arg-type]
        (Defective(Reject("no", "")), "Reject.status is 'no'"),  # type: ignore[arg-type]
        (Defective(True), "authenticate() is True"),
    ],
)
async def test_what_a_backend_must_not_give_is_a_refusal_that_names_it(
    backend: Backend, names: str
) -> None:
    verdict = await refused(broker(backend))
    assert verdict.status is LoginStatus.BACKEND_UNAVAILABLE
    assert "the auth backend fake" in verdict.reason
    assert names in verdict.reason


async def test_a_defective_profile_opens_no_session() -> None:
    made = broker(Defective(profile=RoleProfile({"box": ["*"]})))  # type: ignore[dict-item]
    with pytest.raises(PluginError, match=r"fake.*services\['box'\]"):
        made.open_session(ADA, {"member"})
    assert made.sessions == 0


async def test_a_role_withdrawn_during_the_check_is_not_granted() -> None:
    backend = Backend()
    backend.during = lambda: setattr(backend, "current", frozenset())
    assert (await refused(broker(backend))).status is LoginStatus.NO_ROLE


async def test_a_deadline_that_passes_during_the_check_is_expired() -> None:
    backend, clock = Backend(), Clock()
    backend.during = lambda: setattr(clock, "now", 1011.0)
    assert (await refused(broker(backend, clock))).status is LoginStatus.EXPIRED


async def test_an_expired_challenge_never_reaches_the_backend() -> None:
    backend, clock = Backend(), Clock()
    backend.during = lambda: pytest.fail("the backend was asked")
    clock.now = 1011.0
    assert (await refused(broker(backend, clock))).status is LoginStatus.EXPIRED


async def test_a_session_ends_when_its_backend_said() -> None:
    clock = Clock()
    backend = Backend(Accept(ADA, frozenset({"member"}), expires_at=1005.0))
    made = broker(backend, clock)
    verdict = await made.backends.judge(challenge(), proof(challenge()))
    assert isinstance(verdict, Accept)
    assert verdict.expires_at == 1005.0
    session = made.open_session(verdict.principal, verdict.roles, expires_at=verdict.expires_at)
    below = session.derive(label="x")
    assert below.expires_at == 1005.0
    session.check_live()
    clock.now = 1005.0
    for grant in (session, below):
        with pytest.raises(Expired):
            grant.check_live()
    assert (await refused(made)).status is LoginStatus.EXPIRED


async def test_a_session_whose_end_is_no_time_is_refused_and_leaves_nothing() -> None:
    never, unknown = float("inf"), float("nan")
    for end in (never, unknown):
        made = broker(Backend(Accept(ADA, frozenset({"member"}), expires_at=end)))
        verdict = await made.backends.judge(challenge(), proof(challenge()))
        assert isinstance(verdict, Accept) == (end is never)
        if isinstance(verdict, Accept):  # as far off as there are dates
            session = made.open_session(
                verdict.principal, verdict.roles, expires_at=verdict.expires_at
            )
            assert session.expires_at == TIME_MAX
            session.close("x")
        assert not made.tree.grants


async def test_sessions_are_bounded_and_give_their_place_back() -> None:
    made = broker(
        Backend(), sessions_per_principal_max=2, sessions_max=3, sessions_local_reserved=0
    )
    first = made.open_session(ADA, {"member"})
    made.open_session(ADA, {"member"})
    with pytest.raises(LimitExceeded, match="sessions_per_principal_max"):
        made.open_session(ADA, {"member"})
    first.revoke("closed")
    made.open_session(ADA, {"member"})
    made.open_session(Principal("fake", "bob"), {"member"})
    with pytest.raises(LimitExceeded, match="sessions_max"):
        made.open_session(Principal("fake", "eve"), {"member"})


async def test_a_part_of_the_sessions_is_kept_for_the_unix_socket() -> None:
    made = broker(Backend(), sessions_max=4, sessions_local_reserved=1)
    for name in "abc":
        made.open_session(Principal("fake", name), {"member"})
    with pytest.raises(LimitExceeded, match="sessions_max"):
        made.open_session(ADA, {"member"})
    made.open_session(ADA, {"member"}, local=True)
    with pytest.raises(LimitExceeded, match="sessions_max"):
        made.open_session(ADA, {"member"}, local=True)


async def test_gate_slots_are_bounded_per_connection_address_and_in_all() -> None:
    made = broker(Backend(), gates_per_connection_max=2, gates_per_address_max=3, gates_max=4)
    one, two, three = object(), object(), object()
    with contextlib.ExitStack() as stack:
        for connection, address, refused in (
            (one, "192.0.2.1", ""),
            (one, "192.0.2.1", ""),
            (one, "192.0.2.1", "gates_per_connection_max"),
            (two, "192.0.2.1", ""),
            (two, "192.0.2.1", "gates_per_address_max"),
            (three, "2001:db8::1", ""),
            (three, "2001:db8::2", "gates_max"),
            (three, None, ""),  # a member
            (three, None, "gates_per_connection_max"),
        ):
            if refused:
                with pytest.raises(LimitExceeded, match=refused):
                    stack.enter_context(made.gate_slot(connection, address))
            else:
                stack.enter_context(made.gate_slot(connection, address))
    assert not made._places, "places were not given back"


async def test_roots_and_counts_are_forgotten_with_their_sessions() -> None:
    made = broker(Backend())
    for n in range(50):
        made.open_session(Principal("fake", str(n % 7)), {"member"}).revoke("closed")
    assert made.sessions == 0
    assert not made.tree.roots()
    assert not made.tree.grants
    assert not made._sessions


async def test_withdrawal_cuts_the_sessions_it_covers_and_no_others() -> None:
    backend = Backend()
    made = broker(backend)
    bob = Principal("fake", "bob")
    ada_member = made.open_session(ADA, {"member"})
    ada_both = made.open_session(ADA, {"member", "admin"})
    bob_member = made.open_session(bob, {"member"})
    backend.callback(Withdrawn(ADA, frozenset({"admin"})))
    assert isinstance(ada_both.ended, Revoked)
    assert ada_member.ended is None
    backend.callback(Withdrawn(ADA))
    assert ada_member.ended is not None
    assert bob_member.ended is None
    backend.callback(Withdrawn(None))
    assert bob_member.ended is not None
    assert made.sessions == 0


# --- two backends ---

BOB = Principal("other", "bob")


async def test_each_backend_judges_the_proofs_of_its_own_scheme() -> None:
    made = broker(Backend(), also=(Other(Accept(BOB, frozenset({"member"}))),))
    assert made.backends.schemes == ("other", "fake")
    both = challenge(schemes=made.backends.schemes)
    for scheme, who in (("fake", ADA), ("other", BOB)):
        verdict = await made.backends.judge(both, proof(both, scheme))
        assert verdict == Accept(who, frozenset({"member"}))
    verdict = await made.backends.judge(both, proof(both, "third"))
    assert isinstance(verdict, Reject)
    assert verdict.status is LoginStatus.UNSUPPORTED_SCHEME


async def test_no_backend_names_a_user_of_another_one() -> None:
    made = broker(Backend(), also=(Other(Accept(ADA, frozenset({"member"}))),))
    both = challenge(schemes=made.backends.schemes)
    verdict = await made.backends.judge(both, proof(both, "other"))
    assert isinstance(verdict, Reject)
    assert "Accept.principal is" in verdict.reason


async def test_a_role_means_what_the_backend_of_its_user_says() -> None:
    other = Other()
    other.profiles = {"member": {"blob": frozenset({"*"})}}
    made = broker(Backend(), also=(other,))
    ada, bob = (made.open_session(each, {"member"}) for each in (ADA, BOB))
    assert ada.patterns("pubsub")
    assert not ada.patterns("blob")
    assert bob.patterns("blob")
    assert not bob.patterns("pubsub")
    assert made.backends.profile_of(Principal("gone", "eve"), "member") is None


async def test_what_one_backend_says_is_about_its_own_users() -> None:
    one, other = Backend(), Other()
    made = broker(one, also=(other,))
    ada, bob = (made.open_session(each, {"member"}) for each in (ADA, BOB))
    other.callback(Suspended("no contact"))
    with pytest.raises(CapabilityError, match="users of 'other' are suspended: no contact"):
        bob.check_live()
    ada.check_live()
    one.callback(Resumed())
    assert bob.state == "suspended", "the other one has not said so"
    other.callback(Resumed())
    bob.check_live()
    other.callback(Withdrawn(ADA))
    assert ada.ended is None
    other.callback(Withdrawn(None))
    assert bob.ended is not None
    assert ada.ended is None


def test_two_backends_have_no_scheme_in_common() -> None:
    other = Other()
    other.schemes = ("fake",)  # type: ignore[misc]
    with pytest.raises(PluginError, match="in common: fake, fake"):
        broker(Backend(), also=(other,))
    with pytest.raises(PluginError, match="in common"):
        broker(Backend(), also=(Backend(),))


async def test_a_widened_role_leaves_old_sessions_as_they_were_and_revocable() -> None:
    backend = Backend()
    made = broker(backend)
    old = made.open_session(ADA, {"member"})
    backend.profiles = {"member": {"pubsub": frozenset({"*"}), "blob": frozenset({"*"})}}
    new = made.open_session(ADA, {"member"})
    assert not old.patterns("blob")
    assert new.patterns("blob")
    backend.callback(Withdrawn(ADA, frozenset({"member"})))
    assert old.ended is not None
    assert new.ended is not None


async def test_closing_ends_everything() -> None:
    made = broker(Backend())
    session = made.open_session(ADA, {"member"})
    made.close()
    assert isinstance(session.ended, Disconnected), "nobody revoked it"
    assert session.ended.code == "node.stopping"
    with pytest.raises(Disconnected):
        made.open_session(ADA, {"member"})
    made.close()


async def test_closing_again_does_not_unwatch_again_and_its_error_hides_no_other() -> None:
    backend, calls = Backend(), []

    def unwatch() -> None:
        calls.append(1)
        raise ValueError("list.remove(x): x not in list")

    backend.watch = lambda _: unwatch  # type: ignore[method-assign]
    made = broker(backend)
    session = made.open_session(ADA, {"member"})
    made.close()
    made.close()
    assert calls == [1]
    assert session.ended is not None
