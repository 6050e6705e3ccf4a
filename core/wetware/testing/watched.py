"""Foreign async code in a loop of its own, watched: what blocks it, what stays behind, what fails.

A test of code that may hang for ever must end, and say where it hung.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import selectors
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import anyio

if TYPE_CHECKING:
    from types import FrameType, TracebackType

T = TypeVar("T")

_CORE: Final = str(Path(__file__).parents[1])
_WAITS: Final = (
    os.path.dirname(asyncio.__file__),
    os.path.dirname(anyio.__file__),
    contextlib.__file__,
)
"""What a task that waits for something is in, innermost, and what says nothing of why."""

BLOCKED_S: Final = 1.0
"""A turn of the loop that takes longer is a defect; one of a node takes milliseconds."""
_TICKS: Final = 4
"""Signals for which a turn may go on. Of those that are due while the machine is busy with other
things the process gets one: so a slow machine is not taken for a blocked loop."""

_ENDS_S: Final = 1.0
"""For what hangs to end once it is cancelled: it has failed, and more time shows nothing."""


class _Blocked(BaseException):
    """Raised in what blocks the loop. No `except Exception` catches it."""


class _Watchdog:
    """Interrupts what blocks the loop, and remembers where that was."""

    def __init__(self, loop: asyncio.AbstractEventLoop, blocked_s: float) -> None:
        self._loop, self._tick_s = loop, blocked_s / _TICKS
        self._missed = 0
        self.where = ""

    def __enter__(self) -> _Watchdog:
        if threading.current_thread() is not threading.main_thread():
            raise AssertionError("only the main thread can be watched: run this test there")
        self._handler = signal.signal(signal.SIGALRM, self._alarm)
        self._before = signal.setitimer(signal.ITIMER_REAL, self._tick_s, self._tick_s)
        self._beat()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, *self._before)
        signal.signal(signal.SIGALRM, self._handler)

    def _beat(self) -> None:
        self._missed = 0
        self._loop.call_later(self._tick_s / 2, self._beat)

    def _alarm(self, _signum: int, frame: FrameType | None) -> None:
        waiting = frame is not None and frame.f_code.co_filename == selectors.__file__
        at = frame
        while at is not None and at.f_code.co_filename == threading.__file__:
            waiting |= at.f_code.co_name == "start"  # until the system runs the new thread
            at = at.f_back
        self._missed = 0 if waiting else self._missed + 1
        if self._missed > _TICKS and self._loop.is_running():
            while frame is not None and frame.f_code.co_filename.startswith(_WAITS):
                frame = frame.f_back
            self.where = self.where or _place(frame)
            raise _Blocked(self.where)


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "?"
    code = frame.f_code
    return f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"


class _Errors(logging.Handler):
    """What the core logs as an error: a servant's exception does not reach its caller."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("wetware.plugin."):
            return  # what the plugin says for itself
        fields = getattr(record, "ww", {})
        text = " ".join([record.getMessage(), *(f"{key}={value}" for key, value in fields.items())])
        if record.exc_info is not None and (exc := record.exc_info[1]) is not None:
            text += f": {type(exc).__name__}: {exc}{_where(exc.__traceback__)}"
        self.seen.append(text)


def _where(tb: TracebackType | None) -> str:
    if tb is None:
        return ""
    while tb.tb_next is not None:
        tb = tb.tb_next
    return f" at {_place(tb.tb_frame)}"


def run_watched(
    main: Callable[[], Coroutine[Any, Any, None]],
    *,
    limit_s: float = 60.0,
    ends_s: float = 10.0,
    blocked_s: float = BLOCKED_S,
) -> None:
    """Run `main` in a new loop; raises AssertionError for a defect that its caller would not see.

    These are: a turn of the loop that takes longer than `blocked_s`, which is interrupted; `main`
    itself after `limit_s`; a task that is there after it and does not end within `ends_s`; an
    exception that nobody got; and an error in the log of the core, e.g. the exception of a servant.
    Works in the main thread only.
    """
    loop = asyncio.new_event_loop()
    problems: list[str] = []
    loop.set_exception_handler(lambda _, context: problems.append(_problem(context)))
    errors, root = _Errors(), logging.getLogger("wetware")
    failure: BaseException | None = None
    left: list[str] = []
    root.addHandler(errors)
    gc.freeze()  # what was there before need not be looked through below
    try:
        with _Watchdog(loop, blocked_s) as dog:
            try:
                loop.run_until_complete(within(limit_s, main(), "the whole of it"))
                left = loop.run_until_complete(_left(ends_s))
            except BaseException as exc:
                failure = exc
            loop.run_until_complete(_end_all())
            gc.collect()  # an exception that nobody got is known when its task is freed
            loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        gc.unfreeze()
        root.removeHandler(errors)
        loop.close()
    if dog.where:
        raise AssertionError(f"blocks the event loop: {dog.where}") from failure
    if errors.seen and (failure is None or isinstance(failure, AssertionError)):
        said = f"{failure}; " if failure is not None else ""
        logged = "; ".join(errors.seen)[:2000]
        raise AssertionError(f"{said}an error was logged: {logged}") from failure
    if failure is not None:
        raise failure
    if left:
        raise AssertionError(f"leaves {len(left)} tasks behind: {', '.join(left)[:1000]}")
    if problems:
        raise AssertionError(f"an exception that nobody got: {'; '.join(problems)[:2000]}")


def _problem(context: dict[str, Any]) -> str:
    exc = context.get("exception")
    text = str(context.get("message", ""))
    return (
        text if exc is None else f"{text}: {type(exc).__name__}: {exc}{_where(exc.__traceback__)}"
    )


def _others() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def _left(ends_s: float) -> list[str]:
    if not (others := _others()):
        return []
    _, left = await asyncio.wait(others, timeout=ends_s)
    return [getattr(task.get_coro(), "__qualname__", task.get_name()) for task in left]


async def _end_all() -> None:
    """End what is left: of what ignores its cancellation the coroutine is closed.

    The core's own comes last: it waits for the others, and then frees what only it may free.
    """
    for tries in range(4 * _TICKS):
        if not (others := _others()):
            return
        for task in others:
            if not _innermost(task).startswith(_CORE):
                if tries >= _TICKS:
                    with contextlib.suppress(RuntimeError):
                        cast("Coroutine[Any, Any, Any]", task.get_coro()).close()
                task.cancel()
            elif tries >= 3 * _TICKS:
                task.cancel()
        await asyncio.wait(others, timeout=0.1)


def _frames(task: asyncio.Future[Any]) -> list[FrameType]:
    """Where a task that waits is, outermost first, but for `_WAITS`."""
    found: list[FrameType] = []
    inner: Any = task.get_coro() if isinstance(task, asyncio.Task) else None
    while inner is not None:
        frame = getattr(inner, "cr_frame", None) or getattr(inner, "gi_frame", None)
        if frame is not None and not frame.f_code.co_filename.startswith(_WAITS):
            found.append(frame)
        inner = getattr(inner, "cr_await", None) or getattr(inner, "gi_yieldfrom", None)
    return found


def _innermost(task: asyncio.Future[Any]) -> str:
    frames = _frames(task)
    return frames[-1].f_code.co_filename if frames else ""


async def within(limit_s: float, awaitable: Awaitable[T], what: str) -> T:
    """Await; AssertionError if it takes longer than `limit_s`.

    Unlike `asyncio.wait_for` it does not wait for what ignores its cancellation, but for a moment.
    """
    task = asyncio.ensure_future(awaitable)
    done, _ = await asyncio.wait([task], timeout=limit_s)
    if done:
        return task.result()
    where = (
        _place(stack[-1]) if isinstance(task, asyncio.Task) and (stack := task.get_stack()) else ""
    )
    task.cancel()
    await asyncio.wait([task], timeout=min(limit_s, _ENDS_S))
    raise AssertionError(f"{what} hangs: not done after {limit_s:g} s, in {where or '?'}")
