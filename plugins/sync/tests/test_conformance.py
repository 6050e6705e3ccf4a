"""The services keep the contract of services."""

from __future__ import annotations

from wetware.hookspecs import PluginContext, Service
from wetware.testing import ServiceConformance
from wetware_sync.config import SyncConfig
from wetware_sync.home import Home
from wetware_sync.kv import KvService
from wetware_sync.locks import SyncService
from wetware_sync.names import NamesService


class TestKv(ServiceConformance):
    config = SyncConfig()
    examples = {
        "Kv.open": {"prefix": "/a/"},
        "Kv.home": {},
        "Kv.lease": {"ttl_ms": 5000, "id": 0, "epoch": 0},
        "Kv.status": {},
        "Kv.etcd": {},
        "Sibling.place": {"placement": b""},
        "Sibling.etcd": {},
    }

    waits = frozenset({"Cursor.next"})

    def make(self, ctx: PluginContext) -> Service:
        return KvService(Home(ctx))


class TestSync(ServiceConformance):
    config = SyncConfig()
    examples = {"Sync.home": {}}

    def make(self, ctx: PluginContext) -> Service:
        return SyncService(Home(ctx))


class TestNames(ServiceConformance):
    config = SyncConfig()
    examples = {"Names.home": {}}

    def make(self, ctx: PluginContext) -> Service:
        return NamesService(Home(ctx))
