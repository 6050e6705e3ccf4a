"""Two nodes tell each other all versions that they know, and hand over what one of them lacks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from wetware.overlay.membership import wire
from wetware.overlay.membership.wire import DEAD, SUSPECT, Frame, Kind

if TYPE_CHECKING:
    from wetware.overlay.membership.basis import Basis
    from wetware.overlay.membership.own_record import OwnRecord
    from wetware.overlay.membership.sources import Source

_FRAME_ROOM: Final = 256  # what a frame holds beside its packed list


class PushPull:
    """What this node tells a peer of all that it knows."""

    def __init__(
        self, basis: Basis, own: OwnRecord, facts: Callable[[], Mapping[bytes, bytes]]
    ) -> None:
        self._table, self._gossip, self._unix_ms = basis.table, basis.gossip, basis.unix_ms
        self._own, self._facts, self._facts_max = own, facts, basis.config.facts_max
        self._room = basis.config.frame_bytes_max - _FRAME_ROOM

    def begin(self, source: Source) -> None:
        """Tell a peer all versions that are known here; it answers with what it knows better."""
        kind = int(Kind.SYNC)
        for low, high, chunk in _ranges(self._table.keys(), self._room // wire.ENTRY.size):
            entries = b"".join([self._entry(key) for key in chunk])
            self._gossip.post(source.key, {"k": kind, "l": low, "h": high, "d": entries})
        digests = sorted(self._facts())[: self._facts_max]
        self._gossip.post(source.key, {"k": kind, "l": b"", "h": b"", "f": b"".join(digests)})

    def _entry(self, key: bytes) -> bytes:
        return self._own.entry if key == self._own.key else self._table.nodes[key].entry

    def answer(self, source: Source, frame: Frame) -> None:
        """Offer what the peer lacks; what it knows better is fetched like any other rumour."""
        if frame.covers_facts:
            theirs = set(frame.facts)
            digests = [digest for digest in self._facts() if digest not in theirs]
            self._offer(source, "f", digests[: self._facts_max])
            return
        keys = self._table.keys()
        first = bisect_left(keys, frame.low)
        last = bisect_left(keys, frame.high) if frame.high else len(keys)
        versions = {key: (inc, rev, state) for key, inc, rev, state in frame.entries}
        offers = []
        for key in keys[first:last]:
            theirs_of = versions.get(key)
            entry = self._entry(key)
            if theirs_of is None:
                if entry[-1] != DEAD and key != source.key:
                    offers.append(entry)
                continue
            _, incarnation, revision, state = wire.ENTRY.unpack(entry)
            if (incarnation, revision) > theirs_of[:2] or (
                incarnation == theirs_of[0] and state in (SUSPECT, DEAD) and state > theirs_of[2]
            ):
                offers.append(entry)
        self._offer(source, "d", offers)

    def _offer(self, source: Source, name: str, items: Sequence[bytes]) -> None:
        if not items or not source.charge(len(items[0]) * len(items)):
            return
        per_frame = self._room // len(items[0])
        for at in range(0, len(items), per_frame):
            packed = b"".join(items[at : at + per_frame])
            self._gossip.post(source.key, {"k": int(Kind.GOSSIP), name: packed})

    def serve(self, source: Source, frame: Frame) -> None:
        """Answer a request for records and facts, in frames that are not too long."""
        room, facts = self._room, self._facts() if frame.fact_wants else {}
        found: list[tuple[str, bytes]] = []
        for key in frame.wants:
            if key == self._own.key:
                found.append(("r", self._own.record.encoded))
            elif (node := self._table.nodes.get(key)) is not None:
                found.append(("r", node.record.encoded))
        held = (facts.get(digest) for digest in frame.fact_wants)
        found += [("b", fact) for fact in held if fact is not None and len(fact) < room]
        fields, size = _no_items(), 0
        for name, item in found:
            if size + len(item) + 8 > room:
                self._gossip.post(source.key, fields)
                fields, size = _no_items(), 0
            if not source.charge(len(item) + 1023):
                break
            fields[name].append(item)
            size += len(item) + 8
        self._gossip.post(source.key, fields | {"z": True, "u": self._unix_ms()})


def _no_items() -> dict[str, Any]:
    return {"k": int(Kind.HAVE), "r": [], "b": []}


def _ranges(keys: Sequence[bytes], count: int) -> Iterable[tuple[bytes, bytes, Sequence[bytes]]]:
    """Sorted keys in pieces, each with the range that it covers; together they cover everything."""
    for at in range(0, len(keys), count):
        low = keys[at] if at else b""
        high = keys[at + count] if at + count < len(keys) else b""
        yield low, high, keys[at : at + count]
