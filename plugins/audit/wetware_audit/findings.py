"""What `ww doctor` says of the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wetware.base.finding import error, ok, warning

if TYPE_CHECKING:
    from wetware.hookspecs import Finding


def judge_audit(
    failing: str,
    opened: Sequence[str],
    broken: Sequence[str] = (),
    *,
    on_full: str,
    lost: int,
    last: int,
) -> list[Finding]:
    """The audit log.

    Args:
        failing: Why it cannot be written; "" while it can.
        opened: What was wrong with it when the node started: "log.torn", …
        broken: Members whose logs do not continue what they had signed, and how.
        on_full: What happens while it cannot be written: "fail_closed" or "continue".
        lost: Records that are owed by it.
        last: Number of the last record.
    """
    name, found = "audit", []
    if failing:
        closed = on_full == "fail_closed"
        effect = "logins can end things only" if closed else f"{lost} records were lost"
        found.append(
            error(
                name,
                f"the log cannot be written ({failing}): {effect}",
                "free disk space under the node's data directory; `ww doctor` again",
            )
        )
    verify = "`ww audit verify` says where; keep a copy of the log before anything else"
    if "log.damaged" in opened:
        found.append(error(name, "the log was damaged when the node started", verify))
    if "log.truncated" in opened:
        text = "the log was shorter than its own last checkpoint when the node started"
        found.append(error(name, text, verify))
    if "log.missing" in opened:
        text = "its oldest files are gone, and the settings did not let them go"
        found.append(error(name, text, verify))
    found += [
        error(
            name,
            f"the log of {each}",
            "copy its log and verify it with `ww audit checkpoint --of PEER` of this node; "
            "`ww audit tail --event peer.` shows when; `ww evict` if it is not trusted",
        )
        for each in broken
    ]
    if "log.not_durable" in opened:
        text = "the node crashed while the log could not be written: its last records are lost"
        found.append(warning(name, text, "`ww audit tail --event log.` says when that was"))
    return found or [ok(name, f"{last} record{'s' * (last != 1)}")]
