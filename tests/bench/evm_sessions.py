"""From a change on chain to the end of every session: `python tests/bench/evm_sessions.py`.

Real `ww node` processes of one cluster, a real anvil that mines at once, one endpoint, finality of
a chain of one's own, polled every 0.25 s. Each session is a connection of its own, logged in by a
wallet's session over noise, with a subscription open; its end is what its holder sees. The clock
starts before the transaction is sent. `bench_evm.py` has these figures as a section of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster_report import Report, machine, quantile

if TYPE_CHECKING:
    from plugins.auth_evm.tests.login.live import LiveChain
    from plugins.auth_evm.tests.login.world import Person

    from wetware.testing import Home, NodeProcess

SECTION = "a change on chain → every session is dead"
NODES = 2
POLL_S = 0.25
PER_ACCOUNT = 5
"""Sessions of one account at one node."""


async def session_figures(report: Report, *, accounts: int, rounds: int) -> None:
    """Add the section to a report."""
    from plugins.auth_evm.tests.login.live import live_chain
    from plugins.auth_evm.tests.login.world import Person

    from wetware.testing import Home

    people = [Person(f"person {number}") for number in range(accounts)]
    sessions = NODES * accounts * PER_ACCOUNT
    report.say(
        f"\n{SECTION}: {NODES} `ww node` processes, {sessions} sessions of {accounts} accounts, "
        f"each with a subscription; polled every {POLL_S} s; {rounds} rounds"
    )
    with (
        live_chain() as chain,
        tempfile.TemporaryDirectory(prefix="ww-bench-") as folder,
        Home(Path(folder)) as home,
    ):
        nodes = await asyncio.to_thread(_cluster, chain, home)
        cluster = str(nodes[0].info["cluster"])
        for what in ("resetScope", "pause"):
            took: list[float] = []
            for _ in range(rounds):
                took += await _round(chain, nodes, cluster, people, what)
            label = f"{what}: transaction sent → end of a session"
            report.figure(SECTION, f"{label}, p50", quantile(took, 0.5) * 1000, "ms", digits=0)
            report.figure(SECTION, f"{label}, p99", quantile(took, 0.99) * 1000, "ms", digits=0)
            report.figure(
                SECTION,
                f"{label}, the last",
                max(took) * 1000,
                "ms",
                digits=0,
                beside=f"{len(took)} sessions",
            )


def _cluster(chain: LiveChain, home: Home) -> list[NodeProcess]:
    """Nodes whose keys an account bound, of one cluster."""
    from plugins.auth_evm.tests.contract.people import word
    from plugins.auth_evm.tests.login.world import BOB

    (home.path / ".wetware").mkdir(exist_ok=True)
    settings = chain.toml(poll_s=POLL_S, verified_s_max=10.0, timeout_s=2.0)
    (home.path / ".wetware" / "ww.toml").write_text(f'[node]\nauth = "evm"\n{settings}')
    # In the scope of all scopes: what ends the others' sessions leaves the nodes members.
    expiry = int(time.time()) + 86_400
    for role in ("node", "operator"):
        chain.send("grant", bytes(32), word(role), BOB.address, 0, expiry, 1)
    names = [f"n{number}" for number in range(NODES)]
    for name in names:
        key = home.node_id(name).public_key
        chain.send("bindKey", bytes(32), [word("node")], key, expiry, sender=BOB.address)
    first = home.start_node(names[0]).wait_ready()
    chain.log_in(home.path, BOB, str(first.info["cluster"]), roles=("operator",))
    others = [home.start_node(name, join=first).wait_ready() for name in names[1:]]
    first.wait_members([other.peer_id for other in others])
    return [first, *others]


async def _round(
    chain: LiveChain, nodes: list[NodeProcess], cluster: str, people: list[Person], what: str
) -> list[float]:
    """Seconds from the transaction to the end of each session."""
    from plugins.auth_evm.tests.contract.people import word
    from plugins.auth_evm.tests.login.world import SCOPE

    expiry = int(time.time()) + 86_400
    for person in people:
        chain.send("grant", word(SCOPE), word("member"), person.address, 0, expiry, 1)
    stored = [chain.session(person, cluster) for person in people]
    async with contextlib.AsyncExitStack() as stack:
        ended: list[asyncio.Task[float]] = []
        for node in nodes:
            for session in stored:
                for _ in range(PER_ACCOUNT):
                    ended.append(await stack.enter_async_context(_live(node, session)))
        assert not any(task.done() for task in ended)
        started = time.monotonic()
        args = (word(SCOPE),) if what == "resetScope" else ()
        await asyncio.to_thread(chain.send, what, *args)
        async with asyncio.timeout(30):
            took = [await task - started for task in ended]
    if what == "pause":
        chain.send("unpause")
    return took


@contextlib.asynccontextmanager
async def _live(node: NodeProcess, session: Any) -> AsyncIterator[asyncio.Task[float]]:
    """A session with a subscription; the task's result is when its holder saw it end."""
    import wetware
    from wetware.client import LoginRefused
    from wetware.errors import WetwareError
    from wetware_auth_evm.signer import SessionSigner

    async with contextlib.AsyncExitStack() as stack:
        deadline = time.monotonic() + 20
        while True:  # the node has yet to see the grant
            try:
                connected = wetware.connect(node.addr, signer=SessionSigner(session))
                logged_in = await stack.enter_async_context(connected)
                break
            except LoginRefused:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)
        topic = await logged_in.pubsub.join("bench")
        messages = await stack.enter_async_context(topic.subscribe())

        async def until_it_ends() -> float:
            try:
                async for _ in messages:
                    pass
            except WetwareError:
                pass
            at = time.monotonic()
            try:
                await topic.publish(b"late")
            except WetwareError:
                return at
            raise AssertionError("a call succeeded after the end of the session")

        task = asyncio.create_task(until_it_ends())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accounts", type=int, default=10)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report(as_json=False)
    report.say(machine())
    asyncio.run(session_figures(report, accounts=args.accounts, rounds=args.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
