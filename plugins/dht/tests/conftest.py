"""A node's side of the plugin, faked: an overlay that answers as told, and waits that are noted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from wetware.base.log import get_logger
from wetware.hookspecs import PluginContext
from wetware.identity import Key
from wetware.testing import FakeClock, FakeOverlay
from wetware_dht.config import DhtConfig
from wetware_dht.discovery import DhtDiscovery


class Pauses:
    """Waits that end at once; the clock advances, and a test acts in between."""

    def __init__(self, clock: FakeClock, count: int) -> None:
        self.clock, self.count = clock, count
        self.waits: list[float] = []
        self.before: dict[int, Callable[[], None]] = {}
        self.done = asyncio.Event()

    async def __call__(self, woken: asyncio.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        await asyncio.sleep(0)
        if act := self.before.get(len(self.waits)):
            act()
        if woken.is_set():
            woken.clear()
            return True
        if len(self.waits) >= self.count:
            self.done.set()
            await asyncio.Event().wait()
        self.clock.now += seconds
        return False


class Steady:
    """No jitter: the middle of every range."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2


class World:
    def __init__(self, pauses: int) -> None:
        self.overlay, self.clock = FakeOverlay(), FakeClock()
        self.overlay.announced = (self.addr("192.0.2.1", peer=self.overlay.peer_id),)
        self.overlay.taken = True
        self.pauses = Pauses(self.clock, pauses)
        ctx = PluginContext(
            name="dht",
            config=DhtConfig(),
            log=get_logger("plugin.dht"),
            data_dir=Path("/nonexistent"),
            clock=self.clock,
            overlay=self.overlay,
        )
        self.discovery = DhtDiscovery(ctx, pause=self.pauses, rng=Steady())  # type: ignore[arg-type]
        self.reported: list[str] = []

    async def run(self, what: str) -> list[float]:
        """Run one side until it has paused that often; returns the waits."""
        side = (
            self.discovery.advertise(self.overlay.announced)
            if what == "advertise"
            else self._find()
        )
        task = asyncio.create_task(side)
        done = asyncio.create_task(self.pauses.done.wait())
        try:
            async with asyncio.timeout(60):
                await asyncio.wait([task, done], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            done.cancel()
            task.cancel()
            await asyncio.wait([task])
        return self.pauses.waits

    async def _find(self) -> None:
        async for addr in self.discovery.find_peers():
            self.reported.append(addr)

    def connect(self, count: int = 1) -> None:
        for _ in range(count):
            self.overlay.meet(Key.generate().peer_id)

    def addr(self, host: str = "192.0.2.9", port: int = 4001, peer: object = None) -> str:
        return f"/ip4/{host}/tcp/{port}/p2p/{peer or Key.generate().peer_id}"


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> type[World]:
    monkeypatch.setattr("wetware_dht.discovery.SETTLE_S", 0)
    return World
