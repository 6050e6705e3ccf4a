"""Requests and responders, as an application has them.

answer = await session.pubsub.request("sum", b"1 2", timeout_s=1)
async with topic.serve(handler) as serving:
    await serving.wait()
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any, Final, NamedTuple, TypeAlias

from wetware import rpc
from wetware.errors import InvalidArgument, TimedOut, WetwareError
from wetware.identity import PeerId, Principal
from wetware_pubsub.schema import SCHEMA

ANSWERS_MAX: Final = 1024
"""Answers of one request."""
_WAITING_MAX: Final = 16
"""Answers that wait for the application; who gives more waits."""


class Request(NamedTuple):
    """What a responder is asked.

    Attributes:
        data: The request.
        topic: The name that it was sent to, also where a pattern is served.
        principal: By whose grant it was sent, as the requester's node says.
        node: That node.
    """

    data: bytes
    topic: str
    principal: Principal
    node: PeerId


class Answer(NamedTuple):
    """What a responder answered.

    Attributes:
        data: The answer.
        principal: By whose grant it serves, as its node says.
        node: That node.
    """

    data: bytes
    principal: Principal
    node: PeerId


Handler: TypeAlias = (
    "Callable[[Request], Awaitable[bytes | str | None] | AsyncIterable[bytes | str]]"
)
"""Answers with what it returns, unless that is None, or with each thing that it yields."""


class Answers(rpc.Servant, interface=SCHEMA.Inbox):
    """The answers to a request: enter it with `async with`, read them with `async for`.

    The loop ends after `count` answers, when all who were asked are done, or when the time is over.
    So it does where sixteen answers have waited for it for the node's `publish_wait_s`.
    It raises what `Topic.request` does, if there was no answer. It is also the inbox.

    Attributes:
        complete: Whether it has ended otherwise than by its time.
    """

    def __init__(self, ask: Callable[[rpc.Servant], Awaitable[Any]], timeout_s: float) -> None:
        if not timeout_s > 0:
            raise InvalidArgument("a request needs some time: timeout_s is above 0")
        self._ask, self._timeout_s = ask, timeout_s
        self._waiting: asyncio.Queue[Answer | None] = asyncio.Queue(_WAITING_MAX)
        self._until = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._error: WetwareError | None = None
        self._had = self._over = False
        self.complete = False

    async def answer(self, data: bytes, principal: str, node: str) -> None:
        """For responders, through their nodes; see pubsub.capnp."""
        await self._waiting.put(Answer(data, Principal.parse(principal), PeerId(node)))

    async def __aenter__(self) -> Answers:
        if self._asking is not None:
            raise RuntimeError("a request is entered once")
        self._until = asyncio.get_running_loop().time() + self._timeout_s
        with rpc.time_limit(None):  # it is over before
            self._asking = asyncio.create_task(self._run(), name="pubsub.request")
        return self

    async def _run(self) -> None:
        try:
            await self._ask(self)
        except WetwareError as exc:
            self._error = exc
        await self._waiting.put(None)

    async def __aexit__(self, *_: object) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> Answer:
        if self._over:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout_at(self._until) as scope:
                answer = await self._waiting.get()
        except TimeoutError:
            if not scope.expired():
                raise
            self._over = True
            if self._had:
                raise StopAsyncIteration from None
            raise TimedOut(
                f"Topic.request: no answer within {self._timeout_s:g} s; it may or may not be done",
                hint="give it more time: `timeout_s`",
            ) from None
        if answer is not None:
            self._had = True
            return answer
        self._over = True
        if self._error is not None and not self._had:
            raise self._error
        self.complete = self._error is None
        raise StopAsyncIteration


class Serving(rpc.Servant, interface=SCHEMA.Responder):
    """A responder, from `async with` to its end; each request is handled in a task of its own.

    A handler is cancelled when nobody waits for its answer any more. What it raises of
    `wetware.errors` its requester gets; anything else as an internal error.
    """

    def __init__(self, start: Callable[[rpc.Servant], Awaitable[Any]], handler: Handler) -> None:
        self._start, self._handler = start, handler
        self._ref: rpc.Ref | None = None
        self._released = asyncio.Event()

    async def handle(
        self, data: bytes, topic: str, principal: str, node: str, inbox: rpc.Ref | None
    ) -> None:
        """For the node; see pubsub.capnp."""
        if inbox is None:
            raise InvalidArgument("a request needs an inbox", code="invalid.request")
        answered = self._handler(Request(data, topic, Principal.parse(principal), PeerId(node)))
        if isinstance(answered, AsyncIterable):
            async for each in answered:
                await _answer(inbox, each)
        elif (given := await answered) is not None:
            await _answer(inbox, given)

    def released(self) -> None:
        """The node let go: it has ended."""
        self._released.set()

    async def __aenter__(self) -> Serving:
        self._ref = (await self._start(self))["subscription"]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._ref is not None:
            self._ref.close()

    async def wait(self) -> None:
        """Wait for its end; raises what ended it: Revoked, Expired, Disconnected."""
        await self._released.wait()
        if self._ref is not None:
            await self._ref.call("stats")


async def _answer(inbox: rpc.Ref, data: bytes | str) -> None:
    raw = data.encode() if isinstance(data, str) else data
    await inbox.call("answer", data=raw, principal="", node="")
