"""Every command that writes, against a real chain: what changes, and what is said."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from plugins.auth_evm.tests.cli.anvils import (
    CLUSTER,
    Anvil,
    Proxy,
    World,
    dead_url,
    invoke,
    proxies,
    word,
)

from wetware_auth_evm.cli import abi
from wetware_auth_evm.cli import writes as chain_writes
from wetware_auth_evm.cli.words import ALL_RIGHTS, who

DAY_S = 86_400


def seq(world: World) -> int:
    found: int = world.call("state")[0]
    return found


# --- what changes ---------------------------------------------------------------------------------


def test_grant_gives_a_role_and_says_how_far_it_is(world: World) -> None:
    done = world.ok("grant", "chatter", world.address("ada"), "--expires", "10d", "--rights", "0x3")
    lines = done.err.splitlines()
    assert lines[0] == "estimating"
    assert re.fullmatch(r"sent 0x[0-9a-f]{64}", lines[1])
    assert re.fullmatch(r"mined in block \d+", lines[2])
    assert lines[3] == "final"
    assert len(lines) == 4
    assert f"granted chatter to {world.address('ada')} in default until 20" in done.out
    assert world.rights("chatter", "ada") == 3
    not_before, expiry, *_ = world.call(
        "grantOf", word("default"), word("chatter"), world.person("ada").address
    )
    assert not_before == 0
    assert abs(expiry - time.time() - 10 * DAY_S) < 60


def test_several_addresses_are_one_transaction(world: World) -> None:
    before = seq(world)
    names = ("ada", "bob", "eve")
    done = world.ok("grant", "chatter", *map(world.address, names), "--json")
    assert len(done.json["events"]) == 3
    assert seq(world) == before + 3
    assert all(world.rights("chatter", name) == ALL_RIGHTS for name in names)


def test_a_grant_can_begin_later_and_in_another_scope(world: World) -> None:
    world.ok(
        "grant", "chatter", world.address("ada"), "--not-before", "2d", "--expires", "4d",
        "--scope", "lab",
    )  # fmt: skip
    not_before, *_ = world.call(
        "grantOf", word("lab"), word("chatter"), world.person("ada").address
    )
    assert abs(not_before - time.time() - 2 * DAY_S) < 60
    world.ok("grant", "chatter", world.address("bob"), "--scope", "ROOT")
    assert world.rights("chatter", "bob", "anything") == ALL_RIGHTS


def test_revoke_takes_one_role(world: World) -> None:
    world.ok("grant", "a", world.address("ada"))
    world.ok("grant", "b", world.address("ada"))
    done = world.ok("revoke", "a", world.address("ada"))
    assert f"revoked a of {world.address('ada')} in default" in done.out
    assert (world.rights("a", "ada"), world.rights("b", "ada")) == (0, ALL_RIGHTS)


def test_revoke_all_takes_everything(world: World) -> None:
    world.ok("grant", "a", world.address("ada"))
    world.ok("grant", "b", world.address("ada"), "--scope", "lab")
    world.ok("revoke-all", world.address("ada"), "--yes")
    assert world.rights("a", "ada") == world.rights("b", "ada", "lab") == 0
    assert world.call("epochs", word("default"), world.person("ada").address)[2] == seq(world)


def test_reset_scope_ends_the_scope_only(world: World) -> None:
    world.ok("grant", "a", world.address("ada"))
    world.ok("grant", "a", world.address("ada"), "--scope", "lab")
    world.ok("reset-scope", "--scope", "lab", "--yes")
    assert (world.rights("a", "ada"), world.rights("a", "ada", "lab")) == (ALL_RIGHTS, 0)


@pytest.mark.parametrize("named", [True, False])
def test_renounce_gives_up_everything_of_one_s_own(world: World, named: bool) -> None:
    world.ok("grant", "a", world.address("ada"))
    world.ok("grant", "b", world.address("ada"), "--scope", "lab")
    world.ok("renounce", *(["a"] if named else []), "--yes", key="ada")
    assert world.rights("a", "ada") == world.rights("b", "ada", "lab") == 0
    again = world.run("renounce", "--yes", key="ada")
    assert "holds nothing that could be given up" in again.says


def test_pause_and_unpause(world: World) -> None:
    world.ok("grant", "a", world.address("ada"))
    world.ok("pause", "--yes")
    assert world.rights("a", "ada") == 0
    world.ok("unpause")
    assert world.rights("a", "ada") == ALL_RIGHTS


def test_an_admin_grants_within_its_bounds_until_it_is_removed(world: World) -> None:
    world.ok("set-admin", "a", world.address("ada"), "--rights", "0x3", "--expires", "20d")
    world.ok("grant", "a", world.address("bob"), "--rights", "0x1", "--expires", "10d", key="ada")
    assert world.rights("a", "bob") == 1
    too_much = world.run("grant", "a", world.address("bob"), "--expires", "10d", key="ada")
    assert "exceeds your own admin record, which allows at most the rights 0x3" in too_much.says
    world.ok("set-admin", "a", world.address("ada"), "--remove")
    assert world.rights("a", "bob") == 0
    world.ok("set-admin", "any", world.address("ada"))
    world.ok("grant", "whatever", world.address("bob"), "--expires", "80d", key="ada")
    assert world.rights("whatever", "bob") == ALL_RIGHTS


PEER = "12D3KooWHHzSeKaY8xuZVzkLbKFfvNgPPeKhFBGrMbNzbm5akpqu"


def test_keys_are_bound_and_unbound(world: World, home: Any) -> None:
    from wetware.identity import Key, PeerId

    world.ok("grant", "node", world.address("ada"))
    world.ok("grant", "chatter", world.address("ada"))
    account = world.person("ada").address
    public = PeerId.parse(PEER).public_key
    world.ok("bind-key", "node", "chatter", "--peer", PEER, "--expires", "30d", key="ada")
    for role in ("node", "chatter"):
        args = (word("default"), word(role), account, public)
        assert world.call("keyRightsOf", *args) == (ALL_RIGHTS,)
    world.ok("unbind-key", "node", "--peer", PEER, key="ada")
    assert world.call("keyRightsOf", word("default"), word("node"), account, public) == (0,)
    world.ok("unbind-key", "chatter", "--peer", PEER, "--account", who(account))  # by the owner
    assert world.call("keyRightsOf", word("default"), word("chatter"), account, public) == (0,)

    missing = world.run("bind-key", "node", "--node", key="ada")
    assert "there is no node here yet" in missing.says
    node = Key.generate()
    node.save(home / "node" / "node.key")
    world.ok("bind-key", "node", "--node", key="ada")
    args = (word("default"), word("node"), account, node.public)
    assert world.call("keyRightsOf", *args) == (ALL_RIGHTS,)
    for wrong in ([], ["--node", "--peer", PEER]):
        assert world.run("bind-key", "node", *wrong, key="ada").code == 2
    hashed = world.run("bind-key", "node", "--peer", "Qm" + "a" * 44, key="ada")
    assert hashed.code == 2


def test_the_ownership_is_offered_and_taken_after_two_days(world: World) -> None:
    world.anvil, world.people = Anvil(), {}
    try:
        world.contract = world.anvil.deploy(world.person("default").address)
        ada = world.address("ada")
        done = world.ok("transfer-owner", ada, "--yes")
        assert f"offered the ownership to {ada}" in done.out
        early = world.run("accept-owner", key="ada")
        assert early.code == 77
        assert "the ownership can be taken from 20" in early.says
        world.anvil.pass_s(2 * DAY_S + 1)
        world.ok("accept-owner", key="ada")
        assert world.call("state")[3] == world.person("ada").address
        late = world.run("pause", "--yes")
        assert "only the owner or a guardian may do this" in late.says
    finally:
        world.anvil.close()


def test_an_offer_is_withdrawn(world: World) -> None:
    world.ok("transfer-owner", world.address("ada"), "--yes")
    done = world.ok("transfer-owner", "none")
    assert "withdrew the offer" in done.out
    assert not any(world.call("state")[5])


def test_deploy_makes_a_contract_and_prints_its_section(world: World, anvil: Anvil) -> None:
    done = invoke("deploy", "--rpc", anvil.url, "--owner", world.address("ada"))
    assert done.code == 0, done.says
    import tomllib

    section = tomllib.loads(done.out)["plugins"]["auth_evm"]
    world.contract = bytes.fromhex(section["contract"][2:])
    assert world.call("state")[3] == world.person("ada").address
    assert section["chain_id"] == anvil.chain_id
    genesis = anvil.rpc("eth_getBlockByNumber", "0x0", False)["hash"]
    assert section["genesis_hash"] == genesis
    code = anvil.rpc("eth_getCode", section["contract"], hex(section["deployed_at"] - 1))
    assert code == "0x"
    assert anvil.rpc("eth_getCode", section["contract"], hex(section["deployed_at"])) != "0x"


def test_the_section_is_one_that_a_node_takes(
    world: World, anvil: Anvil, home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wetware.config import load
    from wetware_auth_evm.node.config import AuthEvmConfig, resolve

    (home / "ww.toml").write_text("[node]\nname = 'x'")  # without a new line at its end
    done = invoke("deploy", "--rpc", anvil.url, "--write")
    assert done.code == 0, done.says
    config = load()
    assert config.node.name == "x"
    settings = resolve(config.plugin("auth_evm", AuthEvmConfig))
    assert settings.endpoints == (anvil.url,)
    again = invoke("deploy", "--rpc", anvil.url, "--write")
    assert again.code == 78
    assert "has [plugins.auth_evm] already" in again.says
    # From now on no flags are needed.
    granted = invoke("grant", "chatter", world.address("ada"))
    assert granted.code == 0, granted.says


def test_a_deployment_is_watched_to_its_end(world: World, anvil: Anvil) -> None:
    done = invoke("deploy", "--rpc", anvil.url, "--wait", "none")
    assert done.code == 2


# --- --calldata -----------------------------------------------------------------------------------

WRITES: list[tuple[str, ...]] = [
    ("grant", "a", "{ada}"),
    ("grant", "a", "{ada}", "{bob}"),
    ("revoke", "held", "{ada}"),
    ("revoke-all", "{ada}"),
    ("reset-scope",),
    ("pause",),
    ("set-admin", "any", "{ada}"),
    ("transfer-owner", "{ada}"),
    ("bind-key", "held", "--peer", PEER),
    ("renounce", "held"),
]


@pytest.mark.parametrize("args", WRITES, ids=lambda args: args[0])
def test_calldata_is_what_would_be_sent(
    world: World, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)  # the same expiry both times
    world.ok("grant", "held", world.address("ada"))
    world.ok("grant", "held", world.address("default"))
    command = [part.format(ada=world.address("ada"), bob=world.address("bob")) for part in args]
    before, height = seq(world), world.anvil.rpc("eth_blockNumber")
    printed = world.ok(*command, "--calldata").json
    assert world.anvil.rpc("eth_blockNumber") == height, "something was sent"
    assert seq(world) == before
    assert printed["to"] == who(world.contract)
    assert (printed["value"], printed["chainId"]) == ("0", world.anvil.chain_id)
    danger = args[0] in ("revoke-all", "reset-scope", "pause", "transfer-owner", "renounce")
    sent = world.ok(*command, *(["--yes"] if danger else []), "--json").json
    found = world.anvil.rpc("eth_getTransactionByHash", sent["tx"])
    assert found["input"] == printed["data"]
    assert found["to"] == printed["to"].lower()


def test_calldata_of_a_deployment(world: World, anvil: Anvil) -> None:
    owner = world.address("ada")
    printed = invoke("deploy", "--rpc", anvil.url, "--owner", owner, "--calldata").json
    assert printed["to"] is None
    receipt = anvil.send(world.person("bob").address, None, bytes.fromhex(printed["data"][2:]))
    world.contract = bytes.fromhex(receipt["contractAddress"][2:])
    assert world.call("state")[3] == world.person("ada").address


def test_calldata_needs_neither_a_chain_nor_a_wallet(world: World) -> None:
    address = world.address("ada")
    world.urls = [dead_url()]
    done = world.run("pause", "--calldata", key="nobody")
    assert done.json["data"] == "0x" + abi.calldata("pause").hex()
    assert world.run("revoke", "a", address, "--calldata", key="nobody").code == 0


# --- what is refused, as sentences ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "key", "says", "name"),
    [
        (("grant", "a", "{bob}"), "ada", "is no admin of a in default", "NotAdmin"),
        (("grant", "guardian", "{bob}"), "ada", "only the owner", "NotOwner"),
        (("revoke", "a", "{bob}"), None, "holds no a in default", "NoGrant"),
        (("revoke", "held", "{default}"), "ada", "the owner's: only who made it", "HeldByAnother"),
        (("revoke-all", "{bob}", "--yes"), "ada", "the owner or a guardian", "NotGuardian"),
        (("pause", "--yes"), "ada", "neither", "NotGuardian"),
        (("unpause",), None, "is not paused", "IsNotPaused"),
        (("set-admin", "a", "{bob}", "--remove"), None, "is no admin of a", "NoAdmin"),
        (("accept-owner",), "ada", "was not offered to", "NotProposed"),
        (("bind-key", "a", "--peer", PEER), "ada", "holds no a in default", "NoGrant"),
        (("unbind-key", "a", "--peer", PEER), "ada", "is not bound to the role a", "NoKey"),
        (("grant", "a", "{bob}", "--expires", "401d"), None, "at most 20", "ExpiryTooLate"),
        (("grant", "a", "{bob}", "--expires", "2001-01-01"), None, "not after", "ExpiryTooEarly"),
        (
            ("grant", "a", "{bob}", "--not-before", "9d", "--expires", "8d"),
            None,
            "not after",
            "ExpiryTooEarly",
        ),
        (("grant", "a", "0x" + "0" * 40), None, "the address is zero", "ZeroAccount"),
    ],
)
def test_a_refusal_of_the_contract_is_a_sentence_with_a_next_step(
    world: World, args: tuple[str, ...], key: str | None, says: str, name: str
) -> None:
    for person in ("ada", "bob"):
        world.person(person)
    world.ok("grant", "held", world.address("default"))
    height = world.anvil.rpc("eth_blockNumber")
    named = {person: world.address(person) for person in ("ada", "bob", "default")}
    done = world.run(*(part.format(**named) for part in args), key=key)
    assert isinstance(done.error, chain_writes.ContractRefused)
    assert says in done.error.message
    assert done.error.name == name
    assert done.code == 77
    assert world.anvil.rpc("eth_blockNumber") == height, "a transaction was paid for"


def test_every_error_of_the_contract_has_a_sentence() -> None:
    from eth_abi import encode
    from eth_utils.abi import function_abi_to_4byte_selector

    from wetware_auth_evm.contract import load

    errors = [entry for entry in load().abi if entry["type"] == "error"]
    assert len(errors) == 20
    for entry in errors:
        types = [item["type"] for item in entry["inputs"]]
        values = [
            b"\1" * 32 if t == "bytes32" else "0x" + "11" * 20 if t == "address" else 7
            for t in types
        ]
        refusal = abi.refusal(function_abi_to_4byte_selector(entry) + encode(types, values))
        assert refusal.name == entry["name"]
        assert not refusal.sentence.startswith("the contract refused"), entry["name"]
        cut = abi.refusal(function_abi_to_4byte_selector(entry) + b"\1")
        assert cut.sentence


@pytest.mark.parametrize("junk", [b"", b"\1", b"\xff" * 36, bytes.fromhex("4e487b71") + b"\0" * 32])
def test_an_unknown_refusal_is_said_to_be_one(junk: bytes) -> None:
    refusal = abi.refusal(junk)
    assert refusal.name == ""
    assert refusal.sentence


def test_paused_says_who_ends_it(world: World) -> None:
    world.ok("grant", "a", world.address("ada"))
    world.ok("pause", "--yes")
    done = world.run("bind-key", "a", "--peer", PEER, key="ada")
    assert "the contract is paused" in done.says
    assert "unpause" in done.says


def test_without_money_the_address_and_the_amount_are_named(world: World) -> None:
    world.person("poor", ether=0)
    world.ok("grant", "a", world.address("poor"))
    done = world.run("renounce", "a", "--yes", key="poor")
    assert isinstance(done.error, chain_writes.NoFunds)
    assert world.address("poor") in done.error.message
    assert "has nothing on chain 31337, and this may take" in done.error.message
    assert "--calldata" in done.error.hint
    assert world.rights("a", "poor") == ALL_RIGHTS


def test_an_endpoint_of_another_chain_is_refused(world: World) -> None:
    other = Anvil(chain_id=5)
    try:
        world.urls = [world.anvil.url, other.url]
        done = world.run("pause", "--yes")
    finally:
        other.close()
    assert done.code == 1
    assert f"{other.url} serves chain 5" in done.says
    assert "is of chain 31337" in done.says
    assert not world.call("state")[4]


def test_an_address_without_the_contract_is_refused(world: World) -> None:
    world.contract = world.person("ada").address
    done = world.run("pause", "--yes")
    assert "there is no contract at" in done.says
    assert "ww auth evm deploy" in done.says


def test_another_contract_than_ours_is_refused(world: World) -> None:
    made = world.anvil.send(
        world.person("ada").address, None, bytes.fromhex("600160005360016000f3")
    )
    world.contract = bytes.fromhex(made["contractAddress"][2:])
    done = world.run("pause", "--yes")
    assert "another contract than WetwareACL" in done.says


def test_a_dead_endpoint_is_unreachable(world: World) -> None:
    world.urls = [dead_url()]
    done = world.run("pause", "--yes")
    assert done.code == 69
    assert world.urls[0] in done.says
    assert "no endpoint of the chain answers" in done.says
    assert "--rpc" in done.says


def test_an_endpoint_s_path_is_not_shown(world: World) -> None:
    world.urls = [f"{dead_url()}/v3/SECRETKEY?key=SECRETKEY"]
    assert "SECRETKEY" not in world.run("pause", "--yes").says
    assert "SECRETKEY" not in world.run("status").says


def test_one_dead_endpoint_of_three_is_no_trouble(world: World) -> None:
    with proxies(world.anvil, None, None) as made:
        world.urls = [dead_url(), *(proxy.url for proxy in made)]
        world.ok("pause", "--yes")


@pytest.mark.parametrize(("status", "raw"), [(200, b"<html>"), (502, b"bad"), (200, b"[]")])
def test_an_endpoint_that_answers_with_something_else(
    world: World, status: int, raw: bytes
) -> None:
    with proxies(world.anvil, None) as (proxy,):
        proxy.status, proxy.raw = status, raw
        world.urls = [proxy.url]
        done = world.run("pause", "--yes")
    assert done.code == 69
    assert "no endpoint of the chain answers" in done.says


# --- what becomes of a transaction ----------------------------------------------------------------


@pytest.fixture
def lazy(home: Any) -> Any:
    """A chain that mines when it is told, on which `default` owns a contract."""
    anvil = Anvil("--slots-in-an-epoch", "1")
    made = World(anvil, home)
    made.contract = anvil.deploy(made.person("default").address)
    anvil.rpc("evm_setAutomine", False)
    try:
        yield made
    finally:
        anvil.close()


def test_a_stuck_transaction_says_how_to_go_on_and_can_be_replaced(lazy: World) -> None:
    done = lazy.run("pause", "--yes", "--timeout", "0.3")
    assert isinstance(done.error, chain_writes.Stuck)
    assert "is in no block after 0 s" in done.error.message
    found = re.search(r"--nonce (\d+) --fee-gwei ([\d.e+]+)", done.error.hint)
    assert found is not None
    again = lazy.run(
        "grant", "a", lazy.address("ada"), "--nonce", found[1], "--fee-gwei", found[2],
        "--wait", "none",
    )  # fmt: skip
    assert again.code == 0, again.says
    assert re.fullmatch(r"0x[0-9a-f]{64}\n", again.out)
    lazy.anvil.rpc("evm_mine")
    assert not lazy.call("state")[4], "the first one was mined"
    assert lazy.rights("a", "ada") == ALL_RIGHTS


def test_a_replacement_that_pays_too_little_is_refused(lazy: World) -> None:
    first = lazy.ok("pause", "--yes", "--wait", "none", "--json").json
    done = lazy.run("grant", "a", lazy.address("ada"), "--nonce", str(first["nonce"]))
    assert isinstance(done.error, chain_writes.NotSent)
    assert f"a transaction with the number {first['nonce']} waits already" in done.error.message
    assert "--fee-gwei" in done.error.hint


def test_a_used_number_is_refused(world: World) -> None:
    done = world.run("pause", "--yes", "--nonce", "0")
    assert isinstance(done.error, chain_writes.NotSent)
    assert "is not the next one" in done.error.message


def test_a_replaced_transaction_is_said_to_be_gone(lazy: World) -> None:
    """Another program with the same wallet was faster."""
    other = chain_writes.Transaction(lazy.contract, abi.calldata("unpause"), lazy.anvil.chain_id)

    def replace_it(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_sendRawTransaction":
            fees = chain_writes.Fees(10**12, 10**12)
            nonce = int(
                lazy.anvil.rpc("eth_getTransactionCount", lazy.address("default"), "latest"), 16
            )
            raw, _ = chain_writes.sign(lazy.person("default"), other, 100_000, fees, nonce)
            lazy.anvil.rpc("eth_sendRawTransaction", "0x" + raw.hex())
            lazy.anvil.rpc("evm_mine")

    with proxies(lazy.anvil, replace_it) as (proxy,):
        lazy.urls = [proxy.url]
        done = lazy.run("pause", "--yes", "--timeout", "0.3")
    assert isinstance(done.error, chain_writes.NotSent)
    assert "was replaced by another transaction" in done.error.message


def test_endpoints_that_fall_silent_after_sending_are_said_to_be_so(world: World) -> None:
    def after(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if "eth_sendRawTransaction" in proxy.asked:
            proxy.status, proxy.raw = 503, b"gone"

    with proxies(world.anvil, after) as (proxy,):
        world.urls = [proxy.url]
        done = world.run("pause", "--yes", "--timeout", "0.5")
    assert isinstance(done.error, chain_writes.Stuck | chain_writes.NotSent)
    assert "ww auth evm" in done.error.hint


def test_a_transaction_that_fails_in_its_block_says_why(lazy: World) -> None:
    """Between the estimate and the block, somebody else paused the contract."""
    faster = {
        "from": lazy.address("ada"),
        "to": who(lazy.contract),
        "data": "0x" + abi.calldata("pause").hex(),
        "maxFeePerGas": hex(10**13),
        "maxPriorityFeePerGas": hex(10**13),
        "gas": hex(300_000),
    }

    def pause_first(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_sendRawTransaction":
            lazy.anvil.rpc("eth_sendTransaction", faster)
            lazy.anvil.rpc("evm_mine")

    lazy.anvil.rpc("evm_setAutomine", True)
    lazy.ok("grant", "guardian", lazy.address("ada"), "--scope", "ROOT")
    lazy.anvil.rpc("evm_setAutomine", False)
    with proxies(lazy.anvil, pause_first) as (proxy,):
        lazy.urls = [proxy.url]
        done = lazy.run("pause", "--yes", "--timeout", "5")
    assert isinstance(done.error, chain_writes.ContractRefused), done.says
    assert "changed nothing" in done.error.message
    assert "the contract is paused" in done.error.message
    assert done.error.name == "IsPaused"


def finalized(world: World, tmp: Any, finality: str = "finalized") -> list[str]:
    """Options that name a profile whose blocks are not final at once."""
    document = {
        "v": 1, "chain_id": world.anvil.chain_id, "contract": who(world.contract),
        "endpoints": list(world.urls or [world.anvil.url]), "finality": finality,
        "cluster": CLUSTER,
    }  # fmt: skip
    path = tmp / "profile.json"
    path.write_text(json.dumps(document))
    return ["--profile", str(path)]


@pytest.mark.parametrize("finality", ["finalized", "depth:3"])
def test_final_is_waited_for(world: World, tmp_path: Any, finality: str) -> None:
    import threading

    anvil = Anvil("--slots-in-an-epoch", "1")
    try:
        world.anvil, world.people = anvil, {}
        world.contract = anvil.deploy(world.person("default").address)
        profile = finalized(world, tmp_path, finality)
        done = invoke("pause", "--yes", *profile, "--timeout", "0.6")
        assert done.code == 0
        assert done.err.splitlines()[-2].startswith("mined in block")
        assert "not final yet" in done.err.splitlines()[-1]

        stop = threading.Event()

        def mine() -> None:
            while not stop.wait(0.05):
                anvil.rpc("evm_mine")

        miner = threading.Thread(target=mine)
        miner.start()
        try:
            done = invoke("unpause", *profile, "--json")
        finally:
            stop.set()
            miner.join()
        assert done.json["status"] == "final"
        assert done.err.splitlines()[-1] == "final"
        mined = invoke("pause", "--yes", *profile, "--wait", "mined", "--json")
        assert mined.json["status"] == "mined"
    finally:
        anvil.close()


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_reorganisation_that_takes_the_transaction_back_is_seen(
    world: World, tmp_path: Any, comes_back: bool
) -> None:
    anvil = Anvil()
    sent: list[str] = []
    seen: list[str] = []

    def reorganise(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_sendRawTransaction":
            sent.append(params[0])
        if method == "eth_getTransactionReceipt" and answer["result"]:
            seen.append("mined")
        elif method == "eth_getBlockByNumber" and seen == ["mined"]:
            seen.append("gone")
            anvil.rpc("anvil_reorg", 1, [])
            anvil.rpc("anvil_mine", hex(5))
        elif method == "eth_getTransactionReceipt" and comes_back and seen == ["mined", "gone"]:
            seen.append("back")
            anvil.rpc("eth_sendRawTransaction", sent[0])
            anvil.rpc("anvil_mine", hex(5))

    try:
        world.anvil, world.people = anvil, {}
        world.contract = anvil.deploy(world.person("default").address)
        with proxies(anvil, reorganise) as (proxy,):
            world.urls = [proxy.url]
            profile = finalized(world, tmp_path, "depth:3")
            done = invoke("pause", "--yes", *profile, "--timeout", "5" if comes_back else "1")
        assert "no longer in a block: the chain was reorganised" in done.err
        assert world.call("state")[4] == comes_back
    finally:
        anvil.close()
    if comes_back:
        assert done.code == 0
        assert re.search(
            r"mined in block 2\n.*\nmined again in block 8\nfinal\n", done.err, re.DOTALL
        )
    else:
        assert isinstance(done.error, chain_writes.Stuck)
        assert "did not come back" in done.error.message


def test_a_chain_without_base_fees_gets_legacy_transactions(world: World) -> None:
    def old(method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_getBlockByNumber" and answer.get("result"):
            answer["result"].pop("baseFeePerGas", None)

    with proxies(world.anvil, old) as (proxy,):
        world.urls = [proxy.url]
        done = world.ok("pause", "--yes", "--json")
    assert world.anvil.rpc("eth_getTransactionByHash", done.json["tx"])["type"] == "0x0"


def test_a_chain_that_takes_no_type_2_gets_a_legacy_transaction(world: World) -> None:
    class Refusing(Proxy):
        def _answer(self, upstream: Anvil, query: dict[str, Any]) -> dict[str, Any]:
            if query["method"] == "eth_sendRawTransaction" and query["params"][0][:4] == "0x02":
                error = {"code": -32000, "message": "transaction type not supported"}
                return {"jsonrpc": "2.0", "id": query["id"], "error": error}
            return super()._answer(upstream, query)

    proxy = Refusing(world.anvil)
    try:
        world.urls = [proxy.url]
        done = world.ok("pause", "--yes", "--json")
    finally:
        proxy.close()
    assert world.anvil.rpc("eth_getTransactionByHash", done.json["tx"])["type"] == "0x0"


# --- questions and options ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["revoke-all", "transfer-owner", "pause", "reset-scope"])
def test_what_is_dangerous_is_asked_first(world: World, command: str) -> None:
    before = seq(world)
    args = [world.address("ada")] if command in ("revoke-all", "transfer-owner") else []
    done = world.run(command, *args)
    assert done.code == 2
    assert "--yes" in done.says
    assert seq(world) == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("grant", "a", "0x12"), "not an address"),
        (("grant", "a", "{typo}"), "typing error"),
        (("grant", "a", "{ada}", "{ada}"), "named twice"),
        (("grant", "a" * 33, "{ada}"), "32 bytes"),
        (("grant", "any", "{ada}"), "not the name of a role"),
        (("grant", "a", "{ada}", "--expires", "soon"), "is no time"),
        (("grant", "a", "{ada}", "--expires", "2027-13-01"), "is no time"),
        (("grant", "a", "{ada}", "--rights", "0"), "no mask"),
        (("grant", "a", "{ada}", "--rights", hex(1 << 128)), "no mask"),
        (("grant", "a", "{ada}", "--scope", "x" * 33), "not the name of a scope"),
        (("grant", "a", "{ada}", "--wait", "long"), "write final, mined or none"),
        (("grant", "a", "{ada}", "--timeout", "1e9"), "up to a day"),
        (("grant", "a", "{ada}", "--fee-gwei", "-1"), "a fee of -1 gwei"),
        (("transfer-owner", "0x" + "0" * 40), "`none` withdraws"),
    ],
)
def test_what_was_mistyped_is_refused(world: World, args: tuple[str, ...], says: str) -> None:
    ada = world.address("ada")
    typo = ada[:-1] + ("1" if ada[-1] != "1" else "2")
    done = world.run(*(part.format(ada=ada, typo=typo) for part in args))
    assert done.code == 2, done.says
    assert says in done.says


def test_a_missing_wallet_says_how_to_make_one(world: World) -> None:
    done = world.run("unpause", key="nobody")
    assert done.code == 78
    assert "ww auth evm new-key" in done.says
