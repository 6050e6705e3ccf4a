"""What the overlay does when everybody is honest: two nodes, each with libp2p."""

from __future__ import annotations

import pytest

from wetware.base.access import Access
from wetware.errors import DialError, InvalidArgument
from wetware.identity import Key
from wetware.overlay.libp2p import OverlayLimits, OverlayTimeout
from wetware.overlay.link import LinkHost

from .conftest import ECHO, Node, ThreadNode, plain_host, running_node, until

pytestmark = pytest.mark.anyio


async def test_ping_and_identify_both_ways(node: Node, other: ThreadNode) -> None:
    there = other.node.host
    connection = await node.host.dial(there.listen_addrs)
    assert 0 < await node.overlay.ping(there.peer_id) < 5
    report = await node.overlay.identify(there.peer_id)
    assert report.peer == there.peer_id
    # The link's own protocols are announced beside libp2p's.
    assert {ECHO, "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"} <= set(
        report.protocols
    )
    assert "/ipfs/kad/1.0.0" in report.protocols
    assert report.agent.startswith("py-libp2p/")
    assert report.addrs == (str(there.listen_addrs[0].with_peer(None)),)
    assert report.observed == str(connection.local.with_peer(None))

    me = node.host.peer_id
    assert 0 < await other.run(lambda n: n.overlay.ping(me)) < 5
    back = await other.run(lambda n: n.overlay.identify(me))
    assert back.addrs == (str(node.host.listen_addrs[0].with_peer(None)),)


async def test_identify_announces_protocols_as_they_come_and_go(
    node: Node, other: ThreadNode
) -> None:
    await node.host.dial(other.node.host.listen_addrs)
    me = node.host.peer_id

    async def serve(stream) -> None:
        await stream.read()

    remove = node.host.handle("/test/late/1", serve, access=Access.PUBLIC)
    assert "/test/late/1" in (await other.run(lambda n: n.overlay.identify(me))).protocols
    remove()
    assert "/test/late/1" not in (await other.run(lambda n: n.overlay.identify(me))).protocols


async def test_provide_and_find(node: Node, other: ThreadNode) -> None:
    key = b"\x12\x20" + bytes(range(32))
    assert await node.overlay.find_providers(key) == ()
    assert await node.overlay.provide(key) is False  # nobody to tell yet
    await node.host.dial(other.node.host.listen_addrs)
    await until(lambda: node.overlay.status().dht_peers == 1, "identify filled the table")
    assert await node.overlay.provide(key) is True
    (provider,) = await other.run(lambda n: n.overlay.find_providers(key))
    assert provider.peer == node.host.peer_id
    assert provider.addrs == node.host.listen_addrs
    # The other way round, and over the network: the finder holds no record of its own.
    other_key = b"\x12\x20" + bytes(range(1, 33))
    assert await other.run(lambda n: n.overlay.provide(other_key)) is True
    await node.crash()  # its store is empty again
    await until(lambda: node.overlay.status().dht_peers == 1, "the table is full again")
    (found,) = await node.overlay.find_providers(other_key)
    assert found.peer == other.node.host.peer_id
    assert await node.overlay.find_providers(b"unknown") == ()


async def test_three_nodes_through_the_middle(node: Node) -> None:
    """A provider is found through a node that both know; libp2p dials with the link."""
    import asyncio

    from .conftest import ThreadNode as Thread

    middle, far = await asyncio.gather(*(asyncio.to_thread(Thread) for _ in range(2)))
    try:
        addrs = middle.node.host.listen_addrs
        await node.host.dial(addrs)
        await far.run(lambda n: n.host.dial(addrs))
        await until(
            lambda: (
                [n.overlay.status().dht_peers for n in (middle.node, node, far.node)] == [2, 1, 1]
            ),
            "the tables are full",
        )
        key = b"through the middle"
        assert await far.run(lambda n: n.overlay.provide(key)) is True
        providers = await node.overlay.find_providers(key)
        assert [p.peer for p in providers] == [far.node.host.peer_id]
        assert providers[0].addrs == far.node.host.listen_addrs
        connection = await node.host.dial(providers[0].addrs)
        assert connection.peer == far.node.host.peer_id
    finally:
        await asyncio.gather(middle.aclose(), far.aclose())


async def test_a_record_of_ones_own_does_not_end_a_lookup(node: Node, other: ThreadNode) -> None:
    """As when every node announces the key of the cluster before it has met anybody."""
    import asyncio

    from .conftest import ThreadNode as Thread

    key = b"what all of them provide"
    far = await asyncio.to_thread(Thread)
    try:
        addrs = other.node.host.listen_addrs
        await far.run(lambda n: n.host.dial(addrs))
        await until(lambda: far.node.overlay.status().dht_peers == 1, "far's table is full")
        assert await far.run(lambda n: n.overlay.provide(key)) is True
        assert await node.overlay.provide(key) is False, "nobody to tell yet"
        await node.host.dial(addrs)
        await until(lambda: node.overlay.status().dht_peers == 1, "the table is full")
        found = await node.overlay.find_providers(key)
        assert [p.peer for p in found] == [far.node.host.peer_id]
    finally:
        await far.aclose()


async def test_strangers_are_not_in_the_table(other: ThreadNode) -> None:
    def admit(peer: str, protocol: str, access: Access) -> bool:
        return access is Access.PUBLIC

    async with running_node(admit=admit) as node:
        await node.host.dial(other.node.host.listen_addrs)
        assert "/ipfs/kad/1.0.0" in (await node.overlay.identify(other.node.host.peer_id)).protocols
        guest = node.overlay._guest
        await until(lambda: bool(guest._host._network.connections), "libp2p has the connection")
        assert node.overlay.status().dht_peers == 0
        assert await node.overlay.provide(b"key") is False


async def test_bad_arguments(node: Node, peer: LinkHost) -> None:
    for key in (b"", b"x" * 81):
        with pytest.raises(InvalidArgument, match="1 to 80 bytes"):
            await node.overlay.provide(key)
        with pytest.raises(InvalidArgument, match="1 to 80 bytes"):
            await node.overlay.find_providers(key)
    stranger = Key.generate().peer_id
    for verb in (node.overlay.ping, node.overlay.identify):
        with pytest.raises(DialError, match="not connected"):
            await verb(stranger)


async def test_dht_verbs_have_a_time_limit() -> None:
    async def never(stream) -> None:
        await stream.read_exactly(1 << 20)
        await stream.read_exactly(1 << 20)

    async with running_node(OverlayLimits(dht_s=0.3)) as node, plain_host() as silent:
        from libp2p.peer.id import ID
        from multiaddr import Multiaddr

        silent.handle("/ipfs/kad/1.0.0", never, access=Access.PUBLIC)
        await node.host.dial(silent.listen_addrs)
        guest, peer_id = node.overlay._guest, ID(silent.peer_id.multihash)
        addr = Multiaddr(str(silent.listen_addrs[0].with_peer(None)))
        guest._host.get_peerstore().add_addrs(peer_id, [addr], 3600)
        await guest.call(lambda: guest._dht.add_peer(peer_id))
        assert node.overlay.status().dht_peers == 1
        with pytest.raises(OverlayTimeout, match=r"0\.3 s"):
            await node.overlay.find_providers(b"key")
        with pytest.raises(OverlayTimeout, match=r"0\.3 s"):
            await node.overlay.provide(b"key")
        assert node.overlay.status().restarts == 0


async def test_status(node: Node, peer: LinkHost) -> None:
    status = node.overlay.status()
    assert (status.state, status.restarts, status.last_error) == ("running", 0, None)
    assert (status.connections, status.dht_peers) == (0, 0)
    await peer.dial(node.host.listen_addrs)
    await until(lambda: node.overlay.status().connections == 1, "one connection")
