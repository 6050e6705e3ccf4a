"""`session.native`: programs of the node's machine, with nothing but what they are given.

async with session.native.spawn("python3", "-m", "http.server", "8080", ports={"web": 8080}) as web:
    async with forwarded(await web.export("web"), 0) as port:
        ...  # http://127.0.0.1:{port} leads there
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import PurePath
from typing import Any

from wetware import rpc
from wetware.base.sockets import accept
from wetware.base.tasks import Tasks
from wetware.errors import ConfigError, WetwareError
from wetware_proc.client import Image, Programs
from wetware_proc.schema import SCHEMA
from wetware_proc.sockets import carried

_BACKLOG = 64


class Native(Programs):
    """The service `native` of a session: it spawns, runs and starts what is on the node's machine.

    Args:
        ref: A reference to a Native.
    """

    INTERFACE = SCHEMA.Native
    SERVICE = "native"

    async def load(self, code: str, kind: str = "") -> Image:
        """What is not loaded, and spawned with the program as its first argument."""
        image = (await self._ref.call("program"))["image"]
        return Image(self, image, "", PurePath(code).name, "", code)

    async def _detach(self, code: str, kind: str, spec: dict[str, Any], **params: Any) -> Any:
        spec = {**spec, "name": spec["name"] or PurePath(code).name, "args": [code, *spec["args"]]}
        return await self._ref.call("detach", spec=spec, **params)


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
