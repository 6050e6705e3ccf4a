"""Notices that the machine has changed its network, or has slept.

Linux tells of every change of an address, a link or a route, without privileges. That is taken as a
hint to look at once; elsewhere, and if a hint is lost, the change is seen at the next look.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Final

from wetware.base.interfaces import Network, look
from wetware.base.log import get_logger

log = get_logger("network")

LOOK_S: Final = 1.0
"""Between two looks; one takes a fifth of a millisecond."""
SETTLE_S: Final = 0.1
"""After a hint: an address and its route come one after the other."""
SLEPT_S: Final = 5.0
"""A look that comes so much too late, by the time of day, means that the machine or this process
slept: the monotonic clock of Linux stops meanwhile. A clock that is set looks the same, and costs a
round of probes."""
_HINT_BYTES: Final = 64 << 10
# linux/rtnetlink.h: RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400


def hints() -> socket.socket | None:
    """Readable when the network may have changed; None where the system does not tell."""
    family = getattr(socket, "AF_NETLINK", None)
    if family is None:
        return None
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        sock.setblocking(False)
        sock.bind((0, _GROUPS))
    except OSError as exc:
        log.info("network.no_hints", why=exc)
        if sock is not None:
            sock.close()
        return None
    return sock


async def watch_network(
    changed: Callable[[Network], None],
    *,
    first: Network,
    look: Callable[[], Network] = look,
    unix_s: Callable[[], float] = time.time,
    hints: Callable[[], socket.socket | None] = hints,
) -> None:
    """Call `changed`, with what there is now, after every change since `first` and every sleep."""
    was = first
    with hints() or contextlib.nullcontext() as sock:
        while True:
            asked_at = unix_s()
            if await _hinted(sock):
                await asyncio.sleep(SETTLE_S)
            slept_s = unix_s() - asked_at - LOOK_S
            try:
                now = look()
            except OSError as exc:  # no descriptor free: as it was
                log.debug("network.not_seen", why=exc)
                continue
            if now != was or slept_s > SLEPT_S:
                was = now
                changed(now)


async def _hinted(sock: socket.socket | None) -> bool:
    """Wait for a hint, or until the next look is due."""
    try:
        async with asyncio.timeout(LOOK_S):
            if sock is None:
                await asyncio.Event().wait()
            else:
                await asyncio.get_running_loop().sock_recv(sock, _HINT_BYTES)
    except TimeoutError:
        return False
    except OSError:  # more of them than the kernel holds for us
        return True
    return True
