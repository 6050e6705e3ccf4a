"""The service `pubsub`: topics as capabilities over this node's gossip."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded, WetwareError
from wetware.hookspecs import Service
from wetware_pubsub.gossip import Gossip
from wetware_pubsub.schema import SCHEMA

if TYPE_CHECKING:
    import random

    from anyio.abc import TaskStatus

    from wetware.hookspecs import PluginContext
    from wetware.identity import Principal
    from wetware_pubsub.config import PubSubConfig
    from wetware_pubsub.router import Received

_TOPIC = re.compile(r"[A-Za-z0-9._~:@+-]+(/[A-Za-z0-9._~:@+-]+)*")
_MESSAGE_OVERHEAD_BYTES = 64
"""What a message costs in a buffer and in a batch beside its data: empty ones are not free."""


def check_topic(name: str, chars_max: int) -> str:
    """The name, if it is one; raises InvalidArgument.

    Plain ASCII, so that two names that look the same are the same.
    """
    if 0 < len(name) <= chars_max and _TOPIC.fullmatch(name):
        return name
    shown = name if len(name) <= 40 else f"{name[:40]}…"
    if not name:
        what = "a topic needs a name"
    elif len(name) > chars_max:
        what = f"the topic {shown!r} has {len(name)} characters; topic_chars_max is {chars_max}"
    else:
        what = f"{shown!r} is not a topic"
    raise InvalidArgument(
        what,
        hint="use letters, digits and . _ ~ : @ + -, in parts separated by single slashes",
        code="invalid.topic",
    )


class Subscription:
    """Messages on their way to one sink: a bounded buffer, and a task that pushes batches.

    Args:
        sink: The subscriber; calls of `messages` are answered when it wants more.
        config: Limits.
        buffer_max: Messages that may wait.
        on_end: Called once, when it has ended.
    """

    def __init__(
        self,
        sink: Any,
        *,
        config: PubSubConfig,
        buffer_max: int,
        on_end: Callable[[Subscription], None],
    ) -> None:
        self._sink, self._config, self._buffer_max = sink, config, buffer_max
        self._on_end = on_end
        self._waiting: deque[Received] = deque()
        self._waiting_bytes = 0
        self._unreported = 0
        self._wake = asyncio.Event()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._pump: asyncio.Task[None] | None = None
        self._unguard: Callable[[], None] = lambda: None
        self.delivered = self.dropped = 0
        self.ended = False
        self.reason: WetwareError | None = None

    def start(self, tasks: asyncio.TaskGroup, guard: rpc.Guard | None) -> None:
        """Begin to push; ends with `guard`."""
        self._pump = tasks.create_task(self._run(), name="pubsub subscription")
        if guard is not None:
            self._unguard = guard.on_end(self.end)

    @property
    def buffered(self) -> int:
        """Messages that wait."""
        return len(self._waiting)

    def offer(self, message: Received) -> None:
        """Take a message; the oldest ones go if there is no room."""
        waiting, size = self._waiting, len(message.data) + _MESSAGE_OVERHEAD_BYTES
        while waiting and (
            len(waiting) >= self._buffer_max
            or self._waiting_bytes + size > self._config.buffer_bytes_max
        ):
            self._waiting_bytes -= len(waiting.popleft().data) + _MESSAGE_OVERHEAD_BYTES
            self.dropped += 1
            self._unreported += 1
        waiting.append(message)
        self._waiting_bytes += size
        self._wake.set()

    def end(self, reason: WetwareError | None = None) -> None:
        """Stop now, whatever waits or is in flight. Idempotent."""
        if self.ended:
            return
        self.ended, self.reason = True, reason
        self._unguard()
        self._waiting.clear()
        self._waiting_bytes = 0
        if self._pump is not None:
            self._pump.cancel()
        for call in self._in_flight:
            call.cancel()
        self._sink.close()
        self._on_end(self)

    async def _run(self) -> None:
        try:
            while True:
                while not self._may_push():
                    self._wake.clear()
                    await self._wake.wait()
                call = asyncio.create_task(self._push(*self._batch()))
                self._in_flight.add(call)
                call.add_done_callback(self._pushed)
        finally:
            self.end(Disconnected("the node is stopping"))

    def _may_push(self) -> bool:
        """At once when nothing is in flight, else only a full batch: small ones would cost more."""
        config, in_flight = self._config, len(self._in_flight)
        if not in_flight or not self._waiting:
            return bool(self._waiting)
        return in_flight < config.batches_in_flight_max and (
            len(self._waiting) >= config.batch_messages_max
            or self._waiting_bytes >= config.batch_bytes_max
        )

    def _batch(self) -> tuple[list[Received], int]:
        batch: list[Received] = []
        size = 0
        while self._waiting and len(batch) < self._config.batch_messages_max:
            message_bytes = len(self._waiting[0].data) + _MESSAGE_OVERHEAD_BYTES
            if batch and size + message_bytes > self._config.batch_bytes_max:
                break
            size += message_bytes
            batch.append(self._waiting.popleft())
        self._waiting_bytes -= size
        dropped, self._unreported = self._unreported, 0
        return batch, dropped

    async def _push(self, batch: list[Received], dropped: int) -> None:
        publishers: dict[str, int] = {}
        await self._sink.messages(
            data=[m.data for m in batch],
            seqnos=[int.from_bytes(m.seqno, "big") for m in batch],
            publisher_of=[publishers.setdefault(m.publisher, len(publishers)) for m in batch],
            publishers=list(publishers),
            dropped=dropped,
        )
        self.delivered += len(batch)

    def _pushed(self, call: asyncio.Task[None]) -> None:
        self._in_flight.discard(call)
        self._wake.set()
        if not call.cancelled() and (error := call.exception()) is not None:
            reason = error if isinstance(error, WetwareError) else None
            self.end(reason or Disconnected("the subscriber failed"))


class _Principal:
    """What one principal has, over all its sessions."""

    def __init__(self) -> None:
        self.subscriptions = 0


class PubSubService(Service):
    """See `hookspecs.Service`.

    Args:
        ctx: The plugin's context; its config is a PubSubConfig.
        rng: Chooses gossip peers; None for the system's.
    """

    name = "pubsub"
    interface = SCHEMA.PubSub

    def __init__(self, ctx: PluginContext, *, rng: random.Random | None = None) -> None:
        self.config: PubSubConfig = ctx.config
        self._prefix = f"/wetware/{ctx.overlay.cluster}/"
        self._log = ctx.log
        self.gossip = Gossip(
            ctx.overlay,
            config=ctx.config,
            clock=ctx.clock,
            log=ctx.log,
            data_dir=ctx.data_dir,
            deliver=self._deliver,
            prefix=self._prefix,
            rng=rng,
        )
        self._topics: dict[str, dict[Subscription, None]] = {}  # by wire name
        self._subscriptions = 0
        self._per_principal: dict[Principal, int] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            try:
                await self.gossip.run(task_status=task_status)
            finally:
                self._tasks = None  # who subscribes from here on is told that it has ended

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        """A PubSub for one session."""
        return PubSubServant(self, principal)

    def wire_topic(self, name: str) -> str:
        """The name on the wire, where clusters never mix; raises InvalidArgument."""
        return self._prefix + check_topic(name, self.config.topic_chars_max)

    def subscribers(self, topic: str) -> int:
        """Subscriptions of a wire topic at this node."""
        return len(self._topics.get(topic, ()))

    def subscribe(
        self, topic: str, principal: Principal, sink: Any, buffer: int, guard: rpc.Guard | None
    ) -> Subscription:
        """Push a wire topic's messages to `sink`; raises LimitExceeded, InvalidArgument."""
        config = self.config
        if buffer > config.buffer_messages_max:
            raise InvalidArgument(
                f"a buffer of {buffer} messages; buffer_messages_max is "
                f"{config.buffer_messages_max}",
                hint="ask for less, and read faster",
                code="invalid.buffer",
            )
        mine = self._per_principal.get(principal, 0)
        for name, count, limit in (
            ("subscriptions_max", self._subscriptions, config.subscriptions_max),
            ("subscriptions_per_principal_max", mine, config.subscriptions_per_principal_max),
            ("topics_max", len(self._topics) + (topic not in self._topics), config.topics_max + 1),
        ):
            if count >= limit:
                raise LimitExceeded(
                    f"{name} ({limit}) is reached",
                    hint="end subscriptions that are not needed",
                    code="limit.subscriptions",
                )
        if self._tasks is None:
            raise Disconnected("the service is not running")

        def on_end(ended: Subscription) -> None:
            self._subscriptions -= 1
            left = self._per_principal.get(principal, 0) - 1
            if left > 0:
                self._per_principal[principal] = left
            else:
                self._per_principal.pop(principal, None)
            subscriptions = self._topics[topic]
            del subscriptions[ended]
            if not subscriptions:
                del self._topics[topic]
                self.gossip.unsubscribe(topic)
            self._log.debug("subscription.ended", topic=topic, by=principal, reason=ended.reason)

        subscription = Subscription(
            sink,
            config=config,
            buffer_max=buffer or config.buffer_messages_default,
            on_end=on_end,
        )
        self._subscriptions += 1
        self._per_principal[principal] = mine + 1
        self._topics.setdefault(topic, {})[subscription] = None
        self.gossip.subscribe(topic)
        subscription.start(self._tasks, guard)
        self._log.debug("subscription.started", topic=topic, by=principal)
        return subscription

    def _deliver(self, message: Received) -> None:
        for subscription in tuple(self._topics.get(message.topic, ())):
            subscription.offer(message)


class PubSubServant(rpc.Servant, interface=SCHEMA.PubSub):
    """See pubsub.capnp."""

    def __init__(self, service: PubSubService, principal: Principal) -> None:
        self._service, self._principal = service, principal

    async def join(self, topic: str) -> dict[str, Any]:
        """The capability of a topic."""
        wire = self._service.wire_topic(topic)
        return {"topic": TopicServant(self._service, self._principal, topic, wire)}


class TopicServant(rpc.Servant, interface=SCHEMA.Topic):
    """See pubsub.capnp."""

    def __init__(self, service: PubSubService, principal: Principal, name: str, wire: str) -> None:
        self._service, self._principal = service, principal
        self._name, self._wire = name, wire

    async def publish(self, data: bytes) -> dict[str, Any]:
        """Send a message."""
        seqno = await self._service.gossip.publish(self._wire, data)
        return {"seqno": int.from_bytes(seqno, "big")}

    async def subscribe(self, sink: rpc.Ref | None, buffer: int) -> dict[str, Any]:
        """Push messages to a sink."""
        if sink is None:
            raise InvalidArgument("a subscription needs a sink", code="invalid.sink")
        subscription = self._service.subscribe(
            self._wire, self._principal, sink, buffer, rpc.current_guard()
        )
        return {"subscription": SubscriptionServant(subscription)}

    async def info(self) -> dict[str, Any]:
        """What this node knows of the topic."""
        router = self._service.gossip.router
        return {
            "name": self._name,
            "subscribers": self._service.subscribers(self._wire),
            "peers": len(router.subscribers(self._wire)),
            "mesh": len(router.mesh(self._wire)),
        }


class SubscriptionServant(rpc.Servant, interface=SCHEMA.Subscription):
    """See pubsub.capnp."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    async def cancel(self) -> None:
        """End it."""
        self._subscription.end()

    async def stats(self) -> dict[str, Any]:
        """Its counters; raises what ended it."""
        subscription = self._subscription
        if subscription.reason is not None:
            raise subscription.reason
        return {
            "delivered": subscription.delivered,
            "dropped": subscription.dropped,
            "buffered": subscription.buffered,
            "ended": subscription.ended,
        }

    def released(self) -> None:
        """The subscriber let go."""
        self._subscription.end()
