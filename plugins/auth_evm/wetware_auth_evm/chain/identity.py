"""Whether endpoints serve the chain and the contract that are meant, by a quorum of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wetware_auth_evm.chain.addresses import checksum, keccak
from wetware_auth_evm.chain.endpoints import data
from wetware_auth_evm.chain.errors import WrongChain

if TYPE_CHECKING:
    from wetware_auth_evm.chain.endpoints import Endpoints


async def compare_genesis(endpoints: Endpoints, chain_id: int, expected: bytes) -> None:
    """The chain's first block has this hash; raises WrongChain, NoQuorum."""
    if (await endpoints.block(0)).hash != expected:
        raise WrongChain(
            f"the chain {chain_id} of the endpoints has another first block than genesis_hash says",
            hint="a local chain that was begun anew is another chain: deploy again, or set "
            "genesis_hash",
        )


async def compare_code(
    endpoints: Endpoints, chain_id: int, contract: bytes, code_hash: bytes
) -> None:
    """The contract's code has this hash; raises WrongChain, NoQuorum."""
    address = checksum(contract)
    code = data(await endpoints.agree("eth_getCode", address, "latest", key=data))
    if keccak(code) != code_hash:
        what = "another contract than WetwareACL" if code else "no contract"
        raise WrongChain(
            f"there is {what} at {address} on chain {chain_id}",
            hint="set [plugins.auth_evm] contract or --contract to the right address, or make one: "
            "`ww auth evm deploy`",
        )
