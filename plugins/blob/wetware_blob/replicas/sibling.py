"""What other members may ask of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.base.bounds import Claim
from wetware.errors import Disconnected, InvalidArgument
from wetware.identity import PeerId
from wetware_blob.exchange.find import ROOTS_MAX
from wetware_blob.format.cid import Cid
from wetware_blob.replicas.duties import COPIES_MAX, WHERE_CHARS_MAX, Copy, Replicas
from wetware_blob.replicas.keeper import TENDED_AT_ONCE
from wetware_blob.schema import SCHEMA

if TYPE_CHECKING:
    from wetware_blob.replicas.keeper import Keeper
    from wetware_blob.store.store import Store

ASKED_MAX: Final = TENDED_AT_ONCE
"""Promises and answers to `wanted` that one member waits for: it tends so many copies at a time."""


class SiblingServant(rpc.Servant, interface=SCHEMA.Sibling):
    """See blob.capnp. `peer` is who asks, by its certificate."""

    def __init__(self, store: Store, keeper: Keeper, peer: str) -> None:
        self._store, self._keeper, self._peer = store, keeper, peer

    async def have(self, roots: list[bytes]) -> dict[str, Any]:
        _check(roots)
        here = await self._store.have(roots)
        return {"have": [digest in here for digest in roots]}

    @property
    def _replicas(self) -> Replicas:
        if not self._keeper.replicas.loaded:
            raise Disconnected("the service is not running")
        return self._keeper.replicas

    async def holding(self, ids: list[bytes]) -> dict[str, Any]:
        _check(ids)
        return {"holding": self._replicas.has(ids)}

    async def keep(self, copy: dict[str, Any]) -> dict[str, Any]:
        if (
            len(copy["pin"]) != 16
            or not 1 <= copy["copies"] <= COPIES_MAX
            or len(copy["where"]) > WHERE_CHARS_MAX
        ):
            raise InvalidArgument("that is no copy of a pin", code="invalid.copy")
        asked = Copy(
            Cid.decode(copy["root"]),
            PeerId.parse(copy["home"]),  # what names it on the disk is read back
            copy["pin"],
            copy["copies"],
            copy["where"],
            copy["bytes"],
        )
        kept = await self._replicas.keep(self._peer, asked)
        return {"room": kept.room, "done": kept.done, "bytes": kept.bytes}

    async def lease(self, id: bytes) -> dict[str, Any]:
        once = Claim(id, 1, "this copy is being promised to another member")
        with self._keeper.asked.hold(self._claim(), once):
            return {"seconds": await self._replicas.lease(id)}

    async def drop(self, ids: list[bytes]) -> None:
        _check(ids)
        await self._keeper.replicas.dropped(self._peer, ids)

    async def wanted(self, ids: list[bytes]) -> dict[str, Any]:
        _check(ids)
        with self._keeper.asked.hold(self._claim()):
            store, wanted = await self._replicas.wants(ids)
        told = [{"copies": copies, "where": where} for copies, where in wanted]
        return {"store": store, "wanted": told}

    def _claim(self) -> Claim:
        """A place for what reads much of the disk: all of a copy, or all pins."""
        many = f"{self._peer} asks {ASKED_MAX} things at a time (replicas.sibling.ASKED_MAX)"
        return Claim(self._peer, ASKED_MAX, many)


def _check(ids: list[bytes]) -> None:
    if len(ids) > ROOTS_MAX or any(len(each) != 32 for each in ids):
        raise InvalidArgument(f"at most {ROOTS_MAX} of 32 bytes are asked for at once")
