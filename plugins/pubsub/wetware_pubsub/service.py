"""The service `pubsub`: topics as capabilities over this node's gossip."""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.base.subjects import covers
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded, stopping
from wetware.hookspecs import Service
from wetware_pubsub import frames
from wetware_pubsub.gossip import Gossip
from wetware_pubsub.names import check_topic, is_pattern, is_shared, mesh
from wetware_pubsub.requests import Requests, SiblingServant
from wetware_pubsub.router import too_long
from wetware_pubsub.schema import SCHEMA

if TYPE_CHECKING:
    import random

    from anyio.abc import TaskStatus

    from wetware.hookspecs import PluginContext
    from wetware.identity import Principal
    from wetware_pubsub.config import PubSubConfig
    from wetware_pubsub.router import Received


class PubSubService(Service):
    """See `hookspecs.Service`.

    Args:
        ctx: The plugin's context; its config is a PubSubConfig.
        rng: Chooses gossip peers; None for the system's.
    """

    name = "pubsub"
    interface = SCHEMA.PubSub
    peer_interface = SCHEMA.Sibling
    roles = MappingProxyType(
        {
            "reader": frozenset({"PubSub.join", "Topic.subscribe", "Topic.info", "Subscription.*"}),
            "member": frozenset({"*"}),
        }
    )

    def __init__(self, ctx: PluginContext, *, rng: random.Random | None = None) -> None:
        self.config: PubSubConfig = ctx.config
        self._prefix = f"/wetware/{ctx.overlay.cluster}/"
        self._log, self._clock = ctx.log, ctx.clock
        self.gossip = Gossip(
            ctx.overlay,
            config=ctx.config,
            clock=ctx.clock,
            log=ctx.log,
            data_dir=ctx.data_dir,
            deliver=self._deliver,
            room=self._room,
            prefix=self._prefix,
            rng=rng,
        )
        self.requests = Requests(ctx, self.gossip, self._prefix, self._check_topics)
        # By wire name, with the tokens of what each is to get.
        self._topics: dict[str, dict[rpc.Pump, tuple[str, ...]]] = {}
        self._blocking: dict[rpc.Pump, None] = {}
        self._per_principal: Counter[Principal] = Counter()
        self._running = False

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        self._running = True
        try:
            await self.gossip.run(task_status=task_status)
        finally:
            self._running = False
            self.requests.end()
            for pump in [pump for pumps in self._topics.values() for pump in pumps]:
                pump.end(stopping())

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return PubSubServant(self, principal)

    def peer_bootstrap(self, node: Principal) -> rpc.Servant:
        return SiblingServant(self.requests, node.subject)

    def wire_topic(self, name: str, *, raw: bool) -> str:
        """The name on the wire, where clusters never mix; raises InvalidArgument."""
        check_topic(name, self.config.topic_chars_max)
        if not raw:
            return self._prefix + mesh(name) + frames.FRAMED
        if is_pattern(name):
            raise InvalidArgument(
                f"{name!r} is a pattern, which a raw topic has none of", code="invalid.topic"
            )
        return self._prefix + name

    async def publish(
        self, topic: str, name: str, principal: Principal, data: bytes, lengths: bytes
    ) -> tuple[bytes, int]:
        """Publish packed messages; the seqno of the first, and how many were taken.

        Raises InvalidArgument where not even the first can be.

        Args:
            topic: As on the wire.
            name: As it was joined.
            principal: By whose grant.
            data: The messages, end to end.
            lengths: How long each is; empty for one.
        """
        if is_pattern(name):
            raise InvalidArgument(
                f"{name!r} is a pattern, which cannot be published to",
                hint="join the name that is meant",
                code="invalid.topic",
            )
        found, limit = rpc.packed.lengths_of(len(data), lengths), self.config.message_bytes_max
        if not topic.endswith(frames.FRAMED):
            if lengths:
                raise InvalidArgument(
                    "a raw topic takes one message at a time", code="invalid.packed"
                )
            return await self._publish(topic, name, data, 1), 1
        if lengths and len(data) > frames.PACK_BYTES:
            raise InvalidArgument(
                f"{len(data)} bytes of packed messages; {frames.PACK_BYTES} are taken",
                hint="publish a long message alone",
                code="invalid.packed",
            )
        if max(found) > limit:
            taken = next(index for index, nbytes in enumerate(found) if nbytes > limit)
            if not taken:
                raise too_long(found[0], limit)
            found = found[:taken]
            data, lengths = data[: sum(found)], lengths[: taken * rpc.packed.LENGTH_BYTES]
        subject = name if _is_shared(topic) else ""
        frame = frames.encode(principal, self._clock.time(), data, lengths, subject)
        return await self._publish(topic, name, frame, len(found)), len(found)

    async def _publish(self, topic: str, name: str, data: bytes, count: int) -> bytes:
        seqno = await self.gossip.publish(topic, data, count)
        pumps, tokens = self._topics.get(topic, {}), name.split(".")
        for pump in self._full():
            wanted = pumps.get(pump)
            if wanted is not None and (not _is_shared(topic) or covers(wanted, tokens)):
                await pump.room(self.config.publish_wait_s)
        return seqno

    def _takers(self, topic: str, name: str) -> list[rpc.Pump]:
        """The subscriptions of a wire topic that get what is published to a name, and no others.

        Of a pattern: those that get all of it.
        """
        pumps = self._topics.get(topic, {})
        if not _is_shared(topic):
            return list(pumps)
        tokens = name.split(".")
        return [pump for pump, wanted in pumps.items() if covers(wanted, tokens)]

    def _full(self) -> list[rpc.Pump]:
        """Those that others have to wait for."""
        return [pump for pump in self._blocking if not pump.has_room]

    async def _room(self) -> None:
        """Wait for them; what other nodes send waits in front of it."""
        for pump in self._full():
            await pump.room(self.config.publish_wait_s)

    def subscribers(self, topic: str, name: str) -> int:
        """Subscriptions at this node that get all of a name or pattern of a wire topic."""
        return len(self._takers(topic, name))

    def subscribe(
        self,
        topic: str,
        name: str,
        principal: Principal,
        sink: rpc.Ref | None,
        buffer: int,
        slow: rpc.Slow,
    ) -> rpc.Pump:
        """Push what matches `name` of a wire topic to `sink`.

        Raises LimitExceeded, InvalidArgument.
        """
        config = self.config
        if buffer > config.buffer_messages_max:
            raise InvalidArgument(
                f"a buffer of {buffer} messages; buffer_messages_max is "
                f"{config.buffer_messages_max}",
                hint="ask for less, and read faster",
                code="invalid.buffer",
            )
        for bound, count, limit in (
            ("subscriptions_max", self._per_principal.total(), config.subscriptions_max),
            (
                "subscriptions_per_principal_max",
                self._per_principal[principal],
                config.subscriptions_per_principal_max,
            ),
        ):
            if count >= limit:
                raise _full(bound, limit)
        if topic not in self._topics:
            self._check_topics()
        if not self._running:
            raise Disconnected("the service is not running")
        pump = rpc.Pump(
            sink,
            items_max=buffer or config.buffer_messages_default,
            bytes_max=config.buffer_bytes_max,
            slow=slow,
        )

        def ended(pump: rpc.Pump) -> None:
            self._per_principal[principal] -= 1
            if not self._per_principal[principal]:
                del self._per_principal[principal]
            pumps = self._topics[topic]
            del pumps[pump]
            self._blocking.pop(pump, None)
            if not pumps:
                del self._topics[topic]
                self.gossip.unsubscribe(topic)
            reason = str(pump.reason or "")
            self._log.debug("subscription.ended", topic=name, by=principal, reason=reason)

        self._per_principal[principal] += 1
        self._topics.setdefault(topic, {})[pump] = tuple(name.split("."))
        if slow is rpc.Slow.BLOCK:
            self._blocking[pump] = None
        self.gossip.subscribe(topic)
        self._log.debug("subscription.started", topic=name, by=principal)
        pump.start(ended)
        return pump

    def _check_topics(self) -> None:
        """Raise LimitExceeded where one topic more is more than peers remember of a node."""
        if len(self._topics) + self.requests.meshes >= self.config.topics_max:
            raise _full("topics_max", self.config.topics_max)

    def _deliver(self, message: Received) -> None:
        name = frames.subject_of(message.data) if _is_shared(message.topic) else ""
        if pumps := self._takers(message.topic, name):
            publisher = message.publisher.encode()
            item = message.seqno + bytes((len(publisher),)) + publisher + message.data
            for pump in pumps:  # one that is too slow may end here
                pump.offer(item, count=message.count)


def _full(bound: str, limit: int) -> LimitExceeded:
    return LimitExceeded(
        f"{bound} ({limit}) is reached",
        hint="end subscriptions that are not needed",
        code="limit.subscriptions",
    )


def _is_shared(topic: str) -> bool:
    return is_shared(topic.removesuffix(frames.FRAMED))


class PubSubServant(rpc.Servant, interface=SCHEMA.PubSub):
    """See pubsub.capnp."""

    def __init__(self, service: PubSubService, principal: Principal) -> None:
        self._service, self._principal = service, principal

    async def join(self, topic: str, raw: bool) -> dict[str, Any]:
        wire = self._service.wire_topic(topic, raw=raw)
        return {"topic": TopicServant(self._service, self._principal, topic, wire, raw=raw)}


class TopicServant(rpc.Servant, interface=SCHEMA.Topic):
    """See pubsub.capnp."""

    def __init__(
        self, service: PubSubService, principal: Principal, name: str, wire: str, *, raw: bool
    ) -> None:
        self._service, self._principal = service, principal
        self._name, self._wire, self._raw = name, wire, raw

    async def publish(self, data: bytes, lengths: bytes) -> dict[str, Any]:
        seqno, taken = await self._service.publish(
            self._wire, self._name, self._principal, data, lengths
        )
        return {"seqno": int.from_bytes(seqno, "big"), "taken": taken}

    async def subscribe(self, sink: rpc.Ref | None, buffer: int, slow: str) -> dict[str, Any]:
        try:
            policy = rpc.Slow(slow)
        except ValueError:
            raise InvalidArgument(f"{slow[:40]!r} is nothing that a subscriber can be") from None
        pump = self._service.subscribe(
            self._wire, self._name, self._principal, sink, buffer, policy
        )
        return {"subscription": pump}

    async def request(self, data: bytes, inbox: rpc.Ref | None, count: int) -> dict[str, Any]:
        requests = self._of_requests()
        return {"answers": await requests.request(self._name, self._principal, data, inbox, count)}

    async def serve(self, responder: rpc.Ref | None) -> dict[str, Any]:
        requests = self._of_requests()
        return {"subscription": requests.serve(self._name, self._principal, responder)}

    def _of_requests(self) -> Requests:
        if self._raw:
            raise InvalidArgument("a raw topic has no requests", code="invalid.request")
        return self._service.requests

    async def info(self) -> dict[str, Any]:
        """What this node knows of the topic."""
        router = self._service.gossip.router
        return {
            "name": self._name,
            "subscribers": self._service.subscribers(self._wire, self._name),
            "peers": len(router.subscribers(self._wire)),
            "mesh": len(router.mesh(self._wire)),
        }
