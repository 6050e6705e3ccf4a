"""The follower on a real chain: what is allowed when, and what a reorganisation does to it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from plugins.auth_evm.tests.chain.net import CODE_HASH, Net, gateways, net, raw
from plugins.auth_evm.tests.contract.chains import INSTALL, find_anvil
from plugins.auth_evm.tests.contract.people import (
    ADMIN,
    ALICE,
    ANY,
    BOB,
    CAROL,
    KEY,
    LAB,
    MEMBER,
    NODE,
    OWNER,
    ROOT,
    TEAM,
)

from wetware_auth_evm.chain.errors import ChainRegressed, NoQuorum, WrongChain
from wetware_auth_evm.chain.finality import Bounds, Finality
from wetware_auth_evm.chain.follower import Follower

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(find_anvil() is None, reason=f"anvil is not installed; run: {INSTALL}"),
]
ALICE_, BOB_, CAROL_ = raw(ALICE), raw(BOB), raw(CAROL)


def member(follower: Follower, account: bytes) -> int:
    return follower.replica.rights(MEMBER, account)


async def fit(follower: Follower) -> None:
    """One look, which has to succeed."""
    await follower.look()
    assert follower.replica.unfit() == ""
    assert follower.replica.fault == ""


async def test_a_grant_waits_for_finality_and_a_revocation_does_not(chain: Net) -> None:
    async with chain.follower() as follower:
        await fit(follower)
        chain.grant(ALICE, 3)
        await fit(follower)
        assert member(follower, ALICE_) == 0, "not final yet"
        chain.mine(1)
        await fit(follower)
        assert member(follower, ALICE_) == 0
        chain.mine(1)
        await fit(follower)
        assert member(follower, ALICE_) == 3
        chain.send("revoke", TEAM, MEMBER, ALICE)
        touched = await follower.look()
        assert touched == {ALICE_}
        assert member(follower, ALICE_) == 0, "at first sight"


async def test_the_history_is_read_at_the_start(chain: Net) -> None:
    """Grants, an admin, a bound key, an epoch: as the contract's own views answer."""
    chain.grant(ALICE, 7)
    chain.send("setAdmin", TEAM, ANY, ADMIN, chain.chain.time + 5000, 3)
    chain.grant(BOB, 2, sender=ADMIN, ttl_s=1000)
    chain.send("bindKey", TEAM, [MEMBER], KEY, chain.chain.time + 4000, sender=ALICE)
    chain.grant(CAROL, 1)
    chain.send("revokeAll", CAROL)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        replica = follower.replica
        assert replica.final.seq == replica.tip.seq == chain.acl.call("state")[0]
        assert [member(follower, who) for who in (ALICE_, BOB_, CAROL_)] == [7, 2, 0]
        assert replica.roles(ALICE_) == {MEMBER: 7}
        assert replica.key_roles(ALICE_, KEY) == {MEMBER: 7}
        assert replica.key_accounts(MEMBER, KEY) == {ALICE_: 7}
        assert replica.epochs(CAROL_) == chain.acl.call("epochs", TEAM, CAROL)
        assert replica.tip.owner == raw(OWNER)
        assert follower.status()["sizes"] == {"grants": 3, "admins": 1, "keys": 1}


async def test_unbinding_a_key_acts_at_once(chain: Net) -> None:
    chain.grant(ALICE, 1, role=NODE)
    chain.send("bindKey", TEAM, [NODE], KEY, chain.chain.time + 4000, sender=ALICE)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        assert follower.replica.key_accounts(NODE, KEY) == {ALICE_: 1}
        chain.send("unbindKey", TEAM, [NODE], ALICE, KEY, sender=ALICE)
        await fit(follower)
        assert follower.replica.key_accounts(NODE, KEY) == {}
        assert follower.replica.known_roles(ALICE_) == {NODE: 1}, "the account keeps its role"


async def test_pause_acts_at_once_and_unpause_waits(chain: Net) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        chain.send("pause")
        assert await follower.look() is None, "it concerns everybody"
        assert member(follower, ALICE_) == 0
        chain.send("unpause")
        chain.mine(1)
        await fit(follower)
        assert member(follower, ALICE_) == 0
        chain.mine(1)
        await fit(follower)
        assert member(follower, ALICE_) == 1


async def test_a_grant_after_a_revocation_waits_although_the_old_one_is_still_final(
    chain: Net,
) -> None:
    """Both states allow: the final one by the old grant, the newest by the new one."""
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        chain.send("revoke", TEAM, MEMBER, ALICE)
        chain.grant(ALICE)
        await fit(follower)
        assert follower.replica.final.rights(TEAM, MEMBER, ALICE_, chain.chain.time) == 1
        assert follower.replica.tip.rights(TEAM, MEMBER, ALICE_, chain.chain.time) == 1
        assert (member(follower, ALICE_), follower.replica.roles(ALICE_)) == (0, {})
        chain.mine(1)
        await fit(follower)
        assert member(follower, ALICE_) == 0
        chain.mine(1)
        await fit(follower)
        assert member(follower, ALICE_) == 1


async def test_a_pause_and_its_end_between_two_looks_wait_for_finality(chain: Net) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        chain.send("pause")
        chain.send("unpause")
        for _ in range(2):
            await fit(follower)
            assert member(follower, ALICE_) == 0
            chain.mine(1)
        await fit(follower)
        assert member(follower, ALICE_) == 1


async def test_a_reset_scope_spares_who_is_granted_again_only_when_that_is_final(
    chain: Net,
) -> None:
    """And those whose grants are in ROOT go on."""
    chain.grant(ALICE)
    chain.grant(BOB, scope=ROOT)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        chain.send("resetScope", TEAM)
        chain.grant(ALICE)
        await fit(follower)
        assert (member(follower, ALICE_), member(follower, BOB_)) == (0, 1)
        chain.mine(2)
        await fit(follower)
        assert (member(follower, ALICE_), member(follower, BOB_)) == (1, 1)


async def test_a_key_bound_again_after_it_was_unbound_waits(chain: Net) -> None:
    chain.grant(ALICE)
    chain.send("bindKey", TEAM, [MEMBER], KEY, chain.chain.time + 4000, sender=ALICE)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        chain.send("unbindKey", TEAM, [MEMBER], ALICE, KEY, sender=ALICE)
        chain.send("bindKey", TEAM, [MEMBER], KEY, chain.chain.time + 4000, sender=ALICE)
        await fit(follower)
        assert follower.replica.key_roles(ALICE_, KEY) == {}
        assert follower.replica.key_accounts(MEMBER, KEY) == {}
        assert member(follower, ALICE_) == 1
        chain.mine(2)
        await fit(follower)
        assert follower.replica.key_roles(ALICE_, KEY) == {MEMBER: 1}


async def test_a_narrowed_grant_acts_at_once_and_a_widened_one_waits(chain: Net) -> None:
    chain.grant(ALICE, 7)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        chain.grant(ALICE, 3)
        await fit(follower)
        assert member(follower, ALICE_) == 3
        chain.grant(ALICE, 7)
        await fit(follower)
        assert member(follower, ALICE_) == 3, "the wider one is not final yet"
        chain.mine(2)
        await fit(follower)
        assert member(follower, ALICE_) == 7


async def test_finality_by_depth(chain: Net) -> None:
    chain.grant(ALICE)
    chain.mine(4)
    async with chain.follower(finality=Finality("depth", 5)) as follower:
        await fit(follower)
        assert member(follower, ALICE_) == 0
        chain.mine(1)
        await fit(follower)
        assert member(follower, ALICE_) == 1
        assert follower.replica.final_block == chain.block(hex(chain.block("latest")[0] - 5))


async def test_the_newest_block_is_final_on_a_chain_of_ones_own(chain: Net) -> None:
    async with chain.follower(finality=Finality("latest")) as follower:
        chain.grant(ALICE)
        await fit(follower)
        assert member(follower, ALICE_) == 1


# --- reorganisations ----------------------------------------------------------------------------


async def test_a_reorg_takes_back_a_grant(chain: Net) -> None:
    async with chain.follower() as follower:
        await fit(follower)
        chain.grant(ALICE)
        await fit(follower)
        assert follower.replica.tip.rights(TEAM, MEMBER, ALICE_, chain.chain.time) == 1
        chain.reorg(1)
        touched = await follower.look()
        assert touched == {ALICE_}
        chain.mine(3)
        await fit(follower)
        assert member(follower, ALICE_) == 0
        assert follower.replica.held == {}, "a first grant withdraws nothing"


async def test_a_reorg_takes_back_a_revocation_and_it_holds_until_final() -> None:
    """Whoever was seen to be revoked is not let in again while the revocation may still come."""
    with net(final_blocks=4) as chain:
        chain.grant(ALICE)
        chain.grant(BOB)
        chain.mine(4)
        async with chain.follower() as follower:
            await fit(follower)
            chain.send("revoke", TEAM, MEMBER, ALICE)
            seen_at = chain.block("latest")[0]
            await fit(follower)
            assert member(follower, ALICE_) == 0
            chain.reorg(1)
            assert await follower.look() == {ALICE_}
            now = chain.chain.time
            assert follower.replica.tip.rights(TEAM, MEMBER, ALICE_, now) == 1, "the chain's word"
            assert member(follower, ALICE_) == 0, "held"
            assert follower.replica.known_roles(ALICE_) == {}
            assert member(follower, BOB_) == 1, "nobody else is"
            while chain.block("finalized")[0] < seen_at - 1:
                chain.mine(1)
                await fit(follower)
                assert member(follower, ALICE_) == 0
            chain.mine(1)
            await fit(follower)
            assert chain.block("finalized")[0] == seen_at
            assert member(follower, ALICE_) == 1, "it did not come again, and that is final"


async def test_a_revocation_that_comes_again_after_the_reorg() -> None:
    with net(final_blocks=4) as chain:
        chain.grant(ALICE)
        chain.mine(4)
        async with chain.follower() as follower:
            await fit(follower)
            chain.send("revoke", TEAM, MEMBER, ALICE)
            await fit(follower)
            chain.reorg(1)
            await fit(follower)
            chain.send("revoke", TEAM, MEMBER, ALICE)
            await fit(follower)
            chain.mine(6)
            await fit(follower)
            assert follower.replica.held == {}
            assert member(follower, ALICE_) == 0


async def test_a_revocation_that_moved_to_a_later_block_and_is_then_taken_back() -> None:
    """It holds until that block is final, not the one where it was seen first."""
    with net(final_blocks=8) as chain:
        chain.grant(ALICE)
        chain.mine(8)
        async with chain.follower() as follower:
            await fit(follower)
            chain.send("revoke", TEAM, MEMBER, ALICE)
            await fit(follower)
            chain.reorg(1)
            chain.mine(3)
            chain.send("revoke", TEAM, MEMBER, ALICE)  # the same event, four blocks later
            again_at = chain.block("latest")[0]
            await fit(follower)
            chain.reorg(1)
            await fit(follower)
            assert follower.replica.held == {ALICE_: again_at}


async def test_a_start_put_off_is_a_withdrawal(chain: Net) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        now = chain.chain.time
        chain.send("grant", TEAM, MEMBER, ALICE, now + 500, now + 5000, 1)
        chain.grant(ALICE)
        await fit(follower)
        assert member(follower, ALICE_) == 0
        chain.mine(2)
        await fit(follower)
        assert member(follower, ALICE_) == 1


async def test_a_withdrawal_is_held_although_the_step_that_saw_it_failed() -> None:
    """Seen at block N, the look then fails at finality: it holds until N is final, not N-1."""
    with net(final_blocks=4) as chain:
        chain.grant(ALICE)
        chain.mine(4)
        async with gateways(chain.chain.url, 1) as (gateway,), chain.follower([gateway.url]) as f:
            await fit(f)
            chain.mine(2)
            chain.send("revoke", TEAM, MEMBER, ALICE)
            seen_at = chain.block("latest")[0]

            def no_finality(method: str, params: list[object], answer: dict[str, object]) -> None:
                if params[:1] == ["finalized"]:
                    answer["result"] = None

            gateway.twist = no_finality
            await f.look()
            assert "finalized" in f.replica.fault
            assert member(f, ALICE_) == 0, "and it acts already"
            gateway.twist = None
            chain.reorg(1)
            await fit(f)
            assert f.replica.held == {ALICE_: seen_at}


async def test_a_pause_taken_back_holds_everybody() -> None:
    with net(final_blocks=4) as chain:
        chain.grant(ALICE)
        chain.mine(4)
        async with chain.follower() as follower:
            await fit(follower)
            chain.send("pause")
            await fit(follower)
            chain.reorg(1)
            assert await follower.look() is None
            assert (member(follower, ALICE_), list(follower.replica.held)) == (0, [None])
            chain.mine(4)
            await fit(follower)
            assert member(follower, ALICE_) == 1


@pytest.mark.parametrize("scope", [TEAM, LAB])
async def test_an_admin_removal_taken_back_holds_whom_it_may_concern(scope: bytes) -> None:
    """Those to whom it granted; nobody, if it was an admin of another scope."""
    with net(final_blocks=4) as chain:
        chain.grant(ALICE)
        chain.send("setAdmin", TEAM, MEMBER, ADMIN, chain.chain.time + 4000, 7)
        chain.grant(BOB, sender=ADMIN, ttl_s=1000)
        chain.send("setAdmin", scope, ANY, ADMIN, chain.chain.time + 5000, 7)
        if scope == TEAM:
            chain.send("setAdmin", TEAM, MEMBER, ADMIN, 0, 0)
            chain.grant(BOB, sender=ADMIN, ttl_s=1000)
        chain.mine(4)
        async with chain.follower() as follower:
            await fit(follower)
            chain.send("setAdmin", scope, ANY, ADMIN, chain.chain.time + 6000, 15)  # wider
            await fit(follower)
            chain.reorg(1)
            await fit(follower)
            assert member(follower, BOB_) == 1, "a wider record takes nothing away"
            chain.send("setAdmin", scope, ANY, ADMIN, 0, 0)
            await fit(follower)
            chain.reorg(1)
            await fit(follower)
            assert member(follower, ALICE_) == 1, "the owner granted it"
            assert member(follower, BOB_) == (0 if scope == TEAM else 1)


async def test_a_reorg_of_unrelated_blocks_changes_nothing(chain: Net) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        chain.reorg(1)
        assert await follower.look() == frozenset()
        assert member(follower, ALICE_) == 1
        assert follower.replica.regressed == ""


async def test_a_reorg_below_finalized_is_refused_until_an_operator_acts(
    chain: Net, tmp_path: Path
) -> None:
    """Also by a restarted node; and `ask_to_forget` is how the operator acts."""
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(directory=tmp_path) as follower:
        await fit(follower)
        assert member(follower, ALICE_) == 1
        chain.reorg(3)  # the grant, too
        assert await follower.look() is None
        assert "was final" in follower.replica.unfit()
        assert member(follower, ALICE_) == 0
        chain.mine(5)
        await follower.look()
        assert "was final" in follower.replica.unfit(), "time does not heal it"
    async with chain.follower(directory=tmp_path) as follower:
        assert "was final" in follower.replica.regressed
        await follower.look()
        assert "was final" in follower.replica.unfit()
        chain.grant(BOB)
        chain.mine(2)
        assert follower._history is not None
        follower._history.ask_to_forget()
        await fit(follower)  # while it runs
        assert (member(follower, ALICE_), member(follower, BOB_)) == (0, 1)
    async with chain.follower(directory=tmp_path) as follower:
        assert follower.replica.regressed == ""
        await fit(follower)
        assert (member(follower, ALICE_), member(follower, BOB_)) == (0, 1)


async def test_a_stopped_node_forgets_at_its_start(chain: Net, tmp_path: Path) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(directory=tmp_path) as follower:
        await fit(follower)
        chain.reorg(3)
        await follower.look()
        assert follower._history is not None
        history = follower._history
        assert (status := history.status()) is not None
        assert "was final" in status["regressed"]
    history.ask_to_forget()
    async with chain.follower(directory=tmp_path) as follower:
        assert (follower.replica.regressed, follower.replica.final.seq) == ("", 0)
        await fit(follower)
    assert not history.forget_asked()


async def test_a_reorg_that_takes_back_the_contract_itself(chain: Net) -> None:
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        chain.reorg(3)
        assert await follower.look() is None
        assert "was final" in follower.replica.regressed


async def test_a_reorg_below_finalized_without_any_event_is_found(chain: Net) -> None:
    chain.mine(4)
    async with chain.follower() as follower:
        await fit(follower)
        chain.reorg(3)
        chain.mine(1)
        with pytest.raises(ChainRegressed, match="was final"):
            await follower.step()


async def test_a_reorg_of_a_chain_whose_newest_block_is_final_is_refused(chain: Net) -> None:
    async with chain.follower(finality=Finality("latest")) as follower:
        await fit(follower)
        chain.reorg(1)
        await follower.look()
        assert "was final" in follower.replica.unfit()


# --- restart ------------------------------------------------------------------------------------


async def test_a_restart_goes_on_where_it_stopped(chain: Net, tmp_path: Path) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    chain.grant(BOB)
    async with chain.follower(directory=tmp_path) as follower:
        await fit(follower)
        seq = follower.replica.final.seq
    chain.mine(2)
    async with (
        gateways(chain.chain.url, 1) as (gateway,),
        chain.follower([gateway.url], directory=tmp_path) as follower,
    ):
        assert follower.replica.final.seq == seq
        assert follower.replica.unfit() != "", "nothing is allowed before a block is verified"
        assert member(follower, ALICE_) == 0
        assert follower.replica.known_roles(ALICE_) == {MEMBER: 1}
        await fit(follower)
        assert (member(follower, ALICE_), member(follower, BOB_)) == (1, 1)
        assert "eth_getLogs" not in gateway.asked, "nothing happened since"


async def test_a_held_withdrawal_outlives_a_restart(tmp_path: Path) -> None:
    with net(final_blocks=4) as chain:
        chain.grant(ALICE)
        chain.mine(4)
        async with chain.follower(directory=tmp_path) as follower:
            await fit(follower)
            chain.send("revoke", TEAM, MEMBER, ALICE)
            await fit(follower)
            chain.reorg(1)
            await fit(follower)
        async with chain.follower(directory=tmp_path) as follower:
            await fit(follower)
            assert member(follower, ALICE_) == 0
            chain.mine(4)
            await fit(follower)
            assert member(follower, ALICE_) == 1


async def test_a_withdrawal_taken_back_while_the_node_was_down_is_held(tmp_path: Path) -> None:
    with net(final_blocks=4) as chain:
        chain.grant(ALICE)
        chain.mine(4)
        async with chain.follower(directory=tmp_path) as follower:
            await fit(follower)
            chain.send("revoke", TEAM, MEMBER, ALICE)
            await fit(follower)
        chain.reorg(1)
        async with chain.follower(directory=tmp_path) as follower:
            await fit(follower)
            assert (member(follower, ALICE_), list(follower.replica.held)) == (0, [ALICE_])


async def test_a_regression_while_the_node_was_down_is_noticed(chain: Net, tmp_path: Path) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(directory=tmp_path) as follower:
        await fit(follower)
    chain.reorg(3)
    chain.mine(4)
    async with chain.follower(directory=tmp_path) as follower:
        assert await follower.look() is None
        assert "was final" in follower.replica.unfit()


async def test_a_restarted_chain_that_lost_its_newest_blocks(tmp_path: Path) -> None:
    """anvil with --state: back at an older state it is behind, and a regression once it is not."""
    state, kept = tmp_path / "chain.json", tmp_path / "old.json"
    options = ("--state", str(state))
    with net(args=options) as chain:
        chain.grant(ALICE)
        chain.mine(2)
        acl, at = chain.acl, chain.chain.time
    kept.write_bytes(state.read_bytes())  # written when it ended
    with net(args=options, deployed=acl, time=at) as chain:
        chain.mine(4)
        async with chain.follower(directory=tmp_path / "node") as follower:
            await fit(follower)
            assert member(follower, ALICE_) == 1, "a restarted chain is the same chain"
    state.write_bytes(kept.read_bytes())
    with net(args=options, deployed=acl, time=at + 100) as chain:
        async with chain.follower(directory=tmp_path / "node") as follower:
            await follower.look()
            assert "was final before" in follower.replica.unfit()
            assert follower.replica.regressed == "", "an endpoint may just be behind"
            chain.mine(6)
            await follower.look()
            assert "another one in its place" in follower.replica.regressed


# --- the wrong chain ----------------------------------------------------------------------------


async def test_wrong_chain_id_is_refused(chain: Net) -> None:
    async with chain.follower() as follower:
        follower.replica.chain_id = 1
        with pytest.raises(WrongChain, match="serve chain 31337, and 1 is configured"):
            await follower.identify()


async def test_wrong_genesis_is_refused(chain: Net) -> None:
    async with chain.follower(genesis_hash=chain.block("0x0")[1]) as follower:
        await follower.identify()
    async with chain.follower(genesis_hash=bytes(32)) as follower:
        with pytest.raises(WrongChain, match="another first block"):
            await follower.identify()
        await follower.look()
        assert "another first block" in follower.replica.unfit()


async def test_wrong_code_is_refused(chain: Net) -> None:
    async with chain.follower(code_hash=bytes(32)) as follower:
        with pytest.raises(WrongChain, match="another contract than WetwareACL"):
            await follower.identify()
    chain.contract = b"\1" * 20
    async with chain.follower(code_hash=CODE_HASH) as follower:
        with pytest.raises(WrongChain, match="no contract") as caught:
            await follower.identify()
        assert "ww auth evm deploy" in caught.value.hint


# --- time ---------------------------------------------------------------------------------------


async def test_suspended_when_nothing_is_verified_and_resumed_after(chain: Net) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    bounds = Bounds(verified_s_max=30.0, tip_age_s_max=None)
    async with (
        gateways(chain.chain.url, 1) as (gateway,),
        chain.follower([gateway.url], bounds=bounds) as follower,
    ):
        await fit(follower)
        await gateway.stop()
        chain.clock.pass_s(29.0)
        await follower.look()
        assert (follower.replica.unfit(), member(follower, ALICE_)) == ("", 1)
        assert 0.9 < follower.replica.fit_for_s() < 1.1
        chain.clock.pass_s(2.0)
        assert "no block was verified for 31 s" in follower.replica.unfit()
        assert (member(follower, ALICE_), follower.replica.roles(ALICE_)) == (0, {})
        assert follower.replica.fit_for_s() == 0
        await gateway.start()
        await fit(follower)
        assert member(follower, ALICE_) == 1


async def test_a_machine_that_slept_verifies_before_it_allows(chain: Net) -> None:
    """The steady clock stands still in a suspended machine: the wall clock counts, too."""
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(bounds=Bounds(30.0, None, None)) as follower:
        await fit(follower)
        chain.clock.wall_s += 3600
        assert "no block was verified for 3600 s" in follower.replica.unfit()
        await fit(follower)
        assert member(follower, ALICE_) == 1


async def test_a_frozen_chain_is_too_old(chain: Net) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        for _ in range(10):
            chain.clock.pass_s(13.0)
            await follower.look()
        assert "the newest block is 13" in follower.replica.unfit()
        assert member(follower, ALICE_) == 0
        chain.chain.time = int(chain.clock.wall_s)
        chain.mine(1)
        await fit(follower)
        assert member(follower, ALICE_) == 1


async def test_a_slow_clock_is_found_out(chain: Net) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower() as follower:
        chain.clock.wall_s -= 100
        await follower.look()
        assert "this clock is slow" in follower.replica.unfit()
        assert member(follower, ALICE_) == 0


async def test_a_clock_a_little_slow_does_not_lengthen_a_right(chain: Net) -> None:
    """Records are judged by the later of the two clocks."""
    end = chain.chain.time + 40
    chain.send("grant", TEAM, MEMBER, ALICE, 0, end, 1)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        assert member(follower, ALICE_) == 1
        assert follower.replica.next_end(ALICE_) == end
        chain.chain.time = end
        chain.mine(1)
        chain.clock.wall_s = end - 50
        await fit(follower)
        assert member(follower, ALICE_) == 0


async def test_a_right_ends_and_begins_between_two_blocks(chain: Net) -> None:
    now = chain.chain.time
    chain.send("grant", TEAM, MEMBER, ALICE, 0, now + 20, 1)
    chain.send("grant", TEAM, MEMBER, BOB, now + 20, now + 50, 1)
    chain.mine(2)
    async with chain.follower() as follower:
        await fit(follower)
        assert (member(follower, ALICE_), member(follower, BOB_)) == (1, 0)
        assert follower.replica.next_end(ALICE_) == follower.replica.next_end(BOB_) == now + 20
        chain.clock.wall_s = now + 20
        assert (member(follower, ALICE_), member(follower, BOB_)) == (0, 1)


async def test_run_tells_of_each_look_and_can_be_woken(chain: Net) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(poll_s=60.0) as follower:
        told: asyncio.Queue[frozenset[bytes] | None] = asyncio.Queue()
        task = asyncio.create_task(follower.run(told.put_nowait))
        try:
            async with asyncio.timeout(60):
                assert await told.get() == {ALICE_, raw(OWNER)}
                chain.send("revoke", TEAM, MEMBER, ALICE)
                follower.wake()
                assert await told.get() == {ALICE_}
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_shorter_chain_than_the_final_one_is_no_news(chain: Net) -> None:
    chain.mine(4)
    snapshot = chain.chain.rpc("evm_snapshot")
    chain.mine(4)
    async with chain.follower() as follower:
        await fit(follower)
        chain.chain.rpc("evm_revert", snapshot)
        with pytest.raises(NoQuorum, match="was final before"):
            await follower.step()
