"""Members that cannot dial each other: they meet through others, and move to what is better."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace
from typing import Any

import pytest

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.errors import OverlayError
from wetware.identity import Key, PeerId
from wetware.overlay import relay as relay_module
from wetware.overlay.link import Connection, Stream
from wetware.overlay.membership import direct
from wetware.overlay.membership import reach as reach_module
from wetware.overlay.membership.reach import ReachLimits

pytestmark = pytest.mark.anyio

NOWHERE = (Multiaddr("ip4", "127.0.0.1", 9),)
"""What a node behind a NAT says of itself: an address that leads nobody to it."""
ECHO = "/echo"


def between(one: Any, other: Any) -> Connection | None:
    found: Connection | None = one.host.connection(other.peer)
    return found


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def hidden(net: Any, *hubs: Any) -> Any:
    node = await net.node()
    node.announced = NOWHERE
    await node.start(*(hub.addr for hub in hubs))
    node.host.handle(ECHO, echo, access=Access.MEMBER)
    return node


async def test_two_members_behind_nats_are_connected_through_the_third(net: Any) -> None:
    [hub] = await net.cluster(1)
    home, cafe = await hidden(net, hub), await hidden(net, hub)
    loop = asyncio.get_running_loop()
    started = loop.time()
    await net.until(lambda: home.is_up(cafe) and cafe.is_up(home))
    assert loop.time() - started < 2.0
    for one, other in ((home, cafe), (cafe, home)):
        connection = between(one, other)
        assert connection is not None
        assert connection.tunnelled
        assert connection.remote.relay == hub.peer
        assert await one.membership.ping(other.peer) > 0
        assert other.peer not in one.membership.swim._table.nodes or one.sees(other)
    # Where the relay is, nobody takes for where the peer is.
    assert all(addr.relay is None for addr in home.membership._store.addrs(cafe.peer))
    async with await home.host.open_stream(cafe.peer, ECHO) as stream:
        await stream.write(b"hello")
        assert await stream.read_exactly(5) == b"hello"


async def test_a_relay_that_could_not_yet_is_asked_again_while_a_direct_dial_hangs(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the peer has just come to the relay, and is behind a NAT that drops."""

    def way(self: relay_module.Relay, stream: Stream, target: PeerId) -> Connection | None:
        asked.append(target)
        return None if asked.count(target) == 1 else as_ever(self, stream, target)

    asked: list[PeerId] = []
    as_ever = relay_module.Relay._way
    monkeypatch.setattr(relay_module.Relay, "_way", way)
    [hub] = await net.cluster(1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        nodes = []
        for _ in range(2):
            node = await net.node()
            node.announced = (Multiaddr("ip4", "127.0.0.1", mute.getsockname()[1]),)
            nodes.append(await node.start(hub.addr, reach=ReachLimits(second_s=0.2, dial_s=10.0)))
        home, cafe = nodes
        started = time.monotonic()
        await net.until(lambda: home.is_up(cafe) and cafe.is_up(home))
        assert between(home, cafe).tunnelled
        assert time.monotonic() - started < 4.0
    assert len(asked) <= 6


async def test_another_relay_takes_over(net: Any) -> None:
    hubs = await net.cluster(2)
    home, cafe = await hidden(net, *hubs), await hidden(net, *hubs)
    await net.until(lambda: home.is_up(cafe) and cafe.is_up(home))
    await net.converged(*hubs, home, cafe)
    relay = between(home, cafe).remote.relay
    gone = next(hub for hub in hubs if hub.peer == relay)
    other = next(hub for hub in hubs if hub is not gone)
    stream = await home.host.open_stream(cafe.peer, ECHO)
    loop = asyncio.get_running_loop()
    started = loop.time()
    await gone.kill()
    await net.until(
        lambda: (
            (now := between(home, cafe)) is not None
            and now.remote.relay == other.peer
            and home.is_up(cafe)
            and cafe.is_up(home)
        )
    )
    assert loop.time() - started < 3.0
    with pytest.raises(Exception, match="ended"):  # whose bytes it carried is told
        await stream.read_exactly(1)
    assert await home.membership.ping(cafe.peer) > 0


@pytest.mark.parametrize("cuts", [False, True])
async def test_a_relay_that_holds_or_cuts_what_it_carries_comes_last_from_then_on(
    net: Any, monkeypatch: pytest.MonkeyPatch, cuts: bool
) -> None:
    """However near it is, and though it carries each new connection at first."""
    monkeypatch.setattr(direct, "BETTER_S", 0.2)
    monkeypatch.setattr(direct, "BETTER_GAIN_S", 0.3)  # none is, until the test says so

    async def splice(left: Stream, right: Stream, pace: Any) -> None:
        carried.append((left, right))
        await as_ever(left, right, pace)

    carried: list[tuple[Stream, Stream]] = []
    as_ever = relay_module.splice
    monkeypatch.setattr(relay_module, "splice", splice)
    hubs = await net.cluster(2)
    home, cafe = await hidden(net, *hubs), await hidden(net, *hubs)
    await net.until(lambda: home.is_up(cafe) and cafe.is_up(home))
    await net.converged(*hubs, home, cafe)
    present = between(home, cafe).remote.relay
    liar, other = sorted(hubs, key=lambda hub: hub.peer != present)
    for one in (home, cafe):
        between(one, liar)._session.rtt_s = 0.0001
        between(one, other)._session.rtt_s = 0.02
    for streams in carried:
        for stream in streams:
            if stream.connection in liar.host.connections():
                stream.detach()
                if cuts:
                    stream.reset()
    held = []
    for one, far, within_s in ((home, cafe, 0.3), (cafe, home, 0.5)):  # not at the same time
        for each in one.host.connections():
            if each.peer == far.peer and each.remote.relay == liar.peer:
                held.append(each)
                if not cuts:
                    each.probe(within_s)
    await net.until(
        lambda: all(each.closed for each in held) and home.is_up(cafe) and cafe.is_up(home)
    )
    assert between(home, cafe).remote.relay == other.peer
    for one, far in ((home, cafe), (cafe, home)):
        between(one, far)._session.rtt_s = 0.5
    await asyncio.sleep(0.7)
    assert between(home, cafe).remote.relay == other.peer, "nor is it a better one"
    assert await home.membership.ping(cafe.peer) > 0


async def test_a_relay_is_not_blamed_for_what_a_move_of_this_node_ended(net: Any) -> None:
    """Nor for what it did in the network before: else the nearest one came last after each move."""
    [hub] = await net.cluster(1)
    home, cafe = await hidden(net, hub), await hidden(net, hub)
    reach, pair = home.membership.reach, (hub.peer, cafe.peer)

    async def lost() -> None:
        """The connection to the relay, and what it carries."""
        await net.until(lambda: home.is_up(hub) and home.is_up(cafe) and cafe.is_up(home))
        relayed = between(home, cafe)
        assert relayed.remote.relay == hub.peer
        between(home, hub).abort(OverlayError("the address is gone", code="overlay.closed"))
        await net.until(lambda: relayed.closed)
        assert relayed.error.code == "overlay.carrier"

    await lost()
    assert pair in reach._failed_relays
    home.membership.network_changed()
    assert pair not in reach._failed_relays
    await lost()
    assert pair not in reach._failed_relays


async def test_a_relayed_pair_moves_to_a_better_relay(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "BETTER_S", 0.2)
    monkeypatch.setattr(direct, "BETTER_GAIN_S", 0.2)  # what is measured under load differs by less
    hubs = await net.cluster(2)
    home, cafe = await hidden(net, *hubs), await hidden(net, *hubs)
    await net.until(lambda: home.is_up(cafe) and cafe.is_up(home))
    await net.converged(*hubs, home, cafe)
    first = between(home, cafe)
    assert first.remote.relay == between(cafe, home).remote.relay
    await asyncio.sleep(0.5)
    assert between(home, cafe) is first, "none is much better"
    stream = await first.open_stream(ECHO)
    for one, other in ((home, cafe), (cafe, home)):
        between(one, other)._session.rtt_s = 0.5
    await net.until(
        lambda: all(
            between(one, other).remote.relay != first.remote.relay
            for one, other in ((home, cafe), (cafe, home))
        )
    )
    second = between(home, cafe)
    assert second.tunnelled
    await stream.write(b"goes on")
    assert await stream.read_exactly(7) == b"goes on"
    stream.finish()
    await net.until(lambda: first.closed or not first.streams)
    assert between(home, cafe) is second, "and no more is looked for"
    for one, other in ((home, cafe), (cafe, home)):
        assert not between(one, other).superseded
        assert one.sees(other)
        assert await one.membership.ping(other.peer) < 0.5


async def test_a_relayed_pair_moves_to_a_direct_connection(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "AGAIN_S_MIN", 0.2)
    [hub] = await net.cluster(1)
    home, cafe = await hidden(net, hub), await hidden(net, hub)
    await net.until(lambda: home.is_up(cafe) and cafe.is_up(home))
    relayed = between(home, cafe)
    assert relayed.tunnelled
    stream = await relayed.open_stream(ECHO)
    # A port is forwarded now, and the record says so.
    cafe.announced = tuple(cafe.host.listen_addrs)
    cafe.membership.refresh()
    await net.until(lambda: not between(home, cafe).tunnelled)
    await stream.write(b"goes on")
    assert await stream.read_exactly(7) == b"goes on"
    stream.finish()
    # Membership itself does not hold on to the relay.
    await net.until(
        lambda: all(
            not stream.connection.tunnelled
            for outlet in home.membership.courier._outlets.values()
            if (stream := outlet.stream) is not None
        )
    )
    assert home.sees(cafe)
    assert cafe.sees(home)
    await asyncio.sleep(0.5)
    assert relayed.closed or not relayed.streams


async def test_a_member_that_only_the_dead_relay_reached_dies_as_any_other(net: Any) -> None:
    [hub] = await net.cluster(1)
    home, cafe = await hidden(net, hub), await hidden(net, hub)
    # Who has just been connected to may not be known as a member yet.
    await net.until(lambda: home.is_up(cafe) and home.sees(cafe) and cafe.sees(home))
    await hub.kill()
    await net.until(lambda: home.sees(cafe, state="dead") and cafe.sees(home, state="dead"))


async def test_a_hidden_node_of_a_large_cluster_keeps_relays(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Multiaddr, "is_global", property(lambda addr: addr.relay is None and addr.port != 9)
    )
    monkeypatch.setattr(reach_module, "RELAYS_AGAIN_S", 0.2)
    small = replace(net.config, full_mesh_max=2, neighbours=2)
    hubs = await net.cluster(2, config=small)
    others = [await net.node() for _ in range(4)]
    for node in others:
        node.announced = NOWHERE
        await node.start(*(hub.addr for hub in hubs), config=small)
    await net.converged(*hubs, *others)
    for node in others:
        await net.until(
            lambda node=node: all(
                node.is_up(hub) and node.membership.reach.wants(hub.peer) for hub in hubs
            )
        )
    # And so any two meet, whoever their neighbours are.
    for one in others:
        for other in others:
            if one is not other:
                assert await one.membership.ping(other.peer) > 0


async def test_a_node_without_a_public_address_is_carried_to(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Multiaddr, "is_global", property(lambda addr: addr.relay is None and addr.port != 9)
    )
    hubs = await net.cluster(3)
    home = await hidden(net, *hubs)
    reservations = home.membership.reservations
    await net.until(lambda: len(reservations.addrs) == 2)
    first = {addr.relay for addr in reservations.addrs}
    assert first < {hub.peer for hub in hubs}
    assert not hubs[0].membership.reservations.addrs  # it has an address of its own
    stranger = Key.generate()
    from wetware.overlay.link import LinkHost

    async with LinkHost(stranger) as host:
        connection = await host.dial(reservations.addrs)
        assert connection.peer == home.peer
    gone = next(hub for hub in hubs if hub.peer in first)
    await gone.kill()
    await net.until(
        lambda: (
            len(reservations.addrs) == 2
            and gone.peer not in {addr.relay for addr in reservations.addrs}
        )
    )
