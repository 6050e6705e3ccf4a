"""A checker of watches: was each watcher told all that was for it, once, in order, not too early?

What happened is what writers were answered and what any watcher was told: all has to agree.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple


class Told(NamedTuple):
    """An event. `value` is None of a delete; `at`: when it came, by the clock of the reads."""

    revision: int
    key: str
    value: str | None
    at: float = 0.0


class Asked(NamedTuple):
    """A watch begins, or begins again, from a revision on."""

    revision: int


class Refused(NamedTuple):
    """As compacted: one can go on from this revision."""

    revision: int


class Read(NamedTuple):
    """The revision of the store, as an answer to something that was asked at `called`."""

    called: float
    revision: int


@dataclass
class Watcher:
    """What one watched, was told and was refused, in order.

    Attributes:
        prefix: Of the keys.
        steps: The first one is Asked, and so is what follows a Refused, if anything does.
    """

    prefix: str
    steps: list[Told | Asked | Refused] = field(default_factory=list)


Happened = dict[tuple[int, str], str | None]
"""(revision, key) → value, None where it was deleted."""


class Wrong(AssertionError):
    """What a watch or a store may not do."""


def check(
    watchers: Iterable[Watcher],
    writes: Iterable[Told] = (),
    reads: Iterable[Read] = (),
    compacted: int | None = 0,
) -> Happened:
    """Raise Wrong; else return what happened.

    Args:
        watchers: All there were.
        writes: That were acknowledged.
        reads: Of the store's revision.
        compacted: The highest revision that anybody asked to compact; None: it may be any.
    """
    watchers = list(watchers)
    happened: Happened = {}
    all_told = [s for w in watchers for s in w.steps if isinstance(s, Told)]
    for told in [*writes, *all_told]:
        found = happened.setdefault((told.revision, told.key), told.value)
        if found != told.value:
            raise Wrong(f"{told.key} at revision {told.revision} is {found}, and {told.value}")
    for watcher in watchers:
        _check_one(watcher, happened, compacted)
    _check_early(all_told, reads)
    return happened


def _check_one(watcher: Watcher, happened: Happened, compacted: int | None) -> None:
    mine = sorted(each for each in happened if each[1].startswith(watcher.prefix))
    for asked, told, refused in _parts(watcher):
        seen: set[tuple[int, str]] = set()
        last = 0
        for event in told:
            name = f"revision {event.revision} of {event.key}, of who watches {watcher.prefix!r}"
            if not event.key.startswith(watcher.prefix):
                raise Wrong(f"not asked for: {name}")
            if event.revision < asked:
                raise Wrong(f"before what was asked for, {asked}: {name}")
            if event[:2] in seen:
                raise Wrong(f"told twice: {name}")
            if event.revision < last:
                raise Wrong(f"after revision {last}: {name}")
            seen.add(event[:2])
            last = event.revision
        for each in mine:
            if asked <= each[0] < last and each not in seen:
                raise Wrong(f"a gap at {each} = {happened[each]!r}, of {asked} to {last}")
        if refused is not None:
            after = max(asked, last + 1)
            if refused <= after and told:
                raise Wrong(f"refused {after}, as compacted below {refused}")
            if refused <= asked or (compacted is not None and refused > compacted + 1):
                raise Wrong(f"refused {asked}, as compacted below {refused}; it is {compacted}")


def _parts(watcher: Watcher) -> Iterator[tuple[int, list[Told], int | None]]:
    """(asked, told, refused) of each time that it began."""
    asked, told = 0, list[Told]()
    for step in watcher.steps:
        match step:
            case Told():
                told.append(step)
            case Refused(revision):
                yield asked, told, revision
                asked, told = revision, []
            case Asked(revision):
                # What was told up to here is what the next part has to go on from.
                if asked:
                    yield asked, told, None
                asked, told = revision, []
    yield asked, told, None


def _check_early(told: list[Told], reads: Iterable[Read]) -> None:
    """No event is of a revision that a later read does not know of."""
    told = sorted(told, key=lambda event: event.at)
    times = [event.at for event in told]
    highest = list(accumulate((event.revision for event in told), max))
    for read in reads:
        before = bisect_right(times, read.called)
        if before and highest[before - 1] > read.revision:
            raise Wrong(f"revision {highest[before - 1]} was told of before {read}")
