"""Who has a blob: the members are asked, and then the DHT."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final

from wetware import rpc
from wetware.base.multiaddr import Multiaddr
from wetware.errors import OverlayError, WetwareError

if TYPE_CHECKING:
    from wetware.hookspecs import PluginContext
    from wetware.identity import PeerId
    from wetware_blob.exchange.fetch import Find
    from wetware_blob.format.cid import Cid

ROOTS_MAX: Final = 1024
"""Of one call of `Sibling.have`."""
ANSWER_S: Final = 3.0
"""For a member to say what it has, once it is connected."""
MEMBERS_MAX: Final = 512
"""That are asked for a root, the nearest first."""
ASKED_AT_ONCE: Final = 32
"""By all searches of this node."""


def finder(ctx: PluginContext) -> Find:
    """What finds the members that say that they have the block of a root, as they say it.

    Where none does, it asks those that the DHT names; then it ends.
    """
    places = asyncio.Semaphore(ASKED_AT_ONCE)

    async def has(peer: PeerId, root: Cid) -> PeerId | None:
        try:
            async with places:
                sibling = await ctx.sibling(peer)
                with contextlib.closing(sibling), rpc.time_limit(ANSWER_S):
                    have = (await sibling.call("have", roots=[root.digest]))["have"]
        except WetwareError as exc:
            ctx.log.debug("find.no_answer", peer=peer, why=exc.message)
            return None
        return peer if have == [True] else None

    async def providers(root: Cid) -> AsyncGenerator[PeerId, None]:
        members = [each for each in ctx.members("service=blob,state=alive") if not each.is_self]
        members.sort(key=lambda member: member.rtt_s or 1.0)
        peers = [member.peer_id for member in members]
        found = False
        asked = [asyncio.ensure_future(has(peer, root)) for peer in peers[:MEMBERS_MAX]]
        try:
            for answer in asyncio.as_completed(asked):
                if (peer := await answer) is not None:
                    found = True
                    yield peer
        finally:
            for task in asked:
                task.cancel()
        if not found:
            with contextlib.suppress(OverlayError):
                for addr in await ctx.overlay.find_providers(dht_key(root)):
                    if (named := Multiaddr.parse(addr).peer) in peers:
                        peers.remove(named)
                        yield named

    return providers


def dht_key(root: Cid) -> bytes:
    """What providers announce: the multihash, as IPFS nodes do."""
    return b"\x12\x20" + root.digest
