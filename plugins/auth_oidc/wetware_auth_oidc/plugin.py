"""The hooks of auth_oidc. Nothing heavy is imported before the backend runs."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from wetware.hookspecs import AuthBackend, PluginContext, hookimpl

if TYPE_CHECKING:
    import typer

for _module in ("httpx", "joserfc"):
    if importlib.util.find_spec(_module) is None:  # looked for, not imported
        raise ModuleNotFoundError(f"No module named {_module!r}", name=_module)


@hookimpl
def ww_register_config() -> type:
    """`[plugins.auth_oidc]`."""
    from wetware_auth_oidc.config import AuthOidcConfig

    return AuthOidcConfig


@hookimpl
def ww_register_auth(ctx: PluginContext) -> AuthBackend:
    """The backend `oidc`."""
    from wetware_auth_oidc.backend import OidcBackend

    return OidcBackend(ctx)


@hookimpl
def ww_register_commands(app: typer.Typer) -> None:
    """`ww auth oidc`."""
    from wetware_auth_oidc.cli import mount

    mount(app)
