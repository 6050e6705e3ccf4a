"""Endpoints that lie, freeze, hang, die and talk nonsense, one of three and two of three."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from plugins.auth_evm.tests.chain.net import Freeze, Gateway, Net, raw, urls
from plugins.auth_evm.tests.contract.chains import INSTALL, calldata, find_anvil
from plugins.auth_evm.tests.contract.people import ALICE, BOB, MEMBER, OWNER, TEAM

from wetware.errors import ConfigError
from wetware_auth_evm.chain import endpoints as module
from wetware_auth_evm.chain.addresses import checksum
from wetware_auth_evm.chain.endpoints import (
    FAILURES_MAX,
    LATE_MAX,
    Block,
    Endpoint,
    Endpoints,
    data,
    fixed,
    quantity,
)
from wetware_auth_evm.chain.errors import EndpointFailed, EndpointUnavailable, NoQuorum
from wetware_auth_evm.chain.follower import STATE_CALL, Follower

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(find_anvil() is None, reason=f"anvil is not installed; run: {INSTALL}"),
]
ALICE_, BOB_ = raw(ALICE), raw(BOB)
Answer = dict[str, Any]
Each = list[Gateway]


def member(follower: Follower, account: bytes) -> int:
    return follower.replica.rights(MEMBER, account)


async def fit(follower: Follower) -> None:
    await follower.look()
    assert (follower.replica.unfit(), follower.replica.fault) == ("", "")


def on_logs(change: Callable[[list[Any]], object]) -> Callable[[str, list[Any], Answer], None]:
    """A lie about the logs, by an endpoint that is honest about the rest."""

    def twist(method: str, params: list[Any], answer: Answer) -> None:
        if method == "eth_getLogs":
            change(answer["result"])

    return twist


def prefer(follower: Follower, gateway: Gateway) -> None:
    """Let its logs be asked for first."""
    for endpoint in follower.endpoints.each:
        endpoint.dissents = 0 if endpoint.name == gateway.url else 1


# --- logs that lie: the hash of the history finds them out --------------------------------------


def _forge(logs: list[Any]) -> None:
    """Alice's mask in place of 1."""
    body = logs[-1]["data"]
    logs[-1]["data"] = body[: 2 + 64 * 3] + f"{255:064x}" + body[2 + 64 * 4 :]


def _insert(logs: list[Any]) -> None:
    """One event more, in the place of the last one."""
    logs.insert(-1, json.loads(json.dumps(logs[-1])))
    logs[-2]["data"] = "0x" + "0" * (len(logs[-2]["data"]) - 2)
    logs[-1]["topics"][1] = f"0x{int(logs[-1]['topics'][1], 16) + 1:064x}"


def _renumber(logs: list[Any]) -> None:
    """The same two events, as if they had come in the other order."""
    logs[-1]["topics"][1], logs[-2]["topics"][1] = logs[-2]["topics"][1], logs[-1]["topics"][1]


def _other_contract(logs: list[Any]) -> None:
    logs[0]["address"] = "0x" + "11" * 20


LIES: dict[str, Callable[[list[Any]], object]] = {
    "dropped_last": lambda logs: logs.pop(),
    "dropped_first": lambda logs: logs.pop(0),
    "dropped_all": lambda logs: logs.clear(),
    "forged": _forge,
    "inserted": _insert,
    "reordered": _renumber,
    "twice": lambda logs: logs.append(logs[-1]),
    "other_contract": _other_contract,
    "removed": lambda logs: logs[-1].update(removed=True),
    "malformed": lambda logs: logs.append({"address": 7}),
    "no_logs_at_all": lambda logs: logs.append("x"),
    "odd_hex": lambda logs: logs[-1].update(data=logs[-1]["data"][:-1]),
}


@pytest.mark.parametrize("lie", LIES)
async def test_logs_that_lie_are_found_out_and_another_endpoint_is_asked(
    chain: Net, three: Each, lie: str
) -> None:
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        chain.grant(ALICE)
        chain.send("revoke", TEAM, MEMBER, ALICE)
        chain.grant(BOB)
        chain.grant(ALICE, 1)
        chain.mine(2)
        three[0].twist = on_logs(LIES[lie])
        prefer(follower, three[0])
        await fit(follower)
        assert "eth_getLogs" in three[0].asked
        assert (follower.lies, follower.endpoints.each[0].dissents) == (1, 1)
        assert (member(follower, ALICE_), member(follower, BOB_)) == (1, 1)
        assert follower.replica.tip.seq == chain.acl.call("state")[0]


@pytest.mark.parametrize("lie", LIES)
async def test_logs_that_lie_at_every_endpoint_change_nothing(
    chain: Net, three: Each, lie: str
) -> None:
    """A revocation that is hidden everywhere: not seen, and nothing is allowed for long."""
    chain.grant(ALICE)
    chain.grant(BOB)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        before = (follower.replica.tip.seq, follower.replica.tip.head)
        for gateway in three:
            gateway.twist = on_logs(LIES[lie])
        chain.grant(BOB, 1)
        chain.send("revoke", TEAM, MEMBER, ALICE)
        await follower.look()
        assert follower.replica.fault
        assert (follower.replica.tip.seq, follower.replica.tip.head) == before
        assert follower.replica.regressed == ""
        chain.clock.pass_s(31)
        assert "no block was verified" in follower.replica.unfit()
        assert member(follower, BOB_) == 0
        for gateway in three:
            gateway.twist = None
        await fit(follower)
        assert (member(follower, ALICE_), member(follower, BOB_)) == (0, 1)


async def test_logs_in_another_order_are_the_same_logs(chain: Net, three: Each) -> None:
    chain.grant(ALICE)
    chain.grant(BOB)
    chain.mine(2)
    for gateway in three:
        gateway.twist = on_logs(lambda logs: logs.reverse())
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        assert (member(follower, ALICE_), member(follower, BOB_)) == (1, 1)


async def test_a_liar_that_gives_half_of_the_logs_cannot_block_the_honest(
    chain: Net, three: Each, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gave is read on by the next one, found to be a lie, and read again."""
    monkeypatch.setattr(module, "RANGE_BLOCKS_MAX", 2)
    for _ in range(3):
        chain.grant(ALICE)
    chain.mine(2)
    asked = 0

    def twist(method: str, params: list[Any], answer: Answer) -> None:
        nonlocal asked
        if method != "eth_getLogs":
            return
        asked += 1
        if asked == 1:
            _insert(answer["result"])
        else:
            del answer["result"]
            answer["error"] = {"code": -32000, "message": "no"}

    three[0].twist = twist
    async with chain.follower(urls(three)) as follower:
        prefer(follower, three[0])
        follower._identified = True
        await fit(follower)
        assert asked > 1
        assert member(follower, ALICE_) == 1


async def test_a_long_history_survives_endpoints_that_fail_in_the_middle(
    chain: Net, three: Each, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RANGE_BLOCKS_MAX", 1)
    for _ in range(6):
        chain.grant(ALICE)
    chain.mine(2)
    asked: list[str] = []

    async def one_of_two(method: str, params: list[Any], answer: Answer) -> None:
        if method == "eth_getLogs":
            asked.append(params[0]["fromBlock"])
            if len(asked) % 2 == 0:
                answer.pop("result")

    three[0].twist = one_of_two
    async with chain.follower([three[0].url]) as follower:
        for _ in range(12):
            await follower.look()
            if not follower.replica.fault:
                break
        assert member(follower, ALICE_) == 1
        assert follower.lies == 0
        assert asked[0] == "0x0"
        assert len(set(asked)) == chain.block("latest")[0] + 1, "every block"
        assert asked.count("0x0") == 1, "and none twice but where it failed"


async def test_too_wide_a_range_is_halved(chain: Net, three: Each) -> None:
    """As an error in HTTP 200, as an error in HTTP 400, and as an answer that is too long."""
    for _ in range(4):
        chain.grant(ALICE)
    chain.mine(6)

    def too_wide(method: str, params: list[Any], answer: Answer) -> None:
        if method == "eth_getLogs":
            width = int(params[0]["toBlock"], 16) - int(params[0]["fromBlock"], 16) + 1
            if width > 3:
                del answer["result"]
                answer["error"] = {"code": -32005, "message": "query returned too much"}

    three[0].twist = too_wide
    async with chain.follower([three[0].url]) as follower:
        await fit(follower)
        assert member(follower, ALICE_) == 1
        assert follower.endpoints.each[0].failures == 0


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_an_error_with_a_status_of_its_own_is_a_refusal(three: Each, status: int) -> None:
    three[0].status = status
    three[0].body = b'{"jsonrpc":"2.0","id":null,"error":{"code":-32602,"message":"range"}}'
    endpoint = Endpoint(three[0].url, timeout_s=5.0)
    try:
        for _ in range(FAILURES_MAX + 1):
            with pytest.raises(EndpointFailed, match="range") as caught:
                await endpoint.call("eth_getLogs")
            assert caught.value.code == module.REFUSED
        assert endpoint.available
    finally:
        await endpoint.aclose()


# --- old state, and state that is a lie ---------------------------------------------------------


def state_at(chain: Net) -> str:
    answer: str = chain.chain.rpc(
        "eth_call", {"to": chain.acl.address, "data": "0x" + calldata("state").hex()}, "latest"
    )
    return answer


def old_state(answer_: str) -> Callable[[str, list[Any], Answer], None]:
    def twist(method: str, params: list[Any], answer: Answer) -> None:
        if method == "eth_call" and params[0]["data"] == STATE_CALL:
            answer["result"] = answer_

    return twist


async def test_old_state_served_by_one_of_three(chain: Net, three: Each) -> None:
    """The revocation is hidden at one: it acts all the same."""
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        three[0].twist = old_state(state_at(chain))
        chain.send("revoke", TEAM, MEMBER, ALICE)
        await fit(follower)
        assert member(follower, ALICE_) == 0


async def test_old_state_served_by_two_of_three_that_differ(chain: Net, three: Each) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        three[0].twist = old_state(state_at(chain))
        chain.grant(BOB)
        await fit(follower)
        three[1].twist = old_state(state_at(chain))
        chain.send("revoke", TEAM, MEMBER, ALICE)
        await follower.look()
        assert "contradict each other about eth_call" in follower.replica.fault
        chain.clock.pass_s(31)
        assert follower.replica.unfit()
        assert member(follower, ALICE_) == 0


async def test_the_same_lie_at_two_of_three_is_beyond_a_quorum_of_two(
    chain: Net, three: Each
) -> None:
    """The stated limit of the trust model: endpoints that collude in a quorum are believed.

    A quorum of three refuses. And a withdrawal once seen is not undone by old state: it is held.
    """
    chain.grant(ALICE)
    chain.mine(2)
    old = old_state(state_at(chain))
    async with (
        chain.follower(urls(three), quorum=2) as seeing,
        chain.follower(urls(three), quorum=2) as two,
        chain.follower(urls(three), quorum=3) as all_three,
    ):
        for follower in (seeing, two, all_three):
            await fit(follower)
        chain.send("revoke", TEAM, MEMBER, ALICE)
        await fit(seeing)
        three[0].twist = three[1].twist = old
        for follower in (seeing, two, all_three):
            chain.mine(1)
            await follower.look()
        assert member(two, ALICE_) == 1, "believed"
        assert member(seeing, ALICE_) == 0, "held"
        assert "contradict each other" in all_three.replica.fault
        chain.clock.pass_s(31)
        assert member(all_three, ALICE_) == 0


async def test_forged_state_without_logs_that_lead_there(chain: Net, three: Each) -> None:
    """Even a quorum cannot state a head that no logs lead to."""
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        words = bytearray.fromhex(state_at(chain)[2:])
        words[31] += 1
        words[32:64] = b"\xee" * 32
        for gateway in three:
            gateway.twist = old_state("0x" + words.hex())
        chain.mine(1)
        await follower.look()
        assert "the logs end at event" in follower.replica.fault
        assert member(follower, ALICE_) == 1, "what was verified last holds, within its bound"


async def test_a_contract_that_is_suddenly_not_there_is_no_new_beginning(
    chain: Net, three: Each
) -> None:
    """An endpoint without the state answers 0x: that is not taken as an empty contract."""
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        for gateway in three:
            gateway.twist = old_state("0x")
        chain.mine(1)
        await follower.look()
        assert "do not have the contract's state" in follower.replica.fault
        assert follower.replica.regressed == ""


# --- blocks -------------------------------------------------------------------------------------


async def test_one_frozen_endpoint_of_three_holds_nobody_up(chain: Net, three: Each) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        three[0].twist = Freeze(chain.chain)
        chain.send("revoke", TEAM, MEMBER, ALICE)
        chain.grant(BOB)
        chain.mine(2)
        await fit(follower)
        assert follower.replica.tip_block == chain.block("latest")
        assert follower.replica.final_block == chain.block("finalized")
        assert (member(follower, ALICE_), member(follower, BOB_)) == (0, 1)


async def test_two_frozen_endpoints_of_three_are_found_out_by_the_age_of_their_block(
    chain: Net, three: Each
) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        three[0].twist = three[1].twist = Freeze(chain.chain)
        chain.send("revoke", TEAM, MEMBER, ALICE)
        for _ in range(13):
            chain.chain.time += 10
            chain.mine(1)
            await follower.look()
        assert "the newest block is" in follower.replica.unfit()
        assert member(follower, ALICE_) == 0
        three[0].twist = None
        await fit(follower)
        assert member(follower, ALICE_) == 0


async def test_a_frozen_endpoint_and_a_liar_about_time(chain: Net, three: Each) -> None:
    """An old block with its true hash and a fresh time: the time needs a quorum, too."""
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        frozen = Freeze(chain.chain)

        def fresh(method: str, params: list[Any], answer: Answer) -> None:
            frozen(method, params, answer)
            if method == "eth_getBlockByNumber" and isinstance(answer.get("result"), dict):
                answer["result"] = {**answer["result"], "timestamp": hex(chain.chain.time)}

        three[0].twist, three[1].twist, three[2].hangs = fresh, frozen, True
        follower.endpoints.each[2]._timeout_s = 0.2
        chain.send("revoke", TEAM, MEMBER, ALICE)
        for _ in range(13):
            chain.chain.time += 10
            chain.mine(1)
            await follower.look()
        assert follower.replica.unfit()
        assert member(follower, ALICE_) == 0


async def test_a_block_far_in_the_future_claimed_by_one(chain: Net, three: Each) -> None:
    def far(method: str, params: list[Any], answer: Answer) -> None:
        if method == "eth_getBlockByNumber" and params[0] in ("latest", "finalized"):
            answer["result"]["number"] = hex(2**60)

    three[0].twist = far
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        assert follower.replica.tip_block == chain.block("latest")
        assert follower.replica.final_block == chain.block("finalized")


async def test_a_block_that_is_not_final_claimed_to_be_by_one(chain: Net, three: Each) -> None:
    def early(method: str, params: list[Any], answer: Answer) -> None:
        if params[:1] == ["finalized"]:
            answer["result"] = chain.chain.rpc("eth_getBlockByNumber", "latest", False)

    three[0].twist = early
    async with chain.follower(urls(three)) as follower:
        chain.grant(ALICE)
        await fit(follower)
        assert member(follower, ALICE_) == 0
        assert follower.replica.final_block == chain.block("finalized")


async def test_a_forged_block_hash_at_one_and_at_two(chain: Net, three: Each) -> None:
    def forged(method: str, params: list[Any], answer: Answer) -> None:
        if method == "eth_getBlockByNumber":
            answer["result"]["hash"] = "0x" + "ab" * 32

    def forged_too(method: str, params: list[Any], answer: Answer) -> None:
        if method == "eth_getBlockByNumber":
            answer["result"]["hash"] = "0x" + "cd" * 32

    async with chain.follower(urls(three)) as follower:
        three[0].twist = forged
        await fit(follower)
        assert follower.replica.tip_block == chain.block("latest")
        three[1].twist = forged_too
        chain.mine(1)
        await follower.look()
        assert "contradict each other about eth_getBlockByNumber" in follower.replica.fault


async def test_another_chain_at_one_of_three(chain: Net, three: Each) -> None:
    from plugins.auth_evm.tests.chain.net import net

    chain.grant(ALICE)
    chain.mine(2)
    with net(chain_id=5) as other:
        three[2].upstream = other.chain.url
        async with chain.follower(urls(three), genesis_hash=chain.block("0x0")[1]) as follower:
            await fit(follower)
            assert member(follower, ALICE_) == 1


# --- endpoints that do not answer ---------------------------------------------------------------


def dead_body(gateway: Gateway) -> None:
    gateway.body = b"<html>502</html>"


FAULTS: dict[str, Callable[[Gateway], object]] = {
    "hangs": lambda g: setattr(g, "hangs", True),
    "http_500": lambda g: setattr(g, "status", 500),
    "http_429": lambda g: setattr(g, "status", 429),
    "error_in_200": lambda g: setattr(
        g, "body", b'{"jsonrpc":"2.0","id":1,"error":{"code":-32000,"message":"overloaded"}}'
    ),
    "text_in_200": lambda g: setattr(g, "body", b"Too many requests"),
    "html_in_200": dead_body,
    "empty_200": lambda g: setattr(g, "body", b""),
    "list": lambda g: setattr(g, "body", b"[]"),
    "no_result": lambda g: setattr(g, "body", b'{"jsonrpc":"2.0","id":1}'),
    "null": lambda g: setattr(g, "body", b'{"jsonrpc":"2.0","id":1,"result":null}'),
    "other_id": lambda g: setattr(g, "body", b'{"jsonrpc":"2.0","id":"x","result":"0x7a69"}'),
    "deep": lambda g: setattr(g, "body", b"[" * 500_000),
    "huge": lambda g: setattr(g, "body", b'{"a":"' + b"x" * (17 << 20) + b'"}'),
    "deep_objects": lambda g: setattr(g, "body", b'{"a":[' * 250_000),
    "not_utf8": lambda g: setattr(g, "body", b"\xff\xfe\x00"),
    "redirect": lambda g: (
        setattr(g, "status", 302),
        setattr(g, "body", b""),
        g.headers.update(location="http://127.0.0.1:1/"),
    ),
    "bomb": lambda g: (
        setattr(g, "body", gzip.compress(b"0" * (100 << 20), 1)),
        g.headers.update({"content-encoding": "gzip"}),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_one_faulty_endpoint_of_three_holds_nobody_up(
    chain: Net, three: Each, fault: str
) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    FAULTS[fault](three[0])
    async with chain.follower(urls(three), timeout_s=20.0) as follower:
        started = time.monotonic()
        await fit(follower)
        assert time.monotonic() - started < 10, "the quorum of the others was enough"
        assert member(follower, ALICE_) == 1
        chain.send("revoke", TEAM, MEMBER, ALICE)
        await fit(follower)
        assert member(follower, ALICE_) == 0


@pytest.mark.parametrize("fault", FAULTS)
async def test_two_faulty_endpoints_of_three_suspend_and_it_resumes_after(
    chain: Net, three: Each, fault: str
) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three), timeout_s=1.0) as follower:
        await fit(follower)
        FAULTS[fault](three[0])
        FAULTS[fault](three[1])
        chain.send("revoke", TEAM, MEMBER, ALICE)
        chain.grant(BOB)
        chain.mine(2)
        await follower.look()
        assert follower.replica.fault
        chain.clock.pass_s(31)
        assert "no block was verified for" in follower.replica.unfit()
        assert (member(follower, ALICE_), follower.replica.roles(ALICE_)) == (0, {})
        for gateway in three[:2]:
            gateway.hangs, gateway.status, gateway.body = False, 200, None
            gateway.headers.clear()
        for endpoint in follower.endpoints.each:
            endpoint._closed_until = 0.0
        await fit(follower)
        assert (member(follower, ALICE_), member(follower, BOB_)) == (0, 1)


async def test_dead_endpoints_of_three(chain: Net, three: Each) -> None:
    chain.grant(ALICE)
    chain.mine(2)
    async with chain.follower(urls(three)) as follower:
        await three[0].stop()
        await fit(follower)
        assert member(follower, ALICE_) == 1
        await three[1].stop()
        chain.mine(1)
        await follower.look()
        assert "1 of 3 endpoints" in follower.replica.fault
        await three[1].start()
        await fit(follower)


async def test_a_url_that_holds_a_key_is_never_shown(three: Each) -> None:
    three[0].status, three[0].body = 500, b"secret-key"
    each = Endpoints([three[0].url + "/v2/secret-key?k=secret-key"], quorum=1, timeout_s=2.0)
    try:
        with pytest.raises(NoQuorum) as caught:
            await each.agree("eth_chainId")
        shown = caught.value.message + caught.value.hint + each.each[0].error + each.each[0].name
        assert "secret" not in shown
    finally:
        await each.aclose()
    with pytest.raises(ConfigError) as wrong:
        Endpoint("ftp://host/secret", timeout_s=1.0)
    assert "secret" not in str(wrong.value) + wrong.value.hint


async def test_the_circuit_breaker(three: Each) -> None:
    """Three failures, then it is left alone: 1 s, 2 s, … 15 s; one answer closes it again."""
    now = 0.0
    endpoint = Endpoint(three[0].url, timeout_s=2.0, monotonic=lambda: now)
    try:
        three[0].body = b"nonsense"
        for _ in range(FAILURES_MAX):
            with pytest.raises(EndpointUnavailable, match="not JSON-RPC"):
                await endpoint.call("eth_chainId")
        assert not endpoint.available
        asked = len(three[0].asked)
        with pytest.raises(EndpointUnavailable, match="left alone"):
            await endpoint.call("eth_chainId")
        assert len(three[0].asked) == asked
        for rest_s in (1.0, 2.0, 4.0, 8.0, 15.0, 15.0):
            now += rest_s - 0.001
            assert not endpoint.available
            now += 0.002
            with pytest.raises(EndpointUnavailable, match="not JSON-RPC"):
                await endpoint.call("eth_chainId")
        now += 16
        three[0].body = None
        assert await endpoint.call("eth_chainId") == hex(31337)
        assert (endpoint.failures, endpoint.available) == (0, True)
    finally:
        await endpoint.aclose()


async def test_an_endpoint_that_hangs_costs_no_time_after_a_while(chain: Net, three: Each) -> None:
    three[2].hangs = True
    each = Endpoints(urls(three), quorum=2, timeout_s=60.0)
    try:
        for _ in range(LATE_MAX):
            assert (await each.newest("latest")).number == chain.block("latest")[0]
        started = time.monotonic()
        for _ in range(10):
            await each.newest("latest")
        assert time.monotonic() - started < 10 * module.STRAGGLER_S
        three[2].hangs = False
        async with asyncio.timeout(60):
            while each.each[2].late:
                three[0].hangs = True  # now it is needed
                await each.newest("latest")
    finally:
        await each.aclose()


async def test_an_unneeded_answer_is_cancelled_and_leaves_nothing(three: Each) -> None:
    three[2].hangs = True
    each = Endpoints(urls(three), quorum=2, timeout_s=60.0)
    before = asyncio.all_tasks()
    try:
        await each.agree("eth_chainId", key=quantity)
        ours = [t for t in asyncio.all_tasks() - before if "Endpoint.call" in repr(t)]
        assert ours == []
    finally:
        await each.aclose()


@pytest.mark.parametrize(
    ("count", "quorum"), [(0, 1), (1, 2), (3, 0), (3, 4), (module.ENDPOINTS_MAX + 1, 2)]
)
def test_endpoints_that_can_give_no_quorum(count: int, quorum: int) -> None:
    with pytest.raises(ConfigError):
        Endpoints([f"http://127.0.0.1:{p + 1}" for p in range(count)], quorum=quorum, timeout_s=1.0)


def test_the_same_endpoint_twice_is_no_quorum() -> None:
    with pytest.raises(ConfigError, match="1 of them different"):
        Endpoints(["http://127.0.0.1:1"] * 2, quorum=2, timeout_s=1.0)


@pytest.mark.parametrize(
    "text",
    ["", "0x", "12", "0x_1", "0x1_0", "0x+1", "0x 1", "0x１", "0x" + "1" * 17, 7, None, "0xg"],
)
def test_malformed_quantities(text: Any) -> None:
    with pytest.raises(ValueError):
        quantity(text)


@pytest.mark.parametrize("text", ["", "ab", "0xa", "0xab cd", "0x\nab", "0xzz", 7, None, ["0x"]])
def test_malformed_data(text: Any) -> None:
    with pytest.raises(ValueError):
        data(text)
    with pytest.raises(ValueError):
        fixed("0xab", 2)


@pytest.mark.parametrize("missing", ["number", "hash", "parentHash", "timestamp"])
def test_malformed_blocks(missing: str) -> None:
    block = {"number": "0x1", "hash": "0x" + "11" * 32, "timestamp": "0x2"}
    block["parentHash"] = "0x" + "22" * 32
    assert Block.parse(block) == (1, b"\x11" * 32, b"\x22" * 32, 2)
    with pytest.raises((ValueError, KeyError)):
        Block.parse({key: value for key, value in block.items() if key != missing})
    with pytest.raises(ValueError):
        Block.parse({**block, missing: "0x"})


def test_checksums() -> None:
    assert checksum(raw(OWNER)) == OWNER


async def test_a_quorum_that_hears_malformed_blocks(chain: Net, three: Each) -> None:
    """Of the right JSON, and of no use: the look fails, and the follower goes on."""
    async with chain.follower(urls(three)) as follower:
        await fit(follower)
        for junk in ({}, [], "0x", 7, {"number": []}, {"number": "0x1", "hash": "0x12"}):

            def twist(method: str, params: list[Any], answer: Answer, junk: Any = junk) -> None:
                answer["result"] = junk

            for gateway in three:
                gateway.twist = twist
            await follower.look()
            assert follower.replica.fault
        for gateway in three:
            gateway.twist = None
        await fit(follower)
