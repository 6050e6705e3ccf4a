"""`session.audit`: the record of a node's decisions, for operators."""

from __future__ import annotations

import json
from typing import Any

from wetware import rpc
from wetware.errors import InvalidArgument
from wetware_audit.chain import Checkpoint
from wetware_audit.schema import SCHEMA


class AuditClient:
    """The service `audit`.

    Args:
        ref: A reference to an Audit.
    """

    INTERFACE = SCHEMA.Audit

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    async def tail(
        self, count: int = 0, *, event: str = "", grant: str = "", principal: str = ""
    ) -> list[dict[str, Any]]:
        """The last records that match, the oldest first."""
        reply = await self._ref.call(
            "tail", count=count, event=event, grant=grant, principal=principal
        )
        return [parse_record(line) for line in reply["records"]]

    async def show(self, seq: int) -> dict[str, Any]:
        """One record; raises NotFound."""
        return parse_record((await self._ref.call("show", seq=seq))["record"])

    def follow(self) -> rpc.Subscription[dict[str, Any]]:
        """Records from now on: `async with audit.follow() as records: async for record in …`."""
        return rpc.Subscription(lambda sink: self._ref.call("follow", sink=sink), parse_record)

    async def checkpoint(self) -> Checkpoint:
        """The node's signed word on its log."""
        return Checkpoint.parse((await self._ref.call("checkpoint"))["checkpoint"])

    async def checkpoints(self, node: str = "") -> list[Checkpoint]:
        """What the node knows of the logs of others, the latest first."""
        reply = await self._ref.call("checkpoints", node=node)
        return [Checkpoint.parse(text) for text in reply["checkpoints"]]

    async def state(self) -> dict[str, Any]:
        """How the log is: seq, head, failing, lost."""
        state: dict[str, Any] = await self._ref.call("state")
        return state


def parse_record(line: str | bytes) -> dict[str, Any]:
    """A record as the node shows it; raises InvalidArgument for what no log has."""
    try:
        record = json.loads(line)
        seq, time_ms, event = record["seq"], record["time_ms"], record["event"]
    except (ValueError, TypeError, LookupError, RecursionError):
        seq = time_ms = event = None
    if not (type(seq) is type(time_ms) is int and type(event) is str and 0 <= time_ms < 2**53):
        raise InvalidArgument(
            "the node sent what is no record of an audit log",
            hint="read the log on its machine: `ww audit export`",
            code="invalid.audit_record",
        )
    return dict(record)
