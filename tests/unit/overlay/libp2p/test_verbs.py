"""What the overlay does when everybody is honest: two nodes, each with libp2p."""

from __future__ import annotations

import pytest

import wetware
from wetware.base.access import Access
from wetware.errors import InvalidArgument
from wetware.overlay.libp2p import OverlayLimits, OverlayTimeout
from wetware.overlay.link import LinkHost

from .conftest import (
    ECHO,
    IDENTIFY,
    KAD,
    PING,
    Node,
    ThreadNode,
    adopted,
    answers_ping,
    identify,
    never_answers,
    running_node,
    until,
)

pytestmark = pytest.mark.anyio


def text(addr: bytes) -> str:
    from multiaddr import Multiaddr

    return str(Multiaddr(addr))


async def test_ping_and_identify_both_ways(node: Node, other: ThreadNode) -> None:
    there = other.node.host
    connection = await node.host.dial(there.listen_addrs)
    assert await answers_ping(connection)
    said = await identify(connection)
    # The link's own protocols are announced beside libp2p's.
    assert {ECHO, IDENTIFY, "/ipfs/id/push/1.0.0", PING, KAD} <= set(said.protocols)
    assert said.agent_version == f"wetware/{wetware.__version__}"
    assert [*map(text, said.listen_addrs)] == [str(there.listen_addrs[0].with_peer(None))]
    assert text(said.observed_addr) == str(connection.local.with_peer(None))

    me = node.host.peer_id
    assert await other.run(lambda n: answers_ping(n.host.connection(me)))
    back = await other.run(lambda n: identify(n.host.connection(me)))
    assert [*map(text, back.listen_addrs)] == [str(node.host.listen_addrs[0].with_peer(None))]


async def test_identify_announces_protocols_as_they_come_and_go(node: Node, peer: LinkHost) -> None:
    connection = await peer.dial(node.host.listen_addrs)

    async def serve(stream) -> None:
        await stream.read()

    remove = node.host.handle("/test/late/1", serve, access=Access.PUBLIC)
    assert "/test/late/1" in (await identify(connection)).protocols
    remove()
    assert "/test/late/1" not in (await identify(connection)).protocols


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
        connection = await node.host.dial(other.node.host.listen_addrs)
        assert KAD in (await identify(connection)).protocols
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


async def test_dht_verbs_have_a_time_limit(peer: LinkHost) -> None:
    async with running_node(OverlayLimits(dht_s=0.3)) as node:
        await never_answers(node, peer)
        with pytest.raises(OverlayTimeout, match=r"0\.3 s"):
            await node.overlay.find_providers(b"key")
        with pytest.raises(OverlayTimeout, match=r"0\.3 s"):
            await node.overlay.provide(b"key")
        assert node.overlay.status().restarts == 0


async def test_status(node: Node, peer: LinkHost) -> None:
    status = node.overlay.status()
    assert (status.state, status.restarts, status.last_error) == ("running", 0, None)
    assert (adopted(node), status.dht_peers) == (0, 0)
    await peer.dial(node.host.listen_addrs)
    await until(lambda: adopted(node) == 1, "one connection")
