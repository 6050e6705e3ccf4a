"""Random histories: the contract does what the model says, and never what no model may allow.

WW_SEED=N replays the histories of a seed; WW_STEPS=N makes them longer.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from .chains import Acl, Chain, Event, Reverted
from .model import MAX_TTL_S, OWNER_WINDOW_S, Model, Name, Replay, admin_name
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
)

STEPS_MAX = 10
"""Times the steps: so far does a walk go on that has not been everywhere."""
SEED = int(os.environ.get("WW_SEED", random.SystemRandom().randrange(2**32)))
STEPS = {
    "py-evm": int(os.environ.get("WW_STEPS", 400)),
    "anvil": int(os.environ.get("WW_STEPS", 2000)),
}

SCOPES = [ROOT, TEAM, LAB]
ROLES = [MEMBER, NODE]
PEOPLE = [ADMIN, ADMIN_2, ALICE, BOB, CAROL]
KEYS = [KEY, KEY_2]
MASKS = [1, 2, 3, 7, 15, ALL]

# How often each function is tried.
WEIGHTS = {
    "grant": 40,
    "grantMany": 5,
    "setAdmin": 14,
    "revoke": 9,
    "revokeAll": 1,
    "renounceAll": 0.7,
    "resetScope": 0.7,
    "pause": 0.5,
    "unpause": 2,
    "bindKey": 12,
    "unbindKey": 5,
    "proposeOwner": 0.7,
    "acceptOwner": 1.2,
}


@dataclass
class History:
    """One random history, and what has been learnt from it."""

    acl: Acl
    rng: random.Random
    model: Model
    done: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    by_admin: int = 0  # of them in force, granted by an admin
    cut: int = 0  # of those, with less than was granted
    ended: set[tuple[str, Name, int]] = field(default_factory=set)
    seen: dict[tuple[str, Name], int] = field(default_factory=dict)

    @property
    def now(self) -> int:
        return self.acl.chain.time

    def goes_everywhere(self, steps: int) -> bool:
        """The walk is worth something only then; one that has been unlucky goes on for longer."""
        if len(self.done) < 12 or len(self.refused) < 15:
            return False
        return steps < 2000 or (self.by_admin >= 50 and self.cut >= 5)

    # --- choosing ---

    def _expiry(self) -> int:
        if self.rng.random() < 0.1:
            return self.now + self.rng.choice([-5, 0, 1, 2, MAX_TTL_S, MAX_TTL_S + 1])
        return self.now + self.rng.choice([20, 100, 300, 1000, 3000, 10000])

    def _name(self) -> Name:
        rng = self.rng
        role = rng.choice([ANY, GUARDIAN, GUARDIAN] if rng.random() < 0.2 else ROLES)
        account = NOBODY if rng.random() < 0.03 else rng.choice(PEOPLE)
        return rng.choice(SCOPES), role, account

    def _known(self, table: Any) -> Any:
        """One that is there, mostly."""
        return self.rng.choice(list(table)) if table and self.rng.random() < 0.85 else None

    def _sender(self, *likely: str) -> str:
        chosen = self.rng.random()
        if chosen < 0.03:
            return STRANGER
        if chosen < 0.12:
            return self.rng.choice(PEOPLE)
        return self.rng.choice(likely or (self.model.owner,))

    def _rights(self) -> int:
        return 0 if self.rng.random() < 0.03 else self.rng.choice(MASKS)

    def _grant(self) -> tuple[Any, ...]:
        rng = self.rng
        renewed = self._known(self.model.grants) if rng.random() < 0.3 else None
        scope, role, account = renewed or self._name()
        starts = rng.choice([0, 0, 0, 0, self.now - 3, self.now, self.now + 3, self.now + 400])
        return scope, role, account, starts, self._expiry(), self._rights()

    def _admin_grant(self) -> tuple[tuple[Any, ...], str]:
        """A grant by an admin, mostly one that its record covers."""
        rng = self.rng
        names = list(self.model.admins)
        living = [name for name in names if self.model.living_admin(name, self.now)]
        name = rng.choice(living if living and rng.random() < 0.9 else names)
        scope, role, account = name
        admin = self.model.admins[name]
        of_it = [n for n, g in self.model.grants.items() if g.by == account]
        if of_it and rng.random() < 0.3:
            scope, role, to = rng.choice(of_it)
        else:
            scope = rng.choice(SCOPES) if scope == ROOT else scope
            role = rng.choice([*ROLES, *ROLES, GUARDIAN]) if role == ANY else role
            to = rng.choice(PEOPLE)
        rights, expiry = self._rights(), self._expiry()
        if rng.random() < 0.85:
            rights, expiry = rights & admin.rights or admin.rights, min(expiry, admin.expiry)
        return (scope, role, to, 0, expiry, rights), account

    def choose(self) -> tuple[str, tuple[Any, ...], str]:
        """A function, its arguments, and who calls it."""
        rng, model = self.rng, self.model
        admins = [account for _, _, account in model.admins]
        granters = (model.owner, *admins, *admins)
        function = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        match function:
            case "grant" if model.admins and rng.random() < 0.7:
                item, account = self._admin_grant()
                return function, item, self._sender(account)
            case "grant":
                return function, self._grant(), self._sender(*granters)
            case "grantMany":
                count = rng.choice([0, 1, 2, 2, 3, 3, 4, 101])
                return function, ([self._grant() for _ in range(count)],), self._sender(*granters)
            case "setAdmin":
                scope, role, account = self._known(model.admins) or self._name()
                if rng.random() < 0.25:
                    return (
                        function,
                        (scope, role, account, 0, 0),
                        self._sender(model.owner, account),
                    )
                if rng.random() < 0.7:
                    role = rng.choice([*ROLES, ANY])
                admin = (scope, role, account, self._expiry(), self._rights())
                return function, admin, self._sender()
            case "revoke":
                name = self._known(model.grants) or self._name()
                by = model.grants[name].by if name in model.grants else NOBODY
                likely = [who for who in (model.owner, name[2], by, by) if who != NOBODY]
                return function, name, self._sender(*likely)
            case "revokeAll":
                guardians = [who for _, role, who in model.grants if role == GUARDIAN]
                who = rng.choice([*PEOPLE, *PEOPLE, STRANGER, NOBODY])
                return function, (who,), self._sender(model.owner, *guardians)
            case "renounceAll":
                names = [*model.grants, *model.admins]
                scope, role, account = self._known(names) or self._name()
                return function, (scope, role), self._sender(*[account] * (account != NOBODY))
            case "resetScope":
                return function, (rng.choice(SCOPES),), self._sender()
            case "bindKey":
                scope, role, account = self._known(model.grants) or self._name()
                roles = rng.choice([[role]] * 5 + [[role, MEMBER], [NODE, role], [], [role] * 101])
                key = rng.choice([*KEYS * 8, bytes(32)])
                likely = [account] * (account != NOBODY)
                return function, (scope, roles, key, self._expiry()), self._sender(*likely)
            case "unbindKey":
                name, key = self._known(model.keys) or (self._name(), rng.choice(KEYS))
                scope, role, account = name
                roles = rng.choice([[role]] * 5 + [[role, MEMBER], []])
                likely = [model.owner, *[account] * (account != NOBODY)]
                return function, (scope, roles, account, key), self._sender(*likely)
            case "proposeOwner":
                return function, (rng.choice([OWNER, *PEOPLE, NOBODY]),), self._sender()
            case "acceptOwner":
                if model.proposal[0] != NOBODY and rng.random() < 0.7:
                    self.acl.chain.time = max(self.now, model.proposal[1] - rng.choice([0, 0, 1]))
                    self.acl.chain.time += rng.choice([0, 0, 0, OWNER_WINDOW_S])
                likely = [who for who in model.proposal[:1] if who != NOBODY]
                return function, (), self._sender(*likely)
            case _:
                guardians = [who for _, role, who in model.grants if role == GUARDIAN]
                return function, (), self._sender(model.owner, model.owner, *guardians)

    # --- doing ---

    def step(self) -> None:
        function, args, sender = self.choose()
        now, acl, model = self.now, self.acl, self.model
        seq = model.seq
        before = {name: model.standing_grant(name, now) for name in model.grants}
        guards = bool(model.effective((ROOT, GUARDIAN, sender), now)[0])
        owner = model.owner
        expected: list[Event] | Reverted
        try:
            expected = model.apply(function, args, sender, now)
        except Reverted as refusal:
            expected = refusal
        what = f"{function}{args} by {sender} at {now}, seed {SEED}"
        answer: list[Event] | Reverted
        try:
            answer = acl.send(function, *args, sender=sender)
        except Reverted as refusal:
            answer = refusal
        events: list[Event] = []
        if isinstance(answer, Reverted):
            assert isinstance(expected, Reverted), f"{what}: the contract refused: {answer!r}"
            assert (answer.name, answer.values) == (expected.name, expected.values), what
            self.refused[answer.name] = self.refused.get(answer.name, 0) + 1
        else:
            events = answer
            assert events == expected, f"{what}: expected {expected!r}"
            self.done[function] = self.done.get(function, 0) + 1
            assert sender != STRANGER, what
            # Every change is counted, without a gap.
            assert [e.fields["seq"] for e in events] == list(range(seq + 1, seq + 1 + len(events)))
        self._check_powers(events, before, sender, owner, guards=guards, now=now, what=what)
        if self.rng.random() < 0.3:
            self.acl.chain.time += self.rng.choice([1, 1, 5, 30, 100])
        if self.rng.random() < 0.003:
            self.acl.chain.time += MAX_TTL_S // 3

    def _check_powers(
        self,
        events: list[Event],
        before: dict[Name, Any],
        sender: str,
        owner: str,
        *,
        guards: bool,
        now: int,
        what: str,
    ) -> None:
        """What one who is not the owner changed is its own, and within its powers."""
        if sender == owner:
            return
        for event in events:
            f = event.fields
            name = (f["scope"], f.get("role", ANY), f["account"])
            if event.name == "Granted":
                assert f["by"] == sender, what
                assert f["role"] != GUARDIAN, what
                admin = self.model.living_admin(admin_name(name, self.model.grants[name]), now)
                assert admin is not None, what
                assert f["rights"] | admin.rights == admin.rights, what
                assert f["expiry"] <= admin.expiry, what
                old = before.get(name)
                assert old is None or old.by == sender, what
            elif event.name == "Revoked":
                old = before.get(name)
                assert sender == f["account"] or (old is not None and old.by == sender), what
            elif event.name == "AdminSet":
                assert f["rights"] == 0, what
                assert sender == f["account"], what
            elif event.name in ("RevokedAll", "KeyUnbound", "KeyBound", "Paused"):
                assert guards or sender == f["account"], what
            else:
                assert event.name == "OwnerChanged", what

    # --- comparing ---

    def compare(self, *, fully: bool) -> None:
        """The contract's state and views against the model's, and the invariants."""
        acl, model, now = self.acl, self.model, self.now
        what = f"at seq {model.seq}, time {now}, seed {SEED}"
        state = acl.call("state")
        assert state[:2] == (model.seq, model.head), what
        assert state[3:] == (model.owner, model.paused, *model.proposal), what
        assert acl.slot(1) == model.head, what
        packed = int.from_bytes(acl.slot(0), "big")
        assert packed & (2**160 - 1) == int(model.owner, 16), what
        assert (packed >> 160) & 0xFF == model.paused, what
        assert (packed >> 168) & (2**48 - 1) == model.seq, what
        names = sorted({*model.grants, *model.admins, *(name for name, _ in model.keys)})
        names += [self._name() for _ in range(2)]
        if not fully:
            names = self.rng.sample(names, min(len(names), 2))
        for name in names:
            self._compare_one(name, now, f"{name} {what}")

    def _compare_one(self, name: Name, now: int, what: str) -> None:
        model = self.model
        scope, _, account = name
        grant, admin = model.grants.get(name), model.admins.get(name)
        rights, need = model.rights(name, now), self.rng.choice([0, *MASKS])
        expected: dict[tuple[Any, ...], Any] = {
            ("grantOf", *name): (
                (grant.not_before, grant.expiry, grant.serial, grant.rights, grant.by, grant.via)
                if grant
                else (0, 0, 0, 0, NOBODY, 0)
            ),
            ("adminOf", *name): (admin.expiry, admin.serial, admin.rights) if admin else (0, 0, 0),
            ("effective", *name): model.effective(name, now),
            ("rightsOf", *name): rights,
            ("can", *name, need): need != 0 and rights & need == need,
            ("epochs", scope, account): (
                model.scope_epochs.get(scope, 0),
                model.scope_epochs.get(ROOT, 0),
                model.account_epochs.get(account, 0),
            ),
            ("keyCountOf", account): model.key_counts.get(account, 0),
        }
        for key in KEYS:
            bound = model.keys.get((name, key))
            expected["keyOf", *name, key] = (bound.expiry, bound.serial) if bound else (0, 0)
            expected["keyRightsOf", *name, key] = model.key_rights(name, key, now)
        place = admin_name(name, grant) if grant else name
        queries = [*expected, ("adminOf", *place)]
        *answers, above = self.acl.call_many(queries)
        for query, answer in zip(expected, answers, strict=True):
            assert answer == expected[query], f"{query} {what}"
        self._check_bounds(name, now, what, answers[0], answers[1], answers[2], above)
        self.compared += 1

    def _check_bounds(
        self,
        name: Name,
        now: int,
        what: str,
        grant: tuple[Any, ...],
        admin: tuple[Any, ...],
        effective: tuple[int, int],
        above: tuple[int, int, int],
    ) -> None:
        """Invariants on the contract's own answers."""
        rights, expiry = effective
        not_before, _, serial, granted, by, _ = grant
        if rights:
            assert not_before <= now < expiry, what
            assert rights | granted == granted, what
        if rights and by != NOBODY:
            self.by_admin += 1
            self.cut += (rights, expiry) != (granted, grant[1])
            admin_expiry, admin_serial, admin_rights = above
            assert 0 < admin_serial < serial, what
            assert expiry <= admin_expiry, what
            assert rights | admin_rights == admin_rights, what
        alive = self.model.standing_grant(name, now) is not None
        self._check_gone("grant", name, serial, alive=alive, acts=bool(rights), what=what)
        alive = self.model.living_admin(name, now) is not None
        self._check_gone("admin", name, admin[1], alive=alive, acts=alive, what=what)

    def _check_gone(
        self, kind: str, name: Name, serial: int, *, alive: bool, acts: bool, what: str
    ) -> None:
        """A tenure that has ended never acts again, and serials of a name only grow."""
        if serial:
            assert serial >= self.seen.get((kind, name), 0), what
            self.seen[kind, name] = serial
        mark = (kind, name, serial)
        assert not (acts and mark in self.ended), what
        if serial and not alive:
            self.ended.add(mark)


def walk(chain: Chain, seed: int, steps: int) -> History:
    acl = Acl.deploy(chain, OWNER)
    history = History(acl, random.Random(seed), Model(chain.chain_id, acl.address, OWNER))
    for number in range(STEPS_MAX * steps):
        if number >= steps and history.goes_everywhere(steps):
            break
        history.step()
        history.compare(fully=number % 50 == 49)
    history.compare(fully=True)
    replay = Replay(chain.chain_id, acl.address, acl.logs)
    model = history.model
    assert (replay.seq, replay.head) == (model.seq, model.head)
    assert acl.slot(1) == replay.head
    assert replay._state() == model._state()
    return history


@pytest.mark.long
@pytest.mark.timeout(600)
def test_random_histories_equal_the_model(
    chain: Chain, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    history = walk(chain, SEED, STEPS[chain.name])
    record_property("seed", SEED)
    with capsys.disabled():
        print(  # noqa: T201  # the seed replays it
            f"\n{chain.name}: seed {SEED}, {STEPS[chain.name]} steps,"
            f" {sum(history.done.values())} done {history.done},"
            f" {sum(history.refused.values())} refused {history.refused},"
            f" {history.compared} records compared, {history.by_admin} in force by an admin's"
            f" grant, {history.cut} of those cut down by its record,"
            f" {len(history.ended)} tenures ended"
        )
    assert history.goes_everywhere(STEPS[chain.name])
