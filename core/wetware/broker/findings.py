"""What a node finds in its grants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wetware.finding import Finding, counted, error, ok

if TYPE_CHECKING:
    from wetware.broker.tree import Tree


def findings(tree: Tree) -> list[Finding]:
    """Whether grants can be made, judged and kept."""
    return judge(
        len(tree.grants),
        len(tree.shares),
        failing=tree.store.failing if tree.store is not None else "",
        unsure=tree.shares_suspended.message if tree.shares_suspended is not None else "",
        clock_wrong=tree.clock_wrong,
        suspended=tree.suspended.message if tree.suspended is not None else "",
    )


def judge(
    live: int, shares: int, *, failing: str, unsure: str, clock_wrong: str, suspended: str
) -> list[Finding]:
    """The broker.

    `failing`, `unsure`, `clock_wrong` and `suspended` say why it refuses things, or are "".
    """
    name, found = "grants", []
    if failing:
        found.append(
            error(
                name,
                f"shares and quotas cannot be written ({failing}): none is made or redeemed",
                "free disk space under the node's data directory; `ww doctor` again",
            )
        )
    if unsure:
        found.append(
            error(
                name,
                unsure,
                "`ww grants --all` shows them; `ww revoke --all ID` what should have ended, then "
                "`ww grants --resume`",
            )
        )
    if clock_wrong:
        found.append(
            error(
                name,
                f"grants with an end are refused: this clock cannot judge it, {clock_wrong}",
                "`timedatectl set-ntp true` or chrony on this machine, then `ww doctor`; if it is "
                "right, `ww clock --right`",
            )
        )
    if suspended:
        text = f"all capabilities are suspended: {suspended}"
        found.append(
            error(name, text, "`ww status` shows the auth backend; they come back with it")
        )
    return found or [ok(name, f"{live} live, {counted(shares, 'share')}")]
