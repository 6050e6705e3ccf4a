"""Names of keys: paths that people write, and where each service has its own in the store."""

from __future__ import annotations

import re
from typing import Final

from wetware.errors import InvalidArgument

PATH_CHARS_MAX: Final = 512
PARTS_MAX: Final = 16

USER: Final = b"k"
"""What is before a path in the store. Nothing of one of these begins as another does."""
NAME: Final = b"n"
LOCK: Final = b"l"
COUNTER: Final = b"c"
BARRIER: Final = b"b"

_PATH = re.compile(r"(/[A-Za-z0-9._~:@+-]+)+")


def check_path(path: str) -> str:
    """The path, if it is one; raises InvalidArgument "invalid.key".

    Plain ASCII, so that two that look the same are the same.
    """
    if len(path) <= PATH_CHARS_MAX and path.count("/") <= PARTS_MAX and _PATH.fullmatch(path):
        return path
    shown = path if len(path) <= 40 else f"{path[:40]}…"
    raise InvalidArgument(
        f"{shown!r} is no path of 1 to {PARTS_MAX} parts and at most {PATH_CHARS_MAX} characters",
        hint="write /PART/PART with letters, digits and . _ ~ : @ + -",
        code="invalid.key",
    )


def check_prefix(path: str) -> str:
    """A path, or one with a slash at its end, or "/"; raises InvalidArgument "invalid.key"."""
    if path != "/":
        check_path(path.removesuffix("/"))
    return path
