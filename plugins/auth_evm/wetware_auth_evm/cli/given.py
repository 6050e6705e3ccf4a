"""What the command line says of the chain, and of how to write to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Where:
    """Which chain and contract, as the command line says."""

    rpc: Sequence[str] | None = None
    contract: str = ""
    chain_id: int = 0
    scope: str = ""
    profile: Path | None = None
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class Write:
    """How a transaction is sent, as the command line says."""

    calldata: bool = False
    wait: str = "final"
    timeout: float | None = None
    nonce: int | None = None
    fee_gwei: float | None = None
    json: bool = False
