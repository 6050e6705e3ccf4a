"""`ww plugin`: what is installed, and what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wetware.cli.app import examples, here, note, options, out, out_json, table

if TYPE_CHECKING:
    from wetware.client import LocalNode
    from wetware.plugins import Plugins, PluginStatus

plugin_app = typer.Typer(no_args_is_help=True, help="Plugins: what is installed, and its state.")

ASK_S_MAX = 5.0
"""For the node that runs here to say what its roles have."""
_OFFERS = {
    "ww_register_auth": "auth backend",
    "ww_register_recorder": "recorder",
    "ww_register_services": "services",
    "ww_register_commands": "commands",
    "ww_register_config": "settings",
    "ww_register_discovery": "discovery",
}


@plugin_app.callback()
def _plugin() -> None:
    """Plugins: what is installed, and its state."""


@plugin_app.command("list")
def list_command(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every installed plugin: loaded, disabled, unavailable or failed, why, and what to do.

    The plugins are loaded, configured and asked for their services as a node would do it, but
    nothing is started. Of the auth backends it says which one is configured, and which one the node
    that runs here has. A node that you may ask says which services are not granted to members yet.
    """
    from wetware import config as configuration
    from wetware import plugins as loader

    config = configuration.load({"node.data_dir": options.data_dir}, path=options.config)
    plugins = loader.load(config, loader.INSPECT)
    selected, node = plugins.auth_selected, _running(config.node.data_dir)
    running = None if node is None else node.auth
    _probe(plugins)
    ungranted = [] if node is None else _ungranted(config.node.data_dir)
    if json:
        out_json([_as_json(status, selected, node, ungranted) for status in plugins.report])
        return
    rows: list[tuple[str, ...]] = [
        (
            status.name,
            f"{status.dist} {status.version}".strip() or "-",
            "not running" if _waits(status, node) else str(status.state),
            _offers(status, selected, running),
        )
        for status in plugins.report
    ]
    table(("name", "from", "state", "offers"), rows)
    for status in plugins.report:
        if status.reason:
            out()
            out(f"{status.name} is {status.state}: {status.reason}")
            if status.remedy:
                out(f"  try: {status.remedy}")
    if node is not None and node.auth != (selected or "").removeprefix("auth_"):
        out()
        out(
            f"the node that runs here (pid {node.pid}) has the auth backend {node.auth!r}, and "
            f"{config.node.auth!r} is configured ({config.origin('node.auth')})"
        )
    for status in plugins.report:
        if _waits(status, node):
            out()
            out(f"{status.name} is installed, not running: restart the node")
    for service in ungranted:
        out()
        command = here(f"ww role accept {service}")
        out(f"{service} is installed, not granted to members yet: {command}")


def _ungranted(data_dir: Path) -> list[str]:
    """What the node that runs here says of services that no operator has accepted.

    [] where it may not be asked, or not without somebody at the terminal.
    """
    import asyncio

    from wetware.client import connect
    from wetware.client.contexts import Context
    from wetware.errors import WetwareError

    async def ask() -> list[str]:
        async with (
            asyncio.timeout(ASK_S_MAX),
            connect(context=Context(data_dir=str(data_dir)), key=options.key) as session,
        ):
            found: list[str] = (await session.status())["ungranted"]
            return found

    try:
        return asyncio.run(ask())
    except (WetwareError, TimeoutError):
        return []


@plugin_app.command("new", epilog=examples("ww plugin new counter", "ww plugin new acme --auth"))
def new_command(
    name: str,
    auth: Annotated[bool, typer.Option("--auth", help="An auth backend, and its signer.")] = False,
) -> None:
    """Write a plugin to begin with, into a new folder here: a service, or an auth backend.

    It works as it stands, and its tests are the conformance suite of `wetware.testing`.
    """
    from wetware.cli import templates
    from wetware.errors import InvalidArgument
    from wetware.plugins import is_plugin_name

    plugin = f"auth_{name}" if auth else name
    if not is_plugin_name(plugin) or not name[:1].isalpha():
        raise InvalidArgument(
            f"{name[:64]!r} is not a plugin's name", hint="a-z, 0-9 and _, e.g. `counter`"
        )
    folder = Path(f"ww-{plugin.replace('_', '-')}")
    try:
        files = templates.write(folder, name, auth=auth)
    except OSError as exc:
        raise InvalidArgument(
            f"cannot write {folder}: {exc.strerror}", hint="choose another name, or another folder"
        ) from exc
    for file in files:
        out(str(file))
    note(f"install it: pip install --no-deps -e ./{folder}, and test it: pytest {folder}")


def _running(data_dir: Path) -> LocalNode | None:
    """What the node that holds this data directory says of itself; None where none runs."""
    from wetware.client import LocalNode
    from wetware.doctor.machine import holder_pid
    from wetware.errors import WetwareError

    try:
        node = LocalNode.find(data_dir)
    except WetwareError:
        return None
    return node if holder_pid(data_dir) == node.pid else None


def _waits(status: PluginStatus, node: LocalNode | None) -> bool:
    """Whether a node would load the plugin, and the one that runs has not."""
    return node is not None and str(status.state) == "loaded" and status.name not in node.plugins


def _has(status: PluginStatus, backend: str | None) -> bool:
    """Whether the plugin is that of the backend, by the contract of AuthBackend's name."""
    return "ww_register_auth" in status.hooks and status.name.removeprefix("auth_") == backend


def _offers(status: PluginStatus, selected: str | None, running: str | None) -> str:
    parts = []
    for hook in status.hooks:
        text = _OFFERS[hook]
        if hook == "ww_register_services" and status.services:
            text = "service " + ", ".join(status.services)
        if hook == "ww_register_auth":
            what = {"configured": status.name == selected, "running": _has(status, running)}
            said = ", ".join(word for word, true in what.items() if true)
            text += f" ({said})" if said else ""
        parts.append(text)
    return "; ".join(parts) or "-"


def _as_json(
    status: PluginStatus, selected: str | None, node: LocalNode | None, ungranted: list[str]
) -> dict[str, object]:
    return {
        "name": status.name,
        "dist": status.dist,
        "version": status.version,
        "bundled": status.bundled,
        "state": str(status.state),
        "running": None if node is None else status.name in node.plugins,
        "reason": status.reason,
        "remedy": status.remedy,
        "hooks": list(status.hooks),
        "services": list(status.services),
        "ungranted": [name for name in status.services if name in ungranted],
        "auth_selected": status.name == selected,
        "auth_running": _has(status, node.auth if node is not None else None),
    }


def _probe(plugins: Plugins) -> None:
    """Call the declaring hooks with a context that leads nowhere: no peers, no lasting files."""
    import asyncio
    import tempfile
    import time

    from wetware.base.log import get_logger
    from wetware.hookspecs import PluginContext
    from wetware.testing.overlay import FakeOverlay

    overlay = FakeOverlay()

    async def probe(directory: Path) -> None:
        # In a running loop, as in a node.
        def context(name: str, config: object) -> PluginContext:
            data_dir = directory / name
            data_dir.mkdir(mode=0o700, exist_ok=True)
            return PluginContext(
                name=name,
                config=config,
                log=get_logger(f"plugin.{name}"),
                data_dir=data_dir,
                clock=time,
                overlay=overlay,
            )

        plugins.probe(context)

    with tempfile.TemporaryDirectory(prefix="ww-plugins-") as directory:
        asyncio.run(probe(Path(directory)))
