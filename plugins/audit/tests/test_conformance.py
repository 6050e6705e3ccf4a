"""The recorder keeps the contract of recorders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wetware.testing import RecorderConformance
from wetware_audit.config import AuditConfig
from wetware_audit.recorder import AuditRecorder


class TestAudit(RecorderConformance):
    name = "audit"
    config = AuditConfig()

    def make(self, ctx: Any, sign: Any, copy: Any) -> AuditRecorder:
        return AuditRecorder(ctx, sign, copy)

    def recorded(self, data_dir: Path) -> Sequence[dict[str, Any]]:
        files = sorted(data_dir.glob("audit-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]
