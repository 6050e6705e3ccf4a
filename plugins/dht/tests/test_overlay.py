"""Three nodes with real libp2p: two that know only the third find each other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.hookspecs import PeerDown, PeerUp, PluginContext
from wetware.identity import Key, PeerId
from wetware.overlay.libp2p import Overlay
from wetware.overlay.link import LinkHost
from wetware_dht.config import DhtConfig
from wetware_dht.discovery import DhtDiscovery

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 60.0


class Clock:
    def __init__(self) -> None:
        self.monotonic = asyncio.get_running_loop().time
        self.time = self.monotonic


class Verbs:
    """The part of hookspecs.Overlay that the plugin uses, over a real host and overlay."""

    cluster = "cd" * 20

    def __init__(self, host: LinkHost, overlay: Overlay) -> None:
        self._host, self._overlay = host, overlay
        self.peer_id = host.peer_id
        self.watchers: list[Callable[[Any], None]] = []

    def addrs(self) -> tuple[str, ...]:
        return tuple(str(a.with_peer(self.peer_id)) for a in self._host.listen_addrs)

    def peers(self) -> tuple[PeerId, ...]:
        return self._host.peers()

    def watch_peers(self, callback: Callable[[PeerUp | PeerDown], None]) -> Callable[[], None]:
        self.watchers.append(callback)
        return lambda: self.watchers.remove(callback)

    async def dial(self, addr: str) -> None:
        connection = await self._host.dial((Multiaddr.parse(addr),))
        for callback in tuple(self.watchers):
            callback(PeerUp(connection.peer))

    async def provide(self, key: bytes) -> bool:
        return await self._overlay.provide(key)

    async def find_providers(self, key: bytes) -> tuple[str, ...]:
        found = await self._overlay.find_providers(key)
        return tuple(str(addr) for provider in found for addr in provider.addrs)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[tuple[Verbs, DhtDiscovery]]:
    key = Key.generate()
    async with LinkHost(key, admit=lambda *_: True) as host:
        await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        overlay, ready = Overlay(host, key), asyncio.Event()
        verbs = Verbs(host, overlay)
        ctx = PluginContext(
            name="dht",
            config=DhtConfig(),
            log=get_logger("plugin.dht"),
            data_dir=Path("/nonexistent"),
            clock=Clock(),
            overlay=verbs,  # type: ignore[arg-type]
        )
        discovery = DhtDiscovery(ctx)
        # The plugin starts before libp2p does, as in the node: it has to bear that.
        tasks = [asyncio.create_task(discovery.advertise(verbs.addrs()))]
        tasks.append(asyncio.create_task(overlay.run(ready.set)))
        try:
            async with asyncio.timeout(WAIT_S_MAX):
                await ready.wait()
            yield verbs, discovery
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


class ThreadNode:
    """A node in a thread and a loop of its own: one libp2p runs per thread."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self.verbs: Verbs
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(WAIT_S_MAX)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with running() as (self.verbs, _):
            self._ready.set()
            await self._stop.wait()

    async def dial(self, addr: str) -> None:
        future = asyncio.run_coroutine_threadsafe(self.verbs.dial(addr), self._loop)
        await asyncio.wrap_future(future)

    async def aclose(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        await asyncio.to_thread(self._thread.join, WAIT_S_MAX)


async def test_members_of_one_member_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wetware_dht.discovery.RETRY_S_MIN", 0.2)
    monkeypatch.setattr("wetware_dht.discovery.RETRY_S_MAX", 1)
    async with contextlib.AsyncExitStack() as stack:
        nodes = await asyncio.gather(*(asyncio.to_thread(ThreadNode) for _ in range(2)))
        for node in nodes:
            stack.push_async_callback(node.aclose)
        middle, far = nodes
        verbs, discovery = await stack.enter_async_context(running())
        await far.dial(middle.verbs.addrs()[0])
        await verbs.dial(middle.verbs.addrs()[0])
        found: set[str] = set()
        wanted = {middle.verbs.addrs()[0], far.verbs.addrs()[0]}
        async with asyncio.timeout(WAIT_S_MAX):
            async for addr in discovery.find_peers():
                found.add(addr)
                if found >= wanted:
                    break
        assert found == wanted
