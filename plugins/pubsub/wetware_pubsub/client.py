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
from collections.abc import AsyncIterable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.errors import Disconnected, InternalError, InvalidArgument
from wetware.identity import PeerId
from wetware_pubsub.schema import SCHEMA

if TYPE_CHECKING:
    from types import TracebackType

READ_AHEAD_MAX = 1024
"""Messages that wait in this process for `async for`; beyond it the node is told to wait."""
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
        reply = await self._ref.call("join", topic=topic)
        if (ref := reply["topic"]) is None:
            raise InternalError(f"the node answered without a capability for the topic {topic!r}")
        return Topic(topic, ref)


class Topic:
    """One topic. Lives as long as its session.

    Attributes:
        name: Its name.
        ref: The capability, to pass on.
    """

    def __init__(self, name: str, ref: rpc.Ref) -> None:
        self.name, self.ref = name, ref

    def __repr__(self) -> str:
        return f"<Topic {self.name!r}>"

    async def publish(self, data: bytes | str) -> int:
        """Send a message; text is sent as UTF-8. Returns its seqno.

        Returns when the node has queued it for every peer and has room for more. Raises
        InvalidArgument if it is too long, Revoked, Expired, Denied, Disconnected, TimedOut.
        """
        raw = data.encode() if isinstance(data, str) else data
        reply: Any = await self.ref.call("publish", data=raw)
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

    def subscribe(self, *, buffer: int = 0) -> Subscription:
        """A subscription, to be entered with `async with`.

        Args:
            buffer: Messages that may wait at the node while this end is busy; 0 is its default.
                Beyond it the oldest are dropped and counted in `dropped`.
        """
        return Subscription(self, buffer)

    async def info(self) -> TopicInfo:
        """What the node knows of the topic."""
        reply: Any = await self.ref.call("info")
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


class _SinkServant(rpc.Servant, interface=SCHEMA.Sink):
    """Takes batches from the node, and answers when there is room for more."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    async def messages(self, **batch: Any) -> None:
        """The next messages."""
        await self._subscription._take(batch)

    def released(self) -> None:
        """The node let go: the subscription is over."""
        self._subscription._over()


class Subscription:
    """Messages of a topic, for one consumer: enter it with `async with`, read with `async for`.

    Raises from the loop what ended it: Revoked, Expired, Disconnected.

    Attributes:
        dropped: Messages that the node dropped because this end was too slow.
    """

    def __init__(self, topic: Topic, buffer: int) -> None:
        if buffer < 0:
            raise InvalidArgument("a buffer holds 1 message or more; 0 is the node's default")
        self._topic, self._buffer = topic, buffer
        self._ref: rpc.Ref | None = None
        self._messages: deque[Message] = deque()
        self._arrived, self._room = asyncio.Event(), asyncio.Event()
        self._released = self._closed = False
        self.dropped = 0

    async def __aenter__(self) -> Subscription:
        if self._ref is not None or self._closed:
            raise RuntimeError("a subscription is entered once")
        reply = await self._topic.ref.call(
            "subscribe", sink=_SinkServant(self), buffer=self._buffer
        )
        if reply is None or (ref := reply["subscription"]) is None:
            raise InternalError("the node answered without a subscription")
        self._ref = ref
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it now: the node is told by the release of the capability. Idempotent."""
        self._closed = True
        self._messages.clear()
        self._arrived.set()
        self._room.set()
        if self._ref is not None:
            self._ref.close()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Message:
        while not self._messages:
            if self._closed:
                raise StopAsyncIteration
            if self._released:
                await self._why()
            self._arrived.clear()
            await self._arrived.wait()
        message = self._messages.popleft()
        if len(self._messages) < READ_AHEAD_MAX // 2:
            self._room.set()
        return message

    async def stats(self) -> dict[str, Any]:
        """`delivered`, `dropped`, `buffered` (at the node) and `ended`."""
        if self._ref is None:
            raise RuntimeError("the subscription has not been entered")
        reply: Any = await self._ref.call("stats")
        return dict(reply)

    async def _take(self, batch: dict[str, Any]) -> None:
        publishers = [PeerId(p) for p in batch["publishers"]]
        try:
            self._messages.extend(
                Message(data, publishers[index], seqno)
                for data, seqno, index in zip(
                    batch["data"], batch["seqnos"], batch["publisher_of"], strict=True
                )
            )
        except (ValueError, IndexError):
            raise InvalidArgument("the batch's lists do not fit together") from None
        self.dropped += batch["dropped"]
        self._arrived.set()
        while len(self._messages) >= READ_AHEAD_MAX and not self._closed:
            self._room.clear()
            await self._room.wait()

    def _over(self) -> None:
        self._released = True
        self._arrived.set()

    async def _why(self) -> None:
        """The node let go of the sink: raise the reason."""
        self._closed = True
        await self.stats()  # raises it, if the node or the network did
        raise Disconnected(
            "the node ended the subscription", hint="subscribe again", code="overlay.disconnected"
        )
