"""The hooks of blob."""

from __future__ import annotations

from collections.abc import Iterable

from wetware.hookspecs import PluginContext, Service, hookimpl


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
