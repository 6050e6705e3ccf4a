"""Watches: each is a cursor on the log, which every commit wakes.

What a watcher reads lies in a bounded tail in memory, or else on the disk. So a slow one holds
nothing up and costs no memory.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from itertools import groupby
from typing import Final

from wetware.errors import LimitExceeded, WetwareError
from wetware_sync.engine import PAGE_BYTES_MAX, Batch, Closed, Event, Limits

TAIL_EVENTS_MAX: Final = 4096
TAIL_BYTES_MAX: Final = 8 << 20


class Hub:
    """All watches of a store, and the tail. On the loop.

    Args:
        revision: Of the store when it was opened.
        from_disk: Reads a step of the history: (key, revision, prefix) → Batch.

    Attributes:
        revision: Of the last commit that was published.
    """

    def __init__(
        self,
        revision: int,
        limits: Limits,
        from_disk: Callable[[bytes, int, bool], Awaitable[Batch]],
    ) -> None:
        self.revision, self._limits, self.from_disk = revision, limits, from_disk
        self._tail: dict[int, tuple[Event, ...]] = {}  # revisions with events, in their order
        self._whole_from = revision + 1  # from where on it has all
        self._events = self._nbytes = 0
        self._watches: dict[bool, defaultdict[bytes, set[Cursor]]] = {
            False: defaultdict(set),
            True: defaultdict(set),
        }
        self._lengths: Counter[int] = Counter()  # of the prefixes that are watched
        self._owners: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._owners.total()

    def publish(self, events: Iterable[Event], compacted: int) -> None:
        """What was committed, whole revisions; and up to where the history has gone."""
        for revision, some in groupby(events, lambda event: event.revision):
            self._tail[revision] = found = tuple(some)
            self.revision = revision
            self._events += len(found)
            self._nbytes += sum(map(_size, found))
            for event in found:
                for watch in self._of(event.key):
                    watch.wake(revision)
        while self._tail:
            first = next(iter(self._tail))
            within = self._events <= TAIL_EVENTS_MAX and self._nbytes <= TAIL_BYTES_MAX
            if within and first > compacted:
                break
            gone = self._tail.pop(first)
            self._whole_from = first + 1
            self._events -= len(gone)
            self._nbytes -= sum(map(_size, gone))

    def skip(self, revision: int) -> None:
        """Nothing up to this one is to come, and it is in no tail."""
        self.revision, self._whole_from = revision, revision + 1

    def _of(self, key: bytes) -> list[Cursor]:
        found = list(self._watches[False].get(key, ()))
        for length in self._lengths:
            if length <= len(key):
                found += self._watches[True].get(key[:length], ())
        return found

    def tail(self, watch: Cursor) -> Batch | None:
        """What comes next for a watcher; None where it is not in the tail."""
        if watch.revision < self._whole_from and watch.revision <= self.revision:
            return None
        events: list[Event] = []
        nbytes = 0
        for revision in range(watch.revision, self.revision + 1):
            for event in self._tail.get(revision, ()):
                if event.key.startswith(watch.key) if watch.prefix else event.key == watch.key:
                    events.append(event)
                    nbytes += _size(event)
            if nbytes >= PAGE_BYTES_MAX:
                return Batch(tuple(events), revision)
        return Batch(tuple(events), max(self.revision, watch.revision - 1))

    def watch(self, key: bytes, revision: int, owner: str, *, prefix: bool) -> Cursor:
        for what, many, most in (
            ("one owner", self._owners[owner], self._limits.owner_watches),
            ("the store", len(self), self._limits.watches),
        ):
            if many >= most:
                raise LimitExceeded(f"watches of {what}: at most {most}", hint="close some")
        watch = Cursor(self, key, revision, owner, prefix=prefix)
        self._owners[owner] += 1
        if prefix:
            self._lengths[len(key)] += 1
        self._watches[prefix][key].add(watch)
        return watch

    def forget(self, watch: Cursor) -> None:
        found = self._watches[watch.prefix]
        if watch not in found.get(watch.key, ()):
            return
        found[watch.key].discard(watch)
        if not found[watch.key]:
            del found[watch.key]
        self._owners[watch.owner] -= 1
        if watch.prefix:
            self._lengths[len(watch.key)] -= 1
        self._owners += Counter()  # without those that have none
        self._lengths += Counter()

    def close(self, why: WetwareError) -> None:
        """All that watch are told."""
        for watches in (*self._watches[False].values(), *self._watches[True].values()):
            for watch in watches:
                watch.end(why)


class Cursor:
    """A Watch. `revision`: what comes next is of this one or later."""

    def __init__(self, hub: Hub, key: bytes, revision: int, owner: str, *, prefix: bool) -> None:
        self._hub = hub
        self.key, self.revision, self.owner, self.prefix = key, revision, owner, prefix
        self._woken = asyncio.Event()
        self._behind = revision <= hub.revision
        self._ended: WetwareError | None = None

    def wake(self, revision: int) -> None:
        """There is an event of this revision for it."""
        if not self._behind:
            # What was between is not for it.
            self.revision, self._behind = max(self.revision, revision), True
        self._woken.set()

    async def next(self) -> Batch:
        """As in `Watch`."""
        hub = self._hub
        while True:
            if self._ended is not None:
                raise self._ended
            if not self._behind:
                self._woken.clear()
                await self._woken.wait()
                continue
            batch = hub.tail(self) or await hub.from_disk(self.key, self.revision, self.prefix)
            self.revision = batch.revision + 1
            self._behind = self.revision <= hub.revision
            if batch.events:
                return batch

    def close(self) -> None:
        """As in `Watch`."""
        self.end(Closed("the watch was closed"))
        self._hub.forget(self)

    def end(self, why: WetwareError) -> None:
        self._ended = self._ended or why
        self._woken.set()


def _size(event: Event) -> int:
    return len(event.key) + (len(event.now.value) if event.now else 0)
