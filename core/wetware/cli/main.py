"""The root of `ww`: global options, the core's commands, and those of the plugins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

import wetware
from wetware.cli.app import note, options, out, out_json, run_client, table
from wetware.cli.completion import COMPLETE_VAR, complete_keys, completion_command, enable
from wetware.cli.given import Root

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

CLOCK_S_TOLD = 1.0
"""`ww status` tells of a clock that is off by more; less is no trouble to anybody."""

_HELP = """A decentralized cloud on your own machines.

Start a node with `ww node`; in another terminal try `ww status`, then `ww sub chat` and
`ww pub chat hello`.
"""


def build() -> typer.Typer:
    """The whole command line; plugins that are broken are left out (`ww plugin list` says why)."""
    from wetware.cli.audit import audit_app
    from wetware.cli.clock import clock_command
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
    from wetware.cli.key import key_app
    from wetware.cli.node import node_command
    from wetware.cli.plugin import plugin_app
    from wetware.cli.services import services_command
    from wetware.plugins import mount_commands

    app = typer.Typer(
        cls=Root,
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        # Plain help: rich's markup costs a third of the start-up of every command.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_globals)
    app.command("node")(node_command)
    app.command("id")(id_command)
    app.command("status")(status_command)
    app.command("whoami")(whoami_command)
    app.command("ls")(ls_command)
    app.command("ping")(ping_command)
    app.command("invite")(invite_command)
    app.command("evict")(evict_command)
    app.command("services")(services_command)
    app.command("share")(share_command)
    # What follows REF is a command of its own, with its own options.
    use_settings = {"allow_extra_args": True, "allow_interspersed_args": False}
    app.command("use", context_settings=use_settings)(use_command)
    app.command("grants")(grants_command)
    app.command("revoke")(revoke_command)
    app.command("why")(why_command)
    app.command("clock")(clock_command)
    app.command("doctor")(doctor_command)
    app.command("completion")(completion_command)
    app.add_typer(key_app, name="key")
    app.add_typer(plugin_app, name="plugin")
    app.add_typer(config_app, name="config")
    app.add_typer(context_app, name="context")
    app.add_typer(audit_app, name="audit")
    mount_commands(app)
    if COMPLETE_VAR in os.environ:
        enable()
    return app


def _version(wanted: bool) -> None:
    if wanted:
        out(f"ww {wetware.__version__}")
        raise typer.Exit


def _globals(
    node: Annotated[
        str | None,
        typer.Option(
            "--node",
            envvar="WW_NODE",
            metavar="ADDRESS",
            help="A remote node: /ip4/…/tcp/…/p2p/PEER, or a reference ww1….",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            envvar="WW_KEY",
            metavar="KEY",
            help="Your key: a name or a file. [default]",
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
    options.node, options.key, options.data_dir = node, key, data_dir
    options.config, options.debug = config, debug or options.debug


def id_command(json: Json = False) -> None:
    """Print the peer ID of this machine's node; makes the node's key if there is none."""
    from wetware.cli.app import node_data_dir
    from wetware.node_key import load_or_create

    data_dir = node_data_dir()
    key, made = load_or_create(data_dir)
    if made:
        note(f"made a new node key in {data_dir}")
    if json:
        out_json({"peer_id": str(key.peer_id), "data_dir": str(data_dir), "created": made})
    else:
        out(str(key.peer_id))


def whoami_command(json: Json = False) -> None:
    """Log in, and show as whom and what you may do."""

    async def work(session: Any) -> tuple[Any, Any]:
        return session.identity, await session.services()

    identity, services = run_client(work)
    if json:
        out_json(
            {
                "principal": identity.principal,
                "roles": list(identity.roles),
                "node": identity.node,
                "cluster": identity.cluster,
                "services": {s.name: list(s.methods) for s in services},
            }
        )
        return
    out(f"principal  {identity.principal}")
    out(f"roles      {', '.join(identity.roles)}")
    out(f"node       {identity.node}")
    out(f"cluster    {identity.cluster}")
    out("")
    table(("service", "methods"), [(s.name, " ".join(s.methods)) for s in services])


def status_command(
    all_: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also peers that are no members, and why something failed; for operators.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show what a node is doing."""

    async def work(session: Any) -> dict[str, Any]:
        status: dict[str, Any] = await session.status(details=all_)
        return status

    status = run_client(work)
    if json:
        out_json(status)
        return
    overlay = status["overlay_state"]
    if status["overlay_restarts"]:
        last = f", last: {status['overlay_error']}" if status["overlay_error"] else ""
        overlay += f" ({status['overlay_restarts']} restarts{last})"
    for name, value in (
        ("node", status["peer_id"]),
        ("cluster", status["cluster"]),
        ("version", status["version"]),
        ("up", _duration(status["uptime_s"])),
        ("memory", f"{status['memory_bytes'] / 2**20:.0f} MiB"),
        ("auth", f"{status['auth']}, policy version {status['policy_epoch']}"),
        ("sessions", status["sessions"]),
        ("services", ", ".join(status["services"])),
        ("overlay", overlay),
        ("listens", "\n          ".join(status["addrs"])),
    ):
        out(f"{name:9} {value}")
    offset_s, wrong = status["clock_offset_s"], status["clock_wrong"]
    if offset_s is not None and abs(offset_s) >= CLOCK_S_TOLD:
        side = "behind" if offset_s > 0 else "ahead of"
        out(f"clock     {abs(offset_s):.1f} s {side} the other nodes'; try: ww doctor")
    if wrong:
        out(f"ends      of grants cannot be judged: {wrong}; try: ww clock")
    out("")
    rows = [
        (
            peer["peer_id"],
            "yes" if peer["member"] else "no",
            peer["addr"],
            _bytes(peer["bytes_in"]),
            _bytes(peer["bytes_out"]),
        )
        for peer in status["peers"]
    ]
    if rows:
        table(("peer", "member", "address", "in", "out"), rows)
    else:
        out("no peers are connected")
    if status["strangers"] and not all_:
        note(f"{status['strangers']} connected that are no members; `ww status --all` shows them")
    for plugin in status["plugins"]:
        if plugin["state"] in ("failed", "unavailable"):
            why = plugin["reason"] or "`ww status --all` says why"
            note(f"plugin {plugin['name']} is {plugin['state']}: {why}")


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    parts = [(days, "d"), (h, "h"), (m, "min"), (s, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
