"""Probes: this node's own, which end in an answer or a suspicion, and those made for others.

Every node probes one other in each period. One that does not answer is probed through a few others;
those say when they get no answer either, so that a node that hears nothing at all doubts itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import LimitExceeded
from wetware.overlay.membership import wire
from wetware.overlay.membership.wire import SUSPECT, Frame, Kind

if TYPE_CHECKING:
    from wetware.overlay.membership.basis import Basis
    from wetware.overlay.membership.table import Node

RTT_USABLE_S: Final = 1.0  # the clock of a peer is known to half a round trip
_RTT_WEIGHT: Final = 0.25
PINGS_MAX: Final = 256
"""Of those that somebody asked for, at a time."""
PING_S_MAX: Final = 10.0
"""Longer than `Membership.ping` waits."""


@dataclass(slots=True, eq=False)
class _Probe:
    seq: int
    key: bytes
    started: float
    relays: set[bytes] = field(default_factory=set)  # asked, and silent so far
    nacks_due: int = 0
    unreachable: bool = False
    indirect: bool = False


@dataclass(slots=True, eq=False)
class _Relay:
    source: bytes
    source_seq: int
    key: bytes
    settled: bool = False  # answered, one way or the other


class Probing:
    """The probes of one node, and `silent` is told of those that did not answer."""

    def __init__(self, basis: Basis, own: bytes, silent: Callable[[Node], None]) -> None:
        self._own, self._silent, self._seq = own, silent, basis.rng.getrandbits(31)
        self._config, self._timers, self._table = basis.config, basis.timers, basis.table
        self._gossip, self._awareness = basis.gossip, basis.awareness
        self._unix_ms, self._counters = basis.unix_ms, basis.counters
        self._probes: dict[int, _Probe] = {}
        self._by_key: dict[bytes, _Probe] = {}
        self._relays: dict[int, _Relay] = {}
        self._pings: dict[int, tuple[bytes, Callable[[], None]]] = {}

    def reset(self) -> None:
        """Forget what is under way."""
        self._probes.clear()
        self._by_key.clear()
        self._relays.clear()

    def next(self) -> None:
        """Probe the next node of this round, and so on in every period."""
        self._timers.after(self._awareness.scaled(self._config.probe_s), self.next)
        if (node := self._table.next_in_turn()) is not None:
            self._begin(node)

    def probe(self, node: Node) -> None:
        """Probe a node now, out of turn."""
        if len(self._probes) < self._config.probes_max:
            self._begin(node)

    def ping(self, key: bytes, answered: Callable[[], None]) -> None:
        """Call back when a peer answers; its silence says nothing. Raises LimitExceeded."""
        if len(self._pings) >= PINGS_MAX:
            raise LimitExceeded(f"{PINGS_MAX} pings are under way")
        seq = self._next_seq()
        self._pings[seq] = key, answered
        self._timers.after(PING_S_MAX, self._pings.pop, seq, None)
        self._gossip.post(key, {"k": int(Kind.PING), "n": seq})

    def _next_seq(self) -> int:
        self._seq = (self._seq + 1) & wire.SEQ_MAX
        return self._seq

    # --- this node's own --------------------------------------------------------------------------

    def _begin(self, node: Node) -> None:
        if not node.lives or node.key in self._by_key:
            return
        self._counters["probes"] += 1
        probe = _Probe(self._next_seq(), node.key, self._timers.now())
        self._probes[probe.seq] = self._by_key[node.key] = probe
        fields: dict[str, Any] = {"k": int(Kind.PING), "n": probe.seq}
        if node.state == SUSPECT:  # let it know, so that it refutes
            fields["c"] = wire.CLAIM.pack(node.key, node.record.incarnation, self._own, SUSPECT)
        scaled, config = self._awareness.scaled, self._config
        self._timers.after(scaled(config.probe_timeout_s), self._ask_others, probe)
        self._timers.after(scaled(config.probe_s), self._over, probe)
        self._gossip.post(node.key, fields, config.piggyback_bytes_max)

    def _ask_others(self, probe: _Probe) -> None:
        if self._probes.get(probe.seq) is not probe or probe.indirect:
            return
        probe.indirect = True
        for node in self._table.sample(self._config.indirect_probes, exclude=probe.key):
            probe.relays.add(node.key)
            fields = {"k": int(Kind.PING_REQ), "n": probe.seq, "i": probe.key}
            self._gossip.post(node.key, fields, self._config.piggyback_bytes_max)
        probe.nacks_due = len(probe.relays)
        self._maybe_over(probe)

    def _maybe_over(self, probe: _Probe) -> None:
        """No need to wait if everybody has said that there is no way."""
        if probe.indirect and probe.unreachable and not probe.relays:
            self._over(probe)

    def _over(self, probe: _Probe) -> None:
        """The time is over, without an answer to the probe."""
        if self._probes.get(probe.seq) is not probe:
            return
        self._forget(probe)
        node = self._table.nodes.get(probe.key)
        if node is None or not node.lives:
            return
        if node.heard_at > probe.started:  # it spoke, so it lives
            self._awareness.add(-1)
            return
        self._counters["probes_failed"] += 1
        # Relays that did not even say that they got no answer: maybe it is this node's fault.
        self._awareness.add(len(probe.relays) if probe.nacks_due > 0 else 1)
        self._silent(node)

    def _forget(self, probe: _Probe) -> None:
        self._probes.pop(probe.seq, None)
        if self._by_key.get(probe.key) is probe:
            del self._by_key[probe.key]

    def forget(self, key: bytes) -> None:
        """A node is no member any more."""
        if (probe := self._by_key.get(key)) is not None:
            self._forget(probe)

    def unreachable(self, key: bytes) -> None:
        """A dial or a send to a peer failed."""
        probe = self._by_key.get(key)
        if probe is not None and not probe.unreachable:
            probe.unreachable = True
            if not probe.indirect:
                self._ask_others(probe)
        for probe in [p for p in self._probes.values() if key in p.relays]:
            probe.relays.discard(key)  # that says nothing of this node's own health
            probe.nacks_due -= 1
            self._maybe_over(probe)
        for seq, relay in list(self._relays.items()):
            if relay.key == key:
                self._nack(relay)
                self._relays.pop(seq, None)

    # --- answers ----------------------------------------------------------------------------------

    def acked(self, source: bytes, frame: Frame) -> Node | None:
        """A peer answered; returns the node of which it says that it lives, if that is another."""
        probe = self._probes.get(frame.seq)
        if probe is not None and (source == probe.key or source in probe.relays):
            self._forget(probe)
            self._awareness.add(-1)
            node = self._table.nodes.get(probe.key)
            if node is None or source != probe.key:
                return node
            self._measured(node, frame, self._timers.now() - probe.started)
            return None
        relay = self._relays.get(frame.seq)
        if relay is not None and relay.key == source:
            del self._relays[frame.seq]
            relay.settled = True
            self._gossip.post(relay.source, {"k": int(Kind.ACK), "n": relay.source_seq})
        asked, answered = self._pings.get(frame.seq, (b"", None))
        if asked == source and answered is not None:
            del self._pings[frame.seq]
            answered()
        return None

    def _measured(self, node: Node, frame: Frame, rtt_s: float) -> None:
        if node.rtt_s is None:
            node.rtt_s = rtt_s
        else:
            node.rtt_s += _RTT_WEIGHT * (rtt_s - node.rtt_s)
        if frame.unix_ms is not None and rtt_s <= RTT_USABLE_S:
            node.offset_s = (frame.unix_ms - self._unix_ms()) / 1000 + rtt_s / 2

    def nacked(self, source: bytes, frame: Frame) -> None:
        """A relay got no answer."""
        probe = self._probes.get(frame.seq)
        if probe is not None and source in probe.relays:
            probe.relays.discard(source)
            self._maybe_over(probe)

    # --- for others -------------------------------------------------------------------------------

    def relay(self, source: bytes, frame: Frame) -> None:
        """Probe a node for another one."""
        relay = _Relay(source, frame.seq, frame.node)
        if frame.node == self._own:
            self._gossip.post(source, {"k": int(Kind.ACK), "n": frame.seq})
        elif frame.node not in self._table.nodes or len(self._relays) >= self._config.relays_max:
            self._nack(relay)
        else:
            seq, config = self._next_seq(), self._config
            self._relays[seq] = relay
            # Before the asker's own time is over; a late answer is still passed on.
            self._timers.after(0.8 * config.probe_timeout_s, self._nack, relay)
            self._timers.after(config.probe_s, self._relays.pop, seq, None)
            ping = {"k": int(Kind.PING), "n": seq}
            self._gossip.post(frame.node, ping, config.piggyback_bytes_max)

    def _nack(self, relay: _Relay) -> None:
        if not relay.settled:
            relay.settled = True
            self._gossip.post(relay.source, {"k": int(Kind.NACK), "n": relay.source_seq})
