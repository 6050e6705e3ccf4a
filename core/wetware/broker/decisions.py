"""The latest denials: `ww why ID` shows the steps that decided one; the audit log has the rest."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from wetware.broker.told import Explanation
    from wetware.identity import Principal

DECISIONS_MAX: Final = 4096
VALUE_CHARS_MAX: Final = 80
"""Of an argument that a step shows."""
DECISION_PREFIX: Final = "d-"


class Decisions:
    """The last DECISIONS_MAX denials, by the ID that their errors name."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Explanation, frozenset[Principal]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @staticmethod
    def new_id() -> str:
        """An ID that cannot be guessed: whoever has it may not be allowed to see the decision."""
        return DECISION_PREFIX + secrets.token_hex(5)

    def keep(self, explanation: Explanation, principals: frozenset[Principal]) -> None:
        """Keep a denial; `principals` called, or passed on what was called."""
        self._kept[explanation.decision] = (explanation, principals)
        while len(self._kept) > DECISIONS_MAX:
            self._kept.popitem(last=False)

    def newest_first(self) -> Iterator[tuple[Explanation, frozenset[Principal]]]:
        """All of them, with their principals."""
        return reversed(self._kept.values())


def shown(args: Mapping[str, object], names: frozenset[str]) -> str:
    """The arguments that constraints may be about, shortened; payloads are not shown."""
    parts = []
    for name in sorted(names & args.keys()):
        value = args[name]
        text = f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
        if len(text) > VALUE_CHARS_MAX:
            text = f"{text[:VALUE_CHARS_MAX]}… ({len(text)} characters)"
        parts.append(f"{name}={text}")
    return " ".join(parts)
