"""What a node says of itself: signed anew when it changes, grows old, or somebody doubts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from wetware.base.bounds import TokenBucket
from wetware.overlay.membership.gossip import announcement
from wetware.overlay.membership.record import INCARNATION_MAX, REVISION_MAX, Record, key_of

if TYPE_CHECKING:
    from wetware.overlay.membership.basis import Basis

LOAD_CHANGE_MIN: Final = 0.1
"""Load, per CPU, and memory, as a fraction: smaller changes are not worth a rumour."""
_LOAD_FIELDS: Final = frozenset(("load", "memory_bytes"))
_FIELDS: Final = (
    "addrs", "host", "name", "labels", "version", "services", "load", "memory_bytes", "chain",
)  # fmt: skip


class OwnRecord:
    """The record of this node; `sign` makes the next one, of every field of `Record.sign`."""

    def __init__(self, basis: Basis, record: Record, sign: Callable[..., Record]) -> None:
        self.record, self.key, self._sign = record, key_of(record.peer), sign
        self._born_ms = record.issued_ms
        self._basis, self._timers = basis, basis.timers
        self._config = config = basis.config
        self._refutes = TokenBucket(config.refutes_per_s, config.refutes_burst, basis.timers.now)
        self._refute_planned = False
        self._changed: dict[str, Any] = {}
        self._published_at = basis.timers.now()
        self._publish_at: float | None = None

    def start(self) -> None:
        self._timers.after(self._refresh_s(), self._refresh)
        self._basis.gossip.announce(self.record, urgent=True)

    @property
    def entry(self) -> bytes:
        return announcement(self.record)

    def is_other(self, record: Record) -> bool:
        """Whether a record with this node's key is of another process."""
        return record.instance != self.record.instance

    def is_twin(self, record: Record) -> bool:
        """Whether that other process lives: it signed after this one had begun."""
        return self.is_other(record) and record.issued_ms > self._born_ms

    def update(self, fields: dict[str, Any]) -> None:
        """See `Swim.update`."""
        if unknown := fields.keys() - set(_FIELDS):
            raise TypeError(f"no such fields of a record: {', '.join(sorted(unknown))}")
        for name in ("addrs", "services"):
            if name in fields:
                fields[name] = tuple(fields[name])
        for name, value in fields.items():
            if getattr(self.record, name) == value:
                self._changed.pop(name, None)
            else:
                self._changed[name] = value
        if not self._changed or self.record.left:
            return
        if self._changed.keys() <= _LOAD_FIELDS:
            if self._load_differs():
                wait_s = self._config.load_period_s(self._basis.table.size)
                self._plan(self._published_at + wait_s)
        else:
            self._plan(self._published_at + self._config.update_s_min)

    def refute(self, incarnation: int) -> None:
        """Say more loudly than any claim so far that this node lives."""
        if self.record.left or incarnation < self.record.incarnation:
            return
        if not self._refutes.take():
            if not self._refute_planned:
                self._refute_planned = True
                wait_s = 1 / self._config.refutes_per_s
                self._timers.after(wait_s, self._refute_later, incarnation)
            return
        self._basis.counters["refutations"] += 1
        self._basis.awareness.add(1)
        self._publish(incarnation=min(INCARNATION_MAX, incarnation + 1))

    def _refute_later(self, incarnation: int) -> None:
        self._refute_planned = False
        self.refute(incarnation)

    def leave(self) -> None:
        """Say farewell."""
        self._publish(left=True)

    def _publish(self, *, incarnation: int | None = None, left: bool = False) -> None:
        """Sign the record anew, with what has changed."""
        was = self.record
        fields = {name: getattr(was, name) for name in _FIELDS} | self._changed
        self._changed.clear()
        if incarnation is None and was.revision == REVISION_MAX:
            incarnation = was.incarnation + 1
        self.record = self._sign(
            incarnation=was.incarnation if incarnation is None else incarnation,
            revision=was.revision + 1 if incarnation is None else 0,
            instance=was.instance,
            issued_ms=self._basis.unix_ms(),
            left=left,
            **fields,
        )
        self._published_at = self._timers.now()
        self._publish_at = None
        self._basis.gossip.announce(self.record, urgent=left or not is_routine(was, self.record))

    def _plan(self, when: float) -> None:
        if when <= self._timers.now():
            self._publish()
        elif self._publish_at is None or when < self._publish_at:
            self._publish_at = when
            self._timers.at(when, self._publish_planned, when)

    def _publish_planned(self, when: float) -> None:
        if self._publish_at == when:
            self._publish_at = None
            if self._changed.keys() - _LOAD_FIELDS or self._load_differs():
                self._publish()

    def _load_differs(self) -> bool:
        record = self.record
        load: float = self._changed.get("load", record.load)
        memory: int = self._changed.get("memory_bytes", record.memory_bytes)
        memory_change_min = LOAD_CHANGE_MIN * max(record.memory_bytes, 1)
        return (
            abs(load - record.load) >= LOAD_CHANGE_MIN
            or abs(memory - record.memory_bytes) >= memory_change_min
        )

    def _refresh_s(self) -> float:
        return self._config.record_age_s_max / 3 * (0.8 + 0.2 * self._basis.rng.random())

    def _refresh(self) -> None:
        """Keep the record young enough for nodes that join."""
        wait_s = self._refresh_s()
        old_s = self._timers.now() - self._published_at
        if old_s >= 0.7 * wait_s:
            self._publish()
            self._timers.after(wait_s, self._refresh)
        else:
            self._timers.after(wait_s - old_s, self._refresh)


def is_routine(was: Record, now: Record) -> bool:
    """Whether nothing changed that anybody waits for: load, memory, the time of the signature."""
    return was.incarnation == now.incarnation and all(
        getattr(was, name) == getattr(now, name) for name in _FIELDS if name not in _LOAD_FIELDS
    )
