"""A laptop changes its network, loses it, sleeps: it is back, and its programs have never left."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import wasmtime

from wetware.errors import WetwareError
from wetware.rpc.push import Subscription
from wetware_pubsub.client import Message, Topic

from .cluster import Cluster, first
from .probe import prove

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

BACK_S = 3.0
"""From the return of the network."""
WATCHED_S = 30.0
EVERY_S = 0.05
PAIRS = [("laptop", "hub"), ("laptop", "rented"), ("hub", "laptop"), ("rented", "laptop")]


@pytest.fixture
def roaming(cluster: Cluster) -> Cluster:
    """`hub` and `rented` on the internet, `laptop` behind a NAT that lets nobody in."""
    for name in ("hub", "rented"):
        cluster.lab.host(name)
    cluster.lab.host("laptop", cluster.lab.network("port-restricted"))
    prove(cluster.lab, "laptop")
    cluster.start("hub")
    for name in ("rented", "laptop"):
        cluster.start(name, join="hub")
    for node in cluster.nodes.values():
        node.wait_members(other.peer_id for other in cluster.nodes.values())
    return cluster


async def _message(topic: Topic, messages: Subscription[Message], since: float) -> None:
    """Publish until something arrives that was published after `since`."""

    async def publish() -> None:
        while True:
            with contextlib.suppress(WetwareError):
                await topic.publish(str(time.monotonic()))
            await asyncio.sleep(EVERY_S)

    publishing = asyncio.create_task(publish())
    try:
        async for message in messages:
            if float(message.data) >= since:
                return
    finally:
        publishing.cancel()


async def _back(cluster: Cluster, away: Callable[[], Awaitable[None]]) -> dict[str, float | str]:
    """What comes back after `away` → after how many seconds, or why it does not.

    All sessions are from before.
    """
    names = [str(node.peer_id) for node in cluster.nodes.values()]
    async with contextlib.AsyncExitStack() as stack:
        at = {
            name: await stack.enter_async_context(cluster.session(name)) for name in cluster.nodes
        }
        topics = {pair: await at[pair[0]].pubsub.join(".".join(pair)) for pair in PAIRS}
        heard = {
            pair: await stack.enter_async_context(
                (await at[pair[1]].pubsub.join(".".join(pair))).subscribe()
            )
            for pair in PAIRS
        }
        for pair in PAIRS:
            async with asyncio.timeout(WATCHED_S):
                await _message(topics[pair], heard[pair], 0.0)
        await away()
        since = time.monotonic()

        async def ping(here: str, there: str) -> None:
            await at[here].cluster.ping(str(cluster.nodes[there].peer_id))

        async def listed(here: str) -> None:
            found = await at[here].cluster.list()
            states = sorted((str(member.peer_id), str(member.state)) for member in found)
            if states != sorted((name, "alive") for name in names):
                raise TimeoutError(f"{here} lists {states}")

        ways: dict[str, Callable[[], Awaitable[None]]] = {}
        for pair in PAIRS:
            ways[f"ping {' → '.join(pair)}"] = lambda pair=pair: ping(*pair)  # type: ignore[misc]
            ways[f"message {' → '.join(pair)}"] = lambda pair=pair: _message(  # type: ignore[misc]
                topics[pair], heard[pair], since
            )
        for name in cluster.nodes:
            ways[f"all alive at {name}"] = lambda name=name: listed(name)  # type: ignore[misc]
        took = await asyncio.gather(*(first(way, WATCHED_S) for way in ways.values()))
        return dict(zip(ways, took, strict=True))


async def _is_back(cluster: Cluster, away: Callable[[], Awaitable[None]]) -> None:
    took = await _back(cluster, away)
    for what, s in took.items():
        print(f"{what:28} {s}")  # noqa: T201 - the figures, with `pytest -s`
    late = {what: s for what, s in took.items() if isinstance(s, str) or s > BACK_S}
    assert late == {}, f"not back within {BACK_S:g} s"


async def test_with_another_address(roaming: Cluster) -> None:
    async def away() -> None:
        roaming.lab.move("laptop", roaming.lab.hosts["laptop"].network)

    await _is_back(roaming, away)


TICK = b"""(module
  (import "wasi_snapshot_preview1" "fd_write"
    (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff"
    (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\\10\\00\\00\\00\\05\\00\\00\\00")  (; what is written: 5 bytes at 16 ;)
  (data (i32.const 16) "tick\\n")
  (data (i32.const 80) "\\01")                            (; a sleep by the monotonic clock ;)
  (data (i32.const 88) "\\80\\f0\\fa\\02")                 (; of 50 ms ;)
  (func (export "_start") (loop
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 40)))
    (drop (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 44)))
    (br 0))))"""
"""A program that writes a line twenty times a second."""


@pytest.mark.long
def test_a_log_that_is_followed_goes_on_at_another_address(
    roaming: Cluster, tmp_path: Path
) -> None:
    """The command notices that its connection is dead by the link's pings, after 25 s."""
    program = tmp_path / "tick.wasm"
    program.write_bytes(wasmtime.wat2wasm(TICK))
    id_ = roaming.ww("rented", "run", "--detach", str(program), check=True).stdout.strip()
    with roaming.lab.inside("laptop"):
        follow = roaming.nodes["laptop"].start_ww("logs", "-f", id_)
    assert follow.stdout is not None
    assert follow.stderr is not None
    assert follow.stdout.readline() == "tick\n"
    roaming.lab.move("laptop", roaming.lab.hosts["laptop"].network)
    assert "lost" in follow.stderr.readline()
    assert "logged in again" in follow.stderr.readline()
    roaming.ww("rented", "kill", id_, check=True)
    seen = "tick\n" + follow.stdout.read()
    assert (follow.wait(timeout=WATCHED_S), follow.stderr.read()) == (0, "")
    assert seen == roaming.ww("rented", "logs", id_, check=True).stdout


async def test_in_another_network(roaming: Cluster) -> None:
    async def away() -> None:
        roaming.lab.move("laptop", roaming.lab.network("port-restricted"))

    await _is_back(roaming, away)


@pytest.mark.long
async def test_after_half_a_minute_without_a_link(roaming: Cluster) -> None:
    async def away() -> None:
        roaming.lab.link("laptop", up=False)
        await asyncio.sleep(30)
        roaming.lab.link("laptop", up=True)

    await _is_back(roaming, away)


@pytest.mark.long
async def test_after_a_minute_of_sleep(roaming: Cluster) -> None:
    process = roaming.nodes["laptop"].process

    async def away() -> None:
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(60)
        finally:
            process.send_signal(signal.SIGCONT)

    await _is_back(roaming, away)
