"""What a role may do, as a configuration file writes it, for auth backends with roles of that kind.

services = { pubsub = ["*"], blob = ["Blobs.get"] }
where = ["pubsub topic=glob:team/*"]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from wetware.broker.methods import PATTERNS_MAX, SERVICES_MAX, patterns_of
from wetware.broker.where import WHERE_MAX, Where
from wetware.errors import InvalidArgument

_HINT = 'e.g. services = { SERVICE = ["*"] }; see docs/reference/constraints.md'


def role_services(at: str, value: Any) -> dict[str, frozenset[str]]:
    """`services` of a role: service → method patterns.

    Args:
        at: What the setting is called in an error.
        value: As TOML has it.

    Raises InvalidArgument.
    """
    if not isinstance(value, Mapping) or not 1 <= len(value) <= SERVICES_MAX:
        raise _bad(at, f"is not a section of 1 to {SERVICES_MAX} services")
    found: dict[str, frozenset[str]] = {}
    for service, patterns in value.items():
        if not isinstance(patterns, list) or not 1 <= len(patterns) <= PATTERNS_MAX:
            raise _bad(f"{at}.{service[:40]}", f"is not a list of 1 to {PATTERNS_MAX} methods")
        try:
            found |= patterns_of({service: patterns})
        except InvalidArgument as exc:
            raise _bad(f"{at}.{service[:40]}", exc.message, exc.hint) from None
    return found


def role_where(at: str, value: Any, services: Iterable[str]) -> tuple[Where, ...]:
    """`where` of a role: constraints on what its services are called with.

    Args:
        at: What the setting is called in an error.
        value: As TOML has it: a list of texts, each as `--where` takes it.
        services: Those that the role gives; a constraint of another one is a mistake.

    Raises InvalidArgument.
    """
    if not isinstance(value, list) or len(value) > WHERE_MAX:
        raise _bad(at, f"is not a list of at most {WHERE_MAX} constraints")
    known = tuple(services)
    found = []
    for text in value:
        if not isinstance(text, str):
            raise _bad(at, f"{str(text)[:40]!r} is not text")
        try:
            where = Where.parse_option(text, known)
        except InvalidArgument as exc:
            raise _bad(at, exc.message, exc.hint) from None
        if where.service not in known and "*" not in known:
            raise _bad(at, f"{text[:60]!r} is of a service that the role does not give")
        found.append(where)
    return tuple(found)


def _bad(at: str, what: str, hint: str = "") -> InvalidArgument:
    return InvalidArgument(f"{at}: {what}", hint=hint or _HINT)
