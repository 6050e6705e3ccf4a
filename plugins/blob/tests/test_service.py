"""What the service decides by itself."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from wetware import rpc
from wetware.base.tasks import Tasks
from wetware.errors import InvalidArgument, NotFound, OverlayError, WetwareError
from wetware.overlay.membership.selector import Selector
from wetware.testing import FakeOverlay, overlays, plugin_context
from wetware_blob import service as serving
from wetware_blob.config import BlobConfig
from wetware_blob.exchange.find import dht_key
from wetware_blob.format.cid import RAW, Block, Cid
from wetware_blob.service import BlobService, StoreServant, judge_terms
from wetware_blob.store.pins import Pin
from wetware_blob.store.store import Store
from wetware_blob.transfers import State, Transfer

from .exchange.parts import until

pytestmark = pytest.mark.anyio
ADA = "local:ada"


@asynccontextmanager
async def running(path: Path, overlay: FakeOverlay, **config: Any) -> AsyncIterator[BlobService]:
    """The service of one node."""
    await anyio.Path(path).mkdir(exist_ok=True)
    context = plugin_context(path, BlobConfig(**config), name="blob", overlay=overlay)
    service = overlay.services["blob"] = BlobService(context)
    async with anyio.create_task_group() as tasks:
        await tasks.start(lambda task_status: service.run(task_status=task_status))
        yield service
        tasks.cancel_scope.cancel()


async def put(service: BlobService, data: bytes) -> Block:
    block = Block(Cid.of(RAW, data), data)
    async with service.store.hold(ADA) as hold:
        await service.store.put(hold, [block])
        await service.store.pin(hold, Pin(ADA, block.cid))
    return block


def test_a_selector_that_is_too_long_for_its_use_is_refused_at_once() -> None:
    """More terms are put before it."""
    given = {"name": "", "copies": 2, "ack": 1, "public": False}
    ctx = cast("Any", SimpleNamespace(members=Selector.parse))
    made, ack = judge_terms(ctx, {**given, "where": "zone=a"})
    assert (made("local:ada", Cid(1, RAW, bytes(32))).where, ack) == ("zone=a", 1)
    with pytest.raises(InvalidArgument):
        judge_terms(ctx, {**given, "where": "zone=" + "a" * 1015})


async def test_a_transfer_that_ended_before_it_began_is_not_done() -> None:
    async def work(state: State) -> None: ...

    transfer = Transfer(Tasks(), nullcontext(), work)
    transfer.released()
    with pytest.raises(WetwareError):
        await transfer.progress(1.0)


async def test_what_lacks_of_a_pin_of_others_does_not_make_rm_fail() -> None:
    """It has given the pin up by then, and what lacks is not for its user to know."""
    warned: list[str] = []

    async def unpin(*_: object) -> int:
        return 1

    async def collect() -> None:
        raise NotFound("a block of a pin is not here", code="not_found.blob")

    async def reaching(_: object) -> list[Pin]:
        return []

    service = SimpleNamespace(
        check_running=lambda: None,
        unpin=unpin,
        store=SimpleNamespace(collect=collect, reaching=reaching),
        ctx=SimpleNamespace(log=SimpleNamespace(warning=lambda event, **_: warned.append(event))),
    )
    removed = await StoreServant(cast("Any", service), "local:ada").rm(str(Cid(1, RAW, bytes(32))))
    assert (removed["pins"], removed["freed_bytes"]) == (1, 0)
    assert warned == ["blob.not_collected"]


async def test_what_is_public_is_announced_and_again_after_a_restart(tmp_path: Path) -> None:
    """And a DHT that is away fails no pin."""
    async with FakeOverlay() as overlay:
        async with running(tmp_path, overlay) as service:
            mine, public = await put(service, b"mine"), await put(service, b"public")
            await service.pin(State(), ADA, partial(Pin, name="a"), 1, mine.cid)
            assert overlay.keys == []
            overlay.taken = OverlayError("there is no DHT")
            made = partial(Pin, name="b", public=True)
            await service.pin(State(), ADA, made, 1, public.cid)
            assert overlay.keys == [dht_key(public.cid)]
        overlay.taken = True
        async with running(tmp_path, overlay):
            await until(lambda: len(overlay.keys) > 1)
        assert overlay.keys == [dht_key(public.cid)] * 2


async def test_what_is_found_damaged_in_the_background_is_had_from_another_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "SCRUB_FIRST_S", 0.0)
    rates, scrub = list[float | None](), Store.scrub

    def scrubbed(store: Store, rate: float | None, share: float) -> AsyncIterator[Any]:
        rates.append(rate)
        return scrub(store, rate, share)

    monkeypatch.setattr(Store, "scrub", scrubbed)
    caplog.set_level(logging.WARNING)
    data, lost = os.urandom(100_000), os.urandom(200_000)
    async with rpc.runtime(), overlays(2) as (here, there):
        here.meet(there.peer_id, services=("blob",))
        async with running(tmp_path / "there", there, scrub_rate=0) as other:
            await put(other, data)
            async with running(tmp_path / "here", here, scrub_rate=0) as service:
                blocks = [await put(service, data), await put(service, lost)]
            for file in (tmp_path / "here").rglob("*-*"):
                if file.parent.name.isdecimal():
                    file.write_bytes(file.read_bytes()[:-1] + b"?")
            async with running(tmp_path / "here", here, scrub_rate=1 << 30) as service:
                found = "blob.scrubbed"
                await until(lambda: sum(r.message == found for r in caplog.records) == 2)
                assert await service.store.get(blocks[0].cid.digest) == data
    assert rates == [1 << 30], "where it is 0, never"
    said = {r.ww["block"]: r.ww["mended"] for r in caplog.records if r.message == found}  # type: ignore[attr-defined]  # as EventLogger has it
    assert said == {block.cid.digest.hex(): block.data == data for block in blocks}
