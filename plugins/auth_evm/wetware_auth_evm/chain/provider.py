"""How commands send by web3: which endpoints answer a method, and what of an answer is believed.

web3 gets answers that were looked at already, or errors of ours. It never sees a refusal, so it
neither tries again nor follows the URLs that a contract may name (EIP-3668). None of its middleware
is used: that would ask for the chain's ID before each request. What only reads asks the endpoints
itself, a node above all, which does without the import: a second of the processor, and 21 MiB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

_RECURSION = sys.getrecursionlimit()
from web3 import AsyncWeb3, Web3  # noqa: E402  # between the two looks at the limit
from web3.providers.async_base import AsyncBaseProvider  # noqa: E402

# Raised by the imports for the whole process, which nested JSON would end then.
sys.setrecursionlimit(_RECURSION)

from wetware_auth_evm.chain.endpoints import data, fixed, quantity, wide  # noqa: E402

__all__ = ["METHODS", "AsyncWeb3", "EndpointsProvider", "Web3", "connect"]

if TYPE_CHECKING:
    from wetware_auth_evm.chain.endpoints import Endpoints


class _Method(NamedTuple):
    """How a method is asked.

    Attributes:
        of: A quorum that agrees, the first that answers, or all, of which one has to take it.
        check: What of an answer has to agree; raises ValueError, KeyError or TypeError for one
            that is malformed.
    """

    of: Literal["quorum", "first", "all"]
    check: Callable[[Any], Any]


def _receipt(raw: Any) -> tuple[Any, ...]:
    block = fixed(raw["blockHash"], 32), quantity(raw["blockNumber"])
    return *block, quantity(raw["status"]), quantity(raw["gasUsed"])


METHODS: Final[Mapping[str, _Method]] = {
    "eth_call": _Method("quorum", data),
    "eth_getTransactionReceipt": _Method("quorum", _receipt),
    "eth_estimateGas": _Method("first", quantity),
    "eth_getTransactionCount": _Method("first", quantity),
    "eth_gasPrice": _Method("first", wide),
    "eth_maxPriorityFeePerGas": _Method("first", wide),
    "eth_getBalance": _Method("first", wide),
    "eth_sendRawTransaction": _Method("all", lambda raw: fixed(raw, 32)),
}
"""All that is asked through web3; another method is a defect of ours, and refused."""


class EndpointsProvider(AsyncBaseProvider):  # type: ignore[misc]  # web3 is not type-checked
    """Endpoints as web3 takes a provider.

    A request raises NoQuorum, Unreachable, EndpointFailed, Reverted; ValueError for a method that
    is not in METHODS.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        super().__init__()
        self._endpoints = endpoints

    async def make_request(self, method: str, params: Sequence[Any]) -> Any:
        how = METHODS.get(method)
        if how is None:
            raise ValueError(f"{method} is not asked through web3")
        ask = {
            "quorum": self._endpoints.agree,
            "first": self._endpoints.first,
            "all": self._endpoints.broadcast,
        }[how.of]
        return {"jsonrpc": "2.0", "id": 1, "result": await ask(method, *params, key=how.check)}


def connect(endpoints: Endpoints) -> AsyncWeb3[EndpointsProvider]:
    """web3 over endpoints, without anything of its own between."""
    return AsyncWeb3(EndpointsProvider(endpoints), middleware=[])
