"""Random histories of grants over several nodes, compared with a reference model at each call.

A failure names its seed: `WW_SEED=… pytest tests/property/test_broker.py -n 0`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.client import Session
from wetware.errors import CapabilityError, LimitExceeded, NotFound, WetwareError
from wetware.hookspecs import RoleProfile

from ..unit.broker.cluster import Backend, MemNode, box
from ..unit.broker.parts import Clock
from .broker_model import METHODS, Model, Node

pytestmark = pytest.mark.anyio
SEEDS = [int(os.environ["WW_SEED"])] if "WW_SEED" in os.environ else range(12)
STEPS = int(os.environ.get("WW_STEPS", "150"))
USERS, KEYS = ("ada", "bob"), ("a", "ab", "abc", "b")


@dataclass
class Held:
    """A session that somebody holds, and its grant in the model."""

    model: Node
    session: Session
    box: rpc.Ref | None
    stack: contextlib.AsyncExitStack
    grant: str


@dataclass
class Shared:
    """A sturdy reference, and its grant in the model."""

    model: Node
    ref: str
    grant: str


class History:
    """One random history."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.rng, self.clock, self.model = random.Random(seed), Clock(), Model()
        self.clock.now = self.model.now
        profile = RoleProfile({"box": frozenset({"*"})})
        self.backend = Backend({"member": profile}, {user: {"member"} for user in USERS})
        self.nodes = {name: MemNode(name, directory, self.backend, self.clock) for name in "abc"}
        self.stacks: dict[str, contextlib.AsyncExitStack] = {}
        self.held: list[Held] = []
        self.shared: list[Shared] = []
        self.done: Counter[str] = Counter()

    async def start(self, name: str) -> None:
        self.stacks[name] = contextlib.AsyncExitStack()
        await self.stacks[name].enter_async_context(self.nodes[name].running())

    async def run(self) -> None:
        for name in self.nodes:
            await self.start(name)
        try:
            for _ in range(STEPS):
                step = self.rng.choices(
                    [self.login, self.attenuate, self.share, self.redeem, self.call,
                     self.revoke, self.close, self.withdraw, self.advance, self.restart],
                    [8, 14, 8, 13, 60, 5, 4, 1, 4, 1],
                )[0]  # fmt: skip
                await step()
            for held in self.held:  # at the end, each once more
                for method in METHODS:
                    await self._call(held, method, self.rng.choice(KEYS))
        finally:
            for held in self.held:
                await held.stack.aclose()
            for stack in self.stacks.values():
                await stack.aclose()

    # --- steps ------------------------------------------------------------------------------------

    async def login(self) -> None:
        user, name = self.rng.choice(USERS), self.rng.choice(list(self.nodes))
        model = Node(user, name, [self.model.root(user, name)], kind="session")
        await self._hold(model, self.nodes[name].login(user))

    def terms(self, model: Node) -> dict[str, Any]:
        """Random terms, put into the model and as arguments."""
        rng, out = self.rng, {}
        if rng.random() < 0.4:
            model.methods = frozenset(rng.sample(METHODS, 1))
            out["services"] = {"box": [f"Box.{method}" for method in model.methods]}
        if rng.random() < 0.4:
            model.prefix = rng.choice(KEYS)
            out["where"] = {"key": f"prefix:{model.prefix}"}
        if rng.random() < 0.4:
            model.calls = out["calls"] = rng.randrange(1, 6)
        if rng.random() < 0.3:
            out["expires_s"] = rng.uniform(1, 60)
            model.expires = self.model.now + out["expires_s"]
        return out

    async def attenuate(self) -> None:
        if not self.held:
            return
        parent = self.rng.choice(self.held)
        model = Node(parent.model.owner, parent.model.at)
        terms = self.terms(model)
        try:
            session = await parent.session.attenuate(**terms)
        except WetwareError as exc:
            self.refused(parent.model, model, exc)
            return
        self.allowed(parent.model, model)
        stack = contextlib.AsyncExitStack()
        stack.push_async_callback(session.close)
        await self._add(model, session, stack)

    async def share(self) -> None:
        if not self.held:
            return
        parent = self.rng.choice(self.held)
        model = Node(parent.model.owner, parent.model.at, kind="share")
        uses = self.rng.choice([0, 1, 3])
        model.uses = uses or None
        terms = {"expires_s": 0.0, **self.terms(model)}
        try:
            ref, info = await parent.session.share(**terms, uses=uses)
        except WetwareError as exc:
            self.refused(parent.model, model, exc)
            return
        self.allowed(parent.model, model)
        self.shared.append(Shared(model, ref, info.id))

    def refused(self, parent: Node, asked: Node, exc: WetwareError) -> None:
        """A derivation was refused: because the parent is over, or it asked for more."""
        lacks = any(not asked.methods <= a.methods for a in parent.above())
        explicit = asked.methods != frozenset(METHODS)
        assert not self.model.works(parent) or (lacks and explicit), f"{exc.code}: {exc}"
        self.done["refused derivation"] += 1

    def allowed(self, parent: Node, made: Node) -> None:
        assert self.model.works(parent), "derived from what had ended"
        made.parents.append(parent)
        parent.children.append(made)
        self.done["derivation"] += 1

    async def redeem(self) -> None:
        if not self.shared:
            return
        share = self.rng.choice(self.shared)
        gives = self.model.redeem(share.model)
        model = Node("bearer", share.model.at, [share.model])
        try:
            await self._hold(model, self.nodes[share.model.at].redeem(share.ref))
        except (CapabilityError, LimitExceeded) as exc:
            assert not gives, f"{exc.code}: {exc}"  # noqa: PT017
            share.model.children.remove(model)
            return
        assert gives, "a reference was redeemed that had ended"
        self.done["redemption"] += 1

    async def call(self) -> None:
        if self.held:
            held = self.rng.choice(self.held)
            await self._call(held, self.rng.choice(METHODS), self.rng.choice(KEYS))

    async def _call(self, held: Held, method: str, key: str) -> None:
        expected = self.model.call(held.model, method, key)
        try:
            if held.box is None:
                raise CapabilityError("it could not be opened")
            await held.box.call(method, key=key, **({"data": b""} if method == "put" else {}))
        except WetwareError as exc:
            assert not expected, f"refused: {method} {key}: {exc.code}: {exc}"  # noqa: PT017
            self.done["denied"] += 1
        else:
            assert expected, f"allowed, and it is not: {method} {key}"
            self.done["called"] += 1

    async def revoke(self) -> None:
        """By whoever is logged in as the owner, or by an operator."""
        candidates = [(h.model, h.grant) for h in self.held if h.model.kind != "role"]
        candidates += [(s.model, s.grant) for s in self.shared]
        if not candidates:
            return
        model, grant = self.rng.choice(candidates)
        owner = next(
            (h for h in self.held if h.model.kind == "session" and h.model.owner == model.owner
             and h.model.at == model.at and self.model.works(h.model)
             and h.model not in set(model.above()) | set(model.below())),
            None,
        )  # fmt: skip
        if owner is not None:
            with contextlib.suppress(NotFound):  # it is gone from the tree: nothing to end
                await owner.session.revoke(grant)
        elif (found := self.nodes[model.at].tree.grants.get(grant)) is not None:
            found.revoke("by the operator")
        self.model.revoke(model)
        self.done["revocation"] += 1

    async def close(self) -> None:
        if self.held:
            held = self.held.pop(self.rng.randrange(len(self.held)))
            await held.stack.aclose()
            self.model.close(held.model)

    async def withdraw(self) -> None:
        user = self.rng.choice(USERS)
        self.backend.withdraw(user, "member")
        self.model.withdraw(user)
        self.backend.users[user].add("member")  # and is given it again: nothing comes back
        self.done["withdrawal"] += 1

    async def advance(self) -> None:
        self.model.now += self.rng.uniform(0, 30)
        self.clock.now = self.model.now

    async def restart(self) -> None:
        name = self.rng.choice(list(self.nodes))
        stays = []
        for held in self.held:
            if held.model.at == name:
                await held.stack.aclose()
                self.model.close(held.model)
            else:
                stays.append(held)
        self.held = stays
        await self.stacks[name].aclose()
        await self.start(name)
        self.model.restart(name)
        self.done["restart"] += 1

    # --- holding ----------------------------------------------------------------------------------

    async def _hold(self, model: Node, opening: Any) -> None:
        stack = contextlib.AsyncExitStack()
        session = await stack.enter_async_context(opening)
        await self._add(model, session, stack)

    async def _add(self, model: Node, session: Session, stack: contextlib.AsyncExitStack) -> None:
        try:
            opened = await box(session)
        except CapabilityError:  # no method of it is left
            opened = None
        self.held.append(Held(model, session, opened, stack, session.identity.grant))


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_reference_exceeds_or_outlives_an_ancestor_and_none_is_refused_what_it_has(
    seed: int, tmp_path: Path
) -> None:
    history = History(seed, tmp_path)
    try:
        async with rpc.runtime(), asyncio.timeout(100):
            await history.run()
    except BaseException as exc:
        exc.add_note(f"WW_SEED={seed} WW_STEPS={STEPS} repeats it")
        raise
    assert history.done["called"] + history.done["denied"] > STEPS // 5
    for name, node in history.nodes.items():
        assert not node.tree.grants or node.tree._closing, name
