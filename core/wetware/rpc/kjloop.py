"""pycapnp's event loop inside asyncio's, and the garbage collector on the node's loop."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import gc
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import capnp

from wetware.base.log import get_logger
from wetware.rpc.transport import Partials
from wetware.rpc.wire import WireError

if TYPE_CHECKING:
    from wetware.rpc.servant import Servant

log = get_logger("rpc")

HOOKS_S: Final = 1.0
"""How long leaving the runtime waits for `released` hooks that are coroutines."""


class Runtime:
    """What one asyncio loop has of pycapnp: kept alive here, released on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread_id = threading.get_ident()
        self.users = 0
        # The only strong references to connections: pycapnp crashes when the garbage collector
        # finds a client before it was closed.
        self.connections: set[Any] = set()
        self.partials = Partials()
        self._unheld: dict[int, Servant] = {}
        self._hooks: set[asyncio.Task[Any]] = set()
        self._kj: contextlib.AbstractAsyncContextManager[None] | None = None
        self._handler: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] | None = None
        self.stopped: asyncio.Event | None = None  # there once stopping has begun

    async def start(self) -> None:
        """Enter pycapnp's loop, unless the application did."""
        if not hasattr(self.loop, "_kj_loop"):
            self._kj = capnp.kj_loop()
            await self._kj.__aenter__()
        self._handler = self.loop.get_exception_handler()
        self.loop.set_exception_handler(self._unhandled)

    async def stop(self) -> None:
        """Leave pycapnp's loop if we entered it; all connections have been closed by then."""
        assert self.stopped is not None  # noqa: S101  # `release` begins it
        try:
            await asyncio.sleep(0)  # what was held last is released in a turn of its own
            if self._hooks:
                _, late = await asyncio.wait(self._hooks, timeout=HOOKS_S)
                for task in late:
                    log.warning("servant.release_slow", hook=task.get_name())
                    task.cancel()
            await asyncio.sleep(0)  # pycapnp's rejected promises run in a turn of their own
            if self._kj is not None:
                await self._kj.__aexit__(None, None, None)
        finally:
            if self.loop.get_exception_handler() == self._unhandled:
                self.loop.set_exception_handler(self._handler)
            del _runtimes[self.loop]
            self.stopped.set()

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Pass on all but what was meant for a caller that is gone, which pycapnp reports here."""
        if not isinstance(context.get("exception"), WireError):
            (self._handler or asyncio.BaseEventLoop.default_exception_handler)(loop, context)  # type: ignore[arg-type]

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Call on the loop, from any thread and from finalizers; lost if the loop is closed."""
        with contextlib.suppress(RuntimeError):
            if threading.get_ident() == self.thread_id:
                self.loop.call_soon(callback, *args)
            else:
                self.loop.call_soon_threadsafe(callback, *args)

    def unheld(self, servant: Servant) -> None:
        """No peer holds `servant`: in a turn of its own, once, tell it, unless one does again."""
        if not self._unheld:
            self.soon(self._release)
        self._unheld[id(servant)] = servant

    def _release(self) -> None:
        servants, self._unheld = self._unheld, {}
        for servant in servants.values():
            if servant.__ww_exports__ == 0:  # nobody exported it again meanwhile
                self._tell(servant)

    def _tell(self, servant: Servant) -> None:
        """Run its `released` at once, or its coroutine soon; failures are logged."""
        try:
            result = servant.released()
        except Exception as exc:  # a servant's defect is nobody else's
            _failed(servant, exc)
            return
        if inspect.isawaitable(result):
            task = self.loop.create_task(_finish(servant, result), name=type(servant).__name__)
            self._hooks.add(task)
            task.add_done_callback(self._hooks.discard)


async def _finish(servant: Servant, result: Awaitable[object]) -> None:
    try:
        await result
    except Exception as exc:
        _failed(servant, exc)


def _failed(servant: Servant, exc: Exception) -> None:
    log.error("servant.release_failed", hook=type(servant).__name__, exc_info=exc)


_runtimes: dict[asyncio.AbstractEventLoop, Runtime] = {}


@contextlib.asynccontextmanager
async def runtime() -> AsyncIterator[None]:
    """Keep pycapnp running on this loop: entered once per loop, reference-counted.

    `connect`, `serve` and their kin do it by themselves; enter it around them to make connections
    cheap to open and close. An application that runs `capnp.kj_loop()` itself may go on to do so,
    and leaves it after its last connection is closed.
    """
    await acquire()
    try:
        yield
    finally:
        await release()


async def acquire() -> Runtime:
    """Enter the runtime of the running loop; `release` it as often."""
    loop = asyncio.get_running_loop()
    while (found := _runtimes.get(loop)) is not None and found.stopped is not None:
        await found.stopped.wait()  # it is on its way out: start afresh after it
    if found is None:
        found = _runtimes[loop] = Runtime(loop)
        try:
            await found.start()
        except BaseException:
            del _runtimes[loop]
            raise
    found.users += 1
    return found


async def release() -> None:
    """Undo one `acquire` of the running loop; the last one stops pycapnp."""
    loop = asyncio.get_running_loop()
    found = _runtimes[loop]
    found.users -= 1
    if found.users == 0:
        found.stopped = asyncio.Event()
        await finish(found.stop())


async def finish(cleanup: Coroutine[Any, Any, None]) -> None:
    """Run a bounded clean-up to its end, however often the caller is cancelled meanwhile.

    Half a clean-up would leave objects behind that crash the process when they are freed later. The
    cancellation is raised afterwards.
    """
    task = asyncio.get_running_loop().create_task(cleanup)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


@atexit.register
def _leak() -> None:
    """A program that exits without closing: never free what only its loop may free."""
    for found in _runtimes.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(found))


# --- garbage collection on the loop
# ------------------------------------------------------------------

GC_TICK_S: Final = 0.25
GC_YOUNG_OBJECTS: Final = 2_000
"""Container objects since the last collection that make a young one worth its time."""
GC_FULL_S: Final = 30.0
"""Between two full collections, whose time grows with all that was made since `loop_gc` began."""


@contextlib.asynccontextmanager
async def loop_gc() -> AsyncIterator[None]:
    """For the node only: the cyclic garbage collector runs on this loop and nowhere else.

    Automatic collection is off inside and restored on leaving. It would run in whatever thread
    happens to allocate, and finalize there what belongs to the loop.

    No collection looks at what is there already, which lives as long as the process: walking it
    stops the loop for 0.1 s. Whoever imports a lot later calls `gc.freeze()` after it; once, as
    what is frozen in a cycle is never freed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    task = asyncio.get_running_loop().create_task(_collect(), name="wetware-gc")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        gc.unfreeze()
        if was_enabled:
            gc.enable()


async def _collect() -> None:
    clock = asyncio.get_running_loop().time
    full_at = clock() + GC_FULL_S
    while True:
        await asyncio.sleep(GC_TICK_S)
        if clock() >= full_at:
            gc.collect()
            full_at = clock() + GC_FULL_S
        elif gc.get_count()[0] > GC_YOUNG_OBJECTS:
            gc.collect(1)
