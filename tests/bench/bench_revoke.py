"""How long a capability lives after it was revoked, wherever it is held.

`python tests/bench/bench_revoke.py [--quick] [--references N] [--rounds N]`: five `ww node`
processes of one cluster on loopback, encrypted links, audit log with fsync. One reference is shared
at the first node. A holder process at each node redeems it, at the other nodes through their
tunnels, attenuates what it got, and that again: three delegations deep, 10,000 references in all.
Some hold subscriptions; workers make calls without a pause, by all references in turn. Then one
`revoke` at the first node. Measured is, by the clock that all processes of a machine share, from
just before that call to each worker's last successful call, and to the end of each subscription.
Afterwards every reference has to be refused.

Second part: the first node is stopped (SIGSTOP), as if it were cut off. A holder at another node
can do nothing from then on, and has to learn it within the time of a call.

Exit status 1 if a reference works after the revocation was acknowledged, or if a holder does not
learn that it is cut off; with --check, if the target is missed by more than twice, which leaves
room for a machine that does other things, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster_report import Report, machine, quantile

import wetware
from wetware.broker.sturdy import SturdyRef
from wetware.client import Session
from wetware.client.session import CALL_S
from wetware.errors import CapabilityError, WetwareError
from wetware.testing import Home, NodeProcess

NODES = 5
WORKERS, SUBSCRIPTIONS = 16, 16
"""In each holder."""
BRANCHES = 20
"""Of the second delegation; each has its share of the third."""
MAKING = 32
"""Attenuations at a time."""
TARGET_MS = 250.0
CUT_MARGIN_S = 1.0


def now() -> float:
    """Seconds of the clock that all processes of this machine share."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


# --- a holder -------------------------------------------------------------------------------------


class Holder:
    """One process that holds references at one node."""

    def __init__(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.sessions: list[Session] = []
        self.tasks: list[asyncio.Task[float]] = []
        self.ends: list[asyncio.Task[float]] = []
        self.first: Session

    async def hold(self, ref: str, node: str, key: str, count: int) -> dict[str, Any]:
        """Get at the reference, and derive `count` from it."""
        enter = self.stack.enter_async_context
        if node:
            home = await enter(wetware.connect(node, key=Path(key)))
            nowhere = replace(SturdyRef.parse(ref), addrs=())  # so through the node's tunnel
            self.first = await enter(home.redeem(nowhere.text))
        else:
            self.first = await enter(wetware.connect(ref))
        branches = [await self.first.attenuate(label="second") for _ in range(min(BRANCHES, count))]
        places = asyncio.Semaphore(MAKING)

        async def derive(parent: Session) -> Session:
            async with places:
                return await parent.attenuate(label="third")

        self.sessions = await asyncio.gather(
            *(derive(branches[n % len(branches)]) for n in range(count))
        )
        return {"references": len(self.sessions)}

    async def go(self) -> dict[str, Any]:
        """Subscribe, and begin to call."""
        for number in range(min(SUBSCRIPTIONS, len(self.sessions))):
            topic = await self.sessions[number].pubsub.join("bench")
            subscribed = asyncio.Event()
            self.ends.append(asyncio.create_task(self._subscribe(topic, subscribed)))
            await subscribed.wait()
        self.tasks = [asyncio.create_task(self._work(number)) for number in range(WORKERS)]
        return {}

    async def _subscribe(self, topic: Any, subscribed: asyncio.Event) -> float:
        try:
            async with topic.subscribe() as messages:
                subscribed.set()
                async for _ in messages:
                    pass
        except WetwareError:
            pass
        return now()

    async def _work(self, number: int) -> float:
        """Call by one reference after the other; returns when a call last succeeded."""
        last, at = 0.0, number
        while True:
            try:
                await self.sessions[at % len(self.sessions)].whoami()
            except WetwareError:
                return last
            last = now()
            at += WORKERS

    async def ended(self) -> dict[str, Any]:
        """When calls and subscriptions ended; and that nothing works any more."""
        async with asyncio.timeout(60):
            lasts = await asyncio.gather(*self.tasks)
            ends = await asyncio.gather(*self.ends)
        alive = 0
        reasons: dict[str, int] = {}
        for session in (*self.sessions, self.first):
            try:
                await session.whoami()
                alive += 1
            except CapabilityError as exc:
                reasons[exc.code] = reasons.get(exc.code, 0) + 1
            except WetwareError as exc:
                reasons[exc.code] = reasons.get(exc.code, 0) + 1
        return {"lasts": lasts, "ends": ends, "alive": alive, "reasons": reasons}

    async def until_refused(self) -> dict[str, Any]:
        """Call until refused; when it last succeeded, when it was refused, and why."""
        last = 0.0
        while True:
            try:
                await self.first.services()
            except WetwareError as exc:
                return {"last": last, "refused": now(), "code": exc.code, "why": exc.message}
            last = now()

    async def release(self) -> dict[str, Any]:
        """Let go of everything."""
        self.sessions, self.tasks, self.ends = [], [], []
        await self.stack.aclose()
        return {}


async def hold() -> None:
    """The holder process: commands on stdin, answers on stdout."""
    holder = Holder()
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        answer = await getattr(holder, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)


class HolderProcess:
    """The driver's end of it."""

    def __init__(self, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(  # this file
            [sys.executable, __file__, "--holder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )

    async def ask(self, do: str, **args: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **args}) + "\n")
        self.process.stdin.flush()
        line = await asyncio.to_thread(self.process.stdout.readline)
        if not line:
            raise RuntimeError("a holder process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Idempotent."""
        self.process.kill()
        self.process.communicate()


# --- the driver -----------------------------------------------------------------------------------


async def revoke_round(
    nodes: list[NodeProcess], references: int, report: Report
) -> tuple[list[float], list[float], bool]:
    """(ms to last successful calls, ms to ends of subscriptions, whether all was refused)."""
    home, issuer = nodes[0].home, nodes[0]
    key = str(home.path / ".wetware" / "keys" / "default")
    holders = [HolderProcess(home.env) for _ in nodes]
    try:
        async with wetware.connect(issuer.addr, key=Path(key)) as operator:
            ref, grant = await operator.share({"pubsub": []}, label="bench")
            started = time.perf_counter()
            made = await asyncio.gather(
                *(
                    holder.ask(
                        "hold",
                        ref=ref,
                        node="" if node is issuer else node.addr,
                        key=key,
                        count=references // len(nodes),
                    )
                    for holder, node in zip(holders, nodes, strict=True)
                )
            )
            count = sum(answer["references"] for answer in made)
            took = time.perf_counter() - started
            await asyncio.gather(*(holder.ask("go") for holder in holders))
            await asyncio.sleep(1)
            sent = now()
            cut = await operator.revoke(grant.id, "bench")
            acknowledged = now()
            answers = await asyncio.gather(*(holder.ask("ended") for holder in holders))
    finally:
        for holder in holders:
            holder.end()
    lasts = [last for answer in answers for last in answer["lasts"]]
    ends = [(end - sent) * 1000 for answer in answers for end in answer["ends"]]
    # A worker whose call was under way at the command may have had its last success before.
    live = [max(0.0, last - sent) * 1000 for last in lasts]
    alive = sum(answer["alive"] for answer in answers)
    idle = sum(last == 0.0 for last in lasts)
    reasons: dict[str, int] = {}
    for answer in answers:
        for code, number in answer["reasons"].items():
            reasons[code] = reasons.get(code, 0) + number
    report.say(
        f"  {count} references made in {took:.1f} s; {cut} grants ended, acknowledged after "
        f"{(acknowledged - sent) * 1000:.0f} ms; last success {max(live):.0f} ms, last "
        f"subscription {max(ends):.0f} ms; then refused: {reasons}, alive: {alive}"
    )
    return live, ends, alive == 0 and idle == 0 and cut > count


async def cut_off(nodes: list[NodeProcess], report: Report) -> bool:
    """A holder who no longer hears from the issuer."""
    home, issuer, other = nodes[0].home, nodes[0], nodes[1]
    key = home.path / ".wetware" / "keys" / "default"
    holder = HolderProcess(home.env)
    try:
        async with wetware.connect(issuer.addr, key=key) as operator:
            ref, _ = await operator.share({"pubsub": []}, label="cut off")
            await holder.ask("hold", ref=ref, node=other.addr, key=str(key), count=1)
        calling = asyncio.create_task(holder.ask("until_refused"))
        await asyncio.sleep(1)
        issuer.process.send_signal(signal.SIGSTOP)
        stopped = now()
        try:
            async with asyncio.timeout(CALL_S + 30):
                answer = await calling
        finally:
            issuer.process.send_signal(signal.SIGCONT)
    finally:
        holder.end()
    refused = answer["refused"] - stopped
    report.say(f"\nissuer stopped; {answer['code']}: {answer['why']}")
    report.figure("cut off", "from the cut to the last success", max(0, answer["last"] - stopped))
    report.figure(
        "cut off",
        "from the cut to the error",
        refused,
        at_most=CALL_S + CUT_MARGIN_S,
        beside=f"a call may take {CALL_S:g} s",
    )
    return bool(answer["last"] > 0 and refused <= CALL_S + CUT_MARGIN_S)


async def measure(report: Report, references: int, rounds: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="ww-bench-") as folder:
        env = {"WW_NODE_LIBP2P": "false"}
        with Home(Path(folder), env) as home:
            first = home.start_node("node0").wait_ready()
            ticket = first.invite("--uses", str(NODES - 1))
            nodes = [first] + [home.start_node(f"node{n}", join=ticket) for n in range(1, NODES)]
            for node in nodes:
                node.wait_ready()
            for node in nodes:
                node.wait_members([other.peer_id for other in nodes], within_s=60)
            report.say(
                f"{NODES} nodes, {references} references, {NODES * WORKERS} workers, "
                f"{NODES * SUBSCRIPTIONS} subscriptions, 3 delegations deep; {machine()}"
            )
            live: list[float] = []
            ends: list[float] = []
            good = True
            for _ in range(rounds):
                some, of_subscriptions, fine = await revoke_round(nodes, references, report)
                live += some
                ends += of_subscriptions
                good = good and fine
            report.say()
            for name, values in (("last successful call", live), ("end of subscription", ends)):
                for share in (0.5, 0.99, 1.0):
                    report.figure(
                        "revoke",
                        f"command → {name}, {f'p{share * 100:g}' if share < 1 else 'max'}",
                        quantile(values, share),
                        "ms",
                        at_most=TARGET_MS if share == 0.99 else None,
                        beside=f"{len(values)} of {rounds} rounds",
                        digits=1,
                    )
            good = await cut_off(nodes, report) and good
            report.late = quantile(live, 0.99)  # type: ignore[attr-defined]
            for node in nodes:
                node.stop()
            return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,000 references, one round")
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="fail beyond twice the target")
    parser.add_argument("--holder", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.holder:
        asyncio.run(hold())
        return 0
    report = Report(as_json=args.json)
    references, rounds = args.references, args.rounds
    if args.quick:
        references, rounds = 1_000, 2
    good = asyncio.run(measure(report, references, rounds))
    if args.json:
        print(json.dumps(report.figures, indent=2))
    for missed in report.missed:
        report.say(f"missed: {missed}")
    late = getattr(report, "late", 0.0) > 2 * TARGET_MS
    return 0 if good and not (args.check and late) else 1


if __name__ == "__main__":
    sys.exit(main())
