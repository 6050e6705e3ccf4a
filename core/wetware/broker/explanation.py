"""Why a call was decided as it was: made by the broker, shown by its clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One grant on the way from a call to a role.

    Attributes:
        grant: Its ID.
        label: What it is for.
        kind: See `GrantInfo`.
        verdict: "allows", "denies" or "-" (not asked: something before it denied).
        detail: Which pattern, constraint, quota or end decided.
    """

    grant: str
    label: str
    kind: str
    verdict: str
    detail: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What decided a call, or would; see `Session.why`.

    Attributes:
        allowed: Whether it is.
        code: Of the error; "" if it is allowed.
        reason: In words.
        principal: Who called.
        grant: ID of the grant that was called.
        method: "Interface.method", with the arguments that constraints are about.
        steps: From that grant to a role.
        decision: ID of a denial; "" if it was only asked about.
        at: When, Unix time, s.
    """

    allowed: bool
    code: str
    reason: str
    principal: str
    grant: str
    method: str
    steps: tuple[Step, ...]
    decision: str = ""
    at: float = 0.0

    def wire(self) -> dict[str, object]:
        """The struct of core.capnp."""
        return {
            **{name: getattr(self, name) for name in _SAME},
            "at_ms": round(self.at * 1000),
            "steps": [asdict(step) for step in self.steps],
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Explanation:
        """From the struct of core.capnp."""
        return cls(
            **{name: wire[name] for name in _SAME},
            at=wire["at_ms"] / 1000,
            steps=tuple(Step(**step) for step in wire["steps"]),
        )


_SAME = ("allowed", "code", "reason", "decision", "principal", "grant", "method")
