"""`session.auth_local`: read and replace the cluster's policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware_auth_local.policy import Policy

if TYPE_CHECKING:
    from wetware.identity import Key

SCHEMA = rpc.load(Path(__file__).with_name("auth_local.capnp"))


class PolicyClient:
    """The operator's view of the policy.

    Args:
        ref: A reference to a PolicyStore.
    """

    INTERFACE = SCHEMA.PolicyStore

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    async def document(self) -> bytes:
        """The signed document in force."""
        document: bytes = (await self._ref.call("get"))["document"]
        return document

    async def get(self) -> Policy:
        """The policy in force; its signature is checked here too."""
        return Policy.open(await self.document())

    async def put(self, document: bytes) -> tuple[int, int]:
        """Replace the policy; returns its version and how many (user, role) pairs it withdrew."""
        reply = await self._ref.call("put", document=document)
        return reply["version"], reply["withdrawn"]

    async def change(self, key: Key, change: Callable[[Policy], Policy]) -> tuple[Policy, int]:
        """Read, change, sign with the operator's key, replace.

        Returns the new policy and how many (user, role) pairs it withdrew. Raises ForkedPolicy if
        somebody else changed it meanwhile, PolicySignature if `key` is not the operator's.
        """
        new = change(await self.get())
        _, withdrawn = await self.put(new.sign(key))
        return new, withdrawn
