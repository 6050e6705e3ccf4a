"""Calls of Python functions, one or many, for clients: at one node or at several, also if some die.

Every result is told once. What ran before a node died may run again, at another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from wetware.base import cbor
from wetware.base.log import get_logger
from wetware.base.tasks import Tasks
from wetware.errors import InvalidArgument, LimitExceeded, OverlayError, WetwareError
from wetware_proc import placement
from wetware_proc.functions import (
    ATTEMPT,
    MARK,
    VALUE_BYTES_MAX,
    CallEnded,
    Function,
    function,
    packed_arguments,
    result,
)
from wetware_proc.running import fed, taken
from wetware_proc.sources import file_bytes, read, size_of

if TYPE_CHECKING:
    from wetware import rpc
    from wetware_proc.running import Process

PACKAGE_BYTES_MAX: Final = 16 << 20
PLACES_MAX: Final = 64  # members that take part
RESULT_CAPS_MAX: Final = 64  # in what one function returned
AHEAD: Final = 4  # results, for each call at a time, that wait for an earlier one

log = get_logger("proc")


async def prepared(call: Callable[..., Any], packages: Sequence[Any]) -> Function:
    """A function that is ready to travel. Raises InvalidArgument."""
    wheels = tuple([await _wheel(each) for each in packages])
    if not wheels:
        return function(call)
    return await asyncio.get_running_loop().run_in_executor(None, function, call, wheels)


async def _wheel(package: Any) -> bytes:
    if isinstance(package, bytes):
        return package
    if not isinstance(package, str | os.PathLike):
        ref, parts = getattr(package, "ref", package), list[bytes]()
        size = await size_of(ref, "a package", PACKAGE_BYTES_MAX)
        await read(ref, "a package", size, parts.append)
        return b"".join(parts)
    return await file_bytes(package, "the package ")


async def returned(process: Process, arguments: bytes) -> Any:
    """What the function returned that runs; capabilities in it work as long as they are held.

    Raises FunctionFailed, CallEnded, LimitExceeded.
    """
    async with fed(process, arguments):
        limit = VALUE_BYTES_MAX, "VALUE_BYTES_MAX", "let the function publish or store them"
        data, _ = await asyncio.gather(taken(process.stdout, *limit), _printed(process.stderr))
        if data:  # its end can be no other
            value = result(data)
            return await _filled(process, value) if MARK in data else value
        end = await process.wait()
    if end.kind in ("killed", "lost"):
        raise Ended(f"the function's process was ended: {end.kind}: {end.why}")
    if end.kind == "exited":
        raise CallEnded(f"the function's program exited with {end.code}, and returned nothing")
    raise CallEnded(f"the function's process has ended: {end.kind}: {end.why}")


async def _filled(process: Process, value: Any) -> Any:
    """What a function returned, with its capabilities."""
    numbers = set[int]()
    cbor.untagged(value, numbers.add)
    if len(numbers) > RESULT_CAPS_MAX:
        raise CallEnded(f"it returned more than {RESULT_CAPS_MAX} capabilities")
    refs = {number: await process.export(f"result {number}", 0.0) for number in numbers}
    assert process.ref.interface is not None  # noqa: S101 - it is a Process
    for ref in refs.values():
        _held[ref] = process.ref.cast(process.ref.interface)
    return cbor.untagged(value, refs.__getitem__)


_held: Final[WeakKeyDictionary[rpc.Ref, rpc.Ref]] = WeakKeyDictionary()
"""What functions returned → the process that offers it: as long as that is held it works."""


class Ended(CallEnded):
    """By somebody else than itself."""


async def _printed(stream: rpc.ByteStream) -> None:
    async for piece in stream:
        sys.stderr.write(piece.decode(errors="replace"))


class _Full(Exception):
    """The node has no room now; the cause says what of."""


@dataclass(eq=False, kw_only=True)
class _Place:
    """A member that takes part."""

    image: Any  # the function there
    grants: Mapping[str, Any]  # what it is given there
    processors: int
    running: int = 0  # calls of ours
    full: bool = False  # it had no room, and no call of ours has ended since
    lost: asyncio.Event = field(default_factory=asyncio.Event)  # set when it is used no more


_Call = tuple[int, Any, int]  # its place in the order, its item, and which try it is


class Spread:
    """The calls of one `Executor.map`.

    `results` decides what is next, and the tasks tell it that something has `_changed`.
    """

    def __init__(
        self,
        executor: Any,
        job: Function,
        on: str,
        options: Mapping[str, Any],
        *,
        concurrency: int,
        retries: int,
    ) -> None:
        if concurrency < 0 or retries < 0:
            raise InvalidArgument("concurrency and retries are 0 or more")
        self._executor, self._job, self._on, self._options = executor, job, on, options
        self._concurrency, self._retries = concurrency, retries
        self._places: dict[str, _Place | None] = {}  # by node; None: it is being logged in at
        self._running: dict[asyncio.Task[Any], tuple[_Place, _Call]] = {}
        self._failed: Exception | None = None  # what the last login did, if none has worked since
        self._tasks, self._changed = Tasks(), asyncio.Event()

    async def results(self, items: Iterable[Any], *, ordered: bool) -> AsyncGenerator[Any, None]:
        """See Executor.map."""
        source, waiting = enumerate(items), deque[_Call]()
        done: dict[int, Any] = {}
        begun = given = 0
        try:
            await self._look()
            if self._on:
                self._tasks.start(self._watch())
            while True:
                most = self._concurrency or sum(each.processors for each in self._ready()) or 1
                while len(self._running) + len(waiting) < most and begun - given < AHEAD * most:
                    if (item := next(source, None)) is None:
                        break
                    waiting.append((*item, 1))
                    begun += 1
                if not (waiting or self._running):
                    return
                if not self._places:
                    await self._look()
                while waiting and (place := self._free()) is not None:
                    self._begin(place, waiting.popleft())
                await self._changed.wait()
                self._changed.clear()
                self._take(done, waiting)
                while given in done if ordered else done:
                    yield done.pop(given if ordered else next(iter(done)))
                    given += 1
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            await self._tasks.end()

    # --- calls ---

    def _begin(self, place: _Place, call: _Call) -> None:
        place.running += 1
        task = asyncio.ensure_future(self._at(place, call))
        self._running[task] = place, call
        task.add_done_callback(lambda _: self._changed.set())

    async def _at(self, place: _Place, call: _Call) -> Any:
        _, item, attempt = call
        data, refs = packed_arguments([item])
        options = dict(self._options)
        options["grants"] = {**place.grants, **refs}
        options["env"] = {**options.get("env", {}), ATTEMPT: str(attempt)}
        async with contextlib.AsyncExitStack() as stack:
            try:
                process = await stack.enter_async_context(place.image.fed(data, **options))
            except LimitExceeded as exc:
                raise _Full from exc
            return await returned(process, data)

    def _take(self, done: dict[int, Any], again: deque[_Call]) -> None:
        """What calls that have ended returned, and those that are to be made again."""
        full, room = None, False
        for task in [task for task in self._running if task.done()]:
            place, (index, item, attempt) = self._running.pop(task)
            place.running -= 1
            try:
                done[index] = task.result()
            except _Full as exc:
                place.full, full = True, exc.__cause__
                again.appendleft((index, item, attempt))
                continue
            except (OverlayError, Ended) as exc:
                log.debug("map.again", attempt=attempt, why=exc.message)
                if isinstance(exc, OverlayError):
                    place.lost.set()
                if attempt > self._retries:
                    raise
                again.appendleft((index, item, attempt + 1))
            room = True
        if room:
            for place in self._ready():
                place.full = False
        elif full is not None and not self._running:
            raise full from None  # no end of a call of ours makes room

    # --- nodes ---

    def _ready(self) -> list[_Place]:
        return [each for each in self._places.values() if each and not each.lost.is_set()]

    def _free(self) -> _Place | None:
        """The place that has the fewest calls of ours for each processor."""
        free = (place for place in self._ready() if not place.full)
        return min(free, key=lambda place: place.running / place.processors, default=None)

    async def _look(self) -> None:
        """Log in at the members that have room. Raises what the last one did, if all have."""
        if self._failed is not None:
            raise self._failed
        rooms = await placement.nodes(self._executor.session, self._on) if self._on else ()
        for node in [room.node for room in rooms] or [""]:
            self._join(node)

    async def _watch(self) -> None:
        """Have members take part that come, and no longer those that are gone."""
        session = self._executor.session
        try:
            meant = placement.selector(session, self._on, "service=proc")
            async with session.cluster.watch(meant) as members:
                async for member in members:
                    node = str(member.peer_id)
                    if member.state == "alive":
                        self._join(node)
                    elif member.state != "suspect" and (place := self._places.get(node)):
                        place.lost.set()
        except WetwareError as exc:  # those that take part go on
            log.debug("map.unwatched", why=exc.message)

    def _join(self, node: str) -> None:
        if node not in self._places and len(self._places) < PLACES_MAX:
            self._places[node] = None
            self._tasks.start(self._keep(node))

    async def _keep(self, node: str) -> None:
        """Be logged in at a node, until it is lost."""
        executor, processors = self._executor, 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                if node:
                    where = placement.selector(executor.session, self._on, f"id={node}")
                    login = executor.session.node(where)
                    executor = (await stack.enter_async_context(login)).proc
                    processors = sum(room.processors for room in await executor.rooms(where))
                image = await executor.load(self._job.program, "python")
                stack.callback(image.close)
                opened = placement.granted(executor, self._options.get("grants", {}))
                grants = await stack.enter_async_context(opened)
                place = _Place(image=image, grants=grants, processors=max(1, processors))
                self._places[node], self._failed = place, None
                self._changed.set()
                await place.lost.wait()
        except Exception as exc:
            log.debug("map.lost", node=node, why=str(exc))
            self._failed = exc
        finally:
            del self._places[node]
            self._changed.set()
