"""Plain values, as servants and callers see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def payload_bytes(value: Any) -> int:
    """Bytes of Data and Text in a plain value; a number or a bool counts 8."""
    total, todo = 0, [value]
    while todo:
        item = todo.pop()
        kind = type(item)
        if kind is bytes:
            total += len(item)
        elif kind is str:
            total += len(item) if item.isascii() else len(item.encode())
        elif kind is list or kind is tuple:
            todo.extend(item)
        elif isinstance(item, Mapping):
            todo.extend(item.values())
        elif kind in (int, float, bool):
            total += 8
    return total
