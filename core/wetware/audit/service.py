"""The core's service `audit`. See core.capnp."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.audit.chain import LINE_BYTES_MAX, backwards, files, lines, seek, seq_of
from wetware.errors import InvalidArgument, LimitExceeded, NotFound, WetwareError
from wetware.protocol import CORE

if TYPE_CHECKING:
    from wetware.audit import Audit
    from wetware.audit.spread import Checkpoints
    from wetware.identity import Principal

RECORDS_MAX: Final = 1000
"""Records of one answer, and those that wait for one sink."""
ANSWER_BYTES_MAX: Final = 512 << 10
FOLLOWERS_MAX: Final = 64


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
    """One record of a log."""
    for path in reversed(files(directory)):
        if seq_of(next(lines(path), b"")) <= seq:
            with path.open("rb") as file:
                seek(file, seq)
                line = file.readline(LINE_BYTES_MAX + 1).removesuffix(b"\n")
            return line.decode("ascii", "replace") if seq_of(line) == seq else None
    return None


class _Follower:
    """Records on their way to one sink: a bounded buffer, and a task that pushes."""

    def __init__(self, audit: Audit, sink: rpc.Ref, guard: rpc.Guard | None) -> None:
        self._sink = sink
        self._waiting: deque[str] = deque()
        self._dropped = 0
        self._wake = asyncio.Event()
        self._forget = audit.listen(self._offer)
        self._task = asyncio.create_task(self._push(), name="audit follower")
        self._unguard = guard.on_end(lambda _: self.end()) if guard is not None else lambda: None
        self.ended = False

    def _offer(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            if len(self._waiting) >= RECORDS_MAX:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append(json.dumps(record, separators=(",", ":")))
        self._wake.set()

    async def _push(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                records, self._waiting = list(self._waiting), deque()
                dropped, self._dropped = self._dropped, 0
                await self._sink.call("records", records=records, dropped=dropped)
        except WetwareError:
            pass
        finally:
            self.end()

    def end(self) -> None:
        """Stop. Idempotent."""
        if not self.ended:
            self.ended = True
            self._forget()
            self._unguard()
            self._task.cancel()
            self._sink.close()


class _WatchServant(rpc.Servant, interface=CORE.Watch):
    """See core.capnp."""

    def __init__(self, follower: _Follower) -> None:
        self._follower = follower

    async def end(self) -> None:
        """End it."""
        self._follower.end()

    def released(self) -> None:
        """The follower let go."""
        self._follower.end()


def is_about(record: Mapping[str, Any], grant: str) -> bool:
    """Whether a record is about a grant, what was derived from it, or who redeemed it."""
    return grant in (record.get("grant"), record.get("parent"), record.get("share"))


class AuditServant(rpc.Servant, interface=CORE.Audit):
    """See core.capnp."""

    def __init__(self, service: AuditService) -> None:
        self._service = service

    def _directory(self) -> Path:
        log = self._service.audit().log
        if log is None:
            raise NotFound("this node keeps no audit log")
        return log.directory

    async def tail(self, count: int, event: str, grant: str, principal: str) -> dict[str, object]:
        """The last records."""

        def matches(record: Mapping[str, Any]) -> bool:
            return (
                str(record.get("event", "")).startswith(event)
                and (not grant or is_about(record, grant))
                and (not principal or record.get("principal") == principal)
            )

        wanted = min(count or RECORDS_MAX, RECORDS_MAX)
        found = await asyncio.to_thread(tail, self._directory(), wanted, matches)
        return {"records": found}

    async def show(self, seq: int) -> dict[str, object]:
        """One record."""
        found = await asyncio.to_thread(record_at, self._directory(), seq)
        if found is None:
            raise NotFound(f"there is no record {seq}", hint="`ww audit tail` shows the last ones")
        return {"record": found}

    async def follow(self, sink: rpc.Ref | None) -> dict[str, object]:
        """Records from now on."""
        if sink is None:
            raise InvalidArgument("following needs a sink", code="invalid.sink")
        return {"watch": _WatchServant(self._service.follow(sink, rpc.current_guard()))}

    async def checkpoint(self) -> dict[str, object]:
        """The node's word on its log."""
        log = self._service.audit().log
        if log is None:
            raise NotFound("this node keeps no audit log")
        return {"checkpoint": log.checkpoint().text}

    async def checkpoints(self, node: str) -> dict[str, object]:
        """What this node knows of others' logs."""
        known = self._service.checkpoints().known(node)
        return {"checkpoints": [checkpoint.text for checkpoint in known[:RECORDS_MAX]]}

    async def state(self) -> dict[str, object]:
        """How the log is."""
        audit = self._service.audit()
        log = audit.log
        return {
            "log": log.log_id if log is not None else "",
            "seq": audit.sequence,
            "head": log.head if log is not None else b"",
            "failing": log.failing if log is not None else "",
            "lost": log.lost if log is not None else 0,
            "dropped": audit.dropped,
        }


class AuditService:
    """The service `audit`.

    Args:
        audit: The node's.
        checkpoints: What the node knows of others' logs.
    """

    name = "audit"
    interface = CORE.Audit

    def __init__(self, audit: Callable[[], Audit], checkpoints: Callable[[], Checkpoints]) -> None:
        self.audit, self.checkpoints = audit, checkpoints
        self._followers: set[_Follower] = set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Until cancelled; then nobody follows any more."""
        ready()
        try:
            await asyncio.Event().wait()
        finally:
            for follower in tuple(self._followers):
                follower.end()

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        """An Audit for one session."""
        return AuditServant(self)

    def follow(self, sink: rpc.Ref, guard: rpc.Guard | None) -> _Follower:
        """Push records to a sink; raises LimitExceeded."""
        self._followers = {follower for follower in self._followers if not follower.ended}
        if len(self._followers) >= FOLLOWERS_MAX:
            raise LimitExceeded(f"{FOLLOWERS_MAX} sessions follow the log (FOLLOWERS_MAX)")
        follower = _Follower(self.audit(), sink, guard)
        self._followers.add(follower)
        return follower
