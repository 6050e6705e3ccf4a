"""The hooks of dht."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wetware.hookspecs import Discovery, PluginContext, hookimpl

if TYPE_CHECKING:
    from wetware_dht.config import DhtConfig


@hookimpl
def ww_register_config() -> type:
    """`[plugins.dht]`."""
    from wetware_dht.config import DhtConfig

    return DhtConfig


@hookimpl
def ww_register_discovery(ctx: PluginContext) -> Discovery | None:
    """The discovery `dht`, unless `enabled = false`."""
    from wetware_dht.discovery import DhtDiscovery

    config: DhtConfig = ctx.config
    return DhtDiscovery(ctx) if config.enabled else None
