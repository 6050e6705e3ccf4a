"""What findings have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wetware.identity import Key

if TYPE_CHECKING:
    from wetware.base.finding import Finding

OWN, ADA, BOB = (Key.from_seed(bytes([n]) * 32) for n in (1, 2, 3))


def levels(findings: list[Finding]) -> list[str]:
    """The levels; and every finding that is not fine names the next command."""
    for finding in findings:
        assert finding.text
        if finding.level == "ok":
            assert finding.remedy == ""
        else:
            assert finding.remedy.count("`") >= 2, finding
    return [finding.level for finding in findings]


def only(findings: list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found
