"""`ww config`: what applies, where it came from, and what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from wetware.cli.app import note, options, out, out_json, table

if TYPE_CHECKING:
    from wetware.config import Config
    from wetware.errors import ConfigError
    from wetware.loader import Plugins

config_app = typer.Typer(no_args_is_help=True, help="The configuration: ww.toml, WW_*, flags.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@config_app.callback()
def _config() -> None:
    """The configuration: ww.toml, WW_*, flags."""


def _load() -> Config:
    from wetware.config import load

    return load({"node.data_dir": options.data_dir}, path=options.config)


def _inspect(config: Config) -> Plugins:
    from wetware import loader

    return loader.load(config, loader.INSPECT)


@config_app.command("show")
def show_command(
    section: Annotated[
        str | None, typer.Argument(help="Only this section, e.g. node or plugins.pubsub.")
    ] = None,
    json: Json = False,
) -> None:
    """Show every effective setting and where it came from."""
    config = _load()
    plugins = _inspect(config)
    settings = config.settings(plugins.schemas)
    if section is not None:
        sections = {each.key.rpartition(".")[0] for each in settings}
        if section not in sections:
            from wetware.errors import InvalidArgument

            raise InvalidArgument(
                f"no section {section!r}", hint="there are " + ", ".join(sorted(sections))
            )
        settings = tuple(each for each in settings if each.key.rpartition(".")[0] == section)
    if json:
        out_json(
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
        return
    table(
        ("setting", "value", "from"),
        [(each.key, each.text or "-", str(each.origin)) for each in settings],
    )


@config_app.command("check")
def check_command(json: Json = False) -> None:
    """Say everything that is wrong with the configuration; exit code 78 if anything is."""
    from wetware.errors import EXIT_CONFIG

    path, problems = _problems()
    if json:
        out_json(
            {
                "path": path,
                "ok": not problems,
                "problems": [
                    {"code": each.code, "message": each.message, "hint": each.hint}
                    for each in problems
                ],
            }
        )
    else:
        for each in problems:
            note(f"ww: {each.message}")
            if each.hint:
                note(f"try: {each.hint}")
        if not problems:
            out(f"{path or 'the defaults'}: ok")
    if problems:
        raise typer.Exit(EXIT_CONFIG)


def _problems() -> tuple[str | None, list[ConfigError]]:
    """The file, if there is one, and what is wrong, each thing once."""
    from wetware.errors import ConfigError

    try:
        config = _load()
    except ConfigError as exc:  # there is nothing further to judge
        return None, [exc]
    path = str(config.path) if config.exists else None
    try:
        plugins = _inspect(config)
        found = [*config.problems(plugins.schemas), *plugins.problems]
    except ConfigError:  # [node] or [plugins] is wrong: the plugins cannot be selected
        found = config.problems()
    return path, list({each.message: each for each in found}.values())


@config_app.command("path")
def path_command(json: Json = False) -> None:
    """Print where the configuration file is, or would be."""
    from wetware.config import file_path

    path = file_path(options.config)
    if json:
        out_json({"path": str(path), "exists": path.exists()})
        return
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
    from wetware.errors import PluginError
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
