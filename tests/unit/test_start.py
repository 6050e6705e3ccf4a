"""A node's start: what is slow is waited for, and the log says what it is."""

from __future__ import annotations

import asyncio

import pytest

from wetware import node

pytestmark = pytest.mark.anyio


async def test_what_is_slow_to_be_ready_is_waited_for_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(node, "STILL_S", 0.0)
    ready = asyncio.Event()

    async def slow() -> None:
        while not caplog.records:
            await asyncio.sleep(0)
        ready.set()

    task = asyncio.create_task(slow())
    await node._started(ready, "auth backend slow")
    await task
    (said,) = [record.ww for record in caplog.records]  # type: ignore[attr-defined]
    assert said == {"what": "auth backend slow", "at_most_s": node.START_S_MAX}


async def test_what_is_never_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "START_S_MAX", 0.0)
    with pytest.raises(TimeoutError):
        await node._started(asyncio.Event(), "service slow")
