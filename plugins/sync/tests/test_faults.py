"""Histories of 64 clients at real nodes while home, clients and network fail: all are right.

`WW_SYNC_S=300 pytest -n0 -s -m '' plugins/sync/tests/test_faults.py` for longer, WW_SEED=N for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from tests.reach.cluster import LISTEN
from tests.reach.lab import Lab, missing

import wetware
from wetware.errors import WetwareError
from wetware.testing import Home, NodeProcess
from wetware_sync.client import Write

from .etcds import needs_etcd
from .ports import TREE, TTL_S
from .watching import Wrong
from .workload import History, check, ends

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1200)]


ROOT = Path(__file__).parents[3]
SECONDS = float(os.environ.get("WW_SYNC_S", "40"))
SEED = int(os.environ.get("WW_SEED", random.randrange(2**32)))
CLIENTS = 64
WITHIN_S = 120.0
BEYOND_S = TTL_S + 0.7
"""Longer than a lease, and than the look at the clock after it."""

CLOCK = """
import os, time

_time, _time_ns, _gettime = time.time, time.time_ns, time.clock_gettime

def _offset_s():
    with open(os.environ["TEST_CLOCK_FILE"]) as file:
        return float(file.read() or 0)

time.time = lambda: _time() + _offset_s()
time.time_ns = lambda: _time_ns() + int(_offset_s() * 1e9)

def _clock_gettime(clock):
    return _gettime(clock) + (_offset_s() if clock == time.CLOCK_BOOTTIME else 0)

time.clock_gettime = _clock_gettime
"""
"""A machine's clocks, which jump: that of the day, and the one that goes on while it sleeps."""


class Clock:
    """Of the processes that are started with `env`."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        (path / "sitecustomize.py").write_text(CLOCK)
        self._offset, self._s = path / "offset", 0.0
        self.jump(0)
        self.env = {"PYTHONPATH": f"{path}:{ROOT}", "TEST_CLOCK_FILE": str(self._offset)}

    def jump(self, by_s: float) -> None:
        self._s += by_s
        new = self._offset.with_suffix(".new")
        new.write_text(str(self._s))
        new.replace(self._offset)


class Clients:
    """A process of clients at a node, and what it has noted."""

    def __init__(self, node: NodeProcess, env: dict[str, str], **terms: Any) -> None:
        self._path = node.home.path / f"clients{terms['first']}"
        self._out = self._path.open("w")
        arguments = json.dumps({"data_dir": str(node.data_dir), **terms})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "plugins.sync.tests.clients", arguments],
            env={**node.home.env, "PYTHONPATH": str(ROOT), **env},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=subprocess.PIPE,
            text=True,
        )

    def records(self) -> list[dict[str, Any]]:
        """Those that are whole."""
        with self._path.open() as lines:
            return [json.loads(line) for line in lines if line.endswith("\n")]

    async def noted(self, what: str) -> None:
        """Wait until it says so."""
        async with asyncio.timeout(WITHIN_S):
            while not any(what in record for record in self.records()[-2000:]):
                assert self.process.poll() is None, self.process.communicate()[1]
                await asyncio.sleep(0.1)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._out.close()


class Deployment:
    """A store whose home is `a`, and nodes `b` and `c`, each on a machine of a network.

    Attributes:
        compacted: As in `watching.check`.
        clocks: Of the home, and of some clients.
    """

    compacted: int | None = 0

    def __init__(self, lab: Lab, home: Home, path: Path) -> None:
        self.lab, self._home = lab, home
        self.clocks = {name: Clock(path / f"clock-{name}") for name in ("home", "clients")}
        self.nodes: dict[str, NodeProcess] = {}
        for name in "abc":
            lab.host(name)
        self.start("a")
        for name in "bc":
            self.start(name, join=self.nodes["a"].invite())
        for node in self.nodes.values():
            node.wait_members([each.peer_id for each in self.nodes.values()], within_s=WITHIN_S)

    def start(self, name: str, **terms: Any) -> None:
        clock = self.clocks["home"].env if name == "a" else None
        with self.lab.inside(name):
            node = self._home.start_node(name, listen=LISTEN, env=clock, **terms)
        self.nodes[name] = node.wait_ready()

    def restart(self, how: signal.Signals) -> None:
        self.nodes["a"].stop(how)
        self.start("a", peers=[self.nodes["b"].addr])

    def clients(self, count: int, pause_s: float) -> list[Clients]:
        """A half of them at each of the nodes that have no store."""
        made = []
        each = CLIENTS // count
        for number in range(count):
            node = "bc"[number % 2]
            with self.lab.inside(node):
                made.append(
                    Clients(
                        self.nodes[node],
                        self.clocks["clients"].env if number == 0 else {},
                        first=number * each,
                        count=each,
                        seed=SEED,
                        pause_s=pause_s,
                    )
                )
        return made

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[wetware.Session]:
        node = self.nodes["a"]
        async with wetware.connect(data_dir=node.data_dir, key=self._home.key()) as session:
            yield session


class Etcd(Deployment):
    """Each of the three runs an etcd; `a`, which is killed and stopped, may be the leader."""

    compacted = None  # up to where the store was moved

    def __init__(self, lab: Lab, home: Home, path: Path) -> None:
        super().__init__(lab, home, path)
        on = ",".join(str(node.peer_id) for node in self.nodes.values())
        with lab.inside("a"):
            self.nodes["a"].ww("sync", "etcd", "up", "--on", on, "--yes", check=True)


DEPLOYMENTS = {"embedded": Deployment, "etcd": Etcd}


@pytest.fixture(
    params=["embedded", pytest.param("etcd", marks=[pytest.mark.long, needs_etcd])],
)
def deployment(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
    if reason := missing():
        pytest.skip(reason)
    with Lab() as lab, Home(tmp_path / "home", libp2p=False) as home:
        yield DEPLOYMENTS[request.param](lab, home, tmp_path)


async def kill(deployment: Deployment, _: list[Clients], rng: random.Random) -> None:
    await asyncio.to_thread(deployment.restart, signal.SIGKILL)


async def restart(deployment: Deployment, _: list[Clients], rng: random.Random) -> None:
    await asyncio.to_thread(deployment.restart, signal.SIGTERM)


async def stop_the_home(deployment: Deployment, _: list[Clients], rng: random.Random) -> None:
    """Past all leases."""
    process = deployment.nodes["a"].process
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(BEYOND_S)
    process.send_signal(signal.SIGCONT)


async def stop_clients(_: Deployment, clients: list[Clients], rng: random.Random) -> None:
    """Past their leases, with what they hold."""
    process = rng.choice(clients).process
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(BEYOND_S)
    process.send_signal(signal.SIGCONT)


async def cut(deployment: Deployment, _: list[Clients], rng: random.Random) -> None:
    """Half of the clients from the home and all others."""
    deployment.lab.part("b")
    await asyncio.sleep(rng.uniform(0.5, 5))
    deployment.lab.part("")


async def jump_of_the_home(deployment: Deployment, _: list[Clients], rng: random.Random) -> None:
    deployment.clocks["home"].jump(rng.choice([3, 3600]))


async def jump_of_clients(deployment: Deployment, _: list[Clients], rng: random.Random) -> None:
    """As if their machine had slept, for longer than a lease."""
    deployment.clocks["clients"].jump(rng.choice([3, 3600]))


FAULTS = [kill, stop_clients, cut, stop_the_home, jump_of_clients, restart, jump_of_the_home]


async def _goes_on(
    deployment: Deployment, faults: Iterator[Any], seconds: float, *, processes: int, pause_s: float
) -> None:
    rng = random.Random(SEED)
    clients = deployment.clients(processes, pause_s)
    try:
        for each in clients:
            await each.noted("started")
        until, made = monotonic() + seconds, list[str]()
        for fault in faults:
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            if len(made) >= len(FAULTS) and monotonic() > until:
                break
            await fault(deployment, clients, rng)
            made.append(fault.__name__)
        await asyncio.sleep(1)
        for each in clients:
            each.stop()
        for each in clients:
            await each.noted("stopped")
        await _write_the_end(deployment)
        for each in clients:
            await asyncio.to_thread(each.process.wait, WITHIN_S)
            assert each.process.returncode == 0, each.process.communicate()[1]
        records = [record for each in clients for record in each.records()]
    finally:
        for each in clients:
            each.close()
    history = History.of(r for r in records if not r.keys() & {"started", "stopped"})
    history.compacted = deployment.compacted
    sys.stdout.write(f"seed {SEED}: {history.summary()}; {', '.join(made)}\n")
    try:
        check(history)
    except Wrong as wrong:
        raise AssertionError(f"WW_SEED={SEED}: {wrong}") from wrong
    assert history.lost_part >= 0.05, history.summary()
    assert history.contended_part >= 0.2, history.summary()


async def _write_the_end(deployment: Deployment) -> None:
    writes = [Write(key, value.encode()) for key, value in ends().items() if value is not None]
    async with asyncio.timeout(WITHIN_S), deployment.session() as session:
        while True:
            with contextlib.suppress(WetwareError):
                await session.kv.open(TREE).txn([], writes)
                return
            await asyncio.sleep(0.1)


async def test_histories_are_right_while_the_home_is_killed(deployment: Deployment) -> None:
    """A short one, of what happens most."""
    await _goes_on(deployment, iter([kill, stop_clients]), 60, processes=2, pause_s=0.4)


@pytest.mark.long
async def test_histories_are_right_whatever_fails(deployment: Deployment) -> None:
    rng = random.Random(SEED + 1)
    others = (rng.choice(FAULTS) for _ in itertools.count())
    faults = itertools.chain(FAULTS, others)
    await _goes_on(deployment, faults, SECONDS, processes=4, pause_s=0.3)
