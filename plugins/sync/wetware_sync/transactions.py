"""Transactions as people and programs write them, in JSON: see `ww kv txn --help`.

{"compare": [{"key": "/shop/stock", "value": "3"}, {"key": "/shop/sold", "modified": 0}],
 "then": [{"put": "/shop/stock", "value": "2"}, {"put": "/shop/sold", "hex": "01"}],
 "else": [{"del": "/shop/offer"}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from wetware.errors import InvalidArgument
from wetware_sync.client import Compare, Write
from wetware_sync.engine import OPERATIONS_MAX, TXN_BYTES_MAX

JSON_BYTES_MAX: Final = 8 * TXN_BYTES_MAX
"""Of a text: a byte of a value takes up to six characters."""
_REVISION_MAX: Final = 2**64 - 1
_NUMBERS: Final = ("modified", "created", "version")

T = TypeVar("T")

Transaction = tuple[list[Compare], list[Write], list[Write]]
"""Comparisons, and what is done if they hold, and if not."""


def parse(text: bytes | str) -> Transaction:
    """Raises InvalidArgument "invalid.txn" for anything that is not known: nothing is left out."""
    if len(text) > JSON_BYTES_MAX:
        raise _bad(f"more than {JSON_BYTES_MAX} bytes")
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as exc:
        raise _bad(f"it is no JSON: {exc}") from None
    if not isinstance(value, dict) or value.keys() - {"compare", "then", "else"}:
        raise _bad("an object with compare, then and else, each a list, is wanted")
    return (
        _each(value, "compare", _compare),
        _each(value, "then", _write),
        _each(value, "else", _write),
    )


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:40]!r} is there twice")
        found[name] = value
    return found


def _each(value: dict[str, Any], name: str, one: Callable[[Any], T]) -> list[T]:
    items = value.get(name, [])
    if not isinstance(items, list) or len(items) > OPERATIONS_MAX:
        raise _bad(f"{name} is a list of at most {OPERATIONS_MAX}")
    parsed = []
    for number, item in enumerate(items):
        try:
            parsed.append(one(item))
        except ValueError as exc:
            shown = json.dumps(item)
            shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
            raise _bad(f"{name}[{number}] is {shown}: {exc}") from None
    return parsed


def _compare(item: Any) -> Compare:
    match item:
        case {"key": str(key), "value": str(text)} if len(item) == 2:
            return Compare(key, value=text.encode())
        case {"key": str(key), "hex": str(text)} if len(item) == 2:
            return Compare(key, value=bytes.fromhex(text))
        case {"key": str(key), **rest} if len(rest) == 1:
            ((name, number),) = rest.items()
            if name in _NUMBERS and type(number) is int and 0 <= number <= _REVISION_MAX:
                term: Any = rest
                return Compare(key, **term)
    raise ValueError(
        "a key, and one of value and hex, texts, or modified, created and version, numbers, is "
        "wanted"
    )


def _write(item: Any) -> Write:
    match item:
        case {"put": str(key), "value": str(text)} if len(item) == 2:
            return Write(key, text.encode())
        case {"put": str(key), "hex": str(text)} if len(item) == 2:
            return Write(key, bytes.fromhex(text))
        case {"del": str(key)} if len(item) == 1:
            return Write(key, None)
    raise ValueError("put, and one of value and hex, or del alone is wanted, each a text")


def _bad(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"this is no transaction: {why}",
        hint='{"compare": [{"key": "/a", "value": "1"}], "then": [{"put": "/a", "value": "2"}], '
        '"else": [{"del": "/b"}]}',
        code="invalid.txn",
    )
