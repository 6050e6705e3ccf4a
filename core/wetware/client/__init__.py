"""The client library: log in to a node and use its services.

    async with wetware.connect() as session:
        topic = await session.pubsub.join("chat")
        await topic.publish(b"hello")

`connect()` uses the unix socket of this machine's node; `connect("/ip4/…/p2p/…")` dials a remote
one over the encrypted overlay, without importing libp2p. Plain asyncio, or anyio on asyncio.
Everything that a session gives out ends with it.
"""

from __future__ import annotations

from wetware.broker.told import Explanation, GrantInfo, Identity, ServiceInfo, Step
from wetware.client.dial import LocalNode, is_address, peer_in
from wetware.client.entry import connect, describe
from wetware.client.keys import KeyChoice
from wetware.client.login import LoginRefused
from wetware.client.session import Session
from wetware.client.values import Constraints

__all__ = [
    "Constraints",
    "Explanation",
    "GrantInfo",
    "Identity",
    "KeyChoice",
    "LocalNode",
    "LoginRefused",
    "ServiceInfo",
    "Session",
    "Step",
    "connect",
    "describe",
    "is_address",
    "peer_in",
]
