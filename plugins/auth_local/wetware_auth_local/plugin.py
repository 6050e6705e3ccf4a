"""The hooks of auth_local."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wetware.hookspecs import AuthBackend, PluginContext, hookimpl
from wetware_auth_local.config import AuthLocalConfig

if TYPE_CHECKING:
    import typer


@hookimpl
def ww_register_config() -> type:
    """`[plugins.auth_local]`."""
    return AuthLocalConfig


@hookimpl
def ww_register_auth(ctx: PluginContext) -> AuthBackend:
    """The backend `local`."""
    from wetware_auth_local.backend import LocalBackend

    return LocalBackend(ctx)


@hookimpl
def ww_register_commands(app: typer.Typer) -> None:
    """`ww user`, `ww role`, `ww policy`."""
    from wetware_auth_local.cli import mount

    mount(app)
