"""Wallets and profiles from the command line, `dev`, and what the commands cost to load."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugins.auth_evm.tests.cli.anvils import CLUSTER, World, dead_url, invoke, wait_until
from plugins.auth_evm.tests.contract.chains import INSTALL, find_anvil

from wetware.testing import Home
from wetware_auth_evm.cli import profiles
from wetware_auth_evm.cli.words import parse_time, span, when, who
from wetware_auth_evm.login import wallets

SECRET = "4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318"
ADDRESS = "0x2c7536E3605D9C16a7a3D7b1898e529396a65c23"


# --- what it costs --------------------------------------------------------------------------------


def test_the_commands_are_declared_without_heavy_imports() -> None:
    code = (
        "import sys, wetware_auth_evm.plugin\n"
        "import wetware_auth_evm.cli.mount, wetware_auth_evm.cli.declarations\n"
        "heavy = {'web3', 'eth_account', 'eth_abi', 'eth_hash', 'aiohttp', 'coincurve', 'capnp'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_and_logging_in_need_no_web3() -> None:
    code = (
        "import sys, wetware_auth_evm.cli.records, wetware_auth_evm.cli.sessions\n"
        "print(sorted({'web3', 'eth_account'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_with_half_of_the_extra_the_remedy_is_said(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('eth_hash', 'eth_abi'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['ww', 'auth', 'evm', 'status']\n"
        "from wetware.cli import main\n"
        "main()\n"
    )
    with Home(tmp_path) as home:
        done = subprocess.run(
            [sys.executable, "-c", code], env=home.env, capture_output=True, text=True, check=False
        )
    assert done.returncode == 78
    assert "pip install 'wetware[evm]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_through_ww(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        text = home.ww("auth", "evm", "--help", check=True).stdout
        assert "ww auth" in home.ww("auth", "--help", check=True).stdout
    for command in (
        "dev", "deploy", "grant", "revoke", "revoke-all", "reset-scope", "renounce", "pause",
        "unpause", "set-admin", "bind-key", "unbind-key", "transfer-owner", "accept-owner",
        "list", "can", "status", "audit", "login", "logout", "import-key", "new-key", "address",
        "export-profile", "use-profile",
    ):  # fmt: skip
        assert f"\n  {command} " in text


# --- wallets --------------------------------------------------------------------------------------


def test_new_key_and_address(home: Path) -> None:
    made = invoke("new-key", "ada")
    assert made.code == 0
    assert "in the clear" in made.err
    assert invoke("address", key="ada").out == made.out
    assert invoke("address", "--json", key="ada").json["address"] == made.out.strip()
    again = invoke("new-key", "ada")
    assert again.code == 78
    assert "never overwritten" in again.says
    assert "new-key" in invoke("address").says


def test_new_key_with_a_passphrase(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WW_PASSPHRASE", "p")
    made = invoke("new-key", "--json")
    assert made.json["encrypted"] is True
    assert "(encrypted)" in made.err
    monkeypatch.delenv("WW_PASSPHRASE")
    refused = invoke("new-key", "other", "--passphrase")
    assert refused.code == 78
    assert "WW_PASSPHRASE" in refused.says
    assert wallets.find("other") is None


def test_import_from_stdin_and_from_a_keystore(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = invoke("import-key", "-", "--name", "ada", stdin=SECRET + "\n")
    assert clear.out.strip() == ADDRESS
    store = tmp_path / "UTC--keystore"
    wallet = wallets.load("ada")
    store.write_text(json.dumps(wallets.encrypt(wallet, "pass", n=1 << 12)))
    refused = invoke("import-key", str(store), key="bob")
    assert refused.code == 78
    assert "WW_PASSPHRASE" in refused.says
    monkeypatch.setenv("WW_PASSPHRASE", "pass")
    done = invoke("import-key", str(store), "--json", key="bob")
    assert done.json["address"] == ADDRESS
    assert done.json["encrypted"] is True
    assert stat.S_IMODE(Path(done.json["file"]).stat().st_mode) == 0o600
    assert wallets.load("bob") == wallet


@pytest.mark.parametrize(
    ("file", "stdin", "code", "says"),
    [
        (SECRET, "", 2, "shell's history"),
        ("0x" + SECRET, "", 2, "shell's history"),
        ("/nowhere", "", 2, "cannot read the key /nowhere"),
        ("-", "", 2, "standard input is empty"),
        ("-", "00", 78, "64 hex digits"),
        ("-", "{}", 78, "no wallet"),
        ("-", '{"version": 3, "crypto": {}}', 78, "no passphrase|no keystore|WW_PASSPHRASE"),
    ],
)
def test_what_is_no_key_is_not_imported(
    home: Path, file: str, stdin: str, code: int, says: str
) -> None:
    import re

    done = invoke("import-key", file, "--name", "x", stdin=stdin)
    assert done.code == code
    assert re.search(says, done.says)
    assert SECRET not in done.says
    assert wallets.find("x") is None


def test_a_name_that_is_a_path_is_refused(home: Path) -> None:
    done = invoke("new-key", "../x")
    assert done.code == 2
    assert "not the name of a wallet" in done.says


# --- profiles -------------------------------------------------------------------------------------


def test_a_profile_goes_from_one_home_to_another(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = world.home / "node"
    node.mkdir(parents=True)
    (node / "node.json").write_text(
        json.dumps(
            {"cluster": CLUSTER, "peer_id": "12D3KooWx", "addrs": ["/ip4/127.0.0.1/tcp/4001"]}
        )
    )
    exported = world.ok("export-profile")
    found = exported.json
    assert found["cluster"] == CLUSTER
    assert found["nodes"] == ["/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWx"]
    assert found["genesis_hash"] == world.anvil.rpc("eth_getBlockByNumber", "0x0", False)["hash"]
    assert len(found["code_hash"]) == 66
    assert "on this machine alone" in exported.err
    file = tmp_path / "cluster.json"
    world.ok("export-profile", str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()) == found

    monkeypatch.setenv("WW_HOME", str(tmp_path / "other"))
    assert invoke("status").code == 78
    used = invoke("use-profile", "-", stdin=exported.out)
    assert used.code == 0, used.says
    kept = invoke("status", "--json")
    assert kept.code == 0, kept.says
    assert kept.json["contract"] == who(world.contract)


def test_a_profile_of_another_chain_or_contract_is_not_kept(world: World) -> None:
    good = world.ok("export-profile").json
    for change, says in (
        ({"genesis_hash": "0x" + "11" * 32}, "another first block"),
        ({"code_hash": "0x" + "11" * 32}, "another contract"),
        ({"contract": world.address("ada")}, "no contract at"),
        ({"chain_id": 5}, "is of chain 5"),
        ({"endpoints": [dead_url()]}, "--offline"),
        ({"endpoints": []}, "no endpoint"),
    ):
        done = invoke("use-profile", "-", stdin=json.dumps(good | change))
        assert done.code != 0
        assert says in done.says
        assert not profiles.profile_path().exists()
    offline = good | {"endpoints": [dead_url()]}
    assert invoke("use-profile", "-", "--offline", stdin=json.dumps(offline)).code == 0
    assert stat.S_IMODE(profiles.profile_path().stat().st_mode) == 0o600


def test_a_profile_that_is_hidden_by_ww_toml_is_said_to_be(world: World) -> None:
    good = world.ok("export-profile").json
    deployed = invoke("deploy", "--rpc", world.anvil.url, "--write")
    assert deployed.code == 0, deployed.says
    done = invoke("use-profile", "-", stdin=json.dumps(good))
    assert "is taken before it" in done.err


# --- dev ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "number"),
    [pytest.param("anvil", signal.SIGINT, marks=pytest.mark.long), ("eth-tester", signal.SIGHUP)],
)
def test_dev_runs_a_chain_that_the_commands_find(tmp_path: Path, engine: str, number: int) -> None:
    anvil = find_anvil()
    if engine == "anvil" and anvil is None:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    with Home(tmp_path, {"WW_ANVIL": str(anvil) if engine == "anvil" else "none"}) as home:
        process = home.start_ww("auth", "evm", "dev", "--json")
        assert process.stdout is not None
        file = tmp_path / ".wetware" / "node" / "plugins" / "auth_evm" / "dev.json"
        wait_until(lambda: file.exists() or process.poll() is not None, 60)
        wait_until(lambda: home.ww("auth", "evm", "status").returncode == 0, 60)
        status = json.loads(home.ww("auth", "evm", "status", "--json", check=True).stdout)
        own = home.ww("auth", "evm", "address", check=True).stdout.strip()
        assert status["state"]["owner"] == own
        granted = home.ww("auth", "evm", "grant", "chatter", ADDRESS, check=True)
        assert "warning: the node here does not know the role 'chatter'" in granted.stderr
        near = home.ww("auth", "evm", "grant", "memba", ADDRESS, "--calldata", check=True)
        assert "It knows admin, member, reader; did you mean member?" in near.stderr
        known = home.ww("auth", "evm", "grant", "member", ADDRESS, "--calldata", check=True)
        assert known.stderr == ""
        assert granted.stderr.splitlines()[-1] == "final"
        refused = home.ww("auth", "evm", "revoke", "other", ADDRESS)
        assert f"{ADDRESS} holds no other in default that stands" in refused.stderr
        assert refused.returncode == 77
        history = json.loads(home.ww("auth", "evm", "audit", "--json", check=True).stdout)
        assert history["complete"]
        assert history["events"][-1]["account"] == ADDRESS
        login = home.ww("auth", "evm", "login", "--cluster", CLUSTER, check=True)
        assert "with admin" in login.stdout
        there = home.ww("auth", "evm", "dev", check=True)
        assert there.stdout.strip() == json.loads(file.read_text())["url"]
        assert "runs already" in there.stderr
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        begun: dict[str, Any] = json.loads(out)
        assert (begun["owner"], begun["url"]) == (own, there.stdout.strip())
        assert begun["engine"] == engine
        gone = home.ww("auth", "evm", "status")
        assert gone.returncode == 1
        first = gone.stderr.splitlines()[0]
        assert first.startswith("problem: no endpoint of the local chain answers"), "and no other"
        assert "start it again with `ww node --auth evm --dev`" in gone.stderr
        login = home.ww("auth", "evm", "login")
        assert "ww: the node of this try-out does not run" in login.stderr


# --- times ----------------------------------------------------------------------------------------

NOW = 1_800_000_000


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("90d", NOW + 90 * 86_400),
        ("12h", NOW + 12 * 3600),
        ("now", NOW),
        ("2027-01-31", 1801353600),
        ("2027-01-31T12:00", 1801396800),
        ("2027-01-31T12:00+02:00", 1801389600),
    ],
)
def test_times_are_read(text: str, at: int) -> None:
    assert parse_time(text, NOW, "it") == at


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5, "5 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3600, "1 h"),
        (86_400, "1 day"),
        (9e5, "10 days"),
    ],
)
def test_spans_are_written(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_moments_are_written_with_their_distance() -> None:
    assert when(NOW - 3600, NOW) == "2027-01-15 07:00:00 UTC (1 h ago)"
    assert when(NOW + 7200, NOW).endswith("(in 2 h)")
    assert when(1 << 60, NOW).startswith("second ")


@pytest.mark.parametrize("level", ["[", '{"a":', '{"}":', '["]",', '{"\\"}":'])
def test_nested_json_of_an_endpoint_is_refused_where_recursion_has_no_limit(level: str) -> None:
    """A bracket in a string, beside one that is none, hid the depth; the process died of it."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.setrecursionlimit(10**6)\n"
            "from wetware_auth_evm.chain.endpoints import _parse\n"
            "try: _parse(bytearray(sys.argv[1].encode() * 300_000))\n"
            "except ValueError as exc: print(exc)",
            level,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "nested too deeply\n"), done.stderr


def test_signing_leaves_the_limit_of_recursion() -> None:
    """Libraries that sign raise it for the whole process, which then dies of nested JSON."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from wetware_auth_evm.cli import writes as w\n"
            "from wetware_auth_evm.login import wallets\n"
            "wallet = wallets.Wallet.from_secret(bytes([1]) * 32)\n"
            "tx = w.Transaction(to=bytes(20), data=b'', chain_id=1)\n"
            "w.sign(wallet, tx, 21000, w.Fees(1, None), 0)\n"
            "print(sys.getrecursionlimit(), 'eth_account' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1000 True\n", done.stderr
