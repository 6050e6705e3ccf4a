"""A member that does others harm: `python liar.py WAYS HOST ARGS` is `ww ARGS`, but for that.

WAYS, with commas: "punch": it names HOST when punching; "observed": it tells those who ask that it
sees them there; "record": its record has eight addresses of it, other ones each second; "hold": it
holds each byte that it carries for HOLD_S, once there is a file named HOST.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from os.path import exists
from typing import Any

from wetware.base.multiaddr import Multiaddr
from wetware.cli import main
from wetware.overlay import relay
from wetware.overlay.frames import write_frame
from wetware.overlay.membership.service import Membership
from wetware.overlay.punching import Punching

HOLD_S = 30.0
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


async def carry(source: Any, target: Any) -> None:
    loop, held = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]]()

    async def take() -> None:
        while data := await source.read():
            held.put_nowait((loop.time() + HOLD_S * exists(host), data))  # noqa: ASYNC240 - a test

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(take())
        while True:
            due, data = await held.get()
            await asyncio.sleep(due - loop.time())
            await target.write(data)


async def hold(left: Any, right: Any, _: Any) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(carry(left, right))
        tasks.create_task(carry(right, left))


if "hold" in ways:
    relay.splice = hold  # type: ignore[assignment]
if "punch" in ways:
    Punching._observe = observe  # type: ignore[method-assign]
if "observed" in ways:
    Punching._tell = tell  # type: ignore[method-assign]
if "record" in ways:
    Membership._fields = lying  # type: ignore[method-assign]
sys.argv = ["ww", *sys.argv[3:]]
main()
