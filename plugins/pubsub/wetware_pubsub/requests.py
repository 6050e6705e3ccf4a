"""Requests: messages that are answered, by whoever serves their topic.

Nothing of them is gossiped but which nodes have somebody that serves. A request goes over RPC to
one responder, or to each, and its inbox with it: a capability that only a responder which was
handed it can answer on, and that is over with the request. All of it lives as long as the
requester's call does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

from wetware import rpc
from wetware.base.bounds import less
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
from wetware.identity import Principal
from wetware_pubsub.names import ASKED, check_topic, is_pattern, mesh
from wetware_pubsub.router import too_long
from wetware_pubsub.schema import SCHEMA

if TYPE_CHECKING:
    from wetware.hookspecs import PluginContext
    from wetware.identity import PeerId
    from wetware_pubsub.config import PubSubConfig
    from wetware_pubsub.gossip import Gossip

REQUEST_S_MAX: Final = 3600.0
"""No request is in flight for longer, whatever its requester says."""
REQUESTS_MAX: Final = 256
"""Requests of one principal in flight at a node, and of one responder."""
REQUESTS_PER_REQUESTER_MAX: Final = 128
"""Of one principal of one node in flight at one responder, which has others to serve."""
RESPONDERS_MAX: Final = 1024
"""Over all sessions of a node."""
RESPONDERS_PER_PRINCIPAL_MAX: Final = 128
PEER_BYTES_MAX: Final = 4 << 20
"""Of requests in flight to one node, half of it for one principal: all that the plugins of two
nodes say to each other shares a connection, which takes 8 MiB of calls."""
REQUEST_BYTES: Final = 32 << 10
"""What a request counts for beside its data: 128 are in flight to a node."""
ANSWERS_TO_NODE_MAX: Final = 8
"""Answers on their way to one node, half of them to one principal, for the same reason."""
ASKED_MAX: Final = 256
"""Nodes that one request goes to."""
_ANSWERS_MAX: Final = 1 << 32
"""Of what another node asks: that node has the bound."""
_NOBODY: Final = "not_found.responder"
_BUSY: Final = "limit.requests"
_BUDGETS: Final = frozenset({"limit.calls", "limit.bytes", "limit.rate"})
"""Of a grant that is spent."""


def nobody(topic: str) -> NotFound:
    return NotFound(
        f"nobody serves the topic {topic!r}",
        hint="start a responder: `async with topic.serve(handler)`",
        code=_NOBODY,
    )


def _busy(what: str, limit: int) -> LimitExceeded:
    return LimitExceeded(
        f"{what} has {limit} requests in flight", hint="wait for some of them", code=_BUSY
    )


def _unwanted() -> NotFound:
    return NotFound(
        "the request is over: this answer came too late, or is one too many",
        hint="a handler that is cancelled has nobody to answer",
        code="not_found.request",
    )


class Answers:
    """How many answers a request has had, and may still have.

    Attributes:
        given: That were taken, or are on their way.
        over: Whether no more is wanted.
        slow: Whether that is because the requester takes none.
        full: Set once there is nothing to wait for.
    """

    def __init__(self, count: int) -> None:
        self._count, self._taken = count, 0
        self.given, self.over, self.slow = 0, False, False
        self.full = asyncio.Event()

    async def give(self, take: Callable[[], Awaitable[object]], within_s: float) -> None:
        """Have the requester take one; raises NotFound where it does not."""
        if self.over or self.given >= self._count:
            raise _unwanted()
        self.given += 1
        try:
            async with asyncio.timeout(within_s) as scope:
                await take()
        except BaseException as exc:
            self.given -= 1
            if isinstance(exc, TimeoutError) and scope.expired():
                self.over = self.slow = True
                self.full.set()
            if isinstance(exc, TimeoutError | WetwareError):
                # Its trouble with its grant or connection is not the responder's.
                raise _unwanted() from exc
            raise
        self._taken += 1
        if self._taken >= self._count:
            self.full.set()


class InboxServant(rpc.Servant, interface=SCHEMA.Inbox):
    """A relay to an inbox, for one responder: what it says of who answers is its node's word.

    Args:
        to: The inbox.
        answers: Bounds what goes there.
        config: The plugin's.
        principal: Who answers; "": as the one that is nearer says.
        node: Where; likewise.
        gates: How many may be on their way; a further one waits.

    Attributes:
        over: Whether its responder is done.
    """

    def __init__(
        self,
        to: rpc.Ref,
        answers: Answers,
        config: PubSubConfig,
        *,
        principal: str = "",
        node: str = "",
        gates: Iterable[asyncio.Semaphore] = (),
    ) -> None:
        self._to, self._answers, self._config = to, answers, config
        self._principal, self._node, self._gates = principal, node, tuple(gates)
        self.over = False

    async def answer(self, data: bytes, principal: str, node: str) -> None:
        if len(data) > (limit := self._config.message_bytes_max):
            raise too_long(len(data), limit)
        who, where = self._principal or principal, self._node or node
        Principal.parse(who)
        # A relay at another node has a relay behind it, with that time.
        within_s = self._config.publish_wait_s * (2 if self._gates else 1)
        async with contextlib.AsyncExitStack() as stack:
            for gate in self._gates:
                await stack.enter_async_context(gate)
            if self.over:
                raise _unwanted()
            take = partial(self._to.call, "answer", data=data, principal=who, node=where)
            await self._answers.give(take, within_s)


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
        self._by_requester: Counter[tuple[object, object]] = Counter()
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
            raise _busy("the responder", REQUESTS_MAX)
        requester = request["node"], request["principal"]
        if self._by_requester[requester] >= REQUESTS_PER_REQUESTER_MAX:
            raise _busy(f"{request['principal']} at this responder", REQUESTS_PER_REQUESTER_MAX)
        self._by_requester[requester] += 1
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
                own = isinstance(error, LimitExceeded) and error.code in _BUDGETS
                if own or isinstance(error, (CapabilityError, OverlayError, AuthError)):
                    if responder.closed:
                        self.end()
                    raise _gone() from error
                if isinstance(error, WetwareError) and error.code in (_NOBODY, _BUSY):
                    # It was asked: what it met with when it asked others says nothing else.
                    code = f"{error.code}.onward"
                    raise type(error)(error.message, hint=error.hint, code=code) from error
                raise error
        finally:
            task.cancel()
            self.in_flight.discard(task)
            less(self._by_requester, requester)


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
        check_topics: Raises LimitExceeded where this node hears so many topics as it may.
    """

    def __init__(
        self,
        ctx: PluginContext,
        gossip: Gossip,
        prefix: str,
        check_topics: Callable[[], None],
    ) -> None:
        self._ctx, self._gossip, self._prefix = ctx, gossip, prefix
        self._check_topics = check_topics
        self._servings: dict[str, dict[Serving, tuple[str, ...]]] = {}  # by mesh
        self._in_flight: Counter[Principal] = Counter()
        self._bytes: Counter[object] = Counter()  # in flight, by node, and by node and principal
        self._gates = WeakValueDictionary[object, asyncio.Semaphore]()
        self._ended = False

    @property
    def bytes_max(self) -> int:
        """Of a request, and of an answer."""
        limit: int = self._ctx.config.message_bytes_max
        return limit

    @property
    def meshes(self) -> int:
        """Of which somebody here serves something."""
        return len(self._servings)

    def end(self) -> None:
        """The service stops."""
        self._ended = True
        for serving in [s for servings in self._servings.values() for s in servings]:
            serving.end(stopping())

    def serve(self, name: str, principal: Principal, responder: rpc.Ref | None) -> Serving:
        """Hand requests for what matches `name` to it; raises LimitExceeded, InvalidArgument."""
        if responder is None:
            raise InvalidArgument("no responder was given", code="invalid.responder")
        if self._ended:
            raise stopping()
        here = [each.principal for servings in self._servings.values() for each in servings]
        for count, limit, whose in (
            (len(here), RESPONDERS_MAX, "serve at this node"),
            (here.count(str(principal)), RESPONDERS_PER_PRINCIPAL_MAX, f"of {principal} serve"),
        ):
            if count >= limit:
                raise LimitExceeded(
                    f"{limit} responders {whose} already",
                    hint="end some of them",
                    code="limit.responders",
                )
        topic, serving = mesh(name), Serving(responder, str(principal))
        if topic not in self._servings:
            self._check_topics()

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
        if len(data) > self.bytes_max:
            raise too_long(len(data), self.bytes_max)
        if self._in_flight[principal] >= REQUESTS_MAX:
            raise _busy(str(principal), REQUESTS_MAX)
        answers = Answers(count)
        request = {"topic": name, "data": data, "principal": str(principal)}
        self._in_flight[principal] += 1
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                await _until(answers.full, self._ask(request, inbox, answers, every=count > 1))
        finally:
            answers.over = True
            less(self._in_flight, principal)
        if answers.slow:
            wait_s = self._ctx.config.publish_wait_s
            raise LimitExceeded(
                f"the requester took no answer for {wait_s:g} s",
                hint="read answers faster, or ask for fewer: count",
                code="limit.slow",
            )
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
        me = str(router.me)
        ways.append(partial(self.at, {**request, "node": me}, inbox, answers, every=every, node=me))
        random.shuffle(ways)  # no secret: the load is spread
        errors: list[WetwareError] = []
        if every:
            errors += await _errors_of(way() for way in ways[:ASKED_MAX])
        else:
            for way in ways[:ASKED_MAX]:
                if not (failed := await _errors_of([way()])):
                    break
                errors += failed
                error = failed[0]
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
        relay = InboxServant(inbox, answers, self._ctx.config, node=str(peer))
        with self._room(peer, request), rpc.time_limit(None):
            try:
                await sibling.call("ask", **request, every=every, inbox=relay)
            except (CapabilityError, AuthError) as exc:
                raise _gone() from exc  # of the two nodes, and not of the requester
            finally:
                relay.over = True

    @contextlib.contextmanager
    def _room(self, peer: PeerId, request: dict[str, Any]) -> Iterator[None]:
        """For a request to another node; raises LimitExceeded where too many are in flight."""
        nbytes = len(request["data"]) + REQUEST_BYTES
        keys: tuple[object, ...] = (peer, (peer, request["principal"]))
        for key, limit in zip(keys, (PEER_BYTES_MAX, PEER_BYTES_MAX // 2), strict=True):
            if self._bytes[key] + nbytes > limit:
                raise LimitExceeded(
                    f"{limit} bytes of requests to the node {peer} are in flight, with "
                    f"{REQUEST_BYTES} for each",
                    hint="wait for some of them",
                    code=_BUSY,
                )
        for key in keys:
            self._bytes[key] += nbytes
        try:
            yield
        finally:
            for key in keys:
                less(self._bytes, key, nbytes)

    def gates(self, node: str, principal: str) -> list[asyncio.Semaphore]:
        """What answers to a principal of another node go through; of a node it is the same one."""
        keys = {(node, principal): ANSWERS_TO_NODE_MAX // 2, node: ANSWERS_TO_NODE_MAX}
        return [
            self._gates.setdefault(key, asyncio.Semaphore(count)) for key, count in keys.items()
        ]

    def _here(self, name: str) -> list[Serving]:
        tokens = name.split(".")
        servings = self._servings.get(mesh(name), {}).items()
        return [serving for serving, wanted in servings if covers(wanted, tokens)]

    async def at(
        self,
        request: dict[str, Any],
        inbox: rpc.Ref,
        answers: Answers,
        *,
        every: bool,
        node: str,
        gates: Iterable[asyncio.Semaphore] = (),
    ) -> None:
        """Ask one responder of this node, the idlest, or all; `node`, `gates`: see InboxServant.

        Raises NotFound where there is none, and what the first one met with that failed.
        """
        check_topic(request["topic"], self._ctx.config.topic_chars_max)
        found = sorted(self._here(request["topic"]), key=lambda serving: len(serving.in_flight))
        if not found:
            raise nobody(request["topic"])

        async def ask(serving: Serving) -> None:
            who, config = serving.principal, self._ctx.config
            to = InboxServant(inbox, answers, config, principal=who, node=node, gates=gates)
            try:
                await serving.handle(request, to)
            finally:
                to.over = True

        for error in await _errors_of(ask(each) for each in (found if every else found[:1])):
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
        if is_pattern(topic):
            raise InvalidArgument("a request is for a name", code="invalid.request")
        if len(data) > (limit := self._requests.bytes_max):
            raise too_long(len(data), limit)
        Principal.parse(principal)
        answers = Answers(_ANSWERS_MAX)
        request = {"topic": topic, "data": data, "principal": principal, "node": self._node}
        gates = self._requests.gates(self._node, principal)
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                at = self._requests.at(request, inbox, answers, every=every, node="", gates=gates)
                await _until(answers.full, at)
        finally:
            answers.over = True


async def _errors_of(works: Iterable[Awaitable[None]]) -> list[WetwareError]:
    """Do them all; what they met with. Raises what is no WetwareError, once all are done."""
    done = await asyncio.gather(*works, return_exceptions=True)
    failed = [each for each in done if each is not None]
    for each in failed:
        if not isinstance(each, WetwareError):
            raise each
    return [each for each in failed if isinstance(each, WetwareError)]


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
