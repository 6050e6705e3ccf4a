"""A node hands over: service by service, one at a time, for who waits for it, and never by half."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wetware import rpc
from wetware.broker.protocol import CORE
from wetware.client import Session
from wetware.errors import (
    STOPPING,
    Disconnected,
    InternalError,
    LimitExceeded,
    TimedOut,
    Unsupported,
    WetwareError,
)
from wetware.loader.report import State
from wetware.node.leaving import hand_over
from wetware.node.services.node import NodeService
from wetware.testing import Started

Tell = Callable[[str], object]


class Handing:
    """A service, as far as it is handed over; `does` is how."""

    def __init__(self, does: Callable[[Tell], Awaitable[None]]) -> None:
        self.hand_over = does


class Parts:
    """The parts of a node with these services; those in `offered` are not all running."""

    def __init__(self, offered: str = "", **services: Callable[[Tell], Awaitable[None]]) -> None:
        self.services = {name: Handing(does) for name, does in services.items()}
        self.proposals = dict.fromkeys([*services, *offered.split()])
        self.plugins = SimpleNamespace(report=[])
        self.recorded: list[str] = []

    @contextlib.asynccontextmanager
    async def session(self, path: Path) -> AsyncIterator[tuple[Session, asyncio.Task[None]]]:
        """Somebody logged in, and the service `node` that runs."""

        async def admit(event: str, **_: object) -> None:
            self.recorded.append(event)

        unused: Any = None
        node: Any = self
        service = NodeService(
            status=unused,
            restart_overlay=unused,
            trust_clock=unused,
            proposal=unused,
            hand_over=lambda tell: hand_over(node, tell),
            audit=SimpleNamespace(admit=admit),  # type: ignore[arg-type]
        )
        ready = Started()
        running = asyncio.create_task(service.run(task_status=ready))
        await ready.wait()
        async with (
            asyncio.timeout(60),
            rpc.serve_unix(path / "s", lambda _: service.bootstrap(unused)),
            await rpc.connect_unix(path / "s") as connection,
        ):
            session: Any = Session(unused, unused, unused)
            session.service = lambda _: connection.bootstrap(CORE.Node)
            yield session, running
        running.cancel()
        await asyncio.wait([running])


@pytest.mark.anyio
async def test_each_service_hands_over_and_says_how_far_it_is(tmp_path: Path) -> None:
    order: list[str] = []
    heard = asyncio.Event()

    async def first(tell: Tell) -> None:
        tell("1 left")
        await heard.wait()
        order.append("first")

    async def second(tell: Tell) -> None:
        order.append("second")

    parts = Parts(b=second, a=first)
    said: list[str] = []

    def told(text: str) -> None:
        said.append(text)
        heard.set()

    async with parts.session(tmp_path) as (session, _):
        await session.hand_over(told)
    assert order == ["first", "second"]
    assert said == ["a: 1 left"]
    assert parts.recorded == ["operator.handing_over"]


@pytest.mark.anyio
async def test_nothing_counts_as_handed_over_that_is_not(tmp_path: Path) -> None:
    async def full(tell: Tell) -> None:
        raise TimedOut("nobody has room", hint="ww doctor")

    async def defect(tell: Tell) -> None:
        raise ValueError("a secret")

    async def nothing(tell: Tell) -> None:
        pass

    broken = Parts(a=nothing)
    broken.plugins.report.append(SimpleNamespace(name="lost", state=State.FAILED))
    for parts, error, words in (
        (Parts(a=full), TimedOut, "nobody has room"),
        (Parts(a=defect), InternalError, "the node's log says how"),
        (Parts("ended", a=nothing), Unsupported, "ended"),
        (broken, Unsupported, "lost"),
    ):
        async with parts.session(tmp_path) as (session, _):
            with pytest.raises(WetwareError, match=words) as refused:
                await session.hand_over()
            assert type(refused.value) is error
            with pytest.raises(error):  # not taken for one that goes on
                await session.hand_over()


@pytest.mark.anyio
async def test_it_is_one_at_a_time_and_ends_with_who_asked_or_with_the_node(tmp_path: Path) -> None:
    running, ended = asyncio.Event(), asyncio.Event()

    async def work(tell: Tell) -> None:
        ended.clear()
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with Parts(a=work).session(tmp_path) as (session, node):
        asked = asyncio.create_task(session.hand_over())
        await running.wait()
        with pytest.raises(LimitExceeded, match="already"):
            await session.hand_over()
        asked.cancel()
        await ended.wait()
        running.clear()
        asked = asyncio.create_task(session.hand_over())
        await running.wait()
        node.cancel()
        with pytest.raises(Disconnected) as info:
            await asked
        assert info.value.code == STOPPING
        assert ended.is_set()
        with pytest.raises(Disconnected, match="not running"):
            await session.hand_over()
