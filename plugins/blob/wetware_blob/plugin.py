"""The hooks of blob."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wetware.hookspecs import PluginContext, Service, hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def ww_register_config() -> type:
    """`[plugins.blob]`."""
    from wetware_blob.config import BlobConfig

    return BlobConfig


@hookimpl
def ww_register_services(ctx: PluginContext) -> Iterable[Service]:
    """The service `blob`."""
    from wetware_blob.service import BlobService

    return (BlobService(ctx),)


@hookimpl
def ww_register_commands(app: typer.Typer) -> None:
    """`ww blob`."""
    from wetware_blob.cli import mount

    mount(app)
