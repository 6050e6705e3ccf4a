"""Mounts the commands of plugins on `ww`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from wetware.cli.root import command_name, infos, named_option
from wetware.config import load as load_config
from wetware.errors import ConfigError, PluginError
from wetware.hookspecs import PROJECT
from wetware.loader import CLI, Plugin, Plugins, load
from wetware.loader.judge import refuse_taken

if TYPE_CHECKING:
    from typer.models import TyperInfo

COMMANDS_PER_PLUGIN_MAX: Final = 64
SHARED: Final = "auth"
"""The group that plugins have in common: an auth backend's commands are `ww auth NAME …`."""

mounted: Plugins | None = None
"""The plugins whose commands this process mounted, so that `ww plugin list` says how that went."""


def mount_commands(app: typer.Typer, argv: Sequence[str]) -> None:
    """Mount the commands of the plugins that the configuration selects on `app`.

    A broken configuration raises ConfigError, unless the command line names one of the core's own
    commands: `ww config check` must run then.
    """
    global mounted
    core = {command_name(info) for info in infos(app)}
    try:
        named = named_option(argv, "--config")
        mounted = load(load_config(path=Path(named) if named else None), CLI)
        mount(mounted, app)
    except ConfigError:
        if not core.intersection(argv) and any(not arg.startswith("-") for arg in argv):
            raise


def mount(plugins: Plugins, app: typer.Typer) -> None:
    """Mount the commands of loaded plugins on `app`, which has the core's own already.

    Each plugin gets an app of its own, and a third party's is built before it is merged: one that
    raises half way, takes a name that is there, or declares an option that typer refuses, mounts
    nothing.
    """
    taken = {command_name(info): PROJECT for info in infos(app)}
    own = defaultdict[Plugin, typer.Typer](typer.Typer)

    def judge(plugin: Plugin, _: Any) -> list[str]:
        # Building costs every `ww` 10 ms; that bundled commands build is a matter of their tests.
        names = _judge(own[plugin], build=not plugin.offer.bundled)
        refuse_taken("command", names, taken)
        return names

    shared = typer.Typer(
        help="Auth backends: who may do what is decided there.", no_args_is_help=True
    )
    shown = ""
    for plugin, names in plugins.ask("ww_register_commands", judge, lambda p: {"app": own[p]}):
        taken |= dict.fromkeys(names, plugin.name)
        app.registered_commands += own[plugin].registered_commands
        for group in own[plugin].registered_groups:
            if command_name(group) == SHARED:
                shared.registered_groups += _within(group)
                if not shown and isinstance(group.epilog, str):
                    shown = group.epilog
            else:
                app.registered_groups.append(group)
    if shared.registered_groups:
        app.add_typer(
            shared, name=SHARED, rich_help_panel="You, and other users", epilog=shown or None
        )


def _judge(own: typer.Typer, *, build: bool) -> list[str]:
    """The names of a plugin's commands; raises PluginError."""
    if own.registered_callback is not None:
        raise PluginError("sets a callback on the app; it may add commands and sub-apps only")
    if SHARED in map(command_name, own.registered_commands):
        raise PluginError(f"`{SHARED}` is a group that plugins share, and no command")
    names = [command_name(info) for info in infos(own)]
    backends = [
        command_name(within)
        for group in own.registered_groups
        if command_name(group) == SHARED
        for within in _within(group)
    ]
    if len(names) > COMMANDS_PER_PLUGIN_MAX:
        raise PluginError(f"adds more than {COMMANDS_PER_PLUGIN_MAX} commands")
    for name in names + backends:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name):
            raise PluginError(f"{name!r} is not a command's name: a-z, 0-9 and -")
    if names and build:
        from typer.main import get_group

        get_group(own)  # typer looks at the parameters only now
    own_names = [name for name in names if name != SHARED]
    return own_names + [f"{SHARED} {name}" for name in backends]


def _within(group: TyperInfo) -> list[TyperInfo]:
    """The groups of what a plugin adds to the shared group; raises PluginError for commands."""
    inner = group.typer_instance
    if inner is None or inner.registered_commands or inner.registered_callback is not None:
        raise PluginError(f"adds commands to `{SHARED}`; a group of its own belongs there")
    return inner.registered_groups
