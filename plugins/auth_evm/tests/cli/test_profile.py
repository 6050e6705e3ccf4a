"""Where a command finds its chain: the order as a table, and what is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("eth_hash", reason="needs the extra: pip install 'wetware[evm]'")

from wetware.errors import ConfigError, InvalidArgument
from wetware_auth_evm.chain.profile import Profile
from wetware_auth_evm.cli import profiles as profile
from wetware_auth_evm.cli.profiles import resolve

C = {name: bytes([number]) * 20 for number, name in enumerate(("file", "dev", "toml", "own"), 1)}
CLUSTER = {name: f"{number:016x}" for number, name in enumerate(("node", "file", "own"), 1)}


def address(contract: bytes) -> str:
    return "0x" + contract.hex()


class Places:
    """The places where a profile can be."""

    def __init__(self, path: Path) -> None:
        self.home, self.data_dir, self.file = path / "home", path / "node", path / "file.json"
        self.home.mkdir()
        self.data_dir.mkdir()

    def make(self, *names: str) -> None:
        for name in names:
            getattr(self, f"_{name}")()

    def _file(self) -> None:
        self._profile("file", self.file, CLUSTER["file"])

    def _own(self) -> None:
        (self.home / "evm").mkdir()
        self._profile("own", self.home / "evm" / "profile.json", CLUSTER["own"])

    def _profile(self, name: str, path: Path, cluster: str) -> None:
        profile.save(Profile(5, C[name], name, (f"http://{name}.test",), cluster), path)

    def _dev(self) -> None:
        path = profile.dev_path(self.data_dir)
        path.parent.mkdir(parents=True)
        dev = {
            "url": "http://127.0.0.1:1", "chain_id": 31337, "contract": address(C["dev"]),
            "scope": "default", "owner": address(C["own"]), "engine": "anvil", "deployed_at": 1,
            "genesis_hash": "0x" + "ab" * 32, "pid": 1,
        }  # fmt: skip
        path.write_text(json.dumps(dev))

    def _toml(self) -> None:
        (self.home / "ww.toml").write_text(
            "[plugins.auth_evm]\nchain_id = 7\nscope = 'toml'\n"
            f"contract = '{address(C['toml'])}'\nendpoints = ['http://toml.test']\n"
        )

    def _node(self) -> None:
        (self.data_dir / "node.json").write_text(json.dumps({"cluster": CLUSTER["node"]}))

    def resolve(self, *names: str, **flags: Any) -> Profile:
        file = self.file if "file" in names else None
        return resolve(file=file, data_dir=self.data_dir, **flags)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    made = Places(tmp_path)
    monkeypatch.setenv("WW_HOME", str(made.home))
    for name in ("WW_CONFIG", "WW_NODE_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.mark.parametrize(
    ("there", "contract", "cluster"),
    [
        (("own",), "own", "own"),
        (("toml",), "toml", ""),
        (("toml", "own"), "toml", ""),
        (("dev",), "dev", ""),
        (("dev", "toml", "own"), "dev", ""),
        (("file", "dev", "toml", "own"), "file", "file"),
        (("node", "toml"), "toml", "node"),
        (("node", "dev", "toml", "own"), "dev", "node"),
        (("node", "own"), "own", "node"),
        (("node", "file"), "file", "file"),
    ],
)
def test_the_first_place_is_taken_as_a_whole(
    places: Places, there: tuple[str, ...], contract: str, cluster: str
) -> None:
    places.make(*there)
    found = places.resolve(*there)
    assert found.contract == C[contract]
    assert found.cluster == CLUSTER.get(cluster, "")
    assert found.chain_id == {"dev": 31337, "toml": 7}.get(contract, 5)
    assert found.scope == {"dev": "default"}.get(contract, contract)
    assert found.dev == (contract == "dev")
    assert len(found.endpoints) == 1
    assert contract in found.source or contract in ("own", "toml")


def test_flags_alone_are_enough(places: Places) -> None:
    found = resolve(rpc=["http://a.test", "http://a.test"], contract=address(C["dev"]), chain_id=9)
    assert (found.endpoints, found.contract, found.chain_id) == (("http://a.test",), C["dev"], 9)
    assert (found.scope, found.cluster, found.source) == ("default", "", "flags")


def test_flags_replace_single_fields(places: Places) -> None:
    places.make("own")
    found = places.resolve(rpc=["https://b.test/key"], scope="lab", cluster="f" * 16)
    assert (found.contract, found.chain_id) == (C["own"], 5)
    assert (found.endpoints, found.scope) == (("https://b.test/key",), "lab")
    assert found.cluster == "f" * 16


def test_with_another_chain_nothing_of_the_old_one_is_kept(places: Places) -> None:
    places.make("dev")
    other = places.resolve(rpc=["http://a.test"], contract=address(C["own"]), chain_id=1)
    assert (other.genesis_hash, other.deployed_at, other.dev, other.finality) == (b"", 0, False, "")
    with pytest.raises(ConfigError, match=r"endpoint.*contract"):
        places.resolve(chain_id=1)


def test_with_another_contract_the_cluster_is_another(places: Places) -> None:
    places.make("own")
    assert places.resolve(contract=address(C["dev"])).cluster == ""
    assert places.resolve(contract=address(C["own"])).cluster == CLUSTER["own"]


def test_what_is_missing_is_named_with_the_next_command(places: Places) -> None:
    with pytest.raises(ConfigError, match=r"endpoint.*contract") as info:
        places.resolve()
    for command in ("ww node --auth evm --dev", "use-profile", "deploy"):
        assert command in info.value.hint
    with pytest.raises(ConfigError, match=r"an endpoint \(--rpc URL\)$"):
        places.resolve(contract=address(C["own"]))
    with pytest.raises(ConfigError, match=r"the contract \(--contract ADDRESS\)$"):
        places.resolve(rpc=["http://a.test"])
    assert places.resolve(rpc=["http://a.test"], need_contract=False).contract == b""
    places.make("toml")
    with pytest.raises(ConfigError, match="of which cluster"):
        places.resolve().need_cluster()


@pytest.mark.parametrize(
    "url", ["", "a.test", "ftp://a.test", "http://", "http://a b", "http://a:99999999", "http://\n"]
)
def test_what_is_no_endpoint_is_refused_and_not_shown(places: Places, url: str) -> None:
    with pytest.raises(InvalidArgument, match="http:// or https:// URL") as info:
        resolve(rpc=[url], contract=address(C["own"]))
    assert url in ("", "http://") or url not in info.value.message


GOOD = Profile(5, C["own"], "s", ("http://a.test",), "ab" * 16, nodes=("/ip4/1.2.3.4/tcp/1",))


def test_a_profile_is_saved_privately_and_read_back(places: Places) -> None:
    path = profile.save(GOOD)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # an endpoint's URL may hold a key
    assert profile.read(path).as_dict() == GOOD.as_dict()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"v": 2}, "version 1"),
        ({"chain_id": 0}, "chain_id"),
        ({"chain_id": "5"}, "chain_id"),
        ({"chain_id": True}, "chain_id"),
        ({"contract": "0x12"}, "not an address"),
        ({"contract": 5}, "a text"),
        ({"endpoints": "http://a.test"}, "a list"),
        ({"endpoints": ["file:///etc/passwd"]}, "URL"),
        ({"endpoints": ["http://a.test"] * 17}, "at most 16"),
        ({"scope": "x" * 33}, "32 bytes"),
        ({"scope": ""}, "32 bytes"),
        ({"scope": "ROOT"}, "no cluster's"),
        ({"cluster": "../x"}, "cluster"),
        ({"genesis_hash": "0x12"}, "no hash"),
        ({"finality": "soon"}, "finality"),
        ({"nodes": ["a"] * 65}, "nodes"),
        ({"quorum": -1}, "quorum"),
    ],
)
def test_a_malformed_profile_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        profile.from_text(json.dumps(GOOD.as_dict() | change), "it")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 50_000, "7"])
def test_what_is_no_profile_at_all(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no profile"):
        profile.from_text(text, "it")
    (tmp_path / "f").write_bytes(b" " * (1 << 20))
    with pytest.raises(ConfigError, match="too long"):
        profile.read(tmp_path / "f")
    with pytest.raises(ConfigError, match="cannot read"):
        profile.read(tmp_path / "none")


@pytest.mark.parametrize(
    ("finality", "chain_id", "endpoint", "says"),
    [
        ("", 1, "http://127.0.0.1:1", "finalized"),
        ("", 5, "http://a.test", "finalized"),
        ("", 31337, "http://127.0.0.1:1", "latest"),
        ("depth:7", 5, "http://a.test", "depth:7"),
        ("mainnet", 5, "http://a.test", "finalized"),
        ("latest", 5, "http://a.test", "latest"),
    ],
)
def test_when_a_block_is_final(finality: str, chain_id: int, endpoint: str, says: str) -> None:
    made = Profile(chain_id, C["own"], "s", (endpoint,), finality=finality)
    assert str(made.when_final) == says


def test_a_damaged_dev_file_says_what_to_do(places: Places) -> None:
    places.make("dev", "own")
    profile.dev_path(places.data_dir).write_text("{}")
    with pytest.raises(ConfigError, match="damaged") as info:
        places.resolve()
    assert "start the node again" in info.value.hint
