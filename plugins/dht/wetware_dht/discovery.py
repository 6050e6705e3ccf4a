"""The discovery `dht`: this node is a provider of the cluster's key, and asks who else is."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from wetware.base.multiaddr import Multiaddr
from wetware.errors import OverlayError, WetwareError

if TYPE_CHECKING:
    from wetware.hookspecs import PluginContext
    from wetware_dht.config import DhtConfig

KEY_DOMAIN = b"wetware-cluster:"
_SHA2_256 = b"\x12\x20"
"""What a multihash of SHA-256 begins with: js-libp2p stores providers of multihashes alone."""
ADDRS_POLL_S = 30.0
"""How often own addresses are looked at: a record with old ones misleads whoever finds it."""

Pause = Callable[[asyncio.Event, float], Awaitable[bool]]


def cluster_key(cluster: str) -> bytes:
    """The key of a cluster: SHA-256 of the domain and the cluster's ID, as a multihash."""
    return _SHA2_256 + hashlib.sha256(KEY_DOMAIN + cluster.encode()).digest()


async def pause(woken: asyncio.Event, seconds: float) -> bool:
    """Wait for the event, at most so long; whether it came. Clears it."""
    try:
        async with asyncio.timeout(seconds):
            await woken.wait()
    except TimeoutError:
        return False
    woken.clear()
    return True


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
        config: DhtConfig = ctx.config
        self._overlay, self._log, self._config = ctx.overlay, ctx.log, config
        self._monotonic, self._pause = ctx.clock.monotonic, pause
        self._rng = rng or random.SystemRandom()
        self._key = cluster_key(ctx.overlay.cluster)
        self._seen: dict[Multiaddr, float] = {}
        self._woken = {"provide": asyncio.Event(), "lookup": asyncio.Event()}

    async def advertise(self, addrs: tuple[str, ...]) -> None:
        """Provide the cluster's key until cancelled.

        The record is not withdrawn at the end: the DHT has no verb for it. Who finds this node
        after that dials in vain.
        """
        config, woken = self._config, self._woken["provide"]
        unwatch = self._overlay.watch_peers(lambda _: self._wake())
        for event in self._woken.values():
            event.clear()  # the members who are there already are no news
        failures = 0
        try:
            while True:
                if await self._provide():
                    failures = 0
                    await self._provided(config.provide_s * self._rng.uniform(0.9, 1.1))
                    continue
                wait_s = self._backed_off(config.retry_s_min, config.retry_s_max, failures)
                failures += 1
                if await self._pause(woken, wait_s):
                    failures = 0
                    await asyncio.sleep(config.settle_s)
        finally:
            unwatch()

    async def find_peers(self) -> AsyncIterator[str]:
        """Addresses of providers of the key, with peer IDs: hints, not proofs."""
        config, woken = self._config, self._woken["lookup"]
        empty_handed = 0
        while True:
            for addr in self._fresh(await self._lookup()):
                yield addr
            if len(self._overlay.peers()) >= config.peers_few:
                wait_s = config.lookup_s * self._rng.uniform(0.9, 1.1)
            else:
                wait_s = self._backed_off(config.lookup_s_min, config.lookup_s_max, empty_handed)
                empty_handed += 1
            if await self._pause(woken, wait_s):
                empty_handed = 0
                await asyncio.sleep(config.settle_s)

    # --- the parts --------------------------------------------------------------------------------

    def _wake(self) -> None:
        """A member came or went. The announcement matters to the first few, as lookups do."""
        if len(self._overlay.peers()) < max(2, self._config.peers_few):
            for event in self._woken.values():
                event.set()

    def _backed_off(self, first_s: float, max_s: float, failures: int) -> float:
        doubled: float = first_s * 2.0 ** min(failures, 30)
        return min(max_s, doubled) * self._rng.uniform(0.8, 1.0)

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
            if await self._pause(self._woken["provide"], step_s):
                await asyncio.sleep(self._config.settle_s)
                return

    async def _lookup(self) -> tuple[str, ...]:
        try:
            return await self._overlay.find_providers(self._key)
        except OverlayError as exc:
            self._log.debug("dht.no_lookup", why=exc)
            return ()

    def _fresh(self, texts: Iterable[str]) -> list[str]:
        """Of what a lookup gave, what to report: no node but others', bounded, none twice."""
        now, found = self._monotonic(), dict[Multiaddr, None]()
        of_peer: Counter[object] = Counter()
        for text in texts:
            try:
                addr = Multiaddr.parse(text)
            except WetwareError:
                continue
            if addr.peer is None or addr.peer == self._overlay.peer_id or addr in found:
                continue
            if of_peer[addr.peer] >= self._config.addrs_per_peer_max:
                continue
            if len(found) >= self._config.addrs_max:
                break
            of_peer[addr.peer] += 1
            found[addr] = None
        fresh = []
        for addr in found:
            last = self._seen.pop(addr, None)
            if last is None or now - last >= self._config.again_s:
                fresh.append(str(addr))
                last = now
            while len(self._seen) >= self._config.seen_max:
                del self._seen[next(iter(self._seen))]
            self._seen[addr] = last
        return fresh
