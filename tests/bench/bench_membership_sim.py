"""Membership of many nodes in simulated time, beside memberlist's published formulas.

    python tests/bench/bench_membership_sim.py [--nodes 1000] [--seed 1] [--quick]

The code is the node's own; simulated are the clock and the network (5 to 50 ms one way). Times are
simulated seconds, so the machine does not matter; the same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections import Counter

from membership_sim import Sim, SimNode

from wetware.identity import PeerId
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.known import Change, ChangeKind


class Watch:
    """What the nodes report, summed up."""

    def __init__(self) -> None:
        self.suspected: list[tuple[float, PeerId]] = []
        self.died: list[tuple[float, PeerId]] = []
        self.alive: dict[PeerId, bool] = {}

    def changed(self, node: SimNode, at: float, change: Change) -> None:
        if change.kind is ChangeKind.SUSPECTED:
            self.suspected.append((at, change.member.peer))
        elif change.kind is ChangeKind.DIED:
            self.died.append((at, change.member.peer))

    def clear(self) -> None:
        self.suspected.clear()
        self.died.clear()


def say(what: str, value: str, beside: str = "") -> None:
    print(f"  {what:<52}{value:>14}   {beside}", flush=True)


def traffic(sim: Sim, seconds: float) -> tuple[float, float]:
    """Frames and bytes sent by a node in a second."""
    frames, size, count = sim.frames, sim.bytes, len(sim.living)
    sim.run(seconds)
    return (sim.frames - frames) / count / seconds, (sim.bytes - size) / count / seconds


def start(sim: Sim, count: int) -> None:
    sim.start(count, seeds=3)
    begun = sim.frames, sim.bytes
    know = sim.run(120, lambda: all(n.swim.size == count for n in sim.living), 0.1)
    say("simultaneous start: all know all", f"{sim.time:.1f} s" if know else "not in 120 s")
    say("  frames per node until then", f"{(sim.frames - begun[0]) / count:.0f}")
    say("  bytes per node until then", f"{(sim.bytes - begun[1]) / count / 1024:.0f} KiB")


def steady(sim: Sim, seconds: float) -> None:
    frames, size = traffic(sim, seconds)
    say("quiet: frames sent per node and second", f"{frames:.2f}", "a probe and an answer: 2.00")
    say("quiet: bytes sent per node and second", f"{size:.0f} B")


def join(sim: Sim, watch: Watch, config: MembershipConfig) -> None:
    count = len(sim.nodes)
    lam = config.transmissions(count) / math.log(count)
    rounds = math.log(count) / math.log(1 + config.gossip_nodes)
    begun, frames, size = sim.time, sim.frames, sim.bytes
    sim.connect(sim.add(count), sim.living[count // 2])
    know = sim.run(120, lambda: all(n.swim.size == count + 1 for n in sim.living), 0.05)
    say(
        "a node joins: all know it",
        f"{sim.time - begun:.1f} s" if know else "not in 120 s",
        f"fan-out {config.gossip_nodes}: log N rounds = {rounds * config.gossip_s:.1f} s; "
        f"lambda {lam:.1f} x ln N transmissions",
    )
    sim.run(3)
    say("  frames per node for it", f"{(sim.frames - frames) / count:.0f}", "within 3 s more")
    say("  bytes per node for it", f"{(sim.bytes - size) / count:.0f} B")


def deaths(sim: Sim, watch: Watch, config: MembershipConfig, times: int) -> None:
    first, known, spread = [], [], []
    for _ in range(times):
        victim = sim.rng.choice(sim.living)
        watch.clear()
        sim.kill(victim)
        begun, left = sim.time, len(sim.living)
        sim.run(200, lambda n=left: len(watch.died) >= n, 0.1)  # type: ignore[misc]
        at = [at - begun for at, peer in watch.suspected if peer == victim.peer]
        first.append(min(at, default=math.inf))
        spread.append(sorted(at)[int(len(at) * 0.99) - 1] - min(at) if at else math.inf)
        known.append(max((at - begun for at, _ in watch.died), default=math.inf))
        sim.run(5)
    count = len(sim.living)
    shortest, longest, _ = config.suspicion_s(count)
    e = math.e / (math.e - 1)
    say(
        f"a silent death ({times} times): first suspicion, mean",
        f"{sum(first) / times:.1f} s",
        f"SWIM: the first probe after e/(e-1) = {e:.2f} periods, and its {config.probe_s:g} s",
    )
    say("  99 % of the nodes suspect it, after the first", f"{sum(spread) / times:.1f} s")
    say(
        "  everybody knows, mean (max)",
        f"{sum(known) / times:.1f} ({max(known):.1f}) s",
        f"memberlist: {e + config.probe_s:.1f} s + suspicion of {shortest:.1f} to {longest:.1f} s",
    )


def slow(sim: Sim, watch: Watch, seconds: float, share: float) -> None:
    living = sim.living
    some = sim.rng.sample(living, max(1, int(len(living) * share)))
    end = sim.time + seconds

    def pause(node: SimNode) -> None:
        if sim.time < end:
            length = sim.rng.uniform(1, 5)
            sim.pause(node, length)
            sim.at(sim.time + length + sim.rng.uniform(1, 5), pause, node)

    for node in some:
        sim.at(sim.time + sim.rng.uniform(0, 5), pause, node)
    watch.clear()
    frames, size = traffic(sim, seconds)
    sim.run(20)  # what was suspected until the end: pauses end within 5 s
    hours = len(living) * seconds / 3600
    victims = {peer for _, peer in watch.died}
    slow_peers = {node.peer for node in some}
    say(
        f"{share:.0%} of the nodes pause 1-5 s every few seconds",
        f"{seconds:.0f} s",
        f"{hours:.1f} node hours",
    )
    say("  false deaths per node hour (victims)", f"{len(victims) / hours:.3f}")
    say("  of them, nodes that are not slow", f"{len(victims - slow_peers) / hours:.3f}")
    suspected = {(peer, int(at / 10)) for at, peer in watch.suspected}
    say(
        "  suspicions per node hour, of the slow and of others",
        f"{sum(p in slow_peers for p, _ in suspected) / hours:.1f} / "
        f"{sum(p not in slow_peers for p, _ in suspected) / hours:.1f}",
        "an incident of 10 s counts once",
    )
    say("  frames and bytes sent per node and second", f"{frames:.1f} / {size:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="shorter phases, at most 128 nodes")
    args = parser.parse_args()
    count = min(args.nodes, 128) if args.quick else args.nodes
    gc.disable()  # millions of objects that live to the end
    config, watch, begun = MembershipConfig(), Watch(), time.monotonic()
    sim = Sim(seed=args.seed, config=config, keep_changes=False, on_change=watch.changed)
    print(f"{count} nodes, seed {args.seed}, simulated time")
    start(sim, count)
    sim.run(10)
    steady(sim, 20 if args.quick else 30)
    join(sim, watch, config)
    deaths(sim, watch, config, 2 if args.quick else 5)
    slow(sim, watch, 60 if args.quick else 40, 0.05)
    total: Counter[str] = Counter()
    for node in sim.nodes.values():
        total.update(node.swim.counters)
    print("  counters:", ", ".join(f"{k} {v}" for k, v in sorted(total.items()) if v))
    print(f"  {sim.time:.0f} s simulated in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
