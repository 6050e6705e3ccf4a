"""Many nodes in simulated time: the same code, with latency, loss, deaths, pauses, partitions."""

from __future__ import annotations

from hashlib import sha256

import pytest

from wetware.base import cbor
from wetware.overlay.membership import wire
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.known import ChangeKind, State
from wetware.overlay.membership.record import Record, key_of
from wetware.overlay.membership.swim import middle

from membership_sim import Sim, SimNode, happened, key_number  # isort: skip - beside the benchmark


def died(sim: Sim) -> list[tuple[SimNode, float]]:
    return [(n, at) for n in sim.nodes.values() for at, _ in happened(n, ChangeKind.DIED)]


def quiet(sim: Sim, count: int) -> list[SimNode]:
    nodes = sim.start(count)
    assert sim.run(30, sim.knows_all)
    sim.run(5)
    return nodes


def test_64_nodes_start_join_and_lose_one() -> None:
    sim = Sim(seed=3)
    nodes = sim.start(64)
    assert sim.run(10, sim.knows_all), "everybody knows everybody"
    sim.run(10)
    begun = sim.time
    sim.connect(sim.add(64), nodes[17])
    assert sim.run(5, sim.knows_all), "and a newcomer"
    assert sim.time - begun < 3
    sim.run(5)
    begun = sim.time
    sim.kill(nodes[40])
    shortest, longest, _ = sim.config.suspicion_s(65)
    assert sim.run(longest + 10, sim.knows_all), "and who died"
    assert shortest < sim.time - begun < 2 * shortest + 6
    assert {n.peer for n, _ in died(sim)} == {n.peer for n in sim.living}
    assert sum(n.swim.counters["suspicions"] for n in sim.living) == 64  # of nobody else


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> tuple[int, int, float]:
        sim = Sim(seed=seed, loss=0.02)
        quiet(sim, 12)
        return sim.frames, sim.bytes, sim.time

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_a_quiet_cluster_is_quiet() -> None:
    sim = Sim(seed=4)
    quiet(sim, 32)
    frames, size = sim.frames, sim.bytes
    sim.run(60)
    assert (sim.frames - frames) / 32 / 60 < 2.5  # a ping and an answer each second
    assert (sim.bytes - size) / 32 / 60 < 300


def test_one_lossy_network_kills_nobody() -> None:
    sim = Sim(seed=5, loss=0.05)
    assert sim.start(24)
    assert sim.run(60, sim.knows_all)
    sim.run(120)
    assert not died(sim)


def test_a_dead_process_is_noticed_sooner_where_dials_are_refused() -> None:
    sim = Sim(seed=6, refuse=True)
    nodes = quiet(sim, 16)
    begun = sim.time
    sim.kill(nodes[3])
    for node in sim.living:  # a full mesh: everybody's connection breaks
        sim.call(node, lambda swim: swim.peer_down(nodes[3].peer))
    assert sim.run(20, sim.knows_all)
    assert sim.time - begun < sim.config.suspicion_s(16)[0] + 1.5


def test_pauses_below_the_shortest_suspicion_kill_nobody() -> None:
    sim = Sim(seed=7)
    nodes = quiet(sim, 32)
    for round_ in range(20):
        sim.pause(nodes[(7 * round_) % 32], sim.rng.uniform(1, 4))
        sim.run(3)
    sim.run(30)
    assert not died(sim)
    assert sim.knows_all()
    assert sum(n.swim.counters["away"] for n in nodes) >= 20
    assert sum(n.swim.counters["refutations"] for n in nodes) > 0


def test_a_long_pause_is_survived() -> None:
    sim = Sim(seed=8)
    nodes = quiet(sim, 12)
    sim.pause(nodes[5], 60)
    sim.run(60)
    assert len(died(sim)) == 11
    assert {
        change.member.peer
        for n in nodes
        for _, change in n.changes
        if change.kind is ChangeKind.DIED
    } == {nodes[5].peer}
    assert sim.run(10, sim.knows_all)


def test_an_asymmetric_partition_is_healed_by_indirect_probes() -> None:
    sim = Sim(seed=9)
    nodes = quiet(sim, 16)
    sim.cut = lambda a, b: {a, b} == {nodes[1], nodes[2]}  # the two do not reach each other
    sim.run(120)
    assert not died(sim)
    sim.cut = lambda a, b: a is nodes[1] and b in (nodes[2], nodes[3])  # one way
    sim.run(120)
    assert not died(sim)
    assert sim.knows_all()


def test_a_partition_heals_through_one_connection() -> None:
    sim = Sim(seed=10)
    nodes = quiet(sim, 20)
    left = set(nodes[:7])
    sim.cut = lambda a, b: (a in left) != (b in left)
    sim.run(90)
    assert nodes[0].swim.size == 7
    assert nodes[19].swim.size == 13
    sim.cut = lambda _a, _b: False
    sim.run(60)  # the dead are not probed: somebody has to connect
    sim.connect(nodes[2], nodes[11])
    assert sim.run(20, sim.knows_all)


def test_half_of_the_cluster_dies_at_once() -> None:
    sim = Sim(seed=11)
    nodes = quiet(sim, 24)
    for node in nodes[:12]:
        sim.kill(node)
    assert sim.run(240, sim.knows_all)
    living = {n.peer for n in sim.living}
    assert not [p for n in sim.living for _, p in happened(n, ChangeKind.DIED) if p in living]


def test_a_restart_is_one_member_everywhere() -> None:
    sim = Sim(seed=12)
    nodes = quiet(sim, 16)
    old = nodes[4].swim.record
    sim.kill(nodes[4])
    sim.run(2)
    again = sim.add(4, instance=9)  # takes the dead one's place in the network
    sim.connect(again, nodes[9])
    assert sim.run(10, sim.knows_all)
    frame = cbor.encode({"k": 8, "r": [old.encoded], "z": True})
    for node in nodes[5:]:
        node.swim.receive(nodes[1].peer, frame)  # the past, replayed
    sim.run(30)
    assert sim.knows_all()
    member = nodes[9].swim.member(again.peer)
    assert member is not None
    assert member.record.instance == again.swim.record.instance
    assert not died(sim)


def test_leaving_is_known_at_once_and_is_not_death() -> None:
    sim = Sim(seed=13)
    nodes = quiet(sim, 16)
    sim.call(nodes[4], lambda swim: swim.leave())
    sim.kill(nodes[4])
    assert sim.run(2, sim.knows_all)
    assert not died(sim)
    assert all(len(happened(n, ChangeKind.LEFT)) == 1 for n in sim.living)


def test_a_lying_member_kills_nobody() -> None:
    sim = Sim(seed=14)
    nodes = quiet(sim, 16)
    liar = nodes[0]

    def lie() -> None:
        for node in nodes[1:]:
            target = nodes[8]
            member = node.swim.member(target.peer)
            incarnation = (
                target.swim.record.incarnation if member is None else member.record.incarnation
            )
            claims = b"".join(
                wire.CLAIM.pack(key_of(target.peer), incarnation, key_of(accuser.peer), state)
                for accuser in nodes[:6]
                for state in (wire.SUSPECT, wire.DEAD)
            )
            if node is not target:
                node.swim.receive(liar.peer, cbor.encode({"k": 5, "c": claims}))
                sim._arm(node)

    for _ in range(60):
        lie()
        sim.run(1)
    assert not died(sim)
    refuted = nodes[8].swim.counters["refutations"]
    assert 0 < refuted <= sim.config.refutes_burst + 60 * sim.config.refutes_per_s + 1
    assert sim.run(30, sim.knows_all)


def test_facts_reach_everybody_newcomers_too() -> None:
    sim = Sim(seed=15)
    nodes = quiet(sim, 32)
    fact = b"a tombstone" * 100
    digest = sha256(fact).digest()[:16]
    nodes[3].facts[digest] = fact
    sim.call(nodes[3], lambda swim: swim.add_fact(fact))
    assert sim.run(3, lambda: all(n.facts.get(digest) == fact for n in nodes))
    sim.run(30)  # the rumour has died out
    late = sim.add(40)
    sim.connect(late, nodes[20])
    assert sim.run(3, lambda: late.facts.get(digest) == fact)


def test_load_updates_reach_everybody_without_gossip_frames_of_their_own() -> None:
    sim = Sim(seed=16, config=MembershipConfig(load_s=5.0))
    nodes = quiet(sim, 24)
    sim.call(nodes[0], lambda swim: swim.update(load=3.0))
    frames = sim.frames
    begun = sim.time

    def everywhere() -> bool:
        members = [n.swim.member(nodes[0].peer) for n in nodes[1:]]
        return all(m is not None and m.record.load == 3.0 for m in members)

    assert sim.run(60, everywhere)
    assert (sim.frames - frames) / 24 / (sim.time - begun) < 4


def test_a_slow_clock_is_known() -> None:
    sim = Sim(seed=17)
    nodes = sim.start(8)
    nodes[5].clock_offset_s = -300.0
    sim.run(30)
    assert middle(nodes[5].swim.clock_offsets_s.values()) == pytest.approx(300, abs=0.1)
    assert middle(nodes[1].swim.clock_offsets_s.values()) == pytest.approx(0, abs=0.1)
    member = nodes[1].swim.member(nodes[5].peer)
    assert member is not None
    assert member.clock_offset_s == pytest.approx(-300, abs=0.1)


def test_two_processes_with_one_key_notice_each_other() -> None:
    sim = Sim(seed=18)
    nodes = quiet(sim, 8)
    twin = nodes[3]
    record = Record.sign(
        key_number(3),
        incarnation=twin.swim.record.incarnation + 5000,
        instance=b"the twin",
        issued_ms=twin.swim.record.issued_ms + 5000,
        host="elsewhere",
    )
    nodes[1].swim.receive(nodes[2].peer, cbor.encode({"k": 8, "r": [record.encoded], "z": True}))
    sim._arm(nodes[1])
    sim.run(5)
    seen = [change for _, change in twin.changes if change.kind is ChangeKind.DUPLICATE]
    assert [change.member.record.host for change in seen] == ["elsewhere"]
    assert twin.swim.record.incarnation > record.incarnation
    sim.run(5)
    assert all(n.swim.member(twin.peer).record.host == "host-3" for n in nodes if n is not twin)  # type: ignore[union-attr]


def test_states_and_sizes_agree() -> None:
    sim = Sim(seed=19, loss=0.1)
    nodes = sim.start(16)
    sim.run(20)
    sim.kill(nodes[3])
    sim.call(nodes[4], lambda swim: swim.leave())
    sim.kill(nodes[4])
    for _ in range(30):
        sim.run(2)
        for node in sim.living:
            states = [member.state for member in node.swim.members().values()]
            assert node.swim.size == 1 + sum(s in (State.ALIVE, State.SUSPECT) for s in states)
