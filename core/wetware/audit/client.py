"""`session.audit`: the record of a node's decisions, for operators."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.audit.chain import Checkpoint
from wetware.errors import InvalidArgument
from wetware.protocol import CORE

if TYPE_CHECKING:
    from types import TracebackType

READ_AHEAD_MAX = 10_000
"""Records that wait in this process; the node is told to wait then, and drops beyond its bound."""


class AuditClient:
    """The service `audit`.

    Args:
        ref: A reference to an Audit.
    """

    INTERFACE = CORE.Audit

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

    def follow(self) -> Following:
        """Records from now on: `async with audit.follow() as records: async for record in …`."""
        return Following(self._ref)

    async def checkpoint(self) -> Checkpoint:
        """The node's signed word on its log."""
        return Checkpoint.parse((await self._ref.call("checkpoint"))["checkpoint"])

    async def checkpoints(self, node: str = "") -> list[Checkpoint]:
        """What the node knows of the logs of others, the latest first."""
        reply = await self._ref.call("checkpoints", node=node)
        return [Checkpoint.parse(text) for text in reply["checkpoints"]]

    async def state(self) -> dict[str, Any]:
        """How the log is: seq, head, failing, lost, dropped."""
        state: dict[str, Any] = await self._ref.call("state")
        return state


def parse_record(line: str) -> dict[str, Any]:
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


class _Sink(rpc.Servant, interface=CORE.AuditSink):
    def __init__(self) -> None:
        self.waiting: deque[dict[str, Any]] = deque()
        self.more, self.room = asyncio.Event(), asyncio.Event()
        self.dropped = 0
        self.ended = False
        self.room.set()

    async def records(self, records: list[str], dropped: int) -> None:
        await self.room.wait()
        self.dropped += dropped
        self.waiting.extend([parse_record(line) for line in records])
        if len(self.waiting) >= READ_AHEAD_MAX:
            self.room.clear()
        self.more.set()

    def released(self) -> None:
        self.ended = True
        self.more.set()


class Following:
    """Records as they are written; `dropped` counts what the node could not hold."""

    def __init__(self, ref: Any) -> None:
        self._ref, self._sink = ref, _Sink()
        self._watch: rpc.Ref | None = None

    @property
    def dropped(self) -> int:
        """Records that were lost because this end was too slow."""
        return self._sink.dropped

    async def __aenter__(self) -> Following:
        self._watch = (await self._ref.call("follow", sink=self._sink))["watch"]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.close()

    def __aiter__(self) -> Following:
        return self

    async def __anext__(self) -> dict[str, Any]:
        sink = self._sink
        while not sink.waiting:
            if sink.ended:
                raise StopAsyncIteration
            sink.more.clear()
            await sink.more.wait()
        record = sink.waiting.popleft()
        if len(sink.waiting) < READ_AHEAD_MAX // 2:
            sink.room.set()
        return record
