"""The service keeps the contract of services."""

from __future__ import annotations

from wetware.hookspecs import PluginContext
from wetware.testing import ServiceConformance
from wetware_pubsub.config import PubSubConfig
from wetware_pubsub.service import PubSubService


class TestPubSub(ServiceConformance):
    config = PubSubConfig()
    examples = {"PubSub.join": {"topic": "chat"}, "Topic.subscribe": {"buffer": 10}}

    def make(self, ctx: PluginContext) -> PubSubService:
        return PubSubService(ctx)
