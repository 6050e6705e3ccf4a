"""Work that goes on after the call that began it."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest

from wetware.errors import Disconnected, LimitExceeded
from wetware_blob.transfers import State, Transfer

pytestmark = pytest.mark.anyio


async def test_one_that_is_let_go_before_it_begins_has_not_succeeded() -> None:
    tasks: set[asyncio.Task[Any]] = set()
    ended: list[str] = []

    async def work(state: State) -> None:
        pytest.fail("it began")

    with ExitStack() as place:
        place.callback(ended.append, "place")
        transfer = Transfer(tasks, place.pop_all(), work)
    transfer.released()
    for _ in range(2):
        with pytest.raises(Disconnected):
            await transfer.progress(1)
    await asyncio.sleep(0)
    assert ended == ["place"]
    assert not tasks


async def test_what_ended_it_is_told_as_often_as_it_is_asked_for() -> None:
    async def work(state: State) -> None:
        raise LimitExceeded("full", hint="rm", code="limit.blob_quota")

    transfer = Transfer(set(), ExitStack(), work)
    told = []
    for _ in range(2):
        with pytest.raises(LimitExceeded) as error:
            await transfer.progress(1)
        told.append(error.value)
    assert [(error.code, error.hint) for error in told] == [("limit.blob_quota", "rm")] * 2
    assert told[0] is not told[1], "it would collect tracebacks"
