"""Threads of a plugin's own: few, and not more for those who give up waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest

from wetware.base.threads import THREADS_MAX, Threads, to_its_end
from wetware.hookspecs import PluginContext

pytestmark = pytest.mark.anyio


class Work:
    """Blocks until the test lets it go on, and counts."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.began = 0
        self._lock = threading.Lock()

    def __call__(self, number: int = 0) -> int:
        with self._lock:
            self.began += 1
        self.go_on.wait(60)
        return number


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.go_on.set()


async def until_began(work: Work, count: int) -> None:
    with anyio.fail_after(60):
        while work.began < count:
            await asyncio.sleep(0.005)


async def test_a_function_returns_and_raises_what_it_does() -> None:
    threads = Threads()
    assert await threads.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await threads.run(divmod, 7, 0)
    assert await threads.run(threading.get_ident) != threading.get_ident()


async def test_so_many_run_at_a_time_and_the_others_wait(work: Work) -> None:
    threads, others = Threads(), Threads()
    calls = [asyncio.create_task(threads.run(work, number)) for number in range(THREADS_MAX * 3)]
    await until_began(work, THREADS_MAX)
    assert await others.run(abs, -1) == 1, "another plugin has its own"
    assert work.began == THREADS_MAX
    work.go_on.set()
    assert await asyncio.gather(*calls) == list(range(THREADS_MAX * 3))


@pytest.mark.parametrize("how", ["asyncio", "anyio"])
async def test_cancelling_is_at_once_and_makes_no_room_for_more(work: Work, how: str) -> None:
    threads = Threads()
    for round_ in range(3):
        if how == "asyncio":
            calls = [asyncio.create_task(threads.run(work)) for _ in range(THREADS_MAX * 2)]
            await until_began(work, THREADS_MAX)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls, timeout=5)
            assert all(call.cancelled() for call in calls), round_
        else:
            async with anyio.create_task_group() as tasks:
                for _ in range(THREADS_MAX * 2):
                    tasks.start_soon(threads.run, work)
                await until_began(work, THREADS_MAX)
                tasks.cancel_scope.cancel()
    assert work.began == THREADS_MAX
    work.go_on.set()
    assert await threads.run(work, 9) == 9
    assert work.began == THREADS_MAX + 1, "what had not begun never does"


async def test_a_failure_that_nobody_waits_for_is_let_go(
    work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    threads = Threads()

    def fail() -> None:
        work()
        raise OSError("nobody wants to know")

    call = asyncio.create_task(threads.run(fail))
    await until_began(work, 1)
    call.cancel()
    await asyncio.wait([call])
    work.go_on.set()
    assert await threads.run(abs, -1) == 1
    assert "never retrieved" not in caplog.text


async def test_names_that_nobody_answers_for_take_none_of_them(work: Work) -> None:
    """The loop's own executor looks up host names, also those that a peer made up."""
    loop, small = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    loop.set_default_executor(small)
    lookup = loop.run_in_executor(None, work)
    await until_began(work, 1)
    with anyio.fail_after(60):
        assert await Threads().run(abs, -1) == 1
    work.go_on.set()
    await lookup


async def test_it_is_a_verb_of_a_plugins_context(tmp_path: Path) -> None:
    nothing: Any = None
    ctx = PluginContext("x", None, nothing, tmp_path, time, nothing)
    assert await ctx.run_sync(abs, -3) == 3


@pytest.mark.parametrize(("by_anyio", "fails"), [(False, False), (False, True), (True, False)])
async def test_work_ends_before_who_is_cancelled_goes_on(by_anyio: bool, fails: bool) -> None:
    go, log = asyncio.Event(), []

    async def work() -> None:
        await go.wait()
        log.append("ended")
        if fails:
            raise ValueError

    async def wait() -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            try:
                await to_its_end(work())
            except asyncio.CancelledError:
                log.append("cancelled")
                raise

    scopes: list[anyio.CancelScope] = []
    task = asyncio.ensure_future(wait())
    for _ in range(3):
        await asyncio.sleep(0)
        scopes[0].cancel() if by_anyio else task.cancel()
    assert not log
    go.set()
    await asyncio.wait([task], timeout=5)
    assert log[0] == "ended"
    assert task.done()
    assert task.cancelled() is not by_anyio


async def test_it_returns_and_raises_what_the_work_does() -> None:
    async def fail() -> None:
        raise ValueError("no")

    assert await to_its_end(asyncio.sleep(0, 7)) == 7
    with pytest.raises(ValueError, match="no"):
        await to_its_end(fail())
