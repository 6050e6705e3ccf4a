"""What operators are told: `ww doctor`'s findings, and the service `auth_evm`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from plugins.auth_evm.tests.chain.net import DAY_S, Gateway, Net, gateways, urls
from plugins.auth_evm.tests.contract.people import ADMIN, ROOT, word
from plugins.auth_evm.tests.login.world import ALICE, BOB, SCOPE, World

from wetware_auth_evm.node.service import PAGE_MAX, EvmServant, explain

pytestmark = pytest.mark.anyio

TEAM, MEMBER = word(SCOPE), word("member")


def findings(world: World) -> list[tuple[str, str]]:
    """(level, text) of what `ww doctor` says; each says what to do."""
    found = list(world.backend.findings())
    for finding in found:
        assert finding.check == "evm"
        assert finding.remedy
    return [(finding.level, finding.text) for finding in found]


def said(world: World, level: str, text: str) -> bool:
    return any(level == each and text in words for each, words in findings(world))


@pytest.fixture
async def three(chain: Net) -> AsyncIterator[list[Gateway]]:
    async with gateways(chain.chain.url) as each:
        yield each


@pytest.fixture
async def trio(chain: Net, three: list[Gateway], tmp_path: Path) -> AsyncIterator[World]:
    world = World(chain, tmp_path, endpoints=tuple(urls(three)), quorum=0)
    async with world as made:
        yield made


async def test_nothing_is_found_where_nothing_is_wrong(trio: World) -> None:
    await trio.grant(ALICE.address)
    assert findings(trio) == []


async def test_a_single_endpoint_is_warned_of(world: World) -> None:
    assert findings(world) == [("warning", "quorum = 1: any single endpoint decides who is let in")]


async def test_endpoints_that_fail_lag_and_lie(trio: World, three: list[Gateway]) -> None:
    three[0].status = 500
    for _ in range(3):
        trio.chain.mine(1)
        await trio.look()
    assert said(trio, "warning", f"the endpoint {three[0].url} does not answer: HTTP 500")
    trio.backend.endpoints.each[1].dissents = 2
    assert said(trio, "warning", f"{three[1].url} contradicted the others 2 times")
    trio.backend.endpoints.each[2].late = 9
    assert said(trio, "warning", f"{three[2].url} is slower than the others")
    for gateway in three:
        gateway.status = 500
    trio.chain.mine(1)
    await trio.look()
    assert said(trio, "warning", "the last look at the chain failed")
    trio.chain.clock.pass_s(61)
    assert said(trio, "error", "nobody is admitted, and capabilities are suspended")


async def test_roles_that_the_configuration_does_not_know(trio: World) -> None:
    await trio.grant(ALICE.address, "pilot")
    await trio.grant(ALICE.address, "node")
    trio.send("grant", word("lab"), word("else"), BOB.address, 0, trio.chain.chain.time + 99, 1)
    await trio.settle()
    assert findings(trio) == [
        (
            "warning",
            "the contract grants roles that this node's configuration does not know: pilot",
        )
    ]


async def test_a_pause_and_a_held_withdrawal(trio: World) -> None:
    await trio.grant(ALICE.address)
    trio.send("revoke", TEAM, MEMBER, ALICE.address)
    await trio.look()
    trio.chain.reorg(1)
    trio.chain.mine(1)
    await trio.look()
    assert said(trio, "warning", "withdrawals from 1 accounts were taken back")
    trio.send("pause")
    await trio.look()
    assert said(trio, "warning", "the contract is paused")


async def test_an_operator_lets_the_node_forget_after_a_regression(world: World) -> None:
    await world.grant(ALICE.address)
    world.chain.reorg(3)
    world.chain.mine(1)
    await world.look()
    assert said(world, "error", "was final")
    world.chain.mine(3)
    world.backend._history.ask_to_forget()
    await world.look()
    await world.look()
    assert not said(world, "error", "")
    # The grant went with the reorganisation.
    assert world.backend.masks(ALICE.account) == {}
    await world.grant(ALICE.address)
    await world.logs_in(ALICE)


async def test_list_shows_what_counts_now(world: World) -> None:
    now = world.chain.chain.time
    await world.grant(ALICE.address)
    world.send("grant", ROOT, word("editor"), BOB.address, 0, now + DAY_S, 0b11)
    world.send("grant", TEAM, word("later"), BOB.address, now + 1000, now + DAY_S, 1)
    world.send("grant", word("lab"), MEMBER, BOB.address, 0, now + DAY_S, 1)
    world.send("setAdmin", TEAM, MEMBER, ADMIN, now + DAY_S, 1)
    world.send("grant", TEAM, MEMBER, BOB.address, 0, now + DAY_S, 1, sender=ADMIN)
    await world.settle()
    servant = EvmServant(world.backend)

    async def listed(*, every: bool) -> list[tuple[object, ...]]:
        reply = await servant.list(first=0, count=0, all=every)
        records = reply["records"]
        assert isinstance(records, list)
        assert reply["total"] == len(records)
        return [
            (r["role"], r["account"], r["root"], r["rights"], r["by"], r["configured"])
            for r in records
        ]

    live = [
        ("editor", BOB.address, True, "0x3", "", True),
        *sorted(
            [
                ("member", ALICE.address, False, "0x1", "", True),
                ("member", BOB.address, False, "0x1", ADMIN, True),
            ],
            key=lambda record: bytes.fromhex(record[1][2:]),
        ),
    ]
    assert await listed(every=False) == live
    later = ("later", BOB.address, False, "0x0", "", False)
    assert await listed(every=True) == [live[0], later, *live[1:]]
    one = await servant.list(first=1, count=1, all=False)
    assert [r["account"] for r in one["records"]] == [live[1][1]]  # type: ignore[attr-defined]
    assert one["total"] == 3
    none = await servant.list(first=3, count=PAGE_MAX * 2, all=False)
    assert none["records"] == []
    world.send("revoke", TEAM, MEMBER, ALICE.address)
    await world.look()
    assert ("member", ALICE.address, False, "0x1", "", True) not in await listed(every=True)


async def test_explain_says_what_decides(world: World) -> None:
    await world.grant(ALICE.address, "editor", 0b11)

    def of(account: bytes, role: str) -> tuple[bool, str, str]:
        found = explain(world.backend, account, word(role))
        return found["allowed"], found["role"], "\n".join(found["steps"])

    allowed, role, steps = of(ALICE.account, "editor")
    assert (allowed, role) == (True, "editor/0x3")
    assert "by the final block" in steps
    assert "mask 0x3 by the owner, counts 0x3" in steps
    services = explain(world.backend, ALICE.account, word("editor"))["services"]
    assert services == [
        "pubsub: PubSub.join, Topic.info, Topic.publish",
        "where pubsub/topic=glob:chat/*",
    ]
    await world.grant(ALICE.address, "member", 0b10)
    allowed, _, steps = of(ALICE.account, "member")
    assert not allowed
    assert "gives nothing for any bit of 0x2" in steps
    await world.grant(ALICE.address, "node")
    assert "reserved" in of(ALICE.account, "node")[2]
    assert "has no role 'pilot'" in of(BOB.account, "pilot")[2]
    world.send("pause")
    await world.look()
    assert "(paused)" in of(ALICE.account, "editor")[2]
    world.chain.clock.pass_s(61)
    allowed, _, steps = of(ALICE.account, "editor")
    assert not allowed
    assert "nothing is decided now" in steps


async def test_status_is_what_the_schema_has(world: World) -> None:
    await world.grant(ALICE.address)
    await world.logs_in(ALICE)
    status = (await EvmServant(world.backend).status())["status"]
    assert isinstance(status, dict)
    assert status["contract"] == "0x" + world.chain.contract.hex()
    assert status["owner"] != "0x" + "00" * 20
    assert (status["grants"], status["principals"], status["wallets"]) == (1, 1, 0)
    assert status["seq"] == status["final_seq"] == world.backend.epoch
    assert status["finality"] == "chain 31337, finalized"
    assert status["warnings"] == list(world.backend.settings.warnings)
    assert not status["try_out"]
