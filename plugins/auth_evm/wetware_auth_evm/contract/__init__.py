"""What ships of WetwareACL: ABI, creation code, the hash of its code on chain, storage slots.

`WetwareACL.json` is made from `contracts/WetwareACL.sol` by `contracts/build.py`, and compared with
it byte for byte in the checks of the project. Imports nothing heavy.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

SLOT_STATE: Final = 0
"""`owner` in bits 0-159, `paused` 160-167, `seq` 168-215, `changedAt` 216-255."""
SLOT_HEAD: Final = 1
"""`head`, the hash over the whole history."""
SLOT_PROPOSAL: Final = 2
"""`pendingOwner` in bits 0-159, `ownerReadyAt` 160-199."""
SLOT_GRANTS: Final = 3
SLOT_ADMINS: Final = 4
SLOT_KEYS: Final = 5
SLOT_ACCOUNTS: Final = 6
SLOT_SCOPE_EPOCHS: Final = 7


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
