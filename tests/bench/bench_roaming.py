"""A laptop changes its network, sleeps, loses its link: after how long is it back?

    python tests/bench/bench_roaming.py [--quick] [--only SCENARIO]

Three `ww node` processes, each on a machine of its own (tests/reach/lab.py; as root): `hub` and
`rented` on the internet, `laptop` behind a NAT. Their owner asks each of them, ten times a second,
for the member at the other end, for a ping of it, and publishes to it. Printed per direction, in
seconds from the moment at which nothing stands in the way any more:

    alive    since when the member has been listed alive without a break
    ping     since when every ping has been answered within a second
    message  when the first message arrived that was published after that moment

0 is: all the time. Fails if anything is not back after SETTLE_S.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.reach.cluster import Cluster
from tests.reach.lab import Lab, missing
from tests.reach.probe import prove

from wetware import Session
from wetware.errors import WetwareError
from wetware.testing import Home

SETTLE_S = 45.0
"""Watched after each event: a member may be suspected long after it is back."""
EVERY_S = 0.1
PING_S_MAX = 1.0
FORGET_S = 30
PAIRS = [pair for pair in permutations(("hub", "rented", "laptop"), 2) if "laptop" in pair]


@dataclass
class Seen:
    """What one node saw of another: samples (when, whether all was well)."""

    alive: list[tuple[float, bool]] = field(default_factory=list)
    ping: list[tuple[float, bool]] = field(default_factory=list)
    messages: list[tuple[float, float]] = field(default_factory=list)
    """(Published, arrived.)"""

    def row(self, since: float) -> list[float | None]:
        """(alive, ping, message), s; None: not back."""
        first = min((got for sent, got in self.messages if sent >= since), default=None)
        return [
            _well(self.alive, since),
            _well(self.ping, since),
            None if first is None else first - since,
        ]


def _well(samples: list[tuple[float, bool]], since: float) -> float | None:
    """Since when all samples have been good."""
    later = [sample for sample in samples if sample[0] >= since]
    bad = [at for at, (_, good) in enumerate(later) if not good]
    if not bad:
        return 0.0 if later else None
    return later[bad[-1] + 1][0] - since if bad[-1] + 1 < len(later) else None


async def watch(
    cluster: Cluster, sessions: dict[str, Session], here: str, there: str, seen: Seen
) -> None:
    """Sample until cancelled."""
    session, peer = sessions[here], str(cluster.nodes[there].peer_id)
    topic = await session.pubsub.join(f"{here}.{there}")
    far = await sessions[there].pubsub.join(topic.name)

    async def listed() -> bool:
        return any(
            member.state == "alive" and str(member.peer_id) == peer
            for member in await session.cluster.list()
        )

    async def pinged() -> bool:
        async with asyncio.timeout(PING_S_MAX):
            await session.cluster.ping(peer)
        return True

    async def sample(ask: Callable[[], Awaitable[bool]], into: list[tuple[float, bool]]) -> None:
        while True:
            began, good = time.monotonic(), False
            with contextlib.suppress(WetwareError, TimeoutError):
                good = await ask()
            into.append((began if good else time.monotonic(), good))
            await asyncio.sleep(EVERY_S)

    async def publish() -> None:
        while True:
            with contextlib.suppress(WetwareError):
                await topic.publish(str(time.monotonic()))
            await asyncio.sleep(EVERY_S)

    async def receive() -> None:
        async with far.subscribe() as messages:
            async for message in messages:
                seen.messages.append((float(message.data), time.monotonic()))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sample(listed, seen.alive))
        tasks.create_task(sample(pinged, seen.ping))
        tasks.create_task(publish())
        tasks.create_task(receive())


async def readdress(lab: Lab, cluster: Cluster, out_s: float) -> None:
    lab.move("laptop", lab.hosts["laptop"].network)


async def network(lab: Lab, cluster: Cluster, out_s: float) -> None:
    lab.move("laptop", lab.network("port-restricted"))


async def link(lab: Lab, cluster: Cluster, out_s: float) -> None:
    lab.link("laptop", up=False)
    await asyncio.sleep(out_s / 2)
    lab.link("laptop", up=True)


async def suspend(lab: Lab, cluster: Cluster, out_s: float) -> None:
    process = cluster.nodes["laptop"].process
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(out_s)
    finally:
        process.send_signal(signal.SIGCONT)


SCENARIOS = {
    "readdress": (readdress, "another address in the same network"),
    "network": (network, "another network, behind another NAT"),
    "link": (link, "its link is down for {half:g} s"),
    "suspend": (suspend, "the node is stopped for {out:g} s"),
}


async def main(names: list[str], out_s: float) -> bool:
    whole = True
    with tempfile.TemporaryDirectory() as directory, Lab() as lab, Home(Path(directory)) as home:
        cluster = Cluster(lab, home)
        for name in ("hub", "rented"):
            lab.host(name)
        lab.host("laptop", lab.network("port-restricted"))
        prove(lab, "laptop")
        cluster.start("hub")
        for name in ("rented", "laptop"):
            cluster.start(name, join="hub")
        async with contextlib.AsyncExitStack() as stack:
            sessions = {
                name: await stack.enter_async_context(cluster.session(name))
                for name in cluster.nodes
            }
            for node in cluster.nodes.values():
                node.wait_members(other.peer_id for other in cluster.nodes.values())
            for name in names:
                scenario, what = SCENARIOS[name]
                seen = {pair: Seen() for pair in PAIRS}
                watching = [
                    asyncio.create_task(watch(cluster, sessions, *pair, seen[pair]))
                    for pair in PAIRS
                ]
                await asyncio.sleep(5)
                await scenario(lab, cluster, out_s)
                since = time.monotonic()
                await asyncio.sleep(SETTLE_S)
                for task in watching:
                    task.cancel()
                ended = await asyncio.gather(*watching, return_exceptions=True)
                print(f"{name}: {what.format(half=out_s / 2, out=out_s)}")
                for (pair, found), end in zip(seen.items(), ended, strict=True):
                    figures = found.row(since)
                    whole = whole and None not in figures
                    if not isinstance(end, asyncio.CancelledError):
                        print(f"  {' → '.join(pair)}: {end!r}")
                        whole = False
                    texts = [f"{f:7.1f}" if f is not None else "  never" for f in figures]
                    print(
                        f"  {' → '.join(pair):18} alive {texts[0]}  ping {texts[1]}"
                        f"  message {texts[2]}",
                        flush=True,
                    )
    return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS))
    args = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    if not asyncio.run(main(args.only or list(SCENARIOS), 10.0 if args.quick else 60.0)):
        raise SystemExit(f"not back within {SETTLE_S:g} s")
