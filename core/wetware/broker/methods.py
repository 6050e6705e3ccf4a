"""Method patterns: `*`, `Interface.*` and `Interface.method`, one grammar everywhere.

An interface may be within another one (`Outer.Inner.method`). Services are named by words of lower
case, and `*` is every service.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from wetware.base.names import snake
from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    from wetware.rpc import Interface, Method

ANY: Final = "*"
SERVICES_MAX: Final = 64
PATTERNS_MAX: Final = 256
"""Of one service."""
PATTERN_CHARS_MAX: Final = 256
_SERVICE = re.compile(r"\*|[a-z]\w{0,63}", re.ASCII)
_PATTERN = re.compile(r"\*|[A-Za-z][\w.]*\.(?:\*|[A-Za-z]\w*)", re.ASCII)


def is_service(name: str) -> bool:
    return _SERVICE.fullmatch(name) is not None


def is_pattern(value: object) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= PATTERN_CHARS_MAX
        and _PATTERN.fullmatch(value) is not None
    )


def matches(patterns: frozenset[str], interface: str, method: str) -> bool:
    """Whether a method is covered by any of the patterns."""
    return ANY in patterns or f"{interface}.*" in patterns or f"{interface}.{method}" in patterns


def pattern_within(pattern: str, patterns: frozenset[str]) -> bool:
    """Whether everything that `pattern` allows is allowed by `patterns`."""
    if ANY in patterns or pattern in patterns:
        return True
    interface, dot, _ = pattern.rpartition(".")
    return bool(dot) and f"{interface}.*" in patterns


def all_methods(
    interface: Interface, through: Callable[[Method], bool] | None = None
) -> Iterator[Method]:
    """The methods of an interface and of those that it leads to; see `Interface.reachable`."""
    for reached in interface.reachable(through):
        yield from reached.methods.values()


def known_patterns(interface: Interface) -> frozenset[str]:
    """All patterns but `*` that name something of a service with that bootstrap interface."""
    found = list(all_methods(interface))
    return frozenset(f"{m.interface.name}.{name}" for m in found for name in (m.name, ANY))


def patterns_of(services: Mapping[str, Iterable[object]]) -> dict[str, frozenset[str]]:
    """Service → method patterns, with method names in snake_case; raises InvalidArgument."""
    if len(services) > SERVICES_MAX:
        raise _bad(f"{len(services)} services; {SERVICES_MAX} are allowed")
    return {name: _patterns(name, patterns) for name, patterns in services.items()}


def _patterns(service: str, patterns: Iterable[object]) -> frozenset[str]:
    if not is_service(service):
        raise _bad(f"{service[:80]!r} is not a service's name")
    if isinstance(patterns, str):  # its letters would be taken for patterns
        raise _bad(f"{service}: methods are a list")
    found = frozenset(map(_in_snake_case, patterns))
    if len(found) > PATTERNS_MAX:
        raise _bad(f"{len(found)} methods; {PATTERNS_MAX} are allowed")
    return found


def _in_snake_case(pattern: object) -> str:
    if isinstance(pattern, str) and len(pattern) > PATTERN_CHARS_MAX:
        raise _bad(f"a method of {len(pattern)} characters; {PATTERN_CHARS_MAX} are allowed")
    if not isinstance(pattern, str) or not is_pattern(pattern):
        raise _bad(
            f"{str(pattern)[:80]!r} is not a method pattern",
            'write "*", "Interface.*" or "Interface.method"',
        )
    interface, dot, method = pattern.rpartition(".")
    return f"{interface}.{snake(method)}" if dot and method != ANY else pattern


def _bad(what: str, hint: str = "") -> InvalidArgument:
    return InvalidArgument(what, hint=hint, code="invalid.methods")
