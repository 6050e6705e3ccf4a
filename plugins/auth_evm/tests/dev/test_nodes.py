"""Real `ww node --auth evm` processes in an empty home."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins.auth_evm.tests.dev.conftest import anvil_path

from wetware.testing import Home, NodeProcess, wait_for

EVM = ("--auth", "evm")
DEV = (*EVM, "--dev")


@pytest.fixture(params=[pytest.param("anvil", marks=pytest.mark.long), "eth-tester"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Home]:
    """An empty home of each engine; without anvil, nothing of it is on PATH either."""
    env = (
        {"WW_ANVIL": str(anvil_path())}
        if request.param == "anvil"
        else {"PATH": str(tmp_path / "nothing"), "WW_ANVIL": ""}
    )
    with Home(tmp_path / "home", env=env) as made:
        yield made


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Home]:
    """A home without anvil, for what does not depend on it."""
    with Home(tmp_path / "home", env={"WW_ANVIL": "none"}) as made:
        yield made


def _dev(node: NodeProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((node.data_dir / "plugins/auth_evm/dev.json").read_text())
    return found


def _listening(pid: int) -> set[str]:
    """Addresses, in hex as the kernel writes them, on which a process listens."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.add(words[1].rpartition(":")[0])
    return found


def _refused(home: Home, *args: str, data_dir: str = "n", **env: str) -> str:
    done = home.ww("--data-dir", str(home.path / data_dir), "node", *args, env=env, timeout=60)
    assert done.returncode == 78, (args, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert "try:" in done.stderr
    return done.stderr


# --- it works -------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [DEV, EVM], ids=["dev", "nothing configured"])
def test_a_fresh_machine(home: Home, args: tuple[str, ...]) -> None:
    """From an empty home: the banner, loopback only, and the commands that it prints."""
    started = time.monotonic()
    with home.node("n", args=args) as node:
        took_s = time.monotonic() - started
        kept = _dev(node)
        print(f"{kept['engine']}: ready after {took_s:.2f} s")  # noqa: T201
        wanted = "eth-tester" if home.env.get("WW_ANVIL") == "" else "anvil"
        assert kept["engine"] == wanted
        node.wait_log("for more than a try-out")
        said = node.log.read_text()
        for part in ("THIS IS A TRY-OUT", kept["contract"], kept["url"], kept["owner"]):
            assert part in said
        assert _listening(node.process.pid) <= {"0100007F"}
        assert _listening(node.process.pid), "it listens nowhere"
        assert _listening(kept["pid"]) == {"0100007F"}
        for command in (["auth", "evm", "login"], ["whoami"], ["pub", "chat", "hello"]):
            typed = ["ww", "--data-dir", str(node.data_dir), *command]
            assert " ".join(typed) in said, "the banner does not say so"
            node.ww(*command, check=True)
        assert kept["owner"] in node.ww("whoami", check=True).stdout
        refused = node.ww("invite")
        assert refused.returncode == 77
        assert "nobody can join it" in refused.stderr
        assert _private(home.path / "n")


def _private(path: Path) -> bool:
    return not any(p.lstat().st_mode & 0o077 for p in path.rglob("*") if not p.is_symlink())


def test_a_restart_keeps_cluster_contract_and_session(home: Home) -> None:
    with home.node("n", args=DEV) as node:
        before, cluster = _dev(node), node.info["cluster"]
        node.ww("auth", "evm", "login", check=True)
    assert not Path(f"/proc/{before['pid']}").exists(), "the chain outlives its node"
    with home.node("n", args=EVM) as node:  # begun as a try-out, it goes on as one
        after = _dev(node)
        assert node.info["cluster"] == cluster
        same = ("contract", "owner", "genesis_hash", "deployed_at", "engine", "url")
        assert [after[name] for name in same] == [before[name] for name in same]
        node.ww("pub", "chat", "still logged in", check=True)
        assert "regressed" not in node.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_however_a_node_ends_its_chain_ends_too(home: Home, number: int) -> None:
    node = home.start_node("n", args=DEV).wait_ready()
    kept = _dev(node)
    node.process.send_signal(number)
    node.process.wait(60)
    wait_for(lambda: not Path(f"/proc/{kept['pid']}").exists(), "the chain's end", within_s=60)
    with home.node("n", args=DEV) as again:  # what the replica knew is still true
        assert _dev(again)["contract"] == kept["contract"]
        again.ww("auth", "evm", "login", check=True)
        assert "regressed" not in again.log.read_text()


def test_two_nodes_have_two_chains(plain: Home) -> None:
    with plain.node("a", args=DEV) as a, plain.node("b", args=DEV) as b:
        assert _dev(a)["contract"] != _dev(b)["contract"]
        assert a.info["cluster"] != b.info["cluster"]


@pytest.mark.long
def test_a_chain_that_dies_suspends_the_node(plain: Home) -> None:
    """And lets nobody in; the next start goes on."""
    with plain.node("n", args=DEV) as node:
        node.ww("auth", "evm", "login", check=True)
        os.kill(_dev(node)["pid"], signal.SIGKILL)
        node.wait_log("dev.chain_ended")
        node.wait_log("auth_evm.suspended", within_s=60)

        def out() -> bool:
            return node.ww("pub", "chat", "x").returncode != 0

        wait_for(out, "a refusal", within_s=60)
    with plain.node("n", args=DEV) as node:
        node.ww("pub", "chat", "back", check=True)


def test_the_wallet_of_a_key_name(plain: Home) -> None:
    """`ww --key ada node …`: what is printed says --key, too."""
    env = {"WW_ANVIL": "none", "WW_KEY": "ada"}
    with Home(plain.path, env=env) as home, home.node("n", args=DEV) as node:
        node.wait_log(f"ww --data-dir {node.data_dir} --key ada auth evm login")
        wallet = home.path / ".wetware/evm/wallets/ada.json"
        assert json.loads(wallet.read_text())["address"].lower() == _dev(node)["owner"].lower()


# --- it does not fall back ------------------------------------------------------------------------

LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0")
CONTRACT = "0x" + "11" * 20


def test_what_a_try_out_refuses(plain: Home, tmp_path: Path) -> None:
    assert "loopback only" in _refused(plain, *DEV, "--listen", "/ip4/0.0.0.0/tcp/0")
    assert not (plain.path / "n/plugins").exists(), "a chain was begun for nothing"
    with Home(tmp_path / "real") as real, real.node("a") as a:
        ticket = a.invite()
        assert "joins no cluster" in _refused(plain, *DEV, *LOOPBACK, "--join", ticket)
        # Without --dev it would join, and then it is no try-out: the cluster has another backend.
        said = _refused(plain, *EVM, *LOOPBACK, "--join", ticket, data_dir="m")
        assert "has the auth backend 'local'" in said
        assert "TRY-OUT" not in said
        assert not (plain.path / "m/plugins/auth_evm/dev.json").exists()


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ("chain_id = 1", "contract, endpoints"),
        (f'contract = "{CONTRACT}"', "chain_id, endpoints"),
        ('endpoints = ["http://127.0.0.1:1"]', "chain_id, contract"),
        (f'chain_id = 1\ncontract = "{CONTRACT}"', "endpoints"),
        ('scope = "default"', "chain_id, contract, endpoints"),
        ('roles = { a = { services = { pubsub = ["*"] } } }', "chain_id, contract, endpoints"),
    ],
)
def test_a_configuration_in_part_is_named(plain: Home, settings: str, missing: str) -> None:
    config = plain.path / ".wetware/ww.toml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(f"[plugins.auth_evm]\n{settings}\n")
    said = _refused(plain, *EVM, *LOOPBACK)
    assert "not complete" in said
    assert f"and not {missing}" in said
    assert "TRY-OUT" not in said
    assert not (plain.path / "n/plugins/auth_evm/dev").exists()
    assert not (plain.path / ".wetware/evm").exists(), "a wallet was made"


def test_a_variable_is_a_configuration_too(plain: Home) -> None:
    said = _refused(plain, *EVM, *LOOPBACK, WW_PLUGINS_AUTH_EVM_CHAIN_ID="1")
    assert "sets chain_id, and not contract, endpoints" in said


def test_a_data_directory_of_another_cluster(plain: Home) -> None:
    with plain.node("n"):  # auth_local
        pass
    for args in (EVM, DEV):
        said = _refused(plain, *args, *LOOPBACK)
        assert "has the auth backend 'local', and this node is started with 'evm'" in said
        assert "--auth local" in said
        assert not (plain.path / "n/plugins/auth_evm/dev").exists()
    with plain.node("n"):
        pass


def test_a_try_out_does_not_become_a_real_cluster(plain: Home) -> None:
    with plain.node("n", args=DEV) as node:
        kept = _dev(node)
    config = plain.path / ".wetware/ww.toml"
    config.write_text(
        "[plugins.auth_evm]\n"
        f'chain_id = 31337\ncontract = "{kept["contract"]}"\nendpoints = ["{kept["url"]}"]\n'
        'quorum = 1\nfinality = "dev"\n'
    )
    assert "that of a try-out" in _refused(plain, *EVM, *LOOPBACK)
    assert "--dev makes a chain of its own" in _refused(plain, *DEV, *LOOPBACK)


def test_the_settings_of_a_try_out(plain: Home) -> None:
    """With --dev, roles and scope may be set: roles in the place of those of a try-out."""
    config = plain.path / ".wetware/ww.toml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(
        '[plugins.auth_evm]\nscope = "team"\n'
        '[plugins.auth_evm.roles.admin]\nservices = { pubsub = ["*"], node = ["*"] }\n'
    )
    with plain.node("n", args=DEV) as node:
        assert _dev(node)["scope"] == "team"
        node.ww("auth", "evm", "login", check=True)
        node.ww("pub", "chat", "x", check=True)
        assert node.ww("ls").returncode == 77


def test_without_the_packages_it_says_what_to_install(plain: Home, tmp_path: Path) -> None:
    """As after `pip install wetware`: nothing is begun, and nothing falls back to auth_local."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('eth', 'eth_tester', 'eth_abi', 'eth_account', 'eth_hash', 'aiohttp',\n"
        "             'coincurve'):\n"
        "    sys.modules[name] = None\n"
    )
    said = _refused(plain, *DEV, *LOOPBACK, PYTHONPATH=str(site))
    assert "pip install 'wetware[evm]'" in said
    assert not (plain.path / "n/plugins/auth_evm/dev.json").exists()
