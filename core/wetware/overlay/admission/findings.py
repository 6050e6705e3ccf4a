"""What a node finds in its admission."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from wetware.base.finding import Finding, error, ok, span, warning

if TYPE_CHECKING:
    from wetware.overlay.admission.files import Files
    from wetware.overlay.admission.statements import Chain

OVERDUE_SHARE: Final = 2 / 3
"""Of a certificate's life. Its renewal begins after a third: by then it has failed for long."""


def certificate(chain: Chain, now_ms: float) -> list[Finding]:
    """Whether it is valid, and was renewed in time."""
    name, leaf = "certificate", chain.leaf
    rights, left_s = ", ".join(sorted(leaf.rights)), (leaf.not_after_ms - now_ms) / 1000
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
    if now_ms > leaf.when_ms(OVERDUE_SHARE):
        return [warning(name, f"{text}, and the renewal is overdue", renew)]
    return [ok(name, text)]


async def durable(files: Files) -> list[Finding]:
    """Whether an eviction could be kept on a full disk, and none was lost."""
    whole = await files.threads.run(files.reserve.fill)
    name, found = "admission", []
    if not whole:
        why = files.reserve.missing
        text = f"there is no room for what an eviction needs on a full disk ({why})"
        remedy = "free disk space under the node's data directory; `ww doctor` again"
        found.append(error(name, text, remedy))
    if files.unsure:
        found.append(
            error(
                name,
                f"nobody can join or renew here since the node started: {files.unsure}",
                "`ww evict` and `ww invite --revoke` again where they were, then "
                "`ww grants --resume`",
            )
        )
    return found
