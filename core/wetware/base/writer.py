"""A thread that writes, so that the loop never waits for the disk: with group commit.

What waits together is committed together. Whoever has to know waits for the answer; what has taken
effect already is handed in without waiting, and is given to `commit` again until it is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from wetware.base.log import get_logger

if TYPE_CHECKING:
    from wetware.errors import WetwareError

log = get_logger("writer")
T = TypeVar("T")

WAITING_MAX: Final = 16_384
"""Writes of one writer that are waited for; beyond it what has to be written first is refused."""
BATCH_MAX: Final = 1024
"""Writes of one commit, beside what is tried again."""
RETRY_S: Final = 1.0
"""Between two tries of what must not be lost."""
CLOSE_S: Final = 10.0
"""For what still waits when the node stops."""


@dataclass(frozen=True, slots=True, eq=False)
class Write(Generic[T]):
    """One thing on its way; `future` is of who waits for it, None where nobody does."""

    what: T
    future: asyncio.Future[Any] | None = None


class Writer(Generic[T]):
    """The thread, and the queue before it.

    Args:
        name: Of the thread.
        commit: Called on the thread with what came, in its order, and whether it is the last call.
            Answers each that somebody waits for (`answer`); what it returns it gets once more,
            before what comes next.
        due_s: Called on the thread with whether something was returned: in how many seconds
            `commit` is called though nothing came; None: not before something does.
        unavailable: What `write` raises where it does not take anything.
    """

    def __init__(
        self,
        name: str,
        commit: Callable[[list[Write[T]], bool], list[Write[T]]],
        due_s: Callable[[bool], float | None],
        *,
        unavailable: type[WetwareError],
    ) -> None:
        self._commit, self._due_s, self._unavailable = commit, due_s, unavailable
        self._queue: queue.SimpleQueue[Write[T] | None] = queue.SimpleQueue()
        self._calls: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self._calling = threading.Lock()  # threads that find it empty at once would both not call
        self._waiting = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._taking = threading.Lock()  # what is put behind the end is never read
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; `call_soon` calls back on the loop that runs here, or that writes."""
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def queued(self) -> int:
        """Writes that `commit` has not been given yet."""
        return self._queue.qsize()

    async def write(self, what: T) -> Any:
        """Hand in and wait; returns or raises what `commit` answers.

        One who stops waiting does not take it back. Raises `unavailable` where it is not taken.
        """
        if self._waiting >= WAITING_MAX:
            raise self._unavailable(
                f"{WAITING_MAX} writes wait for the disk (WAITING_MAX)",
                hint="the node's disk is too slow or failing; `ww doctor`",
            )
        self._loop = asyncio.get_running_loop()
        future = self._loop.create_future()
        if not self._put(Write(what, future)):
            raise self._unavailable("the node is stopping")
        self._waiting += 1
        return await future

    def write_soon(self, what: T) -> None:
        """Hand in what nobody waits for. Never waits, never raises: too late is logged as lost."""
        if not self._put(Write(what)):
            log.error("writer.too_late", writer=self._thread.name)

    def _put(self, write: Write[T]) -> bool:
        """Whether it will be committed."""
        with self._taking:
            if not self._closed:
                self._queue.put(write)
            return not self._closed

    def close(self) -> bool:
        """Commit what waits; returns whether that was done within CLOSE_S. Idempotent.

        May be called in another thread than `write`.
        """
        with self._taking:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join(CLOSE_S)
        return not self._thread.is_alive()

    # --- on the thread ----------------------------------------------------------------------------

    def answer(
        self, write: Write[T], result: object = None, error: Exception | None = None
    ) -> None:
        """Settle what somebody waits for; one who has stopped waiting gets nothing."""
        self.call_soon(self.settle, write, result, error)

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        """Call back on the loop, in their order, if there was one and it is not closed.

        To wake the loop costs more than most of what it is woken for, so one call does for all that
        come before it runs.
        """
        with self._calling:
            called = bool(self._calls)  # `_call` goes on until there is none
            self._calls.append((callback, args))
        if called:
            return
        if self._loop is None or self._loop.is_closed():
            self._calls.clear()
            return
        with contextlib.suppress(RuntimeError):  # it was closed right now
            self._loop.call_soon_threadsafe(self._call)

    def _call(self) -> None:
        while True:
            with self._calling:  # else one could be added between the last look and the end
                if not self._calls:
                    return
                callback, args = self._calls.popleft()
            callback(*args)

    def settle(
        self, write: Write[T], result: object = None, error: Exception | None = None
    ) -> None:
        """As `answer`, on the loop."""
        if (future := write.future) is None:
            return
        self._waiting -= 1
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _run(self) -> None:
        owed: list[Write[T]] = []
        last = False
        while not last:
            batch: list[Write[T]] = []
            with contextlib.suppress(queue.Empty):
                item = self._queue.get(timeout=self._due_s(bool(owed)))
                while item is not None:
                    batch.append(item)
                    if len(batch) >= BATCH_MAX or self._queue.empty():
                        break
                    item = self._queue.get()
                last = item is None
            try:
                owed = self._commit([*owed, *batch], last)
            except Exception as exc:  # a defect: what waits is refused, and the thread goes on
                log.exception("writer.failed", writer=self._thread.name)
                for write in (*owed, *batch):
                    self.answer(write, error=self._unavailable(f"the writer failed: {exc}"))
                owed = [w for w in (*owed, *batch) if w.future is None][-WAITING_MAX:]


def groups(
    writes: Iterable[Write[T]], size: Callable[[T], int], bytes_max: int
) -> Iterator[list[Write[T]]]:
    """In their order, each with as many bytes as a commit may have, or of one write."""
    group: list[Write[T]] = []
    left = bytes_max
    for write in writes:
        nbytes = size(write.what)
        if group and nbytes > left:
            yield group
            group, left = [], bytes_max
        group.append(write)
        left -= nbytes
    if group:
        yield group
