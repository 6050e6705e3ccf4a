"""The core's own services keep the contract of services."""

from __future__ import annotations

import time
from typing import Any

from wetware.broker.records import Records
from wetware.broker.tree import Tree
from wetware.errors import NotFound
from wetware.identity import Principal
from wetware.node.services.grants import GrantsService
from wetware.node.services.node import NodeService
from wetware.testing import ServiceConformance


class TestGrants(ServiceConformance):
    def make(self, ctx: Any) -> GrantsService:
        return GrantsService(Tree(time), Records(time, None), lambda: None)


class TestNode(ServiceConformance):
    def make(self, ctx: Any) -> NodeService:
        async def trust(principal: Principal) -> None:
            pass

        async def hand_over(tell: Any) -> None:
            tell("counter", "1 left")

        def proposal(service: str) -> Any:
            raise NotFound("there is no such service")

        return NodeService(
            status=lambda details: {},
            restart_overlay=lambda: None,
            trust_clock=trust,
            proposal=proposal,
            hand_over=hand_over,
            audit=Records(time, None),
        )
