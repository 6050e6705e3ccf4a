"""One node, step by step: what it believes, what it says, and what it does not let others do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from wetware.base import cbor
from wetware.errors import LimitExceeded
from wetware.overlay.membership import wire
from wetware.overlay.membership.known import ChangeKind, State
from wetware.overlay.membership.probing import PING_S_MAX, PINGS_MAX
from wetware.overlay.membership.record import Forged, Malformed, Record
from wetware.overlay.membership.rumours import CLAIM
from wetware.overlay.membership.swim import middle

from .conftest import Lab, entry, raw, wire_digest

PING, ACK, NACK, PING_REQ, GOSSIP, SYNC, WANT, HAVE = range(1, 9)


# --- joining ---


def test_an_announced_node_is_fetched_once_verified_and_joins(lab: Lab) -> None:
    sent = lab.says(1, GOSSIP, d=entry(2))
    assert [(n, f["k"], f.get("w")) for n, f in sent] == [(1, WANT, raw(1) + raw(2))]
    assert lab.says(3, PING, n=1, d=entry(2))[-1][1].get("w") == raw(3)  # 2 is asked for already
    lab.tells(1, lab.record(1), lab.record(2))
    assert lab.kinds() == [ChangeKind.JOINED] * 2
    assert lab.state(2) is State.ALIVE
    assert lab.verified == 2
    assert lab.swim.size == 3


def test_labels_of_the_certificate_win(lab: Lab) -> None:
    lab.certified = {"zone": "certified"}
    lab.tells(1, lab.record(1, labels={"zone": "claimed", "own": "x"}))
    member = lab.member(1)
    assert member is not None
    assert dict(member.labels) == {"zone": "certified", "own": "x"}


def test_a_ping_is_answered_with_the_time(lab: Lab) -> None:
    sent = lab.says(1, PING, n=77)
    assert (sent[0][1]["k"], sent[0][1]["n"], sent[0][1]["u"]) == (ACK, 77, lab.unix_ms)


def test_the_carried_bytes_are_passed_on(lab: Lab) -> None:
    record = lab.record(1)
    lab.tells(1, record)
    lab.says(2, WANT, w=raw(1))
    assert [f["r"] for f in lab.frames(HAVE, 2)] == [[record.encoded]]


# --- probes ---


def test_rounds_reach_everybody_in_random_order(lab: Lab) -> None:
    lab.joined(*range(1, 11))
    lab.pass_s(10.0, answer=True)
    pinged = [n for n, f in lab.sent if f["k"] == PING]
    lab.pass_s(10.0, answer=True)
    assert len(pinged) == 10
    assert set(range(1, 11)) == {n for n, f in lab.sent if f["k"] == PING}
    assert pinged != sorted(pinged)


def test_no_answer_then_others_are_asked_then_suspicion(lab: Lab) -> None:
    lab.joined(1, 2, 3, 4, 5)
    lab.swim.probe(lab.peer(1))
    (ping,) = lab.frames(PING, 1)
    lab.pass_s(0.45, answer={2, 3, 4, 5})
    assert not lab.frames(PING_REQ)
    lab.pass_s(0.1, answer={2, 3, 4, 5})
    asked = [n for n, f in lab.sent if f["k"] == PING_REQ and f["i"] == raw(1)]
    assert len(asked) == 3
    assert 1 not in asked
    for n in asked:
        lab.says(n, NACK, n=ping["n"])
    health = lab.swim.awareness.score
    lab.pass_s(0.5, answer={2, 3, 4, 5})
    assert lab.state(1) is State.SUSPECT
    assert lab.swim.awareness.score <= health  # the others answered: it is not this node's fault
    lab.pass_s(0.2, answer={2, 3, 4, 5})
    assert (1, 100, 0, wire.SUSPECT) in lab.claims_sent()


def test_each_frame_to_a_relay_has_rumours_of_its_own() -> None:
    lab = Lab(piggyback_bytes_max=4 * wire.CLAIM.size)
    lab.joined(1, 2, 3, 4)
    for n in range(10, 40):
        claim = wire.CLAIM.pack(raw(n), 100, raw(0), wire.SUSPECT)
        lab.swim._gossip.rumours.add(CLAIM, raw(n), claim)
    lab.swim.probe(lab.peer(1))
    lab.pass_s(0.6, answer={2, 3, 4})
    sizes = [len(f.get("c", b"")) for _, f in lab.sent if f["k"] == PING_REQ]
    assert len(sizes) == 3
    assert 0 < max(sizes) <= lab.config.piggyback_bytes_max


def test_an_indirect_answer_is_enough(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    lab.swim.probe(lab.peer(1))
    (ping,) = lab.frames(PING, 1)
    lab.pass_s(0.6, answer={2, 3})
    lab.says(2, ACK, n=ping["n"])
    lab.pass_s(2.0, answer=True)
    assert lab.state(1) is State.ALIVE


def test_an_answer_from_somebody_else_is_none(lab: Lab) -> None:
    lab.joined(1, 2, 3, 4, 5, 6)
    lab.swim.probe(lab.peer(1))
    (ping,) = lab.frames(PING, 1)
    lab.says(2, ACK, n=ping["n"])
    lab.pass_s(1.1, answer={2, 3, 4, 5, 6})
    assert lab.state(1) is State.SUSPECT


def test_unreachable_goes_to_the_others_at_once(lab: Lab) -> None:
    lab.joined(1, 2, 3, 4)
    lab.swim.peer_down(lab.peer(1))
    (ping,) = lab.frames(PING, 1)
    lab.swim.unreachable(lab.peer(1))
    asked = [n for n, f in lab.sent if f["k"] == PING_REQ]
    assert sorted(asked) == [2, 3, 4]
    lab.says(2, NACK, n=ping["n"])
    lab.says(3, NACK, n=ping["n"])
    assert lab.state(1) is State.ALIVE
    lab.swim.unreachable(lab.peer(4))  # the last of them cannot be asked
    assert lab.state(1) is State.SUSPECT  # and nothing is left to wait for
    assert lab.swim.awareness.score == 0


def test_a_probe_for_another_is_relayed_and_its_failure_told(lab: Lab) -> None:
    lab.joined(1, 2)
    sent = lab.says(1, PING_REQ, n=5, i=raw(2))
    ((to, ping),) = [(n, f) for n, f in sent if f["k"] == PING]
    assert to == 2
    assert [(n, f["n"]) for n, f in lab.says(2, ACK, n=ping["n"])] == [(1, 5)]
    lab.says(1, PING_REQ, n=6, i=raw(2))
    lab.pass_s(0.45, answer={1})
    assert [f["n"] for f in lab.frames(NACK, 1)] == [6]
    assert [f["n"] for _, f in lab.says(1, PING_REQ, n=7, i=raw(9))] == [7]  # not a member: no dial
    assert lab.frames(NACK, 1)[-1]["n"] == 7
    lab.says(1, PING_REQ, n=8, i=raw(2))
    lab.swim.unreachable(lab.peer(2))
    assert lab.frames(NACK, 1)[-1]["n"] == 8


def test_relayed_probes_are_bounded() -> None:
    lab = Lab(relays_max=4)
    lab.joined(1, 2)
    for n in range(10):
        lab.says(1, PING_REQ, n=n, i=raw(2))
    assert len(lab.frames(PING, 2)) == 4
    assert [f["n"] for f in lab.frames(NACK, 1)] == list(range(4, 10))


def test_local_health_makes_it_patient(lab: Lab) -> None:
    lab.joined(1, 2, 3, 4)
    lab.pass_s(30.0)  # nobody answers, nobody says NACK: it is this node
    assert lab.swim.awareness.score == lab.config.awareness_max - 1
    before = len(lab.frames(PING))
    lab.pass_s(16.0)
    assert len(lab.frames(PING)) - before <= 2 + 4  # a probe in 8 s
    for n in range(1, 5):
        lab.tells(n, lab.record(n, incarnation=101))
    lab.pass_s(120.0, answer=True)
    assert lab.swim.awareness.score == 0


def test_clock_and_round_trip_are_measured(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    assert middle(lab.swim.clock_offsets_s.values()) == pytest.approx(0.0, abs=0.01)
    for number, offset_ms in ((1, 5000), (2, 5400), (3, -900_000)):
        lab.swim.probe(lab.peer(number))
        ping = lab.frames(PING, number)[-1]
        lab.time += 0.1
        lab.says(number, ACK, n=ping["n"], u=lab.unix_ms + offset_ms - 50)
    member = lab.member(1)
    assert member is not None
    assert member.clock_offset_s == pytest.approx(5.0, abs=0.01)
    assert member.rtt_s is not None
    assert 0 < member.rtt_s <= 0.101
    assert middle(lab.swim.clock_offsets_s.values()) == pytest.approx(5.0, abs=0.01)


def test_the_first_record_of_a_peer_brings_its_clock(lab: Lab) -> None:
    """Nobody is believed to have the same clock for want of a probe."""
    lab.tells(2, lab.record(1))
    lab.says(2, HAVE, r=[lab.record(2).encoded], z=True, u=lab.unix_ms + 7_200_000)
    assert lab.swim.clock_offsets_s == {lab.peer(2): 7200.0}
    lab.tells(2, lab.record(2, incarnation=101, instance=b"restart!"))
    assert lab.swim.clock_offsets_s == {}


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([], None),
        ([7200.0], 7200.0),
        ([7200.0, 0.1], 0.1),  # with this clock, two of three agree
        ([-7200.0, -7199.0], -7199.0),  # and here this one is alone
        ([-7200.0, 7200.0, 1.0], 1.0),
        ([0.0, 0.1, -7200.0, -7200.0], 0.0),
        ([0.0, -7100.0, -7200.0, -7200.0], -7100.0),
    ],
)
def test_the_middle_of_the_clocks(offsets: list[float], expected: float | None) -> None:
    assert middle(offsets) == expected


def test_a_ping_is_answered_by_its_peer_alone_and_pings_are_bounded(lab: Lab) -> None:
    lab.joined(1, 2)
    answered: list[bool] = []
    lab.swim.ping(lab.peer(1), lambda: answered.append(True))
    (ping,) = lab.frames(PING, 1)
    lab.says(2, ACK, n=ping["n"])
    assert not answered
    for _ in range(2):
        lab.says(1, ACK, n=ping["n"])
    assert answered == [True]
    for _ in range(PINGS_MAX):
        lab.swim.ping(lab.peer(2), lambda: None)
    with pytest.raises(LimitExceeded):
        lab.swim.ping(lab.peer(2), lambda: None)
    lab.pass_s(PING_S_MAX + 1, answer=True)
    lab.swim.ping(lab.peer(2), lambda: None)


# --- suspicion and refutation ---


def _idle(lab: Lab) -> None:
    """Long enough that nobody was heard within the last period."""
    lab.time += 0.2
    for n in range(1, 40):
        if (peer := lab.swim._table.nodes.get(raw(n))) is not None:
            peer.heard_at = lab.time - 60


@pytest.mark.parametrize(
    ("accusers", "seconds"), [((2,), 24.0), ((2, 2), 24.0), ((2, 3), 11.38), ((2, 3, 4), 4.0)]
)
def test_independent_confirmations_shorten_the_suspicion(
    lab: Lab, accusers: tuple[int, ...], seconds: float
) -> None:
    lab.joined(*range(1, 8))
    _idle(lab)
    for accuser in accusers:
        lab.says(5, GOSSIP, c=lab.claim(1, accuser))
    assert lab.state(1) is State.SUSPECT
    others = set(range(2, 8))
    start = lab.time
    lab.swim._probing._begin = lambda *_: None  # type: ignore[method-assign]
    while lab.state(1) is State.SUSPECT and lab.time < start + 60:
        lab.pass_s(0.05, answer=others)
    assert lab.time - start == pytest.approx(seconds, abs=0.15)
    assert lab.state(1) is State.DEAD
    assert lab.swim.size == 7


def test_this_node_refutes_and_shows_it(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    sent = lab.says(1, GOSSIP, c=lab.claim(0, 2))
    assert lab.swim.record.order == (101, 0)
    assert lab.swim.counters["refutations"] == 1
    assert [f["r"] for n, f in sent if n == 1 and f["k"] == HAVE] == [[lab.swim.record.encoded]]
    assert lab.swim.awareness.score == 1
    lab.says(2, GOSSIP, c=lab.claim(0, 3))  # an old claim: refuted already
    assert lab.swim.record.order == (101, 0)


def test_a_refutation_ends_the_suspicion_and_a_late_claim_is_void(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    _idle(lab)
    lab.says(2, GOSSIP, c=lab.claim(1, 3))
    assert lab.state(1) is State.SUSPECT
    lab.tells(2, lab.record(1, incarnation=101))
    assert lab.state(1) is State.ALIVE
    lab.says(2, GOSSIP, c=lab.claim(1, 3))
    assert lab.state(1) is State.ALIVE
    assert lab.kinds() == [ChangeKind.SUSPECTED, ChangeKind.ALIVE]


def test_a_newer_revision_alone_refutes_nothing(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    _idle(lab)
    lab.says(2, GOSSIP, c=lab.claim(1, 3))
    lab.tells(2, lab.record(1, revision=1, load=2.0))
    assert lab.state(1) is State.SUSPECT


def test_refutations_are_bounded() -> None:
    lab = Lab(refutes_burst=3)
    lab.joined(1, 2)
    for _ in range(50):
        lab.says(1, GOSSIP, c=lab.claim(0, 2, incarnation=lab.swim.record.incarnation))
    assert lab.swim.counters["refutations"] == 3
    lab.pass_s(2.1, answer=True)  # and then it refutes what it still has to
    assert lab.swim.counters["refutations"] == 4


def test_nobody_else_can_use_up_the_incarnations(lab: Lab) -> None:
    lab.joined(1, 2)
    lab.says(1, GOSSIP, c=lab.claim(0, 2, incarnation=1 << 61), d=entry(0, 1 << 61))
    lab.says(1, GOSSIP, c=lab.claim(2, 1, incarnation=1 << 61))
    assert lab.swim.record.incarnation == 100
    assert lab.state(2) is State.ALIVE


def test_a_claim_about_a_node_that_was_just_heard_is_doubted(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    lab.says(1, PING, n=1)
    lab.says(2, GOSSIP, c=lab.claim(1, 2, dead=True))
    assert lab.state(1) is State.ALIVE
    assert lab.swim.counters["doubted"] == 1
    assert len(lab.frames(PING, 1)) == 1
    lab.pass_s(3.0, answer=True)
    assert lab.state(1) is State.ALIVE
    assert lab.kinds() == []


def test_doubted_claims_confirm_the_suspicion_that_comes_after_all(lab: Lab) -> None:
    """A process ends: all see it at once, and hear each other's claims while they still doubt."""
    lab.joined(1, 2, 3, 4)
    lab.says(1, PING, n=1)
    for accuser in (2, 3):
        lab.says(accuser, GOSSIP, c=lab.claim(1, accuser))
    assert lab.state(1) is State.ALIVE
    lab.swim.unreachable(lab.peer(1))
    lab.pass_s(1.1, answer={2, 3, 4})
    assert lab.state(1) is State.SUSPECT
    lab.pass_s(4.1, answer={2, 3, 4})  # the shortest time: two have confirmed it
    assert lab.state(1) is State.DEAD


def test_the_claims_of_several_accusers_are_all_passed_on(lab: Lab) -> None:
    lab.joined(1, 2, 3, 4)
    _idle(lab)
    lab.sent.clear()
    lab.swim.unreachable(lab.peer(1))
    for accuser in (2, 3):
        lab.says(accuser, GOSSIP, c=lab.claim(1, accuser))
    lab.pass_s(1.0, answer={2, 3, 4})
    accusers = {accuser for node, _, accuser, _ in lab.claims_sent() if node == 1}
    assert {2, 3} <= accusers


def test_doubted_claims_are_forgotten_when_the_node_is_heard(lab: Lab) -> None:
    lab.joined(1, 2, 3, 4)
    lab.says(1, PING, n=1)
    for accuser in (2, 3):
        lab.says(accuser, GOSSIP, c=lab.claim(1, accuser))
    lab.pass_s(0.5, answer=True)  # it answers the probe
    lab.pass_s(8.0, answer={2, 3, 4})
    assert lab.state(1) is State.SUSPECT  # nobody confirms: it has the longest time


def test_even_a_claim_of_death_leaves_time_to_refute(lab: Lab) -> None:
    lab.joined(*range(1, 8))
    _idle(lab)
    for accuser in range(2, 8):
        lab.says(2, GOSSIP, c=lab.claim(1, accuser, dead=True), d=entry(1, state=wire.DEAD))
    assert lab.state(1) is State.SUSPECT
    lab.pass_s(3.0, answer=set(range(2, 8)))
    assert lab.state(1) is State.SUSPECT
    lab.pass_s(1.1, answer=set(range(2, 8)))
    assert lab.state(1) is State.DEAD


def test_a_suspect_that_is_heard_lives_and_is_told(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    _idle(lab)
    lab.says(2, GOSSIP, c=lab.claim(1, 3))
    lab.sent.clear()
    lab.swim.heard(lab.peer(1))
    assert lab.state(1) is State.ALIVE
    assert lab.claims_sent() == [(1, 100, 0, wire.SUSPECT)]


def test_a_dead_node_that_is_heard_is_told_but_must_refute(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    _idle(lab)
    lab.says(2, GOSSIP, c=lab.claim(1, 3, dead=True))
    lab.pass_s(6.0, answer={2, 3})
    assert lab.state(1) is State.DEAD
    lab.sent.clear()
    lab.says(1, PING, n=9)
    assert (1, 100, 0, wire.DEAD) in lab.claims_sent()
    assert lab.state(1) is State.DEAD
    lab.tells(1, lab.record(1, incarnation=101))
    assert lab.state(1) is State.ALIVE
    assert lab.kinds()[-1] is ChangeKind.ALIVE


def test_a_dead_claim_of_its_own_id_in_a_digest_is_refuted(lab: Lab) -> None:
    lab.joined(1)
    lab.says(1, SYNC, l=b"", h=b"", d=entry(0, state=wire.DEAD) + entry(1))
    assert lab.swim.record.incarnation == 101


def test_standing_still_makes_nobody_suspect(lab: Lab) -> None:
    lab.joined(1, 2, 3, 4)
    lab.swim.probe(lab.peer(1))
    lab.time += 30.0  # SIGSTOP; the answers wait in the sockets
    lab.swim.tick()
    assert lab.swim.counters["probes_failed"] == 0
    assert lab.swim.counters["away"] == 1
    assert lab.swim.awareness.score == 1
    lab.pass_s(10.0, answer=True)
    assert lab.kinds() == []
    assert lab.swim.counters["suspicions"] == 0


def test_standing_still_does_not_use_up_a_suspects_time(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    _idle(lab)
    lab.says(2, GOSSIP, c=lab.claim(1, 3, dead=True))
    lab.time += 60.0
    lab.swim.tick()
    assert lab.state(1) is State.SUSPECT
    lab.tells(1, lab.record(1, incarnation=101))
    lab.pass_s(10.0, answer=True)
    assert ChangeKind.DIED not in lab.kinds()


# --- restarts, replays, forgeries ---


def test_a_restarted_node_is_one_member_and_its_past_does_not_return(lab: Lab) -> None:
    old = lab.record(1, incarnation=100, revision=5, host="old")
    lab.tells(1, old)
    new = lab.record(1, incarnation=200, instance=b"restart.", host="new")
    lab.tells(1, new)
    for again in (old, lab.record(1, incarnation=199, revision=99, host="old")):
        lab.tells(2, again)
    assert len(lab.swim.members()) == 1
    member = lab.member(1)
    assert member is not None
    assert (member.record.host, member.state) == ("new", State.ALIVE)
    assert lab.swim.counters["stale"] == 2
    assert lab.verified == 2  # what is not newer is not verified


def test_a_restart_after_death_or_farewell_brings_it_back(lab: Lab) -> None:
    lab.joined(1, 2)
    lab.tells(1, lab.record(1, revision=1, left=True))
    assert lab.state(1) is State.LEFT
    lab.tells(2, lab.record(1, revision=2))  # the same instance does not come back
    assert lab.state(1) is State.LEFT
    lab.tells(1, lab.record(1, incarnation=101))
    assert lab.state(1) is State.ALIVE
    assert lab.kinds() == [ChangeKind.LEFT, ChangeKind.ALIVE]


def test_left_is_not_dead_and_cannot_be_claimed(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    lab.tells(2, lab.record(1, revision=1, left=True))
    assert (lab.state(1), lab.swim.size) == (State.LEFT, 3)
    lab.says(2, GOSSIP, c=lab.claim(1, 3, dead=True), d=entry(1, state=wire.DEAD))
    lab.pass_s(30.0, answer=True)
    assert lab.state(1) is State.LEFT
    assert not lab.frames(PING, 1)
    lab.says(2, GOSSIP, d=entry(3, revision=1, state=wire.LEFT))  # without 3's signature
    lab.tells(2)
    assert lab.state(3) is State.ALIVE


def test_a_forged_record_is_dropped_and_another_is_asked(lab: Lab) -> None:
    lab.joined(1, 2)
    lab.says(1, GOSSIP, d=entry(3))
    lab.says(2, GOSSIP, d=entry(3))
    good = cbor.decode(lab.record(3).encoded, bytes_max=9999)
    forged = cbor.encode(good | {"s": bytes(64)})
    sent = lab.tells(1, forged)
    assert lab.state(3) is None
    assert lab.swim.counters["forged"] == 1
    assert [(n, f["w"]) for n, f in sent if f["k"] == WANT] == [(2, raw(3))]
    lab.tells(2, lab.record(3))
    assert lab.state(3) is State.ALIVE


def test_forgeries_cost_their_sender_dearly() -> None:
    lab = Lab(records_burst=128, records_per_s=1.0)
    forged = cbor.encode(cbor.decode(lab.record(3).encoded, bytes_max=9999) | {"s": bytes(64)})
    for _ in range(100):
        lab.tells(1, forged)
    assert lab.swim.counters["forged"] <= 3
    lab.tells(2, lab.record(3))  # others are not affected
    assert lab.state(3) is State.ALIVE


def test_old_and_future_records_are_refused(lab: Lab) -> None:
    hour = 3600 * 1000
    lab.tells(2, lab.record(1, issued_ms=lab.unix_ms - hour - 1000))
    lab.tells(2, lab.record(3, issued_ms=lab.unix_ms + hour + 1000))
    assert lab.state(1) is None
    assert lab.state(3) is None
    assert lab.swim.counters["too_old"] == 2
    assert [record.peer for record in lab.old] == [lab.peer(1), lab.peer(3)]
    lab.tells(2, lab.record(1, issued_ms=lab.unix_ms - hour + 1000))
    assert lab.state(1) is State.ALIVE


def test_what_its_author_sends_is_no_recording(lab: Lab) -> None:
    """However wrong its clock is: how else would the two learn that their clocks differ?"""
    two_hours = 7200 * 1000
    for number, ahead_ms in ((1, two_hours), (2, -two_hours)):
        record = lab.record(number, issued_ms=lab.unix_ms + ahead_ms)
        lab.says(number, HAVE, r=[record.encoded], z=True, u=lab.unix_ms + ahead_ms)
        assert lab.state(number) is State.ALIVE
    assert lab.swim.clock_offsets_s == {lab.peer(1): 7200.0, lab.peer(2): -7200.0}
    assert lab.swim.counters["too_old"] == 0


def test_the_author_of_an_old_record_is_asked_itself(lab: Lab) -> None:
    lab.swim.peer_up(lab.peer(1))
    assert [f["w"] for f in lab.frames(WANT, 1)] == [raw(1)]
    lab.says(1, HAVE, z=True)  # it has nothing to say yet
    record = lab.record(1, issued_ms=lab.unix_ms - 7200 * 1000)
    sent = lab.tells(2, record)
    assert lab.state(1) is None
    assert [(n, f["w"]) for n, f in sent if f["k"] == WANT and n == 1] == [(1, raw(1))]
    lab.tells(1, record)
    assert lab.state(1) is State.ALIVE
    assert lab.old == []


def test_its_own_record_is_refuted_however_old_it_is(lab: Lab) -> None:
    """A node that was restored with an early incarnation, on a machine whose clock is right."""
    lab.joined(1)
    lab.tells(1, lab.record(0, incarnation=150, instance=b"before..", issued_ms=1))
    assert lab.swim.record.incarnation == 151


def test_a_record_without_a_certificate_is_refused_and_not_fetched_again(lab: Lab) -> None:
    lab.refused.add(lab.peer(1))
    lab.joined(2)
    lab.says(2, GOSSIP, d=entry(1))
    lab.tells(2, lab.record(1))
    assert lab.state(1) is None
    assert lab.swim.counters["refused"] == 1
    assert not [f for _, f in lab.says(2, GOSSIP, d=entry(1)) if f["k"] == WANT]
    assert not [f for _, f in lab.says(2, PING, n=1, d=entry(1)) if f["k"] == WANT]
    lab.time += 61.0
    lab.swim.tick()
    assert [f for _, f in lab.says(2, GOSSIP, d=entry(1)) if f["k"] == WANT]


def test_a_silent_peer_does_not_keep_a_record_from_being_fetched(lab: Lab) -> None:
    lab.joined(1, 2)
    lab.says(1, GOSSIP, d=entry(3))
    lab.says(2, GOSSIP, d=entry(3))
    assert not lab.frames(WANT, 2)
    lab.pass_s(2.1, answer=True)
    assert [f["w"] for f in lab.frames(WANT, 2)] == [raw(3)]


def test_a_false_version_does_not_hide_the_true_one(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    lab.says(1, GOSSIP, d=entry(3, incarnation=1 << 50))
    sent = lab.says(2, GOSSIP, d=entry(3, incarnation=101))
    assert [(n, f["w"]) for n, f in sent if f["k"] == WANT] == [(2, raw(3))]


# --- floods ---


def test_records_from_one_peer_are_rate_limited() -> None:
    lab = Lab(records_burst=5, records_per_s=1.0)
    records = [lab.record(n) for n in range(2, 22)]
    lab.tells(1, *records)
    assert len(lab.swim.members()) == 5
    assert lab.verified == 5
    assert lab.swim.counters["limited"] == 15
    lab.time += 3.0
    lab.tells(1, *records[-4:])
    assert len(lab.swim.members()) == 8


def test_frames_from_one_peer_are_rate_limited() -> None:
    lab = Lab(frames_burst=10, frames_per_s=1.0)
    for n in range(100):
        lab.says(1, PING, n=n)
    assert len(lab.frames(ACK)) <= 10
    assert lab.swim.counters["flooded"] >= 90


def test_claims_from_one_peer_are_rate_limited() -> None:
    lab = Lab(claims_burst=10, claims_per_s=1.0)
    lab.joined(*range(1, 30))
    _idle(lab)
    lab.says(40, GOSSIP, c=b"".join(lab.claim(n, 40) for n in range(1, 30)))
    assert lab.swim.counters["suspicions"] == 10


def test_what_one_peer_can_make_this_node_send_is_limited() -> None:
    lab = Lab(frames_burst=20, frames_per_s=1.0)
    for n in range(1, 8):
        lab.tells(n, lab.record(n, chain=bytes(4000)))
    sent = lab.says(9, WANT, w=b"".join(map(raw, range(1, 8))) * 50)
    assert sum(len(r) for _, f in sent for r in f.get("r", ())) < 21 * 1024


def test_the_table_is_bounded_and_the_longest_dead_makes_room() -> None:
    lab = Lab(members_max=4)
    for n in range(1, 5):
        lab.tells(n, lab.record(n))
    lab.tells(5, lab.record(5))
    assert lab.swim.counters["table_full"] == 1
    assert lab.state(5) is None
    for n in (2, 3):
        lab.tells(n, lab.record(n, revision=1, left=True))
        lab.time += 1.0
    lab.tells(6, lab.record(6))
    assert lab.state(2) is None
    assert lab.state(3) is State.LEFT
    assert lab.state(6) is State.ALIVE
    assert len(lab.swim.members()) == 4


def test_what_is_planned_to_be_fetched_is_bounded() -> None:
    lab = Lab(members_max=8)
    for n in range(2000):
        fake = wire.ENTRY.pack(n.to_bytes(32, "big"), 1, 0, 0)
        lab.says(1 + n % 3, GOSSIP, d=fake)
    assert len(lab.swim._fetching.pending) <= 4 * 8 + 3
    assert sum(len(s.queue) for s in lab.swim._sources._sources.values()) <= 3 * 8


# --- retention ---


def test_the_dead_are_remembered_so_that_they_do_not_rise(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    old = lab.record(1)
    _idle(lab)
    lab.says(2, GOSSIP, c=lab.claim(1, 3, dead=True))
    lab.pass_s(6.0, answer={2, 3})
    assert lab.state(1) is State.DEAD
    lab.tells(2, old)
    lab.says(2, GOSSIP, d=entry(1))
    assert lab.state(1) is State.DEAD
    lab.swim._table.nodes[raw(1)].since -= lab.config.retention_s + 1
    lab.pass_s(61.0, answer={2, 3})
    assert lab.state(1) is None
    assert lab.kinds()[-1] is ChangeKind.REMOVED


def test_an_evicted_node_is_gone_at_once(lab: Lab) -> None:
    lab.joined(1, 2)
    lab.refused.add(lab.peer(1))
    lab.swim.evict(lab.peer(1))
    assert lab.kinds() == [ChangeKind.REMOVED]
    assert lab.swim.size == 2
    lab.tells(2, lab.record(1, incarnation=101))
    assert lab.state(1) is None
    lab.pass_s(5.0, answer=True)
    assert not lab.frames(PING, 1)


# --- its own record ---


def test_load_is_published_at_leisure_and_everything_else_at_once(lab: Lab) -> None:
    lab.joined(1)
    lab.swim.update(load=2.0, memory_bytes=1 << 30)
    assert lab.swim.record.revision == 0
    lab.pass_s(31.0, answer=True)
    assert (lab.swim.record.revision, lab.swim.record.load) == (1, 2.0)
    lab.swim.update(load=2.01)  # not worth a rumour
    lab.pass_s(60.0, answer=True)
    assert lab.swim.record.revision == 1
    lab.swim.update(services=["pubsub"])
    assert (lab.swim.record.revision, lab.swim.record.services) == (2, ("pubsub",))
    lab.swim.update(services=("pubsub",))
    lab.swim.update(labels={"a": "b"})
    assert lab.swim.record.revision == 2
    lab.pass_s(1.1, answer=True)
    assert (lab.swim.record.revision, dict(lab.swim.record.labels)) == (3, {"a": "b"})
    assert lab.swim.record.load == 2.01
    with pytest.raises(TypeError):
        lab.swim.update(incarnation=1)


def test_the_record_is_kept_young(lab: Lab) -> None:
    lab.joined(1)
    oldest = 0
    for _ in range(12):
        lab.pass_s(300.0, answer=True)
        oldest = max(oldest, lab.unix_ms - lab.swim.record.issued_ms)
    assert oldest <= lab.config.record_age_s_max * 1000 / 3


def test_a_second_process_with_this_key_is_noticed(lab: Lab) -> None:
    lab.joined(1)
    lab.time += 5
    sent = lab.says(1, GOSSIP, d=entry(0, incarnation=150))
    assert [f["w"] for _, f in sent if f["k"] == WANT] == [raw(0)]
    other = lab.record(0, incarnation=150, instance=b"another!", host="elsewhere")
    lab.tells(1, other)
    assert lab.kinds() == [ChangeKind.DUPLICATE]
    assert lab.changes[0].member.record.host == "elsewhere"
    assert lab.swim.record.incarnation == 151
    assert lab.state(0) is None
    lab.tells(1, lab.record(0, incarnation=160, instance=b"another!"))
    assert lab.kinds() == [ChangeKind.DUPLICATE] * 2  # as long as it lives
    assert lab.swim.record.incarnation == 161


def test_a_member_s_word_that_another_process_has_this_key(lab: Lab) -> None:
    born_ms = lab.swim.record.issued_ms
    for issued_ms, kinds in ((born_ms - 1, 0), (born_ms + 1, 1)):  # one's own past is no proof
        lab.swim.met(lab.record(0, incarnation=1, instance=b"another!", issued_ms=issued_ms))
        assert lab.kinds() == [ChangeKind.DUPLICATE] * kinds
    lab.swim.met(lab.record(0, issued_ms=born_ms + 1))  # itself
    lab.swim.met(lab.record(1, issued_ms=born_ms + 1))  # of another node
    forged = cbor.decode(lab.record(0, instance=b"another!").encoded, bytes_max=9999)
    with pytest.raises(Forged):
        lab.swim.met(Record.parse(cbor.encode(forged | {"s": bytes(64)})))
    assert len(lab.kinds()) == 1


def test_a_process_that_comes_back_is_no_restart(lab: Lab) -> None:
    """Two with one key outdo each other; a node that restarts is another process each time."""
    for incarnation, instance in ((100, b"first..."), (101, b"restart."), (102, b"restart2")):
        lab.tells(1, lab.record(1, incarnation=incarnation, instance=instance))
    assert ChangeKind.DUPLICATE not in lab.kinds()
    lab.tells(1, lab.record(1, incarnation=103, instance=b"restart."))
    assert lab.kinds().count(ChangeKind.DUPLICATE) == 1


def test_its_own_record_from_before_a_restart_is_no_duplicate(lab: Lab) -> None:
    lab.joined(1)
    past = lab.record(0, incarnation=150, instance=b"before..", issued_ms=lab.unix_ms - 60_000)
    lab.tells(1, past)
    assert lab.kinds() == []
    assert lab.swim.record.incarnation == 151


def test_leaving_tells_the_others_and_ends_the_work(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    lab.swim.peer_up(lab.peer(2))
    lab.sent.clear()
    lab.swim.leave()
    assert lab.sent[0][0] == 2  # who is connected comes first
    assert {n for n, f in lab.sent if f["r"] == [lab.swim.record.encoded]} == {1, 2, 3}
    assert lab.swim.record.left
    assert lab.swim.due == float("inf")
    assert [f["k"] for _, f in lab.says(1, PING, n=1)] == [ACK]
    lab.says(1, GOSSIP, c=lab.claim(0, 2), d=entry(9))
    assert lab.swim.record.incarnation == 100


# --- push-pull and facts ---


def test_a_digest_transfers_only_what_is_missing(lab: Lab) -> None:
    lab.joined(1, 2, 3, 4)
    lab.tells(2, lab.record(2, revision=5))
    mine = lab.swim.record.order
    digest = b"".join(
        [entry(0, *mine), entry(1), entry(2, revision=3), entry(3, revision=1), entry(9)]
    )
    sent = lab.says(1, SYNC, l=b"", h=b"", d=digest)
    (offer,) = [f["d"] for n, f in sent if n == 1 and f["k"] == GOSSIP]
    assert {offer[at : at + 45] for at in range(0, len(offer), 45)} == {
        entry(2, revision=5),
        entry(4),
    }
    (want,) = [f["w"] for n, f in sent if f["k"] == WANT]
    assert sorted((want[:32], want[32:])) == sorted((raw(3), raw(9)))


def test_a_digest_of_a_range_says_nothing_of_the_rest(lab: Lab) -> None:
    lab.joined(*range(1, 10))
    keys = sorted(map(raw, range(10)))
    sent = lab.says(1, SYNC, l=keys[3], h=keys[6], d=b"")
    (offer,) = [f["d"] for _, f in sent if f["k"] == GOSSIP]
    assert [offer[at : at + 32] for at in range(0, len(offer), 45)] == [
        k for k in keys[3:6] if k != raw(1)
    ]


def test_both_ends_of_a_new_connection_sync_once(lab: Lab) -> None:
    lab.joined(1, 2)
    for n in (1, 2):
        lab.swim.peer_up(lab.peer(n))
        if raw(0) > raw(n):
            assert not lab.frames(SYNC, n)
            lab.says(n, SYNC, l=b"", h=b"", d=entry(n))
            lab.pass_s(4.0, answer=True)
            assert not lab.frames(SYNC, n)
        else:
            assert len(lab.frames(SYNC, n)) == 2  # the members, and the facts
    for _ in range(20):  # a connection that flaps
        lab.swim.peer_down(lab.peer(1))
        lab.swim.peer_up(lab.peer(1))
    lab.pass_s(4.0, answer=True)
    assert len(lab.frames(SYNC, 1)) <= 2
    lab.pass_s(2.0, answer=True)
    assert 2 <= len(lab.frames(SYNC, 1)) <= 4


def test_facts_are_fetched_adopted_and_passed_on(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    fact = b"a tombstone"
    sent = lab.says(1, GOSSIP, f=wire_digest(fact))
    assert [f["g"] for _, f in sent if f["k"] == WANT] == [wire_digest(fact)]
    lab.says(1, HAVE, b=[fact], z=True)
    assert list(lab.facts.values()) == [fact]
    lab.pass_s(1.0, answer=True)
    assert any(wire_digest(fact) in f.get("f", b"") for f in lab.frames(GOSSIP))
    assert [f["b"] for _, f in lab.says(2, WANT, g=wire_digest(fact))] == [[fact]]
    own = b"of this node"
    lab.facts[wire_digest(own)] = own
    (offer,) = [f for _, f in lab.says(3, SYNC, l=b"", h=b"", f=wire_digest(fact))]
    assert offer["f"] == wire_digest(own)


def test_a_bad_fact_is_refused_and_not_fetched_again(lab: Lab) -> None:
    fact = b"forged"
    lab.bad_facts.add(fact)
    lab.joined(1)
    lab.says(1, GOSSIP, f=wire_digest(fact))
    lab.says(1, HAVE, b=[fact], z=True)
    assert lab.swim.counters["facts_refused"] == 1
    assert not lab.says(1, GOSSIP, f=wire_digest(fact))


def test_long_answers_are_cut_into_frames(lab: Lab) -> None:
    for n in range(1, 60):
        lab.tells(n, lab.record(n, chain=bytes(4000)))
    lab.sent.clear()
    sent = lab.says(1, WANT, w=b"".join(map(raw, range(1, 60))))  # Lab checks every frame's length
    assert len(sent) > 3
    assert sum(len(f["r"]) for _, f in sent) == 59
    assert [f.get("z", False) for _, f in sent] == [False] * (len(sent) - 1) + [True]


# --- hostile frames ---


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff",
        cbor.encode([1]),
        cbor.encode({}),
        cbor.encode({"k": 99}),
        cbor.encode({"k": "1"}),
        cbor.encode({"k": True, "n": 1}),
        cbor.encode({"k": 1}),
        cbor.encode({"k": 1, "n": -1}),
        cbor.encode({"k": 4, "n": 1}),
        cbor.encode({"k": 4, "n": 1, "i": b"short"}),
        cbor.encode({"k": 2, "n": 1, "u": 1.5}),
        cbor.encode({"k": 5, "d": bytes(44)}),
        cbor.encode({"k": 5, "d": bytes(44) + b"\x04"}),
        cbor.encode({"k": 5, "d": bytes(32) + b"\xff" * 8 + bytes(5)}),
        cbor.encode({"k": 5, "c": bytes(73)}),
        cbor.encode({"k": 5, "f": bytes(15)}),
        cbor.encode({"k": 7, "w": bytes(31)}),
        cbor.encode({"k": 8, "r": b"x"}),
        cbor.encode({"k": 8, "r": ["x"]}),
        cbor.encode({"k": 8, "r": [b"x"]}),
        cbor.encode({"k": 8, "b": [bytes(20_000)]}),
        cbor.encode({"k": 8, "z": 1}),
        cbor.encode({"k": 6, "l": b"x", "d": b""}),
        bytes(70_000),
    ],
)  # fmt: skip
def test_a_hostile_frame_is_malformed_and_changes_nothing(lab: Lab, frame: bytes) -> None:
    lab.joined(1, 2)
    with pytest.raises(Malformed):
        lab.swim.receive(lab.peer(1), frame)
    assert not lab.sent
    assert not lab.changes


def test_a_peer_with_another_kind_of_key_is_malformed(lab: Lab) -> None:
    foreign: Any = type(lab.peer(1)).from_public_key_pb(b"\x08\x00\x12\x40" + bytes(64))
    with pytest.raises(Malformed):
        lab.swim.receive(foreign, cbor.encode({"k": 1, "n": 1}))
    lab.swim.peer_up(foreign)
    lab.swim.peer_down(foreign)
    lab.swim.unreachable(foreign)
    lab.swim.heard(foreign)
    lab.swim.evict(foreign)
    assert lab.swim.member(foreign) is None
    assert not lab.sent


def test_a_snapshot_does_not_change(lab: Lab) -> None:
    lab.joined(1, 2, 3)
    before = lab.swim.members()
    _idle(lab)
    lab.says(2, GOSSIP, c=lab.claim(1, 3))
    assert before[lab.peer(1)].state is State.ALIVE
    assert replace(before[lab.peer(1)], state=State.DEAD).state is State.DEAD
