"""The discovery `dht`: this node is a provider of the cluster's key, and asks who else is."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import anyio

from wetware.base.backoff import Backoff
from wetware.errors import OverlayError

if TYPE_CHECKING:
    from wetware.hookspecs import PluginContext

KEY_DOMAIN = b"wetware-cluster:"
_SHA2_256 = b"\x12\x20"
"""What a multihash of SHA-256 begins with: js-libp2p stores providers of multihashes alone."""
PROVIDE_S = 1800.0
"""Between two announcements. Records live 24 h with their holders; nodes come and go faster, libp2p
here may restart, and an announcement is a lookup and some writes."""
LOOKUP_S = 900.0
"""Between two lookups: the members know each other by gossip."""
RETRY_S_MIN, RETRY_S_MAX = 5.0, 300.0
"""After an announcement that nobody took, and between lookups while few members are connected."""
PEERS_FEW = 4
"""With fewer connected members than this the node looks for more in earnest."""
SETTLE_S = 1.0
"""After a change of the connected members: libp2p takes a moment to ask a new one what it speaks,
members often come in groups, and one that comes and goes shall not keep this node busy."""
ADDRS_POLL_S = 30.0
"""How often own addresses are looked at: a record with old ones misleads whoever finds it."""

Pause = Callable[[asyncio.Event, float], Awaitable[bool]]


def cluster_key(cluster: str) -> bytes:
    """The key of a cluster: SHA-256 of the domain and the cluster's ID, as a multihash."""
    return _SHA2_256 + hashlib.sha256(KEY_DOMAIN + cluster.encode()).digest()


async def pause(woken: asyncio.Event, seconds: float) -> bool:
    """Wait for the event, at most so long; whether it came. Clears it."""
    with anyio.move_on_after(seconds):
        await woken.wait()
        woken.clear()
        return True
    return False


class DhtDiscovery:
    """See wetware.hookspecs.Discovery.

    Args:
        ctx: What the node gives.
        pause: Waits; tests pass their own.
        rng: Jitter: nodes that were started together do not stay in step.
    """

    name = "dht"

    def __init__(
        self, ctx: PluginContext, *, pause: Pause = pause, rng: random.Random | None = None
    ) -> None:
        self._overlay, self._log, self._pause = ctx.overlay, ctx.log, pause
        self._rng = rng or random.SystemRandom()
        self._key = cluster_key(ctx.overlay.cluster)
        self._woken = {"provide": asyncio.Event(), "lookup": asyncio.Event()}

    async def advertise(self, addrs: tuple[str, ...]) -> None:
        """Provide the cluster's key until cancelled.

        The record is not withdrawn at the end: the DHT has no verb for it. Who finds this node
        after that dials in vain.
        """
        unwatch = self._overlay.watch_peers(lambda _: self._wake())
        for event in self._woken.values():
            event.clear()  # the members who are there already are no news
        backoff = Backoff(RETRY_S_MIN, RETRY_S_MAX, self._rng)
        try:
            while True:
                if await self._provide():
                    backoff.reset()
                    await self._provided(PROVIDE_S * self._rng.uniform(0.9, 1.1))
                elif await self._members_changed("provide", backoff.pause_s()):
                    backoff.reset()
        finally:
            unwatch()

    async def find_peers(self) -> AsyncIterator[str]:
        """Addresses of providers of the key, with peer IDs: hints, not proofs."""
        backoff = Backoff(RETRY_S_MIN, RETRY_S_MAX, self._rng)
        while True:
            for addr in await self._lookup():
                yield addr
            few = len(self._overlay.peers()) < PEERS_FEW
            wait_s = backoff.pause_s() if few else LOOKUP_S * self._rng.uniform(0.9, 1.1)
            if await self._members_changed("lookup", wait_s):
                backoff.reset()

    # --- the parts --------------------------------------------------------------------------------

    def _wake(self) -> None:
        """A member came or went. The announcement matters to the first few, as lookups do."""
        if len(self._overlay.peers()) < PEERS_FEW:
            for event in self._woken.values():
                event.set()

    async def _members_changed(self, side: str, seconds: float) -> bool:
        """Wait for a change while members are few, at most so long; whether one came."""
        if not await self._pause(self._woken[side], seconds):
            return False
        await asyncio.sleep(SETTLE_S)
        return True

    async def _provide(self) -> bool:
        try:
            taken = await self._overlay.provide(self._key)
        except OverlayError as exc:
            self._log.debug("dht.not_provided", why=exc)
            return False
        self._log.debug("dht.provided" if taken else "dht.not_provided", why="nobody took it")
        return taken

    async def _provided(self, left_s: float) -> None:
        """Wait until it is time again: after `left_s`, or when this node's addresses change."""
        addrs = self._overlay.addrs()
        while left_s > 0 and self._overlay.addrs() == addrs:
            step_s = min(left_s, ADDRS_POLL_S)
            left_s -= step_s
            if await self._members_changed("provide", step_s):
                return

    async def _lookup(self) -> tuple[str, ...]:
        try:
            return await self._overlay.find_providers(self._key)
        except OverlayError as exc:
            self._log.debug("dht.no_lookup", why=exc)
            return ()
