"""The service keeps the contract of services."""

from __future__ import annotations

from contextlib import nullcontext

from wetware.hookspecs import PluginContext
from wetware.testing import ServiceConformance
from wetware_proc.config import ProcConfig
from wetware_proc.service import ProcService

from .test_service import Scripts


class TestProc(ServiceConformance):
    config = ProcConfig()
    examples = {
        "Executor.processes": {},
        "Executor.all": {},
    }

    def make(self, ctx: PluginContext) -> ProcService:
        return ProcService(ctx, lambda: nullcontext({"wasm": Scripts()}))
