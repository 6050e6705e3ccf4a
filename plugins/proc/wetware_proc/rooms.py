"""Where there is room for a process: what this node and its siblings say of themselves."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.base.bounds import Claim, Places, Recent
from wetware.errors import InvalidArgument, WetwareError
from wetware_proc.schema import SCHEMA

if TYPE_CHECKING:
    from wetware.hookspecs import PluginContext
    from wetware.member import Member

KNOWN_S: Final = 1.0  # how old an answer may be
ANSWER_S: Final = 2.0  # for a member to be reached and to answer; one that does not has no room
MEMBERS_MAX: Final = 64  # that are asked: of more those with the least load
ASKED_AT_ONCE: Final = 16
FINDS_PER_OWNER_MAX: Final = 4
PROGRAMS_MAX: Final = 16  # of one question
PROGRAM_CHARS_MAX: Final = 128
REMEMBERED_MAX: Final = 1000  # programs that a node remembers to have prepared


class Rooms:
    """Of one node.

    `free(principal)` gives how many processes run, and how many, and how many bytes of memory,
    there is room for; for nobody in particular where the principal is "".
    """

    def __init__(self, ctx: PluginContext, free: Callable[[str], tuple[int, int, int]]) -> None:
        self._ctx, self._free = ctx, free
        self._prepared: Recent[str, bool] = Recent(float("inf"), REMEMBERED_MAX, time.monotonic)
        self._lately: Recent[Any, list[dict[str, Any]]] = Recent(KNOWN_S, 64, time.monotonic)
        self._places, self._asking = Places(), asyncio.Semaphore(ASKED_AT_ONCE)

    def prepared(self, name: str) -> None:
        """A program of this name, or hash, needs no work before it runs here."""
        if 0 < len(name) <= PROGRAM_CHARS_MAX:
            self._prepared.put(name, True)

    def own(self, programs: list[str], owner: str = "") -> dict[str, Any]:
        """This node's, as the struct Room has it, for a principal. Raises InvalidArgument."""
        if len(programs) > PROGRAMS_MAX or any(len(p) > PROGRAM_CHARS_MAX for p in programs):
            raise InvalidArgument(
                f"at most {PROGRAMS_MAX} programs of {PROGRAM_CHARS_MAX} characters are asked for"
            )
        running, processes, memory = self._free(owner)
        processors = len(os.sched_getaffinity(0))
        return {
            "running": running,
            "processes": processes,
            "memory_bytes": memory,
            "processors": processors,
            "load": os.getloadavg()[0] / processors,
            "prepared": [program in self._prepared for program in programs],
        }

    async def find(self, owner: str, on: str, programs: list[str]) -> list[dict[str, Any]]:
        """The rooms of living members that match, each with its `node`. Raises InvalidArgument."""
        own = self.own(programs, owner)  # judges what is asked, too
        key = on, *programs
        if (found := self._lately.get(key)) is None:
            self._lately.put(key, found := await self._find(owner, on, programs))
        return [room if "load" in room else {**room, **own} for room in found]

    async def _find(self, owner: str, on: str, programs: list[str]) -> list[dict[str, Any]]:
        many = f"{FINDS_PER_OWNER_MAX} searches for room of {owner} go on (FINDS_PER_OWNER_MAX)"
        with self._places.hold(Claim(owner, FINDS_PER_OWNER_MAX, many)):
            living = [*self._ctx.members(f"service=proc,state=alive{',' if on else ''}{on}")]
            living.sort(key=lambda member: (not member.is_self, member.load))
            asked = living[:MEMBERS_MAX]
            answers = await asyncio.gather(*(self._ask(each, programs) for each in asked))
        return [answer for answer in answers if answer is not None]

    async def _ask(self, member: Member, programs: list[str]) -> dict[str, Any] | None:
        node = {"node": str(member.peer_id), "name": member.name}
        if member.is_self:
            return node  # what it says differs from one principal to the next
        try:
            async with self._asking, asyncio.timeout(ANSWER_S):
                sibling = await self._ctx.sibling(member.peer_id)
                try:
                    room = (await sibling.call("room", programs=programs))["room"]
                finally:
                    sibling.close()
        except (WetwareError, TimeoutError):
            return None
        return {**room, **node}  # who it is, its connection says


class SiblingServant(rpc.Servant, interface=SCHEMA.Sibling):
    """See proc.capnp."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    async def room(self, programs: list[str]) -> dict[str, Any]:
        return {"room": self._rooms.own(programs)}
