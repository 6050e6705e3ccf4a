"""TCP sockets to listen on, all or none; and why one cannot be had."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from wetware.errors import Busy, ConfigError

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr

FAMILIES = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}


async def check_free(addrs: Iterable[Multiaddr]) -> None:
    """Raise as `LinkHost.listen` does, if one of `addrs` cannot be had now."""
    for sock in await bind(addrs, backlog=1):
        sock.close()


async def bind(addrs: Iterable[Multiaddr], backlog: int) -> list[socket.socket]:
    """The sockets that listen on `addrs`; all or none."""
    loop = asyncio.get_running_loop()
    found: list[socket.socket] = []
    try:
        for addr in addrs:
            try:
                infos = await loop.getaddrinfo(
                    addr.host, addr.port, family=FAMILIES[addr.kind], type=socket.SOCK_STREAM
                )
                for family, kind, proto, _, name in dict.fromkeys(infos):
                    found.append(sock := socket.socket(family, kind, proto))
                    sock.setblocking(False)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    sock.bind(name)
                    sock.listen(backlog)
            except OSError as exc:
                raise _listen_error(addr, exc) from exc
    except BaseException:
        for sock in found:
            sock.close()
        raise
    return found


def os_reason(exc: OSError) -> str:
    if exc.errno is not None:
        return os.strerror(exc.errno).lower()
    return str(exc) or type(exc).__name__


def _listen_error(addr: Multiaddr, exc: OSError) -> ConfigError:
    if exc.errno == errno.EADDRINUSE:
        return Busy(
            f"cannot listen on {addr}: the port is taken",
            hint=f"stop what listens there, or: --listen /{addr.kind}/{addr.host}/tcp/PORT",
            code="config.busy.port",
        )
    if exc.errno == errno.EADDRNOTAVAIL:  # at boot, the network may not be up yet
        return Busy(
            f"cannot listen on {addr}: this machine has no such address",
            hint="use one of its own, or /ip4/0.0.0.0",
            code="config.busy.address",
        )
    if exc.errno == errno.EACCES:
        why, hint = "not permitted", "choose a port from 1024 upwards"
    else:
        why, hint = os_reason(exc), "check the address"
    return ConfigError(f"cannot listen on {addr}: {why}", hint=hint, code="config.listen")
