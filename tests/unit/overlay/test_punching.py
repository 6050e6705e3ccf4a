"""What a try to get to a direct connection costs those that it asks."""

from __future__ import annotations

import contextlib

import pytest

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key, PeerId
from wetware.overlay.frames import read_frame, write_frame
from wetware.overlay.link import LinkHost, LinkLimits
from wetware.overlay.link import host as link_host
from wetware.overlay.link.connection import NoiseConnection
from wetware.overlay.punching import FRAME_BYTES_MAX, PUNCH_PROTOCOL, Punching
from wetware.overlay.relay import Relay

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


async def test_attempts_are_bounded_by_peer_and_by_the_host_that_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Multiaddr, "is_global", True)
    limits, now = LinkLimits(close_s=0.2), 0.0
    async with contextlib.AsyncExitStack() as stack:
        near, hub, far = [
            await stack.enter_async_context(
                LinkHost(key, limits=limits, admit=lambda *_: True, privileged=lambda _: True)
            )
            for key in sorted((Key.generate() for _ in range(3)), key=lambda key: key.peer_id)
        ]
        await hub.listen([Multiaddr("ip4", "127.0.0.1", 0)])
        for host in (hub, far):
            Relay(host, is_member=lambda _: True, enabled=True).start()
        await far.dial(hub.listen_addrs)
        punching = Punching(far, list, lambda: now)
        punching.start()
        relayed = await near.dial([hub.listen_addrs[0].through(far.peer_id)])

        async def served(host: str) -> bool:
            async with await relayed.open_stream(PUNCH_PROTOCOL) as stream:
                await write_frame(stream, {"addr": f"/ip4/{host}/tcp/9"})
                answer = await read_frame(stream, bytes_max=FRAME_BYTES_MAX)
                return "not now" not in answer["refused"]  # it looks for an observer

        assert [await served("127.0.0.9") for _ in range(3)] == [True, True, False]
        assert [await served("127.0.0.8") for _ in range(3)] == [True, True, False]
        assert not await served("127.0.0.7"), "a peer does not choose how many there are"
        now += 60.0
        assert [await served("127.0.0.7") for _ in range(2)] == [True, False]
        punching.forget()
        assert [await served("127.0.0.9") for _ in range(3)] == [True, True, False]
