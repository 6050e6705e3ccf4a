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
from typing import Any, Unpack

from wetware import rpc
from wetware.base.sockets import accept
from wetware.base.tasks import Tasks
from wetware.errors import ConfigError, WetwareError
from wetware_proc.client import (
    SEND_S,
    Detached,
    Executor,
    Image,
    Options,
    Process,
    Ran,
    Running,
    collected,
    spec_of,
)
from wetware_proc.schema import SCHEMA
from wetware_proc.sockets import carried

_BACKLOG = 64


class Native:
    """The service `native` of a session.

    Args:
        ref: A reference to a Native.
    """

    INTERFACE = SCHEMA.Native

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    @contextlib.asynccontextmanager
    async def spawn(
        self, program: str, *args: str, **options: Unpack[Options]
    ) -> AsyncIterator[Process]:
        """Run a program: `async with session.native.spawn("sort", "-u") as process`.

        Args:
            program: As it is found there, in /usr/bin for example.
            args: Its arguments.
            options: See Options. A limit that the node cannot enforce is refused.

        Raises Unsupported "unsupported.limit", LimitExceeded.
        """
        async with self._image(program) as image, image.spawn(program, *args, **options) as process:
            yield process

    @contextlib.asynccontextmanager
    async def _image(self, program: str) -> AsyncIterator[Image]:
        image = (await self._ref.call("program"))["image"]
        image = Image(Executor(self._ref), image, "", PurePath(program).name)
        try:
            yield image
        finally:
            image.close()

    async def run(
        self, program: str, *args: str, stdin: bytes = b"", **options: Unpack[Options]
    ) -> Ran:
        """Run a program to its end; see `spawn`, and Executor.run."""
        async with self._image(program) as image, image.fed(stdin, program, *args, **options) as it:
            return await collected(it, stdin)

    async def start(
        self, program: str, *args: str, restart: str = "never", **options: Unpack[Options]
    ) -> Detached:
        """Start a program that outlives the session and the node; see `spawn`, Executor.start."""
        name, session = options.get("name") or PurePath(program).name, self._ref.session.ref
        async with Executor(self._ref).archives(options) as archives:
            spec = spec_of(name, (program, *args), options, "", archives)
            with rpc.time_limit(SEND_S):
                reply = await self._ref.call("detach", spec=spec, policy=restart, session=session)
        return Detached(self._ref, reply["id"])

    async def open(self, id_: str) -> Running:
        """A process of one's own, by its ID. Raises NotFound "not_found.process"."""
        return Running((await self._ref.call("open", id=id_))["process"])


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
