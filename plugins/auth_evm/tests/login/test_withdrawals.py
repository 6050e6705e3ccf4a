"""What the contract takes back ends, at first sight; what it gives waits until it is final."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from plugins.auth_evm.tests.chain.net import DAY_S, Gateway, Net, gateways, urls
from plugins.auth_evm.tests.contract.people import ADMIN, ROOT, word
from plugins.auth_evm.tests.login.world import ALICE, BOB, SCOPE, Person, World, refused, until

from wetware.hookspecs import Accept, Resumed, RoleProfile, Suspended, Withdrawn
from wetware.identity import Key, LoginStatus, PeerId, Proof
from wetware.testing import Started
from wetware_auth_evm.login.proofs import KEY_SCHEME, KeyProof, key_statement
from wetware_auth_evm.signer import BoundKeySigner

pytestmark = pytest.mark.anyio

TEAM, MEMBER, EDITOR = word(SCOPE), word("member"), word("editor")


def withdrawn(world: World) -> list[tuple[str, frozenset[str] | None]]:
    """What was told since the last time: (principal, roles)."""
    found = [(str(e.principal), e.roles) for e in world.events if isinstance(e, Withdrawn)]
    world.events.clear()
    return found


async def test_a_grant_waits_for_finality(world: World) -> None:
    world.send("grant", TEAM, MEMBER, ALICE.address, 0, world.chain.chain.time + DAY_S, 1)
    await world.look()
    assert world.backend.replica.tip.grants[ALICE.account]
    refused(await world.login(world.session_of(ALICE)), LoginStatus.NO_ROLE)
    await world.settle()
    assert isinstance(await world.login(world.session_of(ALICE)), Accept)


async def test_a_revocation_acts_at_first_sight(world: World) -> None:
    await world.grant(ALICE.address)
    await world.grant(BOB.address)
    await world.logs_in(ALICE)
    await world.logs_in(BOB)
    world.send("revoke", TEAM, MEMBER, ALICE.address)
    await world.look()
    assert world.backend.replica.final.grants[ALICE.account]  # it is not final yet
    assert withdrawn(world) == [(str(world.principal(ALICE)), frozenset({"member"}))]
    assert world.backend.roles(world.principal(ALICE)) == frozenset()
    refused(await world.login(world.session_of(ALICE)), LoginStatus.NO_ROLE)
    await world.settle()
    assert withdrawn(world) == []  # once


async def test_an_expiry_ends_it_without_any_block(world: World) -> None:
    await world.grant(ALICE.address, seconds=100)
    await world.logs_in(ALICE)
    world.chain.clock.pass_s(50)
    world.backend._review(frozenset())
    assert withdrawn(world) == []
    world.chain.clock.pass_s(50)
    world.backend._review(frozenset())
    assert withdrawn(world) == [(str(world.principal(ALICE)), frozenset({"member"}))]


async def test_a_role_that_begins_later(world: World) -> None:
    now = world.chain.chain.time
    world.send("grant", TEAM, MEMBER, ALICE.address, now + 100, now + 200, 1)
    await world.settle()
    refused(await world.login(world.session_of(ALICE)), LoginStatus.NO_ROLE)
    world.chain.clock.pass_s(100)
    world.chain.chain.time += 100
    await world.settle()
    await world.logs_in(ALICE)


async def test_rights_that_are_narrowed_end_what_hangs_on_the_wider_ones(world: World) -> None:
    await world.grant(ALICE.address, "editor", 0b1011)
    accepted = await world.logs_in(ALICE, ("editor",))
    assert accepted.roles == {"editor"}
    world.send("grant", TEAM, EDITOR, ALICE.address, 0, world.chain.chain.time + DAY_S, 0b1)
    await world.look()
    assert withdrawn(world) == [(str(world.principal(ALICE)), frozenset({"editor"}))]
    accepted = await world.logs_in(ALICE, ("editor",))
    assert accepted.roles == {"editor/0x1"}
    profile = world.backend.profile("editor/0x1")
    assert profile.services == {"pubsub": frozenset({"PubSub.join", "Topic.info"})}
    assert [where.text for where in profile.where] == ["topic=glob:chat/*"]


async def test_a_renewal_ends_nothing(world: World) -> None:
    await world.grant(ALICE.address, seconds=1000)
    await world.logs_in(ALICE)
    await world.grant(ALICE.address, seconds=2000)
    world.chain.clock.pass_s(500)
    world.chain.chain.time += 500
    await world.settle()
    assert withdrawn(world) == []


async def test_revoked_and_granted_anew_between_two_looks(world: World) -> None:
    """The role is there at each look, and yet what hung on it is over."""
    await world.grant(ALICE.address)
    await world.logs_in(ALICE)
    world.send("revoke", TEAM, MEMBER, ALICE.address)
    await world.grant(ALICE.address)
    assert withdrawn(world) == [(str(world.principal(ALICE)), frozenset({"member"}))]
    assert world.backend.roles(world.principal(ALICE)) == {"member"}
    await world.logs_in(ALICE)


async def test_revoke_all_and_granted_anew_between_two_looks(world: World) -> None:
    await world.grant(ALICE.address)
    await world.logs_in(ALICE)
    world.send("revokeAll", ALICE.address)
    await world.grant(ALICE.address)
    assert withdrawn(world) == [(str(world.principal(ALICE)), None)]


async def test_a_role_that_is_granted_in_root_too_goes_on(world: World) -> None:
    await world.grant(ALICE.address)
    await world.logs_in(ALICE)
    world.send("grant", ROOT, MEMBER, ALICE.address, 0, world.chain.chain.time + DAY_S, 1)
    await world.settle()
    world.send("revoke", TEAM, MEMBER, ALICE.address)
    await world.look()
    assert withdrawn(world) == []
    assert world.backend.roles(world.principal(ALICE)) == {"member"}


async def test_a_dead_record_in_root_is_no_tenure(world: World) -> None:
    """It is the same before and after, and gives nothing."""
    now = world.chain.chain.time
    world.send("grant", ROOT, MEMBER, ALICE.address, 0, now + 50, 1)
    await world.grant(ALICE.address)
    world.chain.chain.time += 100
    await world.settle()
    await world.logs_in(ALICE)
    world.send("revoke", TEAM, MEMBER, ALICE.address)
    await world.grant(ALICE.address)
    assert withdrawn(world) == [(str(world.principal(ALICE)), frozenset({"member"}))]


async def test_pause_ends_everybodys(world: World) -> None:
    await world.grant(ALICE.address)
    await world.grant(BOB.address)
    await world.logs_in(ALICE)
    await world.logs_in(BOB)
    world.send("pause")
    await world.look()
    assert {who for who, _ in withdrawn(world)} == {
        str(world.principal(ALICE)), str(world.principal(BOB))
    }  # fmt: skip
    refused(await world.login(world.session_of(ALICE)), LoginStatus.NO_ROLE)
    world.send("unpause")
    await world.settle()
    await world.logs_in(ALICE)


async def test_an_admin_that_is_removed_takes_its_grants_with_it(world: World) -> None:
    end = world.chain.chain.time + DAY_S
    world.send("setAdmin", TEAM, MEMBER, ADMIN, end, 1)
    world.send("grant", TEAM, MEMBER, ALICE.address, 0, end, 1, sender=ADMIN)
    await world.settle()
    await world.logs_in(ALICE)
    world.send("setAdmin", TEAM, MEMBER, ADMIN, 0, 0)
    await world.look()
    assert withdrawn(world) == [(str(world.principal(ALICE)), frozenset({"member"}))]


async def test_a_revocation_that_a_reorganisation_takes_back_holds(world: World) -> None:
    await world.grant(ALICE.address)
    session = world.session_of(ALICE)
    assert isinstance(await world.login(session), Accept)
    world.send("revoke", TEAM, MEMBER, ALICE.address)
    await world.look()
    assert len(withdrawn(world)) == 1
    world.chain.reorg(1)
    world.chain.mine(1)
    await world.look()
    assert world.backend.replica.tip.grants[ALICE.account]  # it is granted on this chain
    refused(await world.login(session), LoginStatus.NO_ROLE)
    world.chain.mine(6)
    await world.look()
    assert isinstance(await world.login(session), Accept)


# --- bound keys ---


class Bound:
    """A key that Alice bound."""

    def __init__(self, world: World, name: bytes = b"k") -> None:
        self.world, self.key = world, Key.from_seed(name * 32)

    async def bind(
        self, person: Person = ALICE, seconds: int = DAY_S, role: bytes = MEMBER
    ) -> None:
        expiry = self.world.chain.chain.time + seconds
        self.world.send("bindKey", TEAM, [role], self.key.public, expiry, sender=person.address)
        await self.world.settle()

    async def login(self, account: bytes = b"") -> Any:
        challenge = self.world.challenge()
        proof = await BoundKeySigner(self.key, account).sign(challenge)
        return await self.world.backend.authenticate(challenge, proof)


async def test_a_bound_key_logs_in_as_itself(world: World) -> None:
    await world.grant(ALICE.address)
    await world.grant(ALICE.address, "editor", 0b1011)
    bound = Bound(world)
    refused(await bound.login(), LoginStatus.UNKNOWN_PRINCIPAL, "bound to no account")
    await bound.bind()
    result = await bound.login()
    assert result == Accept(
        world.backend.principal(ALICE.account, bound.key.public), frozenset({"member"})
    )
    assert result.principal.subject == f"31337:{ALICE.address}/{bound.key.peer_id}"
    assert await bound.login(ALICE.account) == result
    refused(await bound.login(BOB.account), LoginStatus.UNKNOWN_PRINCIPAL)


async def test_unbinding_a_key_ends_that_keys_sessions_alone(world: World) -> None:
    await world.grant(ALICE.address)
    one, two = Bound(world, b"1"), Bound(world, b"2")
    await one.bind()
    await two.bind()
    principals = [(await each.login()).principal for each in (one, two)]
    await world.logs_in(ALICE)
    world.send("unbindKey", TEAM, [MEMBER], ALICE.address, one.key.public, sender=ALICE.address)
    await world.look()
    assert withdrawn(world) == [(str(principals[0]), frozenset({"member"}))]
    refused(await one.login(), LoginStatus.UNKNOWN_PRINCIPAL)
    assert isinstance(await two.login(), Accept)
    # Unbound and bound again between two looks: another tenure.
    world.send("unbindKey", TEAM, [MEMBER], ALICE.address, two.key.public, sender=ALICE.address)
    await two.bind()
    assert withdrawn(world) == [(str(principals[1]), frozenset({"member"}))]


async def test_a_binding_expires(world: World) -> None:
    await world.grant(ALICE.address)
    bound = Bound(world)
    await bound.bind(seconds=100)
    principal = (await bound.login()).principal
    world.chain.clock.pass_s(100)
    world.backend._review(frozenset())
    assert withdrawn(world) == [(str(principal), frozenset({"member"}))]


async def test_a_key_of_two_accounts_says_for_which(world: World) -> None:
    bound = Bound(world)
    for person in (ALICE, BOB):
        await world.grant(person.address)
        await bound.bind(person)
    refused(await bound.login(), LoginStatus.UNKNOWN_PRINCIPAL, "several", "WW_ACCOUNT")
    for person in (ALICE, BOB):
        result = await bound.login(person.account)
        assert result.principal == world.backend.principal(person.account, bound.key.public)
    # The account is under the signature: whoever carries the answer cannot choose.
    challenge = world.challenge()
    answer = bound.key.sign(key_statement(challenge, ALICE.account))
    proof = KeyProof(bound.key.public, answer, BOB.account)
    result = await world.backend.authenticate(
        challenge, Proof(KEY_SCHEME, proof.encode(), challenge.signed_bytes())
    )
    refused(result, LoginStatus.BAD_SIGNATURE)


async def test_a_node_is_let_in_by_its_bound_key(world: World) -> None:
    node = Bound(world, b"n")
    peer, other = node.key.peer_id, Key.generate().peer_id
    assert not await world.backend.admit_node(peer)
    await world.grant(ALICE.address, "node")
    await node.bind(role=word("node"))
    assert await world.backend.admit_node(peer)
    assert not await world.backend.admit_node(other)
    hashed = PeerId.parse("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
    assert not await world.backend.admit_node(hashed)
    refused(await node.login(), LoginStatus.UNKNOWN_PRINCIPAL)  # a node is no user
    world.chain.clock.pass_s(61)  # nothing is known any more
    assert not await world.backend.admit_node(peer)
    await world.settle()
    world.send("revoke", TEAM, word("node"), ALICE.address)
    await world.look()
    assert not await world.backend.admit_node(peer)


# --- suspended and resumed ---


@pytest.fixture
async def three(chain: Net) -> AsyncIterator[list[Gateway]]:
    async with gateways(chain.chain.url) as each:
        yield each


@pytest.fixture
async def trio(chain: Net, three: list[Gateway], tmp_path: Path) -> AsyncIterator[World]:
    world = World(chain, tmp_path, endpoints=tuple(urls(three)), quorum=2)
    async with world as made:
        yield made


async def test_suspended_without_endpoints_and_resumed_without_what_went_meanwhile(
    trio: World, three: list[Gateway]
) -> None:
    for person in (ALICE, BOB):
        await trio.grant(person.address)
        await trio.logs_in(person)
    trio.events.clear()
    for gateway in three:
        gateway.status = 500
    await trio.look()
    assert trio.events == []  # within the bound
    trio.chain.clock.pass_s(61)
    await trio.look()
    (event,) = trio.events
    assert isinstance(event, Suspended)
    assert "no block was verified for 6" in event.reason
    trio.events.clear()
    session = trio.session_of(ALICE)
    refused(await trio.login(session), LoginStatus.BACKEND_UNAVAILABLE, "no block was verified")
    assert trio.backend.roles(trio.principal(ALICE)) == {"member"}  # as known last

    trio.chain.chain.time += 61
    trio.send("revoke", TEAM, MEMBER, BOB.address)
    for gateway in three:
        gateway.status = 200
    for endpoint in trio.backend.endpoints.each:
        endpoint._closed_until = 0.0
    await trio.look()
    gone, resumed = trio.events
    assert isinstance(gone, Withdrawn)
    assert gone.principal == trio.principal(BOB)
    assert isinstance(resumed, Resumed)
    assert isinstance(await trio.login(session), Accept)


async def test_what_expires_while_suspended_is_withdrawn_at_its_time(world: World) -> None:
    await world.grant(ALICE.address, seconds=100)
    await world.logs_in(ALICE)
    world.chain.clock.pass_s(70)
    world.backend._judge_fitness()
    assert [type(event) for event in world.events] == [Suspended]
    world.chain.clock.pass_s(40)
    world.backend._review(frozenset())
    assert [type(event) for event in world.events] == [Suspended, Withdrawn]


async def test_a_regression_suspends_until_an_operator_acts(world: World) -> None:
    await world.grant(ALICE.address)
    session = world.session_of(ALICE)
    await world.login(session)
    world.chain.reorg(3)
    world.chain.mine(1)
    await world.look()
    assert [type(event) for event in world.events] == [Suspended]
    refused(await world.login(session), LoginStatus.BACKEND_UNAVAILABLE, "was final")
    (finding, *_) = [f for f in world.backend.findings() if f.level == "error"]
    assert "was final" in finding.text
    assert "ww auth evm forget" in finding.remedy
    # Over a restart, too.
    await world.backend.endpoints.aclose()
    world.start()
    await world.look()
    refused(await world.login(session), LoginStatus.BACKEND_UNAVAILABLE, "was final")


# --- the backend's own tasks ---


async def run_until(world: World, condition: Any, within_s: float = 60.0) -> None:
    """Let the backend run until something holds."""
    ready = Started()
    task = asyncio.create_task(world.backend.run(task_status=ready))
    try:
        await until(ready.is_set, within_s)
        await until(condition, within_s)
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_the_backend_looks_by_itself(chain: Net, tmp_path: Path) -> None:
    world = World(chain, tmp_path, poll_s=0.05)
    world.send("grant", TEAM, MEMBER, ALICE.address, 0, chain.chain.time + DAY_S, 1)
    chain.mine(2)
    principal = world.principal(ALICE)
    world.backend._asked = True
    ready = Started()
    task = asyncio.create_task(world.backend.run(task_status=ready))
    try:
        await until(ready.is_set)
        assert [type(event) for event in world.events] == [Suspended, Resumed]
        world.events.clear()
        assert world.backend.roles(principal)
        await world.logs_in(ALICE)
        # Time alone: the clock's task sees it, without a look at the chain.
        chain.clock.pass_s(DAY_S)
        await until(lambda: {type(event) for event in world.events} == {Withdrawn, Suspended})
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_endpoints_that_are_down_do_not_stop_the_start(
    chain: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that knew the roles starts with them, suspended."""
    async with World(chain, tmp_path) as world:
        await world.grant(ALICE.address)
        await world.logs_in(ALICE)
        await keep(world)
    async with gateways(chain.chain.url, 1) as (gateway,):
        gateway.status = 503
        world.config = dataclasses.replace(world.config, endpoints=(gateway.url,), poll_s=0.05)
        world.start()
        principal = world.principal(ALICE)

        def back() -> bool:
            assert world.backend.roles(principal) == {"member"}  # what was shared is put back
            gateway.status = 200
            for endpoint in world.backend.endpoints.each:
                endpoint._closed_until = 0.0
            return any(isinstance(event, Resumed) for event in world.events)

        await run_until(world, back)
        assert isinstance(world.events[0], Suspended)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"chain_id": 7}, "the endpoints serve chain 31337, and 7 is configured"),
        ({"contract": ALICE.address}, "there is no contract at"),
        ({"genesis_hash": "0x" + "ab" * 32}, "another first block"),
    ],
)
async def test_another_chain_or_contract_stops_the_start(
    chain: Net, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    from wetware.errors import EXIT_CONFIG, ConfigError

    world = World(chain, tmp_path, **wrong)
    with pytest.raises(ConfigError, match=said) as caught:
        await world.backend.run(task_status=Started())
    assert caught.value.exit_code == EXIT_CONFIG
    assert "set" in caught.value.hint


async def test_the_first_block_is_kept_and_compared(chain: Net, tmp_path: Path) -> None:
    from wetware.errors import ConfigError
    from wetware_auth_evm.node.config import Public

    world = World(chain, tmp_path, poll_s=0.05)
    await run_until(world, lambda: True)
    first = bytes.fromhex(chain.chain.rpc("eth_getBlockByNumber", "0x0", False)["hash"][2:])
    assert Public.parse(await world.backend.join_document()).genesis_hash == first
    file = tmp_path / "auth_evm" / "chain.json"
    assert json.loads(file.read_text())["genesis_hash"] == first.hex()
    file.write_text(json.dumps({"chain_id": 31337, "genesis_hash": "ab" * 32}))
    with pytest.raises(ConfigError, match="another first block"):
        await world.start().run(task_status=Started())
    file.write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        world.start()


# --- over a restart ---


async def keep(world: World) -> None:
    """Write down who has had what since when, as the backend's own task does."""
    task = asyncio.create_task(world.backend.roster.run())
    file = world.directory / "auth_evm" / "principals.json"
    try:
        known = {principal.subject for principal in world.backend.roster._known}
        await until(lambda: file.exists() and set(json.loads(file.read_text())) == known)
    finally:
        task.cancel()


async def restarted(world: World) -> World:
    await keep(world)
    await world.backend.endpoints.aclose()
    world.start()
    return world


async def test_roles_are_as_they_were_after_a_restart(world: World) -> None:
    await world.grant(ALICE.address)
    await world.logs_in(ALICE)
    await restarted(world)
    # From the disk, before any look; and by the same account's name alone.
    assert world.backend.roles(world.principal(ALICE)) == {"member"}
    assert world.backend.roles(world.principal(BOB)) == frozenset()
    await world.grant(BOB.address)
    assert world.backend.roles(world.principal(BOB)) == frozenset()  # he shared nothing here
    await world.logs_in(ALICE)
    assert world.backend.roles(world.principal(BOB)) == {"member"}  # logins have begun


@pytest.mark.parametrize("how", ["revoke", "revokeAll", "narrow"])
async def test_what_was_revoked_and_granted_anew_while_the_node_was_down(
    world: World, how: str
) -> None:
    """What was shared under it must not come back."""
    await world.grant(ALICE.address)
    await world.grant(ALICE.address, "editor", 0b1011)
    await world.logs_in(ALICE, ("member", "editor"))
    await keep(world)
    await world.backend.endpoints.aclose()
    end = world.chain.chain.time + DAY_S
    match how:
        case "revoke":
            world.send("revoke", TEAM, MEMBER, ALICE.address)
            world.send("grant", TEAM, MEMBER, ALICE.address, 0, end, 1)
        case "revokeAll":
            world.send("revokeAll", ALICE.address)
            world.send("grant", TEAM, MEMBER, ALICE.address, 0, end, 1)
            world.send("grant", TEAM, EDITOR, ALICE.address, 0, end, 0b1011)
        case "narrow":
            world.send("grant", TEAM, MEMBER, ALICE.address, 0, end, 2)
    world.chain.mine(2)
    world.start()
    await world.look()
    expected = {"revoke": {"editor"}, "revokeAll": set(), "narrow": {"editor"}}[how]
    for _ in range(2):  # each share asks
        assert world.backend.roles(world.principal(ALICE)) == expected


async def test_without_the_file_nothing_that_was_shared_comes_back(world: World) -> None:
    await world.grant(ALICE.address)
    await world.logs_in(ALICE)
    await keep(world)
    file = world.directory / "auth_evm" / "principals.json"
    for text in (None, "{", '{"31337:x": 3}', '{"31337:x": [[1], {}]}'):
        file.unlink() if text is None else file.write_text(text)
        await world.backend.endpoints.aclose()
        world.start()
        await world.look()
        assert world.backend.roles(world.principal(ALICE)) == frozenset()
    await world.logs_in(ALICE)


async def test_principals_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from wetware_auth_evm.node import roster

    for person in (ALICE, BOB):
        await world.grant(person.address)
    monkeypatch.setattr(roster, "PRINCIPALS_MAX", 1)
    await world.logs_in(ALICE)
    result = await world.login(world.session_of(BOB))
    refused(result, LoginStatus.BACKEND_UNAVAILABLE, "PRINCIPALS_MAX")
    assert world.backend.roles(world.principal(BOB)) == frozenset()
    await world.logs_in(ALICE)


async def test_an_unknown_role_has_no_profile(world: World) -> None:
    for name in ("", "nobody", "member/", "member/0x", "member/0x01", "member/0xg", "editor/0x1g"):
        assert world.backend.profile(name) == RoleProfile(), name
