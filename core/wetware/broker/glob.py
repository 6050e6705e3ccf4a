"""Globs over names: `*` is any characters, "/" included, and `?` is one; case counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

VALUE_CHARS_MAX: Final = 4096
"""A longer value matches no glob: names are shorter, and a call must not hold the loop up."""


def glob(pattern: str, *, wild: str = "") -> Callable[[object], bool]:
    """A matcher: what is no str, or has more than VALUE_CHARS_MAX characters, does not match.

    Characters in `wild` stand for any text in a value, so only a `*` takes them.

    Takes time proportional to the value's length, whatever the pattern: no backtracking.
    """
    by_bits = wild or "?" in pattern
    return _glob_by_bits(pattern, wild) if by_bits else _glob_by_pieces(pattern)


def _glob_by_pieces(pattern: str) -> Callable[[object], bool]:
    if "*" not in pattern:
        return lambda value: type(value) is str and value == pattern
    first, *between, last = pattern.split("*")
    pieces = tuple(piece for piece in between if piece)
    chars_min = len(first) + len(last)

    def ends(value: object) -> bool:
        return (
            type(value) is str
            and chars_min <= len(value) <= VALUE_CHARS_MAX
            and value.startswith(first)
            and value.endswith(last)
        )

    def matches(value: object) -> bool:
        if type(value) is not str or not ends(value):
            return False
        at, end = len(first), len(value) - len(last)
        for piece in pieces:  # the leftmost place leaves the most for what follows
            at = value.find(piece, at, end)
            if at < 0:
                return False
            at += len(piece)
        return True

    return matches if pieces else ends


def _glob_by_bits(pattern: str, wild: str) -> Callable[[object], bool]:
    """Follow all places of the pattern at once, as bits.

    Bit i is set while the first i characters, stars left out, have matched.

    Source: Baeza-Yates & Gonnet, "A New Approach to Text Searching" (1992).
    """
    characters = pattern.replace("*", "")
    loops = 0  # bits at which any character leaves the match where it is
    at = 0
    for character in pattern:
        if character == "*":
            loops |= 1 << at
        else:
            at += 1
    steps: dict[str, int] = {}
    for i, character in enumerate(characters):
        steps[character] = steps.get(character, 0) | 1 << i
    any_step, done = steps.get("?", 0), 1 << len(characters)
    steps = {character: places | any_step for character, places in steps.items()}
    steps |= dict.fromkeys(wild, 0)

    def matches(value: object) -> bool:
        if type(value) is not str or len(value) > VALUE_CHARS_MAX:
            return False
        places = 1
        for character in value:
            step = steps.get(character, any_step)
            places = ((places & step) << 1) | (places & loops)
            if not places:
                return False
        return bool(places & done)

    return matches
