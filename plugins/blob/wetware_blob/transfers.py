"""Work that goes on after the call that began it: a put, a pin, a drain."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.base.bounds import Claim, Places
from wetware.base.log import get_logger
from wetware.errors import InternalError, InvalidArgument, WetwareError, stopping
from wetware_blob.schema import SCHEMA

if TYPE_CHECKING:
    from wetware.base.tasks import Tasks
    from wetware_blob.format.cid import Cid

log = get_logger("blob")

WAIT_S_MAX: Final = 25.0
"""Of `progress`: less than a call may take by default."""
TRANSFERS_MAX: Final = 32
"""That go on at a node: each may have some 8 MiB in memory that nobody can take from it."""
TRANSFERS_PER_OWNER_MAX: Final = 16
"""Those that wait for their stream count as well, until they are released."""


def place(places: Places, owner: str) -> contextlib.AbstractContextManager[None]:
    """Room for one more; raises LimitExceeded."""
    all_, own = TRANSFERS_MAX, TRANSFERS_PER_OWNER_MAX
    go_on = "puts and pins go on at this node"
    return places.hold(
        Claim(owner, own, f"{own} of the {go_on}, of {owner} (TRANSFERS_PER_OWNER_MAX)"),
        Claim(None, all_, f"{all_} {go_on} (TRANSFERS_MAX)"),
    )


@dataclass(slots=True)
class State:
    """How far it is; see Transfer.State in blob.capnp."""

    root: Cid | None = None
    bytes: Callable[[], int] = lambda: 0
    total: int = 0
    copies: int = 0
    doing: str = ""


class Transfer(rpc.Servant, interface=SCHEMA.Transfer):
    """Runs `work` until it ends, is released, or its guard ends.

    Make it in the servant's method that returns it.

    Args:
        tasks: Where it runs.
        place: See `place`; until it has ended.
        work: What it does.
    """

    def __init__(
        self,
        tasks: Tasks,
        place: contextlib.AbstractContextManager[None],
        work: Callable[[State], Awaitable[None]],
    ) -> None:
        self._place = contextlib.ExitStack()
        self._place.enter_context(place)
        self._state = State()
        self._error: WetwareError | None = None
        self._why: WetwareError = stopping()
        self._task = tasks.start(self._run(work))
        self._task.add_done_callback(lambda _: self._place.close())
        self._unguard: Callable[[], None] = lambda: None
        if (guard := rpc.current_guard()) is not None:
            self._unguard = guard.on_end(self._cut)
            self._task.add_done_callback(lambda _: self._unguard())

    async def progress(self, wait_s: float) -> dict[str, Any]:
        if not 0 <= wait_s <= WAIT_S_MAX or math.isnan(wait_s):
            raise InvalidArgument(f"waitS is 0 to {WAIT_S_MAX:g}, not {wait_s}")
        await asyncio.wait([self._task], timeout=wait_s)
        if self._error is not None:
            raise self._error
        if self._task.cancelled():
            raise self._why
        state = self._state
        return {
            "state": {
                "done": self._task.done(),
                "root": "" if state.root is None else str(state.root),
                "bytes": state.bytes(),
                "total": state.total,
                "copies": state.copies,
                "doing": "" if self._task.done() else state.doing,
            }
        }

    def released(self) -> None:
        """Nobody waits for it any more."""
        self._task.cancel()

    def _cut(self, why: WetwareError) -> None:
        self._why = why
        self._task.cancel()

    async def _run(self, work: Callable[[State], Awaitable[None]]) -> None:
        try:
            await work(self._state)
        except WetwareError as exc:
            self._error = exc
        except Exception:
            log.exception("blob.transfer_failed")
            self._error = InternalError("the transfer failed; the node's log says why")
