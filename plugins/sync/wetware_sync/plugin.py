"""The hooks of sync."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wetware.hookspecs import PluginContext, Service, hookimpl

if TYPE_CHECKING:
    import typer


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


@hookimpl
def ww_register_commands(app: typer.Typer) -> None:
    """`ww kv`, `ww name`, `ww lock`, `ww sem` and `ww elect`."""
    from wetware_sync.cli import mount

    mount(app)
