"""Grants as those whom they belong to see them: listed, ended, explained."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Final

from wetware import rpc
from wetware.base.structs import to_struct
from wetware.broker.grants import Grant
from wetware.errors import NotFound
from wetware.identity import Principal
from wetware.rpc.values import payload_bytes

if TYPE_CHECKING:
    from wetware.broker.records import Records
    from wetware.broker.told import Explanation
    from wetware.broker.tree import Tree

GRANTS_MAX: Final = 1000
"""Grants of one answer."""
ANSWER_BYTES_MAX: Final = 768 << 10
"""Of them together: an answer has to fit into a message."""
INFO_BYTES: Final = 256
"""What a GrantInfo costs beside its texts, at most."""
LABEL_CHARS_MAX: Final = 128
"""Of a grant's label, and of why it ended."""


class SubtreeServant(rpc.Servant):
    """Subtree of core.capnp; who derives from it says what belongs to it."""

    def __init__(self, tree: Tree, audit: Records, principal: Principal) -> None:
        self._tree, self._audit, self._principal = tree, audit, principal

    def _tops(self, principal: Principal | None) -> list[Grant]:
        """What may be seen and ended, with all below: of a principal, or of everybody."""
        return self._tree.roots(principal)

    @property
    def _operator(self) -> bool:
        """Whether who asks may end any grant of the node."""
        return True

    def _may_see(
        self, explanation: Explanation, principals: frozenset[Principal], *, named: bool
    ) -> bool:
        """Whether a denial is shown; `principals` had grants on the way, `named` is by its ID."""
        return True

    async def list(self, principal: str, limit: int) -> dict[str, object]:
        """Those near the top first: who holds something below cannot push out what is above."""
        tops = self._tops(Principal.parse(principal) if principal else None)
        found: dict[Grant, None] = dict.fromkeys(tops)
        todo = deque(found)
        while todo:
            for grant in todo.popleft().children:
                if grant not in found:
                    found[grant] = None
                    todo.append(grant)
        infos: list[dict[str, object]] = []
        size = 0
        for grant in islice(found, min(limit or GRANTS_MAX, GRANTS_MAX)):
            info = to_struct(grant.info())
            size += payload_bytes(info) + INFO_BYTES
            if size > ANSWER_BYTES_MAX:
                break
            infos.append(info)
        return {"grants": infos, "matched": len(found)}

    async def revoke(self, id: str, reason: str) -> dict[str, object]:
        """What the call itself runs under ends right after its answer."""
        grant = self._tree.grants.get(id)
        if grant is None and self._tree.has_ended(id):
            await settle(self._tree, self._audit, (), reason)
            return {"cut": 0}
        if grant is None or not set(grant.lineage) & set(self._tops(None)):
            raise NotFound(
                f"there is no grant {id[:32]!r} at this node that you may end",
                hint="`ww grants` shows yours; an operator sees all with --all",
                code="not_found.grant",
            )
        reason = clean(reason, f"by {self._principal}")
        cut = end_now([grant], reason)
        record = self._audit.ended if self._operator else self._audit.record
        record(
            "grant.revoked",
            grant=grant.id,
            principal=grant.principal,
            label=grant.label,
            by=self._principal,
            cut=cut,
            reason=reason,
        )
        await settle(self._tree, self._audit, [grant], reason)
        return {"cut": cut}

    async def why(self, decision: str) -> dict[str, object]:
        for explanation, principals in reversed(self._tree.decisions):
            if decision not in ("", explanation.decision):
                continue
            if self._may_see(explanation, principals, named=bool(decision)):
                return {"explanation": to_struct(explanation)}
        what = f"no denial {decision[:32]!r} of yours" if decision else "no denial of yours"
        raise NotFound(
            f"{what} is remembered at this node",
            hint="the error of a denied call names its ID; older ones are in `ww audit tail`",
        )


def clean(text: str, otherwise: str) -> str:
    """A label or a reason that a user gave, printable and bounded."""
    text = "".join(c if c.isprintable() else "?" for c in text.strip()[:LABEL_CHARS_MAX])
    return text or otherwise


def end_now(grants: Iterable[Grant], reason: str) -> int:
    """End subtrees; returns how many grants ended, `settle` has to follow.

    What the call runs under, up to what is durable, carries its answer and ends with `settle`: all
    that could come back after a crash ends now.
    """
    running = rpc.current_guard()
    lineage = running.lineage if isinstance(running, Grant) else ()
    spared = frozenset(takewhile(lambda grant: not grant.durable, lineage))

    grants = list(grants)
    # What has several roles above it is counted once.
    ending = {b for grant in grants for b in grant.subtree() if b.ended is None}

    def end(grant: Grant) -> None:
        if grant not in spared or grant.ended is not None:
            grant.revoke(reason)
            return
        for child in grant.children:
            end(child)

    for grant in grants:
        end(grant)
    return len(ending)


async def settle(tree: Tree, audit: Records, grants: Iterable[Grant], reason: str) -> None:
    """Wait until what was ended is on disk and on record, so that it can be answered.

    Raises StoreUnavailable; where the log fails, it tells of the gap itself.
    """
    try:
        recorded = asyncio.ensure_future(audit.written())
        if tree.store is not None:
            await tree.store.written()
        await recorded
    finally:
        for grant in grants:  # what the call runs under: in the next turn, after the answer
            asyncio.get_running_loop().call_soon(grant.revoke, reason)
