"""Compile WetwareACL.sol with the pinned compiler into the artifact that the package ships.

`build.py` writes it; `build.py --check` compares it byte for byte with what the source gives, and
fails if it differs. The compiler comes from npm: `npm ci --prefix plugins/auth_evm/contracts`.
"""

# ruff: noqa: T201  # it is a command

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from eth_utils.crypto import keccak

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "WetwareACL.sol"
ARTIFACT = HERE.parent / "wetware_auth_evm/contract/WetwareACL.json"
INSTALL = "npm ci --no-audit --no-fund --prefix plugins/auth_evm/contracts"
COMPILE_S_MAX = 120

# The metadata hash is left out: it would change the bytecode with every comment. `paris` is the
# newest version without PUSH0 and transient storage, and so runs on every chain still in use.
SETTINGS: dict[str, Any] = {
    "evmVersion": "paris",
    "metadata": {"appendCBOR": False, "bytecodeHash": "none"},
    "optimizer": {"enabled": True, "runs": 1000},
    "viaIR": False,
}
OUTPUTS = [
    "abi",
    "evm.bytecode.generatedSources",
    "evm.bytecode.object",
    "evm.bytecode.sourceMap",
    "evm.deployedBytecode.generatedSources",
    "evm.deployedBytecode.immutableReferences",
    "evm.deployedBytecode.object",
    "evm.deployedBytecode.sourceMap",
    "storageLayout",
]


class BuildError(Exception):
    """The compiler is missing or refuses the source."""


def compile_source() -> tuple[str, dict[str, Any]]:
    """Compile the source; returns the compiler's version and its output for the contract.

    Raises BuildError if the compiler is missing, is another than the pinned one, or warns.
    """
    if not (HERE / "node_modules/solc").is_dir():
        raise BuildError(f"the compiler is not installed; run: {INSTALL}")
    query = {
        "language": "Solidity",
        "sources": {SOURCE.name: {"content": SOURCE.read_text()}},
        "settings": {**SETTINGS, "outputSelection": {"*": {"*": OUTPUTS}}},
    }
    done = subprocess.run(  # noqa: S603  # our own script, by the name that PATH resolves
        ["node", str(HERE / "solc.mjs")],  # noqa: S607
        input=json.dumps(query),
        capture_output=True,
        text=True,
        timeout=COMPILE_S_MAX,
        check=False,
    )
    if done.returncode:
        raise BuildError(done.stderr.strip())
    answer = json.loads(done.stdout)
    if messages := answer["output"].get("errors"):
        raise BuildError("\n".join(m["formattedMessage"] for m in messages))
    return answer["version"], answer["output"]["contracts"][SOURCE.name]["WetwareACL"]


def artifact() -> str:
    """The artifact's text, a function of the source and the settings alone."""
    version, output = compile_source()
    runtime = output["evm"]["deployedBytecode"]
    creation = output["evm"]["bytecode"]["object"]
    if runtime["immutableReferences"]:
        raise BuildError("the contract has immutables: its runtime code would differ by deployment")
    if not creation.endswith(runtime["object"]):
        raise BuildError("the creation code does not end with the runtime code")
    code = bytes.fromhex(runtime["object"])
    layout = output["storageLayout"]
    document = {
        "contractName": "WetwareACL",
        "compiler": version,
        "settings": SETTINGS,
        "sourceKeccak256": "0x" + keccak(SOURCE.read_bytes()).hex(),
        "runtimeKeccak256": "0x" + keccak(code).hex(),
        "runtimeBytes": len(code),
        "storage": [
            {
                "label": item["label"],
                "slot": int(item["slot"]),
                "offset": item["offset"],
                "bytes": int(layout["types"][item["type"]]["numberOfBytes"]),
            }
            for item in layout["storage"]
        ],
        "abi": output["abi"],
        "bytecode": "0x" + creation,
    }
    return json.dumps(document, indent=1, sort_keys=False) + "\n"


def main() -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and change nothing")
    check = parser.parse_args().check
    try:
        text = artifact()
    except BuildError as exc:
        print(f"build.py: {exc}", file=sys.stderr)
        return 1
    digest = json.loads(text)["runtimeKeccak256"]
    if not check:
        ARTIFACT.parent.mkdir(parents=True, exist_ok=True)
        ARTIFACT.write_text(text)
        print(f"{ARTIFACT}: runtime {digest}")
        return 0
    if not ARTIFACT.exists() or ARTIFACT.read_text() != text:
        print(
            f"build.py: {ARTIFACT} is not what the source gives\n"
            "try: python plugins/auth_evm/contracts/build.py",
            file=sys.stderr,
        )
        return 1
    print(f"{ARTIFACT.name}: as the source gives it, byte for byte; runtime {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
