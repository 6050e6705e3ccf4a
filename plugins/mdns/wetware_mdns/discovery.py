"""The discovery `mdns`: announces this node on the local network, and reports who else is there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from wetware_mdns.config import INTERFACES_MAX
from wetware_mdns.records import Seen, Waiting, announceable, decode, encode, random_name

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.hookspecs import PluginContext
    from wetware_mdns.config import MdnsConfig
    from wetware_mdns.lan import Lan

RETRY_S_MIN, RETRY_S_MAX = 5.0, 300.0
"""After a failure, e.g. because another program keeps the port to itself."""


class MdnsDiscovery:
    """See wetware.hookspecs.Discovery.

    `advertise` holds the sockets, speaks and listens; `find_peers` only empties a queue, so that
    whoever stops reading leaves nothing behind. The node runs both.
    """

    name = "mdns"

    def __init__(self, ctx: PluginContext, *, rng: random.Random | None = None) -> None:
        config: MdnsConfig = ctx.config
        self._overlay, self._log, self._config = ctx.overlay, ctx.log, config
        self._rng = rng or random.SystemRandom()
        self._seen = Seen(
            again_s=config.again_s,
            seen_max=config.seen_max,
            per_minute_max=config.found_per_minute_max,
            monotonic=ctx.clock.monotonic,
        )
        self._waiting = Waiting(config.found_waiting_max, self._rng)
        self._arrived = asyncio.Event()

    async def advertise(self, addrs: tuple[str, ...]) -> None:
        """Announce this node and listen, until cancelled; ends within a second."""
        mine = announceable(addrs, self._config.addrs_max)
        retry_s = RETRY_S_MIN
        while True:
            if not mine:
                self._log.info("mdns.idle", why="the node listens on no address but loopback")
                mine = await self._changed(mine)
                continue
            try:
                mine = await self._be_present(mine)
                retry_s = RETRY_S_MIN
            except Exception as exc:  # whatever the network does, the node goes on without it
                while isinstance(exc, ExceptionGroup):
                    exc = exc.exceptions[0]
                self._log.warning("mdns.failed", why=exc, again_s=retry_s)
                await asyncio.sleep(retry_s)
                retry_s = min(RETRY_S_MAX, retry_s * 2)
                mine = announceable(self._overlay.addrs(), self._config.addrs_max)

    async def find_peers(self) -> AsyncIterator[str]:
        """Addresses of neighbours, with peer IDs, as they are heard of: hints, not proofs."""
        while True:
            while (addr := self._waiting.get()) is not None:
                yield addr
            self._arrived.clear()
            await self._arrived.wait()

    # --- on the network ---------------------------------------------------------------------------

    async def _be_present(self, mine: tuple[Multiaddr, ...]) -> tuple[Multiaddr, ...]:
        """Speak and listen until this node's addresses change; returns the new ones."""
        hosts = [addr.host for addr in mine]
        interfaces = self._config.interfaces or tuple(dict.fromkeys(hosts))[:INTERFACES_MAX]
        make_lan = await asyncio.to_thread(_import_lan)  # 0.2 s, which the loop does not wait for
        async with make_lan(interfaces, self._heard) as lan:
            self._log.info(
                "mdns.up",
                interfaces=" ".join(interfaces),
                announced=" ".join(hosts) if self._config.announce else "nothing",
            )
            async with asyncio.TaskGroup() as tasks:
                asking = tasks.create_task(self._ask(lan))
                if self._config.announce:
                    text = encode(mine, self._overlay.cluster)
                    ips = tuple(dict.fromkeys(hosts))
                    await lan.announce(random_name(self._rng), text, ips, mine[0].port)
                changed = await self._changed(mine)
                asking.cancel()
        self._log.info("mdns.down", why="the node's addresses changed")
        return changed

    async def _changed(self, mine: tuple[Multiaddr, ...]) -> tuple[Multiaddr, ...]:
        while True:
            await asyncio.sleep(self._config.addrs_poll_s)
            now = announceable(self._overlay.addrs(), self._config.addrs_max)
            if now != mine:
                return now

    async def _ask(self, lan: Lan) -> None:
        """Ask who is there; doubling intervals, as RFC 6762 (5.2) wants it."""
        wait_s = 1.0
        await asyncio.sleep(self._rng.uniform(0.02, 0.12))  # nodes that started together
        lan.ask(first=True)
        while True:
            await asyncio.sleep(wait_s * self._rng.uniform(0.9, 1.1))
            alone = not self._overlay.peers()
            limit_s = self._config.query_s_alone if alone else self._config.query_s_max
            wait_s = min(wait_s * 2, limit_s)
            lan.ask(first=False)

    def _heard(self, text: bytes) -> None:
        """One TXT record, of whoever and whatever."""
        sighting = decode(text, self._config.addrs_max)
        if sighting.cluster != self._overlay.cluster and (
            sighting.cluster or not self._config.foreign
        ):
            return
        for addr in sighting.addrs:
            if addr.peer != self._overlay.peer_id and self._seen.take(addr):
                self._waiting.put(str(addr))
                self._arrived.set()
                self._log.debug("mdns.found", addr=addr)


def _import_lan() -> type[Lan]:
    from wetware_mdns.lan import Lan

    return Lan
