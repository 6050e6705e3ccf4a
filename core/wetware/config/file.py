"""ww.toml with its lines, so that an error can name one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from wetware.base import paths
from wetware.errors import ConfigError

FILE_BYTES_MAX: Final = 1 << 20
"""A configuration file is text that a person wrote; more is a mistake."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from.

    Attributes:
        kind: "default", "file", "env" or "flag"; a later one wins.
        where: The file and line, the variable or the flag; "default" for a default.
    """

    kind: Literal["default", "file", "env", "flag"]
    where: str

    def __str__(self) -> str:
        return self.where


class File:
    """A parsed ww.toml. Raises ConfigError for a text that is no TOML."""

    def __init__(self, path: Path, text: str, *, exists: bool = True) -> None:
        self.path, self.exists = path, exists
        self._text = text
        self.data: dict[str, Any] = _parse(path, text) if text else {}

    def where(self, *keys: str) -> Origin:
        """The file and the line of a key, or of the innermost section around it that is found."""
        lines = (self._line(keys[:depth]) for depth in range(len(keys), 0, -1))
        line = next(filter(None, lines), None)
        return Origin("file", f"{self.path} line {line}" if line else str(self.path))

    def _line(self, keys: tuple[str, ...]) -> int | None:
        # A look for the usual way to write it. tomllib gives no positions.
        table: tuple[str, ...] = ()
        for number, line in enumerate(self._text.splitlines(), 1):
            if header := re.match(r"\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$", line):
                table = tuple(part.strip(" \t\"'") for part in header[1].split("."))
                if table[: len(keys)] == keys:
                    return number
            elif entry := re.match(r"\s*([\w.\"'-]+)\s*=", line):
                key = tuple(part.strip("\"'") for part in entry[1].split("."))
                if (*table, *key)[: len(keys)] == keys:
                    return number
        return None


def _parse(path: Path, text: str) -> dict[str, Any]:
    import tomllib  # 5 ms, which a machine without a file does not pay

    try:
        return tomllib.loads(text)
    except ValueError as exc:  # TOMLDecodeError, and what int() says of 5,000 digits
        end = f"at line {len(text.splitlines())}, the end of the file"
        raise ConfigError(
            f"{path} is not valid TOML: {str(exc).replace('at end of document', end)}",
            hint="a text is in quotes, a list in brackets: https://toml.io",
            code="config.toml",
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{path} is nested too deeply to be a configuration", code="config.toml"
        ) from None


def file_path(path: Path | None = None, *, env: Mapping[str, str] | None = None) -> Path:
    """Where the configuration file is: `path`, else `WW_CONFIG`, else `$WW_HOME/ww.toml`."""
    env = os.environ if env is None else env
    named = path or paths.variable("WW_CONFIG", env)
    return paths.absolute(named or paths.home(env) / "ww.toml", "the configuration file")


def read(path: Path, *, required: bool) -> File:
    """The file, or an empty one if it does not exist and is not `required`.

    Raises ConfigError: it cannot be read, or is no TOML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        if not required:
            return File(path, "", exists=False)
        raise ConfigError(
            f"no configuration file at {path}",
            hint="create it, or unset WW_CONFIG and --config",
            code="config.unreadable",
        ) from None
    except OSError as exc:
        raise ConfigError(
            f"cannot read {path}: {exc.strerror}",
            hint="check the permissions of the file and its folders",
            code="config.unreadable",
        ) from exc
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(
            f"{path} is larger than {FILE_BYTES_MAX >> 20} MiB; it is not a configuration",
            code="config.unreadable",
        )
    try:
        text = data.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as exc:
        line = data[: exc.start].count(b"\n") + 1
        raise ConfigError(
            f"{path} is not valid TOML: line {line} is not UTF-8", code="config.toml"
        ) from None
    return File(path, text)
