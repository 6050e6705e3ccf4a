"""What a person gave: values of the command line and the first line of stdin, never empty ones.

An unset variable of a shell leaves an empty value: `ww node --join "$TICKET"`. To take it for "not
given" would do something else than was asked, so it is refused before anything is done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from typer._click.core import Command, Context, Parameter, ParameterSource
from typer._click.types import FuncParamType
from typer.core import TyperGroup

from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT_BYTES_MAX: Final = 1 << 20
"""Of a text file that a person gives."""
LINE_BYTES_MAX: Final = 64 << 10
"""Of a line of stdin that a command reads as a value: a ticket, a reference."""


class Root(TyperGroup):
    """`ww`: refuses empty values for itself and for every command below it, plugins' included.

    A parameter whose values may be empty, such as the data that is published, has a `parser` of
    its own.
    """

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Parse the global options."""
        _refuse_empty(self.params)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: Context, args: list[str]
    ) -> tuple[str | None, Command | None, list[str]]:
        """Find the command that the words name."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            _refuse_below(command)
        return name, command, rest


def _refuse_below(command: Command) -> None:
    _refuse_empty(command.params)
    if isinstance(command, TyperGroup):
        for each in command.commands.values():
            _refuse_below(each)


def _refuse_empty(parameters: Sequence[Parameter]) -> None:
    for each in parameters:
        if not isinstance(each.type, FuncParamType):
            each.callback = _checked(each.callback)


def _checked(inner: Callable[..., Any] | None) -> Callable[[Context, Parameter, Any], Any]:
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

    return check


def read_line(what: str) -> str:
    """The first line of stdin, without its end; raises InvalidArgument, also for an empty one."""
    return _read("-", what, lambda file: file.readline(LINE_BYTES_MAX + 1), LINE_BYTES_MAX)


def read_text(file: str, what: str, *, bytes_max: int = TEXT_BYTES_MAX) -> str:
    """The text of a file, or of stdin for "-": UTF-8, with or without a byte order mark.

    Raises InvalidArgument: unreadable, not text, too long, or empty.
    """
    return _read(file, what, lambda opened: opened.read(bytes_max + 1), bytes_max)


def _read(file: str, what: str, read: Callable[[Any], bytes], bytes_max: int) -> str:
    where = "standard input" if file == "-" else file
    try:
        if file == "-":
            data = read(sys.stdin.buffer)
        else:
            with Path(file).expanduser().open("rb") as opened:
                data = read(opened)
        text = data.decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as exc:  # no home for its "~"
        why = exc.strerror if isinstance(exc, OSError) else exc
        why = "it is not UTF-8" if isinstance(exc, UnicodeDecodeError) else why
        named = f"from {where}" if file == "-" else file
        raise InvalidArgument(f"cannot read {what} {named}: {why}") from exc
    if len(data) > bytes_max:
        raise InvalidArgument(f"{where} is longer than {bytes_max} bytes, too long for {what}")
    if not text:
        raise InvalidArgument(
            f"{where} is empty, instead of {what}",
            hint="look at what should have written it",
            code="invalid.empty",
        )
    return text
