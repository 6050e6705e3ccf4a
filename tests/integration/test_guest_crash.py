"""libp2p dies in the middle of everything; nothing notices, and it comes back."""

from __future__ import annotations

import asyncio
import time

import pytest

import wetware
from wetware.testing import NodeProcess

pytestmark = pytest.mark.anyio
LIBP2P = True


async def _state(session: wetware.Session) -> tuple[str, int]:
    status = await session.status()
    return status["overlay_state"], status["overlay_restarts"]


async def _until_running(session: wetware.Session, restarts: int, within_s: float) -> float:
    """Seconds until the guest has restarted `restarts` times and runs."""
    started = time.monotonic()
    async with asyncio.timeout(within_s):
        while await _state(session) != ("running", restarts):
            await asyncio.sleep(0.01)
    return time.monotonic() - started


async def test_rpc_and_streams_go_on_and_the_guest_is_back_within_two_seconds(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, b = pair
    key = a.home.key()
    async with (
        wetware.connect(a.addr, key=key) as at_a,
        wetware.connect(b.addr, key=key) as at_b,
    ):
        await _until_running(at_a, 0, 60)
        before = await at_a.status()
        sender, receiver = await at_a.pubsub.join("crash"), await at_b.pubsub.join("crash")
        got: list[int] = []
        stop = False
        calls = 0
        async with receiver.subscribe() as messages:

            async def receive() -> None:
                async for message in messages:
                    got.append(int(message.data))

            async def call() -> None:
                nonlocal calls
                while not stop:
                    await at_a.whoami()
                    calls += 1

            reading = asyncio.create_task(receive())
            calling = asyncio.create_task(call())
            sent = 0
            async with asyncio.timeout(60):
                while not got:
                    await sender.publish(str(sent))
                    sent += 1
                    await asyncio.sleep(0.05)
            first = got[0]
            for crash in range(1, 4):
                await at_a.restart_overlay()
                during = calls
                for _ in range(50):
                    await sender.publish(str(sent))
                    sent += 1
                took_s = await _until_running(at_a, crash, 10)
                assert took_s < 2.0
                assert calls > during, "no call went through while the guest was down"
            async with asyncio.timeout(60):
                while not got or got[-1] != sent - 1:
                    await asyncio.sleep(0.02)
            stop = True
            await calling
            reading.cancel()
        assert got == list(range(first, sent)), "messages were lost, doubled or reordered"
        after = await at_a.status()
        assert after["pid"] == before["pid"]
        streams = {p["peer_id"]: p["addr"] for p in after["peers"]}
        for peer in before["peers"]:
            if peer["member"]:
                assert streams[peer["peer_id"]] == peer["addr"], "the connection was replaced"
