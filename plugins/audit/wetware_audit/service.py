"""The service `audit`."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.errors import LimitExceeded, NotFound, stopping
from wetware.hookspecs import PluginContext, Service
from wetware_audit.chain import LINE_BYTES_MAX, backwards, files, lines, seek, seq_of
from wetware_audit.schema import SCHEMA

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.identity import Principal
    from wetware_audit.log import AuditLog
    from wetware_audit.spread import Checkpoints

RECORDS_MAX: Final = 1000
"""Records of one answer, and those that wait for one sink."""
ANSWER_BYTES_MAX: Final = 512 << 10
FOLLOWERS_MAX: Final = 64
FOLLOWER_BYTES_MAX: Final = 4 << 20
"""Records that wait for one sink: a record is some 300 bytes."""


def tail(directory: Path, count: int, matches: Callable[[Mapping[str, Any]], bool]) -> list[str]:
    """The last records of a log that match, the oldest first."""
    kept: deque[str] = deque()
    size = 0
    for path in reversed(files(directory)):
        for line in backwards(path):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(record, dict) or not matches(record):
                continue
            kept.appendleft(line.decode("ascii", "replace"))
            size += len(line)
            if len(kept) >= count or size >= ANSWER_BYTES_MAX:
                return list(kept)
    return list(kept)


def record_at(directory: Path, seq: int) -> str | None:
    for path in reversed(files(directory)):
        if seq_of(next(lines(path), b"")) <= seq:
            with path.open("rb") as file:
                seek(file, seq)
                line = file.readline(LINE_BYTES_MAX + 1).removesuffix(b"\n")
            return line.decode("ascii", "replace") if seq_of(line) == seq else None
    return None


def is_about(record: Mapping[str, Any], grant: str) -> bool:
    """Whether a record is about a grant, what was derived from it, or who redeemed it."""
    return grant in (record.get("grant"), record.get("parent"), record.get("share"))


class AuditServant(rpc.Servant, interface=SCHEMA.Audit):
    """See audit.capnp."""

    def __init__(self, service: AuditService) -> None:
        self._service = service

    def _directory(self) -> Path:
        return self._service.log.directory

    async def tail(self, count: int, event: str, grant: str, principal: str) -> dict[str, object]:
        def matches(record: Mapping[str, Any]) -> bool:
            return (
                str(record.get("event", "")).startswith(event)
                and (not grant or is_about(record, grant))
                and (not principal or record.get("principal") == principal)
            )

        wanted = min(count or RECORDS_MAX, RECORDS_MAX)
        found = await self._service.ctx.run_sync(tail, self._directory(), wanted, matches)
        return {"records": found}

    async def show(self, seq: int) -> dict[str, object]:
        found = await self._service.ctx.run_sync(record_at, self._directory(), seq)
        if found is None:
            raise NotFound(f"there is no record {seq}", hint="`ww audit tail` shows the last ones")
        return {"record": found}

    async def follow(self, sink: rpc.Ref | None) -> dict[str, object]:
        return {"subscription": self._service.follow(sink)}

    async def checkpoint(self) -> dict[str, object]:
        return {"checkpoint": self._service.log.checkpoint().text}

    async def checkpoints(self, node: str) -> dict[str, object]:
        """What this node knows of others' logs."""
        known = self._service.checkpoints.known(node)
        return {"checkpoints": [checkpoint.text for checkpoint in known[:RECORDS_MAX]]}

    async def state(self) -> dict[str, object]:
        log = self._service.log
        return {
            "log": log.log_id,
            "seq": log.seq,
            "head": log.head,
            "failing": log.failing,
            "lost": log.lost,
        }


class AuditService(Service):
    """The service `audit`.

    Attributes:
        log, checkpoints: Set by the recorder once it has opened them, before a service starts.
    """

    name = "audit"
    interface = SCHEMA.Audit

    log: AuditLog
    checkpoints: Checkpoints

    def __init__(self, ctx: PluginContext) -> None:
        self.ctx = ctx
        self._followers: set[rpc.Pump] = set()

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Exchange checkpoints with members until cancelled; then nobody follows any more."""
        task_status.started()
        try:
            await self.checkpoints.run()
        finally:
            for follower in tuple(self._followers):
                follower.end(stopping())

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return AuditServant(self)

    def follow(self, sink: rpc.Ref | None) -> rpc.Pump:
        """Push records to a sink; raises LimitExceeded, InvalidArgument."""
        if len(self._followers) >= FOLLOWERS_MAX:
            raise LimitExceeded(f"{FOLLOWERS_MAX} sessions follow the log (FOLLOWERS_MAX)")
        follower = rpc.Pump(sink, items_max=RECORDS_MAX, bytes_max=FOLLOWER_BYTES_MAX)
        self._followers.add(follower)
        follower.start(self._followers.discard)
        return follower

    def written(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records if self._followers else ():
            item = json.dumps(record, separators=(",", ":")).encode()
            for follower in self._followers:
                follower.offer(item)
