"""`[plugins.auth_evm]`: what is missing or weak is said, with what to set; nothing is guessed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware import config as ww_config
from wetware.config import check_schema, describe
from wetware.errors import EXIT_CONFIG, ConfigError, InvalidArgument
from wetware.hookspecs import RoleProfile
from wetware_auth_evm.node.config import AuthEvmConfig, Public, resolve, resolve_try_out
from wetware_auth_evm.node.roles import Rules, base

CONTRACT = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
THREE = ("https://a.example/k1", "https://b.example", "https://c.example:8545/x")
GOOD = AuthEvmConfig(endpoints=THREE, chain_id=1, contract=CONTRACT)


def wrong(config: AuthEvmConfig, joined: bytes | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        resolve(config, joined)
    assert caught.value.exit_code == EXIT_CONFIG
    assert caught.value.hint
    return caught.value


def with_(**changes: Any) -> AuthEvmConfig:
    return dataclasses.replace(GOOD, **changes)


def test_it_costs_nothing_to_import() -> None:
    code = (
        "import sys, wetware_auth_evm.plugin as p; p.ww_register_config();"
        "heavy = {'web3', 'eth_account', 'eth_hash', 'eth_abi', 'aiohttp', 'coincurve'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_class_is_a_good_section() -> None:
    assert check_schema(AuthEvmConfig) is AuthEvmConfig
    for line in describe({"auth_evm": AuthEvmConfig}).splitlines():
        if line.startswith("| `"):
            assert not line.rstrip(" |").endswith("`"), line  # each setting has a meaning


def test_a_good_one() -> None:
    found = resolve(GOOD)
    assert found.quorum == 2
    assert found.warnings == ()
    assert found.profile.name == "mainnet"
    assert (found.finality.kind, found.poll_s) == ("finalized", 4.0)
    assert found.bounds.verified_s_max == 60.0
    assert found.public == Public(1, bytes.fromhex(CONTRACT[2:]), "default")
    assert found.scope_id == b"default".ljust(32, b"\0")
    assert (found.session_s_max, found.wallet_gas_max) == (86_400, 500_000)
    assert "k1" not in repr(found)  # an endpoint may hold a key


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"chain_id": 0}, "needs [plugins.auth_evm] chain_id", "chain's ID"),
        ({"contract": ""}, "needs [plugins.auth_evm] contract", "contract's address"),
        ({"endpoints": ()}, "needs [plugins.auth_evm] endpoints", "of chain 1"),
        ({"endpoints": THREE[:2]}, "2 endpoints, where 3", "set quorum = 2"),
        ({"endpoints": THREE[:1]}, "1 endpoints, where 3", "set quorum = 1"),
        ({"quorum": 4}, "quorum = 4, and there are 3", "lower quorum"),
        ({"contract": CONTRACT[:-1] + "4"}, "checksum is wrong", "copy the address again"),
        ({"finality": "latest"}, '"latest" on mainnet', "mainnet"),
        ({"finality": "dev"}, "is that of dev, and chain 1 is mainnet", "leave finality out"),
        ({"finality": "base"}, "is that of base, and chain 1 is mainnet", "leave finality out"),
        ({"chain_id": 4242}, "chain 4242 has no profile", "set finality, poll_s"),
        ({"chain_id": 4242, "finality": "dev"}, "for try-outs", "depth:N"),
        (
            {"chain_id": 4242, "finality": "latest", "poll_s": 1.0, "verified_s_max": 60.0,
             "tip_age_s_max": 60.0},
            "not on this machine", "finalized",
        ),
        ({"poll_s": 60.0, "verified_s_max": 30.0}, "not shorter than verified_s_max", "poll_s"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong(changes: dict[str, Any], message: str, hint: str) -> None:
    error = wrong(with_(**changes))
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quorum": 1}, "any single endpoint decides"),
        ({"endpoints": THREE[:1], "quorum": 1}, "any single endpoint decides"),
        ({"endpoints": THREE[:2], "quorum": 2}, "if one fails, nobody gets in"),
        ({"endpoints": (*THREE, "https://d.example"), "quorum": 2}, "no majority"),
        ({"endpoints": (*THREE, "https://a.example/k2")}, "at a.example: they are one operator's"),
        ({"endpoints": (*THREE[:2], "http://c.example")}, "reached by http"),
    ],
)
def test_what_is_weak_is_warned_of(changes: dict[str, Any], said: str) -> None:
    warnings = resolve(with_(**changes)).warnings
    assert any(said in warning for warning in warnings), warnings


@pytest.mark.parametrize(("count", "quorum"), [(3, 2), (4, 3), (5, 3), (7, 4)])
def test_a_quorum_is_a_majority(count: int, quorum: int) -> None:
    urls = tuple(f"https://e{n}.example" for n in range(count))
    assert resolve(with_(endpoints=urls)).quorum == quorum


def test_a_chain_without_a_profile() -> None:
    config = with_(
        chain_id=4242, finality="depth:12", poll_s=3.0, verified_s_max=30.0, tip_age_s_max=90.0
    )
    found = resolve(config)
    assert (found.finality.kind, found.finality.depth) == ("depth", 12)
    assert (found.poll_s, found.bounds.tip_age_s_max) == (3.0, 90.0)
    assert found.bounds.tip_ahead_s_max == 60.0
    assert resolve(with_(chain_id=4242, finality="gnosis")).poll_s == 2.0


def test_the_dev_profile_is_for_this_machine() -> None:
    local = with_(endpoints=("http://127.0.0.1:8545",), quorum=1, chain_id=31337, finality="dev")
    found = resolve(local)
    assert found.finality.kind == "latest"
    assert found.bounds.tip_age_s_max is None
    assert found.warnings


def test_a_try_out_believes_its_own_chain() -> None:
    public = Public(31337, bytes(20), "default", b"g" * 32, 1)
    found = resolve_try_out(AuthEvmConfig(), public, "http://127.0.0.1:8545")
    assert found.quorum == 1
    assert found.warnings == ()


# --- joining ---


JOINED = Public(1, bytes.fromhex(CONTRACT[2:]), "team", b"g" * 32, 77)


def test_a_node_that_joined_needs_endpoints_alone() -> None:
    found = resolve(AuthEvmConfig(endpoints=THREE), JOINED.document())
    assert found.public == JOINED
    same = with_(scope="team", genesis_hash="0x" + (b"g" * 32).hex())
    assert resolve(same, JOINED.document()).public == JOINED
    error = wrong(AuthEvmConfig(), JOINED.document())
    assert "endpoints" in error.message
    assert "of chain 1" in error.hint


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"chain_id": 10}, "chain_id"),
        ({"contract": "0x" + "11" * 20}, "contract"),
        ({"scope": "lab"}, "scope"),
        ({"genesis_hash": "0x" + "00" * 31 + "01"}, "genesis_hash"),
    ],
)
def test_a_node_that_joined_another_cluster(changes: dict[str, Any], name: str) -> None:
    error = wrong(with_(**changes), JOINED.document())
    assert f"{name} is not the one of the cluster that this node joined" in error.message
    assert "--data-dir" in error.hint


def test_a_join_document_is_public_and_read_back() -> None:
    assert Public.parse(JOINED.document()) == JOINED
    early = dataclasses.replace(JOINED, genesis_hash=b"")
    assert Public.parse(early.document()) == early
    assert b"example" not in JOINED.document()


@given(st.binary(max_size=300) | st.just(JOINED.document()), st.integers(0, 400), st.binary())
def test_no_join_document_does_anything_but_load_or_refuse(
    document: bytes, at: int, new: bytes
) -> None:
    try:
        found = Public.parse(document[:at] + new + document[at:])
    except ConfigError:
        return
    assert Public.parse(found.document()) == found


# --- the file ---


def load(tmp_path: Path, text: str) -> AuthEvmConfig:
    (tmp_path / "ww.toml").write_text(f"[plugins.auth_evm]\n{text}\n")
    return ww_config.load({}, env={"WW_HOME": str(tmp_path)}).plugin("auth_evm", AuthEvmConfig)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('endpoints = ["ftp://a"]', ["endpoints", "line 2", "endpoint 1", "http://"]),
        ('endpoints = ["https://secret@"]', ["endpoint 1"]),
        ('endpoints = ["https://a/k", "https://a/k"]', ["named twice"]),
        ("endpoints = []", ["1 to 16"]),
        ("chain_id = 0", ["chain_id", "out of range"]),
        ('contract = "5FbD"', ["contract", "is not an address"]),
        ('scope = ""', ["scope", "expected text"]),
        (f'scope = "{"ä" * 17}"', ["scope", "1 to 32 bytes"]),
        ('genesis_hash = "0x12"', ["genesis_hash", "hash"]),
        ('finality = "soon"', ["finality", "soon"]),
        ('finality = "depth:0"', ["finality"]),
        ("quorum = 0", ["quorum", "out of range"]),
        ("session_s_max = 86401", ["session_s_max", "out of range"]),
        ("wallet_gas_max = 100000000", ["wallet_gas_max", "out of range"]),
        ('roles.chatter.services = "all"', ["roles", "chatter.services", "is not a section"]),
        (
            'roles.a.services = { a = ["*"] }\nroles.b.services = "all"',
            ["line 3: b.services: is not a section"],
        ),
    ],
)
def test_what_is_wrong_in_the_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    for part in parts:
        assert part in caught.value.message, caught.value.message
    assert "secret" not in caught.value.message


def test_endpoints_are_not_shown(tmp_path: Path) -> None:
    load(tmp_path, 'endpoints = ["https://a.example/KEY"]')
    config = ww_config.load({}, env={"WW_HOME": str(tmp_path)})
    shown = {each.key: each for each in config.settings({"auth_evm": AuthEvmConfig})}
    assert shown["plugins.auth_evm.endpoints"].text == "(hidden)"
    assert "KEY" not in str(shown["plugins.auth_evm.endpoints"].plain)


# --- roles ---


TEXT = """
[plugins.auth_evm.roles.chatter]
services = { pubsub = ["PubSub.*", "Topic.publish"] }
where = ["pubsub/topic=glob:chat/*"]
[plugins.auth_evm.roles.chatter.bits]
1 = { blob = ["Blob.get"] }
5 = { pubsub = ["Topic.subscribe"], blob = ["*"] }
[plugins.auth_evm.roles.reader]
services = { pubsub = ["Topic.subscribe"] }
"""


def test_roles_of_the_file(tmp_path: Path) -> None:
    rules = Rules(load(tmp_path, TEXT).roles)
    assert rules.names({"chatter": 0b100011, "reader": 1}) == {"chatter", "reader"}
    assert rules.names({"chatter": 2**128 - 1, "reader": 2**128 - 1}) == {"chatter", "reader"}
    assert rules.names({"chatter": 0b11}) == {"chatter/0x3"}
    assert rules.names({"chatter": 0b11100}) == set()
    assert rules.names({"reader": 0b10, "pilot": 1}) == set()
    assert base("chatter/0x3") == base("chatter") == "chatter"
    full, part = rules.profile("chatter"), rules.profile("chatter/0x22")
    assert full.services == {
        "pubsub": frozenset({"PubSub.*", "Topic.publish", "Topic.subscribe"}),
        "blob": frozenset({"Blob.get", "*"}),
    }
    assert part.services == {
        "pubsub": frozenset({"Topic.subscribe"}), "blob": frozenset({"Blob.get", "*"})
    }  # fmt: skip
    assert [(w.service, w.text) for w in full.where] == [("pubsub", "topic=glob:chat/*")]
    assert part.where == full.where


@given(st.integers(0, 2**128 - 1), st.integers(0, 2**128 - 1))
def test_a_mask_gives_what_its_bits_give_and_fewer_bits_never_more(one: int, two: int) -> None:
    rules = Rules(
        {"r": {"services": {"a": ["*"]}, "bits": {"1": {"b": ["B.x"]}, "127": {"b": ["B.y"]}}}}
    )

    def gives(mask: int) -> set[tuple[str, str]]:
        profiles = [rules.profile(name) for name in rules.names({"r": mask})]
        return {(s, p) for profile in profiles for s, ps in profile.services.items() for p in ps}

    assert gives(one & two) <= gives(one) & gives(two)
    assert gives(one) | gives(two) == gives(one | two)


def test_an_interface_may_be_within_another_one() -> None:
    rules = Rules({"r": {"services": {"a": ["Outer.Inner.joinAll"]}}})
    assert rules.profile("r").services == {"a": frozenset({"Outer.Inner.join_all"})}


@pytest.mark.parametrize(
    ("roles", "parts"),
    [
        ({"node": {"services": {"a": ["*"]}}}, ["node", "is reserved"]),
        ({"guardian": {"services": {"a": ["*"]}}}, ["guardian", "is reserved"]),
        ({"a b": {"services": {"a": ["*"]}}}, ["a b", "is not a role's name"]),
        ({"a/0x1": {"services": {"a": ["*"]}}}, ["is not a role's name"]),
        ({"x" * 33: {"services": {"a": ["*"]}}}, ["is not a role's name"]),
        ({"r": {}}, ["r: gives nothing"]),
        ({"r": {"services": {}}}, ["r.services: is not a section"]),
        ({"r": {"service": {"a": ["*"]}}}, ["r.service", "no such setting"]),
        ({"r": {"services": {"A": ["*"]}}}, ["r.services.A", "not a service's name"]),
        ({"r": {"services": {"a": "*"}}}, ["r.services.a", "is not a list"]),
        ({"r": {"services": {"a": []}}}, ["r.services.a", "is not a list of 1 to"]),
        ({"r": {"services": {"a": ["x y"]}}}, ["r.services.a", "'x y' is not a method pattern"]),
        ({"r": {"services": {"a": [3]}}}, ["r.services.a", "'3' is not a method pattern"]),
        ({"r": {"bits": 3}}, ["r.bits", "is not a section"]),
        ({"r": {"bits": {"128": {"a": ["*"]}}}}, ["r.bits.128", "is not a bit"]),
        ({"r": {"bits": {"01": {"a": ["*"]}}}}, ["r.bits.01", "is not a bit"]),
        ({"r": {"bits": {"x": {"a": ["*"]}}}}, ["r.bits.x", "is not a bit"]),
        (
            {"r": {"services": {"a": ["*"]}, "bits": {"0": {"a": ["*"]}}}},
            ["r.bits.0", "bit 0 is `services`"],
        ),
        ({"r": {"services": {"a": ["*"]}, "where": "x=1"}}, ["r.where", "is not a list"]),
        ({"r": {"services": {"a": ["*"]}, "where": ["x"]}}, ["r.where", "not a constraint"]),
        ({"r": {"services": {"a": ["*"]}, "where": ["b/x=1"]}}, ["r.where", "does not give"]),
        ({"r": {"services": {"a": ["*"]}, "where": [1]}}, ["r.where", "is not text"]),
        ({f"r{n}": {"services": {"a": ["*"]}} for n in range(257)}, ["257 roles"]),
    ],
)
def test_what_is_wrong_in_roles(roles: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Rules(roles)
    for part in parts:
        assert part in caught.value.message, caught.value.message
    assert caught.value.hint


@given(
    st.dictionaries(
        st.text(max_size=8) | st.sampled_from(["r", "services", "bits", "where", "0", "1"]),
        st.recursive(
            st.integers() | st.text(max_size=8) | st.booleans() | st.floats(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["services", "bits", "where", "pubsub", "1", "*"]),
                    inner,
                    max_size=3,
                )
            ),
            max_leaves=8,
        ).flatmap(lambda v: st.just(v) if isinstance(v, dict) else st.just({"services": v})),
        max_size=3,
    )
)
def test_no_roles_do_anything_but_load_or_be_refused(roles: dict[str, Any]) -> None:
    try:
        rules = Rules(roles)
    except InvalidArgument:
        return
    for name in roles:
        assert isinstance(rules.profile(name), RoleProfile)
