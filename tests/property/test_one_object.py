"""`SERVICE:NAME` over generated schemas: nothing that the grant lets reach is another object.

A failure names its seed: `WW_SEED=… pytest tests/property/test_one_object.py -n 0`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.broker.grants import Grant
from wetware.broker.naming import one_object
from wetware.broker.terms import Terms
from wetware.errors import CapabilityError, InvalidArgument, SchemaError

from ..unit.broker.parts import root, tree

pytestmark = pytest.mark.anyio
SEEDS = [int(os.environ["WW_SEED"])] if "WW_SEED" in os.environ else range(50)
NAME, OTHER = "1", "2"
VALUES = {"Text": (NAME, OTHER), "UInt8": (1, 2), "Data": (b"1", b"2")}
MARKS = ("$Ww.name", "$Ww.constrained", "")
HEAD = """@0xc0ffee0000000001;
using Ww = import "/wetware/schema/ww.capnp";
"""


@dataclass
class Call:
    """A method: the type and mark of its parameter `name`, if it has one, and what goes where."""

    name: str
    key: str = ""  # "name", "label" or none
    type: str = "Text"
    mark: str = ""
    takes: int | None = None  # an interface that the caller implements
    gives: tuple[int, ...] = ()
    data: bool = False
    form: str = "plain"  # how capabilities are returned

    def text(self, ordinal: int) -> str:
        params = ["by :Int64"]
        if self.key:
            params.append(f"{self.key} :{self.type} {self.mark}")
        if self.takes is not None:
            params.append(f"sink :I{self.takes}")
        results = [
            {"plain": f"r{i} :I{to}", "list": f"r{i} :List(I{to})", "struct": f"r{i} :Holds{to}"}[
                self.form
            ]
            for i, to in enumerate(self.gives)
        ]
        results += ["data :Data"] * self.data
        return f"  {self.name} @{ordinal} ({', '.join(params)}) -> ({', '.join(results)});"


@dataclass
class World:
    """A service: its own interface is I0."""

    calls: list[list[Call]] = field(default_factory=list)
    extends: dict[int, int] = field(default_factory=dict)

    @classmethod
    def random(cls, rng: random.Random) -> World:
        world = cls()
        count = rng.choice([1, 2, 2, 3, 3, 4])
        typed = rng.choices(["Text", "UInt8", "Data"], [8, 1, 1])[0]
        mixed = rng.random() < 0.4  # names of two kinds: such a schema may be refused
        for i in range(count):
            if i and rng.random() < 0.2:
                world.extends[i] = rng.randrange(i)
            world.calls.append([])
            for n in range(rng.randrange(1, 4)):
                call = Call(f"m{i}x{n}")
                if rng.random() < (0.4 if i else 0.7):
                    call.key = "label" if mixed and rng.random() < 0.4 else "name"
                    call.type = typed if rng.random() < 0.9 else "Text"
                    call.mark = rng.choices(MARKS, [6, 3, 1])[0]
                if rng.random() < 0.15:
                    call.takes = rng.randrange(count)
                call.gives = tuple(rng.sample(range(count), rng.choice([0, 1, 1, min(2, count)])))
                call.form = rng.choices(["plain", "list", "struct"], [6, 1, 1])[0]
                call.data = rng.random() < 0.2
                world.calls[i].append(call)
        return world

    def text(self) -> str:
        parts = [HEAD]
        for i, calls in enumerate(self.calls):
            above = f" extends(I{self.extends[i]})" if i in self.extends else ""
            lines = "\n".join(call.text(n) for n, call in enumerate(calls))
            parts.append(
                f"interface I{i}{above} {{\n{lines}\n}}\nstruct Holds{i} {{ i @0 :I{i}; }}"
            )
        return "\n".join(parts)

    def lineage(self, i: int) -> list[int]:
        return [i, *(self.lineage(self.extends[i]) if i in self.extends else [])]

    def all_calls(self, i: int) -> list[Call]:
        return [call for above in self.lineage(i) for call in self.calls[above]]

    def heirs(self, i: int) -> list[int]:
        """What an object may be of which the schema says that it is an I<i>."""
        return [j for j in range(len(self.calls)) if i in self.lineage(j)]

    def handed(self, call: Call) -> set[int]:
        """The interfaces of what the caller gets by a call: returned, or by its own callback."""
        got = set(call.gives)
        todo, seen = [] if call.takes is None else [(call.takes, False)], set()
        while todo:
            i, called = todo.pop()
            if (i, called) in seen:
                continue
            seen.add((i, called))
            if called:  # the caller calls it by itself: another step
                got.add(i)
                continue
            for theirs in self.all_calls(i):
                todo += [(theirs.takes, True)] if theirs.takes is not None else []
                todo += [(back, False) for back in theirs.gives]
        return got

    def marked(self, first: int) -> set[str]:
        """The names of the parameters with `$Ww.name`, in all that an interface leads to."""
        reached, todo = set(), [first]
        while todo:
            i = todo.pop()
            if i not in reached:
                reached.add(i)
                todo += [j for call in self.all_calls(i) for j in self.handed(call)]
        return {c.key for i in reached for c in self.all_calls(i) if c.mark == "$Ww.name"}

    def ambiguous(self) -> bool:
        """Whether it cannot be told what NAME is, for some interface."""
        return any(len(self.marked(i)) > 1 for i in range(len(self.calls)))


def patterns(rng: random.Random, world: World) -> frozenset[str]:
    i = max(rng.randrange(len(world.calls)) for _ in range(2))
    if rng.random() < 0.3:
        return frozenset({f"I{i}.*"})
    return frozenset(
        f"I{i}.{rng.choice(world.all_calls(i)).name}" for _ in range(rng.randrange(1, 3))
    )


def allowed(grant: Grant, method: rpc.Method, key: str, value: object) -> bool:
    args: dict[str, object] = {"by": 1, "sink": None}
    if key:
        args[key] = value
    running: Any = asyncio.get_running_loop().create_future()
    try:
        assert grant.enter(method, args, running) is None
    except CapabilityError:
        return False
    grant.leave(running)
    return True


def explore(world: World, schema: rpc.Schema, grant: Grant) -> set[str]:
    """All that a holder can do, from the service's own object on; returns what it could call."""
    done: set[str] = set()
    (naming,) = world.marked(0)
    # (interface, the object it is of); the service's own object may be of an heir, too.
    todo: list[tuple[int, str | None]] = [(i, None) for i in world.heirs(0)]
    seen = set(todo)
    while todo:
        i, of = todo.pop()
        for call in world.all_calls(i):
            method = schema[f"I{i}"].methods[call.name]
            values = zip((NAME, OTHER), VALUES[call.type], strict=True)
            for named, value in values if call.key else ((of, None),):
                if not allowed(grant, method, call.key, value):
                    continue
                about = named if call.key == naming else of
                assert about == NAME, f"{method.where} of {about}, through\n{grant.terms}"
                done.add(method.where)
                for got in itertools.chain(*(world.heirs(j) for j in world.handed(call))):
                    if (got, about) not in seen:
                        seen.add((got, about))
                        todo.append((got, about))
    return done


def check(world: World, schema: rpc.Schema, rng: random.Random, done: Counter[str]) -> None:
    mine = frozenset({"*"}) if rng.random() < 0.6 else patterns(rng, world) | patterns(rng, world)
    asked = frozenset() if rng.random() < 0.4 else patterns(rng, world)
    service = schema.I0
    try:
        granted, where = one_object("svc", service, NAME, asked, mine)
    except InvalidArgument:
        done["refused"] += 1
        return
    on = tree()
    login = on.session(root(on, svc=set(mine)).principal, on.roots())
    share = login.derive(label="share", terms=Terms({"svc": granted}, (where,)), service="svc")
    called = explore(world, schema, share)
    assert called == granted, "each method that is granted can be got at and called"
    done["granted"] += 1
    done["nested"] += any(not method.startswith("I0.") for method in called)
    if not asked:
        if "*" in mine:
            bound = {c.name for c in world.all_calls(0) if {c.key} == world.marked(0) and c.mark}
            assert {m for m in called if m.startswith("I0.")} >= {f"I0.{n}" for n in bound}
        return
    wanted = {m for m in granted if m in asked or f"{m.split('.')[0]}.*" in asked}
    for added in granted - wanted:
        (call,) = [c for c in world.all_calls(0) if f"I0.{c.name}" == added]
        assert call.form == "plain", "it returns capabilities and nothing else"
        assert not call.data
        assert call.takes is None, "what a callback is given would be more"
        assert {f"I{i}" for i in call.gives} <= {m.split(".")[0] for m in wanted}
        done["added"] += 1


@pytest.mark.timeout(300)
async def test_nothing_but_the_object_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done: Counter[str] = Counter()
    for seed in SEEDS:
        rng = random.Random(seed)
        world = World.random(rng)
        path = tmp_path / f"{seed}.capnp"
        path.write_text(world.text())
        try:
            schema = rpc.load(path)
        except SchemaError as exc:
            assert world.ambiguous(), f"seed {seed}: {exc.message}"  # noqa: PT017
            done["schema refused"] += 1
            continue
        assert not world.ambiguous(), f"seed {seed}: it cannot be told what NAME is"
        for _ in range(30):
            try:
                check(world, schema, rng, done)
            except AssertionError as exc:
                raise AssertionError(f"seed {seed}: {exc}\n{world.text()}") from exc
    if len(SEEDS) > 1:
        short = {what for what in ("granted", "nested", "added", "refused") if done[what] < 20}
        assert not short, f"the schemas do not try enough: {done}"
        assert done["schema refused"] > 2
