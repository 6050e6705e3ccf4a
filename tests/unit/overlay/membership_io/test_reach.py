"""Which connections are kept, when they are dialled again, and what a discovery can cause."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from wetware.base.backoff import Backoff
from wetware.base.multiaddr import Multiaddr
from wetware.errors import AdmissionRefused, DialError, OverlayError
from wetware.hookspecs import PeerDown, PeerUp
from wetware.identity import Key, PeerId
from wetware.overlay.link import Connection, LinkHost
from wetware.overlay.membership import reach as reach_module
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.peers import PeerStore
from wetware.overlay.membership.reach import Reach, ReachLimits, ring_neighbours
from wetware.testing import tasks_of_core

pytestmark = pytest.mark.anyio

QUICK = ReachLimits(second_s=0.1, stable_s=0.05, dial_s=1.0, introduce_s=0.3, found_per_s=50.0)
QUICK_CONFIG = MembershipConfig(redial_s_min=0.02, redial_s_max=0.2)


class SystemClock:
    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


async def until(condition: Callable[[], object], deadline_s: float = 60.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.005)


class Introductions:
    """Everybody who is trusted is introduced as soon as it is connected."""

    def __init__(self, host: LinkHost, trusted: set[PeerId]) -> None:
        self.host, self.trusted = host, trusted
        self.up: set[PeerId] = set()
        self.refuse = True  # else it leaves the other end waiting
        self.callbacks: list[Callable[[PeerUp | PeerDown], None]] = []
        host.watch(self.on_up, self.on_down)

    def on_up(self, connection: Connection) -> None:
        # As the real ones: an exchange takes a moment.
        asyncio.get_running_loop().call_later(0.01, self.introduce, connection)

    def introduce(self, connection: Connection) -> None:
        peer = connection.peer
        if peer in self.trusted and peer not in self.up and not connection.closed:
            self.up.add(peer)
            for callback in self.callbacks:
                callback(PeerUp(peer))

    def on_down(self, connection: Connection) -> None:
        if self.host.connection(connection.peer) is None and connection.peer in self.up:
            self.up.discard(connection.peer)
            for callback in self.callbacks:
                callback(PeerDown(connection.peer))

    async def introduced(self, connection: Connection) -> None:
        while connection.peer not in self.up:
            if connection.closed:
                raise OverlayError("the connection ended")
            if connection.peer not in self.trusted and self.refuse:
                raise AdmissionRefused("it is no member")
            await asyncio.sleep(0.005)

    def peers(self) -> tuple[PeerId, ...]:
        return tuple(self.up)

    def watch(self, callback: Callable[[PeerUp | PeerDown], None]) -> Callable[[], None]:
        for peer in self.up:
            callback(PeerUp(peer))
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)


class Node:
    """A host with its reach, and a table of members that the test writes."""

    def __init__(
        self, host: LinkHost, store: PeerStore, config: MembershipConfig, limits: ReachLimits
    ) -> None:
        self.host, self.store = host, store
        self.trusted: set[PeerId] = set()
        self.states: dict[PeerId, str] = {}
        self.introductions = Introductions(host, self.trusted)
        self.reach = Reach(
            host,
            self.introductions,
            store,
            members=lambda: dict(self.states),
            config=config,
            clock=SystemClock(),
            limits=limits,
            rng=random.Random(7),
        )
        self.dials: list[tuple[Multiaddr, ...]] = []
        dial = host.dial

        async def counted(addrs, **how):
            self.dials.append(tuple(addrs))
            return await dial(addrs, **how)

        host.dial = counted  # type: ignore[method-assign]

    @property
    def peer(self) -> PeerId:
        return self.host.peer_id

    @property
    def addr(self) -> Multiaddr:
        return self.host.listen_addrs[0]

    def knows(self, other: Node, state: str = "alive", *, addr: Multiaddr | None = None) -> None:
        self.trusted.add(other.peer)
        self.states[other.peer] = state
        self.store.named(other.peer, [addr or other.addr])
        self.reach.changed()

    def is_up(self, other: Node) -> bool:
        return self.reach.connected(other.peer) is not None


class Net:
    until = staticmethod(until)

    def __init__(self, path: Path) -> None:
        self.path, self.stack = path, contextlib.AsyncExitStack()

    async def node(
        self,
        key: Key | None = None,
        limits: ReachLimits = QUICK,
        config: MembershipConfig = QUICK_CONFIG,
        *,
        run: bool = True,
        port: int = 0,
    ) -> Node:
        host = await self.stack.enter_async_context(LinkHost(key or Key.generate()))
        await host.listen([Multiaddr("ip4", "127.0.0.1", port)])
        store = PeerStore(self.path / f"{host.peer_id}.json", unix_ms=lambda: 1)
        node = Node(host, store, config, limits)
        if run:
            await self.start(node)
        return node

    async def start(self, node: Node) -> None:
        task = asyncio.ensure_future(node.reach.run())
        await until(lambda: node.reach._tasks)

        async def stop() -> None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        self.stack.push_async_callback(stop)


@pytest.fixture
async def net(anyio_backend: str, tmp_path: Path) -> AsyncIterator[Net]:
    network = Net(tmp_path)
    async with network.stack:
        yield network
    assert tasks_of_core() == []


def dead_addr() -> Multiaddr:
    """Where nobody listens: the discard port of a loopback address of our own."""
    return Multiaddr("ip4", "127.0.0.97", 9)


# --- plain functions ------------------------------------------------------------------------------


def test_pauses_double_with_jitter_up_to_the_longest_and_start_again() -> None:
    backoff = Backoff(0.5, 30.0, random.Random(1))
    pauses = [backoff.pause_s() for _ in range(12)]
    for step, pause in enumerate(pauses):
        ideal = min(30.0, 0.5 * 2**step)
        assert 0.75 * ideal <= pause <= 1.25 * ideal
    assert len({round(pause, 6) for pause in pauses[7:]}) > 1  # never in step
    backoff.reset()
    assert backoff.pause_s() <= 0.625
    for _ in range(5000):
        assert backoff.pause_s(stretch=10.0) <= 375.0
    assert backoff.pause_s(stretch=0.1) <= 37.5  # never shorter than promised


@pytest.mark.parametrize(("size", "count"), [(2, 16), (17, 16), (18, 16), (100, 16), (40, 2)])
def test_ring_neighbours_choose_each_other(size: int, count: int) -> None:
    peers = [PeerId(f"12D3KooW{number:044d}") for number in range(size)]
    chosen = {peer: ring_neighbours(peer, peers, count) for peer in peers}
    for peer, neighbours in chosen.items():
        assert peer not in neighbours
        assert len(neighbours) == min(count, size - 1)
        assert all(peer in chosen[other] for other in neighbours)
    # and the ring is one piece
    seen, todo = {peers[0]}, [peers[0]]
    while todo:
        for other in chosen[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    assert seen == set(peers)


# --- members --------------------------------------------------------------------------------------


async def test_two_members_connect_once(net: Net) -> None:
    first, second = await net.node(), await net.node()
    first.knows(second)
    second.knows(first)
    await until(lambda: first.is_up(second) and second.is_up(first))
    small, large = sorted((first, second), key=lambda node: node.peer)
    assert len(small.dials) == 1
    assert large.dials == []  # the smaller one had its head start
    assert len(first.host.connections()) == 1
    assert small.store.addrs(large.peer)[0] == large.addr


async def test_the_larger_peer_dials_too_if_the_smaller_one_cannot(net: Net) -> None:
    first, second = await net.node(), await net.node()
    small, large = sorted((first, second), key=lambda node: node.peer)
    small.knows(large, addr=dead_addr())
    large.knows(small)
    await until(lambda: small.is_up(large) and large.is_up(small))
    assert len(large.dials) == 1


async def test_a_patient_caller_lets_the_other_end_dial_if_it_is_its_turn(net: Net) -> None:
    limits = replace(QUICK, second_s=5.0, patience_s=2.0)
    nodes = [await net.node(limits=limits) for _ in range(2)]
    small, large = sorted(nodes, key=lambda node: node.peer)
    large.knows(small)
    await until(lambda: small.peer in large.reach._targets)
    waiting = asyncio.ensure_future(large.reach.connect(small.peer, patient=True))
    await until(lambda: small.peer in large.reach._attempts)
    small.knows(large)
    assert (await waiting).initiator is False
    assert large.dials == []
    # and does not wait for ever
    other = await net.node(run=False)
    large.knows(other)
    await until(lambda: other.peer in large.reach._targets)
    large.reach._targets[other.peer].others_until = large.reach.now() + 5.0
    large.reach._targets[other.peer].due = large.reach.now() + 5.0
    large.reach.limits = replace(limits, patience_s=0.05)
    assert (await large.reach.connect(other.peer, patient=True)).initiator


async def test_a_lost_connection_comes_back(net: Net) -> None:
    first, second = await net.node(), await net.node()
    first.knows(second)
    second.knows(first)
    for _ in range(3):
        await until(lambda: first.is_up(second) and second.is_up(first))
        lost = first.host.connections()
        for connection in lost:
            connection.close()
        await asyncio.gather(*(connection.wait_closed() for connection in lost))
        await until(lambda lost=lost: not set(lost) & set(first.host.connections()))
    await until(lambda: first.is_up(second) and second.is_up(first))


async def test_an_unreachable_member_is_tried_less_and_less_and_logged_once(
    net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    node, gone = await net.node(), await net.node(run=False)
    with caplog.at_level(logging.INFO, "wetware.membership"):
        node.knows(gone, addr=dead_addr())
        loop = asyncio.get_running_loop()
        started = loop.time()
        await until(lambda: len(node.dials) >= 6)
        # 0.02 + 0.04 + 0.08 + 0.16 + 0.2 s of pauses, less the jitter
        assert loop.time() - started > 0.5 * 0.75
    lines = [record for record in caplog.records if record.getMessage() == "peer.unreachable"]
    assert len(lines) == 1
    node.store.named(gone.peer, [gone.addr])  # its record says where it is now
    node.reach.moved(gone.peer)
    await until(lambda: node.is_up(gone))


async def test_in_another_network_everybody_is_tried_at_once(net: Net) -> None:
    patient = MembershipConfig(redial_s_min=30.0, redial_s_max=60.0)
    key = Key.generate()
    node, other = await net.node(config=patient), await net.node(run=False, key=key)
    port = other.addr.port
    node.knows(other)
    await until(lambda: node.is_up(other))
    await other.host.aclose()
    await until(lambda: not node.is_up(other))
    other = await net.node(run=False, key=key, port=port)
    target = node.reach._targets[other.peer]
    assert target.due > node.reach.now() + 20
    node.reach.network_changed()
    await until(lambda: node.is_up(other))
    (connection,) = node.host.connections()
    connection.close()  # the probe of one that was dead has just ended
    await until(lambda: node.is_up(other) and connection not in node.host.connections())


async def test_a_member_behind_a_lost_address_is_dialled_before_its_connection_ends(
    net: Net,
) -> None:
    node, other = await net.node(), await net.node(run=False)
    node.knows(other)
    await until(lambda: node.is_up(other))
    (old,) = node.host.connections()
    old.local = Multiaddr("ip4", "10.0.0.1", 1)
    node.host.network_changed(frozenset(("127.0.0.1",)))
    node.reach.network_changed()
    await until(lambda: node.is_up(other))
    assert node.host.connection(other.peer) is not old


async def test_a_dead_member_is_tried_and_one_that_left_is_not(net: Net) -> None:
    node, dead, left = [await net.node(run=number == 0) for number in range(3)]
    node.knows(dead, "dead")
    node.knows(left, "left")
    await until(lambda: node.is_up(dead))
    assert not any(left.addr in addrs for addrs in node.dials)
    assert not node.reach.wants(dead.peer)


async def test_the_store_alone_leads_back_into_the_cluster(net: Net) -> None:
    node, old = await net.node(run=False), await net.node(run=False)
    node.trusted.add(old.peer)
    node.store.worked(old.peer, old.addr)
    await net.start(node)
    await until(lambda: node.is_up(old))


async def test_a_node_that_was_forgotten_is_not_dialled(net: Net) -> None:
    node, evicted = await net.node(), await net.node(run=False)
    node.knows(evicted, addr=dead_addr())
    await until(lambda: node.dials)
    del node.states[evicted.peer]
    node.store.forget(evicted.peer)
    node.reach.forget(evicted.peer)
    await until(lambda: not node.reach._targets and not node.reach._attempts)
    count = len(node.dials)
    await asyncio.sleep(0.3)  # longer than the longest pause
    assert len(node.dials) == count


async def test_a_large_cluster_keeps_neighbours_and_dials_the_others_on_demand(net: Net) -> None:
    config = replace(QUICK_CONFIG, full_mesh_max=4, neighbours=2)
    nodes = [await net.node(limits=ReachLimits(second_s=0.05), config=config) for _ in range(7)]
    for node in nodes:
        for other in nodes:
            if other is not node:
                node.knows(other)
    wanted = {
        node.peer: ring_neighbours(node.peer, [other.peer for other in nodes], 2) for node in nodes
    }
    for node in nodes:
        await until(lambda node=node: set(node.introductions.peers()) == wanted[node.peer])
    first = nodes[0]
    far = next(node for node in nodes[1:] if node.peer not in wanted[first.peer])
    connection = await first.reach.connect(far.peer)
    assert connection.peer == far.peer
    assert first.reach.connected(far.peer) is connection
    assert not first.reach.wants(far.peer)


async def test_connections_on_demand_are_bounded_and_the_least_used_goes(net: Net) -> None:
    config = replace(QUICK_CONFIG, full_mesh_max=1, neighbours=1, redial_s_max=0.1)
    node = await net.node(limits=ReachLimits(on_demand_max=2), config=config)
    others = [await net.node(run=False) for _ in range(6)]
    for other in others:
        node.knows(other)
    await until(lambda: node.reach.wants(max(o.peer for o in others)) or node.reach._wanted)
    extra = [other for other in others if not node.reach.wants(other.peer)]
    for other in extra:
        await node.reach.connect(other.peer)
    await until(lambda: sum(node.is_up(other) for other in extra) <= 2)
    await until(lambda: sum(map(node.is_up, others)) >= 3)


async def test_callers_share_one_dial(net: Net) -> None:
    node, other = await net.node(), await net.node(run=False)
    node.trusted.add(other.peer)
    node.store.named(other.peer, [other.addr])
    found = await asyncio.gather(*(node.reach.connect(other.peer) for _ in range(20)))
    assert len(set(found)) == 1
    assert len(node.dials) == 1


async def test_a_dial_on_demand_says_why_it_failed(net: Net) -> None:
    node, nobody = await net.node(), Key.generate().peer_id
    with pytest.raises(DialError, match="no address"):
        await node.reach.connect(nobody)
    stranger = await net.node(run=False)
    node.store.named(stranger.peer, [stranger.addr])
    for refuse, why in ((True, "no member"), (False, "introduce itself in time")):
        node.introductions.refuse = refuse
        with pytest.raises(DialError, match=why):
            await node.reach.connect(stranger.peer)
        await until(lambda: not node.host.connections())  # not kept
    assert node.reach._attempts == {}


async def test_waiting_for_a_dial_can_be_cancelled_and_stopped(net: Net) -> None:
    node, hung = await net.node(run=False), Key.generate().peer_id
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    node.store.named(hung, [Multiaddr("ip4", "127.0.0.1", server.sockets[0].getsockname()[1])])
    run = asyncio.ensure_future(node.reach.run())
    await until(lambda: node.reach._tasks)
    with pytest.raises(DialError, match="in time"):
        await node.reach.connect(hung, timeout_s=0.05)
    waiting = asyncio.ensure_future(node.reach.connect(hung))
    await asyncio.sleep(0)
    run.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await run
    with pytest.raises(DialError):
        await waiting
    with pytest.raises(DialError, match="stopping"):
        await node.reach.connect(hung)
    server.close()


# --- bootstrap ------------------------------------------------------------------------------------


async def test_a_bootstrap_address_is_tried_until_it_answers(net: Net) -> None:
    node = await net.node()
    key = Key.generate()
    probe = await net.node(run=False)
    port = probe.addr.port
    await probe.host.aclose()  # the port is free again
    node.trusted.add(key.peer_id)
    node.reach.bootstrap([Multiaddr("ip4", "127.0.0.1", port)])  # no peer ID: whoever it is
    await until(lambda: len(node.dials) >= 2)
    late = await net.node(key, run=False, port=port)
    await until(lambda: node.is_up(late))
    count = len(node.dials)
    node.knows(late)
    await asyncio.sleep(0.3)
    assert len(node.dials) == count  # it is known now


async def test_an_own_address_among_the_bootstraps_is_dropped(net: Net) -> None:
    node = await net.node()
    node.reach.bootstrap([node.addr.with_peer(None)])
    await until(lambda: node.dials and not node.reach._bootstraps)


async def test_bootstraps_are_bounded(net: Net) -> None:
    node = await net.node(limits=ReachLimits(bootstraps_max=3), run=False)
    node.reach.bootstrap(Multiaddr("ip4", "127.0.0.1", port) for port in (1, 1, 2, 3, 4))
    assert len(node.reach._bootstraps) == 3


# --- discovery ------------------------------------------------------------------------------------


async def test_a_discovered_member_is_kept(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    node, other = await net.node(), await net.node(run=False)
    node.trusted.add(other.peer)
    with caplog.at_level(logging.INFO, "wetware.membership"):
        node.reach.found(str(other.addr), "mdns")
        await until(lambda: node.is_up(other))
        await until(lambda: any(r.getMessage() == "peer.found" for r in caplog.records))
    assert node.store.addrs(other.peer) == (other.addr,)


async def test_a_discovered_stranger_is_dropped_and_remembered(net: Net) -> None:
    node, stranger = await net.node(), await net.node(run=False)
    node.reach.found(str(stranger.addr), "mdns")
    await until(lambda: ("mdns", stranger.peer) in node.reach._strangers)
    await until(lambda: not node.host.connections())
    for _ in range(100):
        node.reach.found(stranger.addr, "mdns")
    assert not any(node.reach._found.values())
    assert len(node.dials) == 1
    # It became a member meanwhile, and gossip says so.
    node.knows(stranger)
    await until(lambda: node.is_up(stranger))
    assert len(node.reach._strangers) == 0


async def test_junk_from_a_discovery_is_ignored(net: Net) -> None:
    node = await net.node()
    for junk in ("", "/ip4/1.2.3.4", "/ip4/127.0.0.1/tcp/1", "x" * 100_000, str(node.addr)):
        node.reach.found(junk, "dht")
    assert not node.reach._found
    assert node.dials == []


async def test_a_flood_of_discovered_addresses_is_bounded(net: Net) -> None:
    limits = ReachLimits(found_max=8, found_burst=2, found_per_s=0.001, strangers_max=4)
    node = await net.node(limits=limits)
    for number in range(200):
        peer = PeerId(f"12D3KooW{number:044d}")
        node.reach.found(Multiaddr("ip4", "127.0.0.97", 9, peer), "mdns")
        assert len(node.reach._found["mdns"]) <= 8
    await until(lambda: len(node.reach._strangers) == 2)
    assert len(node.dials) == 2


async def test_a_flood_from_one_source_does_not_push_out_what_another_finds(net: Net) -> None:
    limits = ReachLimits(found_max=8, found_burst=2, found_per_s=0.001)
    node, member = await net.node(limits=limits, run=False), await net.node(run=False)
    node.trusted.add(member.peer)
    node.reach.found(member.addr, "dht")
    for number in range(200):
        peer = PeerId(f"12D3KooW{number:044d}")
        node.reach.found(Multiaddr("ip4", "127.0.0.97", 9, peer), "mdns")
    await net.start(node)
    await until(lambda: node.is_up(member))  # one of the two that may be tried


async def test_a_false_address_from_one_source_does_not_stand_for_another_s(net: Net) -> None:
    node, member = await net.node(), await net.node(run=False)
    node.trusted.add(member.peer)
    node.reach.found(dead_addr().with_peer(member.peer), "mdns")
    await until(lambda: ("mdns", member.peer) in node.reach._strangers)
    node.reach.found(member.addr, "dht")
    await until(lambda: node.is_up(member))


async def test_a_hint_for_a_known_member_is_tried_beside_its_own_addresses(net: Net) -> None:
    node, moved = await net.node(), await net.node(run=False)
    node.knows(moved, "dead", addr=dead_addr())
    await until(lambda: node.dials)
    node.reach.found(moved.addr, "mdns")
    await until(lambda: node.is_up(moved))
    for number in range(100):
        other = PeerId(f"12D3KooW{number:044d}")
        node.states[other] = "dead"
        node.store.named(other, [dead_addr()])
        node.reach.changed()
    await until(lambda: len(node.reach._targets) > 100)
    for port in range(1, 50):
        node.reach.found(Multiaddr("ip4", "127.0.0.97", port, other), "mdns")
    assert len(node.store.addrs(other)) == 1 + 4
    told = Multiaddr("ip4", "127.0.0.96", 9, other)
    node.reach.found(told, "dht")
    for port in range(51, 60):
        node.reach.found(Multiaddr("ip4", "127.0.0.97", port, other), "mdns")
    assert told in node.store.addrs(other)
    assert len(node.store.addrs(other)) == 1 + 1 + 4


async def test_a_member_that_left_is_found_where_it_is_announced(net: Net) -> None:
    node, back = await net.node(), await net.node(run=False)
    node.knows(back, "left", addr=dead_addr())
    await until(lambda: not node.reach._dirty)
    node.reach.found(back.addr, "mdns")
    await until(lambda: node.is_up(back))


async def test_the_lost_are_not_in_the_way_of_the_living(net: Net) -> None:
    node = await net.node(
        limits=replace(QUICK, dial_s=30.0),
        config=replace(QUICK_CONFIG, dials_max=2),
        run=False,
    )
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    hung = Multiaddr("ip4", "127.0.0.1", server.sockets[0].getsockname()[1])
    for number in range(20):
        node.store.named(PeerId(f"12D3KooW{number:044d}"), [hung])
    await net.start(node)
    await until(lambda: node.dials)
    alive = await net.node(run=False)
    node.knows(alive)
    await until(lambda: node.is_up(alive))
    await until(lambda: len(node.reach._attempts) == 1)
    server.close()


async def test_stopping_leaves_nothing_behind(net: Net) -> None:
    node = await net.node(run=False)
    for number in range(50):
        node.store.named(PeerId(f"12D3KooW{number:044d}"), [dead_addr()])
    run = asyncio.ensure_future(node.reach.run())
    await until(lambda: node.dials)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert node.introductions.callbacks == []


async def test_a_member_that_names_new_addresses_all_the_time_is_tried_no_more_often(
    net: Net,
) -> None:
    """They may be somebody else's."""
    patient = MembershipConfig(redial_s_min=30.0, redial_s_max=60.0)
    node, gone = await net.node(config=patient), await net.node(run=False)
    node.knows(gone, addr=dead_addr())
    await until(lambda: node.dials and not node.reach._attempts)
    before = len(node.dials)
    for port in range(10, 30):
        node.store.named(gone.peer, [replace(dead_addr(), port=port)])
        target = node.reach._targets[gone.peer]
        node.reach.moved(gone.peer)
        if target.due < node.reach.now() + 5.0:
            await until(lambda target=target: target.due > node.reach.now() + 5.0)
    assert 1 <= len(node.dials) - before <= reach_module.MOVES_BURST


async def test_all_addresses_of_a_relay_that_is_not_connected_are_tried(net: Net) -> None:
    node, hub, other = [await net.node(run=False) for _ in range(3)]
    named = [
        Multiaddr("ip6", "2001:db8::1", 4001, hub.peer).through(other.peer),
        Multiaddr("ip4", "203.0.113.1", 4001, hub.peer).through(other.peer),
    ]
    node.store.named(other.peer, named)
    assert node.reach._addrs(other.peer) == named
    node.reach._up.add(hub.peer)
    assert node.reach._addrs(other.peer) == named[:1]
