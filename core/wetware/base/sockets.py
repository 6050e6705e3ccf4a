"""Listening sockets on the loop, without what asyncio's own way loses."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket


async def accept(listener: socket.socket) -> socket.socket:
    """Take the next connection of a non-blocking listener, non-blocking as well; raises OSError.

    Cancelled, it has taken none: `loop.sock_accept` may drop one then that it has taken already.
    """
    loop = asyncio.get_running_loop()
    while True:
        ready = asyncio.Event()
        loop.add_reader(listener, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(listener)
        try:
            sock, _ = listener.accept()
        except BlockingIOError:  # it went already
            continue
        sock.setblocking(False)
        return sock
