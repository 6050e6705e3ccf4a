"""What a node finds in its admission."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from wetware.base.finding import Finding, error, ok, span, warning

if TYPE_CHECKING:
    from wetware.overlay.admission.statements import Chain
    from wetware.overlay.admission.store import Store

OVERDUE_SHARE: Final = 2 / 3
"""Of a certificate's life. Its renewal begins after a third: by then it has failed for long."""


def certificate(chain: Chain, now_ms: float) -> list[Finding]:
    """Whether it is valid, and was renewed in time."""
    name, leaf = "certificate", chain.leaf
    rights = ", ".join(sorted(leaf.rights))
    left_s, life_s = (
        (leaf.not_after_ms - now_ms) / 1000,
        (leaf.not_after_ms - leaf.not_before_ms) / 1000,
    )
    renew = (
        "a node that can certify must be reachable: `ww ls` shows who is alive; otherwise a "
        "member gives a ticket (`ww invite`) for `ww node --join TICKET`"
    )
    if now_ms < leaf.not_before_ms:
        text = f"it becomes valid only in {span((leaf.not_before_ms - now_ms) / 1000)}"
        return [error(name, text, "the clock of this machine is wrong: `date`")]
    if left_s <= 0:
        text = f"it expired {span(-left_s)} ago: no other member admits this node"
        return [error(name, text, renew)]
    text = f"valid for {span(left_s)} more (rights: {rights})"
    if now_ms - leaf.not_before_ms > life_s * 1000 * OVERDUE_SHARE:
        return [warning(name, f"{text}, and the renewal is overdue", renew)]
    return [ok(name, text)]


async def durable(store: Store) -> list[Finding]:
    """Whether an eviction could be kept on a full disk, and none was lost."""
    whole = await asyncio.to_thread(store.reserve.fill)
    name, found = "admission", []
    if not whole:
        why = store.reserve.missing
        text = f"there is no room for what an eviction needs on a full disk ({why})"
        remedy = "free disk space under the node's data directory; `ww doctor` again"
        found.append(error(name, text, remedy))
    if store.unsure:
        found.append(
            error(
                name,
                f"nobody can join or renew here since the node started: {store.unsure}",
                "`ww evict` and `ww invite --revoke` again where they were, then "
                "`ww grants --resume`",
            )
        )
    return found
