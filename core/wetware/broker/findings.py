"""What a node finds in its grants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wetware.base.finding import Finding, counted, error, ok, warning

if TYPE_CHECKING:
    from wetware.broker.tree import Tree


def findings(tree: Tree) -> list[Finding]:
    """Whether grants can be made, judged and kept."""
    reasons = (
        (
            tree.store.failing if tree.store is not None else "",
            "shares and quotas cannot be written ({}): none is made or redeemed",
            "free disk space under the node's data directory; `ww doctor` again",
        ),
        (
            tree.shares_suspended.message if tree.shares_suspended is not None else "",
            "{}",
            "`ww grants --all` shows them; `ww revoke --all ID` what should have ended, then "
            "`ww grants --resume`",
        ),
        (
            tree.clock_wrong,
            "grants with an end are refused: this clock cannot judge it, {}",
            "`timedatectl set-ntp true` or chrony on this machine, then `ww doctor`; if it is "
            "right, `ww clock --right`",
        ),
        *(
            (why.message, "{}", "`ww status` shows the auth backend; they come back with it")
            for why in tree.suspended.values()
        ),
    )
    found = [error("grants", text.format(why), remedy) for why, text, remedy in reasons if why]
    live, shares = len(tree.grants), counted(len(tree.shares), "share")
    return found or [ok("grants", f"{live} live, {shares}")]


def roles(ungranted: Iterable[str]) -> list[Finding]:
    text = "{} is installed, not granted to members yet"
    return [warning("roles", text.format(n), f"`ww role accept {n}`") for n in ungranted]
