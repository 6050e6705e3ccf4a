"""A cluster of real nodes on loopback: it converges, and sees deaths, departures and returns."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.errors import DialError, LimitExceeded, OverlayError
from wetware.hookspecs import PeerUp
from wetware.identity import Key
from wetware.overlay.membership.known import ChangeKind
from wetware.overlay.membership.service import Membership

pytestmark = pytest.mark.anyio


def events(caplog: pytest.LogCaptureFixture, name: str, **fields: object) -> list[dict[str, Any]]:
    found = [record.ww for record in caplog.records if record.getMessage() == name]  # type: ignore[attr-defined]
    return [one for one in found if all(one.get(key) == value for key, value in fields.items())]


@pytest.mark.parametrize(
    ("measured", "early", "ahead_s"),
    [([0.1], [7200.0, 7200.0, 7200.0], 0.1), ([], [7200.0], 7200.0), ([], [], None)],
)
def test_what_is_measured_counts_before_what_certificates_say(
    measured: list[float], early: list[float], ahead_s: float | None
) -> None:
    membership = object.__new__(Membership)
    membership.swim = Mock(clock_offsets_s=dict(enumerate(measured)))
    membership._admission = Mock(early_s=lambda: dict(enumerate(early, 1)))
    assert membership.clock_offset_s == ahead_s


async def test_a_cluster_converges_and_each_node_describes_itself(net: Any) -> None:
    nodes = await net.cluster(6)
    await net.converged(*nodes)
    for node in nodes:
        members = node.membership.members()
        assert [member.record.name for member in members] == [f"n{i}" for i in range(6)]
        for member, other in zip(members, nodes, strict=True):
            assert member.record.peer == other.peer
            assert member.record.addrs == (str(other.addr),)
            assert member.record.services == ("node",)
            assert member.record.memory_bytes > 0
    # a full mesh: everybody is connected to everybody
    await net.until(lambda: all(len(node.introductions.peers()) == 5 for node in nodes))


async def test_a_crash_is_seen_everywhere(net: Any, caplog: pytest.LogCaptureFixture) -> None:
    nodes = await net.cluster(5)
    await net.converged(*nodes)
    victim, *others = nodes[2:] + nodes[:2]
    with caplog.at_level(logging.INFO, "wetware"):
        await victim.kill()
        await net.until(lambda: all(node.sees(victim, state="dead") for node in others))
    assert events(caplog, "member.suspect", peer=victim.peer)
    # Once per node; a suspicion may be given up and had again where the machine is busy.
    assert 1 <= len(events(caplog, "member.dead", peer=victim.peer)) <= len(others)
    assert all(node.sees(*(set(others) - {node})) for node in others)


async def test_a_frozen_node_is_suspected_and_dead_and_comes_back(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = await net.cluster(4)
    await net.converged(*nodes)
    frozen, *others = nodes
    membership = frozen.membership
    # As SIGSTOP: TCP goes on, and nothing is read, answered or probed.
    thaw = asyncio.Event()
    read = membership.inbound._receive
    monkeypatch.setattr(membership.inbound, "_receive", lambda peer, frame: None)
    monkeypatch.setattr(membership, "_rearm", lambda: None)
    if membership._timer is not None:
        membership._timer.cancel()
        membership._timer = None
    await net.until(
        lambda: all(
            any(
                change.kind is ChangeKind.SUSPECTED and change.member.peer == frozen.peer
                for change in node.changes
            )
            for node in others
        )
    )
    await net.until(lambda: all(node.sees(frozen, state="dead") for node in others))
    thaw.set()
    monkeypatch.setattr(membership.inbound, "_receive", read)
    monkeypatch.undo()
    membership._tick()
    await net.until(lambda: all(node.sees(frozen) for node in others))
    await net.converged(*nodes)


async def test_a_clean_stop_is_seen_at_once_and_is_no_death(net: Any) -> None:
    nodes = await net.cluster(4)
    await net.converged(*nodes)
    leaver, *others = reversed(nodes)
    loop = asyncio.get_running_loop()
    started = loop.time()
    await leaver.stop()
    assert loop.time() - started < 3.0
    await net.until(lambda: all(node.sees(leaver, state="left") for node in others))
    kinds = {
        change.kind
        for node in others
        for change in node.changes
        if change.member.peer == leaver.peer
    }
    assert ChangeKind.DIED not in kinds
    assert ChangeKind.SUSPECTED not in kinds


async def test_a_restart_with_a_new_port_is_one_member_and_needs_no_bootstrap(net: Any) -> None:
    nodes = await net.cluster(4)
    await net.converged(*nodes)
    node, *others = reversed(nodes)
    before = node.membership.swim.record
    await net.until(lambda: len(node.membership._store.peers()) == 3)
    await node.kill()
    await node.start()  # no address given: its own store leads back
    assert str(node.addr) not in before.addrs
    await net.until(
        lambda: all(
            other.membership.member(node.peer).record.incarnation > before.incarnation
            for other in others
        )
    )
    await net.converged(*nodes)
    for other in others:
        members = [m for m in other.membership.members() if m.record.peer == node.peer]
        assert len(members) == 1
    await net.until(
        lambda: all(
            other.membership.member(node.peer).record.addrs == (str(node.addr),) for other in others
        )
    )
    assert all(node.addr in other.membership._store.addrs(node.peer) for other in others)
    assert all(len(other.membership.members()) == 4 for other in nodes)


async def test_a_node_that_moved_is_found_by_those_that_it_did_not_dial(net: Any) -> None:
    """It knows one other only; gossip tells the rest where it is."""
    nodes = await net.cluster(4)
    await net.converged(*nodes)
    node = nodes[3]
    await node.kill()
    for file in ("peers.json", "peers.json.damaged"):
        (node.path / file).unlink(missing_ok=True)
    await node.start(nodes[1].addr)
    await net.converged(*nodes)
    await net.until(lambda: all(other.is_up(node) for other in nodes[:3]))


async def test_an_evicted_node_is_cut_off_everywhere(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = await net.cluster(5)
    await net.converged(*nodes)
    founder, evicted, *others = nodes
    await founder.admission.issuer.evict(evicted.peer, "lost laptop")
    rest = [founder, *others]
    await net.until(lambda: all(node.state(evicted) is None for node in rest))
    await net.until(lambda: not any(node.is_up(evicted) for node in rest))
    await net.until(lambda: not any(node.host.connection(evicted.peer) for node in rest))
    assert all(evicted.peer not in node.membership._store.peers() for node in rest)
    # It tries to come back with its key and certificate, at a new address too.
    await evicted.stop()
    await evicted.start(others[0].addr, founder.addr)
    with pytest.raises(OverlayError):
        await evicted.membership.ping(others[1].peer, 2.0)
    assert all(node.state(evicted) is None for node in rest)
    assert not any(node.is_up(evicted) for node in rest)
    await net.converged(*rest)


async def test_a_member_that_was_away_learns_of_an_eviction(net: Any) -> None:
    nodes = await net.cluster(3)
    await net.converged(*nodes)
    founder, evicted, away = nodes
    await away.stop()
    await founder.admission.issuer.evict(evicted.peer, "")
    await away.start(evicted.addr)  # it knows both, and asks the evicted one too
    await net.until(lambda: founder.sees(away) and away.sees(founder))
    await net.until(lambda: away.state(evicted) is None)
    await net.until(lambda: not away.is_up(evicted))


async def test_an_evicted_node_in_the_peer_store_is_dropped_too(net: Any) -> None:
    founder, gone = await net.cluster(2)
    await net.converged(founder, gone)
    await gone.kill()
    await founder.stop()
    await founder.start()
    assert gone.peer in founder.membership._store.peers()
    assert founder.state(gone) is None
    await founder.admission.issuer.evict(gone.peer, "")
    await net.until(lambda: gone.peer not in founder.membership._store.peers())


async def test_a_stranger_is_refused(net: Any) -> None:
    first = await (await net.node()).start()
    other_net = type(net)(net.path / "other")
    other_net.path.mkdir()
    stranger = await other_net.node()
    try:
        await stranger.start(first.addr)  # a member of another cluster
        with pytest.raises(OverlayError):
            await stranger.membership.ping(first.peer, 1.0)
        connection = await stranger.host.dial([first.addr])
        for name in ("membership", "dial-back", "process"):
            with pytest.raises(OverlayError):
                await connection.open_stream(f"/wetware/{name}/1.0.0")
    finally:
        await other_net.aclose()
    assert first.state(stranger) is None
    assert first.introductions.peers() == ()


async def test_a_veto_keeps_a_certified_node_out(net: Any) -> None:
    first, second, vetoed = [await net.node() for _ in range(3)]

    async def veto(peer: object) -> bool:
        return peer != vetoed.peer

    first.veto = veto
    await first.start()
    await second.start(first.addr)  # has no such backend: it lets everybody in
    await vetoed.start(second.addr)
    await net.until(lambda: second.sees(first, vetoed))
    await net.until(lambda: first.sees(second))
    # Its record came by gossip, and is believed no longer than the backend takes to answer.
    await net.until(lambda: vetoed.peer in first.membership._refused)
    await net.until(lambda: first.state(vetoed) is None)
    assert not first.is_up(vetoed)


async def test_labels_services_and_addresses_follow(net: Any) -> None:
    nodes = await net.cluster(3)
    await net.converged(*nodes)
    nodes[2].labels = {"zone": "attic"}
    nodes[2].services = ("node", "pubsub")
    nodes[2].membership.refresh()
    first = nodes[0].membership
    await net.until(lambda: dict(first.member(nodes[2].peer).labels) == {"zone": "attic"})
    assert first.member(nodes[2].peer).record.services == ("node", "pubsub")


async def test_a_bad_description_is_logged_and_the_old_one_stays(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    node = await (await net.node()).start()
    before = node.membership.swim.record
    node.labels = {"x" * 10_000: "y"}
    node.membership.refresh()
    node.membership.refresh()
    assert node.membership.swim.record.labels == before.labels
    assert len(events(caplog, "membership.bad_description")) == 1


async def test_a_ping_that_was_lost_with_a_connection_is_sent_again(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = await net.cluster(2)
    await net.converged(*nodes)
    first, second = nodes
    monkeypatch.setattr("wetware.overlay.membership.service.PING_AGAIN_S", 0.05)
    ping, lost = first.membership.swim.ping, Mock()
    monkeypatch.setattr(first.membership.swim, "ping", lost)
    pinging = asyncio.ensure_future(first.membership.ping(second.peer))
    await net.until(lambda: lost.call_count)
    monkeypatch.setattr(first.membership.swim, "ping", ping)
    assert await pinging < 2.0


async def test_ping_measures_and_dials(net: Any) -> None:
    nodes = await net.cluster(3)
    await net.converged(*nodes)
    first, second, third = nodes
    rtt_s = await first.membership.ping(second.peer)
    assert 0.0 < rtt_s < 2.0
    assert await first.membership.ping(first.peer) == 0.0
    for connection in first.host.connections():
        if connection.peer == second.peer:
            connection.close()
    assert await first.membership.ping(second.peer) < 2.0
    await third.kill()
    with pytest.raises(OverlayError):
        await first.membership.ping(third.peer, 1.0)
    with pytest.raises(DialError):
        await first.membership.ping(Key.generate().peer_id, 1.0)


async def test_dial_back_tries_the_addresses_of_the_asker_only(net: Any) -> None:
    nodes = await net.cluster(3)
    await net.converged(*nodes)
    first, second, third = nodes
    nobody = Multiaddr("ip4", "127.0.0.1", 9)
    asked = await first.membership.dial_backs.ask(second.peer, [first.addr, nobody, third.addr])
    assert [(found.reached, found.why) for found in asked] == [
        (True, "ok"),
        (False, "unknown"),
        (False, "unknown"),
    ]
    assert asked[0].addr == first.addr.with_peer(None)
    # An address that it names and where it is not.
    describe = first.describe
    first.describe = lambda: {**describe(), "addrs": [str(first.addr), str(nobody)]}
    first.membership._describe = first.describe
    first.membership.refresh()
    await net.until(lambda: len(second.membership.member(first.peer).record.addrs) == 2)
    asked = await first.membership.dial_backs.ask(second.peer, [nobody])
    assert [(found.reached, found.why) for found in asked] == [(False, "refused")]
    await first.membership.dial_backs.ask(second.peer, [first.addr])
    with pytest.raises(LimitExceeded):
        await first.membership.dial_backs.ask(second.peer, [first.addr])
    assert all(len(node.introductions.peers()) == 2 for node in nodes)  # ours stayed


async def test_discovered_members_are_joined(net: Any) -> None:
    first, second = await net.node(), await net.node()
    await first.start()
    await second.start()
    second.membership.reach.found(str(first.addr), "mdns")
    await net.converged(first, second)


async def test_beyond_the_full_mesh_few_connections_carry_all(net: Any) -> None:
    config = replace(net.config, full_mesh_max=4, neighbours=2)
    nodes = await net.cluster(7, config=config)
    await net.converged(*nodes)
    victim, *others = reversed(nodes)
    await net.until(
        lambda: all(sum(node.membership.reach.wants(o.peer) for o in nodes) == 2 for node in nodes)
    )
    await victim.kill()
    await net.until(lambda: all(node.sees(victim, state="dead") for node in others))
    await net.converged(*others)


async def test_a_watcher_that_fails_is_its_own_trouble(
    net: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = await (await net.node()).start()

    def broken(change: object) -> None:
        raise RuntimeError("a defect")

    end = first.membership.watch(broken)
    second = await (await net.node()).start(first.addr)
    await net.converged(first, second)
    assert events(caplog, "watcher.failed")
    end()
    end()
    assert not {broken} & set(first.membership._watchers._callbacks.values())


async def test_introductions_tell_the_membership(net: Any) -> None:
    first, second = await net.cluster(2)
    up: list[object] = []
    first.introductions.watch(up.append)
    await net.converged(first, second)
    await net.until(lambda: PeerUp(second.peer) in up)


async def test_nothing_is_left_after_a_stop(net: Any) -> None:
    nodes = await net.cluster(4)
    await net.converged(*nodes)
    node, *others = nodes
    membership, host = node.membership, node.host
    streams = [stream for connection in host.connections() for stream in connection.streams]
    assert streams
    await node.stop()
    assert all(stream.ended or stream.closing for stream in streams)
    assert membership._timer is None
    assert all(outlet.stream is None for outlet in membership.courier._outlets.values())
    assert "/wetware/membership/1.0.0" not in host.protocols
    assert not any(conn.streams for conn in host.connections())
    # the others let go of what they had to it
    await net.until(lambda: all(node.peer not in o.membership.courier._outlets for o in others))
    await net.until(lambda: all(node.peer not in o.membership.inbound._streams for o in others))
