"""Tasks that go on beside the calls that began them."""

from __future__ import annotations

import asyncio

import pytest

from wetware.base.tasks import Tasks

pytestmark = pytest.mark.anyio


async def test_all_end_with_their_owner_and_an_error_of_one_is_its_own() -> None:
    tasks, ended = Tasks(), list[str]()

    async def works(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    async def fails() -> None:
        raise ValueError("on purpose")

    for name in ("a", "b"):
        tasks.start(works(name))
    with pytest.raises(ValueError, match="on purpose"):
        await tasks.start(fails())
    assert not ended
    await tasks.end()
    assert sorted(ended) == ["a", "b"]
    await tasks.end()
