"""The parts of SWIM that stand alone: timers, local health, a suspicion, the order of probes."""

from __future__ import annotations

import math
import random

import pytest

from wetware.overlay.membership.awareness import Awareness
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.suspicion import Suspicion
from wetware.overlay.membership.table import Table
from wetware.overlay.membership.timers import Timers
from wetware.overlay.membership.wire import DEAD, SUSPECT

from .conftest import Lab, raw


def test_timers_call_in_order_and_not_after_the_end() -> None:
    now = 0.0
    timers, called = Timers(lambda: now), []
    assert timers.due == math.inf
    timers.after(2.0, called.append, "late")
    timers.at(1.0, called.append, "first")
    timers.at(1.0, called.append, "second")
    timers.run()
    assert (timers.due, called) == (1.0, [])
    now = 1.0
    timers.run()
    assert called == ["first", "second"]
    timers.stop()
    timers.at(1.0, called.append, "never")
    timers.run()
    assert (timers.due, called) == (math.inf, ["first", "second"])


def test_local_health_has_bounds() -> None:
    awareness = Awareness(8)
    awareness.add(-1)
    assert awareness.scaled(0.5) == 0.5
    awareness.add(100)
    assert awareness.score == 7
    assert awareness.scaled(0.5) == 4.0


def test_confirmations_shorten_a_suspicion_to_its_shortest_time() -> None:
    config = MembershipConfig()
    shortest, longest, wanted = config.suspicion_s(8)
    suspicion = Suspicion(config, 8, [b"a"], 100.0)
    assert suspicion.deadline == pytest.approx(100.0 + longest)
    assert not suspicion.confirm(b"a")
    assert [suspicion.confirm(bytes([n])) for n in range(4)] == [n < wanted for n in range(4)]
    assert suspicion.deadline == pytest.approx(100.0 + shortest)
    suspicion.postpone(30.0)
    suspicion.hasten()
    assert suspicion.deadline == pytest.approx(130.0 + shortest)


def test_a_word_of_death_leaves_the_shortest_time() -> None:
    config = MembershipConfig()
    suspicion = Suspicion(config, 8, [b"a"], 100.0)
    suspicion.hasten()
    assert suspicion.deadline == 100.0 + config.suspicion_s(8)[0]


def test_the_table_probes_the_living_in_rounds_and_counts_them(lab: Lab) -> None:
    table = Table(raw(0), random.Random(1))
    nodes = {n: table.add(raw(n), lab.record(n), {}, 0.0) for n in range(1, 6)}
    table.set_state(nodes[1], SUSPECT, 1.0)
    table.set_state(nodes[2], DEAD, 2.0)
    table.set_state(nodes[3], DEAD, 1.0)
    assert table.size == 4
    assert table.longest_dead() is nodes[3]
    assert {table.next_in_turn() for _ in range(3)} == {nodes[1], nodes[4], nodes[5]}
    assert set(table.sample(5)) == {nodes[4], nodes[5]}
    assert set(table.sample(5, dead_since=1.5)) == {nodes[1], nodes[2], nodes[4], nodes[5]}
    assert table.remove(nodes[4])
    assert not table.remove(nodes[4])
    assert table.keys() == sorted(map(raw, (0, 1, 2, 3, 5)))
