"""Why: what decided a call, as steps along the grants from the call to a role.

A denial gets an ID, which its error names; `ww why ID` shows the steps. The last DECISIONS_MAX are
kept in memory; the audit log has the rest.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wetware.broker.explanation import Explanation

if TYPE_CHECKING:
    from wetware.identity import Principal

DECISIONS_MAX: Final = 4096
VALUE_CHARS_MAX: Final = 80
"""Of an argument that a step shows."""
DECISION_PREFIX: Final = "d-"


@dataclass(frozen=True, slots=True)
class Decision(Explanation):
    """An explanation as its node keeps it.

    Attributes:
        principals: Whose grants are on the way: who called, and all who passed on to them.
    """

    principals: frozenset[Principal] = frozenset()


class Decisions:
    """The latest denials, by ID and by principal."""

    def __init__(self, decisions_max: int = DECISIONS_MAX) -> None:
        self._max = decisions_max
        self._kept: OrderedDict[str, Decision] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @staticmethod
    def new_id() -> str:
        """An ID that cannot be guessed: whoever has it may not be allowed to see the decision."""
        return DECISION_PREFIX + secrets.token_hex(5)

    def keep(self, explanation: Decision) -> None:
        self._kept[explanation.decision] = explanation
        while len(self._kept) > self._max:
            self._kept.popitem(last=False)

    def get(self, decision: str) -> Decision | None:
        return self._kept.get(decision)

    def newest_first(self) -> Iterator[Decision]:
        """All of them, the last one first."""
        return reversed(self._kept.values())


def shown(args: Mapping[str, object], names: frozenset[str]) -> str:
    """The arguments that constraints may be about, shortened; payloads are not shown."""
    parts = []
    for name in sorted(names & args.keys()):
        value = args[name]
        if isinstance(value, bytes):
            text = f"{len(value)} bytes"
        else:
            text = str(value)
            if len(text) > VALUE_CHARS_MAX:
                text = f"{text[:VALUE_CHARS_MAX]}… ({len(text)} characters)"
        parts.append(f"{name}={text}")
    return " ".join(parts)
