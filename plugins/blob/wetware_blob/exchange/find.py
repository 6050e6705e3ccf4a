"""Who has a blob: the members are asked, many roots in one call, and then the DHT."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final

from wetware import rpc
from wetware.base.bounds import Recent
from wetware.base.multiaddr import Multiaddr
from wetware.base.tasks import Tasks
from wetware.errors import OverlayError, WetwareError

if TYPE_CHECKING:
    from wetware.hookspecs import PluginContext
    from wetware.identity import PeerId
    from wetware_blob.format.cid import Cid

ROOTS_MAX: Final = 1024
"""Of one call."""
ANSWER_S: Final = 3.0
"""For a member to say what it has, once it is connected."""
GATHER_S: Final = 0.002
"""How long roots are gathered for one call to a member: a directory asks for many at once."""
MEMBERS_MAX: Final = 512
"""That are asked for a root, the nearest first."""
ASKED_AT_ONCE: Final = 32
YES_S: Final = 30.0
"""How long it is remembered that a member has a root; it may have dropped it since."""
NO_S: Final = 2.0
REMEMBERED_MAX: Final = 65_536


class Finder:
    """Asks for this node."""

    def __init__(self, ctx: PluginContext) -> None:
        self._ctx = ctx
        self._answers = {
            answer: Recent[tuple["PeerId", bytes], None](ttl_s, REMEMBERED_MAX, ctx.clock.monotonic)
            for answer, ttl_s in ((True, YES_S), (False, NO_S))
        }
        self._asking: dict[PeerId, dict[bytes, asyncio.Future[bool]]] = {}
        self._places = asyncio.Semaphore(ASKED_AT_ONCE)
        self._tasks = Tasks()

    async def providers(self, root: Cid) -> AsyncGenerator[PeerId, None]:
        """The members that say that they have the block of `root`, as they say it; then it ends."""
        found = False
        members = self._members()
        asked = [asyncio.ensure_future(self._has(peer, root.digest)) for peer in members]
        try:
            for answer in asyncio.as_completed(asked):
                if (peer := await answer) is not None:
                    found = True
                    yield peer
        finally:
            for task in asked:
                task.cancel()
        if not found:
            for peer in await self._announced(root):
                yield peer

    def _members(self) -> list[PeerId]:
        members = self._ctx.members("service=blob,state=alive")
        others = [member for member in members if not member.is_self]
        others.sort(key=lambda member: member.rtt_s or 1.0)
        return [member.peer_id for member in others[:MEMBERS_MAX]]

    async def _announced(self, root: Cid) -> list[PeerId]:
        """Of the members, those that the DHT names; with few members these were asked already."""
        members = set(self._members())
        peers: list[PeerId] = []
        with contextlib.suppress(OverlayError):
            for addr in await self._ctx.overlay.find_providers(dht_key(root)):
                peer = Multiaddr.parse(addr).peer
                if peer in members and peer not in peers:
                    peers.append(peer)
        return peers

    async def _has(self, peer: PeerId, digest: bytes) -> PeerId | None:
        for answer, known in self._answers.items():
            if (peer, digest) in known:
                return peer if answer else None
        asking = self._asking.get(peer)
        if asking is None or (digest not in asking and len(asking) >= ROOTS_MAX):
            asking = self._asking[peer] = {}
            self._tasks.start(self._ask(peer, asking))
        if (future := asking.get(digest)) is None:
            future = asking[digest] = asyncio.get_running_loop().create_future()
        return peer if await asyncio.shield(future) else None

    async def _ask(self, peer: PeerId, asking: dict[bytes, asyncio.Future[bool]]) -> None:
        """One call for all that is asked of a member until it goes out."""
        have: list[bool] = []
        roots: list[bytes] = []
        try:
            async with self._places:
                await asyncio.sleep(GATHER_S)
                with contextlib.closing(await self._ctx.sibling(peer)) as sibling:
                    if self._asking.get(peer) is asking:
                        del self._asking[peer]
                    roots = list(asking)
                    with rpc.time_limit(ANSWER_S):
                        have = (await sibling.call("have", roots=roots))["have"]
        except WetwareError as exc:
            self._ctx.log.debug("find.no_answer", peer=peer, why=exc.message)
        finally:
            if self._asking.get(peer) is asking:
                del self._asking[peer]
            answers = dict(zip(roots, have, strict=False))
            for digest, future in asking.items():
                answer = answers.get(digest, False)
                self._answers[answer].put((peer, digest), None)
                if not future.done():
                    future.set_result(answer)


def dht_key(root: Cid) -> bytes:
    """What providers announce: the multihash, as IPFS nodes do."""
    return b"\x12\x20" + root.digest
