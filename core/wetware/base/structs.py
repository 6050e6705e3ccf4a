"""Dataclasses as structs of a schema with the same fields, and back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_struct(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name.

    A tuple is a list, a mapping a list of (key, value), and None -1: a struct has no empty fields.
    """
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}


def _plain(value: Any) -> Any:
    if value is None:
        return -1
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return [{"key": key, "value": text} for key, text in value.items()]
    return to_struct(value) if is_dataclass(value) else value


def from_struct(cls: type[T], struct: Mapping[str, Any]) -> T:
    """The inverse of `to_struct`, for a struct that may have more fields."""
    hashable: Any = cls
    return cls(**{name: _typed(hint, struct[name]) for name, hint in _hints(hashable).items()})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _typed(hint: Any, value: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_typed(get_args(hint)[0], item) for item in value)
    if get_origin(hint) is Mapping:
        return {pair["key"]: pair["value"] for pair in value}
    if is_dataclass(hint) and isinstance(hint, type):
        return from_struct(hint, value)
    return None if type(None) in get_args(hint) and value < 0 else value
