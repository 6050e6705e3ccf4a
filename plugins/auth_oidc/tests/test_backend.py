"""The backend: who is let in, and how long, by what the provider says and does not say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wetware.errors import ConfigError, InvalidArgument
from wetware.hookspecs import Accept, PluginContext, Reject, Resumed, Suspended, Withdrawn
from wetware.identity import Challenge, Key, LoginStatus, Principal, Proof
from wetware.testing import AuthConformance, plugin_context
from wetware_auth_oidc.backend import KEYS_MAX, OidcBackend
from wetware_auth_oidc.config import parse_roles, values
from wetware_auth_oidc.session import StoredSession
from wetware_auth_oidc.signer import proof_of

from .fake import FakeProvider, fake_in_thread, signed
from .nodes import ADA, EVE, MAY, PRINCIPAL, Node, Start, config


class _Signer:
    """Signs with tokens in memory."""

    unattended = True

    def __init__(self, session: StoredSession) -> None:
        self.session = session

    async def sign(self, challenge: Challenge) -> Proof:
        return proof_of(self.session, challenge)


class TestAuthOidc(AuthConformance):
    name = "auth_oidc"

    @pytest.fixture(autouse=True)
    def _provider(self) -> Iterator[None]:
        with fake_in_thread() as self.fake:
            self.config = config(self.fake.issuer, recheck_s=1)
            yield

    def make(self, ctx: PluginContext) -> OidcBackend:
        return OidcBackend(ctx)

    async def member(self, backend: Any) -> _Signer:
        return _Signer(self.fake.session(ADA))

    def stranger(self) -> _Signer:
        return _Signer(self.fake.session(EVE, "eve", groups=["sales"]))

    async def withdraw(self, backend: Any) -> None:
        gone = asyncio.Event()
        backend.watch(lambda _: gone.set())
        self.fake.people.clear()
        await gone.wait()


# --- one by one -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_roles_are_by_claims_and_end_with_the_token(fake: FakeProvider, start: Start) -> None:
    async with start() as node:
        session = fake.session(ADA, groups=["eng", "ops"])
        verdict = await node.login(session)
        assert verdict == Accept(PRINCIPAL, frozenset({"member", "admin"}), session.expires_at)
        root = await node.login(fake.session(EVE, "root", groups=None))
        assert isinstance(root, Accept)
        assert root.roles == {"admin"}
        short = fake.session(ADA, "bob", exp=time.time() - 59)  # within what clocks may differ
        assert isinstance(await node.login(short), Accept)
        assert node.backend.roles(Principal("oidc", "bob")) == frozenset()
        assert node.backend.roles(Principal("local", "ada")) == frozenset()


@pytest.mark.anyio
async def test_a_token_that_was_seen_is_worthless_without_its_key(
    fake: FakeProvider, start: Start
) -> None:
    """As the node that saw it: it has the tokens, and a key of its own."""
    async with start() as node:
        stolen = replace(fake.session(ADA), seed=EVE.seed.hex())
        verdict = await node.login(stolen)
        assert isinstance(verdict, Reject)
        assert "another key (nonce)" in verdict.reason


@pytest.mark.anyio
async def test_an_access_token_of_another_person_is_refused(
    fake: FakeProvider, start: Start
) -> None:
    async with start() as node:
        mine, theirs = fake.session(ADA), fake.session(EVE, "eve")
        verdict = await node.login(replace(mine, access_token=theirs.access_token))
        assert isinstance(verdict, Reject)
        assert verdict.status is LoginStatus.EXPIRED


@pytest.mark.anyio
async def test_tokens_of_a_refresh_are_bound_by_the_first(fake: FakeProvider, start: Start) -> None:
    async with start() as node:
        old = fake.session(ADA, iat=time.time() - 7200, exp=time.time() - 3600)
        assert isinstance(await node.login(old), Reject)
        fresh = signed(fake.claims(ADA, nonce=None))
        renewed = replace(old, id_token=fresh, bound_token=old.id_token)
        assert isinstance(await node.login(renewed), Accept)
        eves = fake.session(EVE, "eve", exp=time.time() - 3600)
        verdict = await node.login(replace(renewed, bound_token=eves.id_token))
        assert isinstance(verdict, Reject)  # eve's key is not ada's
        other = replace(renewed, seed=EVE.seed.hex(), bound_token=eves.id_token)
        verdict = await node.login(other)
        assert isinstance(verdict, Reject)
        assert "of somebody else" in verdict.reason
        ancient = signed(fake.claims(ADA, iat=time.time() - 30 * 24 * 3600))
        verdict = await node.login(replace(renewed, bound_token=ancient))
        assert isinstance(verdict, Reject)
        assert "too long ago" in verdict.reason


@pytest.mark.anyio
async def test_who_is_offboarded_is_out_within_recheck_s(fake: FakeProvider, start: Start) -> None:
    async with start() as node:
        session = fake.session(ADA)
        assert isinstance(await node.login(session), Accept)
        fake.people.clear()
        assert await node.hears(Withdrawn) == Withdrawn(PRINCIPAL, None, node.told[-1].reason)
        assert node.backend.roles(PRINCIPAL) == frozenset()
        verdict = await node.login(session)
        assert isinstance(verdict, Reject)
        assert "no longer knows" in verdict.reason


@pytest.mark.anyio
async def test_a_group_that_is_taken_away_ends_its_role_alone(
    fake: FakeProvider, start: Start
) -> None:
    async with start() as node:
        session = fake.session(ADA, groups=["eng", "ops"])
        await node.login(session)
        fake.people[session.access_token]["groups"] = ["eng"]
        event = await node.hears(Withdrawn)
        assert event.roles == {"admin"}
        assert node.backend.roles(PRINCIPAL) == {"member"}
        again = await node.login(session)  # its ID token still says so; the provider knows better
        assert isinstance(again, Accept)
        assert again.roles == {"member"}


@pytest.mark.anyio
async def test_the_last_group_may_be_left_out_of_the_answer(
    fake: FakeProvider, start: Start
) -> None:
    """As some providers do with a list that is empty."""
    async with start() as node:
        session = fake.session(ADA)
        fake.people[session.access_token]["groups"] = ["eng"]
        await node.login(session)
        del fake.people[session.access_token]["groups"]
        assert (await node.hears(Withdrawn)).roles == {"member"}
        verdict = await node.login(session)
        assert isinstance(verdict, Reject)
        assert verdict.status is LoginStatus.NO_ROLE


@pytest.mark.anyio
async def test_an_older_token_does_not_bring_back_what_a_newer_one_lacks(
    fake: FakeProvider, start: Start
) -> None:
    async with start(recheck_s=60) as node:
        now = time.time()
        old = fake.session(ADA, groups=["eng", "ops"], iat=now - 60)
        new = fake.session(ADA, groups=["eng"], iat=now)
        assert await node.login(new) == Accept(PRINCIPAL, frozenset({"member"}), new.expires_at)
        later = await node.login(old)
        assert isinstance(later, Accept)
        assert later.roles == {"member"}
        none = await node.login(fake.session(ADA, groups=[], iat=now + 1))
        assert isinstance(none, Reject)
        assert node.backend.roles(PRINCIPAL) == frozenset()
        assert (await node.hears(Withdrawn)).roles == {"member"}


@pytest.mark.anyio
async def test_an_address_is_verified_by_who_says_it(fake: FakeProvider, tmp_path: Path) -> None:
    boss = {"boss": {"claims": ["email=boss@acme.org"], "services": MAY}}
    given = replace(config(fake.issuer), roles=boss)
    backend = OidcBackend(plugin_context(tmp_path, given))
    node = Node(backend)
    session = fake.session(ADA, email="ada@acme.org", email_verified=True)
    fake.people[session.access_token]["email"] = "boss@acme.org"
    assert isinstance(await node.login(session), Reject)
    fake.people[session.access_token]["email_verified"] = True
    assert isinstance(await node.login(session), Accept)


@pytest.mark.anyio
async def test_a_renewed_token_takes_the_place_of_the_one_before(
    fake: FakeProvider, start: Start
) -> None:
    """Whose end then ends nothing."""
    async with start() as node:
        old = fake.session(ADA, iat=time.time() - 10)
        new = fake.session(ADA)
        for session in (old, new):
            assert isinstance(await node.login(session), Accept)
        del fake.people[old.access_token]
        asked = fake.asked.count("/userinfo")
        await asyncio.sleep(2.5)
        assert fake.asked.count("/userinfo") > asked
        assert node.told == []
        assert node.backend.roles(PRINCIPAL) == {"member"}


@pytest.mark.anyio
async def test_one_person_cannot_fill_the_table(fake: FakeProvider, start: Start) -> None:
    async with start(recheck_s=60) as node:
        for number in range(KEYS_MAX + 5):
            key = Key.from_seed(bytes([number]) * 32)
            assert isinstance(await node.login(fake.session(key)), Accept)
        assert len(node.backend._all()) == KEYS_MAX
        assert "KEYS_MAX" in (await node.hears(Withdrawn)).reason


@pytest.mark.anyio
async def test_who_alone_cannot_be_asked_about_is_out_and_the_others_go_on(
    fake: FakeProvider, start: Start
) -> None:
    async with start() as node:
        ada, eve = fake.session(ADA), fake.session(EVE, "eve")
        for session in (ada, eve):
            await node.login(session)
        fake.people[ada.access_token] = {"no": "sub"}
        event = await node.hears(Withdrawn)
        assert event.principal == PRINCIPAL
        assert node.backend.roles(Principal("oidc", "eve")) == {"member"}
        kinds = {type(event) for event in node.told}
        assert kinds <= {Withdrawn, Suspended, Resumed}


@pytest.mark.anyio
async def test_a_provider_that_hangs_is_noticed_in_time_however_many_are_here(
    fake: FakeProvider, start: Start
) -> None:
    async with start(recheck_s=1, unreachable_s=1) as node:
        for number in range(100):
            await node.login(fake.session(ADA, f"user{number}"))
        fake.stall_s = 30  # each question is given up after 5 s; of all, in 35
        begun = time.monotonic()
        await node.hears(Suspended)
        assert time.monotonic() - begun < 15
        fake.stall_s = 0.0
        await node.hears(Resumed, within_s=60)
        assert not [event for event in node.told if isinstance(event, Withdrawn)]


@pytest.mark.anyio
async def test_while_the_provider_is_silent_nobody_is_allowed_anything(
    fake: FakeProvider, start: Start
) -> None:
    async with start() as node:
        session = fake.session(ADA)
        await node.login(session)
        fake.raw["/userinfo"] = (503, "text/html", b"<html>down</html>")
        event = await node.hears(Suspended)
        assert "503" in event.reason
        verdict = await node.login(session)
        assert isinstance(verdict, Reject)
        assert verdict.status is LoginStatus.BACKEND_UNAVAILABLE
        assert [finding.level for finding in node.backend.findings()] == ["error"]
        fake.raw.clear()
        await node.hears(Resumed)
        assert not [event for event in node.told if isinstance(event, Withdrawn)]
        assert isinstance(await node.login(session), Accept)
        assert not list(node.backend.findings())


@pytest.mark.anyio
async def test_who_went_while_the_provider_was_silent_is_out_before_the_others_go_on(
    fake: FakeProvider, start: Start
) -> None:
    async with start() as node:
        await node.login(fake.session(ADA))
        await node.login(fake.session(EVE, "eve"))
        fake.raw["/userinfo"] = (500, "text/html", b"")
        await node.hears(Suspended)
        fake.people = {token: who for token, who in fake.people.items() if who["sub"] == "eve"}
        fake.raw.clear()
        await node.hears(Resumed)
        kinds = [type(event) for event in node.told]
        assert kinds == [Suspended, Withdrawn, Resumed]
        assert node.backend.roles(PRINCIPAL) == frozenset()
        assert node.backend.roles(Principal("oidc", "eve")) == {"member"}


@pytest.mark.anyio
async def test_a_login_asks_the_provider_once_per_recheck(fake: FakeProvider, start: Start) -> None:
    async with start(recheck_s=60) as node:
        session = fake.session(ADA)
        for _ in range(20):
            assert isinstance(await node.login(session), Accept)
        assert fake.asked.count("/userinfo") == 1


@pytest.mark.anyio
async def test_no_group_no_role(fake: FakeProvider, start: Start) -> None:
    async with start() as node:
        verdict = await node.login(fake.session(ADA, groups=["sales"]))
        assert isinstance(verdict, Reject)
        assert verdict.status is LoginStatus.NO_ROLE
        # What looks like a group, and is a text of another claim, is none.
        assert isinstance(await node.login(fake.session(ADA, groups="engineering")), Reject)
        assert isinstance(await node.login(fake.session(ADA, groups=[["eng"]])), Reject)


def test_how_claims_are_read() -> None:
    claims = {
        "groups": ["a", "b"], "realm_access": {"roles": ["ops"]}, "hd": "acme.org", "n": 7,
        "https://acme.org/team": "x", "email": "a@acme.org", "email_verified": True, "vip": True,
    }  # fmt: skip
    assert values(claims, "groups") == {"a", "b"}
    assert values(claims, "realm_access.roles") == {"ops"}
    assert values(claims, "https://acme.org/team") == {"x"}
    assert values(claims, "vip") == {"true"}
    assert values(claims, "n") == {"7"}
    assert values(claims, "email") == {"a@acme.org"}
    for word in (False, "true", None):
        assert not values({**claims, "email_verified": word}, "email")
    for name in ("none", "realm_access", "hd.x", "groups.a", ""):
        assert values(claims, name) == frozenset()


@pytest.mark.parametrize(
    ("roles", "why"),
    [
        ({"x y": {"claims": ["a=b"], "services": MAY}}, "not a role's name"),
        ({"a": {"services": MAY}}, "a.claims"),
        ({"a": {"claims": ["ab"], "services": MAY}}, "no NAME=VALUE"),
        ({"a": {"claims": ["a=b"]}}, "a.services"),
        ({"a": {"claims": ["a=b"], "services": {"pubsub": "*"}}}, "a.services.pubsub"),
        ({"a": {"claims": ["a=b"], "services": MAY, "bits": 1}}, "a.bits: no such setting"),
        ({"a": {"claims": ["a=b"], "services": MAY, "where": ["blob x=max:1"]}}, "a.where"),
        ({"a": 1}, "is not a section"),
    ],
)
def test_roles_that_mean_nothing_are_refused(roles: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_roles(roles)
    assert why in refused.value.message


def test_settings_that_no_cluster_can_be_run_with(tmp_path: Path) -> None:
    good = config("https://id.example.org")
    for change in ({"issuer": ""}, {"client_id": ""}, {"roles": {}}):
        with pytest.raises(ConfigError):
            OidcBackend(plugin_context(tmp_path, replace(good, **change)))  # type: ignore[arg-type]
