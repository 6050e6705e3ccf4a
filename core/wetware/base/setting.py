"""A setting of ww.toml, as a field of a section."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import TypeVar

T = TypeVar("T")


def setting(
    default: T,
    help: str,
    *,
    min: float = 0,
    max: float | None = None,
    check: Callable[[T], None] | None = None,
    secret: bool = False,
    flag: str = "",
    default_text: str = "",
) -> T:
    """A field of a frozen dataclass that an operator can set.

    Args:
        default: Its value where nobody sets it.
        help: Its text in the reference.
        min: Of a number.
        max: Of a number; None for no bound.
        check: Raises ValueError or InvalidArgument for a value that cannot be.
        secret: It is not shown.
        flag: The option of `ww node` that sets it; by default the field's name.
        default_text: In place of the default in the reference.
    """
    more = {"min": min, "max": max, "check": check, "secret": secret, "flag": flag}
    return field(default=default, metadata={"help": help, "default": default_text, **more})
