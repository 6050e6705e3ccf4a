"""Histories of many clients while the home of the store is killed and stopped: all are right.

`WW_SYNC_S=300 pytest -n0 -m long plugins/sync/tests/test_faults.py` for longer, WW_SEED=N for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

import wetware
from wetware.errors import OverlayError, WetwareError
from wetware.testing import Home, NodeProcess
from wetware_sync.client import Event
from wetware_sync.engine import Closed, Unknown, Unwritten
from wetware_sync.errors import HomeDown

from .linearizability import Model, Operation, first_wrong

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1200), pytest.mark.long]

SECONDS = float(os.environ.get("WW_SYNC_S", "12"))
CLIENTS = 64
KEYS = tuple(f"k{number}" for number in range(5))
LOST_PART = 0.06
"""Of the calls that are given up as soon as they are sent."""


@dataclass
class History:
    """What clients did and were told, and what one watcher saw of all of it."""

    operations: list[Operation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    async def call(self, asked: Any, call: Any, *, lose: bool) -> Any:
        """Make a call, or give it up; returns the answer, None where there is none."""
        called = monotonic()
        try:
            async with asyncio.timeout(0.001 if lose else 10):
                answer = await call
        except (TimeoutError, Unknown, OverlayError, Closed):
            self.operations.append(Operation(called, inf, asked))
            return None
        except Unwritten:
            return None
        self.operations.append(Operation(called, monotonic(), asked, answer))
        return answer

    def settled(self) -> list[Operation]:
        """Without those that never happened; of those whose answer was lost, what they did."""
        done = {event.value: event.revision for event in self.events}
        settled = []
        for operation in self.operations:
            if operation.known:
                settled.append(operation)
            elif operation.asked[0] != "get" and (at := done.get(operation.asked[2])):
                settled.append(replace(operation, answer=at))
        return settled


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


async def client(kv: Any, history: History, rng: random.Random, name: str) -> None:
    tree = kv.open("/h/")
    known: dict[str, int] = dict.fromkeys(KEYS, 0)
    for number in range(1_000_000):
        key, lose = rng.choice(KEYS), rng.random() < LOST_PART
        value = f"{name}.{number}".encode()
        match rng.choice(["get", "put", "cas"]):
            case "get":

                async def get(key: str = key) -> tuple[bytes, int]:
                    entry = await tree.get(key)
                    return (entry.value, entry.modified) if entry else (b"", 0)

                if (answer := await history.call(("get", key), get(), lose=lose)) is not None:
                    known[key] = answer[1]
            case "put":
                await history.call(("put", key, value), tree.put(key, value), lose=lose)
            case _:
                asked = ("cas", key, value, known[key])
                call = tree.cas(key, value, modified=known[key])
                await history.call(asked, call, lose=lose)
        await asyncio.sleep(rng.uniform(0, 0.1))


async def watcher(kv: Any, history: History) -> None:
    async for event in kv.open("/h/").watch(revision=1):
        history.events.append(event)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Home, NodeProcess, NodeProcess]]:
    with (
        Home(tmp_path, libp2p=False) as home,
        home.node("a") as a,
        home.node("b", join=a) as b,
    ):
        a.wait_members([b.peer_id])
        b.wait_members([a.peer_id])
        yield home, a, b


@contextlib.asynccontextmanager
async def going_on(*work: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    wrong = [each for each in done if not isinstance(each, asyncio.CancelledError)]
    assert not wrong, wrong


async def test_what_clients_are_told_is_linearizable_while_the_home_is_killed(
    nodes: tuple[Home, NodeProcess, NodeProcess],
) -> None:
    home, a, b = nodes
    seed = int(os.environ.get("WW_SEED", random.randrange(2**32)))
    rng, history = random.Random(seed), History()
    kills = 0
    with contextlib.ExitStack() as again:
        async with contextlib.AsyncExitStack() as stack:
            sessions = [
                await stack.enter_async_context(
                    wetware.connect(data_dir=b.data_dir, key=b.home.key(), reconnect=True)
                )
                for _ in range(4)
            ]
            clients = [
                client(sessions[n % 4].kv, history, random.Random(seed + n), f"c{n}")
                for n in range(CLIENTS)
            ]
            async with going_on(*clients, watcher(sessions[0].kv, history)):
                until = monotonic() + SECONDS
                for fault in itertools.cycle(["kill", "stop", "kill"]):
                    await asyncio.sleep(rng.uniform(0.5, 2))
                    if monotonic() > until:
                        break
                    if fault == "stop":
                        a.process.send_signal(signal.SIGSTOP)
                        await asyncio.sleep(rng.uniform(0.1, 1.5))
                        a.process.send_signal(signal.SIGCONT)
                    else:
                        kills += 1
                        await asyncio.to_thread(a.stop, signal.SIGKILL)
                        node = await asyncio.to_thread(home.start_node, "a", peers=[b.addr])
                        again.callback(node.stop)
                        a = await asyncio.to_thread(node.wait_ready)
            last = await _last(sessions[1].kv)
            async with asyncio.timeout(30):
                log = await _log(sessions[1].kv, last)
    assert kills
    check(history, log, last, seed)


async def _last(kv: Any) -> int:
    """The revision of the store, once it can be reached."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(HomeDown, WetwareError):
                return int((await kv.status())["revision"])
            await asyncio.sleep(0.1)


async def _log(kv: Any, last: int) -> list[Event]:
    log: list[Event] = []
    async for event in kv.open("/h/").watch(revision=1):
        log.append(event)
        if event.revision >= last:
            break
    return log


def check(history: History, log: list[Event], last: int, seed: int) -> None:
    """Nothing contradicts the log, which has every revision once, nor any client another."""
    revisions = [event.revision for event in log]
    assert revisions == list(range(1, last + 1)), f"seed {seed}: the watch has a gap"
    seen = [(event.revision, event.key, event.value) for event in history.events]
    assert seen == [(e.revision, e.key, e.value) for e in log[: len(seen)]], f"seed {seed}"
    history.events = log
    settled = history.settled()
    writes = {o.answer: o for o in settled if o.asked[0] != "get" and o.answer}
    by_revision = {event.revision: event for event in log}
    for revision, write in writes.items():
        event = by_revision.get(revision)
        assert event is not None, f"seed {seed}: {write} is lost"
        assert (event.key, event.value) == write.asked[1:3], f"seed {seed}: {write} is {event}"
    latest = 0.0
    for revision in sorted(writes):
        assert writes[revision].returned >= latest, f"seed {seed}: revision {revision} came early"
        latest = max(latest, writes[revision].called)
    wrong = first_wrong(MODEL, settled, lambda operation: [operation.asked[1]])
    assert wrong is None, f"seed {seed}: {wrong}"
    lost = sum(not operation.known for operation in history.operations)
    assert lost >= 0.05 * len(history.operations), (lost, len(history.operations))
