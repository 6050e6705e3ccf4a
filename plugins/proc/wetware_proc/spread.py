"""Calls of Python functions, one or many, for clients: at one node or at several, also if some die.

Every result is told once. What ran before a node died may run again, at another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from wetware.base.log import get_logger
from wetware.errors import InvalidArgument, LimitExceeded, OverlayError, WetwareError
from wetware_proc import placement
from wetware_proc.functions import (
    ATTEMPT,
    VALUE_BYTES_MAX,
    CallEnded,
    Function,
    function,
    packed_arguments,
    result,
)
from wetware_proc.sources import file_bytes, read, size_of

if TYPE_CHECKING:
    from wetware import rpc

PACKAGE_BYTES_MAX: Final = 16 << 20
AHEAD: Final = 4
"""Results, for each call at a time, that wait for an earlier one."""

log = get_logger("proc")


class Process(Protocol):
    """What is used of a client's Process, whose module knows this one."""

    stdin: rpc.ByteStream
    stdout: rpc.ByteStream
    stderr: rpc.ByteStream

    async def wait(self) -> Any: ...


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
    """What the function returned that runs. Raises FunctionFailed, CallEnded, LimitExceeded."""
    feeding = asyncio.ensure_future(_feed(process, arguments))
    try:
        data, _ = await asyncio.gather(_result(process.stdout), _printed(process.stderr))
        if data:  # its end can be no other
            return result(data)
        end = await process.wait()
    finally:
        feeding.cancel()
    if end.kind in ("killed", "lost"):
        raise Ended(f"the function's process was ended: {end.kind}: {end.why}")
    if end.kind == "exited":
        raise CallEnded(f"the function's program exited with {end.code}, and returned nothing")
    raise CallEnded(f"the function's process has ended: {end.kind}: {end.why}")


class Ended(CallEnded):
    """By somebody else than itself."""


async def _feed(process: Process, data: bytes) -> None:
    with contextlib.suppress(WetwareError):  # it need not read all
        await process.stdin.send(data)
        await process.stdin.send_eof()


async def _result(stream: rpc.ByteStream) -> bytes:
    data = bytearray()
    async for piece in stream:
        data += piece
        if len(data) > VALUE_BYTES_MAX:
            raise LimitExceeded(
                f"the function returned more than {VALUE_BYTES_MAX} bytes (VALUE_BYTES_MAX)",
                hint="let it publish or store them",
            )
    return bytes(data)


async def _printed(stream: rpc.ByteStream) -> None:
    async for piece in stream:
        sys.stderr.write(piece.decode(errors="replace"))


class _Full(Exception):
    """The node has no room now; the cause says what of."""


class _Place:
    """A node that takes part.

    Attributes:
        image: The function there.
        processors: That it has.
        running: Calls of ours.
        full: It had no room, and no call of ours has ended since.
        lost: Set when it is used no more.
    """

    image: Any

    def __init__(self, processors: int) -> None:
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
        self._places: set[_Place] = set()
        self._keepers: set[asyncio.Task[None]] = set()
        self._looks, self._changed = asyncio.Lock(), asyncio.Event()

    async def results(self, items: Iterable[Any], *, ordered: bool) -> AsyncGenerator[Any, None]:
        """See Executor.map."""
        source = enumerate(items)
        running: set[asyncio.Task[tuple[int, Any]]] = set()
        done: dict[int, Any] = {}
        begun = given = 0
        try:
            await self._look()
            while True:
                most = self._concurrency or sum(place.processors for place in self._places) or 1
                while len(running) < most and begun - given < AHEAD * most:
                    if (item := next(source, None)) is None:
                        break
                    running.add(asyncio.ensure_future(self._one(*item)))
                    begun += 1
                if not running:
                    return
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                done.update(task.result() for task in ended)
                while given in done if ordered else done:
                    yield done.pop(given if ordered else next(iter(done)))
                    given += 1
        finally:
            for task in (tasks := running | self._keepers):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- one call ---

    async def _one(self, index: int, item: Any) -> tuple[int, Any]:
        data, refs = packed_arguments([item])
        attempt = 1
        while True:
            place = await self._free()
            place.running += 1
            full = False
            try:
                return index, await self._at(place.image, data, refs, attempt)
            except _Full as exc:
                place.full = full = True
                if sum(each.running for each in self._places) <= 1 and exc.__cause__ is not None:
                    raise exc.__cause__ from None  # no end of a call of ours makes room
            except (OverlayError, Ended) as exc:
                if isinstance(exc, OverlayError):
                    self._lose(place)
                log.debug("map.again", attempt=attempt, why=exc.message)
                if attempt > self._retries:
                    raise
                attempt += 1
            finally:
                place.running -= 1
                if not full:
                    self._wake()

    async def _at(self, image: Any, data: bytes, refs: dict[str, Any], attempt: int) -> Any:
        options = dict(self._options)
        options["grants"] = {**options.get("grants", {}), **refs}
        options["env"] = {**options.get("env", {}), ATTEMPT: str(attempt)}
        async with contextlib.AsyncExitStack() as stack:
            try:
                process = await stack.enter_async_context(image.fed(data, **options))
            except LimitExceeded as exc:
                raise _Full from exc
            return await returned(process, data)

    # --- nodes ---

    async def _free(self) -> _Place:
        """The place that has the fewest calls of ours for each processor."""
        while True:
            if not self._places:
                await self._look()
            if ready := [place for place in self._places if not place.full]:
                return min(ready, key=lambda place: place.running / place.processors)
            await self._changed.wait()

    def _wake(self) -> None:
        """Something has ended, or begun: who waits looks again."""
        for place in self._places:
            place.full = False
        self._changed.set()
        self._changed = asyncio.Event()

    def _lose(self, place: _Place) -> None:
        self._places.discard(place)
        place.lost.set()

    async def _look(self) -> None:
        """Log in at the nodes; returns when there is a place. Raises what the last one did."""
        async with self._looks:
            if self._places:
                return
            nodes: list[tuple[str, int]] = [("", 1)]
            if self._on:
                rooms = await placement.nodes(self._executor.session, self._on)
                nodes = [(room.node, room.processors) for room in rooms]
            keepers = {asyncio.ensure_future(self._keep(*node)) for node in nodes}
            self._keepers |= keepers
            left = set(keepers)
            while not self._places:
                arrival = asyncio.ensure_future(self._changed.wait())
                ended, _ = await asyncio.wait({arrival, *left}, return_when=asyncio.FIRST_COMPLETED)
                arrival.cancel()
                left.difference_update(ended)
                if not (left or self._places):
                    for keeper in keepers:
                        keeper.result()

    async def _keep(self, node: str, processors: int) -> None:
        """Be logged in at a node, until it is lost."""
        place = _Place(processors)
        async with contextlib.AsyncExitStack() as stack:
            executor = self._executor
            if node:
                session = executor.session
                login = session.node(placement.selector(session, self._on, node))
                executor = (await stack.enter_async_context(login)).proc
            place.image = await executor.load(self._job.program, "python")
            stack.callback(place.image.close)
            self._places.add(place)
            self._wake()
            await place.lost.wait()
