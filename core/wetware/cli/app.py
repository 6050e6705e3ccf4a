"""What every command shares: global options, running a client, output, errors and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    NoReturn,
    TextIO,
    TypeVar,
)

import typer

from wetware.base import paths
from wetware.cli import streams
from wetware.errors import EXIT_FAILED, LOG_IN_AGAIN, InvalidArgument, KeyFileError, WetwareError

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.client import Session
    from wetware.client.contexts import Context

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
"""The parameter of every command that prints data."""
_REPORT: Final = "the same command with --debug (ww --debug …), and report what it prints"


class Options:
    """The global options of one invocation, given before or after the command.

    What is not given is the context's: a context is global options under a name.
    """

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self._context: Context | None = None

    def take(self, given: Mapping[str, Any]) -> None:
        """Some that were given; None and False stand for one that was not."""
        self.given |= {name: value for name, value in given.items() if value}
        self._context = None

    @property
    def context(self) -> Context:
        """The chosen context, without its node where another node is given."""
        if self._context is None:
            from wetware.client import contexts

            self._context = contexts.choose(self.given.get("context"))
            if self.given.get("data_dir") is not None:
                self._context = contexts.Context(key=self._context.key)
        return self._context

    @property
    def target(self) -> str | None:
        """An address, a reference or a selector that stands instead of the context's node."""
        node: str | None = self.given.get("node")
        # A context that is given counts for more than a variable.
        return node or (None if "context" in self.given else paths.variable("WW_NODE"))

    @property
    def node(self) -> str | None:
        """Which node is meant, if it is another one than this machine's."""
        return self.target or self.context.node or None

    @property
    def key(self) -> str | None:
        """Name or file of the user's key, or None for "default"."""
        key: str = self.given.get("key", "")
        mine = self.context.key
        return key or ("context" in self.given and mine) or paths.variable("WW_KEY") or mine or None

    @property
    def data_dir(self) -> Path | None:
        """The node's data directory, or None for the default."""
        if (given := self.given.get("data_dir")) is not None:
            return Path(given)
        return Path(self.context.data_dir) if self.context.data_dir else None

    @property
    def config(self) -> Path | None:
        """The configuration file, or None for the default."""
        return Path(self.given["config"]) if "config" in self.given else None

    @property
    def debug(self) -> bool:
        """Show tracebacks."""
        return "debug" in self.given


options = Options()


def examples(*lines: str) -> str:
    """What `typer` takes as the `epilog` of a command: command lines, each on one of its own."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


def here_only(command: str) -> None:
    """Refuse `--node` and `ww use REF` for a command that is about this machine."""
    if "node" in options.given:
        usage(
            f"`{command}` is about this machine, and a node or a reference is named",
            "run it on that node's own machine, without --node",
        )


def node_data_dir() -> Path:
    """The data directory that the flags, the environment and the configuration name."""
    from wetware.config import load

    return load({"node.data_dir": options.data_dir}, path=options.config).node.data_dir


def ask_passphrase(prompt: str = "Passphrase: ") -> str:
    """From the terminal; WetwareError where there is none."""
    import getpass

    if not sys.stdin.isatty():
        raise KeyFileError(
            "the key is encrypted and there is no terminal to ask for its passphrase",
            hint="set WW_PASSPHRASE",
            code="key.passphrase",
        )
    return getpass.getpass(prompt)


def confirm(question: str, *, yes: bool) -> None:
    """Ask at the terminal before what is for good, or reaches everybody.

    `yes` is the answer of --yes. SystemExit 1 if it is no; InvalidArgument where nobody can be
    asked: an empty stdin is not consent.
    """
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise InvalidArgument(
            f"{question} There is no terminal to ask at.",
            hint="the same command with --yes",
            code="invalid.unconfirmed",
        )
    if not typer.confirm(question, err=True):
        raise SystemExit(EXIT_FAILED)


def _asked_before() -> Callable[[], str]:
    """The passphrase of the key, asked now if it is needed and there is somebody to ask.

    Not during the login: the time to type would count as the node's, and while the loop waits for
    the terminal Ctrl-C has no effect.
    """
    from wetware.client import KeyChoice

    if "WW_PASSPHRASE" not in os.environ and sys.stdin.isatty():
        try:
            KeyChoice(options.key, None, None).load()
        except KeyFileError as exc:  # what else is wrong with it the login says, if it needs it
            if exc.code == "key.passphrase":
                asked = ask_passphrase()
                return lambda: asked
    return ask_passphrase


def run_client(
    work: Callable[[Session], Awaitable[T]], *, reconnect: bool = False, here: bool = False
) -> T:
    """Log in as the global options say, run `work` with the session, and log out.

    `reconnect` is for commands that follow something: see `wetware.connect`. `here`: at the node of
    this machine, whatever the environment or a context names.
    """
    import asyncio

    from wetware.broker.sturdy import is_ref
    from wetware.client import connect, is_address
    from wetware.client.contexts import Context

    node, context = (None, Context()) if here else (options.target, options.context)
    passphrase = ask_passphrase if node and is_ref(node) else _asked_before()
    if not is_address(node or context.node):
        context = replace(context, data_dir=str(node_data_dir()))

    def tell(text: str) -> None:
        note(Styled("ww:", "yellow"), " " + text)

    async def main() -> T:
        async with connect(
            node,
            context=context,
            key=options.key,
            passphrase=passphrase,
            reconnect=tell if reconnect else False,
        ) as session:
            if session.notice:
                tell(session.notice)
            return await work(session)

    return asyncio.run(main())


def printable(text: str) -> str:
    """The text with control characters spelt out: a node must not write to our terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text
    )


def _encodable(text: str, stream: TextIO) -> str:
    """The text with what the stream's encoding does not have spelt out, so that it has a width."""
    if text.isascii():
        return text
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# --- colours: for a person at a terminal, never in data ---

Style = Literal["green", "yellow", "red", "dim"]

_SGR: Final[Mapping[Style, str]] = {"green": "32", "yellow": "33", "red": "31", "dim": "2"}
STATE_STYLES: Final[Mapping[str, Style]] = {
    "alive": "green",
    "suspect": "yellow",
    "dead": "red",
    "left": "dim",
    "foreign": "dim",
}
"""Of a member's state."""


CELL_COLUMNS_MIN: Final = 8
"""No column of a table is made narrower, even where the terminal is."""


class Styled(NamedTuple):
    """A part of a line in a colour, where there are colours."""

    text: str
    style: Style | None


def colours(stream: TextIO) -> bool:
    """Whether to write colours to a stream: to a terminal, unless the environment says otherwise.

    Sources: https://no-color.org, https://force-color.org; the order is CPython's own.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


def _width(text: str) -> int:
    """Columns of a printable text on a terminal."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 1 + (east_asian_width(c) in "WF") for c in text)


def _line(stream: TextIO, parts: Sequence[str | Styled]) -> None:
    painted, text = colours(stream), ""
    for part in parts:
        plain = _encodable(printable(part if isinstance(part, str) else part.text), stream)
        style = None if isinstance(part, str) else part.style
        # The escape is added last: nothing that came from elsewhere can bring one.
        text += f"\x1b[{_SGR[style]}m{plain}\x1b[0m" if painted and style and plain else plain
    stream.write(text + "\n")


def _terminal_columns() -> int | None:
    """Of the terminal that stdout is; None where it is none: data is never broken into lines."""
    from shutil import get_terminal_size

    return get_terminal_size((0, 0)).columns or None if sys.stdout.isatty() else None


def _fitting(lines: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column, so that all fit into the terminal.

    Columns that can be broken between words give way first, the widest one before the others.
    """
    columns = list(zip(*lines, strict=True))
    widths = [max(map(_width, column)) for column in columns]
    terminal = _terminal_columns()
    excess = 0 if terminal is None else sum(widths) + 2 * (len(widths) - 1) - terminal
    if excess <= 0:
        return widths
    words = [max(_width(word) for cell in column for word in cell.split(" ")) for column in columns]
    for _ in range(excess):
        broken = [i for i, width in enumerate(widths) if width > words[i]]
        broken = broken or [i for i, width in enumerate(widths) if width > CELL_COLUMNS_MIN]
        if not broken:
            break
        widths[max(broken, key=widths.__getitem__)] -= 1
    return widths


def _wrapped(text: str, columns: int) -> list[str]:
    """The lines of a cell, broken between words where that is possible."""
    if _width(text) <= columns:
        return [text]
    indent = text[: len(text) - len(text.lstrip(" "))]
    lines, line = [], ""
    for word in text.split():
        if line and _width(f"{indent}{line} {word}") <= columns:
            line += f" {word}"
            continue
        if line:
            lines.append(indent + line)
        line = ""
        for char in word:
            if line and _width(indent + line + char) > columns:
                lines.append(indent + line)
                line = ""
            line += char
    return [*lines, indent + line]


def out(*parts: str | Styled) -> None:
    """A line of output, on stdout."""
    _line(sys.stdout, parts)


def note(*parts: str | Styled) -> None:
    """A line for the person at the terminal, on stderr, so that stdout stays data."""
    _line(sys.stderr, parts)


def warn_of_loopback(what: str, addrs: Sequence[Multiaddr]) -> None:
    """Say so where what is passed on to another machine leads back to this one alone."""
    if all(addr.is_loopback for addr in addrs):
        note(
            Styled("warning:", "yellow"),
            f" {what} leads to this machine only: the node that it names listens on loopback, or "
            "has found no address that others could dial",
        )
        note("try: ww node --listen /ip4/ADDRESS/tcp/4001, with an address that they reach")


def here(text: str) -> str:
    """A hint as it is typed here: its commands with the --data-dir that was given.

    What an operator has to do may be for another machine.
    """
    given = options.given.get("data_dir")
    if given is None or "--data-dir" in text or text.startswith("an operator"):
        return text
    import re
    from shlex import quote

    words = f"ww --data-dir {quote(str(given))} "
    return re.sub(r"(?<![\w./-])ww (?=[a-z-])", lambda _: words, text)


def stamp(at_s: float) -> str:
    """A Unix time as the clock on the wall here shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))


def wants_json() -> bool:
    """Whether the command line asks for JSON; also of one that cannot be parsed."""
    args = sys.argv[1:]
    return "--json" in (args[: args.index("--")] if "--" in args else args)


def out_json(data: Any) -> None:
    """One JSON document, on stdout."""
    json.dump(data, sys.stdout, indent=2, default=_plain)
    sys.stdout.write("\n")


def _plain(value: Any) -> Any:
    """What JSON has for a dataclass and a mapping; all else as its text."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(value) if isinstance(value, Mapping) else str(value)


def pairs(*values: tuple[str, str | Styled]) -> None:
    """A line for each, behind its name."""
    width = max(len(name) for name, _ in values)
    for name, value in values:
        out(f"{name:{width}}  ", value)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[Any], None] | None]:
    """A bar with rate and remaining time, on stderr; None where that is no terminal.

    It is given what has `bytes`, `total` (0: not known) and `doing` (for people; "": `what`).
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        tasks: list[Any] = []

        def report(at: Any) -> None:
            total = at.total or None
            shown = printable(at.doing).replace("\n", " ")[:60] or what
            if not tasks:  # what an earlier attempt left is no speed
                tasks.append(bar.add_task(shown, total=total, completed=at.bytes))
            bar.update(tasks[0], description=shown, total=total, completed=at.bytes)

        yield report


def done(as_json: bool, data: Any, *notes: str) -> None:
    """What a command has done: with `--json` the data, else notes for the person there."""
    if as_json:
        return out_json(data)
    for text in notes:
        note(text)


def table(
    header: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    *,
    styles: Mapping[str, Mapping[str, Style]] | None = None,
) -> None:
    """Left-aligned columns under a header. `styles`: column's name → cell → its colour."""
    lines = [tuple(name.upper() for name in header)]
    for row in rows:
        cells = (printable(cell).replace("\n", "\\n") for cell in row)
        lines.append(tuple(_encodable(cell, sys.stdout) for cell in cells))
    widths = _fitting(lines)
    by_column = [(styles or {}).get(name, {}) for name in header]
    for number, line in enumerate(lines):
        wrapped = [_wrapped(cell.rstrip(), width) for cell, width in zip(line, widths, strict=True)]
        for at in range(max(map(len, wrapped))):
            parts: list[str | Styled] = []
            blank = 0  # columns that are written only if something comes behind them
            for cell, pieces, width, style in zip(line, wrapped, widths, by_column, strict=True):
                piece = pieces[at] if at < len(pieces) else ""
                if piece:
                    parts += [" " * blank, Styled(piece, style.get(cell) if number else None)]
                    blank = 0
                blank += width - _width(piece) + 2
            out(*parts)


def guarded_main(app: Callable[[], object]) -> None:
    """Run the command line; the only place that turns exceptions into exit codes."""
    streams.prepare()
    try:
        _guarded(app)
    finally:
        _guarded(sys.stdout.flush)  # at the interpreter's exit an error would have no words


def _guarded(step: Callable[[], object]) -> None:
    try:
        step()
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as exc:
        cause = _first(exc)
        if isinstance(cause, KeyboardInterrupt):
            raise SystemExit(130) from None
        if isinstance(cause, streams.ReaderGone):
            raise SystemExit(cause.exit_code) from None
        if options.debug:
            raise
        raise SystemExit(_tell(cause)) from None


def _first(exc: BaseException) -> BaseException:
    """Of a task group's failure the first of our own errors, which speaks for all."""
    while isinstance(exc, BaseExceptionGroup):
        ours, _ = exc.split(WetwareError)
        exc = (ours or exc).exceptions[0]
    return exc


def _tell(exc: BaseException) -> int:
    """What is wrong, and the next step, on stderr; with `--json`, one line of JSON.

    Returns the exit code.
    """
    from wetware.broker.sturdy import is_ref

    error = exc if isinstance(exc, WetwareError) else _unexpected(exc)
    hint = here(error.hint)
    if hint == LOG_IN_AGAIN and is_ref(options.target or ""):  # that would spend a use of it
        hint = "ask who gave you the reference for another one"
    if wants_json():
        said = {"code": error.code, "message": error.message, "hint": hint}
        sys.stderr.write(json.dumps({"error": {**said, "exit_code": error.exit_code}}) + "\n")
        return error.exit_code
    note(Styled("ww:", "red"), " " + error.message)
    if hint:
        note(f"try: {hint}")
    return error.exit_code


def _unexpected(exc: BaseException) -> WetwareError:
    """An exception that nobody took for an error: a defect, unless the disk is full."""
    from wetware.base.disk import remedy

    if hint := remedy(exc):
        return WetwareError(str(exc), hint=hint)
    return WetwareError(f"unexpected {type(exc).__name__}: {exc}", hint=_REPORT, code="unexpected")


def usage(message: str, hint: str = "") -> NoReturn:
    """Refuse the command line."""
    raise InvalidArgument(message, hint=hint, code="invalid.usage")
