"""A few threads for what blocks, for each plugin or part its own: none takes those of another.

Not asyncio's default executor: its few threads look up host names, too, so that names which
a peer made up and nobody answers for keep a certificate from being written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

T = TypeVar("T")

THREADS_MAX: Final = 4
"""Calls of one plugin or part that run at a time; further ones wait."""


class Threads:
    """Runs blocking functions, at most THREADS_MAX at a time."""

    def __init__(self) -> None:
        from anyio import CapacityLimiter  # every command imports what imports this

        self._limiter = CapacityLimiter(THREADS_MAX)
        self._threads = CapacityLimiter(THREADS_MAX)  # instead of anyio's, which all share

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Call a function in a thread, and return or raise what it does.

        One who is cancelled stops waiting at once. The function goes on then, if it had begun, and
        keeps its place until it returns: cancelling makes no room for more of them.
        """
        import asyncio

        from anyio import to_thread

        place = object()
        await self._limiter.acquire_on_behalf_of(place)
        running = asyncio.ensure_future(
            to_thread.run_sync(partial(function, *args), limiter=self._threads)
        )

        def ended(done: asyncio.Future[T]) -> None:
            self._limiter.release_on_behalf_of(place)
            if not done.cancelled():
                done.exception()  # where nobody waits any more, nobody wants to know

        running.add_done_callback(ended)
        return await asyncio.shield(running)


async def to_its_end(work: Awaitable[T]) -> T:
    """Wait for `work` also where the caller is cancelled, which is raised then, once it has ended.

    For what a thread goes on with in any case. A shielded CancelScope of anyio is not enough: it
    keeps anyio's own cancellation back, and not that of a task.
    """
    import asyncio

    from anyio import CancelScope

    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    with CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as exc:
                cancelled = exc
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # nobody is told
        raise cancelled
    return task.result()


async def in_daemon(function: Callable[..., T], *args: object) -> T:
    """Call what may block for ever, in a thread that does not keep the process from its end.

    Such as reading a terminal. Who is cancelled stops waiting, and the function goes on.
    """
    import asyncio
    import threading
    from concurrent.futures import Future

    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # who is cancelled does not wait, and it goes on

    def call() -> None:
        try:
            done.set_result(function(*args))
        except OSError as exc:
            done.set_exception(exc)

    threading.Thread(target=call, name="blocking", daemon=True).start()
    return await asyncio.wrap_future(done)
