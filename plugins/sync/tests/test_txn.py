"""What an engine is asked is bounded before it is asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.errors import Busy, InvalidArgument, LimitExceeded
from wetware.testing import FakeClock
from wetware_sync.engine import (
    OPERATIONS_MAX,
    VALUE_BYTES_MAX,
    Compare,
    Delete,
    Get,
    Order,
    Outcome,
    Page,
    Put,
    Txn,
    prefix_end,
)
from wetware_sync.fencing import TRIES_MAX
from wetware_sync.locks import SyncServant, SyncService
from wetware_sync.names import NamesServant

from .parts import ADA


@pytest.mark.parametrize(
    "branch",
    [
        (Put(b"a", b""), Put(b"a", b"")),
        (Put(b"a", b""), Delete(b"a")),
        (Put(b"ab", b""), Delete(b"a", prefix=True)),
        (Delete(b"ab", prefix=True), Delete(b"a", prefix=True)),
        (Delete(b"a", prefix=True), Delete(b"a", prefix=True)),
        (Put(b"a", b""), Delete(b"", prefix=True)),
    ],
)
def test_no_key_is_written_twice(branch: tuple[Put | Delete, ...]) -> None:
    with pytest.raises(InvalidArgument, match="twice"):
        Txn(branch).check()
    with pytest.raises(InvalidArgument, match="twice"):
        Txn((), otherwise=branch).check()


def test_what_is_no_key_is_refused() -> None:
    for operation in (Put(b"", b""), Delete(b""), Get(b""), Put(bytes(1025), b"")):
        with pytest.raises(InvalidArgument, match="a key has"):
            Txn((operation,)).check()
    Txn((Delete(b"", prefix=True), Get(b"", prefix=True))).check()


def test_it_is_bounded() -> None:
    with pytest.raises(LimitExceeded, match="262144"):
        Txn((Put(b"a", bytes(VALUE_BYTES_MAX + 1)),)).check()
    with pytest.raises(LimitExceeded, match="operations"):
        Txn(tuple(Put(b"%d" % n, b"") for n in range(OPERATIONS_MAX + 1))).check()
    with pytest.raises(LimitExceeded, match="bytes"):
        Txn(tuple(Put(b"%d" % n, bytes(VALUE_BYTES_MAX)) for n in range(4))).check()
    with pytest.raises(LimitExceeded, match="compares"):
        Txn((), (Compare(b"a", "version", 0),) * 129).check()
    with pytest.raises(InvalidArgument, match="a page has"):
        Txn((Get(b"a", limit=0),)).check()
    with pytest.raises(InvalidArgument, match="page by page"):
        Txn((Get(b"a", prefix=True, after=b"ab", order=Order.OLDEST),)).check()
    with pytest.raises(InvalidArgument, match="compared with"):
        Txn((), (Compare(b"a", "value", 0),)).check()


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"a", b"b"), (b"a\xff", b"b"), (b"\xff", None), (b"", None)]
)
def test_where_a_prefix_ends(prefix: bytes, end: bytes | None) -> None:
    assert prefix_end(prefix) == end


class Contended:
    """An engine where somebody else is always faster."""

    tries = 0

    async def read(self, _: Get) -> Page:
        return Page((), 1)

    async def txn(self, _: Txn, __: str) -> Outcome:
        self.tries += 1
        return Outcome(False, 1)


async def add(home: Any) -> None:
    await SyncServant(SyncService(home), ADA).add("a", 1)


async def name(home: Any) -> None:
    await NamesServant(home, ADA).set("/a", "x", 0, 0, False, b"")


@pytest.mark.anyio
@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", [add, name])
async def test_what_others_change_all_the_time_is_given_up(
    what: Callable[[Any], Awaitable[None]],
) -> None:
    engine = Contended()
    with pytest.raises(Busy, match="nothing was written"):
        await what(SimpleNamespace(engine=engine, ctx=SimpleNamespace(clock=FakeClock())))
    assert engine.tries == TRIES_MAX
