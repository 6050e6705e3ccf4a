"""What this node tells others: frames, and rumours on those that have room for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wetware.overlay.membership import wire
from wetware.overlay.membership.record import Record, key_of, peer_of
from wetware.overlay.membership.rumours import CLAIM, ENTRY, FACT, Rumours
from wetware.overlay.membership.table import Node, Table, entry_of
from wetware.overlay.membership.wire import ALIVE, LEFT, SUSPECT

if TYPE_CHECKING:
    import random
    from collections import Counter

    from wetware.identity import PeerId
    from wetware.overlay.membership.config import MembershipConfig
    from wetware.overlay.membership.timers import Timers


def announcement(record: Record) -> bytes:
    """The entry that announces a record. Who is suspected or dead is claimed, not announced."""
    return entry_of(record, LEFT if record.left else ALIVE)


class Gossip:
    """Sends frames, with rumours, and rumours alone while there are urgent ones."""

    def __init__(
        self,
        config: MembershipConfig,
        timers: Timers,
        table: Table,
        rng: random.Random,
        send: Callable[[PeerId, bytes], None],
        counters: Counter[str],
    ) -> None:
        self._config, self._timers, self._table = config, timers, table
        self._rng, self._send, self._counters = rng, send, counters
        self.rumours = Rumours()
        self._planned = False

    def post(self, key: bytes, fields: dict[str, Any], rumours_bytes_max: int = 0) -> bool:
        """Send a frame, with rumours if there is room for them; gossip only if there are any."""
        if rumours_bytes_max and len(self.rumours):
            limit = self._config.transmissions(self._table.size)
            entries, claims, facts = self.rumours.take(rumours_bytes_max, limit)
            if entries:
                fields["d"] = entries
            if claims:
                fields["c"] = fields.get("c", b"") + claims
            if facts:
                fields["f"] = facts
        if len(fields) == 1:
            return False
        frame = wire.encode(fields)
        self._counters["frames_out"] += 1
        self._counters["bytes_out"] += len(frame)
        self._send(peer_of(key), frame)
        return True

    def announce(self, record: Record, *, urgent: bool) -> None:
        """A version of a record is new."""
        self.rumours.add(ENTRY, key_of(record.peer), announcement(record), urgent=urgent)
        if urgent:
            self._plan()

    def claim(self, node: Node, accuser: bytes) -> None:
        """A node is suspected or dead."""
        # Each accuser's claim goes its own way: were the last to replace the others, nobody would
        # hear of enough of them to confirm a suspicion. A death replaces them all.
        if node.state != SUSPECT:
            self.drop_claims(node)
        claim = wire.CLAIM.pack(node.key, node.record.incarnation, accuser, node.state)
        self.rumours.add(CLAIM, node.key + accuser, claim)
        if accuser not in node.claims:
            node.claims.append(accuser)
        self._plan()

    def drop_claims(self, node: Node) -> None:
        for accuser in node.claims:
            self.rumours.drop(CLAIM, node.key + accuser)
        node.claims.clear()

    def forget(self, node: Node) -> None:
        self.rumours.drop(ENTRY, node.key)
        self.drop_claims(node)

    def tell_fact(self, digest: bytes) -> None:
        self.rumours.add(FACT, digest, digest)
        self._plan()

    def _plan(self) -> None:
        if not self._planned:
            self._planned = True
            self._timers.after(self._rng.random() * self._config.gossip_s, self._spread)

    def _spread(self) -> None:
        self._planned = False
        if not self.rumours.is_urgent or not self._table.nodes:
            return  # what is not urgent waits for a probe; a newcomer begins with a push-pull
        config = self._config
        horizon = self._timers.now() - config.gossip_to_dead_s
        for node in self._table.sample(config.gossip_nodes, dead_since=horizon):
            if not self.post(node.key, {"k": int(wire.Kind.GOSSIP)}, config.gossip_bytes_max):
                break
        self._planned = True
        self._timers.after(config.gossip_s, self._spread)
