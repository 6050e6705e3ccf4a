"""Contract wallets (ERC-1271) and accounts with code (EIP-7702): strangers' code, on a chain."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from plugins.auth_evm.tests.chain.net import Gateway, Net, gateways, urls
from plugins.auth_evm.tests.login.contracts_of import deploy
from plugins.auth_evm.tests.login.world import ALICE, BOB, MALLORY, Person, World, refused

from wetware.hookspecs import Accept, Withdrawn
from wetware.identity import LoginStatus
from wetware_auth_evm.chain.addresses import checksum
from wetware_auth_evm.login import wallet_check
from wetware_auth_evm.login.proofs import SessionProof
from wetware_auth_evm.login.session import StoredSession

pytestmark = pytest.mark.anyio


async def wallet(world: World, name: str, types: tuple[str, ...] = (), *values: Any) -> bytes:
    """A contract that has the role `member`."""
    address = deploy(world.chain.chain, name, types, *values)
    world.chain.sync_clock()
    await world.grant(checksum(address))
    return address


async def owned(world: World, owner: Person = ALICE) -> bytes:
    return await wallet(world, "OwnersWallet", ("address",), owner.address)


def signed_by(
    world: World, account: bytes, person: Person, form: Any = "erc1271", **more: Any
) -> StoredSession:
    return world.session_of(person, account=account, form=form, **more)


def raw_call(function: str, types: str, *words: bytes) -> bytes:
    from eth_utils.crypto import keccak

    return keccak(f"{function}({types})".encode())[:4] + b"".join(w.rjust(32, b"\0") for w in words)


def set_owner(world: World, account: bytes, owner: Person, is_: bool) -> None:
    data = raw_call("setOwner", "address,bool", owner.account, bytes([is_]))
    world.chain.chain.send(checksum(account), data, BOB.address)
    world.chain.sync_clock()


def healthy(world: World) -> None:
    """What a wallet does is not held against an endpoint."""
    for endpoint in world.backend.endpoints.each:
        assert endpoint.available
        assert endpoint.failures == 0


@pytest.mark.parametrize("form", ["erc1271", "eip712", "eip4361"])
async def test_a_contract_wallet_logs_in_by_its_owner(world: World, form: str) -> None:
    account = await owned(world)
    session = signed_by(world, account, ALICE, form)
    result = await world.login(session)
    assert result == Accept(
        world.backend.principal(account), frozenset({"member"}), float(session.grant.expires_at)
    )
    refused(await world.login(signed_by(world, account, MALLORY, form)), LoginStatus.BAD_SIGNATURE)
    healthy(world)


async def test_a_wallet_that_loops(world: World) -> None:
    account = await wallet(world, "Loops")
    async with asyncio.timeout(60):
        result = await world.login(signed_by(world, account, MALLORY))
    refused(result, LoginStatus.BAD_SIGNATURE, "ERC-1271")
    healthy(world)


@pytest.mark.parametrize("gas", [500_000, 5_000_000])
async def test_a_wallet_that_returns_a_mebibyte(chain: Net, tmp_path: Path, gas: int) -> None:
    """With the usual gas it does not get so far; with more, the answer is not read to its end."""
    async with World(chain, tmp_path, wallet_gas_max=gas) as world:
        account = await wallet(world, "Answers", ("uint256",), 1 << 20)
        refused(await world.login(signed_by(world, account, MALLORY)), LoginStatus.BAD_SIGNATURE)
        healthy(world)
        await world.look()
        assert world.backend.replica.unfit() == ""


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("SaysNo", ()),
        ("AnswersANumber", ()),
        ("Answers", (0,)),
        ("Answers", (4,)),
        ("Answers", (31,)),
        ("Answers", (33,)),
        ("Answers", (64,)),
        ("Answers", (20_000,)),
        ("Reverts", (32,)),
        ("Reverts", (0,)),
        ("Reverts", (100_000,)),
    ],
)
async def test_a_wallet_that_does_not_say_yes(
    world: World, name: str, values: tuple[int, ...]
) -> None:
    account = await wallet(world, name, ("uint256",) * len(values), *values)
    refused(await world.login(signed_by(world, account, MALLORY)), LoginStatus.BAD_SIGNATURE)
    healthy(world)


async def test_exactly_the_word_is_yes(world: World) -> None:
    account = await wallet(world, "Answers", ("uint256",), 32)
    assert isinstance(await world.login(signed_by(world, account, MALLORY)), Accept)


async def test_a_wallet_that_says_yes_to_everything_is_only_its_own_account(world: World) -> None:
    await world.grant(ALICE.address)
    await world.grant(ALICE.address, "editor", 0b1011)
    account = await wallet(world, "SaysYes")
    session = signed_by(world, account, MALLORY, roles=("admin", "editor", "member"))
    result = await world.login(dataclasses.replace(session, signature=b"anything"))
    assert isinstance(result, Accept)
    assert result.principal == world.backend.principal(account)
    assert result.roles == {"member"}
    # Its word is worth nothing for anybody else.
    for form in ("erc1271", "eip712"):
        forged = world.session_of(MALLORY, account=ALICE.account, form=form)
        refused(await world.login(forged), LoginStatus.BAD_SIGNATURE)


async def test_a_wallet_that_is_not_there(world: World) -> None:
    await world.grant(ALICE.address)
    forged = world.session_of(MALLORY, account=ALICE.account, form="erc1271")
    refused(await world.login(forged), LoginStatus.BAD_SIGNATURE, "ERC-1271")


async def test_owners_that_rotate_end_the_live_session(world: World) -> None:
    account = await owned(world)
    assert isinstance(await world.login(signed_by(world, account, ALICE)), Accept)
    live = signed_by(world, account, ALICE)
    assert isinstance(await world.login(live), Accept)
    assert len(world.backend.wallets) == 2
    world.chain.clock.pass_s(30)
    world.chain.chain.time += 30
    await world.settle()
    await world.backend.wallets.recheck(world.backend.roster)
    assert world.events == []  # asked again, and still good

    set_owner(world, account, BOB, True)
    set_owner(world, account, ALICE, False)
    world.chain.chain.time += 30
    world.chain.mine(1)
    await world.look()
    await world.backend.wallets.recheck(world.backend.roster)
    (event, *_) = world.events
    assert isinstance(event, Withdrawn)
    assert event.principal == world.backend.principal(account)
    assert event.roles is None
    assert "no longer holds good" in event.reason
    assert len(world.backend.wallets) == 0
    world.chain.clock.pass_s(wallet_refusal_s())
    world.chain.chain.time += wallet_refusal_s()
    await world.settle()
    refused(await world.login(live), LoginStatus.BAD_SIGNATURE)
    assert isinstance(await world.login(signed_by(world, account, BOB)), Accept)


def wallet_refusal_s() -> int:
    from wetware_auth_evm.login.wallet_sessions import REFUSED_S

    return int(REFUSED_S) + 1


async def test_an_owner_is_out_at_first_sight_and_in_when_it_is_final(world: World) -> None:
    account = await owned(world)
    await world.settle()
    set_owner(world, account, BOB, True)
    set_owner(world, account, ALICE, False)
    await world.look()
    assert world.backend.replica.final_block[0] < world.backend.replica.tip_block[0] - 1
    refused(await world.login(signed_by(world, account, ALICE)), LoginStatus.BAD_SIGNATURE)
    bobs = signed_by(world, account, BOB)
    refused(await world.login(bobs), LoginStatus.BAD_SIGNATURE)
    world.chain.mine(4)
    world.chain.chain.time += wallet_refusal_s()
    world.chain.mine(1)
    await world.look()
    assert isinstance(await world.login(bobs), Accept)


async def test_a_wallet_whose_role_goes_is_not_asked_any_more(world: World) -> None:
    from plugins.auth_evm.tests.contract.people import word

    account = await owned(world)
    assert isinstance(await world.login(signed_by(world, account, ALICE)), Accept)
    world.send("revoke", word("team"), word("member"), checksum(account))
    await world.look()
    assert [type(event) for event in world.events] == [Withdrawn]
    await world.backend.wallets.recheck(world.backend.roster)
    assert len(world.backend.wallets) == 0


# --- accounts with code ---


def delegate(world: World, person: Person, to: bytes) -> None:
    """An EOA whose code is another contract's (EIP-7702)."""
    world.chain.chain.rpc("anvil_setCode", person.address, "0xef0100" + to.hex())
    assert world.chain.chain.code(person.address) == bytes.fromhex("ef0100") + to


@pytest.mark.parametrize("code", ["SaysNo", "Loops", "SaysYes"])
async def test_an_account_with_7702_code_still_logs_in_by_its_key(world: World, code: str) -> None:
    await world.grant(ALICE.address)
    delegate(world, ALICE, deploy(world.chain.chain, code))
    await world.settle()
    for form in ("eip712", "eip4361"):
        assert isinstance(await world.login(world.session_of(ALICE, form=form)), Accept)
    assert len(world.backend.wallets) == 0  # it rests on the key, and not on the code


async def test_nobody_else_gets_in_by_an_account_with_7702_code(world: World) -> None:
    await world.grant(ALICE.address)
    delegate(world, ALICE, deploy(world.chain.chain, "SaysNo"))
    await world.settle()
    for form in ("eip712", "eip4361", "erc1271"):
        forged = world.session_of(MALLORY, account=ALICE.account, form=form)
        refused(await world.login(forged), LoginStatus.BAD_SIGNATURE)


async def test_what_the_code_of_an_account_holds_good_is_asked_again(world: World) -> None:
    """By its own code an account may name others; that ends when the code does."""
    await world.grant(ALICE.address)
    code = deploy(world.chain.chain, "OwnersWallet", ("address",), BOB.address)
    delegate(world, ALICE, code)
    owner_slot = mapping_slot(BOB.account)
    world.chain.chain.forge(ALICE.address, owner_slot, 1)
    await world.settle()
    world.chain.mine(2)
    await world.look()
    bobs = world.session_of(BOB, account=ALICE.account)
    assert isinstance(await world.login(bobs), Accept)
    world.chain.chain.rpc("anvil_setCode", ALICE.address, "0x")
    world.chain.chain.time += 30
    world.chain.mine(1)
    await world.look()
    await world.backend.wallets.recheck(world.backend.roster)
    assert [type(event) for event in world.events] == [Withdrawn]


def mapping_slot(key: bytes) -> int:
    from eth_utils.crypto import keccak

    return int.from_bytes(keccak(key.rjust(32, b"\0") + bytes(32)), "big")


# --- endpoints ---


@pytest.fixture
async def three(chain: Net) -> AsyncIterator[list[Gateway]]:
    async with gateways(chain.chain.url) as each:
        yield each


@pytest.fixture
async def trio(chain: Net, three: list[Gateway], tmp_path: Path) -> AsyncIterator[World]:
    """A backend with three endpoints, two of which have to agree."""
    world = World(chain, tmp_path, endpoints=tuple(urls(three)), quorum=2, timeout_s=1.0)
    async with world as made:
        yield made


YES = "0x1626ba7e" + "0" * 56
NO = "0x" + "f" * 8 + "0" * 56


def says(word: str) -> Any:
    def twist(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_call" and "gas" in params[0]:
            answer.pop("error", None)
            answer["result"] = word

    return twist


async def test_one_endpoint_of_three_that_lies_about_a_wallet(
    trio: World, three: list[Gateway]
) -> None:
    account = await owned(trio)
    three[0].twist = says(YES)
    refused(await trio.login(signed_by(trio, account, MALLORY)), LoginStatus.BAD_SIGNATURE)
    three[0].twist = says(NO)
    assert isinstance(await trio.login(signed_by(trio, account, ALICE)), Accept)


async def test_two_endpoints_that_do_not_answer_about_a_wallet(
    trio: World, three: list[Gateway]
) -> None:
    account = await owned(trio)
    live = signed_by(trio, account, ALICE)
    assert isinstance(await trio.login(live), Accept)

    def silent(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_call" and "gas" in params[0]:
            answer.pop("result", None)
            answer["error"] = {"code": -32000, "message": "header not found"}

    three[0].twist = three[1].twist = silent
    result = await trio.login(live)
    refused(result, LoginStatus.BACKEND_UNAVAILABLE, "contract wallet")
    # An EOA is judged in memory.
    await trio.grant(BOB.address)
    assert isinstance(await trio.login(trio.session_of(BOB)), Accept)
    # A session is given the benefit of the doubt for a while, and no longer.
    for wanted in ([], [], [Withdrawn]):
        trio.chain.chain.time += 30
        trio.chain.mine(1)
        await trio.look()
        await trio.backend.wallets.recheck(trio.backend.roster)
        assert [type(event) for event in trio.events] == wanted
    assert "3 times in a row" in trio.events[0].reason  # type: ignore[union-attr]


async def test_a_wallet_is_asked_with_little_gas_at_blocks_by_hash(
    trio: World, three: list[Gateway]
) -> None:
    account = await owned(trio)
    asked: list[Any] = []

    def note(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_call" and "gas" in params[0]:
            asked.append(params)

    for gateway in three:
        gateway.twist = note
    assert isinstance(await trio.login(signed_by(trio, account, ALICE)), Accept)
    replica = trio.backend.replica
    blocks = {bytes.fromhex(params[1]["blockHash"][2:]) for params in asked}
    assert blocks == {replica.final_block[1], replica.tip_block[1]}
    assert {params[0]["gas"] for params in asked} == {hex(500_000)}


async def test_strangers_cannot_have_wallets_asked_all_day(
    trio: World, three: list[Gateway]
) -> None:
    account = await owned(trio)
    await trio.grant(ALICE.address)
    forged = signed_by(trio, account, MALLORY)
    nobody = [trio.session_of(MALLORY, account=ALICE.account) for _ in range(5)]

    async def calls(session: StoredSession) -> int:
        before = sum(gateway.asked.count("eth_call") for gateway in three)
        refused(await trio.login(session), LoginStatus.BAD_SIGNATURE)
        return sum(gateway.asked.count("eth_call") for gateway in three) - before

    assert await calls(forged) > 0
    assert await calls(forged) == 0  # remembered
    assert await calls(nobody[0]) > 0
    assert [await calls(session) for session in nobody] == [0] * 5  # it is known to be no contract
    stranger = trio.session_of(MALLORY)
    before = [len(gateway.asked) for gateway in three]
    refused(await trio.login(stranger), LoginStatus.NO_ROLE)
    assert [len(gateway.asked) for gateway in three] == before


async def test_checks_that_wait_are_bounded(
    trio: World, three: list[Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wallet_check, "WAITING_MAX", 6)
    account = await owned(trio)
    for gateway in three:
        gateway.hangs = True
    tries = [asyncio.create_task(trio.login(signed_by(trio, account, MALLORY))) for _ in range(10)]
    results = await asyncio.gather(*tries)
    reasons = [getattr(result, "reason", "") for result in results]
    assert sum("too many contract wallets" in reason for reason in reasons) == 4
    for result in results:
        refused(result, LoginStatus.BACKEND_UNAVAILABLE)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("out of gas", "bad"),
        ("EVM error OutOfGas", "bad"),
        ("EVM error MemoryOOG", "bad"),
        ("invalid opcode: INVALID", "bad"),
        ("stack underflow (0 <=> 1)", "bad"),
        ("header not found", "unknown"),
        ("missing trie node", "unknown"),
        ("project ID does not have access to archive state", "unknown"),
        ("rate limited", "unknown"),
    ],
)
async def test_what_endpoints_say_of_code_that_fails(
    trio: World, three: list[Gateway], said: str, word: str
) -> None:
    account = await owned(trio)

    def twist(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_call" and "gas" in params[0]:
            answer.pop("result", None)
            answer["error"] = {"code": -32000, "message": said}

    for gateway in three:
        gateway.twist = twist
    expected = {
        "bad": LoginStatus.BAD_SIGNATURE, "unknown": LoginStatus.BACKEND_UNAVAILABLE
    }[word]  # fmt: skip
    refused(await trio.login(signed_by(trio, account, ALICE)), expected)


def test_calldata_is_the_abis() -> None:
    from eth_abi.abi import encode
    from eth_utils.crypto import keccak

    for length in (0, 1, 31, 32, 33, 65, 1000):
        signature = bytes(range(256))[:length] or b"s" * length
        expected = keccak(b"isValidSignature(bytes32,bytes)")[:4] + encode(
            ["bytes32", "bytes"], [b"d" * 32, signature]
        )
        assert wallet_check.calldata(b"d" * 32, signature) == expected
    assert len(SessionProof.__slots__) == 4
