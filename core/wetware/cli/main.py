"""The root of `ww`: global options, the core's commands, and those of the plugins."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import wetware
from wetware.cli.app import (
    Json,
    examples,
    node_data_dir,
    note,
    options,
    out,
    out_json,
    pairs,
    run_client,
    table,
)
from wetware.cli.completion import (
    COMPLETE_VAR,
    complete_contexts,
    complete_keys,
    completion_command,
    enable,
)
from wetware.cli.root import LATE, Root, find, named, take_only

_HELP = """A decentralized cloud on your own machines.

Start a node with `ww node`; in another terminal try `ww status`, then `ww sub chat` and
`ww pub chat hello`. Global options stand before or after the command.
"""


def build(argv: Sequence[str] = ()) -> typer.Typer:
    """The command line; plugins that are broken are left out (`ww plugin list` says why).

    Where `argv` names one command, that one alone: declaring all of them takes as long as most take
    to run, and those of the core know their plugins by themselves.
    """
    from wetware.cli.cluster import evict_command, invite_command, ls_command, ping_command
    from wetware.cli.config import config_app
    from wetware.cli.context import context_app
    from wetware.cli.doctor import doctor_command
    from wetware.cli.grants import (
        grants_command,
        revoke_command,
        share_command,
        use_command,
        why_command,
    )
    from wetware.cli.join import join_command, leave_command
    from wetware.cli.key import key_app
    from wetware.cli.node import node_command
    from wetware.cli.plugin import plugin_app
    from wetware.cli.services import services_command
    from wetware.cli.status import clock_command, status_command

    app = typer.Typer(
        cls=Root,
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        epilog=examples("ww help share", "ww --node rented status", "ww status --node zone=cloud"),
        context_settings={"help_option_names": ["-h", "--help"]},
        # Plain help: rich's markup costs a third of the start-up of every command.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_globals)

    def command(name: str, section: str, run: Callable[..., None], *shown: str, **how: Any) -> None:
        app.command(name, rich_help_panel=section, epilog=examples(*shown), **how)(run)

    def group(name: str, section: str, commands: typer.Typer, *shown: str) -> None:
        app.add_typer(commands, name=name, rich_help_panel=section, epilog=examples(*shown))

    section = "Run a node, and look at it"
    command(
        "node", section, node_command,
        "ww node", "ww node --join wwt1…", "ww node --label zone=cloud --name rented",
        "ww node --install-service --user --now",
    )  # fmt: skip
    command("join", section, join_command, "ww join wwt1…", "ww join - < ticket")
    command(
        "leave", section, leave_command,
        "ww leave", "ww leave --hand-over", "ww leave --purge --yes",
    )  # fmt: skip
    command("status", section, status_command, "ww status", "ww status --node rented")
    command("doctor", section, doctor_command, "ww doctor", "ww doctor --json")
    command("clock", section, clock_command, "ww clock", "ww clock --right")
    command("id", section, id_command, "ww id")
    section = "The cluster"
    command(
        "ls", section, ls_command,
        "ww ls", "ww ls zone=cloud,state=alive", "ww ls --watch", "ww ls --wide",
    )  # fmt: skip
    command("ping", section, ping_command, "ww ping rented", "ww ping rented -c 10 -i 0.2")
    command(
        "invite", section, invite_command,
        "ww invite", "ww invite --label zone=cloud --expires 1h", "ww invite --list",
        "ww invite --script --from git+https://github.com/wetware/wetware-py",
    )  # fmt: skip
    command(
        "evict", section, evict_command,
        "ww evict rented", "ww evict rented --yes", "ww evict --hand-over attic",
    )  # fmt: skip
    group(
        "context", section, context_app,
        "ww context add home --node /ip4/192.0.2.1/tcp/4001/p2p/12D3Koo…", "ww context use home",
        "ww context ls",
    )  # fmt: skip
    section = "Services"
    command("services", section, services_command, "ww services", "ww services pubsub --describe")
    section = "Capabilities"
    command(
        "share", section, share_command,
        "ww share pubsub:chat", "ww share pubsub:chat --methods Topic.publish --expires 1h",
    )  # fmt: skip
    command(
        "use", section, use_command,
        "ww use ww1…", "ww use ww1… pub chat hello", "ww use - sub chat < reference",
        # What follows REF is a command of its own, with its own options.
        context_settings={"allow_extra_args": True, "allow_interspersed_args": False},
    )  # fmt: skip
    command("grants", section, grants_command, "ww grants", "ww grants --json")
    command("revoke", section, revoke_command, "ww revoke 7f3a5c0e9b1d2f48")
    command("why", section, why_command, "ww why", "ww why pubsub.join topic=chat")
    section = "You, and other users"
    command("whoami", section, whoami_command, "ww whoami", "ww whoami --node rented")
    group("key", section, key_app, "ww key new", "ww key show")
    section = "Settings"
    group("config", section, config_app, "ww config show", "ww config check")
    group("plugin", section, plugin_app, "ww plugin list")
    command("completion", section, completion_command, "ww completion bash")
    command("help", section, help_command, "ww help share", "ww help audit tail")
    name = named(argv)
    if name == "plugin" or not take_only(app, name):  # `plugin` says how mounting went
        from wetware.cli.mount import mount_commands

        mount_commands(app, argv)
        take_only(app, name)
    if COMPLETE_VAR in os.environ:
        enable()
    return app


def _version(wanted: bool) -> None:
    if wanted:
        out(f"ww {wetware.__version__}")
        raise typer.Exit


def _globals(
    ctx: typer.Context,
    node: Annotated[
        str | None,
        typer.Option(
            "--node",
            metavar="NODE",
            help="Another node: an address /ip4/…/tcp/…/p2p/PEER, a reference ww1…, or what this "
            "machine's node finds: a name, a peer ID, zone=cloud.  [env var: WW_NODE]",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            metavar="NAME",
            help="What `ww context` remembers of a node.  [env var: WW_CONTEXT]",
            autocompletion=complete_contexts,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="KEY",
            help="Your key: a name or a file.  [env var: WW_KEY; default: default]",
            autocompletion=complete_keys,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", metavar="DIR", help="The node's data directory.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="The configuration file (ww.toml)."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    options.take({name: ctx.params[name] for name in LATE})


def help_command(
    ctx: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]…")] = None,
) -> None:
    """Say what a command does, as its --help."""
    parent = ctx.parent
    if parent is None:
        raise RuntimeError("ww help is a command of ww")
    command, context = find(parent.command, parent, words or ())
    out(command.get_help(context))


def id_command(json: Json = False) -> None:
    """Print the peer ID of this machine's node; makes the node's key if there is none."""
    from wetware.node.key import load_or_create

    data_dir = node_data_dir()
    key, made = load_or_create(data_dir)
    if made:
        note(f"made a new node key in {data_dir}")
    if json:
        return out_json({"peer_id": key.peer_id, "data_dir": data_dir, "created": made})
    out(key.peer_id)


def whoami_command(json: Json = False) -> None:
    """Log in, and show as whom and what you may do."""

    async def work(session: Any) -> tuple[Any, Any]:
        return session.identity, await session.services()

    identity, services = run_client(work)
    if json:
        may = {service.name: service.methods for service in services}
        return out_json({**asdict(identity), "services": may})
    pairs(
        ("principal", identity.principal),
        ("roles", ", ".join(identity.roles)),
        ("node", identity.node),
        ("cluster", identity.cluster),
    )
    out()
    table(("service", "methods"), [(s.name, " ".join(s.methods)) for s in services])
