"""How the etcds of several members reach each other: over the members' own streams.

Each runs in a directory of its node's own (0700) and knows the others by sockets there, which have
the same names everywhere: at its own machine `PEER:0` of another member is a forwarder. What comes
there leaves by a stream to that member, and enters its etcd by the socket of that name. So no port
is open and no certificate needed, and only those whom the placement of the store names are let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

from wetware.base.bounds import Claim, Places
from wetware.base.log import get_logger
from wetware.base.sockets import accept
from wetware.base.tasks import Tasks
from wetware.errors import DialError, OverlayError, WetwareError
from wetware.hookspecs import Access

if TYPE_CHECKING:
    from pathlib import Path

    import anyio

    from wetware.hookspecs import PluginContext
    from wetware.identity import PeerId
    from wetware.overlay.link import Stream

log = get_logger("sync.pipes")

PROTOCOL: Final = "/wetware/sync/etcd/1"
SERVICE: Final = "kv"
STREAMS_PER_PEER_MAX: Final = 64
"""Of one etcd to another, which has about six."""
_PIECE_BYTES: Final = 64 << 10
CLIENT: Final = "client:0"
"""The socket on which an etcd serves its own node."""


def peer_socket(peer: PeerId) -> str:
    """The name of the socket by which the others reach the etcd of a member."""
    return f"{peer}:0"


class Room:
    """A directory of sockets, under a path that is short enough for one, until it is closed.

    Args:
        directory: Exists, 0700.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def path(self, name: str) -> str:
        """Where this process finds a socket."""
        return f"/proc/self/fd/{self._fd}/{name}"

    def close(self) -> None:
        os.close(self._fd)


class Pipes:
    """The forwarders of one member, and its end of those of the others.

    Args:
        ctx: Of the plugin.
        room: Where the sockets are.
        admitted: Who is let in now.
    """

    def __init__(
        self, ctx: PluginContext, room: Room, admitted: Callable[[], Collection[PeerId]]
    ) -> None:
        self._ctx, self._room, self._admitted = ctx, room, admitted
        self._places, self._tasks = Places(), Tasks()
        self._listening: dict[PeerId, asyncio.Task[None]] = {}
        self._carried: dict[Stream, asyncio.Task[None]] = {}

    async def run(self, changed: Callable[[], anyio.Event]) -> None:
        """Have a forwarder for each who is admitted, until cancelled.

        Args:
            changed: An event that is set when other members are admitted from now on.
        """
        end = self._ctx.overlay.handle(PROTOCOL, self._serve, access=Access.MEMBER)
        try:
            while True:
                event = changed()
                self._follow()
                await event.wait()
        finally:
            end()
            await self._tasks.end()

    def _follow(self) -> None:
        wanted = {*self._admitted()} - {self._ctx.overlay.peer_id}
        for peer in self._listening.keys() - wanted:
            self._listening.pop(peer).cancel()
        for peer in wanted - self._listening.keys():
            self._listening[peer] = self._tasks.start(self._listen(peer))
        for stream, carrying in self._carried.items():
            if stream.peer not in wanted:
                carrying.cancel()

    async def _listen(self, peer: PeerId) -> None:
        path = self._room.path(peer_socket(peer))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a process that was killed
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.setblocking(False)
            while True:
                self._begin(peer, await accept(listener))

    def _begin(self, peer: PeerId, sock: socket.socket) -> None:
        leaving = self._tasks.start(self._leave(peer, sock))
        # Here, since a task that is cancelled before it has begun does nothing.
        leaving.add_done_callback(lambda _: sock.close())

    async def _leave(self, peer: PeerId, sock: socket.socket) -> None:
        """Carry what an etcd here says to that of another member."""
        try:
            stream = await self._open(peer)
        except WetwareError as exc:
            log.debug("pipe.not_open", peer=peer, why=exc)
            return  # the etcd tries again
        await self._carry(stream, sock)

    async def _open(self, peer: PeerId) -> Stream:
        overlay = self._ctx.overlay
        if peer not in overlay.peers():
            sibling = await self._ctx.sibling(peer, SERVICE)  # by whatever way there is
            sibling.close()
        return await overlay.open_stream(peer, PROTOCOL)

    async def _serve(self, stream: Stream) -> None:
        """Let another member's etcd in to the one here."""
        peer = stream.peer
        if peer not in self._admitted():
            log.warning("pipe.refused", peer=peer, why="it has no part in the etcd of the store")
            stream.reset()
            return
        many = f"{peer} has {STREAMS_PER_PEER_MAX} streams (STREAMS_PER_PEER_MAX)"
        with (
            self._places.hold(Claim(peer, STREAMS_PER_PEER_MAX, many)),
            socket.socket(socket.AF_UNIX) as sock,
        ):
            sock.setblocking(False)
            path = self._room.path(peer_socket(self._ctx.overlay.peer_id))
            try:
                await asyncio.get_running_loop().sock_connect(sock, path)
            except OSError as exc:
                raise DialError(f"the etcd here does not run: {exc.strerror}") from exc
            await self._tasks.start(self._carry(stream, sock))

    async def _carry(self, stream: Stream, sock: socket.socket) -> None:
        """Both ways, until both are at their end or one fails."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # this is a coroutine
        stream.urgent = True  # what keeps a leader is small, and must not wait behind a blob
        self._carried[stream] = task
        try:
            async with stream, asyncio.TaskGroup() as both:
                both.create_task(_forth(sock, stream))
                both.create_task(_back(stream, sock))
        except* (OSError, OverlayError) as exc:
            log.debug("pipe.ended", peer=stream.peer, why=exc.exceptions[0])
        finally:
            del self._carried[stream]


async def _forth(sock: socket.socket, stream: Stream) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(sock, _PIECE_BYTES):
        await stream.write(data)
    stream.close()


async def _back(stream: Stream, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await stream.read(_PIECE_BYTES):
        await loop.sock_sendall(sock, data)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
