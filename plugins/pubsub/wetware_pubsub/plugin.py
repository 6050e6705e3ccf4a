"""The hooks of pubsub."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wetware.hookspecs import PluginContext, Service, hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def ww_register_config() -> type:
    """`[plugins.pubsub]`."""
    from wetware_pubsub.config import PubSubConfig

    return PubSubConfig


@hookimpl
def ww_register_services(ctx: PluginContext) -> Iterable[Service]:
    """The service `pubsub`."""
    from wetware_pubsub.service import PubSubService

    return (PubSubService(ctx),)


@hookimpl
def ww_register_commands(app: typer.Typer) -> None:
    """`ww pub` and `ww sub`."""
    from wetware_pubsub.cli import mount

    mount(app)
