"""Random transactions and random reorganisations: the replica is the contract, never more.

After each look at a real anvil, `replica.tip` and `replica.final` are compared with the contract's
own views at the same blocks and the same time. What the replica allows is compared with the
contract at both, and with what was ever seen to be withdrawn in a block that is not final yet,
whether or not a reorganisation took it back.

A long run by hand (one chain after another, each with a seed of its own: anvil loses old states
after some hundred blocks), and the replay of a seed:

    WW_SECONDS=600 .venv/bin/pytest -n0 -m '' -s plugins/auth_evm/tests/chain/test_fuzz.py
    WW_SEED=1234 .venv/bin/pytest -n0 -m '' -s plugins/auth_evm/tests/chain/test_fuzz.py
"""

from __future__ import annotations

import copy
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from plugins.auth_evm.tests.chain.net import Net, net, raw
from plugins.auth_evm.tests.contract.chains import INSTALL, Reverted, calldata, find_anvil
from plugins.auth_evm.tests.contract.model import Model
from plugins.auth_evm.tests.contract.people import (
    GUARDIAN,
    KEY,
    KEY_2,
    LAB,
    MEMBER,
    NODE,
    OWNER,
    ROOT,
    TEAM,
)
from plugins.auth_evm.tests.contract.test_property import PEOPLE, History

from wetware_auth_evm.chain.finality import Bounds
from wetware_auth_evm.chain.follower import Follower
from wetware_auth_evm.chain.state import State

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(find_anvil() is None, reason=f"anvil is not installed; run: {INSTALL}"),
]
SEED = int(os.environ.get("WW_SEED", random.SystemRandom().randrange(2**32)))
SECONDS = float(os.environ.get("WW_SECONDS", 0))
ROUNDS = 500
FINAL_BLOCKS = 8
COMPARISONS_MIN = 5000
ROLES = [MEMBER, NODE, GUARDIAN]
NAMES = [(role, account) for role in ROLES for account in PEOPLE]
KEYS = [KEY, KEY_2]


def clone(model: Model) -> Model:
    """A copy that further transactions leave alone."""
    new = copy.copy(model)
    for name in ("grants", "admins", "keys", "key_counts", "account_epochs", "scope_epochs"):
        setattr(new, name, dict(getattr(model, name)))
    new._pending = []
    return new


class Fuzz:
    """One random history of a chain, and of a node that follows it."""

    def __init__(self, chain: Net, rng: random.Random) -> None:
        self.net, self.rng = chain, rng
        model = Model(chain.chain.chain_id, chain.acl.address, OWNER)
        self.history = History(chain.acl, rng, model)
        self.first = chain.block("latest")[0]
        self.models: list[Model] = [clone(model)]
        """Of each block from `first` on, as the chain is now."""
        self.new_from = self.first + 1
        """The lowest block that the replica has not looked at."""
        self.dropped: list[tuple[str, tuple[Any, ...], str]] = []
        self.sent: dict[int, tuple[str, tuple[Any, ...], str]] = {}
        self.drops: list[tuple[int, Model, Model]] = []
        """(block, the state before it, after it) of all blocks ever seen that changed anything."""
        self.compared = self.reorgs = self.regressions = self.restarts = self.allowed = 0
        self.kept_back = 0

    @property
    def tip(self) -> int:
        return self.first + len(self.models) - 1

    # --- what happens to the chain ---

    def transact(self) -> None:
        if self.dropped and self.rng.random() < 0.3:
            function, args, sender = self.dropped.pop()  # it comes again
        elif self.rng.random() < 0.4:
            function, args, sender = self.favour()
        else:
            function, args, sender = self.history.choose()
        model = clone(self.models[-1])
        try:
            model.apply(function, args, sender, self.net.chain.time)
        except Reverted:
            if self.rng.random() < 0.9:
                return
            model = clone(self.models[-1])
        try:
            self.net.acl.send(function, *args, sender=sender)
        except Reverted:
            assert model.seq == self.models[-1].seq
        self.models.append(model)
        self.history.model = clone(model)
        self.sent[self.tip] = (function, args, sender)

    def favour(self) -> tuple[str, tuple[Any, ...], str]:
        """Something that lasts, in this scope: else next to nothing would ever be allowed."""
        rng, model, end = self.rng, self.models[-1], self.net.chain.time + 20_000
        if model.paused:
            return "unpause", (), model.owner
        mine = [name for name in model.grants if name[0] in (TEAM, ROOT) and name[2] in PEOPLE]
        if mine and rng.random() < 0.3:
            scope, role, account = rng.choice(mine)
            return "bindKey", (scope, [role], rng.choice(KEYS), end - 1), account
        role, account = rng.choice(NAMES)
        rights = rng.choice([1, 3, 7, 15])
        return "grant", (rng.choice([TEAM, TEAM, ROOT]), role, account, 0, end, rights), model.owner

    def mine(self) -> None:
        for _ in range(self.rng.choice([1, 1, 2, 3, FINAL_BLOCKS])):
            self.net.mine(1)
            self.models.append(clone(self.models[-1]))

    def reorg(self, depth: int) -> None:
        self.net.reorg(depth)
        fork = self.tip - depth
        for number in range(fork + 1, self.tip + 1):
            if number in self.sent:
                self.dropped.append(self.sent.pop(number))
        self.rng.shuffle(self.dropped)
        del self.dropped[20:]
        kept = self.models[: len(self.models) - depth]
        self.models = kept + [clone(kept[-1]) for _ in range(depth)]
        self.history.model = clone(self.models[-1])
        self.new_from = min(self.new_from, fork + 1)
        self.reorgs += 1

    def pass_time(self) -> None:
        self.net.chain.time += self.rng.choice([1, 5, 30, 100, 1000])

    # --- comparing ---

    def queries(self, now: int) -> list[tuple[Any, ...]]:
        rng = self.rng
        asked: list[tuple[Any, ...]] = [("state",)]
        for role, account in rng.sample(NAMES, 6):
            for scope in (TEAM, rng.choice([ROOT, LAB])):
                asked.append(("rightsOf", scope, role, account))
                asked.append(("keyRightsOf", scope, role, account, rng.choice(KEYS)))
        asked += [("epochs", rng.choice([TEAM, LAB, ROOT]), who) for who in rng.sample(PEOPLE, 2)]
        return asked

    def views(self, block: tuple[int, bytes], now: int, asked: list[tuple[Any, ...]]) -> list[Any]:
        """The contract's answers at a block, at a time."""
        at = {"blockHash": "0x" + block[1].hex()}
        answers = self.net.chain.batch(
            [
                (
                    "eth_call",
                    (
                        {"to": self.net.acl.address, "data": "0x" + calldata(*query).hex()},
                        at,
                        {},
                        {"time": hex(now)},
                    ),
                )
                for query in asked
            ]
        )
        pairs = zip(asked, answers, strict=True)
        return [self.net.acl._decode(query[0], raw(answer)) for query, answer in pairs]

    def compare_state(self, state: State, block: tuple[int, bytes], now: int, what: str) -> None:
        asked = self.queries(now)
        for query, answer in zip(asked, self.views(block, now, asked), strict=True):
            match query:
                case ("state",):
                    pending, ready_at = state.pending
                    mine: Any = (state.seq, state.head, state.owner, state.paused)
                    mine += (pending, ready_at)
                    seq, head, _, owner, paused, proposed, ready = answer
                    answer = (seq, head, raw(owner), paused, raw(proposed), ready)
                case ("rightsOf", scope, role, who):
                    mine = state.rights(scope, role, raw(who), now)
                case ("keyRightsOf", scope, role, who, key):
                    mine = state.key_rights(scope, role, raw(who), key, now)
                case ("epochs", scope, who):
                    mine = state.epochs(scope, raw(who))
                case _:
                    raise AssertionError(query)
            assert mine == answer, f"{what}: {query}"
            self.compared += 1

    def compare(self, follower: Follower, what: str) -> None:
        replica, now = follower.replica, follower.replica.now()
        assert now == self.net.chain.time
        assert replica.tip_block == self.net.block("latest"), what
        assert replica.final_block == self.net.block("finalized"), what
        self.compare_state(replica.tip, replica.tip_block, now, f"{what}, tip")
        self.compare_state(replica.final, replica.final_block, now, f"{what}, final")
        self._remember()
        self._compare_decisions(follower, now, what)

    def _remember(self) -> None:
        for number in range(self.new_from, self.tip + 1):
            before, after = self.models[number - self.first - 1 : number - self.first + 1]
            if after.seq != before.seq:
                self.drops.append((number, before, after))
        self.new_from = self.tip + 1
        final = self.net.block("finalized")[0]
        self.drops = [drop for drop in self.drops if drop[0] > final]

    def _compare_decisions(self, follower: Follower, now: int, what: str) -> None:
        replica = follower.replica
        waits = bool(replica.held or replica._left or replica._pausing)
        for role, account in NAMES:
            who = raw(account)
            for key in (None, *KEYS):
                if key is None:
                    got = replica.rights(role, who)
                    assert got == replica.roles(who).get(role, 0), what
                    final = replica.final.rights(TEAM, role, who, now)
                    tip = replica.tip.rights(TEAM, role, who, now)
                else:
                    got = replica.key_roles(who, key).get(role, 0)
                    assert got == replica.key_accounts(role, key).get(who, 0), what
                    final = replica.final.key_rights(TEAM, role, who, key, now)
                    tip = replica.tip.key_rights(TEAM, role, who, key, now)
                assert got & ~(final & tip) == 0, f"{what}: {role!r} {account} {key!r}"
                assert waits or got == final & tip, f"{what}: {role!r} {account} {key!r}"
                self.allowed += got != 0
                self.kept_back += got != final & tip
                self.compared += 1
                name = (TEAM, role, account)
                for number, before, after in self.drops:
                    if key is None:
                        lost = before.rights(name, now) & ~after.rights(name, now)
                    else:
                        lost = before.key_rights(name, key, now)
                        lost &= ~after.key_rights(name, key, now)
                    assert got & lost == 0, (
                        f"{what}: {role!r} of {account} {key!r} was withdrawn in block {number}, "
                        "which is not final"
                    )

    # --- a round ---

    async def look(self, follower: Follower, what: str) -> None:
        """Let the node look at the chain, and compare."""
        chain, replica = self.net, follower.replica
        chain.sync_clock()
        chain.clock.wall_s = chain.chain.time
        # Not each deep reorganisation is a regression: what the node has not seen to be final may
        # go, and empty blocks may be made again with the same hash.
        number, hash_ = replica.final_block
        regresses = number >= 0 and chain.block(hex(number))[1] != hash_
        await follower.look()
        if regresses:
            assert replica.regressed, what
            assert not any(replica.roles(raw(who)) for who in PEOPLE), what
            self.regressions += 1
            self.drops, self.new_from = [], self.first + 1
            follower.forget()
            await follower.look()
        assert (replica.unfit(), replica.fault) == ("", ""), what
        self.compare(follower, what)

    def happen(self) -> None:
        """Something random."""
        chance = self.rng.random()
        if chance < 0.7:
            for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
                self.transact()
        elif chance < 0.82:
            self.mine()
        elif chance < 0.95:
            unsettled = self.tip - self.net.block("finalized")[0]
            if unsettled > 0:
                self.reorg(self.rng.randint(1, unsettled))
        elif chance < 0.99:
            self.pass_time()
        elif self.tip - self.first > 2 * FINAL_BLOCKS:
            self.reorg(FINAL_BLOCKS + self.rng.randint(1, 4))  # below finalized


@pytest.mark.long
@pytest.mark.timeout(max(120.0, 2 * SECONDS + 60))
async def test_random_transactions_and_reorganisations(
    tmp_path: Path, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    record_property("seed", SEED)
    end = time.monotonic() + SECONDS
    seed = SEED
    while True:
        started = time.monotonic()
        fuzz = await a_history(seed, tmp_path / str(seed))
        with capsys.disabled():
            print(  # noqa: T201  # the seed replays it
                f"\nfuzz: seed {seed}, {ROUNDS} rounds, {fuzz.tip} blocks, "
                f"{fuzz.compared} comparisons, {fuzz.reorgs} reorganisations, "
                f"{fuzz.regressions} regressions, {fuzz.restarts} restarts, {fuzz.allowed} times "
                f"allowed, {fuzz.kept_back} times held or waiting, "
                f"{time.monotonic() - started:.1f} s"
            )
        assert fuzz.compared >= COMPARISONS_MIN
        # It is worth something only if it went everywhere.
        assert fuzz.reorgs >= 10
        assert fuzz.allowed >= 500
        assert fuzz.kept_back >= 50
        if time.monotonic() >= end:
            break
        seed += 1


async def a_history(seed: int, directory: Path) -> Fuzz:
    """One chain, and a node that follows it and is restarted now and then."""
    rng = random.Random(seed)
    bounds = Bounds(verified_s_max=30.0, tip_age_s_max=None)
    with net(final_blocks=FINAL_BLOCKS) as chain:
        fuzz = Fuzz(chain, rng)
        for _ in range(FINAL_BLOCKS):
            fuzz.mine()
        rounds = 0
        while rounds < ROUNDS:
            async with chain.follower(directory=directory, bounds=bounds) as follower:
                while rounds < ROUNDS:
                    rounds += 1
                    fuzz.happen()
                    if rng.random() < 0.2:
                        continue  # several things between two looks
                    await fuzz.look(follower, f"seed {seed}, round {rounds}")
                    if rng.random() < 0.03:
                        fuzz.restarts += 1
                        break
    return fuzz
