"""The standard streams, whatever they are: closed, full, a pipe that nobody reads, ASCII only.

`prepare` is called once for every command, plugins' included. From then on what goes wrong with
standard output is an error of the command's own, and standard error takes everything: there is
nobody to tell that it does not.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, NoReturn, TextIO, cast

from wetware.errors import EXIT_PIPE, WetwareError


class OutputFailed(WetwareError):
    """Standard output cannot be written to."""

    code = "output"


class ReaderGone(OutputFailed):
    """Nobody reads standard output any more, as of `ww status | head -3`: no error to tell of."""

    code = "output.reader_gone"
    exit_code = EXIT_PIPE


def output_failed(exc: OSError) -> NoReturn:
    """Raise what a failed write to standard output means."""
    if isinstance(exc, BrokenPipeError):
        raise ReaderGone("nobody reads the output any more") from None
    raise OutputFailed(f"cannot write to standard output: {exc.strerror}") from exc


class _Outlet(io.FileIO):
    """The end of an output stream. Once a write has failed, one that tells takes and drops others.

    So that the error is told once, and not again by the interpreter's own flush at the exit. One
    that does not tell drops what fails alone: a node logs again when its disk has room.
    """

    def __init__(self, fd: int, *, tells: bool) -> None:
        super().__init__(fd, "w", closefd=False)
        self._tells, self._failed = tells, False

    def write(self, data: Any, /) -> int | None:  # type: ignore[override]  # typeshed: int
        if self._failed:
            return len(memoryview(data))
        try:
            return super().write(data)
        except OSError as exc:
            if self._tells:
                self._failed = True
                output_failed(exc)
            return len(memoryview(data))


def prepare() -> None:
    """Take over the process's standard streams; those that a test has replaced stay."""
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(
            io.BufferedReader(io.FileIO(_unusable(os.O_WRONLY), "r", closefd=False))
        )
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(sys.stdout, os.O_RDONLY, tells=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(sys.stderr, os.O_WRONLY, tells=False)


def _unusable(flags: int) -> int:
    """A descriptor in the place of a stream that was closed at the start.

    It takes the stream's number, which the next file or socket would get; what is opened the wrong
    way round refuses with EBADF, as the closed one does.
    """
    return os.open(os.devnull, flags)


def _text(stream: TextIO | None, flags: int, *, tells: bool) -> TextIO:
    """The text layer as the interpreter made it, on an outlet; it can write every character."""
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(_Outlet(_unusable(flags), tells=tells)))
    made = cast("io.TextIOWrapper", stream)
    outlet = _Outlet(stream.fileno(), tells=tells)
    return io.TextIOWrapper(
        # As the interpreter does it: unbuffered where PYTHONUNBUFFERED says so.
        cast("io.BufferedWriter", outlet) if made.write_through else io.BufferedWriter(outlet),
        encoding=made.encoding,
        errors="backslashreplace",
        line_buffering=True,  # what a command follows (`ww ls --watch | …`) is seen at once
        write_through=made.write_through,
    )
