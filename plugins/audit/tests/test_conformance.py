"""The recorder and its service keep their contracts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio

from wetware.testing import RecorderConformance, ServiceConformance
from wetware_audit.chain import CHECKPOINT_DOMAIN
from wetware_audit.config import AuditConfig
from wetware_audit.recorder import AuditRecorder
from wetware_audit.service import AuditService


class TestAudit(RecorderConformance):
    name = "audit"
    config = AuditConfig()

    def make(self, ctx: Any, sign: Any) -> AuditRecorder:
        return AuditRecorder(ctx, sign)

    def recorded(self, data_dir: Path) -> Sequence[dict[str, Any]]:
        files = sorted(data_dir.glob("audit-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


class RunningService(AuditService):
    """The service, and the recorder that a node runs beside it."""

    def __init__(self, recorder: AuditRecorder) -> None:
        super().__init__(recorder.ctx)
        self.recorder = recorder
        recorder._service = self

    async def run(self, *, task_status: Any) -> None:
        async with anyio.create_task_group() as tasks:
            await tasks.start(self.recorder.run)
            try:
                await super().run(task_status=task_status)
            finally:
                tasks.cancel_scope.cancel()


class TestAuditService(ServiceConformance):
    config = AuditConfig()
    examples = {"Audit.state": {}, "Audit.tail": {"count": 3}}

    def make(self, ctx: Any) -> RunningService:
        data_dir = ctx.data_dir / "plugins" / "audit"
        data_dir.mkdir(parents=True, exist_ok=True)
        ctx, key = dataclasses.replace(ctx, data_dir=data_dir), ctx.overlay.key
        recorder = AuditRecorder(ctx, lambda data: key.sign(CHECKPOINT_DOMAIN + data))
        return RunningService(recorder)
