"""Relays in a cluster of 10,000 members, 70 % behind NATs, 2 % on the internet:

    python tests/bench/bench_reach_sim.py [--members 10000] [--seed 1]

Who keeps which relay, who is dialled when, and what is refused is decided by the node's own code
(`relays_of`, `Reservations`' number of relays, `Relay`'s claims, the back-off of direct dials); the
network and who talks to whom are made up: each hidden member talks to 8 others at a time, chosen at
random, and half of the NATs can be punched. Round trips are 5 to 100 ms. The other 28 % have a
forwarded port, and relay for nobody in this model. Same seed, same figures.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
from collections import Counter

from wetware.base.backoff import Backoff
from wetware.base.bounds import Places
from wetware.errors import LimitExceeded
from wetware.identity import Key, PeerId
from wetware.overlay import relay
from wetware.overlay.link.limits import LinkLimits
from wetware.overlay.link.order import DIRECT_FIRST
from wetware.overlay.membership import direct, reach, reservations

HIDDEN, PUBLIC, PUNCHED = 0.7, 0.02, 0.25  # both NATs of a pair have to be of the good half
PARTNERS = 8
MINUTES = 60


def quantiles(values: list[float]) -> str:
    values = sorted(values)
    at = [values[min(len(values) - 1, len(values) * q // 100)] for q in (50, 99)]
    return f"p50 {at[0]:.1f}  p99 {at[1]:.1f}  max {values[-1]:.1f}"


def main(members: int, seed: int) -> None:
    rng = random.Random(seed)
    peers = [Key.from_seed(rng.randbytes(32)).peer_id for _ in range(members)]
    hubs, hidden = peers[: int(members * PUBLIC)], peers[-int(members * HIDDEN) :]
    kept = {peer: reach.relays_of(peer, hubs, reach.RELAYS_KEPT) for peer in hidden}
    named = {peer: rng.sample(sorted(kept[peer]), reservations.RELAYS) for peer in hidden}
    reserved = Counter(hub for its in named.values() for hub in its)

    # Each pair meets at a relay that the target names, if that has room.
    places = {hub: Places() for hub in hubs}
    carried: Counter[PeerId] = Counter()
    refused = fallback = 0
    held = contextlib.ExitStack()
    pairs = [(peer, rng.choice(hidden)) for peer in hidden for _ in range(PARTNERS)]
    relayed = [pair for pair in pairs if pair[0] != pair[1] and rng.random() >= PUNCHED]
    for source, target in relayed:
        for tried, hub in enumerate(named[target]):
            try:
                held.enter_context(places[hub].hold(*relay.claims_of_member(source, target)))
            except LimitExceeded:
                continue
            carried[hub] += 1
            fallback += bool(tried)
            break
        else:
            refused += 1

    # Direct dials of a relayed pair over an hour: each end tries again and again.
    minutes: Counter[int] = Counter()
    for _ in relayed:
        at, backoff = 0.0, Backoff(direct.AGAIN_S_MIN, direct.AGAIN_S_MAX, rng)
        while (at := at + backoff.pause_s()) < MINUTES * 60:
            minutes[int(at // 60)] += 1

    # A fresh pair: direct tries, a connection to the relay, then the link's handshake through it.
    took = []
    for _ in range(20_000):
        near, far = rng.uniform(0.005, 0.1), rng.uniform(0.005, 0.1)
        wait_s = DIRECT_FIRST * LinkLimits().dial_stagger_s
        took.append(wait_s + 5 * near + 2 * near + 4 * (near + far))
    count = len(hubs)
    print(f"# {members} members: {len(hidden)} hidden, {count} on the internet; seed {seed}")
    print(
        f"reservations of a hub            {quantiles([float(reserved[h]) for h in hubs])}"
        f"   (at most {relay.RESERVATIONS_MAX})"
    )
    print(
        f"pairs that a hub carries         {quantiles([float(carried[h]) for h in hubs])}"
        f"   (at most {relay.PAIRS_MAX})"
    )
    print(f"pairs: {len(relayed)} relayed, {fallback} by the second relay, {refused} refused")
    print(
        f"direct dials a minute, a member  first minute {minutes[0] / len(hidden):.2f}, "
        f"after an hour {statistics.mean(minutes[m] for m in range(50, 60)) / len(hidden):.2f}"
    )
    print(f"a fresh pair is connected after  {quantiles([t * 1000 for t in took])} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    main(args.members, args.seed)
