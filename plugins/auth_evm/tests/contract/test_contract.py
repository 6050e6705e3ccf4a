"""Every function, every refusal and every event of WetwareACL, on py-evm and on anvil.

Each test takes the contract alone: `test_branches.py` runs all of them again, watched.
"""

from __future__ import annotations

from typing import Any

import pytest
from eth_utils.address import to_canonical_address
from eth_utils.crypto import keccak

from .chains import ARTIFACT, FUNCTIONS, Acl, Event, Reverted, calldata
from .model import (
    MAX_BATCH,
    MAX_KEYS,
    MAX_TTL_S,
    OWNER_DELAY_S,
    OWNER_WINDOW_S,
    Replay,
    first_head,
    next_head,
)
from .people import (
    ADMIN,
    ADMIN_2,
    ALICE,
    ALL,
    ANY,
    BOB,
    CAROL,
    GUARDIAN,
    KEY,
    KEY_2,
    LAB,
    MEMBER,
    NOBODY,
    NODE,
    OWNER,
    ROOT,
    STRANGER,
    TEAM,
    word,
)

HOUR_S = 3600
DAY_S = 24 * HOUR_S


def refused(acl: Acl, function: str, *args: Any, sender: str) -> tuple[Any, ...]:
    """The error's name and values; the state has not changed."""
    before = (acl.slot(0), acl.slot(1), acl.slot(2))
    with pytest.raises(Reverted) as caught:
        acl.send(function, *args, sender=sender)
    assert (acl.slot(0), acl.slot(1), acl.slot(2)) == before
    return (caught.value.name, *caught.value.values)


def give(
    acl: Acl,
    account: str,
    *,
    role: bytes = MEMBER,
    scope: bytes = TEAM,
    rights: int = 7,
    ttl_s: int = DAY_S,
    starts: int = 0,
    sender: str = OWNER,
) -> dict[str, Any]:
    """Grant; returns the event's fields."""
    expiry = acl.chain.time + ttl_s
    (event,) = acl.send("grant", scope, role, account, starts, expiry, rights, sender=sender)
    assert event.name == "Granted"
    return event.fields


def appoint(
    acl: Acl,
    account: str,
    *,
    role: bytes = MEMBER,
    scope: bytes = TEAM,
    rights: int = 7,
    ttl_s: int = 2 * DAY_S,
) -> dict[str, Any]:
    (event,) = acl.send(
        "setAdmin", scope, role, account, acl.chain.time + ttl_s, rights, sender=OWNER
    )
    assert event.name == "AdminSet"
    return event.fields


def rights(acl: Acl, account: str, *, role: bytes = MEMBER, scope: bytes = TEAM) -> int:
    value: int = acl.call("rightsOf", scope, role, account)
    return value


# --- deployment, storage, history ----------------------------------------------------------------


def test_deployment_is_the_first_entry_of_the_history(acl: Acl) -> None:
    (log,) = acl.logs
    head = next_head(first_head(acl.chain.chain_id, acl.address), log)
    state = acl.call("state")
    assert state == (1, head, acl.last.block, OWNER, False, NOBODY, 0)
    assert [acl.call(name) for name in ("seq", "head", "changedAt", "owner", "paused")] == [
        *state[:5]
    ]
    assert (acl.call("pendingOwner"), acl.call("ownerReadyAt")) == (NOBODY, 0)


def test_the_owner_need_not_be_the_deployer(acl: Acl) -> None:
    other = Acl.deploy(acl.chain, ALICE, sender=BOB)
    assert other.call("owner") == ALICE
    assert other.address != acl.address
    # Two deployments have no head in common, though their events are the same.
    assert other.call("head") != Acl.deploy(acl.chain, ALICE, sender=BOB).call("head")


def test_deployment_without_an_owner_is_refused(acl: Acl) -> None:
    with pytest.raises(Reverted) as caught:
        Acl.deploy(acl.chain, NOBODY, sender=BOB)
    assert caught.value.name == "ZeroAccount"


def test_deployment_checks_what_follows_the_code(acl: Acl) -> None:
    code = bytes.fromhex(ARTIFACT["bytecode"][2:])
    owner = bytes(12) + to_canonical_address(ALICE)
    for argument, value in ((owner[:-1], 0), (b"\1" + owner[1:], 0), (b"", 0), (owner, 1)):
        with pytest.raises(Reverted) as caught:
            acl.chain.send(None, code + argument, ALICE, value=value)
        assert caught.value.name == ""


def test_constants(acl: Acl) -> None:
    expected = {
        "ROOT": bytes(32),
        "ANY": bytes(32),
        "GUARDIAN": word("guardian"),
        "VERSION": word("WetwareACL/1"),
        "MAX_TTL": MAX_TTL_S,
        "OWNER_DELAY": OWNER_DELAY_S,
        "OWNER_WINDOW": OWNER_WINDOW_S,
        "MAX_BATCH": MAX_BATCH,
        "MAX_KEYS": MAX_KEYS,
    }
    assert {name: acl.call(name) for name in expected} == expected


def test_the_code_on_chain_is_the_one_in_the_artifact(acl: Acl) -> None:
    code = acl.chain.code(acl.address)
    assert "0x" + keccak(code).hex() == ARTIFACT["runtimeKeccak256"]
    assert len(code) == ARTIFACT["runtimeBytes"]
    # Deployed by another account, with another owner, it is the same.
    assert acl.chain.code(Acl.deploy(acl.chain, BOB).address) == code


def test_two_slots_commit_to_the_history(acl: Acl) -> None:
    give(acl, ALICE)
    appoint(acl, ADMIN)
    give(acl, BOB, rights=1, sender=ADMIN)
    acl.send("pause", sender=OWNER)
    replay = Replay(acl.chain.chain_id, acl.address, acl.logs)
    slot = int.from_bytes(acl.slot(0), "big")
    assert slot & (2**160 - 1) == int(OWNER, 16)
    assert slot >> 160 & 0xFF == 1
    assert slot >> 168 & (2**48 - 1) == replay.seq == 5
    assert slot >> 216 == acl.last.block
    assert acl.slot(1) == replay.head
    # A log that is hidden, changed or moved gives another head.
    first, second, third, *rest = acl.logs
    for logs in ([first, third, second, *rest], [*acl.logs[:-1]]):
        head = first_head(acl.chain.chain_id, acl.address)
        for log in logs:
            head = next_head(head, log)
        assert head != replay.head


def _mapping_slot(key: bytes, slot: int) -> int:
    return int.from_bytes(keccak(key + slot.to_bytes(32, "big")), "big")


def test_records_are_where_the_reference_says(acl: Acl) -> None:
    admin = appoint(acl, ADMIN, role=ANY, scope=ROOT)
    granted = give(acl, ALICE, starts=5, sender=ADMIN)
    (bound,) = acl.send("bindKey", TEAM, [MEMBER], KEY, acl.chain.time + 60, sender=ALICE)
    acl.send("resetScope", LAB, sender=OWNER)
    acl.send("revokeAll", BOB, sender=OWNER)
    acl.send("proposeOwner", CAROL, sender=OWNER)

    def word_at(slot: int) -> int:
        return int.from_bytes(acl.slot(slot), "big")

    def account(who: str) -> bytes:
        return bytes(12) + to_canonical_address(who)

    grant = _mapping_slot(keccak(TEAM + MEMBER + account(ALICE)), 3)
    value = word_at(grant)
    assert value & (2**40 - 1) == granted["notBefore"] == 5
    assert value >> 40 & (2**40 - 1) == granted["expiry"]
    assert value >> 80 & (2**48 - 1) == granted["serial"]
    assert value >> 128 == granted["rights"]
    assert word_at(grant + 1) == int(ADMIN, 16) | 3 << 160
    value = word_at(_mapping_slot(keccak(ROOT + ANY + account(ADMIN)), 4))
    assert value == admin["expiry"] | admin["serial"] << 40 | admin["rights"] << 88
    value = word_at(_mapping_slot(keccak(TEAM + MEMBER + account(ALICE) + KEY), 5))
    assert value == bound.fields["expiry"] | bound.fields["seq"] << 40
    assert word_at(_mapping_slot(account(ALICE), 6)) == 1 << 48
    assert word_at(_mapping_slot(account(BOB), 6)) == 6
    assert word_at(_mapping_slot(LAB, 7)) == 5
    assert word_at(2) == int(CAROL, 16) | acl.call("ownerReadyAt") << 160


def test_changed_at_is_the_block_of_the_last_change(acl: Acl) -> None:
    give(acl, ALICE)
    block = acl.last.block
    assert acl.call("changedAt") == block
    refused(acl, "unpause", sender=OWNER)
    assert acl.call("changedAt") == block
    give(acl, ALICE)
    assert acl.call("changedAt") == acl.last.block > block


# --- grant ---------------------------------------------------------------------------------------


def test_grant(acl: Acl) -> None:
    expiry = acl.chain.time + HOUR_S
    events = acl.send("grant", TEAM, MEMBER, ALICE, 3, expiry, 5, sender=OWNER)
    assert events == [
        Event(
            "Granted",
            {
                "seq": 2,
                "account": ALICE,
                "scope": TEAM,
                "role": MEMBER,
                "notBefore": 3,
                "expiry": expiry,
                "rights": 5,
                "serial": 2,
                "by": NOBODY,
                "via": 0,
            },
        )
    ]
    assert acl.call("grantOf", TEAM, MEMBER, ALICE) == (3, expiry, 2, 5, NOBODY, 0)
    assert acl.call("effective", TEAM, MEMBER, ALICE) == (5, expiry)
    assert rights(acl, ALICE) == 5
    # Nobody else, no other role, no other scope.
    assert rights(acl, BOB) == rights(acl, ALICE, role=NODE) == rights(acl, ALICE, scope=LAB) == 0


def test_can_wants_all_the_rights_asked_for(acl: Acl) -> None:
    give(acl, ALICE, rights=5)
    answers = {n: acl.call("can", TEAM, MEMBER, ALICE, n) for n in (0, 1, 2, 4, 5, 7, ALL)}
    assert answers == {0: False, 1: True, 2: False, 4: True, 5: True, 7: False, ALL: False}
    assert not acl.call("can", TEAM, MEMBER, BOB, 0)


def test_a_grant_holds_from_not_before_until_before_expiry(acl: Acl) -> None:
    start = acl.chain.time + 100
    give(acl, ALICE, starts=start, ttl_s=200)
    expiry = acl.call("grantOf", TEAM, MEMBER, ALICE)[1]
    for now, expected in ((start - 1, 0), (start, 7), (expiry - 1, 7), (expiry, 0)):
        acl.chain.time = now
        assert rights(acl, ALICE) == expected


def test_a_grant_in_root_holds_in_every_scope_and_adds_up(acl: Acl) -> None:
    give(acl, ALICE, scope=ROOT, rights=1)
    give(acl, ALICE, scope=TEAM, rights=4)
    assert rights(acl, ALICE, scope=TEAM) == 5
    assert rights(acl, ALICE, scope=LAB) == rights(acl, ALICE, scope=ROOT) == 1
    assert acl.call("effective", TEAM, MEMBER, ALICE)[0] == 4


def test_renewal_changes_bounds_and_keeps_the_serial(acl: Acl) -> None:
    first = give(acl, ALICE, rights=1)
    second = give(acl, ALICE, rights=6, ttl_s=2 * DAY_S)
    assert second["serial"] == first["serial"] < second["seq"]
    assert rights(acl, ALICE) == 6
    # One that is still to begin stands, too.
    starts = acl.chain.time + HOUR_S
    first = give(acl, BOB, starts=starts)
    assert give(acl, BOB, starts=starts)["serial"] == first["serial"]


@pytest.mark.parametrize("end", ["revoke", "revokeAll", "resetScope", "expiry"])
def test_what_has_ended_begins_anew_with_a_new_serial(acl: Acl, end: str) -> None:
    first = give(acl, ALICE, ttl_s=HOUR_S)
    match end:
        case "revoke":
            acl.send("revoke", TEAM, MEMBER, ALICE, sender=OWNER)
        case "revokeAll":
            acl.send("revokeAll", ALICE, sender=OWNER)
        case "resetScope":
            acl.send("resetScope", TEAM, sender=OWNER)
        case _:
            acl.chain.time += HOUR_S
    assert rights(acl, ALICE) == 0
    second = give(acl, ALICE)
    assert second["serial"] == second["seq"] > first["serial"]
    assert rights(acl, ALICE) == 7


def test_grant_refuses_what_makes_no_sense(acl: Acl) -> None:
    good = (TEAM, MEMBER, ALICE, 0, acl.chain.time + HOUR_S, 1)

    def changed(place: int, value: Any) -> tuple[Any, ...]:
        return (*good[:place], value, *good[place + 1 :])

    def answer(place: int, value: Any) -> tuple[Any, ...]:
        return refused(acl, "grant", *changed(place, value), sender=OWNER)

    assert answer(1, ANY) == ("ZeroRole",)
    assert answer(2, NOBODY) == ("ZeroAccount",)
    assert answer(5, 0) == ("ZeroRights",)
    for early in (0, acl.chain.time + 1):  # at the latter, it is that late
        now = acl.chain.time
        assert answer(4, early) == ("ExpiryTooEarly", early, now)
    far = acl.chain.time + MAX_TTL_S
    assert answer(4, far + 1) == ("ExpiryTooLate", far + 1, far)
    assert answer(3, good[4]) == ("ExpiryTooEarly", good[4], good[4])
    # The bounds themselves are allowed.
    acl.send("grant", *changed(4, acl.chain.time + MAX_TTL_S), sender=OWNER)
    acl.send("grant", *changed(4, acl.chain.time + 1), sender=OWNER)


def test_strangers_grant_nothing(acl: Acl) -> None:
    item = (TEAM, MEMBER, STRANGER, 0, acl.chain.time + HOUR_S, 1)
    for sender in (STRANGER, ALICE):
        give(acl, ALICE)  # a role does not entitle to grant it
        assert refused(acl, "grant", *item, sender=sender) == ("NotAdmin", TEAM, MEMBER, sender)
        with pytest.raises(Reverted, match="NotAdmin"):
            acl.send("grantMany", [item], sender=sender)


# --- grantMany -----------------------------------------------------------------------------------


def test_grant_many_is_all_or_nothing(acl: Acl) -> None:
    expiry = acl.chain.time + HOUR_S
    items = [(TEAM, MEMBER, who, 0, expiry, 1 + n) for n, who in enumerate((ALICE, BOB, CAROL))]
    events = acl.send("grantMany", items, sender=OWNER)
    assert [e.fields["account"] for e in events] == [ALICE, BOB, CAROL]
    assert [e.fields["seq"] for e in events] == [2, 3, 4]
    assert [rights(acl, who) for who in (ALICE, BOB, CAROL)] == [1, 2, 3]
    bad = [
        *((TEAM, NODE, who, 0, expiry, 1) for who in (ALICE, BOB)),
        (TEAM, NODE, NOBODY, 0, expiry, 1),
    ]
    assert refused(acl, "grantMany", bad, sender=OWNER) == ("ZeroAccount",)
    assert rights(acl, ALICE, role=NODE) == 0
    # The later of two for one account counts.
    acl.send("grantMany", [(*items[0][:5], 8), (*items[0][:5], 16)], sender=OWNER)
    assert rights(acl, ALICE) == 16


def test_grant_many_is_bounded(acl: Acl) -> None:
    expiry = acl.chain.time + HOUR_S

    def items(count: int) -> list[tuple[Any, ...]]:
        return [(TEAM, MEMBER, f"0x{n + 1:040x}", 0, expiry, 1) for n in range(count)]

    assert refused(acl, "grantMany", [], sender=OWNER) == ("BadBatch", 0)
    over = MAX_BATCH + 1
    assert refused(acl, "grantMany", items(over), sender=OWNER) == ("BadBatch", over)
    assert len(acl.send("grantMany", items(MAX_BATCH), sender=OWNER)) == MAX_BATCH
    assert acl.last.gas < 2**24
    assert acl.slot(1) == Replay(acl.chain.chain_id, acl.address, acl.logs).head


# --- setAdmin and what admins can do -------------------------------------------------------------


def test_set_admin(acl: Acl) -> None:
    expiry = acl.chain.time + HOUR_S
    events = acl.send("setAdmin", TEAM, MEMBER, ADMIN, expiry, 3, sender=OWNER)
    fields = {"seq": 2, "account": ADMIN, "scope": TEAM, "role": MEMBER, "expiry": expiry}
    assert events == [Event("AdminSet", {**fields, "rights": 3, "serial": 2, "by": OWNER})]
    assert acl.call("adminOf", TEAM, MEMBER, ADMIN) == (expiry, 2, 3)
    # To administer a role is not to hold it.
    assert rights(acl, ADMIN) == 0


def test_set_admin_removes(acl: Acl) -> None:
    appoint(acl, ADMIN)
    (event,) = acl.send("setAdmin", TEAM, MEMBER, ADMIN, 0, 0, sender=OWNER)
    fields = {"seq": 3, "account": ADMIN, "scope": TEAM, "role": MEMBER, "expiry": 0, "rights": 0}
    assert event == Event("AdminSet", {**fields, "serial": 0, "by": OWNER})
    assert acl.call("adminOf", TEAM, MEMBER, ADMIN) == (0, 0, 0)
    gone = refused(acl, "setAdmin", TEAM, MEMBER, ADMIN, 0, 0, sender=OWNER)
    assert gone == ("NoAdmin", TEAM, MEMBER, ADMIN)


def test_an_admin_can_step_down_and_no_more(acl: Acl) -> None:
    fields = appoint(acl, ADMIN)
    args = (TEAM, MEMBER, ADMIN)
    for expiry, mask in ((fields["expiry"], 7), (fields["expiry"], 0), (0, 1)):
        answer = refused(acl, "setAdmin", *args, expiry, mask, sender=ADMIN)
        assert answer == ("NotOwner", ADMIN)
    assert refused(acl, "setAdmin", *args, 0, 0, sender=BOB) == ("NotOwner", BOB)
    (event,) = acl.send("setAdmin", *args, 0, 0, sender=ADMIN)
    assert event.fields["by"] == ADMIN
    assert refused(acl, "setAdmin", *args, 0, 0, sender=ADMIN) == ("NoAdmin", *args)


def test_set_admin_refuses_what_makes_no_sense(acl: Acl) -> None:
    soon = acl.chain.time + HOUR_S

    def answer(account: str, expiry: int, mask: int) -> tuple[Any, ...]:
        return refused(acl, "setAdmin", TEAM, MEMBER, account, expiry, mask, sender=OWNER)

    assert answer(NOBODY, soon, 1) == ("ZeroAccount",)
    assert answer(ADMIN, soon, 0) == ("ZeroRights",)
    now = acl.chain.time
    assert answer(ADMIN, 0, 1) == ("ExpiryTooEarly", 0, now)
    far = acl.chain.time + MAX_TTL_S
    assert answer(ADMIN, far + 1, 1) == ("ExpiryTooLate", far + 1, far)


def test_an_admin_grants_within_its_record(acl: Acl) -> None:
    admin = appoint(acl, ADMIN, rights=6, ttl_s=HOUR_S)
    fields = give(acl, ALICE, rights=2, ttl_s=60, sender=ADMIN)
    assert (fields["by"], fields["via"]) == (ADMIN, 0)
    assert rights(acl, ALICE) == 2
    # As much and as long as the record itself allows, and nothing beyond.
    whole = (TEAM, MEMBER, ALICE, 0, admin["expiry"], 6)
    acl.send("grant", *whole, sender=ADMIN)
    exceeds = ("ExceedsAdmin", 6, admin["expiry"])
    for place, value in ((4, admin["expiry"] + 1), (5, 7), (5, ALL)):
        item = (*whole[:place], value, *whole[place + 1 :])
        assert refused(acl, "grant", *item, sender=ADMIN) == exceeds
    # Neither another role nor another scope.
    for scope, role in ((TEAM, NODE), (LAB, MEMBER), (ROOT, MEMBER)):
        item = (scope, role, ALICE, 0, admin["expiry"], 2)
        assert refused(acl, "grant", *item, sender=ADMIN) == ("NotAdmin", scope, role, ADMIN)


def test_the_first_record_that_covers_is_used(acl: Acl) -> None:
    places = [(TEAM, MEMBER), (TEAM, ANY), (ROOT, MEMBER), (ROOT, ANY)]
    for via, (scope, role) in enumerate(places):
        appoint(acl, ADMIN, scope=scope, role=role, rights=2**via)
    for via in range(4):
        fields = give(acl, ALICE, rights=2**via, ttl_s=60, sender=ADMIN)
        assert (fields["via"], fields["rights"]) == (via, 2**via)
        assert rights(acl, ALICE) == 2**via
    # Two records do not add up to one.
    item = (TEAM, MEMBER, ALICE, 0, acl.chain.time + 60, 3)
    assert refused(acl, "grant", *item, sender=ADMIN)[0] == "ExceedsAdmin"
    # In ROOT, records of other scopes are none.
    fields = give(acl, ALICE, scope=ROOT, rights=8, ttl_s=60, sender=ADMIN)
    assert (fields["via"], rights(acl, ALICE, scope=LAB)) == (1, 8)
    item = (ROOT, MEMBER, BOB, 0, acl.chain.time + 60, 1)
    assert refused(acl, "grant", *item, sender=ADMIN)[0] == "ExceedsAdmin"


@pytest.mark.parametrize("via", range(4))
@pytest.mark.parametrize(
    "end", ["remove", "step down", "revokeAll", "renounceAll", "resetScope", "expiry"]
)
def test_what_an_admin_granted_ends_with_the_admin_for_good(acl: Acl, end: str, via: int) -> None:
    scope, role = ROOT if via & 2 else TEAM, ANY if via & 1 else MEMBER
    appoint(acl, ADMIN, scope=scope, role=role, ttl_s=HOUR_S)
    fields = give(acl, ALICE, ttl_s=HOUR_S - 1, sender=ADMIN)
    assert (fields["via"], rights(acl, ALICE)) == (via, 7)
    match end:
        case "remove":
            acl.send("setAdmin", scope, role, ADMIN, 0, 0, sender=OWNER)
        case "step down":
            acl.send("setAdmin", scope, role, ADMIN, 0, 0, sender=ADMIN)
        case "revokeAll":
            acl.send("revokeAll", ADMIN, sender=OWNER)
        case "renounceAll":
            acl.send("renounceAll", scope, role, sender=ADMIN)
        case "resetScope":
            acl.send("resetScope", scope, sender=OWNER)
        case _:
            # The record is cut short, and lapses before the grant does.
            args = (scope, role, ADMIN, acl.chain.time + 10, 7)
            acl.send("setAdmin", *args, sender=OWNER)
            assert acl.call("effective", TEAM, MEMBER, ALICE) == (7, args[3])
            acl.chain.time += 10
    assert rights(acl, ALICE) == 0
    assert acl.call("effective", TEAM, MEMBER, ALICE) == (0, 0)
    item = (TEAM, MEMBER, ALICE, 0, acl.chain.time + 60, 7)
    assert refused(acl, "grant", *item, sender=ADMIN) == ("NotAdmin", TEAM, MEMBER, ADMIN)
    # A new appointment revives nothing.
    appoint(acl, ADMIN, scope=scope, role=role)
    assert rights(acl, ALICE) == 0
    assert give(acl, ALICE, ttl_s=60, sender=ADMIN)["serial"] > fields["serial"]
    assert rights(acl, ALICE) == 7


def test_the_former_admin_of_an_ended_grant_cannot_revoke_it(acl: Acl) -> None:
    appoint(acl, ADMIN)
    give(acl, ALICE, ttl_s=60, sender=ADMIN)
    acl.send("setAdmin", TEAM, MEMBER, ADMIN, 0, 0, sender=OWNER)
    answer = refused(acl, "revoke", TEAM, MEMBER, ALICE, sender=ADMIN)
    assert answer == ("NotAdmin", TEAM, MEMBER, ADMIN)
    # The holder may clear it away.
    acl.send("revoke", TEAM, MEMBER, ALICE, sender=ALICE)


def test_a_narrowed_admin_narrows_what_it_granted(acl: Acl) -> None:
    first = appoint(acl, ADMIN, rights=7, ttl_s=DAY_S)
    fields = give(acl, ALICE, rights=6, ttl_s=HOUR_S, sender=ADMIN)
    narrow = acl.chain.time + 60
    args = (TEAM, MEMBER, ADMIN)
    (event,) = acl.send("setAdmin", *args, narrow, 3, sender=OWNER)
    assert event.fields["serial"] == first["serial"]
    assert acl.call("effective", TEAM, MEMBER, ALICE) == (2, narrow)
    acl.send("setAdmin", *args, narrow, 1, sender=OWNER)
    assert acl.call("effective", TEAM, MEMBER, ALICE) == (0, narrow)
    # Widened again, up to what was granted and no further.
    acl.send("setAdmin", *args, acl.chain.time + DAY_S, ALL, sender=OWNER)
    assert acl.call("effective", TEAM, MEMBER, ALICE) == (6, fields["expiry"])


def test_admins_cannot_touch_what_others_granted(acl: Acl) -> None:
    appoint(acl, ADMIN)
    appoint(acl, ADMIN_2)
    give(acl, ALICE, rights=1, ttl_s=60)
    give(acl, BOB, rights=1, ttl_s=60, sender=ADMIN)
    give(acl, CAROL, rights=1, ttl_s=60, starts=acl.chain.time + 30)
    for who, by in ((ALICE, NOBODY), (BOB, ADMIN), (CAROL, NOBODY)):
        item = (TEAM, MEMBER, who, 0, acl.chain.time + 60, 1)
        assert refused(acl, "grant", *item, sender=ADMIN_2) == ("HeldByAnother", by)
        answer = refused(acl, "revoke", TEAM, MEMBER, who, sender=ADMIN_2)
        assert answer == ("HeldByAnother", by)
    # It may take over what no longer stands.
    acl.chain.time += 120
    for who in (ALICE, BOB, CAROL):
        assert give(acl, who, ttl_s=60, sender=ADMIN_2)["by"] == ADMIN_2


def test_the_owner_takes_over_without_a_gap(acl: Acl) -> None:
    appoint(acl, ADMIN)
    first = give(acl, ALICE, ttl_s=HOUR_S, sender=ADMIN)
    second = give(acl, ALICE, ttl_s=HOUR_S)
    assert (second["by"], second["serial"]) == (NOBODY, first["serial"])
    acl.send("setAdmin", TEAM, MEMBER, ADMIN, 0, 0, sender=OWNER)
    assert rights(acl, ALICE) == 7


def test_a_renewal_under_a_younger_record_is_a_new_tenure(acl: Acl) -> None:
    appoint(acl, ADMIN, rights=1)
    first = give(acl, ALICE, rights=1, ttl_s=60, sender=ADMIN)
    appoint(acl, ADMIN, scope=ROOT, rights=3)
    second = give(acl, ALICE, rights=3, ttl_s=60, sender=ADMIN)
    assert second["via"] == 2
    assert second["serial"] == second["seq"] > first["serial"]
    assert rights(acl, ALICE) == 3


def test_an_admin_renews_and_revokes_its_own(acl: Acl) -> None:
    appoint(acl, ADMIN)
    first = give(acl, ALICE, ttl_s=60, sender=ADMIN)
    assert give(acl, ALICE, ttl_s=90, sender=ADMIN)["serial"] == first["serial"]
    (event,) = acl.send("revoke", TEAM, MEMBER, ALICE, sender=ADMIN)
    assert event.fields["by"] == ADMIN
    assert rights(acl, ALICE) == 0


def test_admins_make_no_guardians(acl: Acl) -> None:
    for scope in (ROOT, TEAM):
        for role in (ANY, GUARDIAN):
            appoint(acl, ADMIN, scope=scope, role=role, rights=ALL)
    for scope in (ROOT, TEAM):
        item = (scope, GUARDIAN, ADMIN, 0, acl.chain.time + 60, 1)
        assert refused(acl, "grant", *item, sender=ADMIN) == ("NotOwner", ADMIN)


def test_reset_of_root_ends_what_its_admins_granted_elsewhere(acl: Acl) -> None:
    appoint(acl, ADMIN, scope=ROOT)
    give(acl, ALICE, ttl_s=60, sender=ADMIN)
    give(acl, BOB)
    acl.send("resetScope", ROOT, sender=OWNER)
    assert (rights(acl, ALICE), rights(acl, BOB)) == (0, 7)


# --- revoke, revokeAll, renounceAll, resetScope --------------------------------------------------


@pytest.mark.parametrize("sender", [OWNER, ALICE])
def test_revoke(acl: Acl, sender: str) -> None:
    give(acl, ALICE)
    give(acl, ALICE, role=NODE)
    give(acl, BOB)
    events = acl.send("revoke", TEAM, MEMBER, ALICE, sender=sender)
    fields = {"seq": 5, "account": ALICE, "scope": TEAM, "role": MEMBER, "by": sender}
    assert events == [Event("Revoked", fields)]
    assert acl.call("grantOf", TEAM, MEMBER, ALICE) == (0, 0, 0, 0, NOBODY, 0)
    assert rights(acl, ALICE) == 0
    assert rights(acl, ALICE, role=NODE) == rights(acl, BOB) == 7
    again = refused(acl, "revoke", TEAM, MEMBER, ALICE, sender=sender)
    assert again == ("NoGrant", TEAM, MEMBER, ALICE)


def test_others_revoke_nothing(acl: Acl) -> None:
    give(acl, ALICE)
    give(acl, BOB)
    give(acl, CAROL, role=GUARDIAN, scope=ROOT)
    for sender in (BOB, STRANGER, CAROL):
        answer = refused(acl, "revoke", TEAM, MEMBER, ALICE, sender=sender)
        assert answer == ("HeldByAnother", NOBODY)


def test_revoke_all(acl: Acl) -> None:
    give(acl, ALICE)
    give(acl, ALICE, scope=ROOT, role=NODE)
    give(acl, BOB)
    events = acl.send("revokeAll", ALICE, sender=OWNER)
    assert events == [Event("RevokedAll", {"seq": 5, "account": ALICE, "scope": ROOT, "by": OWNER})]
    assert rights(acl, ALICE) == rights(acl, ALICE, role=NODE) == 0
    assert rights(acl, BOB) == 7
    assert acl.call("epochs", TEAM, ALICE) == (0, 0, 5)
    assert acl.call("epochs", TEAM, BOB) == (0, 0, 0)
    # A new grant does not bring the old epoch back.
    give(acl, ALICE)
    assert rights(acl, ALICE, role=NODE) == 0
    assert acl.call("epochs", TEAM, ALICE) == (0, 0, 5)
    assert refused(acl, "revokeAll", NOBODY, sender=OWNER) == ("ZeroAccount",)


def test_revoke_all_is_the_owners_and_guardians(acl: Acl) -> None:
    give(acl, ALICE)
    appoint(acl, ADMIN, role=ANY, scope=ROOT)
    for sender in (STRANGER, ALICE, ADMIN):
        answer = refused(acl, "revokeAll", ALICE, sender=sender)
        assert answer == ("NotGuardian", sender)
    give(acl, BOB, role=GUARDIAN, scope=ROOT)
    (event,) = acl.send("revokeAll", ALICE, sender=BOB)
    assert event.fields["by"] == BOB


def test_a_guardian_has_to_be_one_in_root_and_now(acl: Acl) -> None:
    give(acl, ALICE, role=GUARDIAN, scope=TEAM)
    give(acl, BOB, role=GUARDIAN, scope=ROOT, starts=acl.chain.time + 60)
    give(acl, CAROL, role=GUARDIAN, scope=ROOT, ttl_s=30)
    acl.chain.time += 30
    for sender in (ALICE, BOB, CAROL):
        assert refused(acl, "pause", sender=sender) == ("NotGuardian", sender)
    acl.chain.time += 60
    acl.send("pause", sender=BOB)


def test_renounce_all(acl: Acl) -> None:
    give(acl, ALICE)
    give(acl, ALICE, scope=LAB, role=NODE)
    give(acl, BOB)
    events = acl.send("renounceAll", LAB, NODE, sender=ALICE)
    assert events == [Event("RevokedAll", {"seq": 5, "account": ALICE, "scope": ROOT, "by": ALICE})]
    assert rights(acl, ALICE) == rights(acl, ALICE, scope=LAB, role=NODE) == 0
    assert rights(acl, BOB) == 7
    # An admin names its record; who holds nothing has nothing to renounce.
    appoint(acl, ADMIN)
    acl.send("renounceAll", TEAM, MEMBER, sender=ADMIN)
    for sender in (ALICE, ADMIN, STRANGER):
        answer = refused(acl, "renounceAll", TEAM, MEMBER, sender=sender)
        assert answer == ("NoGrant", TEAM, MEMBER, sender)


def test_reset_scope(acl: Acl) -> None:
    give(acl, ALICE)
    give(acl, BOB, scope=ROOT)
    give(acl, CAROL, scope=LAB)
    appoint(acl, ADMIN)
    events = acl.send("resetScope", TEAM, sender=OWNER)
    assert events == [Event("ScopeReset", {"seq": 6, "account": OWNER, "scope": TEAM})]
    assert acl.call("epochs", TEAM, ALICE) == (6, 0, 0)
    assert acl.call("epochs", LAB, ALICE) == (0, 0, 0)
    assert [rights(acl, ALICE), rights(acl, BOB)] == [0, 7]
    assert rights(acl, CAROL, scope=LAB) == 7
    item = (TEAM, MEMBER, ALICE, 0, acl.chain.time + 60, 1)
    assert refused(acl, "grant", *item, sender=ADMIN)[0] == "NotAdmin"
    # ROOT is one scope, not all of them.
    acl.send("resetScope", ROOT, sender=OWNER)
    assert acl.call("epochs", LAB, ALICE) == (0, 7, 0)
    assert rights(acl, BOB) == 0
    assert rights(acl, CAROL, scope=LAB) == 7
    for sender in (ALICE, ADMIN, STRANGER):
        assert refused(acl, "resetScope", LAB, sender=sender) == ("NotOwner", sender)


# --- pause ---------------------------------------------------------------------------------------


def test_pause_and_unpause(acl: Acl) -> None:
    give(acl, ALICE)
    give(acl, ALICE, scope=ROOT, role=NODE)
    give(acl, BOB, role=GUARDIAN, scope=ROOT)
    acl.send("bindKey", TEAM, [MEMBER], KEY, acl.chain.time + HOUR_S, sender=ALICE)
    assert refused(acl, "unpause", sender=OWNER) == ("IsNotPaused",)
    assert acl.send("pause", sender=BOB) == [
        Event("Paused", {"seq": 6, "account": BOB, "scope": ROOT})
    ]
    assert acl.call("paused") is True
    assert rights(acl, ALICE) == rights(acl, ALICE, role=NODE) == 0
    assert not acl.call("can", TEAM, MEMBER, ALICE, 1)
    assert acl.call("keyRightsOf", TEAM, MEMBER, ALICE, KEY) == 0
    # Records are as they were.
    assert acl.call("effective", TEAM, MEMBER, ALICE)[0] == 7
    assert refused(acl, "pause", sender=BOB) == ("IsPaused",)
    # A guardian stops, the owner starts.
    assert refused(acl, "unpause", sender=BOB) == ("NotOwner", BOB)
    assert acl.send("unpause", sender=OWNER) == [
        Event("Unpaused", {"seq": 7, "account": OWNER, "scope": ROOT})
    ]
    assert rights(acl, ALICE) == 7
    assert acl.call("keyRightsOf", TEAM, MEMBER, ALICE, KEY) == 7
    for sender in (STRANGER, ALICE):
        assert refused(acl, "pause", sender=sender) == ("NotGuardian", sender)
    acl.send("pause", sender=OWNER)


def test_while_paused_the_owner_repairs_and_everybody_can_withdraw(acl: Acl) -> None:
    appoint(acl, ADMIN)
    give(acl, ALICE)
    give(acl, BOB, ttl_s=HOUR_S, sender=ADMIN)
    give(acl, CAROL, role=GUARDIAN, scope=ROOT)
    acl.send("bindKey", TEAM, [MEMBER], KEY, acl.chain.time + HOUR_S, sender=ALICE)
    acl.send("pause", sender=CAROL)
    item = (TEAM, NODE, BOB, 0, acl.chain.time + 60, 1)
    assert refused(acl, "grant", *item, sender=ADMIN) == ("IsPaused",)
    bind = (TEAM, [MEMBER], KEY_2, acl.chain.time + 60)
    assert refused(acl, "bindKey", *bind, sender=ALICE) == ("IsPaused",)
    acl.send("unbindKey", TEAM, [MEMBER], ALICE, KEY, sender=ALICE)
    acl.send("revoke", TEAM, MEMBER, BOB, sender=ADMIN)
    acl.send("revokeAll", ADMIN, sender=CAROL)
    acl.send("renounceAll", TEAM, MEMBER, sender=ALICE)
    give(acl, BOB)
    appoint(acl, ADMIN)
    acl.send("resetScope", LAB, sender=OWNER)
    acl.send("unpause", sender=OWNER)
    assert rights(acl, BOB) == 7


# --- keys ----------------------------------------------------------------------------------------


def test_bind_key(acl: Acl) -> None:
    give(acl, ALICE, rights=3)
    give(acl, ALICE, role=NODE, rights=4)
    expiry = acl.chain.time + HOUR_S
    events = acl.send("bindKey", TEAM, [MEMBER, NODE], KEY, expiry, sender=ALICE)
    fields = {"account": ALICE, "scope": TEAM, "key": KEY, "expiry": expiry}
    assert events == [
        Event("KeyBound", {**fields, "seq": 4, "role": MEMBER}),
        Event("KeyBound", {**fields, "seq": 5, "role": NODE}),
    ]
    assert acl.call("keyOf", TEAM, NODE, ALICE, KEY) == (expiry, 5)
    assert acl.call("keyCountOf", ALICE) == 2

    def of(role: bytes, account: str = ALICE, key: bytes = KEY, scope: bytes = TEAM) -> int:
        value: int = acl.call("keyRightsOf", scope, role, account, key)
        return value

    assert (of(MEMBER), of(NODE)) == (3, 4)
    assert of(MEMBER, key=KEY_2) == of(MEMBER, account=BOB) == of(MEMBER, scope=LAB) == 0
    # Binding again changes the expiry, and counts once.
    acl.send("bindKey", TEAM, [NODE], KEY, expiry + 9, sender=ALICE)
    assert acl.call("keyOf", TEAM, NODE, ALICE, KEY) == (expiry + 9, 6)
    assert acl.call("keyCountOf", ALICE) == 2
    acl.chain.time = expiry - 1
    assert of(MEMBER) == 3
    acl.chain.time = expiry
    assert (of(MEMBER), of(NODE)) == (0, 4)


def test_a_key_acts_under_the_grants_to_which_it_is_bound(acl: Acl) -> None:
    give(acl, ALICE, rights=1)
    give(acl, ALICE, scope=ROOT, rights=2)
    expiry = acl.chain.time + HOUR_S
    acl.send("bindKey", ROOT, [MEMBER], KEY, expiry, sender=ALICE)
    acl.send("bindKey", TEAM, [MEMBER], KEY_2, expiry, sender=ALICE)
    of = {
        (scope, key): acl.call("keyRightsOf", scope, MEMBER, ALICE, key)
        for scope in (ROOT, TEAM, LAB)
        for key in (KEY, KEY_2)
    }
    assert of == {
        (ROOT, KEY): 2,
        (TEAM, KEY): 2,
        (LAB, KEY): 2,
        (ROOT, KEY_2): 0,
        (TEAM, KEY_2): 1,
        (LAB, KEY_2): 0,
    }


@pytest.mark.parametrize("end", ["revoke", "revokeAll", "resetScope", "admin", "expiry"])
def test_a_key_ends_with_the_tenure_of_the_grant(acl: Acl, end: str) -> None:
    appoint(acl, ADMIN)
    give(acl, ALICE, ttl_s=HOUR_S, sender=ADMIN)
    acl.send("bindKey", TEAM, [MEMBER], KEY, acl.chain.time + DAY_S, sender=ALICE)

    def of() -> int:
        value: int = acl.call("keyRightsOf", TEAM, MEMBER, ALICE, KEY)
        return value

    # A renewal is the same tenure.
    give(acl, ALICE, ttl_s=2 * HOUR_S, rights=3, sender=ADMIN)
    assert of() == 3
    match end:
        case "revoke":
            acl.send("revoke", TEAM, MEMBER, ALICE, sender=OWNER)
        case "revokeAll":
            acl.send("revokeAll", ALICE, sender=OWNER)
        case "resetScope":
            acl.send("resetScope", TEAM, sender=OWNER)
        case "admin":
            acl.send("setAdmin", TEAM, MEMBER, ADMIN, 0, 0, sender=OWNER)
        case _:
            acl.chain.time += 2 * HOUR_S
    assert of() == 0
    give(acl, ALICE)
    assert of() == 0
    acl.send("bindKey", TEAM, [MEMBER], KEY, acl.chain.time + HOUR_S, sender=ALICE)
    assert of() == 7


def test_bind_key_refuses(acl: Acl) -> None:
    give(acl, ALICE)
    give(acl, BOB, ttl_s=20)
    acl.chain.time += 20
    soon = acl.chain.time + HOUR_S

    def answer(
        sender: str = ALICE,
        roles: tuple[bytes, ...] = (MEMBER,),
        key: bytes = KEY,
        expiry: int = soon,
        scope: bytes = TEAM,
    ) -> tuple[Any, ...]:
        return refused(acl, "bindKey", scope, roles, key, expiry, sender=sender)

    assert answer(key=bytes(32)) == ("ZeroKey",)
    assert answer(roles=()) == ("BadBatch", 0)
    assert answer(roles=(MEMBER,) * (MAX_BATCH + 1)) == ("BadBatch", MAX_BATCH + 1)
    now = acl.chain.time
    assert answer(expiry=now) == ("ExpiryTooEarly", now, now)
    far = acl.chain.time + MAX_TTL_S
    assert answer(expiry=far + 1) == ("ExpiryTooLate", far + 1, far)
    # Only to grants of one's own that stand, in that very scope.
    assert answer(STRANGER) == ("NoGrant", TEAM, MEMBER, STRANGER)
    assert answer(BOB) == ("NoGrant", TEAM, MEMBER, BOB)
    assert answer(roles=(MEMBER, NODE)) == ("NoGrant", TEAM, NODE, ALICE)
    assert answer(scope=ROOT) == ("NoGrant", ROOT, MEMBER, ALICE)
    assert acl.call("keyCountOf", ALICE) == 0


def test_unbind_key(acl: Acl) -> None:
    give(acl, ALICE)
    give(acl, ALICE, role=NODE)
    give(acl, BOB, role=GUARDIAN, scope=ROOT)
    for sender in (ALICE, OWNER, BOB):
        expiry = acl.chain.time + HOUR_S
        acl.send("bindKey", TEAM, [MEMBER, NODE], KEY, expiry, sender=ALICE)
        seq = acl.call("seq")
        events = acl.send("unbindKey", TEAM, [MEMBER], ALICE, KEY, sender=sender)
        fields = {"seq": seq + 1, "account": ALICE, "scope": TEAM, "role": MEMBER, "key": KEY}
        assert events == [Event("KeyUnbound", {**fields, "by": sender})]
        assert acl.call("keyOf", TEAM, MEMBER, ALICE, KEY) == (0, 0)
        assert acl.call("keyRightsOf", TEAM, MEMBER, ALICE, KEY) == 0
        assert acl.call("keyRightsOf", TEAM, NODE, ALICE, KEY) == 7
        assert acl.call("keyCountOf", ALICE) == 1
    args = (TEAM, [NODE, MEMBER], ALICE, KEY)
    for sender in (STRANGER, CAROL):
        assert refused(acl, "unbindKey", *args, sender=sender) == ("NotGuardian", sender)
    # All or nothing.
    gone = refused(acl, "unbindKey", *args, sender=ALICE)
    assert gone == ("NoKey", TEAM, MEMBER, ALICE, KEY)
    assert acl.call("keyCountOf", ALICE) == 1
    empty = refused(acl, "unbindKey", TEAM, [], ALICE, KEY, sender=ALICE)
    assert empty == ("BadBatch", 0)
    many = refused(acl, "unbindKey", TEAM, [NODE] * (MAX_BATCH + 1), ALICE, KEY, sender=ALICE)
    assert many == ("BadBatch", MAX_BATCH + 1)


def test_keys_from_before_the_epoch_are_not_counted(acl: Acl) -> None:
    give(acl, ALICE)
    expiry = acl.chain.time + DAY_S
    for key in (KEY, KEY_2):
        acl.send("bindKey", TEAM, [MEMBER], key, expiry, sender=ALICE)
    acl.send("revokeAll", ALICE, sender=OWNER)
    assert acl.call("keyCountOf", ALICE) == 0
    give(acl, ALICE)
    # Neither clearing away an old one nor binding it anew upsets the count.
    acl.send("unbindKey", TEAM, [MEMBER], ALICE, KEY, sender=ALICE)
    assert acl.call("keyCountOf", ALICE) == 0
    acl.send("bindKey", TEAM, [MEMBER], KEY_2, expiry, sender=ALICE)
    assert acl.call("keyCountOf", ALICE) == 1
    acl.send("unbindKey", TEAM, [MEMBER], ALICE, KEY_2, sender=ALICE)
    assert acl.call("keyCountOf", ALICE) == 0


def test_the_number_of_keys_is_bounded(acl: Acl) -> None:
    roles = [word(f"role {n}") for n in range(MAX_BATCH)]
    expiry = acl.chain.time + DAY_S
    acl.send("grantMany", [(TEAM, role, ALICE, 0, expiry, 1) for role in roles], sender=OWNER)
    for n in range(MAX_KEYS // MAX_BATCH):
        acl.send("bindKey", TEAM, roles, keccak(bytes([n])), expiry, sender=ALICE)
        assert acl.last.gas < 2**24
    assert acl.call("keyCountOf", ALICE) == MAX_KEYS
    full = refused(acl, "bindKey", TEAM, roles[:1], KEY, expiry, sender=ALICE)
    assert full == ("TooManyKeys", ALICE)
    # A bound one can be renewed, and one unbound makes room.
    acl.send("bindKey", TEAM, roles[:1], keccak(bytes([0])), expiry, sender=ALICE)
    acl.send("unbindKey", TEAM, roles[:1], ALICE, keccak(bytes([0])), sender=ALICE)
    acl.send("bindKey", TEAM, roles[:1], KEY, expiry, sender=ALICE)
    assert acl.call("keyCountOf", ALICE) == MAX_KEYS


# --- owner ---------------------------------------------------------------------------------------


def test_transfer_of_ownership(acl: Acl) -> None:
    ready_at = acl.chain.time + OWNER_DELAY_S
    assert acl.send("proposeOwner", ALICE, sender=OWNER) == [
        Event("OwnerProposed", {"seq": 2, "account": ALICE, "scope": ROOT, "readyAt": ready_at})
    ]
    assert (acl.call("pendingOwner"), acl.call("ownerReadyAt")) == (ALICE, ready_at)
    give(acl, BOB, ttl_s=10 * DAY_S)
    window = ("NotInWindow", ready_at, ready_at + OWNER_WINDOW_S)
    assert refused(acl, "acceptOwner", sender=ALICE) == window
    for sender in (OWNER, BOB):
        assert refused(acl, "acceptOwner", sender=sender) == ("NotProposed", sender)
    acl.chain.time = ready_at - 1
    assert refused(acl, "acceptOwner", sender=ALICE) == window
    assert acl.chain.time == ready_at
    fields = {"seq": 4, "account": ALICE, "scope": ROOT, "previous": OWNER}
    assert acl.send("acceptOwner", sender=ALICE) == [Event("OwnerChanged", fields)]
    assert acl.call("state")[3:] == (ALICE, False, NOBODY, 0)
    assert refused(acl, "pause", sender=OWNER) == ("NotGuardian", OWNER)
    assert refused(acl, "acceptOwner", sender=ALICE) == ("NotProposed", ALICE)
    # What the organisation granted stays.
    assert rights(acl, BOB) == 7
    acl.send("revoke", TEAM, MEMBER, BOB, sender=ALICE)


def test_a_proposal_lapses(acl: Acl) -> None:
    acl.send("proposeOwner", ALICE, sender=OWNER)
    ready_at = acl.call("ownerReadyAt")
    acl.chain.time = ready_at + OWNER_WINDOW_S
    late = refused(acl, "acceptOwner", sender=ALICE)
    assert late == ("NotInWindow", ready_at, ready_at + OWNER_WINDOW_S)
    acl.send("proposeOwner", ALICE, sender=OWNER)
    acl.chain.time = acl.call("ownerReadyAt") + OWNER_WINDOW_S - 1
    acl.send("acceptOwner", sender=ALICE)


def test_a_proposal_can_be_replaced_and_withdrawn(acl: Acl) -> None:
    acl.send("proposeOwner", ALICE, sender=OWNER)
    acl.send("proposeOwner", BOB, sender=OWNER)
    acl.chain.time = acl.call("ownerReadyAt")
    assert refused(acl, "acceptOwner", sender=ALICE) == ("NotProposed", ALICE)
    (event,) = acl.send("proposeOwner", NOBODY, sender=OWNER)
    assert (event.fields["account"], event.fields["readyAt"]) == (NOBODY, 0)
    assert refused(acl, "acceptOwner", sender=BOB) == ("NotProposed", BOB)
    assert acl.slot(2) == bytes(32)
    for sender in (ALICE, STRANGER):
        assert refused(acl, "proposeOwner", sender, sender=sender) == ("NotOwner", sender)


# --- strangers and raw calldata ------------------------------------------------------------------


def test_a_stranger_cannot_change_anything(acl: Acl) -> None:
    give(acl, ALICE)
    appoint(acl, ADMIN)
    acl.send("bindKey", TEAM, [MEMBER], KEY, acl.chain.time + HOUR_S, sender=ALICE)
    soon = acl.chain.time + HOUR_S
    calls: dict[str, list[tuple[Any, ...]]] = {
        "grant": [(TEAM, MEMBER, STRANGER, 0, soon, 1)],
        "grantMany": [([(TEAM, MEMBER, STRANGER, 0, soon, 1)],)],
        "setAdmin": [
            (TEAM, MEMBER, who, *rest) for who in (STRANGER, ADMIN) for rest in ((soon, 1), (0, 0))
        ],
        "revoke": [(TEAM, MEMBER, ALICE), (TEAM, MEMBER, STRANGER)],
        "revokeAll": [(ALICE,), (STRANGER,)],
        "renounceAll": [(TEAM, MEMBER), (ROOT, ANY)],
        "resetScope": [(TEAM,), (ROOT,)],
        "pause": [()],
        "unpause": [()],
        "bindKey": [(TEAM, [MEMBER], KEY, soon)],
        "unbindKey": [(TEAM, [MEMBER], who, KEY) for who in (ALICE, STRANGER)],
        "proposeOwner": [(STRANGER,), (NOBODY,)],
        "acceptOwner": [()],
    }
    writing = {n for n, f in FUNCTIONS.items() if f["stateMutability"] not in ("view", "pure")}
    assert calls.keys() == writing
    for function, tries in calls.items():
        for args in tries:
            refused(acl, function, *args, sender=STRANGER)


def test_no_function_takes_money_and_there_is_no_fallback(acl: Acl) -> None:
    for entry in FUNCTIONS.values():
        assert entry["stateMutability"] != "payable"
    for name, entry in FUNCTIONS.items():
        args = map(_sample, _kinds(entry))
        with pytest.raises(Reverted) as caught:
            acl.send_raw(calldata(name, *args), sender=OWNER, value=1)
        assert caught.value.name == ""
    selectors = [
        int.from_bytes(calldata(name, *map(_sample, _kinds(entry)))[:4], "big")
        for name, entry in FUNCTIONS.items()
    ]
    unknown = [(s + d).to_bytes(4, "big") for s in selectors for d in (-1, 1)]
    for data in (b"", b"\x01", b"\xff" * 4, b"\0" * 36, *unknown):
        with pytest.raises(Reverted) as caught:
            acl.send_raw(data, sender=OWNER)
        assert caught.value.name == ""


def test_malformed_calldata_is_refused(acl: Acl) -> None:
    """Short, dirty and lying arguments, for each argument of each function."""

    def refuses(data: bytes) -> None:
        with pytest.raises(Reverted) as caught:
            acl.send_raw(data, sender=OWNER)
        assert caught.value.name == ""

    dirty = {"address": 160, "uint40": 40, "uint128": 128}
    for name, entry in FUNCTIONS.items():
        kinds = _kinds(entry)
        if not kinds:
            continue
        selector = calldata(name, *(_sample(kind) for kind in kinds))[:4]
        body = calldata(name, *(_sample(kind) for kind in kinds))[4:]
        refuses(selector + body[: 32 * len(kinds) - 1])
        for place, kind in enumerate(kinds):
            at = 32 * place
            if kind in dirty:
                bad = (1 << dirty[kind]).to_bytes(32, "big")
                refuses(selector + body[:at] + bad + body[at + 32 :])
            elif kind.endswith("[]"):
                # An offset or a length out of bounds, of a size that no sum may overflow.
                for offset in (2**64, 2**256 - 1, len(body), len(body) - 31):
                    refuses(selector + body[:at] + offset.to_bytes(32, "big") + body[at + 32 :])
                start = int.from_bytes(body[at : at + 32], "big")
                for length in (2**64, 2**256 - 1, 2):
                    refuses(
                        selector + body[:start] + length.to_bytes(32, "big") + body[start + 32 :]
                    )
    items = calldata("grantMany", [_sample("item")])
    for place, bits in ((2, 160), (3, 40), (4, 40), (5, 128)):
        at = 4 + 64 + 32 * place
        refuses(items[:at] + (1 << bits).to_bytes(32, "big") + items[at + 32 :])


def test_what_cannot_be_counted_is_refused(acl: Acl) -> None:
    """States that no history can reach: nothing wraps around, everything fails closed."""
    overflow = ("Panic", 0x11)
    give(acl, ALICE)
    acl.send("bindKey", TEAM, [MEMBER], KEY, acl.chain.time + HOUR_S, sender=ALICE)
    counted = _mapping_slot(bytes(12) + to_canonical_address(ALICE), 6)
    assert int.from_bytes(acl.slot(counted), "big") == 1 << 48
    acl.chain.forge(acl.address, counted, 0)
    assert refused(acl, "unbindKey", TEAM, [MEMBER], ALICE, KEY, sender=ALICE) == overflow
    state = int.from_bytes(acl.slot(0), "big")
    acl.chain.forge(acl.address, 0, state | (2**48 - 1) << 168)
    for function, args in (("pause", ()), ("resetScope", (TEAM,)), ("revokeAll", (ALICE,))):
        assert refused(acl, function, *args, sender=OWNER) == overflow
    acl.chain.forge(acl.address, 0, state)
    acl.chain.time = 2**40 - 1
    assert refused(acl, "proposeOwner", ALICE, sender=OWNER) == overflow


def _kinds(function: dict[str, Any]) -> list[str]:
    return [item["type"] for item in function["inputs"]]


def _sample(kind: str) -> Any:
    item = (TEAM, MEMBER, ALICE, 0, 1, 1)
    samples = {"address": ALICE, "bytes32": TEAM, "item": item, "tuple[]": [item]}
    return [TEAM] if kind == "bytes32[]" else samples.get(kind, 1)
