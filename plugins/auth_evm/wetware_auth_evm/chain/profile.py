"""Which contract a command or a session is about, and where its chain is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wetware_auth_evm.chain.errors import BadSettings
from wetware_auth_evm.chain.finality import PROFILES, Finality, for_chain, is_loopback


@dataclass(frozen=True, slots=True)
class Profile:
    """A contract, and where to reach its chain.

    Attributes:
        chain_id: EIP-155.
        contract: Its address, 20 bytes; empty before a deployment.
        scope: Name of the cluster's scope.
        endpoints: JSON-RPC URLs.
        cluster: ID of the cluster, or "" where it is not known.
        dev: Whether it is the local node's try-out chain.
        genesis_hash: Of the chain's first block; empty: not compared.
        code_hash: keccak256 of the contract's code; empty: the one that ships.
        nodes: Addresses of the cluster's nodes.
        deployed_at: A block at or before the deployment.
        quorum: How many endpoints have to agree; 0: a majority.
        finality: As in the config ("finalized", "depth:N", "latest", a chain's name); "": by chain.
        source: Where it came from, for messages.
    """

    chain_id: int
    contract: bytes
    scope: str
    endpoints: tuple[str, ...]
    cluster: str = ""
    dev: bool = False
    genesis_hash: bytes = b""
    code_hash: bytes = b""
    nodes: tuple[str, ...] = ()
    deployed_at: int = 0
    quorum: int = 0
    finality: str = ""
    source: str = ""

    @property
    def scope_id(self) -> bytes:
        """The scope as the contract has it."""
        from wetware_auth_evm.chain.events import role_id  # late: it imports the hash

        return role_id(self.scope)

    @property
    def when_final(self) -> Finality:
        """When a block of the chain is final."""
        return finality_of(self.finality, self.chain_id, self.endpoints)

    def need_cluster(self) -> str:
        """The cluster's ID; raises ConfigError where it is not known."""
        if not self.cluster and self.dev:
            raise BadSettings(
                "the node of this try-out does not run, and it alone says of which cluster it is",
                hint="start it again with `ww node --auth evm --dev`, or give --cluster ID",
            )
        if not self.cluster:
            raise BadSettings(
                "it is not known of which cluster this is",
                hint="give --cluster ID, or use the profile that somebody in it made with "
                "`ww auth evm export-profile`: `ww auth evm use-profile FILE`",
            )
        return self.cluster

    def as_dict(self) -> dict[str, Any]:
        return {
            "v": 1,
            "chain_id": self.chain_id,
            "contract": "0x" + self.contract.hex(),
            "scope": self.scope,
            "cluster": self.cluster,
            "endpoints": list(self.endpoints),
            "genesis_hash": "0x" + self.genesis_hash.hex() if self.genesis_hash else "",
            "code_hash": "0x" + self.code_hash.hex() if self.code_hash else "",
            "deployed_at": self.deployed_at,
            "quorum": self.quorum,
            "finality": self.finality,
            "nodes": list(self.nodes),
        }


def finality_of(text: str, chain_id: int, endpoints: Sequence[str]) -> Finality:
    """What a setting `finality` says of a chain; raises ConfigError.

    Without one: what is known of the chain, else for a chain on this machine the newest block, else
    what the chain says itself.
    """
    if text in PROFILES:
        return PROFILES[text].finality
    if text:
        return Finality.parse(text)
    if known := for_chain(chain_id):
        return known.finality
    own = bool(endpoints) and all(map(is_loopback, endpoints))
    return Finality("latest" if own else "finalized")
