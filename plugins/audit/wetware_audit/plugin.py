"""The hooks of audit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wetware.hookspecs import PluginContext, Recorder, hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def ww_register_config() -> type:
    """`[plugins.audit]`."""
    from wetware_audit.config import AuditConfig

    return AuditConfig


@hookimpl
def ww_register_recorder(ctx: PluginContext, sign: Callable[[bytes], bytes]) -> Recorder:
    """The recorder `audit`, with its service."""
    from wetware_audit.recorder import AuditRecorder

    return AuditRecorder(ctx, sign)


@hookimpl
def ww_register_commands(app: typer.Typer) -> None:
    """`ww audit`."""
    from wetware_audit.cli import mount

    mount(app)
