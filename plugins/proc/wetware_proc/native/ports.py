"""TCP ports of a program as capabilities.

The network of a sandbox is its own: there is a loopback interface in it and nothing else, and no
route leads there. A socket belongs to the network in which it was made; so a small process that
has entered that (`enter.py`) makes sockets, and the node connects them. It is started with the
first connection, and ends with the sandbox.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from anyio import wait_readable

from wetware import rpc
from wetware.base.tasks import Tasks
from wetware.errors import LimitExceeded, WetwareError
from wetware_proc.native.client import carried

if TYPE_CHECKING:
    from wetware_proc.native.sandbox import Sandbox

CONNECTIONS_MAX: Final = 256  # of all ports of one program, at a time
_ENTER_S: Final = 10.0
_CONNECT_S: Final = 5.0


class Ports:
    """Those of one program."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._helper: subprocess.Popen[bytes] | None = None
        self._maker: socket.socket | None = None
        self._turn = asyncio.Lock()
        self._connections = Tasks()

    async def connect(self, number: int) -> rpc.ByteStream:
        """A connection to a port. Call it in the servant's method.

        Raises WetwareError "proc.port" where nobody listens, LimitExceeded.
        """
        if len(self._connections) >= CONNECTIONS_MAX:
            raise LimitExceeded(f"{CONNECTIONS_MAX} connections to this program (CONNECTIONS_MAX)")
        stream = rpc.ByteStream()
        sock = await self._socket()
        try:
            async with asyncio.timeout(_CONNECT_S):
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", number))
        except OSError as exc:  # a TimeoutError is one
            sock.close()
            raise WetwareError(
                f"nothing answers at port {number} of the program: {exc.strerror or 'no answer'}",
                hint="does it listen there already? its output may say",
                code="proc.port",
            ) from None
        self._connections.start(carried(stream, sock))
        return stream

    async def close(self) -> None:
        await self._connections.end()
        if self._maker is not None:
            self._maker.close()
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()

    async def _socket(self) -> socket.socket:
        async with self._turn:
            try:
                async with asyncio.timeout(_ENTER_S):
                    if self._maker is None:
                        self._maker = self._enter()
                        await self._answer(self._maker)
                    self._maker.send(b".")
                    fds = await self._answer(self._maker)
            except (OSError, EOFError) as exc:
                raise WetwareError(
                    "the network of the program cannot be entered", code="proc.port"
                ) from exc
        sock = socket.socket(fileno=fds[0])
        sock.setblocking(False)
        return sock

    def _enter(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            uid = -1 if self._sandbox.uid is None else self._sandbox.uid
            script = Path(__file__).with_name("enter.py")
            numbers = map(str, (self._sandbox.pid, uid, theirs.fileno()))
            self._helper = subprocess.Popen(  # noqa: S603  # our own
                [sys.executable, "-I", "-S", script, *numbers],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()], cwd="/", env={},
            )  # fmt: skip
        ours.setblocking(False)
        return ours

    async def _answer(self, maker: socket.socket) -> list[int]:
        await wait_readable(maker)
        data, fds, _, _ = socket.recv_fds(maker, 1, 1)
        if not data:
            raise EOFError
        return fds


class PortServant(rpc.Servant, interface=rpc.WW.Port):
    """See ww.capnp."""

    def __init__(self, ports: Ports, number: int) -> None:
        self._ports, self._number = ports, number

    async def connect(self) -> dict[str, Any]:
        return {"stream": (await self._ports.connect(self._number)).servant}
