"""How fast a cluster learns of starts, joins and deaths, and what it costs to stay one.

    python tests/bench/bench_cluster.py [--nodes 64 --processes 8] [--real] [--quick]

Two parts, on loopback and this machine. `--nodes`: nodes without RPC and services, several to a
process, default settings, certificates made beforehand; all start at once, one more joins, and is
killed. `--real`: five `ww node` processes from nothing, with tickets; times are those of the
nodes' own logs. Printed beside the formulas that memberlist publishes. `--quick` is the second part
and 12 nodes in 2 processes, in some 45 s. Exit status 1 with --check if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from cluster_nodes import Cluster, Process, found
from cluster_report import Report, detection_s, formulas, machine, quantile, suspicion_range

from wetware.overlay.membership.config import MembershipConfig
from wetware.testing import Home, NodeProcess

SEEN_S, DEAD_S = 5.0, 10.0
"""The targets: five nodes see each other after the last start, and a death."""
CONVERGE_S_MAX = 150.0
MESH_S_MAX = 120.0
SETTLE_S = 3.0
"""Rumours of the last start die down."""
FULL_MESH, NEIGHBOURS = MembershipConfig().full_mesh_max, MembershipConfig().neighbours
FRAMES = ("frames_out", "bytes_out", "link_bytes_out", "probes")


# --- many nodes -----------------------------------------------------------------------------------


async def many(report: Report, nodes: int, processes: int, steady_s: float) -> None:
    """Start, steady state, a join, a death."""
    section = f"{nodes} nodes"
    report.say(f"# {nodes} nodes in {processes} processes, one more in its own: {machine()}")
    report.say(f"# {formulas(nodes)}")
    names = [f"n{number}" for number in range(nodes + 1)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        cluster = Cluster(path, await found(path, names))
        try:
            first, *_ = [
                await cluster.spawn(names[number:nodes:processes]) for number in range(processes)
            ]
            last = await cluster.spawn(names[nodes:])
            await _measure(report, section, cluster, first, last, steady_s)
        finally:
            await cluster.aclose()


async def _measure(
    report: Report, section: str, cluster: Cluster, first: Process, last: Process, steady_s: float
) -> None:
    def say(name: str, value: float, unit: str = "s", **how: Any) -> None:
        report.figure(section, name, value, unit, **how)

    others = [process for process in cluster.processes if process is not last]
    names = [name for process in others for name in process.names]
    newcomer, count = last.names[0], len(names)

    # Everybody knows one address only: that of the first node.
    began = await cluster.start(first, first.names[:1])
    addr = cluster.addrs[names[0]]
    starts = await asyncio.gather(
        cluster.start(first, first.names[1:], bootstrap=[addr]),
        *(cluster.start(other, other.names, bootstrap=[addr]) for other in others[1:]),
    )
    started = max(answer["at"] for answer in starts)
    seen = await cluster.seen(names, "alive", by=names, within_s=CONVERGE_S_MAX)
    say("all started", started - began["began"], beside="from the first start to the last")
    views = sorted(max(0.0, at - started) for _, at in cluster.states.values())
    say(
        "all see all, after the last start",
        max(0.0, seen - started),
        beside=f"half of the views {quantile(views, 0.5):.2f}, 99 % {quantile(views, 0.99):.2f}",
    )
    mesh = count - 1 if count <= FULL_MESH else NEIGHBOURS

    def meshed() -> int:
        return sum(cluster.connections[name] >= mesh for name in names)

    await cluster.until(lambda: meshed() == count, f"{mesh} connections at each", MESH_S_MAX)
    say("all connected, after the last start", max(0.0, time.time() - started), digits=1)
    figures = await asyncio.gather(*(process.ask("figures") for process in others))
    cpu_s = sum(each["cpu_s"] for each in figures) / count
    say("CPU that a node used until then", cpu_s, beside="imports of its process included")
    await asyncio.sleep(SETTLE_S)
    await _steady(report, section, others, steady_s)

    joined = (await cluster.start(last, last.names, bootstrap=[addr]))["began"]
    known = await cluster.seen([newcomer], "alive", by=names, within_s=CONVERGE_S_MAX)
    knows = await cluster.seen(names, "alive", by=[newcomer], within_s=CONVERGE_S_MAX)
    say("a node joins: all know it", known - joined)
    say("a node joins: it knows all", knows - joined)
    await asyncio.sleep(SETTLE_S)
    await cluster.drain()

    killed = await cluster.kill(last)
    shortest, longest = suspicion_range(count + 1)
    dead = await cluster.seen(
        [newcomer], "dead", by=names, within_s=detection_s() + longest + CONVERGE_S_MAX
    )
    suspected = [at for at, _, of in cluster.said("suspect", since=killed) if of == newcomer]
    deaths = [at for at, _, of in cluster.said("dead", since=killed) if of == newcomer]
    say(
        "kill -9: first suspicion",
        min(suspected, default=dead) - killed,
        beside=f"formula, silent death: {detection_s():.2f} on average",
    )
    say(
        "kill -9: first to call it dead",
        min(deaths) - killed,
        beside=f"formula: {detection_s() + shortest:.1f} to {detection_s() + longest:.1f}",
    )
    say("kill -9: all call it dead", dead - killed, beside=f"the last {dead - min(deaths):.2f} on")

    false_suspicions = [one for one in cluster.said("suspect") if one[2] != newcomer]
    false_deaths = [
        one for state in ("dead", "left") for one in cluster.said(state) if one[2] != newcomer
    ]
    figures = await asyncio.gather(*(process.ask("figures") for process in others))
    say("suspicions of living nodes, whole run", len(false_suspicions), "views", digits=0)
    say("living nodes called dead, whole run", len(false_deaths), "views", at_most=0, digits=0)
    say(
        "loop lag of a process, p99 of the last minute",
        max(each["lag_p99_s"] for each in figures) * 1e3,
        "ms",
        beside=f"the worst; {count // len(others)} nodes share a loop",
        digits=1,
    )


async def _steady(report: Report, section: str, processes: list[Process], seconds: float) -> None:
    before = await asyncio.gather(*(process.ask("figures") for process in processes))
    await asyncio.sleep(seconds)
    after = await asyncio.gather(*(process.ask("figures") for process in processes))
    took_s = mean(b["at"] - a["at"] for a, b in zip(before, after, strict=True))
    count = sum(len(each["nodes"]) for each in after)

    def rate(name: str) -> float:
        grown = sum(
            b["nodes"][node][name] - a["nodes"][node][name]
            for a, b in zip(before, after, strict=True)
            for node in b["nodes"]
        )
        return float(grown / count / took_s)

    cpu = sum(b["cpu_s"] - a["cpu_s"] for a, b in zip(before, after, strict=True))
    empty = sum(process.rss_empty for process in processes)
    rss = sum(each["rss"] for each in after)
    connections = [node["connections"] for each in after for node in each["nodes"].values()]
    frames, nbytes, wire, probes = map(rate, FRAMES)

    def say(name: str, value: float, unit: str, **how: Any) -> None:
        report.figure(section, f"steady, {seconds:g} s: {name}", value, unit, **how)

    say("membership frames sent", frames, "/node/s", beside="formula: 2, a probe and an answer")
    say("their bytes", nbytes, "B/node/s", digits=0)
    say("all bytes on the links", wire, "B/node/s", digits=0, beside="encrypted, with keepalives")
    say(
        "probes begun",
        probes,
        "/node/s",
        beside=f"formula: {1 / MembershipConfig().probe_s:g} / (1 + local health)",
    )
    health = [node["health"] for each in before for node in each["nodes"].values()]
    say("local health at its beginning, mean", mean(health), "", beside="0 unless overloaded")
    say("connections", median(connections), "/node", digits=0)
    say("CPU", cpu / took_s / count * 100, "% /node")
    say(
        "memory",
        rss / count / 2**20,
        "MiB/node",
        digits=1,
        beside=f"{(rss - empty) / count / 2**20:.1f} without the interpreter and modules",
    )


# --- real ones ------------------------------------------------------------------------------------


@dataclass
class Real:
    """A `ww node` process and what its log has said so far."""

    name: str
    process: NodeProcess
    launched: float
    _lines: int = field(default=0)
    events: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> list[dict[str, Any]]:
        """All events, in order."""
        lines = self.process.log.read_text().splitlines(keepends=True)
        for line in lines[self._lines :]:
            if not line.endswith("\n"):
                break
            self._lines += 1
            if line.startswith("{"):
                self.events.append(json.loads(line))
        return self.events

    def said(self, event: str, since: float = 0.0, **fields: str) -> Iterator[float]:
        """When it logged such an event."""
        for each in self.read():
            wanted = {"event": event, **fields}
            if each["ts"] >= since - 0.001 and wanted.items() <= each.items():
                yield each["ts"]

    def logged(self, event: str) -> bool:
        return any(self.said(event))


def wait(condition: Callable[[], Any], what: str, within_s: float) -> Any:
    deadline = time.monotonic() + within_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {within_s:g} s: {what}")
        time.sleep(0.05)
    return result


def everywhere(
    by: Iterable[Real], event: str, of: Iterable[str], since: float = 0.0, within_s: float = 90.0
) -> tuple[float, float]:
    """Wait until each of `by` logged the event of each of `of`; the first and the last time."""
    by, of = list(by), list(of)

    def times() -> list[float] | None:
        found = []
        for one in by:
            for peer in of:
                if peer == str(one.process.peer_id):
                    continue
                if (at := next(one.said(event, since, peer=peer), None)) is None:
                    return None
                found.append(at)
        return found

    found: list[float] = wait(times, f"{event} of {len(of)} at {len(by)} nodes", within_s)
    return min(found), max(found)


def real(report: Report) -> None:
    """Five `ww node` processes."""
    section = "5 ww node processes"
    report.say(f"# five `ww node` processes, with everything that a node has: {machine()}")
    report.say(f"# {formulas(5)}")

    def say(name: str, value: float, **how: Any) -> None:
        report.figure(section, name, value, **how)

    with tempfile.TemporaryDirectory() as directory, Home(Path(directory)) as home:

        def launch(name: str, **how: Any) -> Real:
            at = time.time()
            process = home.start_node(name, args=("--log-format", "json"), **how)
            return Real(name, process, at)

        a = launch("a")
        a.process.wait_ready()
        with ThreadPoolExecutor() as pool:
            tickets = list(pool.map(lambda _: a.process.invite(), range(4)))
        nodes = [a, *(launch(name, join=t) for name, t in zip("bcde", tickets, strict=True))]
        for node in nodes:
            node.process.wait_ready()
        launched = max(node.launched for node in nodes)
        # Its runtime file is there a moment before its log says so.
        wait(lambda: all(node.logged("node.ready") for node in nodes), "ready nodes", 10.0)
        ready = max(next(node.said("node.ready")) for node in nodes)
        peers = {node.name: str(node.process.peer_id) for node in nodes}
        _, seen = everywhere(nodes, "member.alive", peers.values())
        say(
            "all see all, after the last command was given",
            seen - launched,
            at_most=SEEN_S,
            beside=f"{seen - ready:.2f} after the last was ready",
        )
        with ThreadPoolExecutor() as pool:
            views = list(pool.map(lambda node: node.process.members(), nodes))
        if any(sum(m["state"] == "alive" for m in view.values()) != 5 for view in views):
            raise SystemExit("`ww ls` does not show five members alive at every node")
        # libp2p loads for seconds after a node is ready; what follows is of nodes at rest.
        for node in nodes:
            wait(partial(node.logged, "overlay.up"), "libp2p", 60.0)

        b, c, d, e = nodes[1:]
        killed = time.time()
        e.process.process.kill()
        _death(report, section, "kill -9", [a, b, c, d], peers["e"], killed, DEAD_S)

        stopped = time.time()
        d.process.process.send_signal(signal.SIGSTOP)
        _death(report, section, "SIGSTOP", [a, b, c], peers["d"], stopped, None)
        resumed = time.time()
        d.process.process.send_signal(signal.SIGCONT)
        _, back = everywhere([a, b, c], "member.alive", [peers["d"]], resumed)
        say("SIGCONT: alive everywhere", back - resumed)

        e.process.process.wait()
        before = {m["addrs"][0] for m in [views[0][peers["e"]]]}
        e2 = launch("e")
        e2.process.wait_ready()
        ready_at = next(e2.said("node.ready"))
        _, back = everywhere([a, b, c, d], "member.alive", [peers["e"]], e2.launched)
        everywhere([e2], "member.alive", [peers[name] for name in "abcd"])
        say(
            "restart on another port: alive everywhere",
            back - e2.launched,
            beside=f"{back - ready_at:.2f} after it was ready; no bootstrap address",
        )
        view = a.process.members()
        mine = [m for m in view.values() if m["name"] == "e"]
        if len(view) != 5 or len(mine) != 1 or set(mine[0]["addrs"]) & before:
            raise SystemExit(f"a node that came back is not one member with a new address: {mine}")
        report.figure(section, "members called e after that", len(mine), "", at_most=1, digits=0)

        left = time.time()
        c.process.process.send_signal(signal.SIGTERM)
        _, gone = everywhere([a, b, d, e2], "member.left", [peers["c"]], left)
        c.process.process.wait()
        say("clean stop: left everywhere", gone - left)

        victims = {peers["d"], peers["e"]}
        logs = [each for node in (a, b, c, d, e, e2) for each in node.read()]
        for event, name, target in (
            ("member.suspect", "suspicions of the others, whole run", None),
            ("member.dead", "others called dead, whole run", 0),
        ):
            count = sum(each["event"] == event and each["peer"] not in victims for each in logs)
            report.figure(section, name, count, "views", at_most=target, digits=0)


def _death(
    report: Report,
    section: str,
    what: str,
    by: list[Real],
    peer: str,
    since: float,
    at_most: float | None,
) -> None:
    first_dead, last_dead = everywhere(by, "member.dead", [peer], since)
    suspected = [at for node in by for at in node.said("member.suspect", since, peer=peer)]
    shortest, longest = suspicion_range(len(by) + 1)
    report.figure(
        section,
        f"{what}: first suspicion",
        min(suspected, default=first_dead) - since,
        beside=f"formula, silent death: {detection_s():.2f} on average",
    )
    report.figure(
        section,
        f"{what}: dead everywhere",
        last_dead - since,
        at_most=at_most,
        beside=f"the first {first_dead - since:.2f}; "
        f"formula: {detection_s() + shortest:.1f} to {detection_s() + longest:.1f}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, help="[64]")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--steady", type=float, default=30.0, help="seconds of the steady state")
    parser.add_argument("--real", action="store_true", help="only the real processes")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    args = parser.parse_args()
    report = Report(as_json=args.json)
    if args.quick:
        asyncio.run(many(report, args.nodes or 12, 2, min(args.steady, 5.0)))
    elif not args.real or args.nodes:
        asyncio.run(many(report, args.nodes or 64, args.processes, args.steady))
    if args.quick or args.real or not args.nodes:
        real(report)
    if args.json:
        print(json.dumps(report.figures, indent=2))
    for missed in report.missed:
        report.say(f"MISSED: {missed}")
    return int(args.check and bool(report.missed))


if __name__ == "__main__":
    sys.exit(main())
