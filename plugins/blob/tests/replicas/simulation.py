"""A cluster in memory: members that crash, lose their disks, part and change, in a random schedule.

Every call, every write and every round is a task that is run a step at a time, in the order of a
seed. What a member sees of others (who is alive, what they match) is as old as the schedule has it.
"""

from __future__ import annotations

import random
from collections.abc import Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any, Final

from wetware.errors import Disconnected, WetwareError
from wetware.testing import FakeClock
from wetware_blob.format.cid import RAW, Cid
from wetware_blob.replicas.duties import LEASE_S, Copy, Kept, Replicas, Wanted

GRACE_S: Final = 60.0
WRITE_S: Final = 8.0
"""No write takes longer: less than MARGIN_S, as a disk is that works."""
NAMES: Final = ("a", "b", "c", "d", "e", "f")


class Lost(AssertionError):
    """Fewer copies than wanted, and not by a fault."""


class _Hop:
    """Others run."""

    def __await__(self) -> Generator[Any, None, None]:
        yield self


class _Answer:
    """What a task waits for."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: WetwareError | None = None
        self.done = False

    def set(self, result: Any = None, error: WetwareError | None = None) -> None:
        if not self.done:
            self.done, self.result, self.error = True, result, error

    def __await__(self) -> Generator[Any, None, Any]:
        while not self.done:
            yield self
        if self.error is not None:
            raise self.error
        return self.result


@dataclass(eq=False)
class _Task:
    coro: Coroutine[Any, Any, Any]
    node: Node
    answer: _Answer
    what: str = ""
    waits: _Answer | None = None
    writing_since: float | None = None


@dataclass(eq=False)
class Node:
    """A member. Its disk stays when it crashes; `id` is that of its store."""

    name: str
    world: World
    id: bytes
    disk: dict[bytes, Copy] = field(default_factory=dict)
    up: bool = True
    destroyed: bool = False
    room: int = 100
    drains: bool = False
    dead_since: dict[str, float] = field(default_factory=dict)
    """As it sees the others."""
    mismatched: set[str] = field(default_factory=set)
    """Who may have no copies, by labels as it sees them: each holds itself for the one to drop."""
    replicas: Replicas = field(init=False)
    fetching: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.mismatched = {self.name}
        self.start()

    def start(self) -> None:
        self.up, self.fetching, self.drains = True, set(), False
        self.replicas = self.world.kind(
            self.name, self, _Calls(self), self.world.clock, grace_s=GRACE_S
        )

    # --- duties.Disk

    async def read(self, *, single: bool) -> list[Copy]:
        found = [c for c in self.disk.values() if single or c.copies > 1]
        await _Hop()
        return found

    async def keep(self, asker: str, copy: Copy) -> Kept:
        if len(self.disk) >= self.room:
            return Kept(room=False)
        if copy.id not in self.fetching:
            self.fetching.add(copy.id)
            self.world.spawn(self, self._fetch(copy))
        return Kept(room=True)

    async def _fetch(self, copy: Copy) -> None:
        for _ in range(self.world.rng.randrange(1, 9)):
            await _Hop()
        sources = [n for n in self.world.reachable(self) if copy.id in n.disk]
        self.fetching.discard(copy.id)
        if sources:
            await self.write(copy)
            await self.replicas.refresh()

    async def amend(self, copy: Copy) -> bool:
        if copy.id not in self.disk:
            return False
        await self.write(copy, only_if_there=True)
        return copy.id in self.disk

    async def write(self, copy: Copy, *, only_if_there: bool = False) -> None:
        async with self.world.writing():
            await _Hop()
            if copy.id in self.disk or not only_if_there:
                self.disk[copy.id] = copy
                self.world.check()
            await _Hop()

    async def drop(self, copy: Copy) -> None:
        async with self.world.writing():
            await _Hop()
            if self.disk.pop(copy.id, None) is not None:
                self.world.dropped(self, copy)
            await _Hop()

    async def check_whole(self) -> None: ...

    async def round(self) -> None:
        await self.replicas.refresh()
        if self.drains:
            self.replicas.draining = 1
        await self.replicas.survey(list(self.replicas.copies))
        for id_ in list(self.replicas.copies):
            self.world.spawn(self, self.replicas.tend(id_))


class _Calls:
    """duties.Cluster for one node."""

    def __init__(self, node: Node) -> None:
        self._node, self._world = node, node.world

    def alive(self, where: str = "") -> set[str]:
        hidden = {*self._node.dead_since, *(self._node.mismatched if where else ())}
        return {name for name in self._world.nodes if name not in hidden}

    def gone(self, peer: str) -> bool:
        since = self._node.dead_since.get(peer)
        return since is not None and self._world.clock.now - since >= GRACE_S

    async def holding(self, ids: list[bytes]) -> dict[str, set[bytes]]:
        found = {}
        for peer in sorted(self.alive() - {self._node.name}):
            try:
                has = await self._call(peer, _has, ids)
            except WetwareError:
                continue
            found[peer] = {id_ for id_, yes in zip(ids, has, strict=True) if yes}
        return found

    async def wanted(self, home: str, ids: list[bytes]) -> Wanted:
        return await self._call(home, _wants, ids)  # type: ignore[no-any-return]

    async def keep(self, peer: str, copy: Copy) -> Kept:
        return await self._call(peer, Replicas.keep, self._node.name, copy)  # type: ignore[no-any-return]

    async def lease(self, peer: str, copy: Copy) -> float:
        return await self._call(peer, Replicas.lease, copy.id, own=True)  # type: ignore[no-any-return]

    async def drop(self, peer: str, ids: list[bytes]) -> None:
        await self._call(peer, Replicas.dropped, self._node.name, ids)

    async def _call(self, peer: str, method: Any, *args: Any, own: bool = False) -> Any:
        world, target = self._world, self._world.nodes[peer]
        await _Hop()
        if target not in world.reachable(self._node):
            raise Disconnected("not reached")
        bound = getattr(target.replicas, method.__name__) if own else None
        coro = bound(*args) if bound else method(target.replicas, *args)
        answer = world.spawn(target, coro)
        result = await answer
        await _Hop()
        if target not in world.reachable(self._node):
            raise Disconnected("the answer was lost")
        return result


async def _has(replicas: Replicas, ids: list[bytes]) -> list[bool]:
    _loaded(replicas)
    return replicas.has(ids)


async def _wants(replicas: Replicas, ids: list[bytes]) -> Wanted:
    _loaded(replicas)
    return await replicas.wants(ids)


def _loaded(replicas: Replicas) -> None:
    if not replicas.loaded:
        raise Disconnected("it starts")


async def _begun(coro: Coroutine[Any, Any, Any]) -> Any:
    """What was begun can be closed without a warning that it never was."""
    try:
        await _Hop()
        return await coro
    finally:
        coro.close()


class World:
    """Runs a schedule.

    Args:
        seed: Of everything.
        kind: The rules; another class shows what breaks without one of them.
    """

    def __init__(self, seed: int, kind: type[Replicas] = Replicas) -> None:
        self.rng, self.kind = random.Random(seed), kind
        self.clock = FakeClock()
        self.tasks: list[_Task] = []
        self.running: _Task | None = None
        self.nodes: dict[str, Node] = {}
        for name in NAMES:
            self.nodes[name] = Node(name, self, self.rng.randbytes(8))
        self.islands: dict[str, int] = dict.fromkeys(NAMES, 0)
        self.pins: dict[bytes, Copy] = {}
        """What users have pinned and not given up."""
        self.reached: set[bytes] = set()
        self.faults: dict[bytes, list[float]] = {}
        """When disks with a copy were lost, until it is whole again."""
        self.drops = self.faulted = 0

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            self.crash(node)

    # --- tasks

    def spawn(self, node: Node, coro: Coroutine[Any, Any, Any], what: str = "") -> _Answer:
        task = _Task(_begun(coro), node, _Answer(), what)
        task.coro.send(None)
        self.tasks.append(task)
        return task.answer

    def writing(self) -> _Writing:
        assert self.running is not None
        return _Writing(self, self.running)

    def step(self, task: _Task) -> None:
        self.running = task
        try:
            waits = task.coro.send(None)
        except StopIteration as stop:
            task.answer.set(stop.value)
        except WetwareError as exc:
            task.answer.set(error=exc)
        else:
            task.waits = waits if isinstance(waits, _Answer) else None
            return
        finally:
            self.running = None
        self.tasks.remove(task)

    def steps(self, count: int) -> None:
        """Some steps of what can go on."""
        for _ in range(count):
            ready = [task for task in self.tasks if task.waits is None or task.waits.done]
            if not ready:
                return
            self.step(self.rng.choice(ready))

    def pass_time(self, seconds: float) -> None:
        for task in list(self.tasks):
            since = task.writing_since
            while since is not None and self.clock.now + seconds - since > WRITE_S:
                if task not in self.tasks or task.writing_since is None:
                    break
                self.step(task)
        self.clock.now += seconds

    # --- what happens

    def reachable(self, node: Node) -> list[Node]:
        island = self.islands[node.name]
        return [n for n in self.nodes.values() if n.up and self.islands[n.name] == island != -1]

    def pin(self) -> None:
        home = self.rng.choice([n for n in self.nodes.values() if n.up])
        digest = self.rng.randbytes(32)
        pin = home.id + digest[:8]
        copy = Copy(Cid(1, RAW, digest), home.name, pin, self.rng.choice((2, 3)), "zone=x")
        self.pins[copy.id] = copy

        async def work() -> None:
            await home.write(copy)
            await home.replicas.refresh()
            home.replicas.pinned(copy.id)

        self.spawn(home, work())

    def unpin(self) -> None:
        homes = [c for c in self.pins.values() if c.id in self.nodes[c.home].disk]
        if homes:
            copy = self.rng.choice(homes)
            home = self.nodes[copy.home]
            if home.up:
                del self.pins[copy.id]
                del home.disk[copy.id]

    def stray(self, node: Node) -> None:
        """A copy of before, at a member that was away when it became one too many."""
        copies = [self.pins[id_] for id_ in self.reached & self.pins.keys()]
        if node.up and copies:
            copy = self.rng.choice(sorted(copies, key=lambda copy: copy.id))
            node.disk.setdefault(copy.id, copy)
            self.spawn(node, node.replicas.refresh())

    def tasks_of(self, node: Node) -> list[_Task]:
        return [task for task in self.tasks if task.node is node]

    def crash(self, node: Node) -> None:
        node.up = False
        for task in self.tasks_of(node):
            self.tasks.remove(task)
            task.coro.close()
            task.answer.set(error=Disconnected("it crashed"))

    def destroy(self, node: Node) -> None:
        """It is gone for good, with its disk."""
        node.destroyed = True
        self.wipe(node)

    def wipe(self, node: Node) -> None:
        """It stops, and its disk is lost: started again it has a new store."""
        self.crash(node)
        node.id = self.rng.randbytes(8)
        for id_ in node.disk:
            self.faults.setdefault(id_, []).append(self.clock.now)
            self.faulted += 1
        node.disk = {}

    def see(self, node: Node) -> None:
        """What it knows of the others is what is so now."""
        there = {n.name for n in self.reachable(node)}
        for name in NAMES:
            if name in there:
                node.dead_since.pop(name, None)
            elif name != node.name:
                node.dead_since.setdefault(name, self.clock.now)

    # --- what must hold

    def count(self, id_: bytes) -> int:
        return sum(id_ in node.disk for node in self.nodes.values())

    def check(self) -> None:
        for id_, copy in self.pins.items():
            count = self.count(id_)
            faults = self.faults.get(id_, [])
            if count >= copy.copies:
                self.reached.add(id_)
                faults[:] = [at for at in faults if at > self.clock.now - LEASE_S]
            if id_ in self.reached and count < copy.copies - len(faults):
                raise Lost(f"{count} copies of {copy.copies}, {len(faults)} lost by faults")

    def dropped(self, node: Node, copy: Copy) -> None:
        if copy.id in self.pins:
            self.drops += 1
            recent = [t for t in self.faults.get(copy.id, ()) if t > self.clock.now - LEASE_S]
            if self.count(copy.id) + len(recent) < copy.copies:
                raise Lost(f"{node.name} dropped a copy that was needed")
        self.check()

    def happen(self) -> None:
        """One thing, at random."""
        rng, node = self.rng, self.rng.choice(list(self.nodes.values()))
        match rng.choices(range(12), (40, 20, 3, 0.5, 4, 12, 4, 2, 0.5, 0.3, 8, 0.3))[0]:
            case 0:
                if node.up and not any(task.what == "round" for task in self.tasks_of(node)):
                    self.spawn(node, node.round(), "round")
            case 1:
                self.pass_time(rng.choice((0.1, 1.0, 4.0, 20.0)))
            case 2:
                if len(self.pins) < 6 and any(n.up for n in self.nodes.values()):
                    self.pin()
            case 3:
                self.unpin()
            case 4:
                if node.up:
                    self.crash(node)
                elif not node.destroyed:
                    node.start()
            case 5:
                if node.up:
                    self.see(node)
            case 6:
                node.mismatched ^= {node.name if rng.random() < 0.5 else rng.choice(NAMES)}
            case 7:
                if rng.random() < 0.5:
                    self.islands = dict.fromkeys(NAMES, 0)
                else:
                    self.islands = {name: rng.randrange(2) for name in NAMES}
            case 8:
                node.drains = not node.drains
            case 9:
                if not any(n.destroyed for n in self.nodes.values()):
                    self.destroy(node)
            case 10:
                self.stray(node)
            case 11:
                self.wipe(node)

    def run(self, events: int) -> None:
        """A schedule. Raises Lost."""
        pace = self.rng.choice((15, 30, 60))
        for _ in range(events):
            self.happen()
            self.steps(self.rng.randrange(pace))
            self.check()

    def settle(self) -> None:
        """All that can be is well, for long enough."""
        self.islands = dict.fromkeys(NAMES, 0)
        for node in self.nodes.values():
            if not node.destroyed and not node.up:
                node.start()
            node.mismatched, node.drains, node.replicas.draining = set(), False, 0
        for _ in range(40):
            for node in self.nodes.values():
                if node.up:
                    self.see(node)
                    self.spawn(node, node.round())
            while self.tasks:
                self.steps(100)
            self.check()
            self.pass_time(self.rng.uniform(5.0, 15.0))


class _Writing:
    def __init__(self, world: World, task: _Task) -> None:
        self._world, self._task = world, task

    async def __aenter__(self) -> None:
        self._task.writing_since = self._world.clock.now

    async def __aexit__(self, *_: object) -> None:
        self._task.writing_since = None
