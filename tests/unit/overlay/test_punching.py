"""What a try to get to a direct connection costs those that it asks."""

from __future__ import annotations

import contextlib

import pytest

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key, PeerId
from wetware.overlay.link import LinkHost, LinkLimits
from wetware.overlay.link import host as link_host
from wetware.overlay.link.connection import NoiseConnection
from wetware.overlay.punching import Punching

pytestmark = pytest.mark.anyio


def admit(peer: PeerId, protocol: str, access: Access) -> bool:
    return access is Access.PUBLIC


async def test_who_asks_how_it_is_seen_does_not_shake_the_connection_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Multiaddr, "is_global", True)
    monkeypatch.setattr(link_host, "_CROSSED_S", 0.0)
    limits = LinkLimits(close_s=0.2)
    async with contextlib.AsyncExitStack() as stack:
        home, hub = [
            await stack.enter_async_context(LinkHost(Key.generate(), limits=limits, admit=admit))
            for _ in range(2)
        ]
        await hub.listen([Multiaddr("ip4", "127.0.0.1", 0)])
        Punching(hub, list, lambda: 0.0).start()
        used = await home.dial(hub.listen_addrs)
        punching = Punching(home, lambda: [used], lambda: 0.0)
        # As many as there are members behind NATs that begin at once.
        asked = [
            await punching._observe(await stack.enter_async_context(contextlib.AsyncExitStack()))
            for _ in range(2 * limits.connections_per_peer_max)
        ]
        assert all(port == seen.port for port, seen in asked)
        assert len({port for port, _ in asked}) == len(asked)
        assert home.connections() == (used,)
        [there] = [conn for conn in hub.connections() if conn.peer == home.peer_id]
        for each in (used, there):
            assert isinstance(each, NoiseConnection)
            assert each._probed_at is None
            assert not each.closed
