"""Decoding of events, the rules by which rights hold, the journal, and the replica's own rules."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from eth_utils.crypto import keccak
from plugins.auth_evm.tests.chain.net import BOUNDS, FakeClock, raw
from plugins.auth_evm.tests.contract.chains import EVENTS, GENESIS_S, Acl, EvmChain, Reverted
from plugins.auth_evm.tests.contract.model import Model, encode_event, first_head
from plugins.auth_evm.tests.contract.people import ALICE, BOB, LAB, MEMBER, NODE, OWNER, ROOT, TEAM
from plugins.auth_evm.tests.contract.test_property import KEYS, PEOPLE, ROLES, SCOPES
from plugins.auth_evm.tests.contract.test_property import History as Walk

from wetware.errors import ConfigError, InvalidArgument
from wetware_auth_evm.chain import finality as finalities
from wetware_auth_evm.chain import replica as replica_module
from wetware_auth_evm.chain.addresses import parse_address
from wetware_auth_evm.chain.errors import BadLog, ChainRegressed
from wetware_auth_evm.chain.events import LAYOUTS, Event, decode, genesis, role_id, role_name
from wetware_auth_evm.chain.finality import Finality
from wetware_auth_evm.chain.replica import Replica, parse_state
from wetware_auth_evm.chain.state import UNTIL_FOREVER, State

CONTRACT = "0x" + "c0" * 20
ALICE_, BOB_ = raw(ALICE), raw(BOB)


def events_of(walk: Walk, steps: int) -> list[Event]:
    """Of a random history by the model's rules alone."""
    found: list[Event] = []
    for _ in range(steps):
        function, args, sender = walk.choose()
        try:
            made = walk.model.apply(function, args, sender, walk.now)
        except Reverted:
            continue
        for event in made:
            log = encode_event(CONTRACT, event)
            found.append(decode(log.topics, log.data))
        walk.acl.chain.time += walk.rng.choice([1, 1, 5, 30])
    return found


class Quiet:
    """A chain that is only asked for its time."""

    chain_id, time, name = 31337, GENESIS_S, "none"


def a_walk(seed: int) -> tuple[Walk, list[Event]]:
    acl: Any = object.__new__(Acl)
    acl.chain, acl.address, acl.logs = Quiet(), CONTRACT, []
    walk = Walk(acl, random.Random(seed), Model(31337, CONTRACT, OWNER))
    first = encode_event(CONTRACT, walk.model._pending[0])
    return walk, [decode(first.topics, first.data)]


# --- decoding -----------------------------------------------------------------------------------


def test_every_event_of_the_contract_is_known_and_no_other() -> None:
    assert set(LAYOUTS) == set(EVENTS)
    for topic, layout in LAYOUTS.items():
        plain = [i for i in EVENTS[topic]["inputs"] if not i["indexed"]]
        kinds = {"uint": "uint", "address": "address", "bytes32": "bytes32"}
        assert layout.name == EVENTS[topic]["name"]
        assert [kinds[kind] for _, kind, _ in layout.fields] == [
            i["type"].rstrip("0123456789") if i["type"] != "bytes32" else "bytes32" for i in plain
        ]


def test_the_first_hash_is_the_contracts() -> None:
    assert genesis(31337, raw(CONTRACT)) == first_head(31337, CONTRACT)


@functools.cache  # not at the import: each process that collects tests would make them
def _logs() -> dict[str, Event]:
    walk, events = a_walk(7)
    events += events_of(walk, 600)
    by_name = {event.name: event for event in events}
    assert set(by_name) == {layout.name for layout in LAYOUTS.values()}
    return by_name


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS.values()])
def test_a_log_is_taken_in_one_form_only(name: str) -> None:
    """Longer, shorter, wider: each is refused, for each word of each event."""
    event = _logs()[name]
    topics = tuple(event.raw[at : at + 32] for at in range(0, 128, 32))
    body = event.raw[128:]
    assert decode(topics, body) == event
    assert keccak(event.raw) == event.leaf
    for wrong in (
        (topics[:3], body),
        ((*topics, bytes(32)), body),
        ((b"\0" * 32, *topics[1:]), body),
        ((topics[0][:31], *topics[1:]), body),
        (topics, body + bytes(32)),
        (topics, body + b"\0"),
        *([(topics, body[:-1]), (topics, body[:-32])] if body else []),
    ):
        with pytest.raises(BadLog):
            decode(*wrong)
    for index in (1, 2):
        wide = list(topics)
        wide[index] = b"\1" + topics[index][1:]
        with pytest.raises(BadLog):
            decode(tuple(wide), body)
    for number, (label, kind, bits) in enumerate(LAYOUTS[topics[0]].fields):
        if kind == "bytes32":
            continue
        at = 32 * number + 31 - bits // 8  # the byte above the value
        wider = bytearray(body)
        wider[at] |= 1
        with pytest.raises(BadLog, match=label):
            decode(topics, bytes(wider))


def test_role_names() -> None:
    assert role_name(role_id("ärger")) == "ärger"
    for bad in ("", "a\0b", "x" * 33, "ä" * 17):
        with pytest.raises(ValueError):
            role_id(bad)
    for bad_bytes in (bytes(32), b"\xff" * 32, b"a\0b".ljust(32, b"\0")):
        assert role_name(bad_bytes) is None


@pytest.mark.parametrize("size", [0, 63, 64, 192, 223, 225, 256])
def test_a_state_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError):
        parse_state(bytes(size))
    with pytest.raises(ValueError):
        parse_state(b"\1" + bytes(223))
    assert parse_state(bytes(31) + b"\5" + b"h" * 32 + bytes(160)) == (5, b"h" * 32)


def test_addresses_as_people_write_them() -> None:
    assert parse_address(ALICE) == parse_address(ALICE.lower()) == ALICE_
    swapped = ALICE[:2] + ALICE[2:].swapcase()
    for bad in (
        swapped,
        ALICE[:-1],
        ALICE + "0",
        ALICE[2:],
        "0x" + "zz" * 20,
        "",
        "0x" + " a" * 20,
    ):
        with pytest.raises(InvalidArgument):
            parse_address(bad)


# --- the rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_random_histories_hold_what_the_model_holds(seed: int) -> None:
    """At many times, also before, after and between; the model was compared with the contract."""
    walk, events = a_walk(seed)
    state = State(31337, raw(CONTRACT))
    state.apply(events[0])
    for _ in range(60):
        for event in events_of(walk, 10):
            state.apply(event)
        model = walk.model
        assert (state.seq, state.head, state.paused) == (model.seq, model.head, model.paused)
        assert state.owner == raw(model.owner)
        times = [walk.now, *(walk.now + walk.rng.choice([1, 20, 99, 300, 5000]) for _ in range(2))]
        times.append(min((g.expiry for g in model.grants.values()), default=walk.now))
        for now in times:
            for scope in SCOPES:
                for who in PEOPLE:
                    roles = state.roles(scope, raw(who), now)
                    for role in ROLES:
                        name = (scope, role, who)
                        assert state.rights(scope, role, raw(who), now) == model.rights(name, now)
                        assert roles.get(role, 0) == model.rights(name, now)
                        for key in KEYS:
                            mask = model.key_rights(name, key, now)
                            assert state.key_rights(scope, role, raw(who), key, now) == mask
                            found = state.key_roles(scope, raw(who), key, now)
                            assert found.get(role, 0) == mask
                            accounts = state.key_accounts(scope, role, key, now)
                            assert accounts.get(raw(who), 0) == mask


@pytest.mark.parametrize("seed", range(5))
def test_nothing_changes_before_the_next_end(seed: int) -> None:
    """Until `next_end`, what an account holds stays; there, it changes or is told to look again."""
    walk, events = a_walk(seed + 50)
    events += events_of(walk, 300)
    state = State(31337, raw(CONTRACT))
    for event in events:
        state.apply(event)
    ended = 0
    for scope in SCOPES:
        for who in map(raw, PEOPLE):
            now = walk.now
            for _ in range(20):
                end = state.next_end(scope, who, now)
                assert end > now
                if end == UNTIL_FOREVER:
                    break
                assert state.roles(scope, who, end - 1) == state.roles(scope, who, now)
                ended += state.roles(scope, who, end) != state.roles(scope, who, now)
                now = end
    assert ended or state.paused


def everything(state: State) -> tuple[Any, ...]:
    tables = [
        {key: dict(inner) for key, inner in table.items() if inner}
        for table in (state.grants, state.admins, state.keys)
    ]
    epochs = (dict(state.account_epochs), dict(state.scope_epochs))
    return (state.seq, state.head, state.owner, state.pending, state.paused, *tables, *epochs)


@pytest.mark.parametrize("seed", range(5))
def test_the_journal_undoes_any_history_to_any_mark(seed: int) -> None:
    walk, events = a_walk(seed + 100)
    events += events_of(walk, 300)
    rng = random.Random(seed)
    state = State(31337, raw(CONTRACT), journal=True)
    plain = State(31337, raw(CONTRACT))
    seen = [(state.mark(), everything(plain))]
    copies = []
    for event in events:
        state.apply(event)
        plain.apply(event)
        seen.append((state.mark(), everything(plain)))
        if rng.random() < 0.05:
            copies.append((state.copy(journal=True), len(seen) - 1))
    assert everything(state) == seen[-1][1]
    at = len(events)
    while at > 0:
        at = rng.randrange(at)
        state.rollback(seen[at][0])
        assert everything(state) == seen[at][1]
        back = min(len(events), at + rng.randrange(5))
        for event in events[at:back]:
            state.apply(event)
        assert everything(state) == seen[back][1]
        state.rollback(seen[at][0])
    for copy, number in copies:
        assert everything(copy) == seen[number][1], "a copy shares nothing that changes"


def test_an_event_out_of_order_changes_nothing() -> None:
    walk, events = a_walk(3)
    events += events_of(walk, 50)
    state = State(31337, raw(CONTRACT))
    for wrong in (events[1], events[5]):
        with pytest.raises(BadLog):
            state.apply(wrong)
    assert everything(state) == everything(State(31337, raw(CONTRACT)))
    with pytest.raises(TypeError):
        state.rollback(0)


@pytest.mark.parametrize("seed", range(3))
def test_what_withdraws_names_everybody_who_loses(seed: int) -> None:
    """`withdraws` against the model: whoever has less after an event is in its answer."""
    walk, events = a_walk(seed + 200)
    state = State(31337, raw(CONTRACT))
    events += events_of(walk, 500)
    lost = 0
    for event in events:
        withdraws = state.withdraws(event)
        now = GENESIS_S + event.seq
        before = {
            (scope, who): (
                state.standing(scope, who, now),
                [state.key_standing(scope, who, key, now) for key in KEYS],
            )
            for scope in SCOPES
            for who in map(raw, PEOPLE)
        }
        state.apply(event)
        for (scope, who), (held, by_key) in before.items():
            after = state.standing(scope, who, now)
            by_key_after = [state.key_standing(scope, who, key, now) for key in KEYS]
            less = any(not _covered(item, after) for item in held) or any(
                not _covered(item, then)
                for items, then in zip(by_key, by_key_after, strict=True)
                for item in items
            )
            lost += less
            assert not less or withdraws is None or who in withdraws, event.name
    assert lost > 10


def _covered(item: Any, after: list[Any]) -> bool:
    mask = 0
    for role, not_before, rights in after:
        if role == item.role and not_before <= item.not_before:
            mask |= rights
    return item.rights & ~mask == 0


# --- the replica --------------------------------------------------------------------------------


def replica_of(events: list[Event]) -> Replica:
    replica = Replica(31337, raw(CONTRACT), TEAM, bounds=BOUNDS, clock=FakeClock())
    advance(replica, 1, events)
    return replica


def advance(replica: Replica, number: int, events: list[Event], *, settle: bool = True) -> None:
    state = State(31337, raw(CONTRACT))
    for event in events:
        state.apply(event)
    replica.set_tip(number, state.seq, state.head, events)
    if settle:
        replica.settle(number, bytes(32), state.seq, state.head)
    replica.verified(number, bytes(32), int(replica._clock.time()))


def test_tips_that_do_not_lead_to_the_stated_hash_change_nothing() -> None:
    walk, events = a_walk(11)
    events += events_of(walk, 80)
    replica = replica_of(events[:20])
    advance(replica, 2, events[:30], settle=False)
    before = everything(replica.tip)
    goal = State(31337, raw(CONTRACT))
    for event in events[:40]:
        goal.apply(event)
    for wrong in ([], events[:39], events[21:40], events[:25] + events[26:40], events[40:]):
        with pytest.raises(BadLog):
            replica.set_tip(3, goal.seq, goal.head, wrong)
        assert everything(replica.tip) == before
    with pytest.raises(BadLog):
        replica.set_tip(3, goal.seq, b"\0" * 32, events)
    assert everything(replica.tip) == before
    replica.set_tip(3, goal.seq, goal.head, events)  # more than needed is no harm
    assert everything(replica.tip) == everything(goal)


def test_a_final_state_that_goes_back_is_a_regression() -> None:
    walk, events = a_walk(12)
    events += events_of(walk, 60)
    replica = replica_of(events[:20])
    with pytest.raises(ChainRegressed):
        replica.settle(2, bytes(32), 19, bytes(32))
    with pytest.raises(ChainRegressed):
        replica.settle(2, bytes(32), 20, bytes(32))
    with pytest.raises(BadLog):
        replica.settle(2, bytes(32), 25, bytes(32))
    assert replica.final_block[0] == 1


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_settling_in_any_steps_leads_to_the_same(
    seed: int, monkeypatch: pytest.MonkeyPatch, *, bulk: bool
) -> None:
    """By the journal or by copies: `tip`, `final` and what withdrawals left are the same."""
    monkeypatch.setattr(replica_module, "COPIED_EVENTS_MIN", 3 if bulk else 10**9)
    walk, events = a_walk(seed + 300)
    events += events_of(walk, 250)
    rng = random.Random(seed)
    replica = Replica(31337, raw(CONTRACT), TEAM, bounds=BOUNDS, clock=FakeClock())
    states = [State(31337, raw(CONTRACT))]
    for event in events:
        states.append(states[-1].copy(journal=False))
        states[-1].apply(event)
    final = tip = number = 0
    while final < len(events):
        tip = min(len(events), max(final, tip + rng.randrange(-4, 12)))
        final = rng.randint(final, tip)
        number += 1
        replica.set_tip(number, tip, states[tip].head, events)
        replica.settle(number, bytes(32), final, states[final].head)
        replica.verified(number, bytes(32), GENESIS_S)
        assert everything(replica.tip) == everything(states[tip])
        assert everything(replica.final) == everything(states[final])
        assert [e.seq for e in replica.unsettled] == list(range(final + 1, tip + 1))
        anew = Replica(31337, raw(CONTRACT), TEAM, bounds=BOUNDS, clock=FakeClock())
        anew.restore(
            states[final].copy(journal=False),
            replica.final_block,
            tip_block=replica.tip_block,
            unsettled=replica.unsettled,
            held=replica.held,
            regressed="",
        )
        assert (anew._left, anew._pausing) == (replica._left, replica._pausing)


def test_too_many_held_accounts_hold_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "HELD_MAX", 2)
    replica = Replica(31337, raw(CONTRACT), TEAM, bounds=BOUNDS, clock=FakeClock())
    for number in range(3):
        replica._hold(bytes([number]) * 20, 5)
    assert set(replica.held) == {bytes(20), b"\1" * 20, None}
    assert replica.is_held(BOB_)


def test_a_grant_of_another_scope_gives_and_holds_nothing() -> None:
    chain = EvmChain()
    acl = Acl.deploy(chain, OWNER)
    end = chain.time + 1000
    acl.send("grant", LAB, MEMBER, ALICE, 0, end, 1, sender=OWNER)
    acl.send("grant", ROOT, NODE, ALICE, 0, end, 1, sender=OWNER)
    events = [decode(log.topics, log.data) for log in acl.logs]
    replica = Replica(chain.chain_id, raw(acl.address), TEAM, bounds=BOUNDS, clock=FakeClock())
    seq, head = acl.call("state")[:2]
    replica.set_tip(1, seq, head, events)
    replica.settle(1, bytes(32), seq, head)
    replica.verified(1, bytes(32), chain.time)
    replica._clock.wall_s = chain.time  # type: ignore[attr-defined]
    assert replica.roles(ALICE_) == {NODE: 1}


# --- finality profiles --------------------------------------------------------------------------


def test_every_chain_profile_is_sound() -> None:
    names = {"mainnet", "sepolia", "base", "optimism", "arbitrum", "gnosis", "polygon", "dev"}
    assert set(finalities.PROFILES) == names
    for name, profile in finalities.PROFILES.items():
        assert (profile.name, finalities.by_name(name)) == (name, profile)
        assert len(profile.why) > 60, "each number has its reason"
        assert profile.bounds.verified_s_max >= 10 * profile.poll_s
        if profile.production:
            assert profile.finality.kind == "finalized"
            assert profile.bounds.tip_age_s_max is not None
            assert profile.final_poll_s >= profile.poll_s
            assert finalities.for_chain(profile.chain_id) is profile
    assert finalities.for_chain(31337) is finalities.for_chain(0) is None
    with pytest.raises(ConfigError) as caught:
        finalities.by_name("ropsten")
    assert "mainnet" in caught.value.hint


def test_finality_as_it_is_written() -> None:
    for text in ("finalized", "latest", "depth:64"):
        assert str(Finality.parse(text)) == text
    for bad in (
        "",
        "safe",
        "depth",
        "depth:",
        "depth:0",
        "depth:-1",
        "depth:1e3",
        "latest:1",
        "depth:٣",
    ):
        with pytest.raises(ConfigError):
            Finality.parse(bad)


def test_try_out_finality_is_refused_where_it_is_not_safe() -> None:
    latest, local = Finality("latest"), "http://127.0.0.1:8545"
    finalities.check_try_out(latest, 31337, [local, "http://[::1]:1", "http://localhost:2"])
    finalities.check_try_out(Finality("finalized"), 1, ["https://example.org"])
    with pytest.raises(ConfigError, match="on mainnet"):
        finalities.check_try_out(latest, 1, [local])
    for elsewhere in ("http://10.0.0.1", "http://127.0.0.1.example.org", "http://localhost.a", "x"):
        with pytest.raises(ConfigError, match="not on this machine"):
            finalities.check_try_out(latest, 31337, [local, elsewhere])


def test_a_quorum_is_a_majority() -> None:
    assert [finalities.quorum_default(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 2, 3, 3]
