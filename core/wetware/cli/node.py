"""`ww node`: run a node in the foreground, or have systemd run it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wetware.cli.app import here, note, options, usage
from wetware.cli.completion import one_of
from wetware.cli.given import read_line

if TYPE_CHECKING:
    from wetware.node.compose import Node

FILES_MAX = 65536
"""Open files that a node asks for; connections have their own, lower limits."""
STOP_S_MAX = 2.0
"""From the signal to the end of the process; then it ends the hard way."""
TRY_OUT_LINES_MAX = 40
"""Of what an auth backend says of its try-out."""
_RULE = "!" * 80
_TRY_OUT = f"""\
{_RULE}
!!  THIS IS A TRY-OUT. Not for anything that matters.
!!  What decides who may do what was made on this machine for this node, and any
!!  program that runs here can change it. So the node listens on loopback only, and
!!  no other node can join it.
{_RULE}"""


def node_command(
    listen: Annotated[
        list[str] | None,
        typer.Option(
            "--listen", "-l", metavar="ADDRESS", help="Listen here: /ip4/HOST/tcp/PORT; repeatable."
        ),
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(
            "--announce",
            metavar="ADDRESS",
            help="Tell others to dial this, e.g. a forwarded port; repeatable.",
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer", "-p", metavar="ADDRESS", help="A node to connect to at the start; repeatable."
        ),
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(
            "--join", metavar="TICKET", help="Join a cluster: what `ww invite` printed. '-': stdin."
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="KEY=VALUE", help="What others select this node by; repeatable."
        ),
    ] = None,
    auth: Annotated[
        str | None, typer.Option("--auth", metavar="NAME", help="The auth backend. [local]")
    ] = None,
    auth_also: Annotated[
        list[str] | None,
        typer.Option(
            "--auth-also",
            metavar="NAME",
            help="A further auth backend, for users of its own; repeatable.",
        ),
    ] = None,
    dev: Annotated[
        bool,
        typer.Option(
            "--dev",
            help="Try the auth backend out, on this machine alone: what it needs is made here.",
        ),
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What people call this node.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Where the node keeps its data."),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            "--log-level",
            metavar="LEVEL",
            help="debug, info, warning or error.",
            autocompletion=one_of("debug", "info", "warning", "error"),
        ),
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(
            "--log-format",
            metavar="FORMAT",
            help="text or json.",
            autocompletion=one_of("text", "json"),
        ),
    ] = None,
    install_service: Annotated[
        bool,
        typer.Option(
            "--install-service",
            help="Do not run it: write a unit of systemd that does, with the settings of ww.toml.",
        ),
    ] = False,
    user: Annotated[
        bool, typer.Option("--user", help="With --install-service: of yours, not the system's.")
    ] = False,
    now: Annotated[
        bool, typer.Option("--now", help="With --install-service: start it now, and at each boot.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="With --install-service: replace another unit.")
    ] = False,
) -> None:
    """Run a node until SIGINT, SIGTERM or SIGHUP, or install the service that does."""
    settings = {
        "node.listen": tuple(listen) if listen else None,
        "node.announce": tuple(announce) if announce else None,
        "node.peers": tuple(peer) if peer else None,
        "node.join": join,
        "node.labels": tuple(label) if label else None,
        "node.auth": auth,
        "node.auth_also": tuple(auth_also) if auth_also else None,
        "node.dev": dev or None,
        "node.name": name,
        "node.data_dir": data_dir or options.data_dir,
        "node.log_level": log_level,
        "node.log_format": log_format,
    }
    if install_service:
        from wetware.cli.service import install

        if options.config or any(value is not None for value in settings.values()):
            usage(
                "a service takes its settings from ww.toml, not from the command line",
                "write them there (`ww config reference`), and join with `ww join TICKET`",
            )
        return install(user=user, now=now, yes=yes)
    if user or now or yes:
        usage("--user, --now and --yes are for --install-service")
    from wetware.base import log
    from wetware.config import load

    if join == "-":  # a secret is better read from stdin than seen in the list of processes
        settings["node.join"] = read_line("a ticket")
    config = load(settings, path=options.config)
    if data_dir is not None:
        options.take({"data_dir": data_dir})  # hints repeat it
    if options.key is not None:
        os.environ["WW_KEY"] = options.key  # the operator's key of a first start
    log.setup(config.node.log_level, config.node.log_format)

    import asyncio

    from wetware import loader
    from wetware.node.compose import Node

    plugins = loader.load(config)
    _raise_file_limit()

    async def serve() -> None:
        _stop_on_signals()
        await Node(config, plugins).run(_announce)

    try:
        asyncio.run(serve())
    except asyncio.CancelledError:
        note("ww: stopped")
        # Not by way of the interpreter's end: that takes most of the stop's time, and is none too
        # safe beside a thread that still imports libp2p.
        os._exit(0)


def _raise_file_limit() -> None:
    """As far as the system allows: all connections at their limit need more than the usual 1024."""
    import contextlib
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _stop_on_signals() -> None:
    import asyncio
    import signal
    import threading

    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def hard_stop() -> None:
        note(f"ww: did not stop within {STOP_S_MAX:g} s; ending now")
        os._exit(1)

    def stop() -> None:
        # In a thread of its own: what is stuck may be the loop.
        timer = threading.Timer(STOP_S_MAX, hard_stop)
        timer.daemon = True
        timer.start()
        if task is not None:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
        loop.add_signal_handler(signal.SIGHUP, stop)


def _announce(node: Node) -> None:
    """For the person who started it: what it is, and what to try next."""
    note()
    if node.try_out:
        note(_TRY_OUT)
    note(f"wetware node {node.key.peer_id} is running")
    note(f"  cluster   {node.cluster}")
    note(f"  services  {', '.join(sorted(node.services))}")
    for addr in node.addrs:
        note(f"  listens   {addr}")
    if node.joined and node.users:
        note("this node joined a cluster, and lets in the users of that cluster. To become one:")
        note(f"  {node.users}")
    if node.try_out:
        for line in node.try_out.splitlines()[:TRY_OUT_LINES_MAX]:
            note(here(line))
    else:
        note("try, in another terminal:")
        note(here("  ww ls"))
        note(here("  ww sub chat        and, in a third:  ww pub chat hello"))
        if not node.joined:  # who founded the cluster is its operator, who may
            note(here("  ww invite          and, on another machine:") + "  ww node --join TICKET")
    note()
