"""The hooks of sync."""

from __future__ import annotations

from collections.abc import Iterable

from wetware.hookspecs import PluginContext, Service, hookimpl


@hookimpl
def ww_register_config() -> type:
    """`[plugins.sync]`."""
    from wetware_sync.config import SyncConfig

    return SyncConfig


@hookimpl
def ww_register_services(ctx: PluginContext) -> Iterable[Service]:
    """The services `kv`, `sync` and `names`, on one store."""
    from wetware_sync.home import Home
    from wetware_sync.kv import KvService
    from wetware_sync.locks import SyncService
    from wetware_sync.names import NamesService

    home = Home(ctx)
    return KvService(home), SyncService(home), NamesService(home)
