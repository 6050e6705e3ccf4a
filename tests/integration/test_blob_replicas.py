"""Copies of pins at other members, by real nodes: made, made again, dropped, handed over."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import wetware
from wetware.testing import Home, NodeProcess

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

MIB = 1 << 20
GRACE_S = 4.0
ENV = {"WW_PLUGINS_BLOB_GRACE_S": str(GRACE_S)}


@pytest.fixture
def four(tmp_path: Path) -> Iterator[list[NodeProcess]]:
    with Home(tmp_path, ENV, libp2p=False) as home, contextlib.ExitStack() as stack:
        first = stack.enter_context(home.node("n0"))
        nodes = [first, *(stack.enter_context(home.node(f"n{i}", join=first)) for i in (1, 2, 3))]
        for node in nodes:
            node.wait_members([other.peer_id for other in nodes if other is not node])
        yield nodes


def connect(node: NodeProcess, key_of: NodeProcess) -> object:
    return wetware.connect(node.addr, key=key_of.home.key())


async def test_a_put_with_copies_is_at_so_many_when_it_returns(four: list[NodeProcess]) -> None:
    home = four[0]
    data = os.urandom(3 * MIB)
    async with wetware.connect(home.addr, key=home.home.key()) as session:
        put = await session.blob.put(data, copies=3, ack=3)
        assert put.copies == 3
        (pin,) = await session.blob.pins(put.cid)
        assert len(set(pin.holders)) == 3
        assert str(home.peer_id) in pin.holders
    has = []
    for node in four:
        async with (
            wetware.connect(node.addr, key=home.home.key()) as session,
            session.blob.open(put.cid, local=True) as blob,
        ):
            with contextlib.suppress(wetware.errors.WetwareError):
                assert await blob.read() == data
                has.append(str(node.peer_id))
    assert set(has) == set(pin.holders)
