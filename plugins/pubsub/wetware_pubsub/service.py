"""The service `pubsub`: topics as capabilities over this node's gossip."""

from __future__ import annotations

import re
from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded, stopping
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


class PubSubService(Service):
    """See `hookspecs.Service`.

    Args:
        ctx: The plugin's context; its config is a PubSubConfig.
        rng: Chooses gossip peers; None for the system's.
    """

    name = "pubsub"
    interface = SCHEMA.PubSub
    roles = MappingProxyType(
        {
            "reader": frozenset({"PubSub.join", "Topic.subscribe", "Topic.info", "Subscription.*"}),
            "member": frozenset({"*"}),
        }
    )

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
        self._topics: dict[str, dict[rpc.Pump, None]] = {}  # by wire name
        self._per_principal: Counter[Principal] = Counter()
        self._running = False

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        self._running = True
        try:
            await self.gossip.run(task_status=task_status)
        finally:
            self._running = False
            for pump in [pump for pumps in self._topics.values() for pump in pumps]:
                pump.end(stopping())

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return PubSubServant(self, principal)

    def wire_topic(self, name: str) -> str:
        """The name on the wire, where clusters never mix; raises InvalidArgument."""
        return self._prefix + check_topic(name, self.config.topic_chars_max)

    def subscribers(self, topic: str) -> int:
        """Subscriptions of a wire topic at this node."""
        return len(self._topics.get(topic, ()))

    def subscribe(
        self, topic: str, principal: Principal, sink: rpc.Ref | None, buffer: int
    ) -> rpc.Pump:
        """Push a wire topic's messages to `sink`; raises LimitExceeded, InvalidArgument."""
        config = self.config
        if buffer > config.buffer_messages_max:
            raise InvalidArgument(
                f"a buffer of {buffer} messages; buffer_messages_max is "
                f"{config.buffer_messages_max}",
                hint="ask for less, and read faster",
                code="invalid.buffer",
            )
        for name, count, limit in (
            ("subscriptions_max", self._per_principal.total(), config.subscriptions_max),
            (
                "subscriptions_per_principal_max",
                self._per_principal[principal],
                config.subscriptions_per_principal_max,
            ),
            ("topics_max", len(self._topics) + (topic not in self._topics), config.topics_max + 1),
        ):
            if count >= limit:
                raise LimitExceeded(
                    f"{name} ({limit}) is reached",
                    hint="end subscriptions that are not needed",
                    code="limit.subscriptions",
                )
        if not self._running:
            raise Disconnected("the service is not running")
        pump = rpc.Pump(
            sink,
            items_max=buffer or config.buffer_messages_default,
            bytes_max=config.buffer_bytes_max,
        )

        def ended(pump: rpc.Pump) -> None:
            self._per_principal[principal] -= 1
            if not self._per_principal[principal]:
                del self._per_principal[principal]
            pumps = self._topics[topic]
            del pumps[pump]
            if not pumps:
                del self._topics[topic]
                self.gossip.unsubscribe(topic)
            reason = str(pump.reason or "")
            self._log.debug("subscription.ended", topic=topic, by=principal, reason=reason)

        self._per_principal[principal] += 1
        self._topics.setdefault(topic, {})[pump] = None
        self.gossip.subscribe(topic)
        self._log.debug("subscription.started", topic=topic, by=principal)
        pump.start(ended)
        return pump

    def _deliver(self, message: Received) -> None:
        if pumps := self._topics.get(message.topic):
            publisher = message.publisher.encode()
            item = message.seqno + bytes((len(publisher),)) + publisher + message.data
            for pump in pumps:
                pump.offer(item)


class PubSubServant(rpc.Servant, interface=SCHEMA.PubSub):
    """See pubsub.capnp."""

    def __init__(self, service: PubSubService, principal: Principal) -> None:
        self._service, self._principal = service, principal

    async def join(self, topic: str) -> dict[str, Any]:
        wire = self._service.wire_topic(topic)
        return {"topic": TopicServant(self._service, self._principal, topic, wire)}


class TopicServant(rpc.Servant, interface=SCHEMA.Topic):
    """See pubsub.capnp."""

    def __init__(self, service: PubSubService, principal: Principal, name: str, wire: str) -> None:
        self._service, self._principal = service, principal
        self._name, self._wire = name, wire

    async def publish(self, data: bytes) -> dict[str, Any]:
        seqno = await self._service.gossip.publish(self._wire, data)
        return {"seqno": int.from_bytes(seqno, "big")}

    async def subscribe(self, sink: rpc.Ref | None, buffer: int) -> dict[str, Any]:
        pump = self._service.subscribe(self._wire, self._principal, sink, buffer)
        return {"subscription": pump}

    async def info(self) -> dict[str, Any]:
        """What this node knows of the topic."""
        router = self._service.gossip.router
        return {
            "name": self._name,
            "subscribers": self._service.subscribers(self._wire),
            "peers": len(router.subscribers(self._wire)),
            "mesh": len(router.mesh(self._wire)),
        }
