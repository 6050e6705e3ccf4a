"""Whom a node has let in, on disk."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import anyio
import pytest

from wetware.base.log import get_logger
from wetware.base.threads import Threads
from wetware.identity import Principal
from wetware_auth_evm.node import roster as module
from wetware_auth_evm.node.roster import NOTHING, PRINCIPALS_FILE, Roster

pytestmark = pytest.mark.anyio


async def test_a_write_under_way_at_the_end_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, on = threading.Event(), threading.Event()
    write = module.replace_private_file

    def slow(path: Path, data: bytes) -> None:
        if not begun.is_set():
            begun.set()
            on.wait(60)
        write(path, data)

    monkeypatch.setattr(module, "replace_private_file", slow)
    roster = Roster(
        tmp_path,
        look_up=lambda _: NOTHING,
        tell=lambda _: None,
        log=get_logger("test"),
        run_sync=Threads().run,
    )
    known = NOTHING._replace(roles=frozenset({"member"}), tenures={"member": frozenset({1})})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(roster.run)
        assert roster.watch(Principal("evm", "first"), known)
        assert await anyio.to_thread.run_sync(begun.wait, 10)
        assert roster.watch(Principal("evm", "second"), known)
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.05)
        on.set()
    ended = json.loads((tmp_path / PRINCIPALS_FILE).read_text())
    assert ended.keys() == {"first", "second"}
    with anyio.CancelScope(shield=True):
        await anyio.sleep(0.1)  # for a thread that nobody waits for
    assert json.loads((tmp_path / PRINCIPALS_FILE).read_text()) == ended
