"""What the command line says of the chain, and of how to write to it: options that many share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, slots=True)
class Where:
    """Which chain and contract."""

    rpc: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A JSON-RPC endpoint of the chain; repeatable."),
    ] = None
    contract: Annotated[str, typer.Option(metavar="ADDRESS", help="The contract.")] = ""
    chain_id: Annotated[int, typer.Option(min=0, metavar="N", help="The chain (EIP-155).")] = 0
    scope: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The cluster's scope in the contract; ROOT holds in every one."
        ),
    ] = ""
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `ww auth evm export-profile` wrote."),
    ] = None


@dataclass(frozen=True, slots=True)
class Write:
    """How a transaction is sent."""

    calldata: Annotated[
        bool,
        typer.Option(
            "--calldata",
            help="Print the transaction as JSON, for a Safe or a hardware wallet, and send "
            "nothing.",
        ),
    ] = False
    wait: Annotated[str, typer.Option(metavar="final|mined|none", help="For what to wait.")] = (
        "final"
    )
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="How long to wait.")] = (
        None
    )
    nonce: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Number of the transaction, to replace one that is stuck."
        ),
    ] = None
    fee_gwei: Annotated[float | None, typer.Option(metavar="N", help="At most per gas.")] = None
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
