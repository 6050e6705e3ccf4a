"""The hooks of auth_local."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from wetware.hookspecs import AuthBackend, PluginContext, hookimpl

if TYPE_CHECKING:
    import typer


@dataclass(frozen=True, slots=True)
class AuthLocalConfig:
    """`[plugins.auth_local]`.

    Attributes:
        policy: A signed policy document (`ww policy export`) to begin with, so that this node joins
            an existing operator's cluster. Read only at the first start.
    """

    policy: Path | None = field(
        default=None, metadata={"help": "Signed policy document to begin with, at the first start."}
    )


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
