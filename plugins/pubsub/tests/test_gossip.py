"""Gossip over real links on loopback: bursts, order, peers that break, stall or come back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.base.varint import uvarint
from wetware.errors import LimitExceeded, OverlayError, ProtocolRefused
from wetware.hookspecs import Access
from wetware.identity import Key, PeerId
from wetware.overlay.link import LinkHost, Stream
from wetware.testing import FakeOverlay, Started
from wetware_pubsub import wire
from wetware_pubsub.config import PubSubConfig
from wetware_pubsub.gossip import EpochFile, Gossip
from wetware_pubsub.order import number_of
from wetware_pubsub.router import MESHSUB_11, Received

pytestmark = pytest.mark.anyio

PREFIX = "/wetware/test/"
T = PREFIX + "chat"


class LiveNode:
    def __init__(self, host: LinkHost, gossip: Gossip, inbox: list[Received]) -> None:
        self.host, self.gossip, self.inbox = host, gossip, inbox

    @property
    def id(self) -> PeerId:
        return self.host.peer_id

    async def dial(self, other: LiveNode) -> None:
        await self.host.dial(other.host.listen_addrs)

    def texts(self) -> list[bytes]:
        return [m.data for m in self.inbox]


@contextlib.asynccontextmanager
async def live_node(
    path: Path, key: Key | None = None, gossiping: bool = True, **config: Any
) -> AsyncIterator[LiveNode]:
    key = key or Key.generate()
    inbox: list[Received] = []
    path.mkdir(exist_ok=True)  # noqa: ASYNC240  # a temporary directory
    async with LinkHost(key, admit=lambda *_: True) as host:
        await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        gossip = Gossip(
            FakeOverlay(key, cluster="test", host=host),
            config=PubSubConfig(**config),
            clock=time,
            log=get_logger("pubsub"),
            data_dir=path,
            deliver=inbox.append,
            prefix=PREFIX,
        )
        running = Started()
        task = asyncio.create_task(gossip.run(task_status=running)) if gossiping else None
        if task is not None:
            await running.wait()
        try:
            yield LiveNode(host, gossip, inbox)
        finally:
            if task is not None:
                assert not task.done() or task.exception() is None
                task.cancel()
                await asyncio.wait([task])


async def until(condition: Callable[[], object], what: str = "", within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # no one event tells of it
            await asyncio.sleep(0.005)


async def _know(*nodes: LiveNode) -> None:
    """Until each has heard that all the others are subscribed."""
    for node in nodes:
        node.gossip.subscribe(T)
    for node in nodes:
        await until(lambda n=node: len(n.gossip.router.subscribers(T)) == len(nodes) - 1)


def _numbered(node: LiveNode, publisher: PeerId) -> list[int]:
    return [int(m.data) for m in node.inbox if m.publisher == publisher]


async def test_a_burst_of_1000_both_ways_is_complete_and_in_order(tmp_path: Path) -> None:
    async with live_node(tmp_path / "a") as a, live_node(tmp_path / "b") as b:
        await a.dial(b)
        await _know(a, b)

        async def burst(node: LiveNode) -> None:
            for number in range(1000):
                await node.gossip.publish(T, b"%d" % number)

        await asyncio.gather(burst(a), burst(b))
        await until(lambda: len(a.inbox) >= 2000 and len(b.inbox) >= 2000)
        for node in (a, b):
            for publisher in (a.id, b.id):
                assert _numbered(node, publisher) == list(range(1000))


async def test_a_burst_of_1000_to_eight_nodes(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(live_node(tmp_path / str(i))) for i in range(9)]
        source, *others = nodes
        for i, node in enumerate(others):
            await source.dial(node)
            await node.dial(others[(i + 1) % 8])  # so that messages also come by another way
            await node.dial(others[(i + 3) % 8])
        for node in nodes:
            node.gossip.subscribe(T)
        await until(lambda: len(source.gossip.router.subscribers(T)) == 8)
        for number in range(1000):
            await source.gossip.publish(T, b"%d" % number)
        for node in others:
            await until(lambda n=node: len(n.inbox) >= 1000)
            assert _numbered(node, source.id) == list(range(1000))


async def test_large_messages_are_paced_and_all_arrive(tmp_path: Path) -> None:
    async with (
        live_node(tmp_path / "a", queue_bytes_max=2 << 20) as a,
        live_node(tmp_path / "b") as b,
    ):
        await a.dial(b)
        await _know(a, b)
        for number in range(60):  # 30 MB through a queue of 2
            await a.gossip.publish(T, b"%d" % number + b" " * (500 << 10))
        await until(lambda: len(b.inbox) == 60)
        assert _numbered(b, a.id) == list(range(60))
        assert a.gossip.router.stats.streams_lost == 0


async def test_a_peer_that_reads_nothing_loses_its_stream_and_others_notice_nothing(
    tmp_path: Path,
) -> None:
    async with (
        live_node(tmp_path / "a", queue_bytes_max=2 << 20, stall_s=0.5) as a,
        live_node(tmp_path / "b") as b,
        live_node(tmp_path / "c", gossiping=False) as stuck,
    ):
        never = asyncio.Event()
        opened: list[Stream] = []

        async def take(stream: Stream) -> None:
            opened.append(stream)
            await never.wait()

        stuck.host.handle(MESHSUB_11, take, access=Access.MEMBER)
        await a.dial(b)
        await a.dial(stuck)
        await _know(a, b)
        stream = await stuck.host.open_stream(a.id, MESHSUB_11)
        await stream.write(wire.frame([wire.subscription_chunk(T, True)]))
        await until(lambda: len(a.gossip.router.subscribers(T)) == 2)
        for number in range(100):
            await a.gossip.publish(T, b"%d" % number + b" " * (100 << 10))
        await until(lambda: len(b.inbox) == 100)
        assert _numbered(b, a.id) == list(range(100))
        await until(lambda: len(opened) >= 2)  # it lost its stream, and was greeted on another
        never.set()


async def test_garbage_costs_the_stream_and_nothing_else(tmp_path: Path) -> None:
    async with (
        live_node(tmp_path / "a") as a,
        live_node(tmp_path / "b") as b,
        live_node(tmp_path / "c", gossiping=False) as rogue,
    ):
        await b.dial(a)
        await rogue.dial(a)
        await _know(a, b)
        for garbage in (
            b"\x05\x0b\x00\x00\x00\x00",
            b"\xff" * 100,
            b"\x80\x80\x80\x02",  # a frame of 4 MiB is announced: the limit
            uvarint((4 << 20) + 1),
            b"\x02\x12\x00" * 50,
        ):
            stream = await rogue.host.open_stream(a.id, MESHSUB_11)
            await stream.write(garbage)
            stream.close()
            with contextlib.suppress(OverlayError):
                while await stream.read():
                    pass
        assert rogue.host.connection(a.id) is not None, "the connection lives on"
        assert a.gossip.router.stats.malformed >= 2
        await b.gossip.publish(T, b"1")
        await until(lambda: a.texts() == [b"1"])
        # A frame in pieces is one frame.
        key = Key.generate()
        message = wire.WireMessage(key.peer_id.multihash, b"2", b"\0" * 8, T, b"")
        message.signature = key.sign(wire.SIGN_DOMAIN + message.signed())
        async with live_node(tmp_path / "d", gossiping=False) as slow:
            await slow.dial(a)
            stream = await slow.host.open_stream(a.id, MESHSUB_11)
            for byte in wire.frame([message.encode()]):
                await stream.write(bytes((byte,)))
            await until(lambda: a.texts() == [b"1", b"2"])


async def test_a_node_that_restarts_is_heard_again(tmp_path: Path) -> None:
    key = Key.generate()
    async with live_node(tmp_path / "a") as a:
        numbers = []
        for life in range(3):
            async with live_node(tmp_path / "b", key) as b:
                await b.dial(a)
                await _know(a, b)
                await b.gossip.publish(T, b"%d" % life)
                await until(lambda n=life: len(a.inbox) == n + 1)
                numbers.append(number_of(a.inbox[-1].seqno))
            await until(lambda: not a.gossip.router.peers)
        assert _numbered(a, key.peer_id) == [0, 1, 2]
        assert numbers == sorted(set(numbers))


async def test_a_lost_connection_is_taken_up_again(tmp_path: Path) -> None:
    async with live_node(tmp_path / "a") as a, live_node(tmp_path / "b") as b:
        for number in range(3):
            await a.dial(b)
            await _know(a, b)
            await a.gossip.publish(T, b"%d" % number)
            await until(lambda n=number: len(b.inbox) == n + 1)
            connection = a.host.connection(b.id)
            assert connection is not None
            connection.close()
            await until(lambda: not a.gossip.router.peers and not b.gossip.router.peers)
        assert b.texts() == [b"0", b"1", b"2"]


async def test_a_stream_that_the_peer_resets_is_opened_again(tmp_path: Path) -> None:
    async with live_node(tmp_path / "a") as a, live_node(tmp_path / "b") as b:
        await a.dial(b)
        await _know(a, b)
        b.gossip._inbound[a.id].reset()
        await until(lambda: b.gossip.router.subscribers(T) == () or a.id not in b.gossip._inbound)
        await until(lambda: b.gossip.router.subscribers(T) == (a.id,) and a.id in b.gossip._inbound)
        await until(lambda: a.gossip.router.targets(T) == [b.id])
        await a.gossip.publish(T, b"again")
        await until(lambda: b.texts() == [b"again"])


async def test_a_stream_that_cannot_be_opened_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = [
        LimitExceeded("no more streams"),
        RuntimeError("a defect"),
        ProtocolRefused("not yet"),
    ]
    real = FakeOverlay.open_stream

    async def open_stream(self: FakeOverlay, peer: PeerId, *protocols: str) -> Stream:
        if failures:
            raise failures.pop()
        return await real(self, peer, *protocols)

    monkeypatch.setattr(FakeOverlay, "open_stream", open_stream)
    async with live_node(tmp_path / "a") as a, live_node(tmp_path / "b") as b:
        await a.dial(b)
        await _know(a, b)
        assert not failures
        await a.gossip.publish(T, b"1")
        await until(lambda: b.texts() == [b"1"])


async def test_stopping_ends_every_task_and_registration(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with live_node(tmp_path / "a") as a, live_node(tmp_path / "b") as b:
        await a.dial(b)
        await _know(a, b)
    assert asyncio.all_tasks() == before


def test_the_epoch_file_survives_damage(tmp_path: Path) -> None:
    file = EpochFile(tmp_path / "epoch", get_logger("pubsub"))
    assert file.load() == 0
    file.reserve(123)
    assert file.load() == 123
    assert (tmp_path / "epoch").stat().st_mode & 0o777 == 0o600
    (tmp_path / "epoch").write_bytes(b"\xff junk")
    assert file.load() == 0
    EpochFile(tmp_path / "missing" / "epoch", get_logger("pubsub")).reserve(5)
