"""A value of the file, of a variable or of a flag → a value of the setting's type."""

from __future__ import annotations

import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Union

from wetware.errors import InvalidArgument

LIST_ITEMS_MAX: Final = 1024
TEXT_CHARS_MAX: Final = 4096

_TRUE, _FALSE = frozenset({"true", "1", "yes", "on"}), frozenset({"false", "0", "no", "off"})
_NAMES: Final = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}
_SECTIONS: Final = Mapping[str, Mapping[str, Any]]
"""Of a setting that is a section of named sections; its `check` judges what is in them, and begins
what it says with the place, e.g. "NAME.key: too long"."""


class Wrong(Exception):
    """A value is not of the type.

    Attributes:
        expected: What would be.
    """

    def __init__(self, expected: str) -> None:
        super().__init__(expected)
        self.expected = expected


def hints_of(cls: type) -> dict[str, Any]:
    """The resolved annotations of a section.

    The names that sections use are supplied, because linters move imports which only annotations
    need under TYPE_CHECKING.
    """
    supplied: dict[str, Any] = {"Path": Path, "Literal": Literal, "Mapping": Mapping, "Any": Any}
    try:
        return typing.get_type_hints(cls, localns=supplied)
    except NameError:  # importing it costs 60 ms, which `ww --help` does not pay
        from wetware.base.multiaddr import Multiaddr

        return typing.get_type_hints(cls, localns=supplied | {"Multiaddr": Multiaddr})


def type_name(hint: Any) -> str:
    """What to write for a type, e.g. "a list of addresses"; raises TypeError if unsupported."""
    hint = _without_none(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if _is_address(hint):
        return "an address (/ip4/HOST/tcp/PORT)"
    if hint == _SECTIONS:
        return "a section of sections"
    if typing.get_origin(hint) is Literal and {*map(type, typing.get_args(hint))} == {str}:
        return "one of " + ", ".join(f'"{choice}"' for choice in typing.get_args(hint))
    if (item := _item_type(hint)) is not None:
        if _is_address(item):
            return "a list of addresses"
        inner = type_name(item)
        return f"a list of {inner if item is str else inner.removeprefix('a ') + 's'}"
    raise TypeError(f"{hint!r} is not supported in a configuration")


def is_number(hint: Any) -> bool:
    return _without_none(hint) in (int, float)


def convert(hint: Any, raw: object, *, text: bool, base: Path | None) -> Any:
    """`raw` as a value of the type.

    Args:
        hint: The resolved annotation.
        raw: From TOML (typed), or from a variable or flag.
        text: Whether a str may stand for other types, as it does in variables and flags.
        base: What a relative path is relative to; None for the working directory.

    Raises Wrong, or InvalidArgument where the type fits and the value does not.
    """
    hint = _without_none(hint)
    wrong = Wrong(type_name(hint))
    if hint == _SECTIONS:
        if isinstance(raw, Mapping) and all(isinstance(each, Mapping) for each in raw.values()):
            return raw
        raise wrong
    if (item := _item_type(hint)) is not None:
        if text and isinstance(raw, str):
            raw = [part.strip() for part in raw.split(",")] if raw.strip() else []
        if not isinstance(raw, list | tuple):
            raise wrong
        if len(raw) > LIST_ITEMS_MAX:
            raise InvalidArgument(f"a list of {len(raw)} items; at most {LIST_ITEMS_MAX}")
        return tuple(convert(item, part, text=text, base=base) for part in raw)
    if isinstance(raw, str):
        if len(raw) > TEXT_CHARS_MAX:
            raise InvalidArgument(f"a text of {len(raw)} characters; at most {TEXT_CHARS_MAX}")
        if "\0" in raw:
            raise InvalidArgument("a text with a zero byte")
    if typing.get_origin(hint) is Literal:
        if isinstance(raw, str) and raw in typing.get_args(hint):
            return raw
        raise wrong
    if _is_address(hint):
        if isinstance(raw, str):
            return hint.parse(raw)
        if isinstance(raw, hint):
            return raw
        raise wrong
    if hint is str or hint is Path:
        # An empty text is not "absent": a template or a shell left it where a value was unset.
        if raw == "" or not isinstance(raw, (str, hint)):
            raise wrong
        return raw if hint is str else _absolute(Path(raw), base)
    if hint is bool:
        if text and isinstance(raw, str) and raw.lower() in _TRUE | _FALSE:
            return raw.lower() in _TRUE
        if isinstance(raw, bool):
            return raw
        raise wrong
    return _number(hint, raw, text, wrong)


def _number(hint: type[int] | type[float], raw: object, text: bool, wrong: Wrong) -> int | float:
    try:
        if text and isinstance(raw, str):
            raw = hint(raw)
        if isinstance(raw, bool) or not isinstance(raw, int | float):
            raise wrong
        if hint is int:
            if not isinstance(raw, int):
                raise wrong
            return raw
        if math.isfinite(raw):
            return float(raw)
    except (ValueError, OverflowError):  # no number, or a whole one that no float holds
        pass
    raise wrong


def _absolute(path: Path, base: Path | None) -> Path:
    try:
        path = path.expanduser()
    except RuntimeError as exc:  # the user after "~" does not exist
        raise InvalidArgument(f"{path}: {exc}") from None
    return Path(os.path.abspath(path if base is None else base / path))


def _without_none(hint: Any) -> Any:
    """X of `X | None`; any other type as it is."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        args = [each for each in typing.get_args(hint) if each is not types.NoneType]
        if len(args) == 1:
            return args[0]
    return hint


def _item_type(hint: Any) -> Any:
    """X of `tuple[X, ...]`; None for any other type."""
    args = typing.get_args(hint)
    return args[0] if typing.get_origin(hint) is tuple and args[1:] == (...,) else None


def _is_address(hint: Any) -> bool:
    """Whether it is Multiaddr, without importing that."""
    return isinstance(hint, type) and hint.__name__ == "Multiaddr"


def toml(value: object) -> str:
    """A value as one writes it in TOML; "" for an absent one."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case list() | tuple():
            return "[" + ", ".join(map(toml, value)) + "]"
        case Mapping():
            return "{" + ", ".join(f"{_key(key)} = {toml(value[key])}" for key in value) + "}"
        case _:
            # JSON's escapes are TOML's; `ensure_ascii` off keeps names readable.
            return json.dumps(str(value), ensure_ascii=False)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml(key)


def plain(value: object) -> object:
    """A value as JSON has it."""
    match value:
        case None | bool() | int() | float():
            return value
        case list() | tuple():
            return [plain(item) for item in value]
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
        case _:
            return str(value)
