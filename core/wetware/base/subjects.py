"""Subjects: names of tokens between dots, and patterns of them, as NATS has them.

In a pattern `*` stands for one token, and `>` in the last place for one or more: `a.*` matches
`a.b`, `a.>` matches `a.b` and `a.b.c`, and neither matches `a`. A token may be empty; `*` and `>`
are in no name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

ONE: Final = "*"
REST: Final = ">"
_WILD = re.compile(r"[*>]")


def literal(text: str) -> str:
    """What a name or pattern begins with before the first wildcard: all of a name."""
    return _WILD.split(text, maxsplit=1)[0]


def tokens_of(text: str) -> tuple[str, ...] | None:
    """The tokens of a name or pattern; None where a wildcard is where it cannot be."""
    *before, last = tokens = text.split(".")
    literals = [token for token in before if token != ONE]
    if last not in (ONE, REST):
        literals.append(last)
    return None if any(map(_WILD.search, literals)) else tuple(tokens)


def covers(pattern: Sequence[str], other: Sequence[str]) -> bool:
    """Whether every name that matches `other` matches `pattern`; a name matches itself alone.

    Takes the tokens of both, and time proportional to their number.
    """
    for i, token in enumerate(pattern):
        if token == REST:
            return len(other) > i
        if i == len(other) or (token != other[i] and (token != ONE or other[i] == REST)):
            return False
    return len(pattern) == len(other)
