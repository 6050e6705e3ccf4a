"""What a saturated transfer and a busy machine do to the membership and the loop of a node.

    python tests/bench/bench_saturation.py [--seconds 60] [--quick] [--profile]

Three `ww node` processes on loopback, default settings. Two of them send to each other as fast as
the link takes it, in both directions, on the connection and the event loop that carry their
membership; both answer calls of sessions; and one process per core does nothing but count. Nobody
must be taken for dead, and the loops must stay quick. First the same nodes at rest. `--quick`: 10
seconds. Exit status 1 with --check if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster_bulk import NAME, SCHEMA
from cluster_report import Report, formulas, machine, quantile

import wetware
from wetware.testing import Home, NodeProcess, wait_for

LAG_P99_MS = 50.0
WARM_S = 2.0
LIBP2P_S_MAX = 60.0
PAYLOAD = b"x" * 64


def install(directory: Path) -> None:
    """Make the plugin that is beside this file one that nodes find."""
    info = directory / "bench_bulk-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-bulk\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[wetware.v1]\n{NAME} = cluster_bulk\n")


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that never sleep."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def calls(ref: Any, per_s: float, times: list[float]) -> None:
    """Calls of 64 bytes there and back, one after the other."""
    while True:
        start = time.perf_counter()
        await ref.call("echo", data=PAYLOAD)
        times.append(time.perf_counter() - start)
        await asyncio.sleep(max(0.0, 1 / per_s - times[-1]))


class Part:
    """One measurement: what the nodes say afterwards, and the calls that sessions made."""

    def __init__(self, refs: dict[str, Any], per_s: float) -> None:
        self._refs, self._per_s = refs, per_s
        self.nodes: dict[str, Any] = {}
        self.calls: dict[str, list[float]] = {}

    async def run(self, seconds: float, *, profile: bool) -> Part:
        for ref in self._refs.values():
            await ref.call("begin", profile=profile)
        calling = []
        for name in list(self._refs)[:2]:
            self.calls[name] = []
            calling.append(
                asyncio.create_task(calls(self._refs[name], self._per_s, self.calls[name]))
            )
        await asyncio.sleep(seconds)
        for task in calling:
            task.cancel()
        await asyncio.gather(*calling, return_exceptions=True)
        for name, ref in self._refs.items():
            self.nodes[name] = json.loads((await ref.call("figures"))["json"])
        return self

    def report(self, report: Report, section: str, peers: dict[str, str], *, judge: bool) -> None:
        def say(name: str, value: float, unit: str, **how: Any) -> None:
            report.figure(section, name, value, unit, **how)

        a, b = (self.nodes[name] for name in list(self.nodes)[:2])
        if a["out_mb_s"]:
            say("bulk a → b", b["in_mb_s"], "MB/s", digits=1)
            say("bulk b → a", a["in_mb_s"], "MB/s", digits=1)
        for name, each in self.nodes.items():
            for peer, times in each["echoes"].items():
                other = peers[peer]
                say(
                    f"membership round trip {name} → {other}",
                    quantile(times, 0.5) * 1e3,
                    "ms p50",
                    beside=f"p99 {quantile(times, 0.99) * 1e3:.1f}, "
                    f"max {max(times, default=0) * 1e3:.1f}, {len(times)} of them",
                )
        for name, times in self.calls.items():
            say(
                f"call, 64 B, to {name}",
                quantile(times, 0.5) * 1e3,
                "ms p50",
                beside=f"p99 {quantile(times, 0.99) * 1e3:.1f}, {len(times)} calls",
            )
        for name, each in self.nodes.items():
            lag = each["lag"]
            say(
                f"loop lag of {name}, p99",
                lag["p99_s"] * 1e3,
                "ms",
                at_most=LAG_P99_MS if judge else None,
                beside=f"max {lag['max_s'] * 1e3:.1f}; "
                f"CPU {each['cpu'] * 100:.0f} %, of which the loop {each['loop_cpu'] * 100:.0f}",
                digits=1,
            )
            took_s, ran_s = each["gc_s"]
            say(
                f"longest garbage collection of {name}",
                took_s * 1e3,
                "ms",
                beside=f"{ran_s * 1e3:.1f} of it running",
                digits=1,
            )
        for counter, name, target in (
            ("suspicions", "suspicions", None),
            ("refutations", "refutations", None),
            ("probes_failed", "probes that failed", None),
            ("deaths", "living nodes called dead", 0),
        ):
            count = sum(each[counter] for each in self.nodes.values())
            say(name, count, "", at_most=target if judge else None, digits=0)
        lost = sum(each["echoes_lost"] for each in self.nodes.values())
        say("membership round trips beyond 5 s", lost, "", digits=0)
        for name, each in self.nodes.items():
            if "profile" in each:
                report.say(f"\n--- profile of {name}\n{each['profile']}")
                report.say(
                    f"{name} was late for {each['late_s']:.2f} s in all (beats > 20 ms), of which "
                    f"its loop ran {each['late_own_s']:.2f} s; while late it was at:"
                )
                for stack, count in each["late_stacks"]:
                    report.say(f"  {count:5} {stack}")


async def measure(report: Report, nodes: dict[str, NodeProcess], args: argparse.Namespace) -> None:
    key = next(iter(nodes.values())).home.key()
    peers = {str(node.peer_id): name for name, node in nodes.items()}
    async with contextlib.AsyncExitStack() as stack:
        refs = {}
        for name, node in nodes.items():
            session = await stack.enter_async_context(
                wetware.connect(data_dir=node.data_dir, key=key)
            )
            refs[name] = await session.open(NAME, SCHEMA.Bulk)
        idle_s = min(10.0, args.seconds / 4)
        report.say(f"# at rest, {idle_s:g} s; {args.calls:g} calls/s to a and to b")
        part = await Part(refs, args.calls).run(idle_s, profile=False)
        part.report(report, "at rest", peers, judge=False)
        with busy(args.busy):
            if not args.no_bulk:
                await refs["a"].call("run", peers=[str(nodes["b"].peer_id)])
                await refs["b"].call("run", peers=[str(nodes["a"].peer_id)])
            await asyncio.sleep(WARM_S)
            report.say(
                f"# saturated, {args.seconds:g} s; {args.busy} busy processes, {args.calls:g} "
                "calls/s to a and to b"
            )
            part = await Part(refs, args.calls).run(args.seconds, profile=args.profile)
        part.report(report, "saturated", peers, judge=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1, help="[one per core]")
    parser.add_argument("--calls", type=float, default=50.0, help="calls a second, to each of two")
    parser.add_argument("--no-bulk", action="store_true", help="without the transfer, to compare")
    parser.add_argument("--profile", action="store_true", help="what the loops did; slows them")
    parser.add_argument("--quick", action="store_true", help="10 seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    args = parser.parse_args()
    if args.quick:
        args.seconds = 10.0
    report = Report(as_json=args.json)
    report.say(f"# three `ww node` processes, one connection each pair: {machine()}")
    report.say(f"# {formulas(3)}")
    with tempfile.TemporaryDirectory() as directory:
        site = Path(directory) / "site"
        install(site)
        path = os.pathsep.join((str(site), str(Path(__file__).parent)))
        with (
            Home(Path(directory) / "home", env={"PYTHONPATH": path}) as home,
            home.node("a") as a,
            home.node("b", join=a) as b,
            home.node("c", join=a) as c,
        ):
            nodes = {"a": a, "b": b, "c": c}
            for node in nodes.values():
                node.wait_members(other.peer_id for other in nodes.values())
                # libp2p loads for seconds after a node is ready; that is not the matter here.
                wait_for(
                    lambda node=node: "overlay.up" in node.log.read_text(),
                    "libp2p",
                    within_s=LIBP2P_S_MAX,
                )
            asyncio.run(measure(report, nodes, args))
    if args.json:
        print(json.dumps(report.figures, indent=2))
    for missed in report.missed:
        report.say(f"MISSED: {missed}")
    return int(args.check and bool(report.missed))


if __name__ == "__main__":
    sys.exit(main())
