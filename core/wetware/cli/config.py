"""`ww config`: what applies, where it came from, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wetware.cli.app import Json, note, options, out, out_json, table
from wetware.errors import EXIT_CONFIG, ConfigError, InvalidArgument, PluginError

if TYPE_CHECKING:
    from wetware.config import Config
    from wetware.loader import Plugin

config_app = typer.Typer(no_args_is_help=True, help="The configuration: ww.toml, WW_*, flags.")


@config_app.command("show")
def show_command(
    section: Annotated[
        str | None, typer.Argument(help="Only this section, e.g. node or plugins.pubsub.")
    ] = None,
    json: Json = False,
) -> None:
    """Show every effective setting and where it came from."""
    from wetware import loader
    from wetware.config import load

    config = load({"node.data_dir": options.data_dir}, path=options.config)
    settings = config.settings(loader.load(config, loader.INSPECT).schemas)
    if section is not None:
        sections = {each.key.rpartition(".")[0] for each in settings}
        if section not in sections:
            raise InvalidArgument(
                f"no section {section!r}", hint="there are " + ", ".join(sorted(sections))
            )
        settings = tuple(each for each in settings if each.key.rpartition(".")[0] == section)
    if json:
        return out_json(
            [
                {
                    "key": each.key,
                    "value": each.plain,
                    "origin": each.origin.kind,
                    "where": each.origin.where,
                }
                for each in settings
            ]
        )
    table(
        ("setting", "value", "from"),
        [(each.key, each.text or "-", str(each.origin)) for each in settings],
    )


@config_app.command("check")
def check_command(json: Json = False) -> None:
    """Say everything that is wrong with the configuration; exit code 78 if anything is."""
    config, _, problems = inspect({"node.data_dir": options.data_dir}, options.config)
    path = config.path if config is not None and config.exists else None
    if json:
        wrong = [
            {name: getattr(each, name) for name in ("code", "message", "hint")} for each in problems
        ]
        out_json({"path": path, "ok": not problems, "problems": wrong})
    else:
        for each in problems:
            note(f"ww: {each.message}")
            if each.hint:
                note(f"try: {each.hint}")
        if not problems:
            out(f"{path or 'the defaults'}: ok")
    if problems:
        raise typer.Exit(EXIT_CONFIG)


def inspect(
    flags: Mapping[str, object], path: Path | None
) -> tuple[Config | None, Sequence[Plugin], list[ConfigError]]:
    """The configuration, the plugins that it selects, and all that is wrong with it, once each.

    None for one that cannot be read, and no plugins where they cannot be selected.
    """
    from wetware import loader
    from wetware.config import load

    try:
        config = load(flags, path=path)
    except ConfigError as exc:  # there is nothing further to judge
        return None, (), [exc]
    found: list[ConfigError]
    report: Sequence[Plugin] = ()
    try:
        plugins = loader.load(config, loader.INSPECT)
        found = [*config.problems(plugins.schemas), *plugins.problems]
        report = plugins.report
    except ConfigError as exc:  # [node] or [plugins] is wrong: the plugins cannot be selected
        found = [*config.problems(), exc]
    return config, report, list({each.message: each for each in found}.values())


@config_app.command("path")
def path_command(json: Json = False) -> None:
    """Print where the configuration file is, or would be."""
    from wetware.config import file_path

    path = file_path(options.config)
    if json:
        return out_json({"path": path, "exists": path.exists()})
    out(str(path))
    if not path.exists():
        note("it does not exist; the defaults apply (`ww config reference` lists them)")


@config_app.command("reference")
def reference_command() -> None:
    """Print the reference of every setting, as Markdown."""
    out(reference().rstrip("\n"))


def reference() -> str:
    """docs/reference/config.md: the core and the bundled plugins, whatever else is installed."""
    from wetware import loader
    from wetware.config import defaults, describe
    from wetware.hookspecs import GROUP

    bundled = tuple(offer for offer in loader.find() if offer.bundled and offer.group == GROUP)
    plugins = loader.load(defaults(), loader.INSPECT, offers=bundled)
    for status in plugins.report:
        if status.state is not loader.State.LOADED:
            raise PluginError(
                f"the reference would lack the settings of {status.name!r}: {status.reason}",
                hint=status.remedy,
            )
    return describe(plugins.schemas)
