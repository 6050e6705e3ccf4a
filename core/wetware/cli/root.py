"""`ww` itself: its commands in sections, and global options before and after the command."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from typer._click.exceptions import UsageError
from typer.core import TyperGroup

from wetware.cli import given
from wetware.cli.app import here_only, options, usage, wants_json

if TYPE_CHECKING:
    from typer._click.core import Command, Context, Parameter
    from typer._click.formatting import HelpFormatter

LATE: Final = frozenset({"node", "context", "key", "data_dir", "config", "debug"})
"""Names of the global options that are taken after the command as well."""
HERE: Final = frozenset({"node", "id", "key", "config", "plugin", "completion"})
"""Commands about this machine alone: they log in nowhere, whatever node is named."""
OTHER: Final = "More"
"""The section of commands that name none."""


class Root(given.Root):
    """`ww`. A command is in the section that its `rich_help_panel` names."""

    def resolve_command(
        self, ctx: Context, args: list[str]
    ) -> tuple[str | None, Command | None, list[str]]:
        """Find the command that the words name; from there on it takes global options, too."""
        command = self.get_command(ctx, args[0]) if args else None
        if command is not None:
            _take_late(command, [each for each in self.params if each.name in LATE])
            if args[0] in HERE:
                _keep_here(command, f"ww {args[0]}")
        return super().resolve_command(ctx, args)

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


def _take_late(command: Command, late: list[Parameter]) -> None:
    """Let a command, and all below it, take the global options that it has no namesakes of."""
    own = {opt for param in command.params for opt in param.opts}
    command.params += [_late(each) for each in late if not own.intersection(each.opts)]
    if isinstance(command, TyperGroup):
        for each in command.commands.values():
            _take_late(each, late)


def _keep_here(command: Command, name: str) -> None:
    """Refuse a node, or a reference, that was named for a command which would not look at it."""
    if isinstance(command, TyperGroup):
        for each in command.commands.values():
            _keep_here(each, f"{name} {each.name}")
    elif (run := command.callback) is not None:

        @functools.wraps(run)
        def checked(*args: Any, **kwargs: Any) -> Any:
            here_only(name)
            return run(*args, **kwargs)

        command.callback = checked


def _late(option: Parameter) -> Parameter:
    name = option.name or ""

    def store(ctx: Context, param: Parameter, value: Any) -> None:
        options.take({name: value})

    made: Any = copy.copy(option)
    made.name = f"global {name}"  # an argument may have the plain one: `ww ping NODE`
    made.hidden, made.expose_value, made.callback = True, False, store
    return made  # type: ignore[no-any-return]


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
