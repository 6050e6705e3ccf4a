"""Dialling and a tunnel at once: the first to get there is taken, and the other leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest

from wetware.client import session
from wetware.errors import AuthError, DialError
from wetware.identity import Key

pytestmark = pytest.mark.anyio

PEER = Key.generate().peer_id


class Way:
    """Ends when it is told to, with a place or an error."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.end: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def __call__(self, *_: object, **__: object) -> Any:
        self.begun.set()
        return await self.end


@pytest.fixture
async def dial(monkeypatch: pytest.MonkeyPatch) -> Way:
    way = Way()
    monkeypatch.setattr(session, "remote", way)
    return way


def reaching(tunnel: Way, after_s: float = 0.0) -> asyncio.Task[Any]:
    stack = contextlib.AsyncExitStack()
    return asyncio.create_task(session.reached(stack, (), PEER, tunnel, 10, tunnel_after_s=after_s))


def _first_is_dial(dial: Way, tunnel: Way) -> tuple[Way, Way]:
    return dial, tunnel


def _first_is_tunnel(dial: Way, tunnel: Way) -> tuple[Way, Way]:
    return tunnel, dial


@pytest.mark.parametrize("order", [_first_is_dial, _first_is_tunnel])
async def test_the_first_is_taken_and_the_other_is_cancelled(
    dial: Way, order: Callable[[Way, Way], tuple[Way, Way]]
) -> None:
    tunnel = Way()
    first, other = order(dial, tunnel)
    task = reaching(tunnel)
    await tunnel.begun.wait()
    first.end.set_result("place")
    assert await task == "place"
    assert other.end.cancelled()


async def test_a_dial_that_fails_leaves_the_tunnel_and_is_told_with_it(dial: Way) -> None:
    tunnel = Way()
    task = reaching(tunnel, after_s=60)
    await dial.begun.wait()
    dial.end.set_exception(DialError("nobody listens"))
    await tunnel.begun.wait()
    tunnel.end.set_exception(DialError("no member"))
    with pytest.raises(DialError, match="nobody listens; nor through a tunnel: no member"):
        await task


async def test_addresses_that_lead_elsewhere_are_not_answered_with_a_tunnel(dial: Way) -> None:
    tunnel = Way()
    task = reaching(tunnel, after_s=60)
    dial.end.set_exception(AuthError("another node"))
    with pytest.raises(AuthError):
        await task
    assert not tunnel.begun.is_set()


async def test_who_stops_waiting_ends_both(dial: Way) -> None:
    tunnel = Way()
    task = reaching(tunnel)
    await tunnel.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert dial.end.cancelled()
    assert tunnel.end.cancelled()


async def test_what_the_other_way_fails_with_as_it_is_cancelled_is_not_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def dial(*_: object, **__: object) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise DialError("stopping") from None

    monkeypatch.setattr(session, "remote", dial)
    printed: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: printed.append(context))
    tunnel = Way()
    task = reaching(tunnel)
    await tunnel.begun.wait()
    tunnel.end.set_result("place")
    assert await task == "place"
    del task
    gc.collect()
    assert not printed
