"""The tutorial and the how-to of auth_evm, executed as they are written."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wetware.errors import EXIT_DENIED
from wetware.testing import NodeProcess, end_with_parent, wait_for

from .test_docs import _BLOCK, ROOT, Machine, machines

pytest.importorskip("eth_account", reason="needs the extra: pip install 'wetware[evm]'")

__all__ = ["machines"]

CONTRACTS = ROOT / "plugins/auth_evm/contracts"
INSTALL = "npm ci --no-audit --no-fund --prefix plugins/auth_evm/contracts"
TUTORIAL = "docs/tutorials/evm-tryout.md"
HOW_TO = "docs/how-to/evm-real-chain.md"
POLYGON = 137
PASSPHRASE = "correct horse battery staple"


def anvil() -> Path:
    found = [*CONTRACTS.glob("node_modules/@foundry-rs/anvil-*/bin/anvil")]
    if not found:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    return found[0]


def blocks(document: str) -> list[tuple[str, str, str, str]]:
    return _BLOCK.findall((ROOT / document).read_text())


# --- the tutorial ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ["anvil", "eth-tester"])
def test_the_try_out_works_as_it_is_written(
    machines: Callable[[str], Machine], engine: str
) -> None:
    desk = machines("desk")
    desk.env["WW_ANVIL"] = str(anvil()) if engine == "anvil" else "none"
    said: list[str] = []
    address, heard = "", ""
    for _, name, tag, text in blocks(TUTORIAL):
        machine, script = machines(name), text.replace("ADDRESS", address)
        if tag == "node":
            machine.start_node(script).wait_log(f"({engine}, ")
        elif tag == "background":
            machine.start(script)
            _until_subscribed(machine)
        else:
            done = machine.run(script, EXIT_DENIED if tag == "denied" else 0)
            assert "Traceback" not in done.stderr
            said.append(done.stdout + done.stderr)
            if "auth evm address" in script:
                address = done.stdout.strip().splitlines()[-1]
        if "hello from bob" in text:
            assert machine.background is not None
            assert machine.background.stdout is not None
            # "ready" may have been published once more than was waited for.
            heard = next(line for line in machine.background.stdout if line != "ready\n")
    assert re.fullmatch(r"0x[0-9a-fA-F]{40}", address)
    assert heard == "hello from bob\n"
    everything = "\n".join(said)
    assert "complete: all 3 events" in everything
    assert re.search(r"member\s+" + address, everything)
    assert "has no role in this cluster" in said[-1]


def _until_subscribed(machine: Machine) -> None:
    """The subscription in the background hears."""
    assert machine.background is not None
    tail = "ww audit tail --event service.opened --json -n 100"
    wait_for(
        lambda: any('"pubsub"' in line for line in machine.sh(tail).splitlines()),
        "the subscriber has opened pubsub",
    )
    process = machine.background
    assert process.stdout is not None
    line: list[str] = []
    reader = threading.Thread(target=lambda: line.append(process.stdout.readline()))  # type: ignore[union-attr]
    reader.start()
    wait_for(
        lambda: machine.sh("ww pub chat ready") is not None and not reader.is_alive(),
        "the subscriber hears",
    )
    assert line == ["ready\n"]


# --- the how-to -----------------------------------------------------------------------------------


class Chain:
    """An anvil with a block each second, final two blocks later: as a chain of others."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [
                *(str(anvil()), "--host", "127.0.0.1", "--port", "0"),
                *("--chain-id", str(POLYGON), "--block-time", "1", "--slots-in-an-epoch", "1"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=end_with_parent,
        )
        assert self.process.stdout is not None
        port = ""
        for line in self.process.stdout:
            if "Listening on" in line:
                port = line.rsplit(":", 1)[1].strip()
                break
        self.url = f"http://127.0.0.1:{port}"
        self._reader = threading.Thread(target=self.process.stdout.read, daemon=True)
        self._reader.start()

    @property
    def endpoints(self) -> list[str]:
        """The same node, three times: what three operators would be."""
        return [f"{self.url}/?{name}" for name in ("one", "two", "three")]

    def rpc(self, method: str, *params: Any) -> Any:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        request = urllib.request.Request(  # noqa: S310 - loopback
            self.url, body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return json.load(answer)["result"]

    def fund(self, address: str) -> None:
        self.rpc("anvil_setBalance", address, hex(10**20))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def chain() -> Iterator[Chain]:
    made = Chain()
    with contextlib.closing(made):
        yield made


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_how_to_works_as_it_is_written(
    machines: Callable[[str], Machine], chain: Chain
) -> None:
    """A chain that looks like Polygon; two nodes, a user without coins."""
    known = {"ENDPOINTS": " ".join(f"--rpc '{url}'" for url in chain.endpoints)}
    said: dict[str, str] = {}
    roles = "\n".join(re.findall(r"^```toml\n(.*?)^```", (ROOT / HOW_TO).read_text(), re.S | re.M))
    for _, name, tag, text in blocks(HOW_TO):
        machine = machines(name)
        machine.env["WW_ADMISSION_VETO_RECHECK_S"] = "5"  # 30 s, to wait for less
        script = re.sub(rf"\b({'|'.join(known)})\b", lambda m: known[m[0]], text)
        if tag == "node":
            if name == "attic":
                _copy(machines("desk"), machine, ".wetware/ww.toml")
            config = machine.home.path / ".wetware/ww.toml"
            if name == "desk":
                config.write_text(f"{config.read_text()}\n{roles}")
            known["NODE"] = _started(machine, script).addr
            continue
        if "acme.json" in script and name == "laptop":
            _copy(machines("desk"), machine, "acme.json")
        out = _run(machine, script)
        said[script] = out
        _learn(known, name, script, out, chain)

    desk, attic = machines("desk"), machines("attic")
    assert desk.node is not None
    assert attic.node is not None
    desk.node.wait_members([attic.node.peer_id], within_s=60)
    everything = "\n".join(said.values())
    assert "operator" in everything
    assert '"to"' in everything, "--calldata"
    # What the text promises of a node that is unbound, and of a user who is revoked.
    desk.env["WW_PASSPHRASE"] = PASSPHRASE
    desk.sh(f"ww auth evm unbind-key node --peer {known['PEER']} --wait mined")
    gone = f"node.vetoed peer={known['PEER']}"
    wait_for(lambda: gone in desk.node.log.read_text(), gone, within_s=120)  # type: ignore[union-attr]
    desk.sh(f"ww auth evm revoke chatter {known['USER']} --wait mined")
    laptop = machines("laptop")
    denied = f"ww --node {desk.node.addr} pub chat/garden hello"
    wait_for(lambda: _code(laptop, denied) == EXIT_DENIED, "the user is refused", within_s=60)


def _started(machine: Machine, script: str) -> NodeProcess:
    """A node that may have to be started again: its binding is final, and not seen yet."""
    began = time.monotonic()
    while True:
        try:
            return machine.start_node(script)
        except AssertionError as exc:
            if time.monotonic() - began > 60 or "try again in a minute" not in str(exc):
                raise
            time.sleep(2)


def _run(machine: Machine, script: str) -> str:
    """Run a block; what needs a role that is not seen yet is tried again, as a reader would."""
    last: list[subprocess.CompletedProcess[str]] = []

    def tried() -> bool:
        last[:] = [
            subprocess.run(
                ["sh", "-e", "-c", script],
                env=machine.env,
                cwd=machine.home.path,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        ]
        return last[0].returncode != EXIT_DENIED

    wait_for(tried, script, within_s=90)
    assert last[0].returncode == 0, (script, last[0].stdout, last[0].stderr)
    assert "Traceback" not in last[0].stderr
    return last[0].stdout


def _code(machine: Machine, script: str) -> int:
    return subprocess.run(
        ["sh", "-c", script],
        env=machine.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    ).returncode


def _copy(source: Machine, target: Machine, name: str) -> None:
    (target.home.path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source.home.path / name, target.home.path / name)


def _learn(known: dict[str, str], name: str, script: str, out: str, chain: Chain) -> None:
    """What the text has a name for."""
    if "auth evm address" in script and "grant" not in script:
        address = out.strip().splitlines()[-1]
        if name == "desk":
            chain.fund(address)
        else:
            known["USER"] = address
    if name == "attic" and "ww id" in script:
        (known["PEER"],) = re.findall(r"12D3Koo\w+", out)
    if found := re.findall(r"^wwt1\S+$", out, re.MULTILINE):
        (known["TICKET"],) = found
