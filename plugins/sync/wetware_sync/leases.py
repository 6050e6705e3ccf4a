"""Leases, as capabilities of one principal."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from wetware import rpc
from wetware_sync.engine import LeaseEnded
from wetware_sync.errors import Moved
from wetware_sync.schema import SCHEMA

if TYPE_CHECKING:
    from wetware_sync.engine import Engine


async def leased(engine: Engine, ttl_ms: int, id_: int, epoch: int, owner: str) -> int:
    """The ID of a new lease, or of the owner's own that is held again; raises LeaseEnded."""
    if not id_:
        return await engine.grant(ttl_ms / 1000, owner)
    if epoch != engine.epoch:
        raise Moved(
            "the lease was of the store as it was before: it was moved or restored since",
            hint="begin anew",
        )
    await engine.keep(id_, owner)
    return id_


class LeaseServant(rpc.Servant, interface=SCHEMA.Lease):
    """See sync.capnp."""

    def __init__(self, engine: Engine, id_: int, owner: str) -> None:
        self._engine, self._id, self._owner = engine, id_, owner

    async def keep(self) -> dict[str, int]:
        return {"ttl_ms": int(await self._engine.keep(self._id, self._owner) * 1000)}

    async def end(self) -> None:
        with contextlib.suppress(LeaseEnded):
            await self._engine.end(self._id, self._owner)
