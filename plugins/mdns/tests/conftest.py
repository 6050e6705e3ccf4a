"""A node's side of the plugin, faked; and discoveries that speak on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware.base.log import get_logger
from wetware.hookspecs import PluginContext
from wetware.identity import Key
from wetware.testing import FakeClock, FakeOverlay
from wetware_mdns.config import MdnsConfig
from wetware_mdns.discovery import MdnsDiscovery

LOOPBACK = ("127.0.0.1",)
"""For the sockets alone: what is announced is never a loopback address."""


def listen(overlay: FakeOverlay, *hosts: str) -> None:
    """Say that the node listens there."""
    kind = {True: "ip6", False: "ip4"}
    overlay.announced = tuple(
        f"/{kind[':' in host]}/{host}/tcp/4001/p2p/{overlay.peer_id}" for host in hosts
    )


def make_discovery(overlay: FakeOverlay, **config: Any) -> MdnsDiscovery:
    settings: dict[str, Any] = {"interfaces": LOOPBACK, **config}
    ctx = PluginContext(
        name="mdns",
        config=MdnsConfig(**settings),
        log=get_logger("plugin.mdns"),
        data_dir=Path("/nonexistent"),
        clock=FakeClock(),
        overlay=overlay,
    )
    return MdnsDiscovery(ctx)


@contextlib.asynccontextmanager
async def running(overlay: FakeOverlay, **config: Any) -> AsyncIterator[MdnsDiscovery]:
    """A discovery that is announced and listens, as the node runs it."""
    discovery = make_discovery(overlay, **config)
    task = asyncio.create_task(discovery.advertise(overlay.addrs()))
    try:
        yield discovery
    finally:
        task.cancel()
        async with asyncio.timeout(1.0):
            await asyncio.wait([task])


async def found(discovery: MdnsDiscovery, count: int = 1) -> set[str]:
    addrs: set[str] = set()
    async with asyncio.timeout(3.0):
        async for addr in discovery.find_peers():
            addrs.add(addr)
            if len(addrs) >= count:
                break
    return addrs


async def found_all(discovery: MdnsDiscovery, wanted: set[str]) -> set[str]:
    """Everything that is found until `wanted` is: also what was heard before, once more."""
    addrs: set[str] = set()
    async with asyncio.timeout(3.0):
        async for addr in discovery.find_peers():
            addrs.add(addr)
            if addrs >= wanted:
                break
    return addrs


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wetware_mdns.discovery.ADDRS_POLL_S", 0.01)


@pytest.fixture
def cluster() -> str:
    """One of the test's own: other tests speak on the same interface at the same time."""
    return Key.generate().peer_id.multihash[-20:].hex()


@pytest.fixture
def make_overlay(cluster: str) -> Callable[..., FakeOverlay]:
    def make(*hosts: str, of: str = cluster) -> FakeOverlay:
        overlay = FakeOverlay(cluster=of)
        listen(overlay, *hosts)
        return overlay

    return make
