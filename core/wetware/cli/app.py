"""What every command shares: global options, running a client, output, errors and exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from wetware.errors import EXIT_FAILED, EXIT_USAGE, WetwareError

if TYPE_CHECKING:
    from wetware.client import Session

T = TypeVar("T")


@dataclass(slots=True)
class Options:
    """The global options of one invocation, set by `ww`'s callback.

    Attributes:
        node: Multiaddr of a remote node, or None for this machine's.
        key: Name or file of the user's key, or None for WW_KEY or "default".
        data_dir: The node's data directory, or None for the default.
        config: The configuration file, or None for the default.
        debug: Show tracebacks.
    """

    node: str | None = None
    key: str | None = None
    data_dir: Path | None = None
    config: Path | None = None
    debug: bool = False


options = Options()


def node_data_dir() -> Path:
    """The data directory that the flags, the environment and the configuration name."""
    from wetware.config import load

    return load({"node.data_dir": options.data_dir}, path=options.config).node.data_dir


def ask_passphrase(prompt: str = "Passphrase: ") -> str:
    """From the terminal; WetwareError where there is none."""
    import getpass

    if not sys.stdin.isatty():
        from wetware.errors import KeyFileError

        raise KeyFileError(
            "the key is encrypted and there is no terminal to ask for its passphrase",
            hint="set WW_PASSPHRASE",
            code="key.passphrase",
        )
    return getpass.getpass(prompt)


def run_client(work: Callable[[Session], Awaitable[T]]) -> T:
    """Log in as the global options say, run `work` with the session, and log out."""
    import asyncio

    from wetware.client import connect

    async def main() -> T:
        async with connect(
            options.node,
            key=options.key,
            data_dir=None if options.node else node_data_dir(),
            passphrase=ask_passphrase,
        ) as session:
            return await work(session)

    return asyncio.run(main())


def printable(text: str) -> str:
    """The text with control characters spelt out: a node must not write to our terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text
    )


def out(text: str = "") -> None:
    """A line of output, on stdout."""
    sys.stdout.write(printable(text) + "\n")


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr, so that stdout stays data."""
    sys.stderr.write(printable(text) + "\n")


def out_json(data: Any) -> None:
    """One JSON document, on stdout."""
    json.dump(data, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Left-aligned columns; prints nothing but the header where there are no rows."""
    cells = (tuple(printable(cell).replace("\n", "\\n") for cell in row) for row in rows)
    lines = [tuple(name.upper() for name in header), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        out("  ".join(padded).rstrip())


def fail(error: WetwareError) -> NoReturn:
    """Say what, why and the next step, and leave with the error's exit code."""
    note(f"ww: {error.message}")
    if error.hint:
        note(f"try: {error.hint}")
    raise SystemExit(error.exit_code)


def guarded_main(app: Callable[[], object]) -> None:
    """Run the command line; the only place that turns exceptions into exit codes."""
    try:
        app()
    except BaseExceptionGroup as group:
        _one_of(group)
    except WetwareError as exc:
        if options.debug:
            raise
        fail(exc)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader left (`ww sub chat | head`): not an error, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_FAILED) from None
    except Exception as exc:
        if options.debug:
            raise
        note(f"ww: unexpected {type(exc).__name__}: {exc}")
        note("try: the same command with --debug (ww --debug …), and report what it prints")
        raise SystemExit(EXIT_FAILED) from None


def _one_of(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """A task group's failure: the first of our own errors speaks for all."""
    if options.debug:
        raise group
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        ours, _ = first.split(WetwareError)
        first = (ours or first).exceptions[0]
    if isinstance(first, WetwareError):
        fail(first)
    if isinstance(first, KeyboardInterrupt):
        raise SystemExit(130)
    note(f"ww: unexpected {type(first).__name__}: {first}")
    note("try: the same command with --debug (ww --debug …), and report what it prints")
    raise SystemExit(EXIT_FAILED)


def usage(message: str, hint: str = "") -> NoReturn:
    """Refuse the command line."""
    note(f"ww: {message}")
    if hint:
        note(f"try: {hint}")
    raise SystemExit(EXIT_USAGE)
