"""Whom this node has let in, and by which records: so that it is noticed when those go.

A role that is there at two looks need not be the same: it may have been revoked and granted anew in
between, also while the node was down. So the tenures (serials) and epochs by which somebody has
roles are compared, and kept in a file. A file that is lost takes away, and gives nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio

from wetware.hookspecs import Withdrawn
from wetware.identity import Principal, replace_private_file
from wetware_auth_evm.node.roles import base

if TYPE_CHECKING:
    from wetware.hookspecs import EventLogger

PRINCIPALS_FILE: Final = "principals.json"
PRINCIPALS_MAX: Final = 65_536
"""Whose roles are looked at again; somebody who logs in beyond them is refused."""
KEEP_S: Final = 0.2
"""At least between two writings of the file."""
FOREVER: Final = 1 << 40


class Known(NamedTuple):
    """What a principal had when it was last looked at.

    Attributes:
        roles: As the broker knows them.
        tenures: Role of the contract → serials of the records that give it, by the newest block.
        epochs: Of scope, ROOT and account, likewise.
        end: When the contract says that something of it changes next; Unix s.
    """

    roles: frozenset[str]
    tenures: dict[str, frozenset[int]]
    epochs: tuple[int, int, int]
    end: int

    def lost_since(self, before: Known) -> frozenset[str]:
        """The roles of before that are gone, or are held by none of the same tenures."""
        return frozenset(
            role
            for role in before.roles
            if role not in self.roles or not self._goes_on(role, before)
        )

    def held_since(self, before: Known | None) -> Known:
        """This, with only the roles that were held by the same tenures before."""
        if before is None or before.epochs != self.epochs:
            return NOTHING
        return self._replace(roles=frozenset(r for r in self.roles if self._goes_on(r, before)))

    def _goes_on(self, role: str, before: Known) -> bool:
        serials = self.tenures.get(base(role), frozenset())
        return not serials.isdisjoint(before.tenures.get(base(role), ()))


NOTHING: Final = Known(frozenset(), {}, (0, 0, 0), FOREVER)

LookUp = Callable[[Principal], Known]


class Roster:
    """See the module; `next_end` is when (Unix s) the first of what somebody has ends."""

    def __init__(
        self,
        directory: Path,
        *,
        look_up: LookUp,
        tell: Callable[[Withdrawn], None],
        log: EventLogger,
        run_sync: Callable[..., Awaitable[Any]],
    ) -> None:
        self._run_sync = run_sync
        self._file = directory / PRINCIPALS_FILE
        self._look_up, self._tell, self._log = look_up, tell, log
        self._known: dict[Principal, Known] = {}
        self._changed = asyncio.Event()
        self._failing = False
        self._kept = self._read()
        self.next_end: float = FOREVER

    def __contains__(self, principal: object) -> bool:
        return principal in self._known

    def __len__(self) -> int:
        return len(self._known)

    def before(self, principal: Principal) -> Known | None:
        """What a principal had when the node stopped; None: that is not known."""
        return self._kept.get(principal.subject)

    def watch(self, principal: Principal, found: Known) -> bool:
        """Look at a principal again whenever it changes; False where there are too many."""
        known = self._known.get(principal)
        if known is None and len(self._known) >= PRINCIPALS_MAX:
            self._log.warning("auth_evm.principals_max", limit=PRINCIPALS_MAX)
            return False
        # What is gone and not withdrawn yet is found by the old record, which is kept for that.
        if known is None or (known.epochs == found.epochs and not found.lost_since(known)):
            self._put(principal, found)
        self.next_end = min(self.next_end, found.end)
        return True

    def _put(self, principal: Principal, found: Known) -> None:
        before = self._known.get(principal)
        self._known[principal] = found
        if before is None or before[:3] != found[:3]:
            self._changed.set()

    def review(self, concerns: Callable[[Principal], bool], now: int) -> None:
        """Withdraw what is gone, of whom a change concerns and of those whose time has come."""
        for principal in [p for p, known in self._known.items() if known.end <= now or concerns(p)]:
            self._review(principal)
        self.next_end = min((known.end for known in self._known.values()), default=FOREVER)

    def _review(self, principal: Principal) -> None:
        before, after = self._known[principal], self._look_up(principal)
        lost = after.lost_since(before)
        if after.roles:
            self._put(principal, after)
        else:
            del self._known[principal]
            self._changed.set()
        if before.epochs != after.epochs:
            why = "its sessions were ended on chain (revokeAll or resetScope)"
            self._tell(Withdrawn(principal, None, why))
        elif lost:
            names = ", ".join(sorted(lost))
            self._tell(Withdrawn(principal, lost, f"the contract withdraws {names}"))

    # --- the file ---------------------------------------------------------------------------------

    def _read(self) -> dict[str, Known]:
        try:
            return {
                subject: Known(
                    frozenset(),
                    {role: frozenset(map(int, serials)) for role, serials in tenures.items()},
                    (int(scope), int(root), int(account)),
                    0,
                )
                for subject, ((scope, root, account), tenures) in json.loads(
                    self._file.read_text()
                ).items()
            }
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as exc:
            self._log.warning("auth_evm.principals", why=str(exc)[:120], effect="shares are over")
        return {}

    def _document(self) -> bytes:
        self._changed.clear()
        return json.dumps(
            {
                principal.subject: [
                    known.epochs,
                    {role: sorted(serials) for role, serials in known.tenures.items()},
                ]
                for principal, known in self._known.items()
            }
        ).encode()

    async def run(self) -> None:
        """Keep the file as things are, until its scope is cancelled; then once more.

        A task of an anyio group: a write under way is waited for, so that it is not the last.
        """
        try:
            while True:
                await self._changed.wait()
                with anyio.CancelScope(shield=True):
                    written = await self._run_sync(self._write, self._document())
                if not written:
                    self._changed.set()  # again, until the disk takes it
                await asyncio.sleep(KEEP_S)
        finally:
            if self._changed.is_set():
                self._write(self._document())

    def _write(self, document: bytes) -> bool:
        try:
            replace_private_file(self._file, document)
        except OSError as exc:
            if not self._failing:
                self._log.error("auth_evm.principals", error=exc.strerror)
            self._failing = True
            return False
        self._failing = False
        return True
