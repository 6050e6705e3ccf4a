"""What is to be passed on, and how often it was.

Each rumour goes out a limited number of times, those that went out least first, and of these the
newest first: what has just become known spreads fastest, and what everybody knows dies out. What
is not urgent dies out sooner: a rumour that comes back counts as passed on. (Measured: for all
rumours, that leaves 2 % of the nodes to the next push-pull.)

Sources: the SWIM paper, section 4.1; memberlist, queue.go; for rumours that come back the "counter"
variant of Demers et al., "Epidemic algorithms for replicated database maintenance" (1987).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ENTRY, CLAIM, FACT = range(3)
_OVERHEAD_BYTES: Final = 4  # of the list that a rumour is in


@dataclass(slots=True)
class _Rumour:
    kind: int
    data: bytes
    sent: int
    urgent: bool


class Rumours:
    """The queue. A rumour is named by its kind and subject; a later one replaces it."""

    __slots__ = ("_all", "_tiers", "_urgent")

    def __init__(self) -> None:
        self._tiers: list[dict[tuple[int, bytes], _Rumour]] = []
        self._all: dict[tuple[int, bytes], _Rumour] = {}
        self._urgent = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def is_urgent(self) -> bool:
        """Whether something waits that is worth frames of its own."""
        return self._urgent > 0

    @property
    def has_routine(self) -> bool:
        """Whether something waits that dies out when it comes back."""
        return len(self._all) > self._urgent

    def add(self, kind: int, subject: bytes, data: bytes, *, urgent: bool = True) -> None:
        key = kind, subject
        self._remove(key)
        rumour = _Rumour(kind, data, 0, urgent)
        self._all[key] = rumour
        self._urgent += urgent
        self._put(key, rumour)

    def drop(self, kind: int, subject: bytes) -> None:
        self._remove((kind, subject))

    def came_back(self, kind: int, subject: bytes, data: bytes) -> None:
        """Somebody else tells it too: what is not urgent counts as passed on once more."""
        key = kind, subject
        rumour = self._all.get(key)
        if rumour is not None and not rumour.urgent and rumour.data == data:
            del self._tiers[rumour.sent][key]
            rumour.sent += 1
            self._put(key, rumour)

    def take(self, bytes_max: int, transmissions: int) -> tuple[bytes, bytes, bytes]:
        """What to put into the next frame: entries, claims and digests, packed."""
        parts: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])
        moved: list[tuple[tuple[int, bytes], _Rumour]] = []
        room = bytes_max - 3 * _OVERHEAD_BYTES
        for tier in self._tiers[:transmissions]:
            while tier:
                key, rumour = item = tier.popitem()
                room -= len(rumour.data)
                if room < 0:
                    tier[key] = rumour
                    break
                parts[rumour.kind].append(rumour.data)
                moved.append(item)
            else:
                continue
            break
        if moved and len(self._tiers) <= moved[-1][1].sent + 1:
            self._tiers.append({})
        for key, rumour in reversed(moved):  # the newest stay last, to be taken first again
            rumour.sent += 1
            self._tiers[rumour.sent][key] = rumour
        for tier in self._tiers[transmissions:]:
            for key in list(tier):
                self._remove(key)
        return b"".join(parts[0]), b"".join(parts[1]), b"".join(parts[2])

    def _put(self, key: tuple[int, bytes], rumour: _Rumour) -> None:
        while len(self._tiers) <= rumour.sent:
            self._tiers.append({})
        self._tiers[rumour.sent][key] = rumour

    def _remove(self, key: tuple[int, bytes]) -> None:
        rumour = self._all.pop(key, None)
        if rumour is not None:
            self._urgent -= rumour.urgent
            del self._tiers[rumour.sent][key]
