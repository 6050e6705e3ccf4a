"""What tests of plugins stand on: an overlay and a clock in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from wetware import rpc
from wetware.base.access import Access
from wetware.broker.protocol import CORE
from wetware.errors import DialError, OverlayError, ProtocolRefused
from wetware.hookspecs import PeerDown, PeerUp
from wetware.identity import Key
from wetware.overlay.link import Stream
from wetware.overlay.rpc_pipe import RpcPipe
from wetware.testing import FakeClock, FakeOverlay, overlays, tasks_of_core

pytestmark = pytest.mark.anyio
MIB = 1 << 20


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # no one event tells of it
            await asyncio.sleep(0.002)


async def _echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)
    stream.close()


async def test_streams_between_any_two_of_five() -> None:
    async with overlays(5) as nodes:
        for node in nodes:
            assert set(node.peers()) == {other.peer_id for other in nodes if other is not node}
            node.handle("/echo", _echo, access=Access.MEMBER)
        sent = bytes(MIB)
        for node in nodes:
            async with await node.open_stream(nodes[node is nodes[0]].peer_id, "/echo") as stream:
                assert stream.peer == nodes[node is nodes[0]].peer_id
                sending = asyncio.create_task(stream.write(sent))
                assert await stream.read_exactly(MIB) == sent
                await sending
        with pytest.raises(ProtocolRefused):
            await nodes[0].open_stream(nodes[1].peer_id, "/nothing")
    assert tasks_of_core() == []


async def test_rpc_goes_over_it() -> None:
    class Gate(rpc.Servant, interface=CORE.Node):
        async def status(self, **_: Any) -> dict[str, Any]:
            return {}

        details = restart_overlay = trust_clock = proposal = hand_over = status

    async with overlays(2) as (a, b), rpc.runtime():
        b.handle("/rpc", lambda stream: rpc.serve(RpcPipe(stream), Gate()), access=Access.MEMBER)
        connection = await rpc.connect(RpcPipe(await a.open_stream(b.peer_id, "/rpc")))
        assert await connection.bootstrap(CORE.Node).status()
        await connection.aclose()


async def test_who_comes_and_goes_is_told_once() -> None:
    async with FakeOverlay() as a, FakeOverlay() as b:
        seen: list[object] = []
        early = Key.generate().peer_id
        a.meet(early)
        end = a.watch_peers(seen.append)
        await a.connect(b)
        await b.connect(a)  # a second connection of the two
        await a.disconnect(b)
        await until(lambda: b.peers() == ())
        assert seen == [PeerUp(early), PeerUp(b.peer_id), PeerDown(b.peer_id)]
        assert a.peers() == (early,)
        end()
        end()
        a.part(early)
        assert len(seen) == 3
        with pytest.raises(DialError):
            await a.open_stream(b.peer_id, "/echo")


async def test_the_dht_is_what_a_test_says() -> None:
    overlay = FakeOverlay()
    assert not await overlay.provide(b"key")
    overlay.found = ("/ip4/192.0.2.1/tcp/1",)
    assert await overlay.find_providers(b"other") == overlay.found
    overlay.taken = overlay.found = OverlayError("away")
    for verb in (overlay.provide, overlay.find_providers):
        with pytest.raises(OverlayError):
            await verb(b"key")
    assert overlay.keys == [b"key", b"other", b"key", b"key"]


async def test_the_clocks_go_together_or_apart() -> None:
    clock = FakeClock()
    wall, steady = clock.time(), clock.monotonic()
    clock.now += 5
    assert (clock.time() - wall, clock.monotonic() - steady) == (5, 5)
    clock.epoch_s -= 60
    assert (clock.time() - wall, clock.monotonic() - steady) == (-55, 5)
