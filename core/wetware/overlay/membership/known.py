"""What is told of a member: what is known of it at one moment, and what happened to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.membership.record import Record


class State(StrEnum):
    """What this node believes of another."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


class ChangeKind(StrEnum):
    """What happened to a member.

    JOINED: it is new. UPDATED: a newer record. SUSPECTED, DIED, LEFT: as the state. ALIVE: back
    from any of these. REMOVED: forgotten, after its retention or because it was evicted. DUPLICATE:
    two processes use one key, this node's or the member's; told each time that the other is heard
    of, and the member is the other, as it describes itself.
    """

    JOINED = "joined"
    UPDATED = "updated"
    SUSPECTED = "suspected"
    ALIVE = "alive"
    DIED = "died"
    LEFT = "left"
    REMOVED = "removed"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of another node, at one moment.

    Attributes:
        record: Its newest description.
        state: What this node believes.
        since: Monotonic time at which it began to.
        labels: The node's, with those of its certificate, which win.
        rtt_s: Round trip of probes, smoothed; None before the first.
        clock_offset_s: Its clock minus this node's; None if not measured.
    """

    record: Record
    state: State
    since: float
    labels: Mapping[str, str]
    rtt_s: float | None
    clock_offset_s: float | None

    @property
    def peer(self) -> PeerId:
        return self.record.peer


@dataclass(frozen=True, slots=True)
class Change:
    """Something happened to a member; `before` is its state until then, None if it was unknown."""

    kind: ChangeKind
    member: Known
    before: State | None
