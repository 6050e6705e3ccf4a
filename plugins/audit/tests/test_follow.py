"""`Audit.follow`: records as they are written, for some, until the node stops."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import STOPPING, Disconnected, InvalidArgument, LimitExceeded
from wetware.testing import Started
from wetware_audit import service as module
from wetware_audit.client import AuditClient

from .parts import open_log, recorder_on

pytestmark = pytest.mark.anyio


async def test_records_are_followed_from_now_on_until_the_node_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FOLLOWERS_MAX", 2)
    log = open_log(tmp_path / "log", checkpoint_records=1)  # which are no records
    recorder = recorder_on(log)
    forever: Any = SimpleNamespace(run=asyncio.Event().wait)
    service = recorder._service
    service.checkpoints = forever
    ready = Started()
    running = asyncio.create_task(service.run(task_status=ready))
    await ready.wait()
    async with (
        rpc.serve_unix(tmp_path / "s", lambda _: service.bootstrap(None)),  # type: ignore[arg-type]
        await rpc.connect_unix(tmp_path / "s") as connection,
    ):
        client = AuditClient(connection.bootstrap(AuditClient.INTERFACE))
        await recorder.admit({"event": "before"})
        async with client.follow() as one, client.follow() as two:
            with pytest.raises(LimitExceeded, match="FOLLOWERS_MAX"):
                await client.follow().__aenter__()
            await recorder.admit({"event": "e", "n": 1})
            await recorder.admit({"event": "e", "n": 2})
            async with asyncio.timeout(60):
                for records in (one, two):
                    got = [await anext(records), await anext(records)]
                    assert [(r["event"], r["n"]) for r in got] == [("e", 1), ("e", 2)]
            for follower in service._followers:
                follower.offer(b"[]")
            with pytest.raises(InvalidArgument, match="no record"):
                await asyncio.wait_for(anext(one), 60)
        async with asyncio.timeout(60), client.follow() as records:
            running.cancel()
            await asyncio.wait([running])
            with pytest.raises(Disconnected) as info:
                await anext(records)
            assert info.value.code == STOPPING
    assert not service._followers
    log.close()
