"""`Audit.follow`: records as they are written, for some, until the node stops."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.audit import Audit
from wetware.audit import service as module
from wetware.audit.client import AuditClient
from wetware.audit.service import AuditService
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded
from wetware.testing import Started

from .parts import Clock, open_log

pytestmark = pytest.mark.anyio


async def test_records_are_followed_from_now_on_until_the_node_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FOLLOWERS_MAX", 2)
    log = open_log(tmp_path / "log")
    audit = Audit(Clock(), to=log)
    checkpoints: Any = None
    service = AuditService(lambda: audit, lambda: checkpoints)
    ready = Started()
    running = asyncio.create_task(service.run(task_status=ready))
    await ready.wait()
    async with (
        rpc.serve_unix(tmp_path / "s", lambda _: service.bootstrap(None)),  # type: ignore[arg-type]
        await rpc.connect_unix(tmp_path / "s") as connection,
    ):
        client = AuditClient(connection.bootstrap(AuditClient.INTERFACE))
        await audit.admit("before")
        async with client.follow() as one, client.follow() as two:
            with pytest.raises(LimitExceeded, match="FOLLOWERS_MAX"):
                await client.follow().__aenter__()
            await audit.admit("e", n=1)
            await audit.admit("e", n=2)
            async with asyncio.timeout(10):
                for records in (one, two):
                    got = [await anext(records), await anext(records)]
                    assert [(r["event"], r["n"]) for r in got] == [("e", 1), ("e", 2)]
            for follower in service._followers:
                follower.offer(b"[]")
            with pytest.raises(InvalidArgument, match="no record"):
                await asyncio.wait_for(anext(one), 10)
        async with asyncio.timeout(10), client.follow() as records:
            running.cancel()
            await asyncio.wait([running])
            with pytest.raises(Disconnected, match="stopping"):
                await anext(records)
    assert not service._followers
    assert not audit._listeners
    log.close()
