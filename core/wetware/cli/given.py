"""Text that a person gives in a file or on stdin; an empty one is refused, as in `cli.root`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from wetware.errors import InvalidArgument

TEXT_BYTES_MAX: Final = 1 << 20
"""Of a text file that a person gives."""
LINE_BYTES_MAX: Final = 64 << 10
"""Of a line of stdin that a command reads as a value: a ticket, a reference."""


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
