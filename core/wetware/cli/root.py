"""`ww` itself: sections of commands, global options behind the command, no empty values."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from typer._click.core import ParameterSource
from typer._click.exceptions import UsageError
from typer._click.types import FuncParamType
from typer.core import TyperGroup

from wetware.cli.app import here_only, options, usage, wants_json
from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    import typer
    from typer._click.core import Command, Context, Parameter
    from typer._click.formatting import HelpFormatter

LATE: Final = frozenset({"node", "context", "key", "data_dir", "config", "debug"})
"""Names of the global options that are taken after the command as well."""
HERE: Final = frozenset({"node", "join", "leave", "id", "key", "config", "plugin", "completion"})
"""Commands about this machine alone: they log in nowhere, whatever node is named."""
OTHER: Final = "More"
"""The section of commands that name none."""
_OF_OTHERS: Final = frozenset({"help", "use"})
"""Commands that describe or run any other."""


class Root(TyperGroup):
    """`ww`. A command is in the section that its `rich_help_panel` names.

    What it does to its commands, plugins' included, it does once a command is chosen, because it
    costs time: the chosen one, and all below it, take the global options as well, and refuse empty
    values. An unset variable of a shell leaves such a value (`ww node --join "$TICKET"`), and to
    take it for "not given" would do something else than was asked. A parameter whose values may be
    empty, such as the data that is published, has a `parser` of its own.
    """

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Parse the global options."""
        for param in self.params:
            _refuse_empty(param)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: Context, args: list[str]
    ) -> tuple[str | None, Command | None, list[str]]:
        """Find the command that the words name, and make it one of ours."""
        name, command, rest = super().resolve_command(ctx, args)
        late = [each for each in self.params if each.name in LATE]
        for words, each in _below(f"ww {name}", command):
            own = {opt for param in each.params for opt in param.opts}
            each.params += [_late(option) for option in late if not own.intersection(option.opts)]
            for param in each.params:
                _refuse_empty(param)
            if name in HERE and each.callback is not None and not isinstance(each, TyperGroup):
                each.callback = _keep_here(each.callback, words)
        return name, command, rest

    def make_context(
        self, info_name: str | None, args: list[str], parent: Context | None = None, **extra: Any
    ) -> Context:
        """Parse the global options."""
        with _as_ours():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Context) -> Any:
        """Parse the rest, and run the command."""
        with _as_ours():
            return super().invoke(ctx)

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """The list of commands, section by section."""
        shown = [command for command in self.commands.values() if not command.hidden]
        width = max(len(command.name or "") for command in shown)
        for title, commands in sections(shown):
            limit = formatter.width - 6 - width
            rows = [(f"{c.name or '':{width}}", c.get_short_help_str(limit)) for c in commands]
            with formatter.section(title):
                formatter.write_dl(rows)


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    """With `--json` click's refusals are errors like all others; else click shows them."""
    try:
        yield
    except UsageError as exc:
        if not wants_json():
            raise
        path = exc.ctx.command_path if exc.ctx is not None else "ww"
        usage(exc.format_message(), f"{path} --help")


def sections(commands: Iterable[Command]) -> Iterator[tuple[str, list[Command]]]:
    """Titles, in the order in which they first come, and their commands."""
    found: dict[str, list[Command]] = {}
    for command in commands:
        found.setdefault(getattr(command, "rich_help_panel", None) or OTHER, []).append(command)
    other = found.pop(OTHER, None)
    yield from found.items()
    if other:
        yield OTHER, other


def _below(words: str, command: Command | None) -> Iterator[tuple[str, Command]]:
    """A command and all below it, each with the words that name it."""
    if command is not None:
        yield words, command
    if isinstance(command, TyperGroup):
        for name, each in command.commands.items():
            yield from _below(f"{words} {name}", each)


def _refuse_empty(param: Parameter) -> None:
    if isinstance(param.type, FuncParamType):
        return
    inner = param.callback

    def check(ctx: Context, param: Parameter, value: Any) -> Any:
        given = ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
        values = value if isinstance(value, list | tuple) else (value,)
        if given and any(isinstance(each, str) and not each.strip() for each in values):
            what = max(param.opts, key=len) if param.param_type_name == "option" else None
            what = what or param.human_readable_name.strip("[].…")
            raise InvalidArgument(
                f"{what} is given, and empty",
                hint=("" if param.required else "leave it out, or ")
                + "look at the shell's variable that it comes from",
                code="invalid.empty",
            )
        return inner(ctx, param, value) if inner is not None else value

    param.callback = check


def _keep_here(run: Callable[..., Any], command: str) -> Callable[..., Any]:
    """Refuse a node, or a reference, that was named for a command which would not look at it."""

    @functools.wraps(run)
    def checked(*args: Any, **kwargs: Any) -> Any:
        here_only(command)
        return run(*args, **kwargs)

    return checked


def _late(option: Parameter) -> Parameter:
    name = option.name or ""

    def store(ctx: Context, param: Parameter, value: Any) -> None:
        options.take({name: value})

    made: Any = copy.copy(option)
    made.name = f"global {name}"  # an argument may have the plain one: `ww ping NODE`
    made.hidden, made.expose_value, made.callback = True, False, store
    return made  # type: ignore[no-any-return]


def named(argv: Iterable[str]) -> str | None:
    """The command that a command line names; None if there is none, or all may be asked for."""
    words = iter(argv)
    for word in words:
        if word in ("--help", "-h"):
            return None
        if not word.startswith("-"):
            return None if word in _OF_OTHERS else word
        if word.startswith("--") and word[2:].replace("-", "_") in LATE - {"debug"}:
            next(words, None)  # its value
    return None


def take_only(app: typer.Typer, name: str | None) -> bool:
    """Drop every command but the one of that name; False, and all stay, if there is none."""
    if name not in {command_name(info) for info in infos(app)}:
        return False
    app.registered_commands = [i for i in app.registered_commands if command_name(i) == name]
    app.registered_groups = [i for i in app.registered_groups if command_name(i) == name]
    return True


def named_option(argv: Sequence[str], option: str) -> str | None:
    """The value of an option that is needed before the command line is parsed."""
    for arg, following in itertools.zip_longest(argv, argv[1:]):
        if arg == option and following:
            return following
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
    return None


def infos(app: typer.Typer) -> list[Any]:
    """What typer knows of the commands and groups of an app."""
    return [*app.registered_commands, *app.registered_groups]


def command_name(info: Any) -> str:
    """The name that typer gives a command or group."""
    if isinstance(info.name, str):
        return info.name
    inner = getattr(getattr(info, "typer_instance", None), "info", None)
    if isinstance(name := getattr(inner, "name", None), str):
        return name
    callback = getattr(info, "callback", None)
    return str(getattr(callback, "__name__", "")).lower().replace("_", "-")


def find(root: Command, ctx: Context, words: Iterable[str]) -> tuple[Command, Context]:
    """The command that words name, and a context for it; raises click's UsageError."""
    command = root
    for word in words:
        if not isinstance(command, TyperGroup):
            ctx.fail(f"No such command {word!r}: {ctx.command_path!r} has none below it.")
        _, found, _ = command.resolve_command(ctx, [word])
        if found is None:
            ctx.fail(f"No such command {word!r}.")
        command, ctx = found, type(ctx)(found, parent=ctx, info_name=word)
    return command, ctx
