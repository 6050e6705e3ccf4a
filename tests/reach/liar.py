"""A member that lies about addresses: `python liar.py WAYS HOST ARGS` is `ww ARGS`, but for that.

WAYS, with commas: "punch": it names HOST when punching; "observed": it tells those who ask that it
sees them there; "record": its record has eight addresses of it, other ones each second.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import Any

from wetware.base.multiaddr import Multiaddr
from wetware.cli import main
from wetware.overlay.frames import write_frame
from wetware.overlay.membership.service import Membership
from wetware.overlay.punching import Punching

ways, host = sys.argv[1].split(","), sys.argv[2]
ports = itertools.count(1000)


def victim() -> Multiaddr:
    return Multiaddr("ip4", host, next(ports))


async def observe(*_: Any) -> tuple[int, Multiaddr]:
    return 0, victim()


async def tell(_: Punching, stream: Any) -> None:
    await write_frame(stream, {"addr": str(victim())})


fields = Membership._fields


def lying(self: Membership) -> dict[str, Any]:
    asyncio.get_running_loop().call_later(1.0, self.refresh)
    return {**fields(self), "addrs": tuple(str(victim()) for _ in range(8))}


if "punch" in ways:
    Punching._observe = observe  # type: ignore[method-assign]
if "observed" in ways:
    Punching._tell = tell  # type: ignore[method-assign]
if "record" in ways:
    Membership._fields = lying  # type: ignore[method-assign]
sys.argv = ["ww", *sys.argv[3:]]
main()
