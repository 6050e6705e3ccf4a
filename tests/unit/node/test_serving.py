"""How services and the auth backend start and end beside one another."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from wetware.errors import Busy, PluginError
from wetware.hookspecs import Service
from wetware.node import serving
from wetware.node.serving import start_backend, start_services

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskStatus

pytestmark = pytest.mark.anyio


class Plain(Service):
    """Nothing to run: it has the base class's `run`."""

    interface: Any = None

    def __init__(self, name: str) -> None:
        self.name = name

    def bootstrap(self, principal: object) -> Any:
        raise NotImplementedError


class Acts(Plain):
    """Does something before it serves, and something once `go` is set."""

    def __init__(
        self,
        name: str,
        *,
        before: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0),
        after: Callable[[], Awaitable[object]] = anyio.sleep_forever,
        at_end: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0),
    ) -> None:
        super().__init__(name)
        self._before, self._after, self._at_end = before, after, at_end
        self.go = asyncio.Event()
        self.ended = asyncio.Event()

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        try:
            await self._before()
            task_status.started()
            await self.go.wait()
            await self._after()
        finally:
            with anyio.CancelScope(shield=True):
                await self._at_end()
            self.ended.set()


async def raises() -> None:
    raise ValueError("boom")


async def cancels_itself() -> None:
    raise asyncio.CancelledError


async def cancels_its_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


def named(*services: Service) -> dict[str, Service]:
    return {service.name: service for service in services}


async def test_services_start_beside_one_another_and_end_with_the_group() -> None:
    first, second = asyncio.Event(), asyncio.Event()

    async def meet(mine: asyncio.Event, others: asyncio.Event) -> None:
        mine.set()
        await others.wait()

    a = Acts("a", before=lambda: meet(first, second))
    b = Acts("b", before=lambda: meet(second, first))
    services = named(a, b, Plain("c"))
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await start_services(services, tasks, lambda *_: None)
            assert set(services) == {"a", "b", "c"}
            tasks.cancel_scope.cancel()
    assert services == {}
    assert a.ended.is_set()


class Returns(Plain):
    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Before it serves."""


@pytest.mark.parametrize(
    ("bad", "said", "reported"),
    [
        (lambda: Acts("bad", before=raises), "service.failed", ["bad: boom"]),
        (lambda: Acts("bad", after=raises), "service.failed", ["bad: boom"]),
        (lambda: Acts("bad", before=cancels_itself), "service.cancelled_itself", []),
        (lambda: Acts("bad", after=cancels_itself), "service.cancelled_itself", []),
        (lambda: Acts("bad", after=cancels_its_task), "service.cancelled_itself", []),
        (lambda: Acts("bad", after=lambda: asyncio.sleep(0)), "service.ended", []),
        (lambda: Returns("bad"), "service.ended", []),
    ],
)
async def test_one_that_ends_is_no_longer_offered_and_the_others_go_on(
    bad: Callable[[], Any], said: str, reported: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    made, good = bad(), Acts("good")
    services, failed = named(made, good), list[str]()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await start_services(services, tasks, lambda name, exc: failed.append(f"{name}: {exc}"))
            if isinstance(made, Acts):
                made.go.set()
            while "bad" in services:
                await asyncio.sleep(0)
            assert set(services) == {"good"}
            assert said in caplog.text
            assert not good.ended.is_set()
            tasks.cancel_scope.cancel()
    assert failed == reported


async def test_one_that_is_late_is_cancelled_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "START_S_MAX", 0.05)
    late, good = Acts("late", before=anyio.sleep_forever), Acts("good")
    services = named(late, good)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await start_services(services, tasks, lambda *_: None)
            assert late.ended.is_set()
            assert set(services) == {"good"}
            tasks.cancel_scope.cancel()
    assert "service.not_ready" in caplog.text
    assert "cancelled_itself" not in caplog.text


async def test_what_is_slow_to_start_is_waited_for_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(serving, "STILL_S", 0.0)

    async def slow() -> None:
        while len(caplog.records) < 2:
            await asyncio.sleep(0)

    services = named(Acts("slow", before=slow), Acts("slower", before=slow))
    async with anyio.create_task_group() as tasks:
        await start_services(services, tasks, lambda *_: None)
        assert set(services) == {"slow", "slower"}
        tasks.cancel_scope.cancel()
    said = [record.ww for record in caplog.records]  # type: ignore[attr-defined]
    at_most_s = serving.START_S_MAX
    assert {"what": "service slow", "at_most_s": at_most_s} in said
    assert {"what": "service slower", "at_most_s": at_most_s} in said


async def test_the_end_of_a_service_may_wait_under_a_shield() -> None:
    slept = asyncio.Event()

    async def finish() -> None:
        await asyncio.sleep(0.01)
        slept.set()

    async with anyio.create_task_group() as tasks:
        await start_services(named(Acts("a", at_end=finish)), tasks, lambda *_: None)
        tasks.cancel_scope.cancel()
    assert slept.is_set()


async def test_the_failure_of_the_backend_is_that_of_the_node() -> None:
    backend: Any = Acts("auth", after=raises)

    async def start() -> None:
        async with anyio.create_task_group() as tasks:
            await start_backend(backend, tasks)
            backend.go.set()
            await anyio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(start(), 60)
    assert caught.group_contains(ValueError, match="boom")


@pytest.mark.parametrize("how", ["returned", "cancelled itself"])
async def test_the_end_of_the_backend_is_that_of_the_node(how: str) -> None:
    async def end() -> None:
        if how == "cancelled itself":
            raise asyncio.CancelledError

    backend: Any = Acts("auth", after=end)

    async def start() -> None:
        async with anyio.create_task_group() as tasks:
            await start_backend(backend, tasks)
            backend.go.set()
            await anyio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(start(), 60)
    assert caught.group_contains(PluginError, match=f"'auth' has ended: it {how}")


async def test_a_backend_that_is_late_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "START_S_MAX", 0.05)
    backend: Any = Acts("auth", before=anyio.sleep_forever)
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            await start_backend(backend, tasks)
    assert caught.group_contains(Busy, match=r"was not ready within 0\.05 s")
    assert backend.ended.is_set()


async def test_a_backend_that_returns_before_it_has_started_is_named() -> None:
    backend: Any = Returns("auth")
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            await start_backend(backend, tasks)
    assert caught.group_contains(PluginError, match="'auth' returned before it had started")
