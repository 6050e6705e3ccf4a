"""Names of a schema in Python."""

from __future__ import annotations

import keyword
import re

_UPPER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def snake(name: str) -> str:
    """The Python name of a schema name: `someName` → `some_name`; a keyword gets a `_` appended."""
    name = _UPPER.sub("_", name).lower()
    return f"{name}_" if keyword.iskeyword(name) else name
