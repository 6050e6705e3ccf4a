"""Generates api.md from docstrings: python docs/reference/api.py > docs/reference/api.md."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from wetware.client.installed import CLIENT_GROUP

COLUMNS = 88

HEAD = """# Python API

What applications and plugins import; all else may change in any version; `help(NAME)` says it too.
The contract of plugins is in [hooks](hooks.md).

Generated from the docstrings: `python docs/reference/api.py > docs/reference/api.md`.
"""

PARTS = (
    ("wetware", "For every application; the names are loaded at their first use."),
    ("wetware.client", "What sessions tell of, keys, and the node of this machine."),
    (CLIENT_GROUP, ""),
    ("wetware.member", ""),
    ("wetware.rpc", ""),
    ("wetware.errors", ""),
)


class Bare(str):
    """An annotation as it was written; `inspect` quotes those that are plain texts."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def reference() -> str:
    """The whole page."""
    parts, told = [HEAD], set[Any]()
    for name, about in PARTS:
        if name != CLIENT_GROUP:
            parts += module(name, about, told)
            continue
        points = sorted(metadata.entry_points(group=name), key=lambda point: point.name)
        for point in points:
            if point.dist is not None and point.dist.name == "wetware":
                parts += module(point.module, f"`session.{point.name}` is a `{point.attr}`.", told)
    return "\n".join(parts).rstrip() + "\n"


def module(name: str, about: str, told: set[Any]) -> Iterable[str]:
    """A module: its docstring unless something else is to be said, and what is public of it.

    What another module has told of is left out.
    """
    loaded = importlib.import_module(name)
    yield f"\n## `{name}`\n\n{about or text(loaded)}\n"
    names = getattr(loaded, "__all__", None) or [
        key
        for key, value in vars(loaded).items()
        if key[0] != "_" and getattr(value, "__module__", None) == name and described(value)
    ]
    for key in names:
        value = getattr(loaded, key)
        if described(value) and id(value) not in told:
            told.add(id(value))
            yield from entry(key, value)


def described(value: Any) -> bool:
    """Whether it is something with a docstring of its own."""
    return inspect.isclass(value) or inspect.isroutine(value)


def entry(name: str, value: Any) -> Iterable[str]:
    """A class with its methods, or a function."""
    yield f"### `{name}`\n"
    if not inspect.isclass(value):
        yield f"{signature(name, value)}\n{text(value)}\n"
        return
    made = dataclasses.is_dataclass(value) or "__init__" in vars(value)
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield signature(f"class {name}", value) if made else code(f"class {name}({bases})")
    yield text(value) + "\n"
    for key, member in vars(value).items():
        if key[0] == "_":
            continue
        if isinstance(member, property | functools.cached_property):
            yield f"#### `{name}.{key}`\n\n{text(member)}\n"
        elif inspect.isroutine(member):
            function = getattr(value, key)
            yield f"#### `{name}.{key}`\n\n{signature(key, function)}\n{text(function)}\n"


def signature(name: str, value: Any) -> str:
    """How it is called, one parameter a line where the line would be long."""
    found = inspect.signature(value)
    params = [
        param.replace(annotation=bare(param.annotation))
        for param in found.parameters.values()
        if param.name not in ("self", "cls")
    ]
    returned = found.return_annotation
    inner = str(inspect.Signature(params))[1:-1]
    tail = "" if inspect.isclass(value) or returned is found.empty else f" -> {bare(returned)}"
    head = f"async {name}" if inspect.iscoroutinefunction(value) else name
    if len(f"{head}({inner}){tail}") > COLUMNS and inner:
        lines = ",\n    ".join(_commas(inner))
        inner = f"\n    {lines},\n"
    return code(f"{head}({inner}){tail}")


def _commas(inner: str) -> list[str]:
    """The parameters of a signature: parted by commas that are in no bracket."""
    found, depth = [""], 0
    for char in inner:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            found.append("")
        else:
            found[-1] += char
    return [each.strip() for each in found]


def bare(annotation: Any) -> Any:
    """The annotation without quotes."""
    return Bare(annotation) if isinstance(annotation, str) else annotation


def code(line: str) -> str:
    """As a block of Python."""
    return f"```python\n{line}\n```\n"


def text(value: Any) -> str:
    """The docstring as Markdown: `Args:` and `Attributes:` as lists."""
    doc = inspect.getdoc(value) or ""
    if not isinstance(value, property) and not inspect.ismodule(value):
        own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        doc = inspect.cleandoc(own) if own else ""
    return _SECTION.sub(_list, doc)


_SECTION = re.compile(r"^(Args|Attributes):\n((?:    .*\n?|\n(?=    ))+)", re.MULTILINE)


def _list(found: re.Match[str]) -> str:
    items = re.sub(r"^    (\w+): ", r"- `\1`: ", found[2], flags=re.MULTILINE)
    lines = [line.strip() if line[:2] != "- " else line for line in items.splitlines()]
    title = "Parameters" if found[1] == "Args" else "Attributes"
    body = "\n".join(line if line[:2] == "- " or not line else f"  {line}" for line in lines)
    return f"{title}:\n\n{body}\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
