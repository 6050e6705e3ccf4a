"""What a grant adds to its parent's: methods, constraints, rate, quotas, fence and end."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wetware.broker.fences import Fence
from wetware.broker.methods import ANY, patterns_of
from wetware.broker.values import QUOTA_MAX, TIME_MAX, Rate
from wetware.broker.where import WHERE_MAX, Where, bad_where
from wetware.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Terms:
    """What one grant adds; what is None or () adds nothing.

    Attributes:
        services: Service name or "*" → method patterns; None: all that the parent has.
        where: Constraints; all of them have to pass.
        expires_at: Unix time, s.
        rate: Calls per time.
        calls: Quota of calls.
        bytes: Quota of bytes: Data and Text of parameters, and messages of results and callbacks.
        fence: Token of a lock that the holder must still have.
    """

    services: Mapping[str, frozenset[str]] | None = None
    where: tuple[Where, ...] = ()
    expires_at: float | None = None
    rate: Rate | None = None
    calls: int | None = None
    bytes: int | None = None
    fence: Fence | None = None

    def __post_init__(self) -> None:
        if len(self.where) > WHERE_MAX:
            raise bad_where(f"{len(self.where)} constraints; {WHERE_MAX} are allowed")
        for what, value in (("calls", self.calls), ("bytes", self.bytes)):
            if value is not None and not (type(value) is int and 0 < value <= QUOTA_MAX):
                raise InvalidArgument(
                    f"a quota of {value} {what}", hint="leave it out for none", code="invalid.quota"
                )
        end = self.expires_at
        if end is not None and not (type(end) in (int, float) and 0 <= end <= TIME_MAX):
            raise InvalidArgument(
                "an end that is no time", hint="write e.g. 1h", code="invalid.duration"
            )

    def plain(self) -> dict[str, Any]:
        """As it is kept, for JSON."""
        services, rate, fence = self.services, self.rate, self.fence
        kept: dict[str, Any] = {
            "services": services and {name: sorted(found) for name, found in services.items()},
            "where": [[where.service, where.text] for where in self.where] or None,
            "expires_at": self.expires_at,
            "rate": rate and [rate.per_s, rate.burst],
            "calls": self.calls,
            "bytes": self.bytes,
            "fence": fence and fence.encode().hex(),
        }
        return {"v": 1, **{name: value for name, value in kept.items() if value is not None}}

    @classmethod
    def from_plain(cls, value: object) -> Terms:
        """The inverse of `plain`; raises InvalidArgument on anything that it does not know."""
        known = {"v", "services", "where", "expires_at", "rate", "calls", "bytes", "fence"}
        if not isinstance(value, Mapping) or value.get("v") != 1 or value.keys() - known:
            raise _unreadable("terms of a version that this release does not know")
        services, rate, fence = value.get("services"), value.get("rate"), value.get("fence")
        try:
            return cls(
                services=None if services is None else patterns_of(services),
                where=tuple(Where.parse(text, name) for name, text in value.get("where", ())),
                expires_at=value.get("expires_at"),
                rate=None if rate is None else Rate(*map(float, rate)),
                calls=value.get("calls"),
                bytes=value.get("bytes"),
                fence=None if fence is None else Fence.decode(bytes.fromhex(fence)),
            )
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as exc:
            raise _unreadable(f"malformed terms: {exc}") from None

    def describe(self) -> list[str]:
        """For people, a line for each term."""
        lines = []
        for name, patterns in sorted((self.services or {}).items()):
            if name == "session":
                if "Session.*" not in patterns and "Session.share" not in patterns:
                    lines.append("not to be passed on")
                continue
            lines.append(f"{name} {', '.join(sorted(patterns)) or 'nothing'}")
        for where in self.where:
            prefix = "" if where.service == ANY else f"{where.service} "
            lines.append(f"{prefix}{where.text}")
        if self.rate is not None:
            lines.append(f"at most {self.rate.text}")
        for quota, what in ((self.calls, "calls"), (self.bytes, "bytes")):
            if quota is not None:
                lines.append(f"{quota} {what} in all")
        if self.expires_at is not None:
            end = datetime.datetime.fromtimestamp(self.expires_at, datetime.UTC)
            lines.append(f"until {end:%Y-%m-%d %H:%M:%S} UTC")
        if self.fence is not None:
            lines.append(self.fence.describe())
        return lines


def _unreadable(what: str) -> InvalidArgument:
    return InvalidArgument(what, hint="update this node", code="invalid.where")
