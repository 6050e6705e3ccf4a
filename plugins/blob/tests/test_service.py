"""What the service decides by itself."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from wetware.base.tasks import Tasks
from wetware.errors import InvalidArgument, NotFound, WetwareError
from wetware.overlay.membership.selector import Selector
from wetware_blob.format.cid import RAW, Cid
from wetware_blob.service import StoreServant, judge_terms
from wetware_blob.store.pins import Pin
from wetware_blob.transfers import State, Transfer

pytestmark = pytest.mark.anyio


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
