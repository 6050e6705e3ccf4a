"""`session.pubsub`: topics for applications.

topic = await session.pubsub.join("chat")
await topic.publish("hello")
async with topic.publisher() as publisher:
    for line in lines:
        await publisher.publish(line)  # waits only where there is no room
async with topic.subscribe() as messages:
    async for message in messages:
        print(message.publisher, message.principal, message.data)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count, groupby, repeat
from typing import Any, NamedTuple, TypeAlias

from wetware import rpc
from wetware.errors import Denied, InternalError, InvalidArgument, LimitExceeded, TimedOut
from wetware.identity import PeerId, Principal
from wetware_pubsub import frames
from wetware_pubsub.requesting import ANSWERS_MAX, Answer, Answers, Handler, Request, Serving
from wetware_pubsub.schema import SCHEMA

__all__ = [
    "Answer",
    "Answers",
    "Batch",
    "Message",
    "Messages",
    "PubSub",
    "Publisher",
    "Request",
    "Serving",
    "Topic",
    "TopicInfo",
]

_OF_ONE = (Denied, LimitExceeded, InvalidArgument)
"""Errors of a call that are about its first message; others are about all that wait."""


class Message(NamedTuple):
    """A message of a topic.

    Attributes:
        data: What was published.
        publisher: The node that it was published at, which signed it.
        seqno: Unique among the messages of that node.
        principal: By whose grant it was published, as that node attests: it can lie about its own
            users, and about nobody else's. None in a raw topic.
        time: When that node took it, Unix time in s by its clock. None in a raw topic.
        topic: The name that it was published to, also where a pattern is subscribed.
    """

    data: bytes
    publisher: PeerId
    seqno: int
    principal: Principal | None
    time: float | None
    topic: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages that were published, signed and sent together.

    Attributes:
        data: What was published, in order.
        publisher: See Message; so for `principal`, `time` and `topic`.
        seqno: That of the first; the others' follow.
    """

    data: list[bytes]
    publisher: PeerId
    seqno: int
    principal: Principal | None
    time: float | None
    topic: str

    def messages(self) -> list[Message]:
        """Each as an object of its own."""
        same = map(repeat, (self.principal, self.time, self.topic))
        each = zip(self.data, repeat(self.publisher), count(self.seqno), *same, strict=False)
        return list(map(Message._make, each))


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

    async def join(self, topic: str, *, raw: bool = False) -> Topic:
        """The capability of a topic, or of all that match a pattern: `orders.*.new`, `orders.>`.

        `*` is any token between dots, and `>` in the last place one or more; the first token is
        neither. A pattern can be subscribed, and needs a grant of all that it matches. A `raw`
        topic is for peers of other implementations: each message travels alone, as GossipSub knows
        it. Raises InvalidArgument for a name that is none, Denied if the grant does not cover it.
        """
        join = partial(self._join, topic, raw)
        return Topic(topic, await join(), join, raw=raw)

    async def request(self, topic: str, data: bytes | str, *, timeout_s: float = 5.0) -> Answer:
        """Join a topic and ask who serves it: see `Topic.request`."""
        return await (await self.join(topic)).request(data, timeout_s=timeout_s)

    async def _join(self, topic: str, raw: bool) -> rpc.Ref:
        reply = await self._ref.call("join", topic=topic, raw=raw)
        ref: rpc.Ref | None = reply["topic"]
        if ref is None:
            raise InternalError(f"the node answered without a capability for the topic {topic!r}")
        return ref


class Topic:
    """One topic. Lives as long as its session, and is joined again with it.

    Attributes:
        name: Its name.
        raw: Whether each message travels alone.
        ref: The capability, to pass on.
    """

    def __init__(
        self, name: str, ref: rpc.Ref, join: Callable[[], Awaitable[rpc.Ref]], *, raw: bool = False
    ) -> None:
        self.name, self.ref, self.raw, self._join = name, ref, raw, join
        self._queue = _Queue(self._call, values_max=1 if raw else rpc.packed.VALUES_MAX)

    async def _call(self, method: str, **params: object) -> Any:
        if self.ref.closed:  # with its connection
            self.ref = await self._join()
        return await self.ref.call(method, **params)

    def __repr__(self) -> str:
        return f"<Topic {self.name!r}>"

    async def publish(self, data: bytes | str) -> int:
        """Send a message; text is sent as UTF-8. Returns its seqno.

        It is sent at once, unless another one is on its way: then with all that were published
        meanwhile. Returns when the node has queued it for every peer and has room for more. Raises
        InvalidArgument if it is too long, Revoked, Expired, Denied, Disconnected, TimedOut.
        """
        return await self._queue.put(_raw(data), self.ref.limit_s)

    def publisher(self) -> Publisher:
        """To publish much without waiting for each; enter it with `async with`."""
        return Publisher(self._queue)

    async def publish_all(self, source: AsyncIterable[bytes | str] | Iterable[bytes | str]) -> int:
        """Send everything from `source`, in order, as fast as the node takes it.

        Returns how many were published; raises like `publish`, after which messages that came from
        `source` before may have been sent or not.
        """
        async with self.publisher() as publisher:
            if isinstance(source, AsyncIterable):
                async for data in source:
                    await publisher.publish(data)
            else:
                for data in source:
                    await publisher.publish(data)
        return publisher.published

    def subscribe(
        self, *, buffer: int = 0, slow: rpc.Slow | str = rpc.Slow.DROP_OLDEST
    ) -> Messages:
        """A subscription, to be entered with `async with` and read with `async for`.

        Args:
            buffer: Messages that may wait at the node while this end is busy; 0 is its default.
            slow: What is done beyond it: "dropOldest", "dropNewest" (counted in `dropped`, and
                whole frames of messages that were published together), "disconnect" (the loop
                raises LimitExceeded), or "block": nothing is dropped, publishers wait.
        """
        if buffer < 0:
            raise InvalidArgument("a buffer holds 1 message or more; 0 is the node's default")
        try:
            policy = str(rpc.Slow(slow))
        except ValueError:
            raise InvalidArgument(
                f"{slow[:40]!r} is nothing that a subscriber can be",
                hint=f"one of {', '.join(rpc.Slow)}",
            ) from None
        return Messages(
            rpc.Subscription(
                lambda sink: self._call("subscribe", sink=sink, buffer=buffer, slow=policy),
                partial(_batch, self.name, raw=self.raw),
            )
        )

    async def request(self, data: bytes | str, *, timeout_s: float = 5.0) -> Answer:
        """Ask one of those who serve the topic, at any node, and return what it answers.

        Nothing is asked twice. Raises NotFound "not_found.responder" at once if nobody serves, and
        "not_found.answer" if the one that was asked gives none; what that raises; Disconnected if
        it is gone, or its grant is; TimedOut; LimitExceeded "limit.requests".
        """
        async with Answers(partial(self._request, _raw(data), 1), timeout_s) as answers:
            async for answer in answers:
                return answer
        raise InternalError("the request ended with neither an answer nor an error")

    def request_many(
        self, data: bytes | str, *, count: int = ANSWERS_MAX, timeout_s: float = 5.0
    ) -> Answers:
        """Ask all who serve the topic; `async with` it, and read answers with `async for`.

        The loop ends after `count` answers (2 to ANSWERS_MAX), when all are done, or after
        `timeout_s`. Without any answer it raises as `request` does.
        """
        if not 2 <= count <= ANSWERS_MAX:
            raise InvalidArgument(f"a request has 2 to {ANSWERS_MAX} answers; `request` has one")
        return Answers(partial(self._request, _raw(data), count), timeout_s)

    async def _request(self, data: bytes, count: int, inbox: rpc.Servant) -> None:
        await self._call("request", data=data, inbox=inbox, count=count)

    def serve(self, handler: Handler) -> Serving:
        """Answer requests for the topic, or for all that match the pattern, within `async with`.

        `handler` is an async function of a Request that returns the answer, or an async generator
        of several. Requests are handled at once, each in a task of its own.
        """
        return Serving(lambda responder: self._call("serve", responder=responder), handler)

    async def info(self) -> TopicInfo:
        """What the node knows of the topic."""
        reply: Any = await self._call("info")
        return TopicInfo(reply["name"], reply["subscribers"], reply["peers"], reply["mesh"])


# --- publishing -----------------------------------------------------------------------------------


class Publisher:
    """Publishes without waiting for each message; `async with` waits for all at its end.

    Attributes:
        published: Messages that the node took.
        waiting: Messages that it has not answered for.
        error: What the first message met with that was refused; those after it are not sent.
    """

    def __init__(self, queue: _Queue) -> None:
        self._queue = queue
        self.published = self.waiting = 0
        self.error: Exception | None = None

    async def publish(self, data: bytes | str) -> None:
        """Send a message; text is sent as UTF-8. Waits only where there is no room.

        Raises what an earlier message met with, as `Topic.publish` does.
        """
        if self.error is not None:
            raise self.error
        self.waiting += 1
        self._queue.add(data if type(data) is bytes else _raw(data), self)
        if self._queue.is_full:
            await self._queue.room()

    async def flush(self) -> None:
        """Wait until the node has taken everything; raises like `publish`."""
        while self.waiting and self.error is None:
            await self._queue.turn()
        if self.error is not None:
            raise self.error

    async def __aenter__(self) -> Publisher:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is None:
            await self.flush()
        else:
            self.error = self.error or InvalidArgument("this publisher was left")


_Owner: TypeAlias = "asyncio.Future[int] | Publisher"
"""Who is told what became of a message."""


class _Queue:
    """What is published while a call is in flight: it goes with the next one.

    There is one call at a time: where the node takes only a part of it, the rest goes before all
    that was published later.

    Args:
        call: Calls a method of the topic.
        values_max: Messages of one call.
    """

    def __init__(self, call: Callable[..., Awaitable[Any]], *, values_max: int) -> None:
        self._call, self._values_max, self._values = call, values_max, values_max
        self._data: list[bytes] = []
        self._owners: list[_Owner] = []  # of each
        self._bytes = 0
        self._in_flight = False
        self._sender: asyncio.Task[None] | None = None
        self._turns: list[asyncio.Future[None]] = []

    @property
    def is_full(self) -> bool:
        """Whether who has more to publish should wait for room."""
        return self._bytes >= frames.PACK_BYTES or len(self._data) >= rpc.packed.VALUES_MAX

    async def room(self) -> None:
        """Wait until there is some."""
        while self.is_full:
            await self.turn()

    async def turn(self) -> None:
        """Wait until something was taken for a call, or the next one is over."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        await turn

    async def put(self, data: bytes, limit_s: float | None) -> int:
        """Publish one message, and wait for its seqno, `limit_s` at most."""
        if not self._in_flight:
            return await self._at_once(data)
        owner = asyncio.get_running_loop().create_future()
        self.add(data, owner)
        try:
            async with asyncio.timeout(limit_s) as scope:
                seqno: int = await owner
                return seqno
        except TimeoutError:
            if not scope.expired():
                raise
            raise TimedOut(
                f"Topic.publish: no answer within {limit_s:g} s; it may or may not be published",
                hint="give it more time: `wetware.time_limit(SECONDS)`",
            ) from None

    async def _at_once(self, data: bytes) -> int:
        self._in_flight = True
        try:
            return int((await self._call("publish", data=data))["seqno"])
        finally:
            self._in_flight = False
            self._start()

    def add(self, data: bytes, owner: _Owner) -> None:
        """Publish a message; `owner` is told what became of it."""
        self._data.append(data)
        self._owners.append(owner)
        self._bytes += len(data)
        if not self._in_flight:
            self._start()

    def _start(self) -> None:
        if self._data and not self._in_flight:
            self._in_flight = True
            with rpc.time_limit(None):  # a node without room takes its time; who waits has a limit
                self._sender = asyncio.create_task(self._send_all(), name="pubsub.publish")

    async def _send_all(self) -> None:
        """Send what waits, a frame at a time, until nothing does."""
        try:
            while self._data:
                data, owners = self._take()
                self._end_turn()  # there is room: the next frame fills while this one is away
                if data:
                    await self._send(data, owners)
                self._end_turn()
        finally:
            self._in_flight = False
            self._end_turn()

    def _end_turn(self) -> None:
        turns, self._turns = self._turns, []
        for turn in turns:
            if not turn.done():
                turn.set_result(None)

    def _take(self) -> tuple[list[bytes], list[_Owner]]:
        """What goes with the next call, without what nobody waits for any more."""
        if not all(map(_waits, set(self._owners))):
            waiting = [w for w in zip(self._data, self._owners, strict=True) if _waits(w[1])]
            self._put([data for data, _ in waiting], [owner for _, owner in waiting])
        ends = accumulate(map(len, self._data[: self._values]))
        count = max(1, sum(end <= frames.PACK_BYTES for end in ends))
        data, owners = self._data[:count], self._owners[:count]
        self._put(self._data[count:], self._owners[count:])
        return data, owners

    def _put(self, data: list[bytes], owners: list[_Owner]) -> None:
        self._data, self._owners, self._bytes = data, owners, sum(map(len, data))

    async def _send(self, data: list[bytes], owners: list[_Owner]) -> None:
        params = {"data": data[0]}
        if len(data) > 1:
            params["data"], params["lengths"] = rpc.packed.pack(data)
        try:
            reply = await self._call("publish", **params)
            taken, seqno = reply["taken"], reply["seqno"]
            if not 1 <= taken <= len(data):
                raise InternalError(f"the node took {taken} of {len(data)} messages")  # noqa: TRY301
        except _OF_ONE as exc:  # of the first one; the others have not been judged
            taken = 1
            _fail(owners[0], exc)
        except Exception as exc:  # whatever it is: it is for all who wait
            for owner in {*owners, *self._owners}:
                _fail(owner, exc)
            self._put([], [])
            return
        else:
            # What a grant lets through one by one is not sent in vain again and again.
            full = taken == len(data)
            self._values = min(self._values_max, 2 * self._values) if full else taken
            for owner, run in groupby(owners[:taken]):
                seqno += _tell(owner, seqno, len(list(run)))
        if taken < len(data):
            self._put(data[taken:] + self._data, owners[taken:] + self._owners)


def _waits(owner: _Owner) -> bool:
    return owner.error is None if isinstance(owner, Publisher) else not owner.done()


def _tell(owner: _Owner, seqno: int, count: int) -> int:
    """Its next messages were published; returns how many."""
    if isinstance(owner, Publisher):
        owner.published += count
        owner.waiting -= count
    elif not owner.done():
        owner.set_result(seqno)
    return count


def _fail(owner: _Owner, error: Exception) -> None:
    if isinstance(owner, Publisher):
        owner.error = owner.error or error
    elif not owner.done():
        owner.set_exception(error)


def _raw(data: bytes | str) -> bytes:
    if type(data) is bytes:
        return data
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise TypeError(f"Topic.publish: data: expected bytes, not {type(data).__name__}")


# --- subscribing ----------------------------------------------------------------------------------


class Messages:
    """A subscription: enter it with `async with`, read it with `async for`.

    Raises from the loop what ended it: Revoked, Expired, Disconnected. Where the connection was
    lost and the application has another one (`connect(reconnect=True)`), it subscribes there and
    goes on.

    Attributes:
        batches: The same by whole batches, for who has no need for an object for each message. Read
            one of the two.
    """

    def __init__(self, batches: rpc.Subscription[Batch]) -> None:
        self.batches = batches
        self._ready: deque[Message] = deque()

    @property
    def dropped(self) -> int:
        """Messages that the node dropped because this end was too slow."""
        return self.batches.dropped

    @property
    def gap_s(self) -> float:
        """For how long in all it was not subscribed because the connection was lost."""
        return self.batches.gap_s

    async def stats(self) -> dict[str, Any]:
        """`delivered`, `dropped`, `buffered` (at the node), in messages, and `ended`."""
        return await self.batches.stats()

    async def __aenter__(self) -> Messages:
        await self.batches.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it now. Idempotent."""
        self._ready.clear()
        self.batches.close()

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> Message:
        while not self._ready:
            self._ready.extend((await anext(self.batches)).messages())
        return self._ready.popleft()


def _batch(name: str, item: bytes, *, raw: bool) -> Batch:
    """See `Topic.subscribe` in pubsub.capnp; raises InvalidArgument."""
    try:
        start = 9 + item[8]
        publisher = PeerId(item[9:start].decode("ascii"))
        seqno = int.from_bytes(item[:8], "big")
        if len(item) < start:
            raise ValueError("its publisher is cut off")  # noqa: TRY301
        if raw:
            return Batch([item[start:]], publisher, seqno, None, None, name)
        frame = frames.decode(item, start)
    except (ValueError, IndexError, InvalidArgument) as exc:
        raise InvalidArgument(
            f"the node sent what is no message: {exc}", code="invalid.message"
        ) from None
    data = rpc.packed.unpack(item, frame.lengths, frame.at)
    return Batch(data, publisher, seqno, frame.principal, frame.time, frame.subject or name)
