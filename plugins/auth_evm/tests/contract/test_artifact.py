"""The artifact that ships is what the source gives, and what it says of the storage is so."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from eth_utils.crypto import keccak

from wetware_auth_evm import contract

from .chains import ARTIFACT, CONTRACTS, INSTALL


@pytest.fixture
def build() -> list[str]:
    """The command that compiles, or a skip without the compiler."""
    if not (CONTRACTS / "node_modules/solc").is_dir():
        pytest.skip(f"the compiler is not installed; run: {INSTALL}")
    return [sys.executable, str(CONTRACTS / "build.py")]


def test_the_source_gives_the_artifact_byte_for_byte(build: list[str]) -> None:
    done = subprocess.run([*build, "--check"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert ARTIFACT["runtimeKeccak256"] in done.stdout


def test_a_changed_artifact_or_source_is_found(build: list[str], tmp_path: Any) -> None:
    copy = tmp_path / "plugin"
    (copy / "contracts").mkdir(parents=True)
    for name in ("build.py", "solc.mjs", "package.json", "WetwareACL.sol"):
        (copy / "contracts" / name).write_bytes((CONTRACTS / name).read_bytes())
    (copy / "contracts/node_modules").symlink_to(CONTRACTS / "node_modules")
    command = [sys.executable, str(copy / "contracts/build.py")]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], capture_output=True, text=True, timeout=100)

    source = copy / "contracts/WetwareACL.sol"
    text = source.read_text()
    source.write_text(text.replace("MAX_TTL = 400 days", "MAX_TTL = 401 days"))
    made = copy / "wetware_auth_evm/contract/WetwareACL.json"
    made.parent.mkdir(parents=True)
    made.write_text(json.dumps(ARTIFACT, indent=1) + "\n")
    changed = run("--check")
    assert changed.returncode == 1
    assert "is not what the source gives" in changed.stderr
    source.write_text(text + "contract Broken {")
    broken = run()
    assert broken.returncode == 1
    assert "ParserError" in broken.stderr
    (copy / "contracts/package.json").write_text('{"dependencies": {"solc": "0.8.36"}}')
    assert "0.8.36 is pinned" in run().stderr
    assert json.loads(made.read_text()) == ARTIFACT


def test_the_code_has_no_metadata_and_stands_at_the_end() -> None:
    code = bytes.fromhex(ARTIFACT["bytecode"][2:])[-ARTIFACT["runtimeBytes"] :]
    assert keccak(code) == contract.load().runtime_hash
    assert len(code) < 24_576  # EIP-170
    # Opcodes of newer forks keep a contract off older chains: TLOAD, TSTORE, MCOPY, PUSH0.
    pc, opcodes = 0, set()
    while pc < len(code):
        opcodes.add(code[pc])
        pc += 1 + max(0, code[pc] - 0x5F) if 0x60 <= code[pc] <= 0x7F else 1
    assert not opcodes & {0x5C, 0x5D, 0x5E, 0x5F}
    # Nothing is called, created or destroyed: CREATE, CALL, CALLCODE, DELEGATECALL, CREATE2,
    # STATICCALL, SELFDESTRUCT. So nothing can call back either.
    assert not opcodes & {0xF0, 0xF1, 0xF2, 0xF4, 0xF5, 0xFA, 0xFF}


def test_what_is_stored_stays_where_it_is() -> None:
    layout = {item["label"]: (item["slot"], item["offset"]) for item in ARTIFACT["storage"]}
    assert layout == {
        "owner": (0, 0),
        "paused": (0, 20),
        "seq": (0, 21),
        "changedAt": (0, 27),
        "head": (1, 0),
        "pendingOwner": (2, 0),
        "ownerReadyAt": (2, 20),
        "_grants": (3, 0),
        "_admins": (4, 0),
        "_keys": (5, 0),
        "_accounts": (6, 0),
        "_scopeEpochs": (7, 0),
    }


def test_the_package_loads_the_artifact() -> None:
    loaded = contract.load()
    assert loaded.abi == ARTIFACT["abi"]
    assert loaded.bytecode.hex() == ARTIFACT["bytecode"][2:]
    assert loaded.compiler == ARTIFACT["compiler"]
