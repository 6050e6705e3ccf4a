"""The hooks of auth_evm. Nothing heavy is imported before the backend runs."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from wetware.hookspecs import AuthBackend, PluginContext, hookimpl

if TYPE_CHECKING:
    import typer

for _module in ("aiohttp", "coincurve", "eth", "web3"):
    if importlib.util.find_spec(_module) is None:  # looked for, not imported
        raise ModuleNotFoundError(f"No module named {_module!r}", name=_module)


@hookimpl
def ww_register_config() -> type:
    """`[plugins.auth_evm]`."""
    from wetware_auth_evm.node.config import AuthEvmConfig

    return AuthEvmConfig


@hookimpl
def ww_register_auth(ctx: PluginContext) -> AuthBackend:
    """The backend `evm`."""
    from wetware_auth_evm.node.backend import EvmBackend
    from wetware_auth_evm.node.service import EvmService

    backend = EvmBackend(ctx)
    backend.services = (EvmService(backend),)
    return backend


@hookimpl
def ww_register_commands(app: typer.Typer) -> None:
    """`ww auth evm`."""
    from wetware_auth_evm.cli.mount import mount

    mount(app)
