"""One thread that writes for the loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.base import writer as module
from wetware.base.writer import Write, Writer, groups
from wetware.errors import WetwareError

pytestmark = pytest.mark.anyio


class Sink:
    """What a writer commits to; `go_on` holds it, and it takes nothing while it is `full`."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []
        self.written: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.full = False
        self.entered = 0
        self.writer = Writer[str]("test", self.commit, self.due_s, unavailable=WetwareError)
        self.writer.start()

    def due_s(self, owed: bool) -> float | None:
        return 0.01 if owed else None

    def commit(self, batch: list[Write[str]], last: bool) -> list[Write[str]]:
        self.entered += 1
        self.go_on.wait(60)
        self.commits.append([write.what for write in batch])
        if self.full:
            for write in batch:
                self.writer.answer(write, error=WetwareError("full"))
            return [write for write in batch if write.future is None]
        self.written += self.commits[-1]
        for write in batch:
            self.writer.answer(write, write.what.upper())
        return []


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_what_waits_together_is_committed_together_and_in_order() -> None:
    sink = Sink()
    sink.go_on.clear()
    first = asyncio.create_task(sink.writer.write("first"))
    await until(lambda: sink.entered)
    rest = [asyncio.create_task(sink.writer.write(str(number))) for number in range(100)]
    await until(lambda: sink.writer.queued == 100)
    sink.go_on.set()
    assert await asyncio.gather(*rest) == [str(number) for number in range(100)]
    assert await first == "FIRST"
    assert sink.commits == [["first"], [str(number) for number in range(100)]]
    assert sink.writer.close()


async def test_the_loop_is_woken_once_for_all_that_was_committed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And each is answered in its order, after what was called back before."""
    sink = Sink()
    sink.go_on.clear()
    woken, order = 0, list[str]()
    loop = asyncio.get_running_loop()
    call = loop.call_soon_threadsafe

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal woken
        woken += 1
        return call(*args, **kwargs)

    async def write(what: str) -> None:
        order.append(await sink.writer.write(what))

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write("first"))
        await until(lambda: sink.entered)
        for number in range(100):
            tasks.create_task(write(str(number)))
        await until(lambda: sink.writer.queued == 100)
        sink.writer.call_soon(order.append, "before")
        sink.go_on.set()
        loop_waits = threading.Event()
        while len(sink.writer._calls) < 102:  # the loop runs nothing until all are answered
            loop_waits.wait(0.01)
    assert order == ["before", "FIRST", *map(str, range(100))]
    assert woken == 1
    assert sink.writer.close()


async def test_a_commit_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_MAX", 10)
    sink = Sink()
    sink.go_on.clear()
    for number in range(35):
        sink.writer.write_soon(str(number))
    sink.go_on.set()
    assert sink.writer.close()
    assert max(map(len, sink.commits)) == 10
    assert sink.written == [str(number) for number in range(35)]


async def test_what_has_taken_effect_is_tried_until_it_is_written() -> None:
    sink = Sink()
    sink.full = True
    sink.writer.write_soon("ended")
    with pytest.raises(WetwareError, match="full"):
        await sink.writer.write("given")
    await until(lambda: len(sink.commits) > 3)
    sink.full = False
    assert await sink.writer.write("next") == "NEXT"
    assert sink.writer.close()
    assert sink.written == ["ended", "next"]


async def test_one_who_stops_waiting_leaves_room_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WAITING_MAX", 2)
    sink = Sink()
    sink.go_on.clear()
    waiting = [asyncio.create_task(sink.writer.write("x")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(WetwareError, match="2 writes wait for the disk"):
        await sink.writer.write("y")
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    sink.go_on.set()
    await until(lambda: sink.written == ["x", "x"])
    assert await sink.writer.write("z") == "Z"
    assert sink.writer.close()


async def test_a_closed_writer_has_written_all_and_takes_nothing() -> None:
    sink = Sink()
    for number in range(10):
        sink.writer.write_soon(str(number))
    assert sink.writer.close()
    assert sink.writer.close()
    assert len(sink.written) == 10
    with pytest.raises(WetwareError, match="stopping"):
        await sink.writer.write("late")
    assert "late" not in sink.written


async def test_what_comes_too_late_with_nobody_waiting_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = Sink()
    assert sink.writer.close()
    sink.writer.write_soon("late")
    assert [r.getMessage() for r in caplog.records] == ["writer.too_late"]


@pytest.mark.parametrize("waited_for", [True, False])
async def test_what_was_taken_while_another_thread_closes_is_written(
    waited_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`close` comes right between the question whether it is open and what was open to do."""

    class Queue(queue.SimpleQueue[Any]):
        def put(self, item: Any, *args: Any) -> None:
            if item is not None:
                closing.start()
                closing.join(0.1)
            super().put(item)

    monkeypatch.setattr(module, "queue", SimpleNamespace(SimpleQueue=Queue, Empty=queue.Empty))
    sink = Sink()
    closing = threading.Thread(target=sink.writer.close)
    async with asyncio.timeout(60):
        if waited_for:
            assert await sink.writer.write("last") == "LAST"
        else:
            sink.writer.write_soon("last")
    closing.join(10)
    assert sink.written == ["last"]


async def test_a_disk_that_hangs_is_not_waited_for_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.05)
    sink = Sink()
    sink.go_on.clear()
    sink.writer.write_soon("x")
    assert not sink.writer.close()
    sink.go_on.set()
    await until(lambda: sink.written == ["x"])


async def test_a_defect_of_commit_refuses_what_waits_and_the_thread_goes_on() -> None:
    sink = Sink()
    commit = sink.writer._commit

    def fails(batch: list[Write[str]], last: bool) -> list[Write[str]]:
        sink.writer._commit = commit
        raise IndexError("an empty directory")

    sink.writer._commit = fails
    with pytest.raises(WetwareError, match="an empty directory"):
        await sink.writer.write("a")
    assert await sink.writer.write("b") == "B"
    assert sink.writer.close()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([4, 4, 2, 1], [[4, 4, 2], [1]]),
        ([11, 1, 9, 1], [[11], [1, 9], [1]]),
        ([1, 11], [[1], [11]]),
    ],
)
async def test_a_group_has_as_many_bytes_as_a_commit_may(
    sizes: list[int], expected: list[list[int]]
) -> None:
    found = groups(map(Write, sizes), lambda size: size, 10)
    assert [[write.what for write in group] for group in found] == expected


async def test_an_answer_that_comes_as_the_loop_has_taken_the_last_one_is_not_left_lying() -> None:
    sink, second = Sink(), asyncio.Event()

    class Slow(deque[Any]):
        """Whoever adds to it while there is something in it is overtaken by who takes that out."""

        def append(self, item: Any) -> None:
            if self:
                time.sleep(0.5)
            super().append(item)

    writer = sink.writer
    writer._calls = Slow()

    def from_the_thread() -> None:
        writer.call_soon(lambda: None)
        writer.call_soon(second.set)

    writer._loop = asyncio.get_running_loop()
    writing = threading.Thread(target=from_the_thread)
    writing.start()
    async with asyncio.timeout(10):
        await second.wait()
    writing.join()
    writer.close()
