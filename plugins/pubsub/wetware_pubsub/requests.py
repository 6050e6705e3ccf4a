"""Requests: messages that are answered, by whoever serves their topic.

Nothing of them is gossiped but which nodes have somebody that serves. A request goes over RPC to
one responder, or to each, and its inbox with it: a capability that only a responder which was
handed it can answer on, and that is over with the request. All of it lives as long as the
requester's call does.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.base.subjects import covers
from wetware.errors import (
    AuthError,
    CapabilityError,
    Disconnected,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    OverlayError,
    WetwareError,
    stopping,
)
from wetware_pubsub.names import ASKED, check_topic, is_pattern, mesh
from wetware_pubsub.router import too_long
from wetware_pubsub.schema import SCHEMA

if TYPE_CHECKING:
    from wetware.hookspecs import PluginContext
    from wetware.identity import PeerId, Principal
    from wetware_pubsub.gossip import Gossip

REQUEST_S_MAX: Final = 3600.0
"""No request is in flight for longer, whatever its requester says."""
REQUESTS_MAX: Final = 256
"""Requests of one principal in flight at a node, and of one responder."""
RESPONDERS_MAX: Final = 1024
"""Over all sessions of a node."""
ASKED_MAX: Final = 256
"""Nodes that one request goes to."""
_ANSWERS_MAX: Final = 1 << 32
"""Of what another node asks: that node has the bound."""
_NOBODY: Final = "not_found.responder"
_BUSY: Final = "limit.requests"


def nobody(topic: str) -> NotFound:
    return NotFound(
        f"nobody serves the topic {topic!r}",
        hint="start a responder: `async with topic.serve(handler)`",
        code=_NOBODY,
    )


def _busy(what: str) -> LimitExceeded:
    return LimitExceeded(
        f"{what} has {REQUESTS_MAX} requests in flight", hint="wait for some of them", code=_BUSY
    )


class Answers:
    """How many answers a request has had, and may still have."""

    def __init__(self, count: int) -> None:
        self._count, self.given, self.over = count, 0, False
        self.full = asyncio.Event()

    def begin(self) -> None:
        """An answer is on its way; raises NotFound where none is wanted any more."""
        if self.over or self.given >= self._count:
            raise NotFound(
                "the request is over: this answer came too late, or is one too many",
                hint="a handler that is cancelled has nobody to answer",
                code="not_found.request",
            )
        self.given += 1

    def arrived(self) -> None:
        if self.given >= self._count:
            self.full.set()


class InboxServant(rpc.Servant, interface=SCHEMA.Inbox):
    """A relay to an inbox, for one responder: what it says of who answers is its node's word.

    Args:
        to: The inbox.
        answers: Bounds what goes there.
        bytes_max: Of an answer.
        principal: Who answers; "": as the one that is nearer says.
        node: Where; likewise.
    """

    def __init__(
        self, to: rpc.Ref, answers: Answers, bytes_max: int, *, principal: str = "", node: str = ""
    ) -> None:
        self._to, self._answers, self._bytes_max = to, answers, bytes_max
        self._principal, self._node = principal, node

    async def answer(self, data: bytes, principal: str, node: str) -> None:
        if len(data) > self._bytes_max:
            raise too_long(len(data), self._bytes_max)
        self._answers.begin()
        who, where = self._principal or principal, self._node or node
        await self._to.call("answer", data=data, principal=who, node=where)
        self._answers.arrived()


class Serving(rpc.Servant, interface=rpc.WW.Subscription):
    """A responder at this node, until it is cancelled or released, and as long as its grant.

    Attributes:
        principal: Whose it is.
        in_flight: Its requests.
    """

    def __init__(self, responder: rpc.Ref, principal: str) -> None:
        self._responder: rpc.Ref | None = responder
        self.principal = principal
        self.in_flight: set[asyncio.Task[Any]] = set()
        self._on_end: Callable[[Serving], None] | None = None
        self._unguard: Callable[[], None] | None = None
        self._delivered = 0
        self._reason: WetwareError | None = None

    def start(self, on_end: Callable[[Serving], None]) -> None:
        """End with `rpc.current_guard()`, and call back then."""
        self._on_end = on_end
        if (guard := rpc.current_guard()) is not None:
            unguard = guard.on_end(self.end)
            if self._responder is not None:
                self._unguard = unguard

    def end(self, reason: WetwareError | None = None) -> None:
        """Stop now, requests in flight included. Idempotent."""
        if (responder := self._responder) is None:
            return
        self._reason = reason
        on_end, unguard = self._on_end, self._unguard
        self._responder = self._on_end = self._unguard = None
        for task in self.in_flight:
            task.cancel()
        responder.close()
        if unguard is not None:
            unguard()
        if on_end is not None:
            on_end(self)

    async def cancel(self) -> None:
        self.end()

    async def stats(self) -> dict[str, object]:
        if self._reason is not None:
            raise self._reason.with_traceback(None)
        ended = self._responder is None
        buffered = len(self.in_flight)
        return {"delivered": self._delivered, "dropped": 0, "buffered": buffered, "ended": ended}

    def released(self) -> None:
        self.end()

    async def handle(self, request: dict[str, object], inbox: rpc.Servant) -> None:
        """Hand it a request; returns when it is done with it.

        Raises what it raises; Disconnected where it is gone, or has lost its grant.
        """
        if (responder := self._responder) is None:
            raise _gone()
        if len(self.in_flight) >= REQUESTS_MAX:
            raise _busy("the responder")
        with rpc.time_limit(None):  # the requester has its own
            task = asyncio.create_task(responder.call("handle", inbox=inbox, **request))
        self.in_flight.add(task)
        self._delivered += 1
        try:
            await asyncio.wait([task])
            if task.cancelled():
                raise _gone()
            if (error := task.exception()) is not None:
                # Its trouble with its own grant or connection is not the requester's.
                if isinstance(error, (CapabilityError, OverlayError, AuthError)):
                    if responder.closed:
                        self.end()
                    raise _gone() from error
                raise error
        finally:
            task.cancel()
            self.in_flight.discard(task)


def _gone() -> Disconnected:
    return Disconnected(
        "the responder is gone, or was stopped; it may have done what was asked, in part",
        hint="ask again if it may be done twice",
        code="overlay.disconnected.responder",
    )


class Requests:
    """Who serves what at this node, and requests to them and to others.

    Args:
        ctx: The plugin's context.
        gossip: Tells other nodes that somebody here serves names of a mesh.
        prefix: Of names on the wire.
    """

    def __init__(self, ctx: PluginContext, gossip: Gossip, prefix: str) -> None:
        self._ctx, self._gossip, self._prefix = ctx, gossip, prefix
        self._servings: dict[str, dict[Serving, tuple[str, ...]]] = {}  # by mesh
        self._in_flight: Counter[Principal] = Counter()

    def end(self) -> None:
        """The service stops."""
        for serving in [s for servings in self._servings.values() for s in servings]:
            serving.end(stopping())

    def serve(self, name: str, principal: Principal, responder: rpc.Ref | None) -> Serving:
        """Hand requests for what matches `name` to it; raises LimitExceeded, InvalidArgument."""
        if responder is None:
            raise InvalidArgument("no responder was given", code="invalid.responder")
        if sum(map(len, self._servings.values())) >= RESPONDERS_MAX:
            raise LimitExceeded(f"{RESPONDERS_MAX} responders serve at this node already")
        topic, serving = mesh(name), Serving(responder, str(principal))

        def ended(serving: Serving) -> None:
            servings = self._servings[topic]
            del servings[serving]
            if not servings:
                del self._servings[topic]
                self._gossip.unsubscribe(self._prefix + topic + ASKED)

        self._servings.setdefault(topic, {})[serving] = tuple(name.split("."))
        self._gossip.subscribe(self._prefix + topic + ASKED)
        serving.start(ended)
        return serving

    async def request(
        self, name: str, principal: Principal, data: bytes, inbox: rpc.Ref | None, count: int
    ) -> int:
        """Ask one responder, or all where more than one answer is wanted; how many answers came.

        Raises NotFound where nobody serves, and what the responders met with where none answered.
        """
        if is_pattern(name) or inbox is None or not count:
            raise InvalidArgument(
                "a request is for a name, not a pattern, and has an inbox for one answer or more",
                code="invalid.request",
            )
        if len(data) > (limit := self._ctx.config.message_bytes_max):
            raise too_long(len(data), limit)
        if self._in_flight[principal] >= REQUESTS_MAX:
            raise _busy(str(principal))
        answers = Answers(count)
        request = {"topic": name, "data": data, "principal": str(principal)}
        self._in_flight[principal] += 1
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                await _until(answers.full, self._ask(request, inbox, answers, every=count > 1))
        finally:
            answers.over = True
            self._in_flight[principal] -= 1
            if not self._in_flight[principal]:
                del self._in_flight[principal]
        return answers.given

    async def _ask(
        self, request: dict[str, Any], inbox: rpc.Ref, answers: Answers, *, every: bool
    ) -> None:
        """Ask the nodes that say they have a responder, in any order."""
        name, router = request["topic"], self._gossip.router
        peers = router.subscribers(self._prefix + mesh(name) + ASKED)
        ways: list[Callable[[], Awaitable[None]]] = [
            partial(self._at, peer, request, inbox, answers, every=every) for peer in peers
        ]
        if self._here(name):
            me = str(router.me)
            ways.append(
                partial(self.at, {**request, "node": me}, inbox, answers, every=every, node=me)
            )
        random.shuffle(ways)  # no secret: the load is spread
        errors: list[WetwareError] = []
        if every:
            asked = await asyncio.gather(*(_error_of(way()) for way in ways[:ASKED_MAX]))
            errors += filter(None, asked)
        else:
            for way in ways[:ASKED_MAX]:
                if (error := await _error_of(way())) is None:
                    break
                errors.append(error)
                if error.code not in (_NOBODY, _BUSY) and not isinstance(error, _Unreached):
                    break
        if not answers.given:
            told = [e for e in errors if e.code != _NOBODY and not isinstance(e, _Unreached)]
            if told:
                raise told[0]
            if len(errors) == len(ways):
                raise nobody(name)
            raise NotFound(f"who serves the topic {name!r} gave no answer", code="not_found.answer")

    async def _at(
        self,
        peer: PeerId,
        request: dict[str, Any],
        inbox: rpc.Ref,
        answers: Answers,
        *,
        every: bool,
    ) -> None:
        try:
            sibling = await self._ctx.sibling(peer)
        except WetwareError as exc:
            raise _Unreached(str(exc)) from exc
        limit = self._ctx.config.message_bytes_max
        relay = InboxServant(inbox, answers, limit, node=str(peer))
        with rpc.time_limit(None):
            await sibling.call("ask", **request, every=every, inbox=relay)

    def _here(self, name: str) -> list[Serving]:
        tokens = name.split(".")
        servings = self._servings.get(mesh(name), {}).items()
        return [serving for serving, wanted in servings if covers(wanted, tokens)]

    async def at(
        self, request: dict[str, Any], inbox: rpc.Ref, answers: Answers, *, every: bool, node: str
    ) -> None:
        """Ask one responder of this node, the idlest, or all; `node`: see InboxServant.

        Raises NotFound where there is none, and what the first one met with that failed.
        """
        check_topic(request["topic"], self._ctx.config.topic_chars_max)
        found = sorted(self._here(request["topic"]), key=lambda serving: len(serving.in_flight))
        if not found:
            raise nobody(request["topic"])
        limit = self._ctx.config.message_bytes_max

        async def ask(serving: Serving) -> None:
            to = InboxServant(inbox, answers, limit, principal=serving.principal, node=node)
            await serving.handle(request, to)

        asked = (_error_of(ask(serving)) for serving in (found if every else found[:1]))
        for error in await asyncio.gather(*asked):
            if error is not None:
                raise error


class _Unreached(OverlayError):
    """A node that was not asked."""


class SiblingServant(rpc.Servant, interface=SCHEMA.Sibling):
    """What this node does for another one; see pubsub.capnp."""

    def __init__(self, requests: Requests, node: str) -> None:
        self._requests, self._node = requests, node

    async def ask(
        self, topic: str, data: bytes, principal: str, every: bool, inbox: rpc.Ref | None
    ) -> None:
        if inbox is None:
            raise InvalidArgument("a request needs an inbox", code="invalid.request")
        answers = Answers(_ANSWERS_MAX)
        request = {"topic": topic, "data": data, "principal": principal, "node": self._node}
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                await self._requests.at(request, inbox, answers, every=every, node="")
        finally:
            answers.over = True


async def _error_of(work: Awaitable[None]) -> WetwareError | None:
    try:
        await work
    except WetwareError as exc:
        return exc
    return None


async def _until(full: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do it until it is done, or `full` is set."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(full.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
