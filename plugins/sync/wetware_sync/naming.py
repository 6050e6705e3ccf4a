"""`session.names`: names of the cluster, from any node.

await session.names.set("/site/live", cid)
name = await session.names.get("/site/live")
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wetware_sync.reach import AtHome
from wetware_sync.schema import SCHEMA

if TYPE_CHECKING:
    from wetware_sync.holding import Held


@dataclass(frozen=True, slots=True)
class Past:
    """What a name stood for: since when (Unix time, ms), and which principal set it."""

    value: str
    set_ms: int
    by: str


@dataclass(frozen=True, slots=True)
class Name:
    """What a name stands for.

    Attributes:
        path: The name.
        value: A CID, `node:PEER` or a reference.
        revision: That set it.
        expires_ms: Unix time; 0: it has no end.
        history: The values before, the newest first; only from `get`.
    """

    path: str
    value: str
    revision: int
    expires_ms: int
    history: tuple[Past, ...] = ()


class Names:
    """The service `names` of a session.

    Args:
        here: The service as the session has it.
    """

    INTERFACE = SCHEMA.Names

    def __init__(self, here: Any) -> None:
        self.home = AtHome(here, "names")

    async def set(
        self,
        path: str,
        value: str,
        *,
        ttl_s: float = 0,
        expected: int | None = None,
        fence: Held | None = None,
    ) -> int:
        """Set a name; returns the revision.

        Args:
            path: "/site/live".
            value: 1 to 2048 printable characters. Who may read the name has a reference, too.
            ttl_s: It lasts so long; 0: for good.
            expected: Only where this revision set it last (0: where there is none): else Conflict.
            fence: Only as long as this is held.
        """
        with self.home.written():
            reply = await self.home.call(
                "set",
                path=path,
                value=value,
                ttl_ms=int(ttl_s * 1000),
                expected=expected or 0,
                checked=expected is not None,
                fence=b"" if fence is None else fence.hold,
            )
        return int(reply["revision"])

    async def get(self, path: str) -> Name:
        """What it stands for; raises NotFound "not_found.name"."""
        reply = await self.home.call("get", path=path)
        history = tuple(Past(**past) for past in reply["history"])
        return Name(path, reply["value"], reply["revision"], reply["expires_ms"], history)

    async def ls(self, prefix: str = "/") -> AsyncIterator[Name]:
        """The names that begin so, in order."""
        after = ""
        while True:
            reply = await self.home.call("ls", path=prefix, after=after, limit=0)
            for struct in reply["names"]:
                yield Name(**struct)
            if not (after := reply["next"]):
                return

    async def rm(self, path: str, *, fence: Held | None = None) -> bool:
        """Remove a name; whether there was one."""
        with self.home.written():
            reply = await self.home.call(
                "rm", path=path, fence=b"" if fence is None else fence.hold
            )
        return bool(reply["removed"])
