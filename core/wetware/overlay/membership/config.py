"""The timings and bounds of membership: one named value each, with its reason or its formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """Times are seconds, sizes are bytes, the rest are counts. The same in the whole cluster.

    With N nodes alive, and the defaults, which are those of memberlist for a LAN:

        suspicion, shortest = suspicion_mult × max(1, log10 N) × probe_s          N=8: 4 s, 1000: 12
        suspicion, longest  = suspicion_max_mult × the shortest
        after c of k = suspicion_mult - 2 independent confirmations
                            = longest - (longest - shortest) × log(c + 1) / log(k + 1)
        transmissions of a rumour, each node = retransmit_mult × ⌈log10(N + 1)⌉
        push-pull every sync_s × (1 + ⌈log2(N / 32)⌉)  for N > 32, else sync_s
        a silent death is first suspected after e / (e - 1) = 1.58 × probe_s on average, and known
        everywhere after one suspicion more
        probe_s and probe_timeout_s are multiplied by 1 + local health (0 … awareness_max - 1)

    Sources: Das, Gupta, Motivala, "SWIM" (2002); Dadgar, Phillips, Currey, "Lifeguard" (2017);
    hashicorp/memberlist, config.go, util.go and suspicion.go.

    Attributes:
        probe_s: Every node probes one other in this time.
        probe_timeout_s: For the answer to a direct probe; then others are asked to probe. Above
            the round trip of nearly every link, a dial on demand included.
        indirect_probes: Members that are asked to probe; three see another path unless the node
            is really cut off.
        awareness_max: Local health is below this; a node that doubts itself is up to so many
            times more patient with others.
        suspicion_mult: How many probe periods a suspected node has, at least, to refute.
        suspicion_max_mult: How many times longer it has while nobody confirms the suspicion.
        retransmit_mult: How often a rumour is passed on; see above.
        gossip_s: Rumours that wait go out in this period, beside those on probes.
        gossip_nodes: To so many members each time.
        gossip_bytes_max: Rumours in one gossip frame: some 90 members.
        piggyback_bytes_max: Rumours on one probe or answer: fits a packet with it.
        gossip_to_dead_s: How long the dead still get rumours, so that one that lives hears of it.
        sync_s: Period of push-pull; see above.
        sync_peer_s_min: A peer is synced with at most so often, however often it reconnects.
        away_s: A tick that comes so much too late means that this process stood still, not that
            others are dead.
        retention_s: How long the dead and the left are remembered, so that no old record brings
            them back.
        record_age_s_max: Older records are refused (and those from so far in the future), unless
            their author sends them itself. Nodes sign anew at a third of it. Bounds what a recorded
            message is worth to an attacker.
        load_s: A node publishes its load at most so often; see load_updates_per_s.
        load_updates_per_s: Load updates in the whole cluster: each node waits N / this at least.
        update_s_min: A node publishes other changes of its own at most so often.
        members_max: Nodes in the table, the dead included; the oldest dead makes room.
        frame_bytes_max: One frame, both ways.
        frames_per_s: What a peer may send, sustained; a frame counts once per started KiB, and
            what it asks for counts with it. Beyond it frames are dropped.
        frames_burst: The same at once: the table of a full cluster.
        records_per_s: Records from one peer to look at and verify, sustained: 0.3 ms each.
        records_burst: The same at once: what a node that joins a large cluster gets.
        claims_per_s: Suspicions that one peer passes on, sustained.
        claims_burst: The same at once: half of a large cluster is lost with a switch.
        fetch_records_max: Records asked of one peer at a time, so that an answer is never long.
        fetch_s: For the answer; then another who announced the record is asked.
        relays_max: Probes on behalf of others at a time.
        probes_max: Probes out of turn at a time (connections that ended, doubted claims).
        refutes_per_s: How often a node refutes, sustained; each refutation goes to all nodes.
        refutes_burst: The same at once.
        facts_max: Facts (evictions, foreign peers) in one digest.
        fact_bytes_max: One fact.
        farewells: Members that a leaving node tells directly; they tell the others.
        full_mesh_max: Up to so many nodes, every pair keeps a connection.
        neighbours: In a larger cluster, connections that a node keeps beside those on demand.
        redial_s_min: First wait before a lost member is dialled again.
        redial_s_max: The longest such wait.
        stranger_s: How long an address that turned out to be no member is left alone.
        peers_max: Addresses remembered on disk.
        queue_bytes_max: Frames that wait for one peer; beyond it they are dropped.
        dials_max: Dials on behalf of membership at a time.
        leave_s: How long a stopping node tries to say farewell.
    """

    probe_s: float = 1.0
    probe_timeout_s: float = 0.5
    indirect_probes: int = 3
    awareness_max: int = 8
    suspicion_mult: int = 4
    suspicion_max_mult: int = 6
    retransmit_mult: int = 4
    gossip_s: float = 0.2
    gossip_nodes: int = 3
    gossip_bytes_max: int = 4 * KIB
    piggyback_bytes_max: int = 1 * KIB
    gossip_to_dead_s: float = 30.0
    sync_s: float = 30.0
    sync_peer_s_min: float = 5.0
    away_s: float = 0.25
    retention_s: float = 86_400.0
    record_age_s_max: float = 3600.0
    load_s: float = 30.0
    load_updates_per_s: float = 2.0
    update_s_min: float = 1.0
    members_max: int = 4096
    frame_bytes_max: int = 64 * KIB
    frames_per_s: float = 500.0
    frames_burst: int = 8000
    records_per_s: float = 100.0
    records_burst: int = 4096
    claims_per_s: float = 100.0
    claims_burst: int = 2048
    fetch_records_max: int = 64
    fetch_s: float = 2.0
    relays_max: int = 256
    probes_max: int = 64
    refutes_per_s: float = 0.5
    refutes_burst: int = 8
    facts_max: int = 3072
    fact_bytes_max: int = 16 * KIB
    farewells: int = 64
    full_mesh_max: int = 64
    neighbours: int = 16
    redial_s_min: float = 0.5
    redial_s_max: float = 30.0
    stranger_s: float = 600.0
    peers_max: int = 4096
    queue_bytes_max: int = 256 * KIB
    dials_max: int = 16
    leave_s: float = 0.3

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) <= 0:
                raise ValueError(f"{item.name} must be positive")
        if self.probe_timeout_s >= self.probe_s:
            raise ValueError("probe_timeout_s must be below probe_s: indirect probes need the rest")
        if self.frame_bytes_max < 32 * KIB:
            raise ValueError("frame_bytes_max is at least 32768: a record and a fact must fit")

    def suspicion_s(self, nodes: int, confirmations: int = 0) -> tuple[float, float, int]:
        """How long a suspected node has.

        Returns the shortest time, the time after so many independent confirmations, and how many
        of them lead to the shortest. In a cluster too small for them, the shortest time holds.
        """
        shortest = self.suspicion_mult * max(1.0, math.log10(max(1, nodes))) * self.probe_s
        longest = self.suspicion_max_mult * shortest
        wanted = self.suspicion_mult - 2
        if wanted < 1 or nodes - 2 < wanted:
            return shortest, shortest, 0
        share = math.log(confirmations + 1) / math.log(wanted + 1)
        return shortest, max(shortest, longest - share * (longest - shortest)), wanted

    def transmissions(self, nodes: int) -> int:
        """How often one node passes a rumour on."""
        return self.retransmit_mult * math.ceil(math.log10(nodes + 1))

    def sync_period_s(self, nodes: int) -> float:
        return self.sync_s * (1 + max(0, math.ceil(math.log2(max(1, nodes) / 32))))

    def load_period_s(self, nodes: int) -> float:
        """How long a node waits between two publications of its load."""
        return max(self.load_s, nodes / self.load_updates_per_s)
