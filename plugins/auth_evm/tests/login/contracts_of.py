"""The contracts beside this file, compiled by the pinned compiler when a test needs one."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

import pytest
from eth_abi.abi import encode
from plugins.auth_evm.tests.contract.chains import CONTRACTS, INSTALL, Chain
from plugins.auth_evm.tests.contract.people import OWNER

SOURCE = Path(__file__).with_name("contracts") / "Wallets.sol"


@functools.cache
def _compiled() -> dict[str, bytes]:
    query = {
        "language": "Solidity",
        "sources": {SOURCE.name: {"content": SOURCE.read_text()}},
        "settings": {
            "evmVersion": "paris",
            "outputSelection": {"*": {"*": ["evm.bytecode.object", "evm.deployedBytecode.object"]}},
        },
    }
    done = subprocess.run(
        ["node", str(CONTRACTS / "solc.mjs")],
        input=json.dumps(query),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    output = json.loads(done.stdout)["output"]
    errors = [e["formattedMessage"] for e in output.get("errors", []) if e["severity"] == "error"]
    assert not errors, "\n".join(errors)
    return {
        name: bytes.fromhex(found["evm"]["bytecode"]["object"])
        for name, found in output["contracts"][SOURCE.name].items()
    }


def creation_code(name: str) -> bytes:
    """Of one contract; skips the test, with the command to run, without the compiler."""
    if not (CONTRACTS / "node_modules/solc").is_dir():
        pytest.skip(f"the compiler is not installed; run: {INSTALL}")
    return _compiled()[name]


def deploy(chain: Chain, name: str, types: tuple[str, ...] = (), *values: object) -> bytes:
    """Put a contract on the chain; returns its address."""
    receipt = chain.send(None, creation_code(name) + encode(types, values), OWNER)
    assert receipt.contract is not None
    return bytes.fromhex(receipt.contract[2:])
