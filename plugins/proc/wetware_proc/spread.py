"""Calls of Python functions, one or many, for clients: at one node or at several, also if some die.

Every result is told once. What ran before a node died may run again, at another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
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
PLACES_MAX: Final = 64
"""Members that take part."""
RESULT_CAPS_MAX: Final = 64
"""In what one function returned."""
AHEAD: Final = 4
"""Results, for each call at a time, that wait for an earlier one."""

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
    refs: dict[int, rpc.Ref] = {}

    async def ref(number: int) -> rpc.Ref:
        if number not in refs:
            if len(refs) >= RESULT_CAPS_MAX:
                raise CallEnded(f"it returned more than {RESULT_CAPS_MAX} capabilities")
            refs[number] = await process.export(f"result {number}", 0.0)
            assert process.ref.interface is not None  # noqa: S101 - it is a Process
            _held[refs[number]] = process.ref.cast(process.ref.interface)
        return refs[number]

    async def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [await filled(each) for each in value]
        if isinstance(value, dict):
            return {key: await filled(each) for key, each in value.items()}
        return await ref(value.value) if isinstance(value, cbor.Tag) else value

    return await filled(value)


_held: Final[WeakKeyDictionary[rpc.Ref, rpc.Ref]] = WeakKeyDictionary()
"""What functions returned → the process that offers it: as long as that is held it works."""


class Ended(CallEnded):
    """By somebody else than itself."""


async def _printed(stream: rpc.ByteStream) -> None:
    async for piece in stream:
        sys.stderr.write(piece.decode(errors="replace"))


class _Full(Exception):
    """The node has no room now; the cause says what of."""


class _Place:
    """A member that takes part.

    Args:
        node: Its peer ID; "" is the session's node.
        image: The function there.
        grants: What it is given there.
        processors: That the member has.

    Attributes:
        running: Calls of ours.
        full: It had no room, and no call of ours has ended since.
        lost: Set when it is used no more.
    """

    def __init__(self, node: str, image: Any, grants: Mapping[str, Any], processors: int) -> None:
        self.node, self.image, self.grants = node, image, grants
        self.processors, self.running, self.full = max(1, processors), 0, False
        self.lost = asyncio.Event()


class Spread:
    """The calls of one `map`.

    Args:
        executor: The session's.
        job: What is called.
        on: Which members take part; "": the session's node.
        options: See client.Options.
        concurrency: Calls at a time; 0: as many as there are processors.
        retries: Of a call whose node or process was lost.
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
        self._places: dict[str, _Place] = {}
        self._kept: set[str] = set()  # nodes of places, and of those that are on their way
        self._failed: Exception | None = None
        self._tasks, self._looks = Tasks(), asyncio.Lock()
        self._changed, self._joined = asyncio.Event(), asyncio.Event()

    async def results(self, items: Iterable[Any], *, ordered: bool) -> AsyncGenerator[Any, None]:
        """See Executor.map."""
        source = enumerate(items)
        running: set[asyncio.Task[tuple[int, Any]]] = set()
        done: dict[int, Any] = {}
        begun = given = 0
        try:
            await self._look()
            if self._on:
                self._tasks.start(self._watch())
            joined = self._tasks.start(self._joined.wait())
            while True:
                places = self._places.values()
                most = self._concurrency or sum(place.processors for place in places) or 1
                while len(running) < most and begun - given < AHEAD * most:
                    if (item := next(source, None)) is None:
                        break
                    running.add(asyncio.ensure_future(self._one(*item)))
                    begun += 1
                if not running:
                    return
                await asyncio.wait({joined, *running}, return_when=FIRST_COMPLETED)
                if joined.done():
                    self._joined.clear()
                    joined = self._tasks.start(self._joined.wait())
                ended = {task for task in running if task.done()}
                running -= ended
                done.update(task.result() for task in ended)
                while given in done if ordered else done:
                    yield done.pop(given if ordered else next(iter(done)))
                    given += 1
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._tasks.end()

    # --- one call ---

    async def _one(self, index: int, item: Any) -> tuple[int, Any]:
        data, refs = packed_arguments([item])
        attempt = 1
        while True:
            place = await self._free()
            place.running += 1
            full = False
            try:
                return index, await self._at(place, data, refs, attempt)
            except _Full as exc:
                place.full = full = True
                ours = sum(each.running for each in self._places.values())
                if ours <= 1 and exc.__cause__ is not None:
                    raise exc.__cause__ from None  # no end of a call of ours makes room
            except (OverlayError, Ended) as exc:
                if isinstance(exc, OverlayError):
                    self._lose(place.node)
                log.debug("map.again", attempt=attempt, why=exc.message)
                if attempt > self._retries:
                    raise
                attempt += 1
            finally:
                place.running -= 1
                if not full:
                    self._wake()

    async def _at(self, place: _Place, data: bytes, refs: dict[str, Any], attempt: int) -> Any:
        options = dict(self._options)
        options["grants"] = {**place.grants, **refs}
        options["env"] = {**options.get("env", {}), ATTEMPT: str(attempt)}
        async with contextlib.AsyncExitStack() as stack:
            try:
                process = await stack.enter_async_context(place.image.fed(data, **options))
            except LimitExceeded as exc:
                raise _Full from exc
            return await returned(process, data)

    # --- nodes ---

    async def _free(self) -> _Place:
        """The place that has the fewest calls of ours for each processor."""
        while True:
            if not self._places:
                await self._look()
            if ready := [place for place in self._places.values() if not place.full]:
                return min(ready, key=lambda place: place.running / place.processors)
            await self._changed.wait()

    def _wake(self) -> None:
        """Something has ended, or begun: who waits looks again."""
        for place in self._places.values():
            place.full = False
        self._changed.set()
        self._changed = asyncio.Event()

    def _lose(self, node: str) -> None:
        if (place := self._places.pop(node, None)) is not None:
            place.lost.set()

    async def _look(self) -> None:
        """Log in at the members; returns when one takes part. Raises what the last one did."""
        async with self._looks:
            if not self._places:
                on = self._on
                rooms = await placement.nodes(self._executor.session, on) if on else ()
                for node in [room.node for room in rooms] or [""]:
                    self._join(node)
            while not self._places:
                if self._failed is not None and not self._kept:
                    raise self._failed
                await self._changed.wait()

    async def _watch(self) -> None:
        """Have members take part that come, and no longer those that are gone."""
        session = self._executor.session
        try:
            meant = placement.selector(session, self._on, "service=proc")
            async with session.cluster.watch(meant) as members:
                async for member in members:
                    if member.state == "alive":
                        self._join(str(member.peer_id))
                    elif member.state != "suspect":
                        self._lose(str(member.peer_id))
        except WetwareError as exc:  # those that take part go on
            log.debug("map.unwatched", why=exc.message)

    def _join(self, node: str) -> None:
        if node not in self._kept and len(self._kept) < PLACES_MAX:
            self._kept.add(node)
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
                place = self._places[node] = _Place(node, image, grants, processors)
                self._joined.set()
                self._wake()
                await place.lost.wait()
        except Exception as exc:  # of the last one `_look` raises it
            log.debug("map.lost", node=node, why=str(exc))
            self._failed = exc
        finally:
            self._places.pop(node, None)
            self._kept.discard(node)
            self._wake()
