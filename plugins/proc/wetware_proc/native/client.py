"""Native programs for clients: the service itself, which `session.proc` uses, and their ports."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

from wetware import rpc
from wetware.base.sockets import accept
from wetware.base.tasks import Tasks
from wetware.errors import ConfigError, WetwareError
from wetware_proc.schema import SCHEMA
from wetware_proc.sockets import carried

_BACKLOG = 64


class Native:
    """The service `native` of a session: `session.proc` calls it where a `kind` is "native".

    Args:
        ref: A reference to a Native.
    """

    INTERFACE = SCHEMA.Native

    def __init__(self, ref: Any) -> None:
        self.call = ref.call


@contextlib.asynccontextmanager
async def forwarded(port: rpc.Ref, number: int) -> AsyncIterator[int]:
    """Listen on this machine's loopback interface for a `Ww.Port`; the block gets the number.

    Each connection there becomes one of the port; where that refuses, it is closed. `number` 0 is
    any that is free. Raises ConfigError "config.listen".
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    tasks = Tasks()

    async def lead(sock: socket.socket) -> None:
        try:
            stream = rpc.ByteStream((await port.call("connect"))["stream"])
        except WetwareError:
            sock.close()
            return
        await carried(stream, sock)

    async def listen() -> None:
        while True:
            tasks.start(lead(await accept(listener)))

    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        try:
            listener.bind(("127.0.0.1", number))
        except OSError as exc:
            raise ConfigError(
                f"cannot listen at 127.0.0.1:{number}: {exc.strerror}",
                hint="choose another port; 0 is any that is free",
                code="config.listen",
            ) from None
        listener.listen(_BACKLOG)
        tasks.start(listen())
        try:
            yield listener.getsockname()[1]
        finally:
            await tasks.end()
