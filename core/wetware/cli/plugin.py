"""`ww plugin`: what is installed and what became of it, and a plugin to begin with."""

from __future__ import annotations

import contextlib
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wetware.cli.app import Json, examples, here, note, options, out, out_json, table
from wetware.errors import ConfigError, InvalidArgument, WetwareError

if TYPE_CHECKING:
    from wetware.client import LocalNode
    from wetware.hookspecs import PluginContext
    from wetware.loader import Plugin, Plugins

plugin_app = typer.Typer(no_args_is_help=True, help="Plugins: what is installed, and its state.")

ASK_S_MAX = 5.0
"""For the node that runs here to say what its roles have."""
TEMPLATES = Path(__file__).with_name("templates")
"""The plugins of docs/tutorials/first-plugin.md and docs/how-to/own-iam.md, file by file."""
_OFFERS = {
    "ww_register_auth": "auth backend",
    "ww_register_recorder": "recorder",
    "ww_register_services": "services",
    "ww_register_commands": "commands",
    "ww_register_config": "settings",
    "ww_register_discovery": "discovery",
}


# --- list -----------------------------------------------------------------------------------------


@plugin_app.command("list")
def list_command(json: Json = False) -> None:
    """Show every installed plugin: loaded, disabled, unavailable or failed, why, and what to do.

    The plugins are loaded, configured and asked for their services as a node would do it, but
    nothing is started. Of the auth backends it says which one is configured, and which one the node
    that runs here has. A node that you may ask says which services are not granted to members yet.
    """
    from wetware import config as configuration
    from wetware import loader

    config = configuration.load({"node.data_dir": options.data_dir}, path=options.config)
    plugins = loader.load(config, loader.INSPECT)
    authority, node = plugins.auth_selected, _running(config.node.data_dir)
    selected: tuple[str, ...] = () if authority is None else (authority,)
    with contextlib.suppress(ConfigError):  # `ww config` says what is wrong with it
        selected += plugins.also
    _probe(plugins)
    ungranted = [] if node is None else _ungranted(config.node.data_dir)
    if json:
        return out_json([_as_json(status, selected, node, ungranted) for status in plugins.report])
    rows = [
        (
            status.name,
            status.offer.label or "-",
            "not running" if _waits(status, node) else str(status.state),
            _offers(status, selected, node),
        )
        for status in plugins.report
    ]
    table(("name", "from", "state", "offers"), rows)
    said = []
    for status in plugins.report:
        if status.reason:
            remedy = f"\n  try: {status.remedy}" if status.remedy else ""
            said.append(f"{status.name} is {status.state}: {status.reason}{remedy}")
    if node is not None and node.auth != (authority or "").removeprefix("auth_"):
        said.append(
            f"the node that runs here (pid {node.pid}) has the auth backend {node.auth!r}, and "
            f"{config.node.auth!r} is configured ({config.origin('node.auth')})"
        )
    said += [
        f"{status.name} is installed, not running: restart the node"
        for status in plugins.report
        if _waits(status, node)
    ]
    for service in ungranted:
        command = here(f"ww role accept {service}")
        said.append(f"{service} is installed, not granted to members yet: {command}")
    for text in said:
        out()
        out(text)


def _running(data_dir: Path) -> LocalNode | None:
    """What the node that holds this data directory says of itself; None where none runs."""
    from wetware.client import LocalNode
    from wetware.node.data_dir import holder_pid

    try:
        node = LocalNode.find(data_dir)
    except WetwareError:
        return None
    return node if holder_pid(data_dir) == node.pid else None


def _ungranted(data_dir: Path) -> list[str]:
    """What the node that runs here says of services that no operator has accepted.

    [] where it may not be asked, or not without somebody at the terminal.
    """
    import asyncio

    from wetware.client import connect
    from wetware.client.contexts import Context

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


def _probe(plugins: Plugins) -> None:
    """Call the declaring hooks with a context that leads nowhere: no peers, no lasting files."""
    import asyncio
    import tempfile

    from wetware.cli.mount import mounted
    from wetware.testing import plugin_context

    async def probe(folder: str) -> None:  # in a running loop, as in a node
        def context(name: str, config: object) -> PluginContext:
            data_dir = Path(folder, name)
            data_dir.mkdir(mode=0o700, exist_ok=True)
            return plugin_context(data_dir, config, name=name)

        plugins.services(context, ("node", "session"))
        plugins.discoveries(context)
        if mounted is not None:
            plugins.take_failures(mounted)

    with tempfile.TemporaryDirectory(prefix="ww-plugins-") as folder:
        asyncio.run(probe(folder))


def _waits(status: Plugin, node: LocalNode | None) -> bool:
    """Whether a node would load the plugin, and the one that runs has not."""
    return node is not None and str(status.state) == "loaded" and status.name not in node.plugins


def _is_auth_of(status: Plugin, node: LocalNode | None) -> bool:
    """Whether the plugin has the node's auth backend, by the contract of AuthBackend's name."""
    auth = () if node is None else (node.auth, *node.auth_also)
    return "ww_register_auth" in status.hooks and status.name.removeprefix("auth_") in auth


def _offers(status: Plugin, selected: tuple[str, ...], node: LocalNode | None) -> str:
    offers = {hook: _OFFERS[hook] for hook in status.hooks}
    if status.services:
        offers["ww_register_services"] = "service " + ", ".join(status.services)
    if "ww_register_auth" in offers:
        what = {"configured": status.name in selected, "running": _is_auth_of(status, node)}
        said = ", ".join(word for word, true in what.items() if true)
        offers["ww_register_auth"] += f" ({said})" if said else ""
    return "; ".join(offers.values()) or "-"


def _as_json(
    status: Plugin, selected: tuple[str, ...], node: LocalNode | None, ungranted: list[str]
) -> dict[str, object]:
    return {
        "name": status.name,
        "dist": status.offer.dist,
        "version": status.offer.version,
        "bundled": status.offer.bundled,
        "state": status.state,
        "reason": status.reason,
        "remedy": status.remedy,
        "hooks": list(status.hooks),
        "services": list(status.services),
        "running": None if node is None else status.name in node.plugins,
        "ungranted": [name for name in status.services if name in ungranted],
        "auth_selected": status.name in selected,
        "auth_running": _is_auth_of(status, node),
    }


# --- new ------------------------------------------------------------------------------------------


@plugin_app.command("new", epilog=examples("ww plugin new counter", "ww plugin new acme --auth"))
def new_command(
    name: str,
    auth: Annotated[bool, typer.Option("--auth", help="An auth backend, and its signer.")] = False,
) -> None:
    """Write a plugin to begin with, into a new folder here: a service, or an auth backend.

    It works as it stands, and its tests are the conformance suite of `wetware.testing`.
    """
    from wetware.loader import is_plugin_name

    plugin = f"auth_{name}" if auth else name
    if not is_plugin_name(plugin) or not name[:1].isalpha():
        raise InvalidArgument(
            f"{name[:64]!r} is not a plugin's name", hint="a-z, 0-9 and _, e.g. `counter`"
        )
    folder = Path(f"ww-{plugin.replace('_', '-')}")
    try:
        folder.mkdir()
        for path, text in template("auth" if auth else "service").items():
            file = folder / _renamed(path, name)
            file.parent.mkdir(exist_ok=True)
            # An interface's ID is that of its own in all schemas that a program loads.
            text = text.replace("0xc0ffee0123456789", f"0x{secrets.randbits(63) | 1 << 63:x}")
            file.write_text(_renamed(text, name))
            out(str(file))
    except OSError as exc:
        raise InvalidArgument(
            f"cannot write {folder}: {exc.strerror}", hint="choose another name, or another folder"
        ) from exc
    note(f"install it: pip install --no-deps -e ./{folder}, and test it: pytest {folder}")


def template(kind: str) -> dict[str, str]:
    """Path → text of the files of a "service" or an "auth" backend."""
    files = sorted((TEMPLATES / kind).rglob("*.txt"))
    return {
        str(file.relative_to(TEMPLATES / kind).with_suffix("")): file.read_text() for file in files
    }


def _renamed(text: str, name: str) -> str:
    """The text with `name` for the counter of the one example, or the acme of the other."""
    dashed, title = name.replace("_", "-"), "".join(part.title() for part in name.split("_"))
    text = re.sub(r"(ww-(?:auth-)?)(?:counter|acme)|(?:acme)(?=-key)", rf"\g<1>{dashed}", text)
    text = re.sub("counter|acme", name, text)
    return re.sub("Counter|Acme", title, text)
