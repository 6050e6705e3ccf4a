"""What is said of a wrong setting: where it is, what was expected, what is nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from wetware.errors import ConfigError

if TYPE_CHECKING:
    from wetware.config.file import Origin


def at(key: str, where: Origin | None) -> str:
    if where is None:
        return key
    return f"{key} in {where}" if where.kind == "file" else f"{key} ({where})"


def mistyped(key: str, where: Origin, expected: str, got: object, *, hint: str = "") -> ConfigError:
    return ConfigError(
        f"{at(key, where)}: expected {expected}, got {_shown(got)}", hint=hint, code="config.type"
    )


def unknown(
    what: str,
    where: Origin | None,
    known: Iterable[str],
    *,
    why: str = "no such setting",
    hint: str = "",
) -> ConfigError:
    """`what` is a setting, section or variable, and not among the `known` of its place."""
    near = nearest(what.rpartition(".")[2].strip("[]"), known)
    return ConfigError(
        f"{at(what, where)}: {why}" + (f"; did you mean {near}?" if near else ""),
        hint=hint or "`ww config reference` lists every setting",
        code="config.unknown",
    )


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    found = difflib.get_close_matches(word, list(known), 1, cutoff)
    return found[0] if found else None


def _shown(value: object) -> str:
    """A value as its writer sees it, short."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            shown = value if len(value) <= 60 else value[:59] + "…"
            return f'"{shown}"' if shown.isprintable() else repr(shown)
        case int() | float():
            return f"the number {value}"
        case list() | tuple():
            return "a list"
        case dict():
            return "a section"
        case _:
            return f"a {type(value).__name__}"
