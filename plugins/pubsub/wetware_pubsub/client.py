"""`session.pubsub`: topics for applications.

topic = await session.pubsub.join("chat")
await topic.publish("hello")
async with topic.subscribe() as messages:
    async for message in messages:
        print(message.publisher, message.data)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from wetware import rpc
from wetware.errors import InternalError, InvalidArgument
from wetware.identity import PeerId
from wetware_pubsub.schema import SCHEMA

IN_FLIGHT_MAX = 64
"""Publishes of `publish_all` that wait for the node's answer."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a topic.

    Attributes:
        data: What was published.
        publisher: The node that it was published at, which signed it.
        seqno: Unique among the messages of that node.
    """

    data: bytes
    publisher: PeerId
    seqno: int


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """What the node knows of a topic.

    Attributes:
        name: The topic.
        subscribers: Subscriptions at this node.
        peers: Other nodes that are subscribed, as far as this node knows.
        mesh: Of these, the ones that messages are exchanged with in full.
    """

    name: str
    subscribers: int
    peers: int
    mesh: int


class PubSub:
    """The service `pubsub` of a session.

    Args:
        ref: A reference to a PubSub.
    """

    INTERFACE = SCHEMA.PubSub

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    async def join(self, topic: str) -> Topic:
        """The capability of a topic.

        Raises InvalidArgument for a name that is none, Denied if the grant does not cover it.
        """
        return Topic(topic, await self._join(topic), self._join)

    async def _join(self, topic: str) -> rpc.Ref:
        reply = await self._ref.call("join", topic=topic)
        ref: rpc.Ref | None = reply["topic"]
        if ref is None:
            raise InternalError(f"the node answered without a capability for the topic {topic!r}")
        return ref


class Topic:
    """One topic. Lives as long as its session, and is joined again with it.

    Attributes:
        name: Its name.
        ref: The capability, to pass on.
    """

    def __init__(self, name: str, ref: rpc.Ref, join: Callable[[str], Awaitable[rpc.Ref]]) -> None:
        self.name, self.ref, self._join = name, ref, join

    async def _call(self, method: str, **params: object) -> Any:
        if self.ref.closed:  # with its connection
            self.ref = await self._join(self.name)
        return await self.ref.call(method, **params)

    def __repr__(self) -> str:
        return f"<Topic {self.name!r}>"

    async def publish(self, data: bytes | str) -> int:
        """Send a message; text is sent as UTF-8. Returns its seqno.

        Returns when the node has queued it for every peer and has room for more. Raises
        InvalidArgument if it is too long, Revoked, Expired, Denied, Disconnected, TimedOut.
        """
        raw = data.encode() if isinstance(data, str) else data
        reply: Any = await self._call("publish", data=raw)
        seqno: int = reply["seqno"]
        return seqno

    async def publish_all(self, source: AsyncIterable[bytes | str] | Iterable[bytes | str]) -> int:
        """Send everything from `source`, in order, as fast as the node takes it.

        At most IN_FLIGHT_MAX messages wait for its answer. Returns how many were published; raises
        like `publish`, after which up to IN_FLIGHT_MAX messages may have been sent or not.
        """
        in_flight: deque[asyncio.Task[int]] = deque()
        count = 0
        try:
            async for data in _items(source):
                with rpc.time_limit(None):  # it waits as long as the node has no room
                    in_flight.append(asyncio.create_task(self.publish(data)))
                if len(in_flight) >= IN_FLIGHT_MAX or in_flight[0].done():
                    await in_flight[0]
                    in_flight.popleft()
                    count += 1
            while in_flight:
                await in_flight[0]
                in_flight.popleft()
                count += 1
        finally:
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)
        return count

    def subscribe(self, *, buffer: int = 0) -> rpc.Subscription[Message]:
        """A subscription, to be entered with `async with` and read with `async for`.

        Args:
            buffer: Messages that may wait at the node while this end is busy; 0 is its default.
                Beyond it the oldest are dropped and counted in `dropped`.
        """
        if buffer < 0:
            raise InvalidArgument("a buffer holds 1 message or more; 0 is the node's default")
        return rpc.Subscription(
            lambda sink: self._call("subscribe", sink=sink, buffer=buffer), _message
        )

    async def info(self) -> TopicInfo:
        """What the node knows of the topic."""
        reply: Any = await self._call("info")
        return TopicInfo(reply["name"], reply["subscribers"], reply["peers"], reply["mesh"])


async def _items(
    source: AsyncIterable[bytes | str] | Iterable[bytes | str],
) -> Any:
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item
            await asyncio.sleep(0)


def _message(item: bytes) -> Message:
    """See `Topic.subscribe` in pubsub.capnp; raises InvalidArgument."""
    data_at = 9 + (item[8] if len(item) > 8 else 0)
    publisher = item[9:data_at]
    if len(item) < data_at or not publisher.isascii():
        raise InvalidArgument("the node sent what is no message", code="invalid.message")
    return Message(item[data_at:], PeerId(publisher.decode()), int.from_bytes(item[:8]))
