"""What keeps the blocks that a Blob is read from, and the work that goes on beside the calls."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from wetware.base.tasks import Tasks
from wetware.errors import LimitExceeded, WetwareError
from wetware_blob.format.build import V1_2025, Entry, directory
from wetware_blob.format.cid import RAW, Cid
from wetware_blob.reading import BlobServant, Cursors, Opened
from wetware_blob.service import BlobService, _verify
from wetware_blob.store.errors import StoreFailed

pytestmark = pytest.mark.anyio


class Sources:
    """Those that are open; `fails` is what opening one raises."""

    def __init__(self) -> None:
        self.open: list[SimpleNamespace] = []
        self.fails: WetwareError | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Any]:
        if self.fails is not None:
            raise self.fails
        ready = asyncio.get_running_loop().create_future()
        ready.set_result(None)
        self.open.append(source := SimpleNamespace(error=None, ready=ready))
        try:
            yield source
        finally:
            self.open.remove(source)


@pytest.fixture
async def opened() -> AsyncIterator[tuple[Opened, Sources]]:
    sources = Sources()
    opened = Opened(sources, Tasks(), Cursors(60, 1, time.monotonic))
    opened.users += 1
    yield opened, sources
    opened.leave()
    assert not sources.open, "nothing is kept for nobody"


async def test_a_source_that_has_ended_is_opened_again(opened: tuple[Opened, Sources]) -> None:
    blob, sources = opened
    first = cast("Any", await blob.source())
    assert await blob.source() is first
    first.error = LimitExceeded("the disk was full")
    second = await blob.source()
    assert sources.open == [second]
    assert second is not first


async def test_one_that_failed_to_open_is_tried_again(opened: tuple[Opened, Sources]) -> None:
    blob, sources = opened
    sources.fails = LimitExceeded("64 are read")
    with pytest.raises(LimitExceeded):
        await blob.source()
    sources.fails = None
    assert [await blob.source()] == sources.open


async def test_what_is_below_may_be_had_when_what_it_came_from_is_let_go(
    opened: tuple[Opened, Sources],
) -> None:
    """A call was on its way: `at`, whose answer comes after the release."""
    blob, sources = opened
    await blob.source()
    blob.leave()
    blob.users += 1
    assert [await blob.source()] == [sources.open[-1]]


async def test_a_verification_that_cannot_go_on_says_so() -> None:
    async def scrub(*_: object) -> AsyncIterator[object]:
        raise StoreFailed("the index cannot be read")
        yield

    ended: list[WetwareError] = []
    service = SimpleNamespace(scrub=scrub)
    await _verify(cast("BlobService", service), cast("Any", SimpleNamespace(end=ended.append)))
    assert [error.code for error in ended] == ["blob.store"]


async def test_a_list_goes_on_where_the_last_one_ended() -> None:
    """No block of the directory is read again for a further page."""
    leaf = Cid.of(RAW, b"")
    names = {f"{n:05}{'x' * 90}" for n in range(2500)}
    root, made = directory((Entry(name, leaf, 0) for name in names), V1_2025)
    blocks, read = {block.cid: block.data for block in made}, list[Cid]()

    async def get(cid: Cid) -> bytes:
        read.append(cid)
        return blocks[cid]

    ready = asyncio.get_running_loop().create_future()
    ready.set_result(None)
    source = SimpleNamespace(error=None, ready=ready, get=get, ahead=lambda _: None)
    cursors = Cursors(60, 1, time.monotonic)
    context = cast("Any", lambda: contextlib.nullcontext(source))
    blob = BlobServant(Opened(context, Tasks(), cursors), root.cid)
    found: list[str] = []
    while True:
        page = await blob.ls(len(found), 1000)
        found += [entry["name"] for entry in page["entries"]]
        if not page["more"]:
            break
    assert (len(found), set(found)) == (2500, names)
    assert len(read) == len(made) > 200
    assert [entry["name"] for entry in (await blob.ls(3, 2))["entries"]] == found[3:5]
    blob.released()
    assert not len(cursors)
