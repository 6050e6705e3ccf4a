"""`session.auth_evm`: what a node knows of the contract. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wetware import rpc

SCHEMA = rpc.load(Path(__file__).with_name("auth_evm.capnp"))


class EvmAuth:
    """An operator's view of the contract, as a node knows it.

    Args:
        ref: A reference to an EvmAuth.
    """

    INTERFACE = SCHEMA.EvmAuth

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    async def status(self) -> dict[str, Any]:
        """EvmStatus of auth_evm.capnp."""
        status: dict[str, Any] = (await self._ref.call("status"))["status"]
        return status

    async def list(self, *, all: bool = False) -> list[dict[str, Any]]:
        """Records of auth_evm.capnp, in the order of role and account."""
        found: list[dict[str, Any]] = []
        while True:
            reply = await self._ref.call("list", first=len(found), count=1000, all=all)
            found += reply["records"]
            if not reply["records"] or len(found) >= reply["total"]:
                return found

    async def explain(self, account: str, role: str) -> dict[str, Any]:
        """Explanation of auth_evm.capnp."""
        explanation: dict[str, Any] = (await self._ref.call("explain", account=account, role=role))[
            "explanation"
        ]
        return explanation
