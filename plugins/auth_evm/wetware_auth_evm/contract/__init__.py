"""What ships of WetwareACL: ABI, creation code, the hash of its code on chain.

`WetwareACL.json` is made from `contracts/WetwareACL.sol` by `contracts/build.py`, and compared with
it byte for byte in the checks of the project. Imports nothing heavy.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Artifact:
    """The compiled contract.

    Attributes:
        abi: The ABI, as JSON gives it.
        bytecode: Creation code; the owner's address, in 32 bytes, goes behind it.
        runtime_hash: Keccak-256 of the code on chain: the same for every deployment.
        compiler: Version of the compiler.
    """

    abi: list[dict[str, Any]]
    bytecode: bytes
    runtime_hash: bytes
    compiler: str


@functools.cache
def load() -> Artifact:
    """Read the artifact that ships with the package."""
    text = resources.files(__name__).joinpath("WetwareACL.json").read_text(encoding="utf-8")
    document = json.loads(text)
    return Artifact(
        abi=document["abi"],
        bytecode=bytes.fromhex(document["bytecode"].removeprefix("0x")),
        runtime_hash=bytes.fromhex(document["runtimeKeccak256"].removeprefix("0x")),
        compiler=document["compiler"],
    )
