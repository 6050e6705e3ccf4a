"""The discovery `mdns`: announces this node on the local network, and reports who else is there."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from wetware.base.backoff import Backoff
from wetware.base.interfaces import interfaces as interfaces_of_this_machine
from wetware_mdns.config import INTERFACES_MAX
from wetware_mdns.records import announceable, decode, encode

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.hookspecs import PluginContext
    from wetware_mdns.config import MdnsConfig
    from wetware_mdns.lan import Lan

ADDRS_MAX = 8
"""Addresses announced. One peer's answer is read up to the same number."""
ADDRS_POLL_S = 5.0
"""How often this node's addresses are looked at; after a change it announces itself anew."""
QUERY_S_ALONE, QUERY_S_MAX = 30.0, 600.0
"""The longest time between two questions while no member is connected, and otherwise. The first
come after 0, 1, 2, 4, … s. Nodes that start announce themselves unasked, so that questions only
make up for lost packets; RFC 6762 (5.2) allows up to an hour."""
FOUND_MAX = 256
"""Addresses heard of that the node has not taken yet, which it does within a turn of the loop."""
RETRY_S_MIN, RETRY_S_MAX = 5.0, 300.0
"""After a failure, e.g. because another program keeps the port to itself."""


class MdnsDiscovery:
    """See wetware.hookspecs.Discovery.

    `advertise` holds the sockets, speaks and listens; `find_peers` only empties a queue, so that
    whoever stops reading leaves nothing behind. The node runs both.
    """

    name = "mdns"

    def __init__(self, ctx: PluginContext) -> None:
        config: MdnsConfig = ctx.config
        self._overlay, self._log, self._config = ctx.overlay, ctx.log, config
        self._run_sync = ctx.run_sync
        self._rng = random.SystemRandom()
        self._found: deque[str] = deque(maxlen=FOUND_MAX)
        self._arrived = asyncio.Event()

    async def advertise(self, addrs: tuple[str, ...]) -> None:
        """Announce this node and listen, until cancelled; ends within a second."""
        mine = announceable(addrs, ADDRS_MAX)
        backoff = Backoff(RETRY_S_MIN, RETRY_S_MAX, self._rng)
        while True:
            if not mine:
                self._log.info("mdns.idle", why="the node listens on no address but loopback")
                mine = await self._changed(mine)
                continue
            try:
                mine = await self._be_present(mine)
                backoff.reset()
            except Exception as exc:  # whatever the network does, the node goes on without it
                while isinstance(exc, ExceptionGroup):
                    exc = exc.exceptions[0]
                pause_s = backoff.pause_s()
                self._log.warning("mdns.failed", why=exc, again_s=round(pause_s, 1))
                await asyncio.sleep(pause_s)
                mine = announceable(self._overlay.addrs(), ADDRS_MAX)

    async def find_peers(self) -> AsyncIterator[str]:
        """Addresses of neighbours, with peer IDs, as they are heard of: hints, not proofs."""
        while True:
            while self._found:
                yield self._found.popleft()
            self._arrived.clear()
            await self._arrived.wait()

    # --- on the network ---------------------------------------------------------------------------

    async def _be_present(self, mine: tuple[Multiaddr, ...]) -> tuple[Multiaddr, ...]:
        """Speak and listen until this node's addresses change; returns the new ones."""
        hosts = [addr.host for addr in mine]
        own = {str(one.ip) for one in interfaces_of_this_machine()}  # not a forwarded port's
        here = [host for host in hosts if host in own] or hosts
        interfaces = self._config.interfaces or tuple(dict.fromkeys(here))[:INTERFACES_MAX]
        make_lan = await self._run_sync(_import_lan)  # 0.2 s, which the loop does not wait for
        async with make_lan(interfaces, self._heard) as lan:
            self._log.info(
                "mdns.up",
                interfaces=" ".join(interfaces),
                announced=" ".join(hosts) if self._config.announce else "nothing",
            )
            async with asyncio.TaskGroup() as tasks:
                asking = tasks.create_task(self._ask(lan))
                if self._config.announce:
                    # The name is made anew at each start: it says nothing, and nobody else has it.
                    name, text = secrets.token_hex(16), encode(mine, self._overlay.cluster)
                    await lan.announce(name, text, tuple(dict.fromkeys(hosts)), mine[0].port)
                changed = await self._changed(mine)
                asking.cancel()
        self._log.info("mdns.down", why="the node's addresses changed")
        return changed

    async def _changed(self, mine: tuple[Multiaddr, ...]) -> tuple[Multiaddr, ...]:
        while True:
            await asyncio.sleep(ADDRS_POLL_S)
            now = announceable(self._overlay.addrs(), ADDRS_MAX)
            if now != mine:
                return now

    async def _ask(self, lan: Lan) -> None:
        """Ask who is there; doubling intervals, as RFC 6762 (5.2) wants it."""
        wait_s = 1.0
        await asyncio.sleep(self._rng.uniform(0.02, 0.12))  # nodes that started together
        lan.ask(first=True)
        while True:
            await asyncio.sleep(wait_s * self._rng.uniform(0.9, 1.1))
            wait_s = min(wait_s * 2, QUERY_S_MAX if self._overlay.peers() else QUERY_S_ALONE)
            lan.ask(first=False)

    def _heard(self, text: bytes) -> None:
        """One TXT record, of whoever and whatever. The node bounds how many it dials."""
        sighting = decode(text, ADDRS_MAX)
        if sighting.cluster != self._overlay.cluster and (
            sighting.cluster or not self._config.foreign
        ):
            return
        for addr in sighting.addrs:
            if addr.peer != self._overlay.peer_id:
                self._found.append(str(addr))
                self._arrived.set()
                self._log.debug("mdns.found", addr=addr)


def _import_lan() -> type[Lan]:
    from wetware_mdns.lan import Lan

    return Lan
