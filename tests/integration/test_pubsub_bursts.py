"""Bursts of several publishers over five nodes: nothing is lost, and each one's order is kept."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

import wetware
from wetware.testing import Home

pytestmark = pytest.mark.anyio

NODES, PUBLISHERS = 5, 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "count", [3000, pytest.param(100_000, marks=pytest.mark.long)], ids=["short", "long"]
)
async def test_bursts_of_four_publishers_over_five_nodes(home: Home, count: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        nodes = [stack.enter_context(home.node("n0"))]
        for number in range(1, NODES):
            nodes.append(stack.enter_context(home.node(f"n{number}", join=nodes[0])))
        for node in nodes:
            others = [other.peer_id for other in nodes if other is not node]
            await asyncio.to_thread(node.wait_members, others)
        key = home.key()
        topics: list[Any] = []
        subscriptions: list[Any] = []
        for node in nodes:
            session = await stack.enter_async_context(wetware.connect(node.addr, key=key))
            topics.append(await session.pubsub.join("bursts"))
            subscription = topics[-1].subscribe(slow="block")
            subscriptions.append(await stack.enter_async_context(subscription))
        async with asyncio.timeout(30):
            for topic in topics:  # until each node knows that all the others listen
                while (await topic.info()).peers < NODES - 1:
                    await asyncio.sleep(0.05)

        async def read(messages: Any) -> None:
            expected = dict.fromkeys(range(PUBLISHERS), 0)
            while min(expected.values()) < count:
                message = await anext(messages)
                who, number = map(int, message.data.split())
                assert number == expected[who], f"of {who}"
                expected[who] += 1
            assert messages.dropped == 0

        async def publish(who: int) -> None:
            texts = (b"%d %056d" % (who, number) for number in range(count))
            assert await topics[who].publish_all(texts) == count

        async with asyncio.timeout(500), asyncio.TaskGroup() as tasks:
            for messages in subscriptions:
                tasks.create_task(read(messages))
            for who in range(PUBLISHERS):
                tasks.create_task(publish(who))
