"""What a session is asked with: services, constraints and other terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

Constraints: TypeAlias = Mapping[str, str] | Iterable[str]
"""{"topic": "glob:chat/*"} or ["topic=glob:chat/*"]; docs/reference/constraints.md."""


def terms_to_struct(
    services: Mapping[str, Iterable[str]] | None = None,
    where: Constraints = (),
    *,
    expires_s: float = 0.0,
    rate: str = "",
    calls: int = 0,
    nbytes: int = 0,
    fence: bytes = b"",
    sealed: bool = False,
) -> dict[str, Any]:
    """The struct Terms of core.capnp; see `Session.attenuate` for the arguments."""
    if isinstance(where, Mapping):
        where = [f"{param}={value}" for param, value in where.items()]
    return {
        "services": [
            {"name": name, "methods": texts(methods)} for name, methods in (services or {}).items()
        ],
        "where": [{"service": "", "text": text} for text in texts(where)],
        "expires_in_s": expires_s,
        "rate": rate,
        "calls": calls,
        "bytes": nbytes,
        "fence": fence,
        "sealed": sealed,
    }


def texts(values: Iterable[str]) -> list[str]:
    """A list of texts; TypeError for one text, whose characters would be taken for them."""
    if isinstance(values, str):
        raise TypeError("expected several texts, e.g. a list, not a str")
    return list(values)
