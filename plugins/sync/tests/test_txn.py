"""What an engine is asked is bounded before it is asked."""

from __future__ import annotations

import pytest

from wetware.errors import InvalidArgument, LimitExceeded
from wetware_sync.engine import (
    OPERATIONS_MAX,
    VALUE_BYTES_MAX,
    Compare,
    Delete,
    Get,
    Order,
    Put,
    Txn,
    prefix_end,
)


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
        Txn((), (Compare(b"a", "version", "=", 0),) * 129).check()
    with pytest.raises(InvalidArgument, match="a page has"):
        Txn((Get(b"a", limit=0),)).check()
    with pytest.raises(InvalidArgument, match="page by page"):
        Txn((Get(b"a", prefix=True, after=b"ab", order=Order.OLDEST),)).check()
    with pytest.raises(InvalidArgument, match="compared with"):
        Txn((), (Compare(b"a", "value", "=", 0),)).check()


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"a", b"b"), (b"a\xff", b"b"), (b"\xff", None), (b"", None)]
)
def test_where_a_prefix_ends(prefix: bytes, end: bytes | None) -> None:
    assert prefix_end(prefix) == end
