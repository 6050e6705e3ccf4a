"""Peers that send what no honest peer sends: the guest goes on, and holds a bounded amount."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable

import pytest

from wetware.base.access import Access
from wetware.base.varint import uvarint
from wetware.errors import OverlayError, ProtocolRefused
from wetware.identity import Key
from wetware.overlay.libp2p import OverlayLimits
from wetware.overlay.link import Connection, LinkHost, Stream

from .conftest import IDENTIFY, KAD, PING, Node, answers_ping, plain_host, running_node, until

pytestmark = pytest.mark.anyio

PUSH = "/ipfs/id/push/1.0.0"


def framed(message: bytes) -> bytes:
    return uvarint(len(message)) + message


def identify_messages() -> dict[str, bytes]:
    """What a hostile peer may answer to identify, by name."""
    from libp2p.identity.identify.pb.identify_pb2 import Identify

    def message(**fields: object) -> bytes:
        return framed(Identify(**fields).SerializeToString())

    junk = random.Random(1).randbytes(300)
    return {
        "nothing": b"",
        "zero length": b"\0",
        "endless varint": b"\xff" * 64,
        "huge length": uvarint(1 << 30) + junk,
        "cut short": uvarint(200) + junk[:50],
        "random bytes": framed(junk),
        "junk key": message(public_key=junk, protocols=[KAD]),
        "other key": message(public_key=b"\x08\x01\x12\x20" + bytes(32), protocols=[KAD]),
        "junk addresses": message(listen_addrs=[junk, b"", b"\x04", b"\x00" * 9], protocols=[KAD]),
        "many addresses": message(listen_addrs=[os.urandom(8) for _ in range(3000)]),
        "junk record": message(signedPeerRecord=junk, protocols=[KAD]),
        "junk protocols": message(protocols=["\n" * 100, "", "x" * 5000] * 5, agent_version="\0"),
        "junk observed": message(observed_addr=junk),
        "no protocols": message(),
    }


def dht_messages() -> dict[str, bytes]:
    """What a hostile member may send on a DHT stream, by name."""
    from libp2p.kad_dht.pb.kademlia_pb2 import Message

    junk = random.Random(2).randbytes(300)
    kinds = Message.MessageType

    def message(kind: int, **fields: object) -> bytes:
        return framed(Message(type=kind, **fields).SerializeToString())

    found = {
        "random bytes": framed(junk),
        "huge length": uvarint(1 << 31) + junk,
        "endless varint": b"\xff" * 64,
        "cut short": uvarint(500) + junk,
        "unknown type": framed(b"\x08\x63"),
        "put without record": message(kinds.PUT_VALUE, key=b"/pk/x"),
    }
    for name in ("PUT_VALUE", "GET_VALUE", "ADD_PROVIDER", "GET_PROVIDERS", "FIND_NODE", "PING"):
        kind = getattr(kinds, name)
        found[f"{name} empty key"] = message(kind)
        found[f"{name} junk key"] = message(kind, key=junk)
        found[f"{name} short key"] = message(kind, key=b"\xff")
        found[f"{name} junk sender"] = message(kind, key=b"k" * 34, senderRecord=junk)
        peers = [
            Message.Peer(id=peer_id, addrs=[junk, b""], signedRecord=record)
            for peer_id in (b"", junk, b"\x00\x01")
            for record in (b"", junk)
        ]
        found[f"{name} junk peers"] = message(
            kind, key=b"k" * 34, providerPeers=peers, closerPeers=peers
        )
        record = {"key": b"/ww/x", "value": junk, "signature": junk, "author": junk}
        found[f"{name} junk record"] = message(
            kind, key=b"/ww/x", record={**record, "timeReceived": "never"}
        )
    return found


async def send_and_drain(connection: Connection, protocol: str, data: bytes) -> bytes:
    """Send, close, and read until the other side ends the stream."""
    stream = await connection.open_stream(protocol)
    got = b""
    try:
        await stream.write(data)
        stream.close()
        async with asyncio.timeout(60):
            while chunk := await stream.read():
                got += chunk
    except OverlayError:
        pass
    finally:
        stream.reset()
    return got


async def test_hostile_identify_answers(node: Node) -> None:
    for name, answer in identify_messages().items():
        asked = asyncio.Event()

        async def serve(stream: Stream, answer: bytes = answer, asked=asked) -> None:
            asked.set()
            await stream.write(answer)

        async with plain_host() as hostile:
            hostile.handle(IDENTIFY, serve, access=Access.PUBLIC)
            connection = await hostile.dial(node.host.listen_addrs)
            await asyncio.wait_for(asked.wait(), 60)  # libp2p asks by itself
            assert await answers_ping(connection), name
    assert node.overlay.status().restarts == 0


async def test_identify_that_never_ends_is_cut_off() -> None:
    sent = asyncio.Event()

    async def flood(stream: Stream) -> None:
        await stream.write(uvarint(60 << 10))
        sent.set()
        while True:
            await stream.write(b"\0")
            await asyncio.sleep(0.05)

    async with running_node(OverlayLimits(identify_s=0.5)) as node, plain_host() as hostile:
        hostile.handle(IDENTIFY, flood, access=Access.PUBLIC)
        connection = await hostile.dial(node.host.listen_addrs)
        await sent.wait()
        await until(
            lambda: not [s for s in connection.streams if s.protocol == IDENTIFY],
            "the stream was reset",
            timeout_s=5,
        )
        assert await answers_ping(connection)


async def test_hostile_pushes(node: Node, peer: LinkHost) -> None:
    connection = await peer.dial(node.host.listen_addrs)
    for message in identify_messages().values():
        assert await send_and_drain(connection, PUSH, message) == b""
    assert await answers_ping(connection)
    assert node.overlay.status().restarts == 0


async def test_hostile_dht_messages(node: Node, peer: LinkHost) -> None:
    connection = await peer.dial(node.host.listen_addrs)
    for message in dht_messages().values():
        await send_and_drain(connection, KAD, message)
    rng = random.Random(3)
    for _ in range(100):
        await send_and_drain(connection, KAD, framed(rng.randbytes(rng.randrange(1, 200))))
    assert await answers_ping(connection)
    assert node.overlay.status().restarts == 0
    assert node.overlay._guest._dht.value_store.size() == 0


async def test_hostile_pings(node: Node, peer: LinkHost) -> None:
    connection = await peer.dial(node.host.listen_addrs)
    for size in (0, 1, 31, 33, 4096, 100_000):
        data = os.urandom(size)
        assert await send_and_drain(connection, PING, data) == data
    streams = [await connection.open_stream(PING) for _ in range(100)]
    for stream in streams:
        stream.reset()
    assert await answers_ping(connection)
    assert node.overlay.status().restarts == 0


async def test_strangers_do_not_reach_the_dht(peer: LinkHost) -> None:
    """Reading and writing the DHT is one protocol, and writing is for members."""
    members = {peer.peer_id}

    def admit(who: str, protocol: str, access: Access) -> bool:
        return access is Access.PUBLIC or who in members

    async with running_node(admit=admit) as node, plain_host() as stranger:
        async with await (await peer.dial(node.host.listen_addrs)).open_stream(KAD) as stream:
            assert stream.protocol == KAD
        connection = await stranger.dial(node.host.listen_addrs)
        with pytest.raises(ProtocolRefused, match="/ipfs/kad"):
            await connection.open_stream(KAD)
        assert (await connection.open_stream(KAD, PING)).protocol == PING
        assert await answers_ping(connection)


async def test_dht_streams_are_bounded(peer: LinkHost) -> None:
    limits = OverlayLimits(dht_streams_per_peer_max=2, dht_stream_s=0.5)
    async with running_node(limits) as node:
        connection = await peer.dial(node.host.listen_addrs)
        idle = [await connection.open_stream(KAD) for _ in range(4)]

        async def ended(stream: Stream) -> bool:
            try:
                return await stream.read() == b""
            except OverlayError:
                return True

        # Two over the limit end at once, the others when their time is up.
        done, pending = await asyncio.wait(
            [asyncio.create_task(ended(stream)) for stream in idle], timeout=0.3
        )
        assert (len(done), len(pending)) == (2, 2)
        done, pending = await asyncio.wait(pending, timeout=5)
        assert len(done) == 2
        assert all(task.result() for task in done)


async def test_provider_records_are_bounded(peer: LinkHost) -> None:
    from libp2p.kad_dht.pb.kademlia_pb2 import Message
    from multiaddr import Multiaddr

    async with running_node(OverlayLimits(dht_provider_keys_max=3)) as node:
        connection = await peer.dial(node.host.listen_addrs)
        entry = Message.Peer(
            id=peer.peer_id.multihash, addrs=[Multiaddr("/ip4/127.0.0.1/tcp/1").to_bytes()]
        )
        for number in range(8):
            message = Message(
                type=Message.MessageType.ADD_PROVIDER, key=b"k%d" % number, providerPeers=[entry]
            )
            assert await send_and_drain(connection, KAD, framed(message.SerializeToString()))
        store = node.overlay._guest._dht.provider_store
        assert sorted(store.providers) == [b"k0", b"k1", b"k2"]


@pytest.mark.parametrize("protocol", ["/plaintext/2.0.0", "/tls/1.0.0", "/secio/1.0.0"])
async def test_nothing_but_noise(node: Node, protocol: str) -> None:
    addr = node.host.listen_addrs[0]
    reader, writer = await asyncio.open_connection(addr.host, addr.port)
    try:
        for line in ("/multistream/1.0.0", protocol):
            writer.write(framed(line.encode() + b"\n"))
        got = b""
        while b"na\n" not in got:
            chunk = await asyncio.wait_for(reader.read(100), 60)
            assert chunk, got
            got += chunk
        assert protocol.encode() not in got
    finally:
        writer.close()
        await writer.wait_closed()


async def test_libp2p_can_neither_listen_nor_upgrade(node: Node) -> None:
    from libp2p.network.exceptions import SwarmException
    from multiaddr import Multiaddr

    swarm = node.overlay._guest._swarm
    assert swarm.transport_manager.get_transports() == []
    assert swarm.listeners == {}
    assert not swarm.upgrader.security_multistream.transports
    for maddr in ("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"):
        assert swarm.transport_manager.transport_for_listening(Multiaddr(maddr)) is None

    async def listen() -> bool:
        return await swarm.listen(Multiaddr("/ip4/127.0.0.1/tcp/0"))

    assert await node.overlay._guest.call(listen) is False
    for upgrade in (
        lambda: swarm.upgrade_inbound_raw_conn(None, None),
        lambda: swarm.upgrade_outbound_raw_conn(None, None),
    ):
        with pytest.raises(SwarmException):
            await node.overlay._guest.call(upgrade)


async def test_known_peers_are_bounded_and_forgotten() -> None:
    limits = OverlayLimits(peers_sweep_s=0.1, peers_max=5)
    async with running_node(limits) as node:
        from libp2p.peer.id import ID
        from multiaddr import Multiaddr

        store = node.overlay._guest._host.get_peerstore()
        for _ in range(50):
            peer_id = ID(Key.generate().peer_id.multihash)
            store.add_addrs(peer_id, [Multiaddr("/ip4/127.0.0.1/tcp/1")], 3600)
        await until(lambda: len(store.peer_ids()) <= 6, "swept", timeout_s=10)
        assert node.overlay._guest._host.get_private_key() is not None
        # The record of disconnects that libp2p keeps for its auto-connector stays empty.
        async with plain_host() as passing:
            await passing.dial(node.host.listen_addrs)
        assert node.overlay._guest._swarm.auto_connector._recent_disconnects == {}


async def test_the_auto_connector_dials_nobody(node: Node) -> None:
    from libp2p.peer.id import ID
    from multiaddr import Multiaddr

    async with plain_host() as somebody:
        addr = Multiaddr(str(somebody.listen_addrs[0].with_peer(None)))
        store = node.overlay._guest._host.get_peerstore()
        store.add_addrs(ID(somebody.peer_id.multihash), [addr], 3600)

        async def connect() -> None:
            await node.overlay._guest._swarm.auto_connector.maybe_connect()

        await node.overlay._guest.call(connect)
        assert somebody.connections() == ()


def test_limits_are_documented() -> None:
    doc: Callable[[str], bool] = (OverlayLimits.__doc__ or "").__contains__
    assert [name for name in OverlayLimits.__dataclass_fields__ if not doc(f" {name}:")] == []


def test_addresses_of_relays_that_speak_another_protocol_are_not_dialled() -> None:
    from multiaddr import Multiaddr as LibAddr

    from wetware.overlay.libp2p._adapter import to_link_addr

    relay = Key.generate().peer_id
    direct = f"/ip4/192.0.2.1/tcp/4001/p2p/{relay}"
    assert str(to_link_addr(LibAddr(direct))) == direct
    assert to_link_addr(LibAddr(f"{direct}/p2p-circuit")) is None
