"""Patterns over two nodes, and grants that are too narrow for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import wetware
from wetware.errors import Denied, InvalidArgument, Revoked
from wetware.testing import NodeProcess

pytestmark = pytest.mark.anyio


async def _heard(messages: Any, publish: Any) -> Any:
    """The first message, publishing again until the subscription is known where that is done."""
    first = asyncio.create_task(anext(messages))
    async with asyncio.timeout(60):
        while not first.done():
            await publish()
            await asyncio.wait([first], timeout=0.1)
    return first.result()


async def test_a_pattern_hears_what_it_matches_from_another_node_and_nothing_else(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, b = pair
    key = a.home.key()
    async with (
        wetware.connect(a.addr, key=key) as at_a,
        wetware.connect(b.addr, key=key) as at_b,
    ):
        eu, us, deep = [
            await at_a.pubsub.join(f"orders.{name}") for name in ("eu.new", "us.new", "eu.new.x")
        ]
        async with (await at_b.pubsub.join("orders.eu.*")).subscribe() as messages:
            await _heard(messages, lambda: eu.publish(b"first"))
            for number in range(100):
                await us.publish(b"no")
                await deep.publish(b"no")
                await eu.publish(b"%d" % number)
            got = []
            while not got or got[-1] != b"99":
                message = await anext(messages)
                assert message.topic == "orders.eu.new"
                got.append(message.data)
            assert [data for data in got if data != b"first"] == [b"%d" % n for n in range(100)]


async def test_a_narrower_grant_subscribes_no_wider_pattern(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, _ = pair
    async with wetware.connect(a.addr, key=a.home.key()) as session:
        for where, allowed, refused in (
            ("topic=subject:a.b.>", ["a.b.>", "a.b.*", "a.b.c"], ["a.>", "a.*.c", "a.b", "b"]),
            ("topic=glob:?.?", ["a.b"], ["a.*", "a.>"]),
            ("topic=glob:a.*", ["a.>", "a.b"], ["b.>"]),
            ("topic=a.b", ["a.b"], ["a.*", "a.>"]),
            ("topic=max:4", ["a.b"], ["a.>"]),
        ):
            narrow = await session.attenuate({"pubsub": ["*"]}, where=[where])
            for name in allowed:
                await narrow.pubsub.join(name)
            for name in refused:
                with pytest.raises(Denied):
                    await narrow.pubsub.join(name)
        with pytest.raises(InvalidArgument, match="does not fit"):
            await session.attenuate({"pubsub": ["*"]}, where=["topic=a.>"])


async def test_a_shared_pattern_is_heard_until_it_is_revoked(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, _ = pair
    async with wetware.connect(a.addr, key=a.home.key()) as session:
        ref, grant = await session.share({"pubsub:jobs.a.>": []})
        async with wetware.connect(ref) as guest:
            topic = await session.pubsub.join("jobs.a.x")
            with pytest.raises(Denied):
                await guest.pubsub.join("jobs.>")
            async with (await guest.pubsub.join("jobs.a.>")).subscribe() as messages:
                await (await session.pubsub.join("jobs.b")).publish(b"not for it")
                await topic.publish(b"1")
                assert (await anext(messages)).data == b"1"
                await session.revoke(grant.id)
                with pytest.raises(Revoked):
                    await anext(messages)
