"""A try-out chain of each engine: begun, gone on with, killed, damaged."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins.auth_evm.tests.dev.conftest import anvil_path

from wetware.errors import ConfigError, KeyFileError
from wetware.testing import wait_for
from wetware_auth_evm.chain.events import role_id
from wetware_auth_evm.cli import abi
from wetware_auth_evm.dev import anvil, tryout
from wetware_auth_evm.dev.process import RpcFailed, call
from wetware_auth_evm.dev.tryout import CHAIN_ID, DevChain
from wetware_auth_evm.login import wallets
from wetware_auth_evm.login.wallets import Wallet

Starter = Callable[..., DevChain]
HOLDER = """\
import sys, time
from pathlib import Path
from wetware.base.log import get_logger
from wetware_auth_evm.dev import tryout
chain = tryout.start(Path(sys.argv[1]), log=get_logger("test"))
print("up", flush=True)
time.sleep(600)
"""
"""A process that holds a chain, as a node does."""


def _port(chain: DevChain) -> int:
    return int(chain.url.rpartition(":")[2])


def _blocks(chain: DevChain) -> list[str]:
    newest = int(call(_port(chain), "eth_blockNumber"), 16)
    return [
        call(_port(chain), "eth_getBlockByNumber", hex(n), False)["hash"] for n in range(newest + 1)
    ]


def _seq(chain: DevChain, at: Any = "latest") -> int:
    query = {"to": "0x" + chain.contract.hex(), "data": "0x" + abi.calldata("state").hex()}
    return int(call(_port(chain), "eth_call", query, at)[2:66], 16)


def _rights(chain: DevChain, role: str, account: bytes) -> int:
    data = abi.calldata("rightsOf", role_id(chain.scope), role_id(role), account)
    query = {"to": "0x" + chain.contract.hex(), "data": "0x" + data.hex()}
    return int(call(_port(chain), "eth_call", query, "latest"), 16)


def _grant(chain: DevChain, wallet: Wallet, role: str, account: bytes) -> None:
    data = abi.calldata(
        "grant", role_id(chain.scope), role_id(role), account, 0, int(time.time()) + 86_400, 1
    )
    tryout._send(_port(chain), wallet, chain.contract, data, 300_000)


def _child(chain: DevChain) -> int:
    """The chain's process."""
    kept = json.loads((Path(os.environ["WW_HOME"]).parent / "plugin" / "dev.json").read_text())
    assert kept["url"] == chain.url
    return int(kept["pid"])


def _alive(pid: int) -> bool:
    """Whether there is a process, be it a zombie."""
    return Path(f"/proc/{pid}").exists()


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def _holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.communicate()


# --- the first start, and the next ones -----------------------------------------------------------


def test_the_first_start_deploys_and_makes_the_user_its_owner(
    engine: str, starter: Starter, tmp_path: Path
) -> None:
    chain = starter()
    wallet = wallets.get("default")
    assert (chain.engine, chain.chain_id, chain.owner) == (engine, CHAIN_ID, wallet.address)
    assert int(call(_port(chain), "eth_chainId"), 16) == CHAIN_ID
    assert _rights(chain, "admin", wallet.address), "the owner has no role"
    assert not _rights(chain, "member", wallet.address)
    kept = json.loads((tmp_path / "plugin/dev.json").read_text())
    assert bytes.fromhex(kept["contract"][2:]) == chain.contract
    assert bytes.fromhex(kept["owner"][2:]) == wallet.address
    assert (kept["url"], kept["scope"], kept["engine"]) == (chain.url, "default", engine)
    assert bytes.fromhex(kept["genesis_hash"][2:]) == chain.genesis_hash
    for path in (tmp_path / "plugin/dev.json", *(tmp_path / "plugin/dev").iterdir()):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE((tmp_path / "plugin/dev").stat().st_mode) == 0o700
    for part in (chain.url, "0x", "ww auth evm login", "ww sub chat", "ww auth evm grant"):
        assert part in chain.banner


def test_a_restart_has_the_same_contract_blocks_and_port(engine: str, starter: Starter) -> None:
    first = starter()
    wallet = wallets.load("default")
    _grant(first, wallet, "member", bytes(19) + b"\1")
    blocks, port = _blocks(first), _port(first)
    first.close()
    assert not _listening(port)
    again = starter()
    assert _blocks(again) == blocks
    assert (again.contract, again.genesis_hash, again.deployed_at, again.url) == (
        first.contract,
        first.genesis_hash,
        first.deployed_at,
        first.url,
    )
    assert _seq(again) == 3, "the deployment, the owner's role, and the grant: nothing twice"
    _grant(again, wallet, "member", bytes(19) + b"\2")
    assert _blocks(again)[: len(blocks)] == blocks


@pytest.mark.long
def test_many_restarts_have_the_same_first_block(engine: str, starter: Starter) -> None:
    """anvil makes a new one at each start, and saves it beside the right one."""
    chain = starter()
    wallet = wallets.load("default")
    blocks = _blocks(chain)
    for number in range(6):
        chain.close()
        second = int(time.time())
        wait_for(lambda now=second: int(time.time()) > now, "another second", within_s=3)
        chain = starter()
        assert _blocks(chain) == blocks
        _grant(chain, wallet, "member", bytes(19) + bytes([number + 1]))
        blocks = _blocks(chain)


def test_an_owner_that_gave_its_role_up_does_not_get_it_back(engine: str, starter: Starter) -> None:
    first = starter()
    wallet = wallets.load("default")
    data = abi.calldata("revoke", role_id("default"), role_id("admin"), wallet.address)
    tryout._send(_port(first), wallet, first.contract, data, 300_000)
    first.close()
    assert not _rights(starter(), "admin", wallet.address)


def test_a_start_that_was_cut_off_before_the_grant_goes_on(
    engine: str, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as cut:
        cut.setattr(tryout, "GRANT_S", -86_400)
        with pytest.raises(ConfigError, match="does not do what it should"):
            starter()
    chain = starter()
    assert _seq(chain) == 2
    assert _rights(chain, "admin", wallets.get("default").address)


def test_gas_costs_nothing(engine: str, starter: Starter) -> None:
    """A wallet that was made a minute ago can send: whoever is granted a role can bind a key."""
    chain = starter()
    owner, poor = wallets.load("default"), Wallet.from_secret(b"\7" * 32)
    assert int(call(_port(chain), "eth_getBalance", "0x" + poor.address.hex(), "latest"), 16) == 0
    _grant(chain, owner, "member", poor.address)
    data = abi.calldata("renounceAll", role_id("default"), role_id("member"))
    tryout._send(_port(chain), poor, chain.contract, data, 300_000)
    assert not _rights(chain, "member", poor.address)
    assert call(_port(chain), "eth_gasPrice") == "0x0"
    newest = call(_port(chain), "eth_getBlockByNumber", "latest", False)
    assert newest["baseFeePerGas"] == "0x0"


def test_state_by_block_hash(engine: str, starter: Starter) -> None:
    """What the follower asks: the state at exactly that block (EIP-1898)."""
    chain = starter()
    wallet = wallets.load("default")
    for number in range(1, 4):
        _grant(chain, wallet, "member", bytes(19) + bytes([number]))
    blocks = _blocks(chain)
    assert [_seq(chain, {"blockHash": h}) for h in blocks[1:]] == [1, 2, 3, 4, 5]
    with pytest.raises(RpcFailed):
        _seq(chain, {"blockHash": "0x" + "ab" * 32})
    chain.close()
    again = starter()
    assert _seq(again, {"blockHash": blocks[-1]}) == 5
    if engine == "eth-tester":
        assert [_seq(again, {"blockHash": h}) for h in blocks[1:]] == [1, 2, 3, 4, 5]
    else:  # anvil keeps the newest state only: an error, and not another block's state
        with pytest.raises(RpcFailed, match="BlockOutOfRange"):
            _seq(again, {"blockHash": blocks[2]})


def test_the_logs_are_those_of_the_contract(engine: str, starter: Starter) -> None:
    from wetware_auth_evm.chain.events import fold, genesis
    from wetware_auth_evm.chain.replica import read_logs

    chain = starter()
    _grant(chain, wallets.load("default"), "member", bytes(19) + b"\1")
    asked = {"address": "0x" + chain.contract.hex(), "fromBlock": "0x0", "toBlock": "latest"}
    events = read_logs(call(_port(chain), "eth_getLogs", asked), chain.contract)
    assert [e.name for e in events] == ["OwnerChanged", "Granted", "Granted"]
    head = genesis(CHAIN_ID, chain.contract)
    for event in events:
        head = fold(head, event.leaf)
    query = {"to": asked["address"], "data": "0x" + abi.calldata("state").hex()}
    assert call(_port(chain), "eth_call", query, "latest")[66:130] == head.hex()
    other = {**asked, "address": "0x" + "11" * 20}
    assert call(_port(chain), "eth_getLogs", other) == []
    last = hex(int(call(_port(chain), "eth_blockNumber"), 16))
    assert len(call(_port(chain), "eth_getLogs", {**asked, "fromBlock": last})) == 1


# --- whose it is ----------------------------------------------------------------------------------


def test_an_owner_whose_key_is_elsewhere_has_to_be_granted_to(
    engine: str, starter: Starter
) -> None:
    chain = starter(owner=b"\5" * 20)
    assert chain.owner == b"\5" * 20
    assert _seq(chain) == 1
    assert wallets.find("default") is None, "no wallet was asked for"


def test_an_encrypted_wallet_without_its_passphrase_stops_the_start(
    engine: str, starter: Starter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WW_PASSPHRASE", "correct horse")
    wallets.load_or_create("default")
    monkeypatch.delenv("WW_PASSPHRASE")
    with pytest.raises(KeyFileError, match="encrypted"):
        starter()
    assert not (tmp_path / "plugin/dev.json").exists()
    monkeypatch.setenv("WW_PASSPHRASE", "correct horse")
    chain = starter()
    assert _rights(chain, "admin", chain.owner)
    environ = Path(f"/proc/{_child(chain)}/environ").read_bytes()
    assert b"WW_PASSPHRASE" not in environ, "the chain was given the passphrase"
    chain.close()
    monkeypatch.delenv("WW_PASSPHRASE")
    assert starter().contract == chain.contract, "a restart asks for no passphrase"


def test_another_scope_is_refused(engine: str, starter: Starter) -> None:
    starter().close()
    with pytest.raises(ConfigError, match="begun with the scope 'default'"):
        starter(scope="other")


# --- ends -----------------------------------------------------------------------------------------


def test_close_leaves_nothing_and_may_be_called_twice(engine: str, starter: Starter) -> None:
    chain = starter()
    pid = _child(chain)
    assert _alive(pid)
    chain.close()
    assert not _alive(pid), "running, or a zombie"
    chain.close()


def test_kill_9_of_the_parent_ends_the_chain_with_its_state(
    engine: str, starter: Starter, tmp_path: Path
) -> None:
    directory = tmp_path / "plugin"
    with _holder(directory) as holder:
        kept = json.loads((directory / "dev.json").read_text())
        port = int(kept["port"])
        wallet = wallets.load("default")
        data = abi.calldata(
            "grant", role_id("default"), role_id("x"), b"\1" * 20, 0, int(time.time()) + 9999, 1
        )
        contract = bytes.fromhex(kept["contract"][2:])
        tryout._send(port, wallet, contract, data, 300_000)
        newest = call(port, "eth_getBlockByNumber", "latest", False)
        holder.kill()  # at once: nothing had the time to be saved
        holder.wait()
    wait_for(lambda: not _alive(kept["pid"]), "the end of the chain", within_s=60)
    assert not _listening(port)
    again = starter()
    assert _blocks(again)[-1] == newest["hash"], "a block that was acknowledged is gone"
    assert _rights(again, "x", b"\1" * 20)


def test_a_start_waits_for_the_chain_of_a_killed_node(
    engine: str, starter: Starter, tmp_path: Path
) -> None:
    with _holder(tmp_path / "plugin") as holder:
        holder.kill()
        chain = starter()  # right away: one of the two has to wait for the other
    assert _seq(chain) == 2


def test_a_chain_that_is_killed_is_reaped_and_logged(
    engine: str, starter: Starter, capfd: pytest.CaptureFixture[str]
) -> None:
    from wetware.base import log

    log.setup("info", "text")
    chain = starter()
    pid = _child(chain)
    if engine == "anvil":  # what a power failure takes back is bounded by SAVE_S
        state = Path(os.environ["WW_HOME"]).parent / "plugin/dev/anvil.json"
        number = int(call(_port(chain), "eth_blockNumber"), 16)
        wait_for(lambda: (anvil._read(state) or (-1,))[0] == number, "the state on disk")
    blocks = _blocks(chain)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not _alive(pid), "a zombie that is reaped", within_s=60)
    said = ""

    def logged() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "dev.chain_ended" in said

    wait_for(logged, "a line about it", within_s=60)
    chain.close()
    assert _blocks(starter()) == blocks


def test_a_second_process_is_refused(engine: str, starter: Starter, tmp_path: Path) -> None:
    with _holder(tmp_path / "plugin"):
        with pytest.raises(ConfigError, match="used by another process"):
            starter()
        kept = json.loads((tmp_path / "plugin/dev.json").read_text())
        assert _listening(kept["port"]), "the one that runs was disturbed"


def test_a_port_that_is_taken_is_replaced(engine: str, starter: Starter) -> None:
    """And never talked to: whoever has it now is not our chain."""
    first = starter()
    first.close()
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", _port(first)))
        squatter.listen()
        squatter.settimeout(0)
        again = starter()
        assert _port(again) != _port(first)
        assert again.contract == first.contract
        with pytest.raises(BlockingIOError):
            squatter.accept()


def test_a_start_that_fails_leaves_no_child(
    engine: str, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    real = tryout._begin

    def fail(port: int, *args: Any) -> Any:
        started.append(port)
        real(port, *args)
        raise RpcFailed("no")

    monkeypatch.setattr(tryout, "_begin", fail)
    with pytest.raises(ConfigError, match="does not do what it should"):
        starter()
    assert not _listening(started[0])


def test_from_another_thread_it_is_refused(engine: str, starter: Starter) -> None:
    """It would end with that thread."""
    import threading

    raised: list[BaseException] = []

    def run() -> None:
        try:
            starter()
        except RuntimeError as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised


# --- damage ---------------------------------------------------------------------------------------


def test_a_chain_that_was_replaced_is_refused(
    engine: str, starter: Starter, tmp_path: Path
) -> None:
    """Begun anew under the same name, it would be another cluster's."""
    starter().close()
    for path in (tmp_path / "plugin/dev").iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(ConfigError, match="it was lost, or replaced"):
        starter()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"contract": 1}', '{"contract": "0x11", "owner": "", "port": 0}'],
)
@pytest.mark.parametrize("engine", ["eth-tester"], indirect=True)
def test_a_damaged_dev_json_is_refused(
    engine: str, starter: Starter, tmp_path: Path, text: str
) -> None:
    (tmp_path / "plugin/dev.json").write_text(text)
    with pytest.raises(ConfigError, match="damaged"):
        starter()
    assert not (tmp_path / "plugin/dev/chain.sqlite").exists()


@pytest.mark.parametrize("engine", ["anvil"], indirect=True)
def test_what_anvil_left_half_written_is_not_used(
    engine: str, starter: Starter, tmp_path: Path
) -> None:
    chain = starter()
    blocks = _blocks(chain)
    chain.close()
    place = tmp_path / "plugin/dev"
    whole = (place / "anvil.json").read_text()
    (place / "anvil-exit.json").write_text(whole[: len(whole) // 2])
    chain = starter()
    assert _blocks(chain) == blocks
    chain.close()
    (place / "anvil-exit.json").unlink(missing_ok=True)
    (place / "anvil.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="not whole"):
        starter()


@pytest.mark.parametrize("engine", ["anvil"], indirect=True)
def test_anvil_that_is_gone_is_not_replaced_by_another_engine(
    engine: str, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    starter().close()
    monkeypatch.setenv("WW_ANVIL", "none")
    with pytest.raises(ConfigError, match="begun with anvil"):
        starter()


@pytest.mark.parametrize("engine", ["eth-tester"], indirect=True)
def test_anvil_that_came_later_is_not_used(
    engine: str, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = starter()
    first.close()
    monkeypatch.setenv("WW_ANVIL", str(anvil_path()))
    again = starter()
    assert (again.engine, again.contract) == ("eth-tester", first.contract)


@pytest.mark.parametrize("engine", ["anvil"], indirect=True)
def test_an_anvil_that_does_not_start_is_said(
    engine: str, starter: Starter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "anvil"
    broken.write_text("#!/bin/sh\necho 'no such flag'\nexit 2\n")
    broken.chmod(0o755)
    monkeypatch.setenv("WW_ANVIL", str(broken))
    with pytest.raises(ConfigError, match="no such flag"):
        starter()


@pytest.mark.parametrize("engine", ["eth-tester"], indirect=True)
def test_what_an_earlier_version_began_is_refused(
    engine: str, starter: Starter, tmp_path: Path
) -> None:
    """Its chain was in a file of another kind; a new chain would be another cluster's."""
    starter().close()
    kept = tmp_path / "plugin/dev.json"
    kept.write_text(kept.read_text().replace("eth-tester", "py-evm"))
    with pytest.raises(ConfigError, match="begun by an earlier version") as caught:
        starter()
    assert "--data-dir DIR node --auth evm --dev" in str(caught.value.hint)


@pytest.mark.parametrize("engine", ["anvil"], indirect=True)
def test_what_an_earlier_version_kept_of_anvil_is_read(
    engine: str, starter: Starter, tmp_path: Path
) -> None:
    """It began without --timestamp: the time of the first block is in the state."""
    first = starter()
    blocks = _blocks(first)
    first.close()
    second = int(time.time())
    wait_for(lambda: int(time.time()) > second, "another second", within_s=3)
    assert _blocks(starter()) == blocks


@pytest.mark.parametrize("engine", ["anvil"], indirect=True)
def test_after_a_restart_anvil_has_the_time_of_now(engine: str, starter: Starter) -> None:
    """Its first block has the time of the first start, from which it would count on."""
    starter().close()
    second = int(time.time())
    wait_for(lambda: int(time.time()) > second + 2, "some seconds", within_s=5)
    chain = starter()
    _grant(chain, wallets.load("default"), "member", bytes(19) + b"\1")
    newest = call(_port(chain), "eth_getBlockByNumber", "latest", False)
    assert abs(int(newest["timestamp"], 16) - time.time()) < 2
