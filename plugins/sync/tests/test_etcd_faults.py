"""Histories of clients at two entrances while their etcd is killed and stopped: all are right.

`WW_SYNC_S=300 pytest -n0 -m long FILE` for longer, WW_SEED=N for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
from collections.abc import Iterator
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from wetware.base.threads import Threads
from wetware.errors import WetwareError
from wetware_sync.engine import Closed, Compare, Engine, Event, Get, Put, Txn, Unwritten
from wetware_sync.errors import HomeDown

from .etcds import EtcdProcess, anyio_backend, one_loop, three_members  # noqa: F401 fixtures
from .linearizability import Model, Operation, first_wrong
from .parts import ADA, running

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1200), pytest.mark.long]

SECONDS = float(os.environ.get("WW_SYNC_S", "15"))
CLIENTS = 32
KEYS = tuple(b"h/%d" % number for number in range(4))
LOST_PART = 0.06
"""Of the calls that are given up as soon as they are sent."""


def step(state: Any, operation: Operation) -> Any:
    """One key: (value, the revision that wrote it); b"" and 0 before there is one."""
    modified = state[1]
    match operation.asked:
        case ("get", _):
            return state if operation.answer == state else None
        case ("put", _, new):
            return (new, operation.answer) if operation.answer > modified else None
        case ("cas", _, new, expected):
            if not operation.answer:
                return state if expected != modified else None
            right = expected == modified and operation.answer > modified
            return (new, operation.answer) if right else None
    raise AssertionError(operation)


MODEL = Model((b"", 0), step)


class Histories:
    """What clients did and were told."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.operations: list[Operation] = []

    async def client(self, engine: Engine, name: int) -> None:
        rng, known = random.Random(self.seed + name), dict.fromkeys(KEYS, 0)
        for number in itertools.count():
            key, value = rng.choice(KEYS), b"%d.%d" % (name, number)
            match rng.choice(["get", "put", "cas"]):
                case "get":
                    answer = await self._call(rng, ("get", key), _get(engine, key))
                    if answer is not None:
                        known[key] = answer[1]
                case "put":
                    await self._call(rng, ("put", key, value), _put(engine, key, value))
                case _:
                    asked = ("cas", key, value, known[key])
                    same = Compare(key, "mod_revision", known[key])
                    await self._call(rng, asked, _put(engine, key, value, same))
            await asyncio.sleep(rng.uniform(0, 0.1))

    async def _call(self, rng: random.Random, asked: Any, call: Any) -> Any:
        called = monotonic()
        try:
            async with asyncio.timeout(0.001 if rng.random() < LOST_PART else 20):
                answer = await call
        except Unwritten:
            return None
        except asyncio.CancelledError:  # at the end, with calls under way
            self.operations.append(Operation(called, inf, asked))
            raise
        except (TimeoutError, WetwareError):
            self.operations.append(Operation(called, inf, asked))
            return None
        self.operations.append(Operation(called, monotonic(), asked, answer))
        return answer

    def check(self, log: list[Event]) -> None:
        """Nothing contradicts the log, nor any client another."""
        done = {e.now.value: e.revision for e in log if e.now is not None}
        settled = []
        for each in self.operations:
            if each.known:
                settled.append(each)
                if each.asked[0] != "get" and each.answer:
                    assert done.get(each.asked[2]) == each.answer, f"{self.seed}: {each} is lost"
            elif each.asked[0] != "get" and (at := done.get(each.asked[2])):
                settled.append(Operation(each.called, inf, each.asked, at))
        wrong = first_wrong(MODEL, settled, lambda operation: [operation.asked[1]])
        assert wrong is None, f"seed {self.seed}: {wrong}"
        lost = sum(not each.known for each in self.operations)
        assert lost >= 0.05 * len(self.operations)


async def _get(engine: Engine, key: bytes) -> tuple[bytes, int]:
    page = await engine.read(Get(key))
    return (page.items[0].value, page.items[0].mod_revision) if page.items else (b"", 0)


async def _put(engine: Engine, key: bytes, value: bytes, *compares: Compare) -> int:
    outcome = await engine.txn(Txn((Put(key, value),), compares), ADA)
    return outcome.revision if outcome.succeeded else 0


async def _watch(engine: Engine, first: int, last: int, events: list[Event]) -> None:
    """Collect every event up to `last` (0: for ever); where the watch ends, go on where it was."""
    while not last or first <= last:
        with contextlib.suppress(HomeDown, Closed):
            watch = engine.watch(b"h/", first, ADA, prefix=True)
            try:
                while not last or first <= last:
                    batch = await watch.next()
                    events += batch.events
                    first = batch.revision + 1
            finally:
                watch.close()
        await asyncio.sleep(0.05)


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[EtcdProcess]]:
    with three_members(tmp_path) as members:
        yield members


async def test_what_clients_are_told_is_linearizable_while_etcd_is_killed(
    three: list[EtcdProcess],
) -> None:
    from wetware_sync.etcd.engine import EtcdEngine
    from wetware_sync.etcd.wire import Etcd

    seed = int(os.environ.get("WW_SEED", random.randrange(2**32)))
    rng, histories = random.Random(seed), Histories(seed)
    ends = [member.endpoint for member in three]
    threads, kills = Threads(), 0
    async with (
        running(EtcdEngine(Etcd(ends))) as a,
        running(EtcdEngine(Etcd(ends[::-1]))) as b,
    ):
        work = [asyncio.create_task(histories.client((a, b)[n % 2], n)) for n in range(CLIENTS)]
        seen: list[Event] = []
        watching = asyncio.create_task(_watch(b, 1, 0, seen))
        until = monotonic() + SECONDS
        for fault in itertools.cycle(["kill", "stop", "kill", "kill two"]):
            await asyncio.sleep(rng.uniform(0.5, 2))
            if monotonic() > until:
                break
            victims = rng.sample(three, 2 if fault == "kill two" else 1)
            for victim in victims:
                if fault == "stop":
                    assert victim.process is not None
                    victim.process.send_signal(signal.SIGSTOP)
                else:
                    await threads.run(lambda victim=victim: victim.stop(kill=True))
                    kills += 1
            await asyncio.sleep(rng.uniform(0.5, 2))
            for victim in victims:
                if fault == "stop":
                    assert victim.process is not None
                    victim.process.send_signal(signal.SIGCONT)
                else:
                    await threads.run(lambda victim=victim: victim.start(ready=False))
            for victim in victims:
                await threads.run(victim.wait_ready)
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        last = 0
        async with asyncio.timeout(60):
            while not last:
                with contextlib.suppress(WetwareError):
                    last = await _put(a, b"h/last", b"last")
            await _watch(a, 1, last, log := [])
        watching.cancel()
        await asyncio.wait([watching])
    assert kills
    assert seen == log[: len(seen)], f"seed {seed}: a watcher saw something else"
    revisions = [event.revision for event in log]
    assert revisions == sorted(set(revisions)), f"seed {seed}"
    histories.check(log)
