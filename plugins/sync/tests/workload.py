"""What many clients do at once, what they were told, and whether all of that can be.

Everything is a record, a dict of plain values, so clients may be processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from math import inf
from time import monotonic
from typing import Any, Protocol

from wetware.errors import Denied, OverlayError, WetwareError
from wetware_sync.engine import Closed, Compacted, Unknown, Unwritten
from wetware_sync.errors import HomeDown

from .linearizability import Model, Operation, first_wrong
from .watching import Asked, Happened, Read, Refused, Told, Watcher, Wrong
from .watching import check as check_watches

KEYS = tuple(f"k{number}" for number in range(5))
PAIR = ("p0", "p1")
"""Written together."""
LOCKS = ("g0", "g1", "g2")
"""Names of locks, and keys that are written by who holds them."""
END = "end"
LOST_PART = 0.08
"""Of the calls that are given up soon after they are sent; nobody hears an answer that came."""
CALL_S = 3.0
WRITES = 3
"""Of who holds a lock."""

Record = dict[str, Any]
Note = Callable[[Record], None]


class Port(Protocol):
    """A store, as one client has it. What is written gives its revision."""

    async def get(self, key: str) -> tuple[str | None, int, int]:
        """Value, the revision that wrote it (None, 0: there is none), the store's revision."""
        ...

    async def txn(self, writes: dict[str, str | None], expected: int | None, fence: Any) -> int:
        """Set or delete keys, if the first was written last by a revision; 0: it was not."""
        ...

    def watch(self, prefix: str, revision: int) -> AsyncIterator[tuple[int, str, str | None]]:
        """Events: revision, key, value."""
        ...

    def lock(self, name: str, wait_s: float) -> AbstractAsyncContextManager[tuple[int, Any]]:
        """Its token, and what fences writes."""
        ...


class Client:
    """One client, who does one thing after another until `stop` is set, and watches something.

    Args:
        lost_part: Of calls whose answer is not waited for.
        pause_s: Between two calls, at most.
    """

    def __init__(
        self,
        port: Port,
        note: Note,
        rng: random.Random,
        name: str,
        *,
        stop: asyncio.Event,
        pause_s: float = 0.1,
        locks: bool = True,
    ) -> None:
        self._port, self._note, self._rng, self.name = port, note, rng, name
        self._stop, self._pause_s, self._locks = stop, pause_s, locks
        self.stopped, self.ended = asyncio.Event(), False
        self._count = 0
        self._known = dict.fromkeys(KEYS, 0)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            while not self._stop.is_set():
                await self._act()
                await asyncio.sleep(self._rng.uniform(0, self._pause_s))
            self.stopped.set()

    async def _act(self) -> None:
        rng, key = self._rng, self._rng.choice(KEYS)
        self._count += 1
        value = f"{self.name}.{self._count}"
        match rng.choices(["get", "put", "cas", "delete", "pair", "lock"], [6, 3, 3, 1, 1, 2])[0]:
            case "get":
                key = rng.choice(KEYS + PAIR)
                answer = await self._call(["get", key], lambda: self._port.get(key))
                if answer is not None and key in self._known:
                    self._known[key] = answer[1]
            case "put":
                await self._write({key: value})
            case "cas":
                await self._write({key: value}, self._known[key])
            case "delete":
                await self._write({key: None}, self._known[key] or 1 << 40)
            case "pair":
                await self._write(dict.fromkeys(PAIR, value))
            case "lock" if self._locks:
                with contextlib.suppress(WetwareError, TimeoutError):
                    await self._hold(rng.choice(LOCKS))

    async def _write(
        self, writes: dict[str, str | None], expected: int | None = None, fence: Any = None
    ) -> Any:
        asked = ["write", writes, expected]
        return await self._call(asked, lambda: self._port.txn(writes, expected, fence))

    async def _hold(self, name: str) -> None:
        async with self._port.lock(name, self._rng.choice([0, 0.5, 3])) as (token, fence):
            for number in range(WRITES):
                await self._write({name: f"{token}.{self.name}.{number}"}, fence=fence)
                await asyncio.sleep(self._rng.uniform(0, self._pause_s))

    async def _call(self, asked: list[Any], call: Callable[[], Any]) -> Any:
        """Make a call, or give it up; returns the answer, None where there is none."""
        self._count += 1
        op = f"{self.name}.{self._count}"
        lose = self._rng.random() < LOST_PART
        self._note({"op": op, "called": monotonic(), "asked": asked})
        try:
            async with asyncio.timeout(self._rng.uniform(0, 0.004) if lose else CALL_S):
                answer = await call()
        except (Unwritten, Denied, HomeDown):  # each says that it has not happened
            self._note({"op": op, "never": True})
            return None
        except (TimeoutError, Unknown, OverlayError, Closed):
            return None
        if lose:
            return None
        self._note({"op": op, "returned": monotonic(), "answer": answer})
        return answer

    async def _watch(self) -> None:
        """Watch something to the end, and now and then begin again where it was."""
        rng, watch = self._rng, self.name
        prefix = rng.choice(["", "", "k", "p", "g", *KEYS, *LOCKS])
        revision = 1
        self._note({"watch": watch, "prefix": prefix})
        while True:
            self._note({"watch": watch, "asked": revision})
            try:
                async with contextlib.aclosing(self._port.watch(prefix, revision)) as events:  # type: ignore[type-var]
                    last = 0
                    async for event in events:
                        # Not after the end: who begins a long log again and again ends never.
                        again = rng.random() < 0.03 and not self._stop.is_set()
                        if again and last and event[0] != last:
                            if rng.random() < 0.3:
                                revision = 1  # all of it once more
                            break  # between two revisions
                        self._note({"watch": watch, "told": event, "at": monotonic()})
                        last = event[0]
                        revision = last + 1
                        if event[2] == END:
                            self.ended = True
                            return
            except Compacted as refused:
                if refused.revision:  # else the store went away before it could be asked
                    revision = refused.revision
                    self._note({"watch": watch, "refused": revision})
            except (OverlayError, Closed, Unwritten):
                await asyncio.sleep(0.1)


def ends() -> dict[str, str | None]:
    """What is written last, in one transaction: each watcher ends with it."""
    return dict.fromkeys((*KEYS, *PAIR, *LOCKS), END)


# --- what came of it ------------------------------------------------------------------------------


@dataclass
class History:
    """What was noted.

    Attributes:
        operations: But those that are known not to have happened.
        called: How many there were, those included.
        compacted: As in `watching.check`.
    """

    operations: list[Operation] = field(default_factory=list)
    watchers: dict[str, Watcher] = field(default_factory=dict)
    called: int = 0
    compacted: int | None = 0

    @classmethod
    def of(cls, records: Iterable[Record]) -> History:
        history = cls()
        pending: dict[str, Operation] = {}
        for record in records:
            match record:
                case {"op": op, "called": called, "asked": asked}:
                    history.called += 1
                    pending[op] = Operation(called, inf, asked)
                case {"op": op, "never": True}:
                    del pending[op]
                case {"op": op, "returned": returned, "answer": answer}:
                    done = replace(pending.pop(op), returned=returned, answer=answer)
                    history.operations.append(done)
                case {"watch": name, "prefix": prefix}:
                    history.watchers[name] = Watcher(prefix)
                case {"watch": name, "asked": revision}:
                    history.watchers[name].steps.append(Asked(revision))
                case {"watch": name, "told": [revision, key, value], "at": at}:
                    history.watchers[name].steps.append(Told(revision, key, value, at))
                case {"watch": name, "refused": revision}:
                    history.watchers[name].steps.append(Refused(revision))
                case {"compacted": revision}:
                    history.compacted = max(history.compacted or 0, revision)
                case _:
                    raise AssertionError(record)
        history.operations += pending.values()
        return history

    @property
    def lost_part(self) -> float:
        """Operations without an answer, of those that may have happened."""
        lost = sum(not operation.known for operation in self.operations)
        return lost / max(1, len(self.operations))

    @property
    def contended_part(self) -> float:
        """Answered operations beside which another one, also answered, was under way for the same
        key, one of both a write; of all that were answered."""
        by_key: dict[str, list[int]] = defaultdict(list)
        known = sorted((o for o in self.operations if o.known), key=lambda o: o.called)
        contended = set[int]()
        for number, operation in enumerate(known):
            for key in _keys(operation):
                going_on = [n for n in by_key[key] if known[n].returned > operation.called]
                by_key[key] = [*going_on, number]
                for other in going_on:
                    if "write" in (operation.asked[0], known[other].asked[0]):
                        contended |= {number, other}
        return len(contended) / max(1, len(known))

    def summary(self) -> str:
        return (
            f"{self.called} operations, {100 * self.lost_part:.1f} % lost, "
            f"{100 * self.contended_part:.1f} % contended, "
            f"{sum(len(w.steps) for w in self.watchers.values())} steps of watches"
        )


def _keys(operation: Operation) -> list[str]:
    what = operation.asked[1]
    return [what] if operation.asked[0] == "get" else list(what)


def check(history: History, *, since: int = 0) -> Happened:
    """Raise Wrong where the history cannot be; returns what happened.

    Args:
        since: From this revision on nothing else was written, not even a lock's own keys; 0: much.
    """
    known = [operation for operation in history.operations if operation.known]
    happened = check_watches(
        history.watchers.values(),
        [
            Told(operation.answer, key, value)
            for operation in known
            if operation.asked[0] == "write" and operation.answer
            for key, value in operation.asked[1].items()
        ],
        [Read(o.called, o.answer[2]) for o in known if o.asked[0] == "get"],
        history.compacted,
    )
    revisions = {revision for revision, _ in happened}
    missing = set(range(since, max(revisions, default=0) + 1)) - revisions
    if since and missing:
        raise Wrong(f"revisions that nobody was told of: {sorted(missing)}")
    _check_values(history, happened)
    _check_real_time(known)
    settled = _settled(history, happened)
    wrong = first_wrong(MODEL, settled, _keys)
    if wrong is not None:
        raise Wrong(f"not linearizable: {_shown(wrong)}")
    _check_tokens(happened)
    return happened


def _shown(operations: list[Operation]) -> str:
    operations = sorted(operations, key=lambda operation: operation.called)
    return "\n".join(map(str, operations[:40]))


def _check_values(history: History, happened: Happened) -> None:
    """Each value was asked for, and written once."""
    asked = {
        (key, value)
        for operation in history.operations
        if operation.asked[0] == "write"
        for key, value in operation.asked[1].items()
    }
    times: dict[tuple[str, str], int] = {}
    for (revision, key), value in sorted(happened.items()):
        if value is None or value == END:
            continue
        if (key, value) not in asked:
            raise Wrong(f"nobody wrote {value} to {key}, at revision {revision}")
        if (key, value) in times:
            raise Wrong(f"{value} was written to {key} at {times[key, value]} and {revision}")
        times[key, value] = revision


def _check_real_time(known: list[Operation]) -> None:
    """What is asked after an answer is answered from no earlier revision, of any key."""
    returns = sorted((o.returned, _revision(o)) for o in known if _revision(o))
    highest = at = 0
    for operation in sorted(known, key=lambda o: o.called):
        while at < len(returns) and returns[at][0] < operation.called:
            highest = max(highest, returns[at][1])
            at += 1
        revision = _revision(operation)
        is_write = operation.asked[0] == "write"
        if revision and revision < highest + is_write:
            raise Wrong(f"after an answer of revision {highest}: {operation}")


def _revision(operation: Operation) -> int:
    answer = operation.answer
    return int(answer[2] if operation.asked[0] == "get" else answer)


def _settled(history: History, happened: Happened) -> list[Operation]:
    """Without what never happened; of those whose answer was lost, what they did."""
    done = {(key, value): revision for (revision, key), value in happened.items()}
    deleted: dict[tuple[str, int], int] = {}  # (key, the revision before) → the delete
    modified: dict[str, int] = {}
    for (revision, key), value in sorted(happened.items()):
        if value is None:
            deleted[key, modified.get(key, 0)] = revision
        modified[key] = revision
    settled = []
    for operation in history.operations:
        if operation.known:
            settled.append(operation)
        elif operation.asked[0] == "write":
            _, writes, expected = operation.asked
            ((key, value), *_) = writes.items()
            at = deleted.get((key, expected)) if value is None else done.get((key, value))
            if at:
                settled.append(replace(operation, answer=at))
    return settled


def _step(state: Any, operation: Operation) -> Any:
    """Some keys: ((key, value, the revision that wrote it), …) of those that there are, and the
    last revision that changed any of them."""
    now, last = state
    if operation.asked[0] == "get":
        value, modified, _ = operation.answer
        found = next((each[1:] for each in now if each[0] == operation.asked[1]), (None, 0))
        return state if found == (value, modified) else None
    _, writes, expected = operation.asked
    revision = operation.answer
    if expected is not None:
        first = next(iter(writes))
        holds = next((each[2] for each in now if each[0] == first), 0) == expected
        if holds != bool(revision):
            return None
        if not holds:
            return state
    if revision <= last:
        return None
    kept = [each for each in now if each[0] not in writes]
    kept += [(key, value, revision) for key, value in writes.items() if value is not None]
    return (tuple(sorted(kept)), revision)


MODEL = Model(((), 0), _step)


def _check_tokens(happened: Happened) -> None:
    """What is written under a lock comes in the order of tokens; one token is one holder's."""
    last: dict[str, tuple[int, str, int]] = {}
    for (revision, key), value in sorted(happened.items()):
        if key not in LOCKS or value in (None, END):
            continue
        assert value is not None
        token, holder, number = value.split(".")
        now = (int(token), holder, int(number))
        before = last.get(key, (0, "", 0))
        if now[0] < before[0] or (now[0] == before[0] and now[1:] <= before[1:]):
            raise Wrong(f"{key} at revision {revision}: {now} after {before}")
        if now[0] == before[0] and now[1] != before[1]:
            raise Wrong(f"{key} at revision {revision}: {now} and {before} have one token")
        last[key] = now
