"""js-libp2p's gossipsub and ours: 200 messages each way, none lost, signatures checked by both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key, PeerId
from wetware.overlay.libp2p import Overlay
from wetware.overlay.link import LinkHost
from wetware.testing import FakeOverlay, Started
from wetware_pubsub.config import PubSubConfig
from wetware_pubsub.gossip import Gossip
from wetware_pubsub.router import MESHSUB_11, Received

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

COUNT = 200
PREFIX = "/wetware/interop/"
T = PREFIX + "chat"


class _Ours:
    def __init__(self, host: LinkHost, gossip: Gossip, inbox: list[Received]) -> None:
        self.host, self.gossip, self.inbox = host, gossip, inbox
        self.router = gossip.router


@pytest.fixture
async def ours(tmp_path: Path) -> AsyncIterator[_Ours]:
    key = Key.generate()
    inbox: list[Received] = []
    async with LinkHost(key, admit=lambda *_: True) as host:
        gossip = Gossip(
            FakeOverlay(key, host=host),
            config=PubSubConfig(),
            clock=time,
            log=get_logger("pubsub"),
            data_dir=tmp_path,
            deliver=inbox.append,
            prefix=PREFIX,
        )
        await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        # js learns from identify, which the guest answers, that we speak meshsub.
        overlay = Overlay(host, key)
        gossiping, overlaid = Started(), asyncio.Event()
        tasks = [asyncio.create_task(gossip.run(task_status=gossiping))]
        await gossiping.wait()
        tasks.append(asyncio.create_task(overlay.run(overlaid.set)))
        try:
            await asyncio.wait_for(overlaid.wait(), 60)
            yield _Ours(host, gossip, inbox)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def until(condition: Callable[[], object], what: str, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.01)


async def _meet(ours: _Ours, js: Any, dialler: str) -> PeerId:
    """Connect, and wait until each side is in the other's mesh."""
    if dialler == "ours":
        await ours.host.dial([Multiaddr.parse(a) for a in js.addrs])
    else:
        await js.ask("dial", addr=str(ours.host.listen_addrs[0]))
    peer = PeerId(js.peer_id)
    ours.gossip.subscribe(T)
    await js.ask("subscribe", topic=T)
    await until(lambda: peer in ours.router.mesh(T), "js in our mesh")
    deadline = time.monotonic() + 40
    while str(ours.host.peer_id) not in (await js.ask("mesh", topic=T))["peers"]:
        assert time.monotonic() < deadline, "we are not in the mesh of js"
        await asyncio.sleep(0.05)
    return peer


@pytest.mark.parametrize("dialler", ["ours", "js"])
async def test_200_messages_each_way(ours: _Ours, start_js: Any, dialler: str) -> None:
    js = await start_js("--gossipsub")
    peer = await _meet(ours, js, dialler)

    for number in range(COUNT):
        answer = await js.ask("publish", topic=T, data=(b"js %d" % number).hex())
        assert str(ours.host.peer_id) in answer["recipients"]
    await until(lambda: len(ours.inbox) >= COUNT, f"{COUNT} messages of js")
    assert [m.data for m in ours.inbox] == [b"js %d" % n for n in range(COUNT)]
    assert {m.publisher for m in ours.inbox} == {peer}

    for number in range(COUNT):  # a burst: nothing waits between them
        await ours.gossip.publish(T, b"py %d" % number)
    got = [await asyncio.wait_for(js.events.get(), 60) for _ in range(COUNT)]
    assert [bytes.fromhex(m["data"]) for m in got] == [b"py %d" % n for n in range(COUNT)]
    assert {m["from"] for m in got} == {str(ours.host.peer_id)}
    assert {m["signed"] for m in got} == {True}

    assert ours.router.stats.malformed == ours.router.stats.invalid == 0
    assert ours.router.penalty(peer) == 0
    state = ours.router._peers[peer]
    assert state.protocol in (MESHSUB_11, "/meshsub/1.0.0")


async def test_js_relays_between_two_of_ours_and_leaves(ours: _Ours, start_js: Any) -> None:
    js, other = await start_js("--gossipsub"), await start_js("--gossipsub")
    peer = await _meet(ours, js, "ours")
    await other.ask("dial", addr=js.addrs[0])
    await other.ask("subscribe", topic=T)
    deadline = time.monotonic() + 40
    while js.peer_id not in (await other.ask("mesh", topic=T))["peers"]:
        assert time.monotonic() < deadline, "the two js peers have no mesh"
        await asyncio.sleep(0.05)
    # Ours reaches the second js through the first, and the other way round.
    for number in range(COUNT):
        await ours.gossip.publish(T, b"py %d" % number)
    got = {(await asyncio.wait_for(other.events.get(), 60))["data"] for _ in range(COUNT)}
    assert got == {(b"py %d" % n).hex() for n in range(COUNT)}
    for number in range(COUNT):
        await other.ask("publish", topic=T, data=(b"js %d" % number).hex())

    def relayed() -> list[bytes]:
        return [m.data for m in ours.inbox if m.publisher == other.peer_id]

    await until(lambda: len(relayed()) >= COUNT, "messages relayed by js")
    assert sorted(relayed()) == sorted(b"js %d" % n for n in range(COUNT))

    await js.ask("unsubscribe", topic=T)
    await until(lambda: peer not in ours.router.subscribers(T), "js has unsubscribed")
    assert peer not in ours.router.mesh(T)
    js.kill()
    await until(lambda: peer not in ours.router.peers, "js is gone")
