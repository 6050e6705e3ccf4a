"""Other implementations of libp2p, both ways: js-libp2p, and py-libp2p as it comes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

import wetware
from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.errors import PeerMismatch, ProtocolRefused, StreamReset
from wetware.identity import Key
from wetware.overlay.libp2p import Overlay, OverlayLimits
from wetware.overlay.link import Connection, LinkHost, Stream

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

MIB = 1 << 20
BULK_BYTES = 64 * MIB
CHUNK_BYTES = 64 << 10
ECHO, SINK, SOURCE = (f"/ww-interop/{name}/1.0.0" for name in ("echo", "sink", "source"))
IDENTIFY, PUSH = "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0"
KAD, PING = "/ipfs/kad/1.0.0", "/ipfs/ping/1.0.0"


async def serve_echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def serve_sink(stream: Stream) -> None:
    digest = hashlib.sha256()
    while data := await stream.read():
        digest.update(data)
    await stream.write(digest.digest())


async def serve_source(stream: Stream) -> None:
    left = int.from_bytes(await stream.read_exactly(8), "big")
    digest = hashlib.sha256()
    while left:
        data = os.urandom(min(left, CHUNK_BYTES))
        digest.update(data)
        await stream.write(data)
        left -= len(data)
    await stream.write(digest.digest())


@dataclass
class Ours:
    host: LinkHost
    overlay: Overlay

    @property
    def addr(self) -> str:
        return str(self.host.listen_addrs[0])

    async def crash(self) -> None:
        before = self.overlay.status().restarts
        self.overlay.crash(RuntimeError("on purpose"))
        async with asyncio.timeout(60):
            while self.overlay.status().restarts == before or (
                self.overlay.status().state != "running"
            ):
                await asyncio.sleep(0.005)


@pytest.fixture
async def ours() -> AsyncIterator[Ours]:
    key = Key.generate()
    async with LinkHost(key, admit=lambda *_: True) as host:
        for protocol, handler in ((ECHO, serve_echo), (SINK, serve_sink), (SOURCE, serve_source)):
            host.handle(protocol, handler, access=Access.PUBLIC)
        await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        limits = OverlayLimits(restart_s_min=0.01, restart_s_max=0.01)
        overlay, ready = Overlay(host, key, limits=limits), asyncio.Event()
        task = asyncio.create_task(overlay.run(ready.set))
        try:
            await asyncio.wait_for(ready.wait(), 60)
            yield Ours(host, overlay)
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture(params=["js", "stock"])
def start_theirs(request: pytest.FixtureRequest):
    return request.param, request.getfixturevalue(f"start_{request.param}")


@pytest.fixture
async def theirs(start_theirs):
    kind, start = start_theirs
    peer = await start()
    peer.kind = kind
    return peer


def cid(multihash: bytes) -> str:
    """CIDv1, raw, base32: the key in the DHT is the multihash in it."""
    return "b" + base64.b32encode(b"\x01\x55" + multihash).decode().lower().rstrip("=")


async def dial(ours: Ours, theirs) -> Connection:
    return await ours.host.dial([Multiaddr.parse(addr) for addr in theirs.addrs])


async def echoes(connection: Connection, size: int = 200_000) -> bool:
    data = os.urandom(size)
    async with await connection.open_stream(ECHO) as stream:
        writing = asyncio.create_task(stream.write(data))
        back = await stream.read_exactly(size)
        await writing
        return back == data


async def ping(connection: Connection) -> float:
    """The round trip, s, as libp2p's ping has it."""
    data = os.urandom(32)
    async with await connection.open_stream(PING) as stream:
        started = time.perf_counter()
        await stream.write(data)
        assert await stream.read_exactly(32) == data
        return time.perf_counter() - started


async def identify(connection: Connection) -> Any:
    """What the peer says of itself."""
    from libp2p.identity.identify.identify import parse_identify_response

    while True:
        said = b""
        with contextlib.suppress(StreamReset):  # js does one at a time, and the guest asks as well
            async with await connection.open_stream(IDENTIFY) as stream:
                while part := await stream.read():
                    said += part
            return parse_identify_response(said)
        await asyncio.sleep(0.05)


async def test_we_dial(ours: Ours, theirs) -> None:
    connection = await dial(ours, theirs)
    assert connection.peer == theirs.peer_id
    assert connection.initiator
    assert await echoes(connection)
    rtts = [await ping(connection) for _ in range(20)]
    assert 0 < sorted(rtts)[10] < 1.0
    said = await identify(connection)
    assert {IDENTIFY, PING, ECHO} <= set(said.protocols)
    assert said.agent_version.startswith({"js": "js-libp2p/", "stock": "py-libp2p/"}[theirs.kind])
    listening = {str(Multiaddr.parse(addr).with_peer(None)) for addr in theirs.addrs}
    from multiaddr import Multiaddr as LibAddr

    assert listening <= {str(LibAddr(addr)) for addr in said.listen_addrs}
    observed = str(LibAddr(said.observed_addr))  # js adds our peer ID
    assert observed.partition("/p2p/")[0] == str(connection.local.with_peer(None))
    with pytest.raises(ProtocolRefused):
        await connection.open_stream("/ww-interop/unknown/1.0.0")
    (theirs_of_us,) = (await theirs.ask("connections"))["connections"]
    assert theirs_of_us["peer"] == ours.host.peer_id


async def test_they_dial(ours: Ours, theirs) -> None:
    assert (await theirs.ask("dial", addr=ours.addr))["peer"] == ours.host.peer_id
    (connection,) = ours.host.connections()
    assert not connection.initiator
    me = str(ours.host.peer_id)
    for _ in range(5):
        assert 0 < (await theirs.ask("ping", peer=me))["rtt_ms"] < 1000
    found = await theirs.ask("identify", peer=me)
    assert {IDENTIFY, PUSH, PING, KAD, ECHO, SINK, SOURCE} <= set(found["protocols"])
    assert found["agent"] == f"wetware/{wetware.__version__}"
    assert str(ours.host.listen_addrs[0].with_peer(None)) in [
        addr.partition("/p2p/")[0] for addr in found["addrs"]
    ]
    if theirs.kind == "js":
        assert found["signed"]
        (conn,) = (await theirs.ask("connections"))["connections"]
        assert (conn["encryption"], conn["multiplexer"]) == ("/noise", "/yamux/1.0.0")
    data = os.urandom(50_000).hex()
    assert (await theirs.ask("echo", peer=me, data=data))["data"] == data
    # And we, on the connection that they opened.
    assert await echoes(connection)
    assert 0 < await ping(connection) < 1.0
    assert IDENTIFY in (await identify(connection)).protocols


async def test_wrong_peer_id(ours: Ours, theirs) -> None:
    stranger = Key.generate().peer_id
    wrong = Multiaddr.parse(theirs.addrs[0]).with_peer(stranger)
    with pytest.raises(PeerMismatch, match=theirs.peer_id):
        await ours.host.dial([wrong])
    assert ours.host.connections() == ()
    with pytest.raises(AssertionError, match="dial"):
        await theirs.ask("dial", addr=str(ours.host.listen_addrs[0].with_peer(stranger)))
    async with asyncio.timeout(60):
        while ours.host.connections():
            await asyncio.sleep(0.01)


async def test_guest_crashes_on_one_connection(ours: Ours, theirs) -> None:
    await theirs.ask("dial", addr=ours.addr)
    (connection,) = ours.host.connections()
    me, worst_s = str(ours.host.peer_id), 0.0
    stream = await connection.open_stream(ECHO)
    for number in range(5):
        start = time.perf_counter()
        await ours.crash()
        await stream.write(b"crash %d" % number)
        assert await stream.read_exactly(7) == b"crash %d" % number
        assert (await theirs.ask("ping", peer=me))["rtt_ms"] > 0
        worst_s = max(worst_s, time.perf_counter() - start)
        assert await ping(connection) > 0
    assert PING in (await theirs.ask("identify", peer=me))["protocols"]
    assert ours.host.connections() == (connection,)
    assert ours.overlay.status().restarts == 5
    assert worst_s < 2.0


async def test_peer_that_dies(ours: Ours, theirs) -> None:
    connection = await dial(ours, theirs)
    await identify(connection)
    theirs.kill()
    await asyncio.wait_for(connection.wait_closed(), 60)
    guest = ours.overlay._guest
    assert guest is not None
    async with asyncio.timeout(60):
        while guest._swarm.get_connections():
            await asyncio.sleep(0.01)
    assert ours.overlay.status().restarts == 0


async def test_bulk_from_js(ours: Ours, start_js, record_figure) -> None:
    js = await start_js()
    await js.ask("dial", addr=ours.addr)
    me = str(ours.host.peer_id)
    sent = await js.ask("send", peer=me, bytes=BULK_BYTES, timeout_s=120)
    assert sent["answer"] == sent["sha256"]
    got = await js.ask("receive", peer=me, bytes=BULK_BYTES, timeout_s=120)
    assert got["got"] == BULK_BYTES
    assert got["answer"] == got["sha256"]
    record_figure("js_to_ours_MBps", round(BULK_BYTES / 1e6 / sent["elapsed_s"]))
    record_figure("ours_to_js_MBps", round(BULK_BYTES / 1e6 / got["elapsed_s"]))


async def test_bulk_to_js(ours: Ours, start_js, record_figure) -> None:
    connection = await dial(ours, await start_js())
    digest, block = hashlib.sha256(), os.urandom(CHUNK_BYTES)
    start = time.perf_counter()
    async with await connection.open_stream(SINK) as stream:
        for number in range(BULK_BYTES // CHUNK_BYTES):
            data = number.to_bytes(8, "big") + block[8:]
            digest.update(data)
            await stream.write(data)
        stream.close()
        assert await stream.read_exactly(32) == digest.digest()
    record_figure("up_MBps", round(BULK_BYTES / 1e6 / (time.perf_counter() - start)))
    digest, left, start = hashlib.sha256(), BULK_BYTES, time.perf_counter()
    async with await connection.open_stream(SOURCE) as stream:
        await stream.write(BULK_BYTES.to_bytes(8, "big"))
        while left:
            data = await stream.read(left)
            assert data
            digest.update(data)
            left -= len(data)
        assert await stream.read_exactly(32) == digest.digest()
    record_figure("down_MBps", round(BULK_BYTES / 1e6 / (time.perf_counter() - start)))


async def test_bulk_with_guest_crashes(ours: Ours, start_js) -> None:
    """64 MiB from js while libp2p dies again and again: not a byte is lost."""
    js = await start_js()
    await js.ask("dial", addr=ours.addr)
    sending = asyncio.create_task(
        js.ask("send", peer=str(ours.host.peer_id), bytes=BULK_BYTES, timeout_s=120)
    )
    crashes = 0
    while not sending.done():
        await ours.crash()
        crashes += 1
        await asyncio.wait([sending], timeout=0.05)
    sent = await sending
    assert sent["answer"] == sent["sha256"]
    assert crashes >= 3


async def test_dht_with_js(ours: Ours, start_js) -> None:
    js = await start_js("--dht")
    await js.ask("dial", addr=ours.addr)
    async with asyncio.timeout(60):
        while ours.overlay.status().dht_peers == 0:
            await asyncio.sleep(0.02)
    multihash = b"\x12\x20" + hashlib.sha256(b"wetware").digest()
    assert await ours.overlay.provide(multihash) is True
    found = await js.ask("findProviders", key=cid(multihash))
    assert ours.host.peer_id in found["peers"]
    other = b"\x12\x20" + hashlib.sha256(b"from js").digest()
    await js.ask("provide", key=cid(other))
    providers = await ours.overlay.find_providers(other)
    assert [p.peer for p in providers] == [js.peer_id]
    assert ours.overlay.status().restarts == 0
