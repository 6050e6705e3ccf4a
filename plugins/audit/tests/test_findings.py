"""What `ww doctor` says of the log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wetware_audit.chain import Checkpoint
from wetware_audit.findings import judge_audit
from wetware_audit.held import REWRITTEN, Held

from .parts import OTHER, open_log, recorder_on


@pytest.mark.parametrize(
    ("changes", "level", "says"),
    [
        ({}, "ok", "7 records"),
        ({"failing": "No space left"}, "error", "logins can end things only"),
        ({"failing": "x", "on_full": "continue", "lost": 3}, "error", "3 records were lost"),
        ({"opened": ["log.torn"]}, "ok", "7 records"),
        ({"opened": ["log.torn", "log.damaged"]}, "error", "damaged"),
        ({"opened": ["log.truncated"]}, "error", "shorter than its own last checkpoint"),
        ({"opened": ["log.missing"]}, "error", "its oldest files are gone"),
        ({"broken": ["X: it has begun another log"]}, "error", "the log of X: it has begun"),
        ({"opened": ["log.not_durable"]}, "warning", "its last records are lost"),
    ],
)
def test_the_audit_log(changes: dict[str, Any], level: str, says: str) -> None:
    state = {"failing": "", "opened": [], "on_full": "fail_closed", "lost": 0}
    found = judge_audit(**{**state, "last": 7, **changes})
    assert [one.level for one in found] == [level]
    assert says in found[0].text


@pytest.mark.anyio
async def test_a_broken_log_of_one_who_was_evicted_is_no_trouble(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    recorder = recorder_on(log)
    held = Held(tmp_path / "none")
    for seq in (9, 1):
        held.take(Checkpoint("l", OTHER.peer_id, seq, bytes(32), 1), REWRITTEN)
    checkpoints: Any = SimpleNamespace(held=held)
    recorder.checkpoints = checkpoints
    (found,) = recorder.findings()
    assert str(OTHER.peer_id) in found.text
    ctx: Any = SimpleNamespace(evicted=lambda peer: peer == OTHER.peer_id)
    recorder.ctx = ctx
    (found,) = recorder.findings()
    assert found.level == "ok"
    log.close()
