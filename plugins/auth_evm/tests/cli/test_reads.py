"""list, can --explain, audit and status, against a real chain and endpoints that lie."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from plugins.auth_evm.tests.cli.anvils import (
    Anvil,
    World,
    dead_url,
    invoke,
    proxies,
    word,
)
from plugins.auth_evm.tests.cli.test_writes import PEER, finalized

from wetware_auth_evm.cli.words import who

DAY_S = 86_400


def test_what_reads_does_without_web3(world: World) -> None:
    ada = world.address("ada")
    world.ok("grant", "chatter", ada)
    code = "from wetware.cli import main; main()"

    def imports_web3(command: str, *args: str) -> bool:
        named = ("auth", "evm", command)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code, *named, *world.where, *args],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout
        return " web3.eth\n" in done.stderr

    for command in (["list"], ["can", "chatter", ada], ["status"], ["audit"]):
        assert not imports_web3(*command), command
    assert imports_web3("unpause", "--calldata")


# --- list -----------------------------------------------------------------------------------------


def rows(world: World, *args: str) -> list[tuple[str, str, str, str]]:
    found = world.ok("list", *args, "--json").json
    return [(row["kind"], row["role"], row["account"], row["state"]) for row in found]


def test_list_shows_grants_admins_and_keys(world: World) -> None:
    ada, bob = world.address("ada"), world.address("bob")
    world.ok("grant", "chatter", ada, bob, "--rights", "0x3")
    world.ok("set-admin", "any", bob)
    world.ok("bind-key", "chatter", "--peer", PEER, key="ada")
    world.ok("grant", "later", ada, "--not-before", "2d")
    world.ok("grant", "chatter", ada, "--scope", "lab")
    world.ok("grant", "chatter", world.address("eve"))
    world.ok("revoke-all", world.address("eve"), "--yes")
    live = [
        *(("grant", "chatter", account, "holds") for account in sorted((ada, bob))),
        ("grant", "later", ada, "not-yet"),
        ("admin", "any", bob, "may grant"),
        ("key", "chatter", ada, "bound"),
    ]
    assert rows(world) == live
    everything = rows(world, "--all")
    assert ("grant", "chatter", world.address("eve"), "account-epoch") in everything
    assert len(everything) == len(live) + 2
    assert rows(world, "--role", "later") == live[2:3]
    assert rows(world, "--account", bob, "--role", "any") == live[3:4]
    text = world.ok("list").out
    assert "0x3" in text
    assert PEER in text
    assert rows(world, "--scope", "lab") == [("grant", "chatter", ada, "holds")]


def test_list_of_nothing_names_the_next_command(world: World) -> None:
    done = world.ok("list")
    assert done.out == ""
    assert "ww auth evm grant" in done.err


def test_while_paused_nobody_holds_anything(world: World) -> None:
    world.ok("grant", "a", world.address("ada"))
    world.ok("pause", "--yes")
    assert rows(world) == [("grant", "a", world.address("ada"), "paused")]


# --- can ------------------------------------------------------------------------------------------


def why(world: World, role: str, name: str, *args: str, allowed: bool = False) -> list[str]:
    """The codes of the reasons; `can` and the contract have to come to the same."""
    done = world.run("can", role, world.address(name), *args, "--explain", "--json")
    assert done.json["allowed"] == allowed
    assert done.code == (0 if allowed else 77)
    text = world.run("can", role, world.address(name), *args, "--explain")
    assert text.out.splitlines()[0] == ("yes" if allowed else "no")
    for reason in done.json["reasons"]:
        assert reason["text"] in text.out
    codes: list[str] = [reason["code"] for reason in done.json["reasons"]]
    scope = args[args.index("--scope") + 1] if "--scope" in args else "default"
    asked = int(args[args.index("--rights") + 1], 0) if "--rights" in args else 0
    rights = world.rights(role, name, scope)
    assert allowed == (bool(rights) and rights & asked == asked), "the contract says otherwise"
    return codes


def test_can_by_a_grant_in_the_scope_or_in_root(world: World) -> None:
    world.ok("grant", "a", world.address("ada"), "--rights", "0x3")
    assert why(world, "a", "ada", allowed=True) == ["allows"]
    assert why(world, "a", "ada", "--rights", "0x2", allowed=True) == ["allows"]
    world.ok("grant", "b", world.address("ada"), "--scope", "ROOT")
    assert why(world, "b", "ada", allowed=True) == ["allows", "none"]
    done = world.run("can", "a", world.address("ada"), "--explain")
    assert "by the owner in event 2, until 20" in done.out


def test_can_not_without_a_grant(world: World) -> None:
    assert why(world, "a", "ada") == ["none"]


def test_can_not_with_lesser_rights(world: World) -> None:
    world.ok("grant", "a", world.address("ada"), "--rights", "0x1")
    assert why(world, "a", "ada", "--rights", "0x3") == ["rights", "allows"]


def test_can_not_after_an_epoch(world: World) -> None:
    world.ok("grant", "a", world.address("ada"), world.address("bob"))
    world.ok("revoke-all", world.address("ada"), "--yes")
    assert why(world, "a", "ada") == ["account-epoch"]
    world.ok("reset-scope", "--yes")
    assert why(world, "a", "bob") == ["scope-epoch"]


def test_can_not_while_paused(world: World) -> None:
    world.ok("grant", "a", world.address("ada"))
    world.ok("pause", "--yes")
    assert why(world, "a", "ada") == ["paused", "allows"]


def test_can_not_yet(world: World) -> None:
    world.ok("grant", "a", world.address("ada"), "--not-before", "2d", "--expires", "9d")
    assert why(world, "a", "ada") == ["not-yet"]


def test_can_not_any_more_and_not_by_an_admin_that_ended(world: World) -> None:
    """Time passes on a chain of its own."""
    world.anvil, world.people = Anvil(), {}
    try:
        world.contract = world.anvil.deploy(world.person("default").address)
        world.ok("set-admin", "a", world.address("bob"), "--expires", "5d")
        world.ok("grant", "a", world.address("ada"), "--expires", "4d", key="bob")
        world.ok("grant", "b", world.address("ada"), "--expires", "3d")
        assert why(world, "a", "ada", allowed=True) == ["allows"]
        world.anvil.pass_s(3 * DAY_S)
        assert why(world, "b", "ada") == ["expired"]
        assert "ended at 20" in world.run("can", "b", world.address("ada"), "--explain").out
        # The admin's record is narrowed, and ends before the grant.
        world.ok("set-admin", "a", world.address("bob"), "--expires", "78h")
        world.anvil.pass_s(DAY_S // 2)
        assert why(world, "a", "ada") == ["admin-expired"]
    finally:
        world.anvil.close()


def test_can_not_by_an_admin_that_is_none(world: World) -> None:
    admin, day = world.address("bob"), ["--expires", "10d"]
    world.ok("set-admin", "a", admin)
    world.ok("grant", "a", world.address("ada"), *day, key="bob")
    assert why(world, "a", "ada", allowed=True) == ["allows"]

    world.ok("set-admin", "a", admin, "--remove")
    assert why(world, "a", "ada") == ["admin-removed"]

    world.ok("set-admin", "a", admin)
    assert why(world, "a", "ada") == ["admin-later"]

    world.ok("grant", "a", world.address("ada"), *day, key="bob")
    world.ok("revoke-all", admin, "--yes")
    assert why(world, "a", "ada") == ["admin-epoch"]


def test_can_less_by_an_admin_that_was_narrowed(world: World) -> None:
    world.ok("set-admin", "any", world.address("bob"), "--rights", "0x3", "--scope", "ROOT")
    world.ok("grant", "a", world.address("ada"), "--rights", "0x3", "--expires", "10d", key="bob")
    world.ok("set-admin", "any", world.address("bob"), "--rights", "0x1", "--scope", "ROOT")
    assert why(world, "a", "ada", "--rights", "0x1", allowed=True) == ["allows"]
    assert why(world, "a", "ada", "--rights", "0x3") == ["rights", "allows"]
    text = world.run("can", "a", world.address("ada"), "--explain").out
    assert "narrowed from 0x3 by the admin's own record" in text
    world.ok("set-admin", "any", world.address("bob"), "--rights", "0x4", "--scope", "ROOT")
    assert why(world, "a", "ada") == ["rights"]


def test_what_is_not_final_yet_is_said_to_wait_and_what_was_withdrawn_acts(
    world: World, tmp_path: Path
) -> None:
    world.anvil, world.people = Anvil(), {}
    try:
        world.contract = world.anvil.deploy(world.person("default").address)
        profile = finalized(world, tmp_path, "depth:3")
        world.anvil.rpc("anvil_mine", hex(5))
        ada = world.address("ada")

        def codes() -> list[str]:
            done = invoke("can", "a", ada, "--json", *profile)
            assert done.code == 77
            return [reason["code"] for reason in done.json["reasons"]]

        assert invoke("grant", "a", ada, *profile, "--wait", "mined").code == 0
        assert codes() == ["not-final", "allows"]
        listed = invoke("list", "--json", *profile).json
        assert [row["state"] for row in listed] == ["waits for finality"]
        world.anvil.rpc("anvil_mine", hex(5))
        assert invoke("can", "a", ada, *profile).code == 0
        assert invoke("revoke", "a", ada, *profile, "--wait", "mined").code == 0
        assert codes() == ["none", "withdrawn"]
    finally:
        world.anvil.close()


# --- audit ----------------------------------------------------------------------------------------


def eventful(world: World) -> None:
    world.ok("grant", "a", world.address("ada"))
    world.ok("set-admin", "b", world.address("bob"))
    world.ok("grant", "b", world.address("ada"), "--expires", "10d", key="bob")
    world.ok("bind-key", "a", "--peer", PEER, key="ada")
    world.ok("unbind-key", "a", "--peer", PEER, key="ada")
    world.ok("revoke", "a", world.address("ada"))
    world.ok("pause", "--yes")
    world.ok("unpause")
    world.ok("reset-scope", "--scope", "lab", "--yes")
    world.ok("transfer-owner", world.address("ada"), "--yes")
    world.ok("revoke-all", world.address("ada"), "--yes")
    world.ok("set-admin", "b", world.address("bob"), "--remove")


def test_audit_shows_every_change_and_proves_that_it_is_all(world: World) -> None:
    eventful(world)
    done = world.ok("audit", "--json").json
    assert done["complete"] is True
    assert done["head"] == "0x" + world.call("state")[1].hex()
    assert [event["seq"] for event in done["events"]] == list(range(1, 14))
    owner, ada, bob = map(world.address, ("default", "ada", "bob"))
    assert [(e["event"], e["who"]) for e in done["events"]] == [
        ("OwnerChanged", None),
        ("Granted", owner),
        ("AdminSet", owner),
        ("Granted", bob),
        ("KeyBound", ada),
        ("KeyUnbound", ada),
        ("Revoked", owner),
        ("Paused", owner),
        ("Unpaused", owner),
        ("ScopeReset", owner),
        ("OwnerProposed", owner),
        ("RevokedAll", owner),
        ("AdminSet", owner),
    ]
    for event in done["events"]:
        block = world.anvil.rpc("eth_getBlockByNumber", hex(event["block"]), False)
        assert event["time"] == int(block["timestamp"], 16)
        assert event["tx"] in block["transactions"]
    text = world.ok("audit").out
    assert f"bound {PEER} to a of {ada} in default" in text
    assert f"made {owner} the owner" in text
    assert "complete: all 13 events" in text


def test_audit_can_be_narrowed_and_is_still_of_the_whole(world: World) -> None:
    eventful(world)
    last = world.ok("audit", "--last", "2", "--json").json
    assert [event["seq"] for event in last["events"]] == [12, 13]
    of_bob = world.ok("audit", "--account", world.address("bob"), "--json").json
    assert [event["seq"] for event in of_bob["events"]] == [3, 4, 13]
    assert of_bob["complete"]


def drop(seq: int) -> Any:
    """A proxy's twist: the log of one event is left out."""

    def twist(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_getLogs":
            answer["result"] = [log for log in answer["result"] if int(log["topics"][1], 16) != seq]

    return twist


def test_audit_finds_a_hidden_event(world: World) -> None:
    eventful(world)
    with proxies(world.anvil, drop(7)) as (proxy,):
        world.urls = [proxy.url]
        done = world.run("audit")
        assert done.code == 1
        assert "NOT COMPLETE: 6 of 13 events" in done.out
        assert "complete: all" not in done.out
        assert "event 7 of 13 is missing" in done.err
        found = world.run("audit", "--json").json
        assert (found["complete"], found["events_found"]) == (False, 6)
        # And nothing is concluded from it: that event took a role away.
        for command in (["list"], ["can", "a", world.address("ada")]):
            refused = world.run(*command)
            assert refused.code == 1
            assert "no endpoint has the whole history" in refused.says


def test_audit_finds_a_hidden_last_event_and_a_changed_one(world: World) -> None:
    world.ok("grant", "a", world.address("ada"), "--rights", "0x1")
    world.ok("revoke", "a", world.address("ada"))

    def forge(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_getLogs":
            log = answer["result"][1]  # rights 0x1 become 0x3
            log["data"] = log["data"][: 2 + 64 * 4 - 1] + "3" + log["data"][2 + 64 * 4 :]

    def twice(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_getLogs":
            answer["result"].append(answer["result"][1])

    def more(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_getLogs":
            log = json.loads(json.dumps(answer["result"][1]))
            log["topics"][1] = "0x" + f"{9:064x}"
            answer["result"].append(log)

    def junk(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_getLogs":
            answer["result"][1]["topics"] = ["0x12"]

    for twist, says in (
        (drop(3), "event 3 of 3 is missing"),
        (forge, "was changed"),
        (twice, "event 2 of 3 is there twice"),
        (junk, "malformed log"),
    ):
        with proxies(world.anvil, twist) as (proxy,):
            world.urls = [proxy.url]
            done = world.run("audit")
            assert done.code == 1, says
            assert "NOT COMPLETE" in done.out
            assert says in done.err
    with proxies(world.anvil, more) as (proxy,):
        world.urls = [proxy.url]
        done = world.ok("audit")  # what is there is proved; what was added is not shown
        assert "complete: all 3 events" in done.out
        assert "an event 9 that the contract does not have" in done.err


def test_an_endpoint_that_hides_is_named_and_another_one_is_taken(world: World) -> None:
    eventful(world)
    with proxies(world.anvil, drop(7), None, None) as made:
        world.urls = [proxy.url for proxy in made]
        done = world.ok("audit")
        assert "complete: all 13 events" in done.out
        assert f"the logs of {made[0].url} are not the history: event 7 of 13" in done.err
        assert world.run("can", "a", world.address("ada")).code == 77


def test_logs_are_asked_for_in_smaller_pieces_where_that_is_wanted(world: World) -> None:
    eventful(world)

    def narrow(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_getLogs":
            first, last = (int(params[0][name], 16) for name in ("fromBlock", "toBlock"))
            if last - first >= 100:
                answer.pop("result")
                answer["error"] = {"code": -32005, "message": "more than 100 blocks"}

    with proxies(world.anvil, narrow) as (proxy,):
        world.urls = [proxy.url]
        assert world.ok("audit", "--json").json["complete"]


def test_without_times_in_the_logs_the_blocks_are_asked(world: World) -> None:
    world.ok("grant", "a", world.address("ada"))

    def untimed(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_getLogs":
            for log in answer["result"]:
                log.pop("blockTimestamp", None)

    with proxies(world.anvil, untimed) as (proxy,):
        expected = world.ok("audit", "--json").json["events"]
        world.urls = [proxy.url]
        assert world.ok("audit", "--json").json["events"] == expected


# --- status ---------------------------------------------------------------------------------------


def test_status_of_a_sound_chain(world: World) -> None:
    done = world.ok("status")
    owner = world.address("default")
    for text in (f"owner     {owner}", "paused    no", "events    1, head 0x", "no node runs here"):
        assert text in done.out
    found = world.ok("status", "--json").json
    assert found["problems"] == []
    assert found["chain_id"] == world.anvil.chain_id
    assert found["contract"] == who(world.contract)
    assert found["state"]["owner"] == owner
    assert [e["error"] or e["dissent"] for e in found["endpoints"]] == [""]
    assert found["final_block"] == found["block"]


def test_status_says_what_is_wrong_and_what_to_do(world: World) -> None:
    world.ok("pause", "--yes")
    world.ok("transfer-owner", world.address("ada"), "--yes")
    with proxies(world.anvil, None, None) as made:
        dead = dead_url()
        world.urls = [dead, *(proxy.url for proxy in made)]
        done = world.run("status")
    assert done.code == 1
    assert f"problem: {dead} does not answer" in done.err
    assert "problem: the contract is paused" in done.err
    assert "try: ww auth evm unpause" in done.err
    assert f"offered   to {world.address('ada')}, who can accept from 20" in done.out


def test_status_finds_an_endpoint_on_a_fork_and_one_behind(world: World) -> None:
    other = Anvil()
    try:
        other.rpc("anvil_mine", hex(3))
        height = int(world.anvil.rpc("eth_blockNumber"), 16)

        def behind(method: str, params: list[Any], answer: dict[str, Any]) -> None:
            if method == "eth_getBlockByNumber" and params[0] == "latest":
                answer["result"] = world.anvil.rpc("eth_getBlockByNumber", hex(height), False)

        world.anvil.rpc("anvil_mine", hex(10))
        with proxies(world.anvil, None, behind) as made:
            world.urls = [world.anvil.url, made[0].url, made[1].url]
            done = world.run("status", "--json")
            (problem,) = done.json["problems"]
            assert problem["what"].startswith(f"{made[1].url} is 10 blocks behind")
            world.urls = [world.anvil.url, made[0].url, other.url]
            done = world.run("status", "--json")
        (dissent,) = [e["name"] for e in done.json["endpoints"] if e["dissent"]]
        assert dissent == other.url
    finally:
        other.close()


def test_status_of_nothing_that_answers(world: World) -> None:
    world.urls = [dead_url()]
    done = world.run("status", "--json")
    assert done.code == 1
    assert done.json["state"] is None
    assert any("no endpoint of the chain answers" in p["what"] for p in done.json["problems"])


def test_status_of_a_chain_whose_blocks_are_old(world: World, tmp_path: Path) -> None:
    world.anvil, world.people = Anvil("--timestamp", "1700000000"), {}
    try:
        world.contract = world.anvil.deploy(world.person("default").address)
        done = invoke("status", "--json", *finalized(world, tmp_path, "depth:1"))
    finally:
        world.anvil.close()
    assert any("days old" in problem["what"] for problem in done.json["problems"])


def test_what_is_explained_is_what_is_decided(world: World) -> None:
    """What `explain` says is what the state says, for many records at many times."""
    import asyncio
    import random

    from wetware_auth_evm.chain.profile import Profile
    from wetware_auth_evm.cli.explain import explain
    from wetware_auth_evm.cli.reads import Chain

    rng = random.Random(7)
    people = ["ada", "bob", "eve"]
    for _ in range(40):
        who_, by = rng.choice(people), rng.choice(["default", "bob"])
        scope = rng.choice(["default", "ROOT"])
        expires = ["--expires", f"{rng.randint(1, 40)}d", "--wait", "mined", "--scope", scope]
        rights = ["--rights", hex(rng.randint(1, 7))]
        address = world.address(who_)
        command = rng.choice(
            [
                ["grant", "a", address, *expires, *rights],
                ["grant", "a", address, *expires, *rights],
                ["set-admin", rng.choice(["a", "any"]), world.address("bob"), *expires, *rights],
                ["revoke-all", address, "--yes"],
                ["reset-scope", "--yes", "--scope", scope],
                ["set-admin", "a", world.address("bob"), "--remove", "--scope", scope],
            ]
        )
        world.run(*command, key=by)

    async def view() -> Any:
        profile = Profile(world.anvil.chain_id, world.contract, "default", (world.anvil.url,))
        async with Chain(profile) as chain:
            return await chain.view()

    found = asyncio.run(view())
    compared = 0
    for person in people:
        account = world.person(person).address
        for day in range(0, 45, 3):
            now = found.now + day * DAY_S
            for need in (0, 1, 6):
                verdict = explain(
                    found.history.state, word("default"), word("a"), account, now, need
                )
                mask = found.history.state.rights(word("default"), word("a"), account, now)
                assert verdict.rights == mask
                assert verdict.allowed == (bool(mask) and mask & need == need)
                allows = [reason.rights for reason in verdict.reasons if reason.code == "allows"]
                total = 0
                for rights in allows:
                    total |= rights
                assert total == mask
                compared += 1
    assert compared == 135
