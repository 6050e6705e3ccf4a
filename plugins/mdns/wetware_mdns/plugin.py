"""The hooks of mdns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wetware.hookspecs import Discovery, PluginContext, hookimpl

if TYPE_CHECKING:
    from wetware_mdns.config import MdnsConfig


@hookimpl
def ww_register_config() -> type:
    """`[plugins.mdns]`."""
    from wetware_mdns.config import MdnsConfig

    return MdnsConfig


@hookimpl
def ww_register_discovery(ctx: PluginContext) -> Discovery | None:
    """The discovery `mdns`, unless `enabled = false`."""
    from wetware_mdns.discovery import MdnsDiscovery

    config: MdnsConfig = ctx.config
    return MdnsDiscovery(ctx) if config.enabled else None
