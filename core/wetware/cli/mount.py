"""Mounts the commands of plugins on `ww`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import typer

from wetware.cli.root import command_name, infos, named_option
from wetware.config import load as load_config
from wetware.errors import ConfigError, PluginError
from wetware.hookspecs import PROJECT
from wetware.loader import CLI, Plugin, Plugins, load
from wetware.loader.judge import refuse_taken

COMMANDS_PER_PLUGIN_MAX: Final = 64

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

    for plugin, names in plugins.ask("ww_register_commands", judge, lambda p: {"app": own[p]}):
        taken |= dict.fromkeys(names, plugin.name)
        app.registered_commands += own[plugin].registered_commands
        app.registered_groups += own[plugin].registered_groups


def _judge(own: typer.Typer, *, build: bool) -> list[str]:
    """The names of a plugin's commands; raises PluginError."""
    if own.registered_callback is not None:
        raise PluginError("sets a callback on the app; it may add commands and sub-apps only")
    names = [command_name(info) for info in infos(own)]
    if len(names) > COMMANDS_PER_PLUGIN_MAX:
        raise PluginError(f"adds more than {COMMANDS_PER_PLUGIN_MAX} commands")
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name):
            raise PluginError(f"{name!r} is not a command's name: a-z, 0-9 and -")
    if names and build:
        from typer.main import get_group

        get_group(own)  # typer looks at the parameters only now
    return names
