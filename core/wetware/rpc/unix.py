"""RPC over a unix socket, for programs of the same user on the same machine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wetware.base.bounds import Throttle
from wetware.base.log import get_logger
from wetware.base.sockets import accept
from wetware.errors import Busy, ConfigError, DialError, LimitExceeded
from wetware.rpc import kjloop
from wetware.rpc.connection import connect, serve
from wetware.rpc.limits import RpcLimits
from wetware.rpc.pipes import SocketPipe

if TYPE_CHECKING:
    from wetware.rpc.dispatch import Guarded
    from wetware.rpc.refs import RpcConnection
    from wetware.rpc.servant import Servant

log = get_logger("rpc")

CONNECTIONS_MAX: Final = 64
"""Clients on one unix socket: command lines and applications of one user."""
REFUSALS_MAX: Final = 4
"""Clients beyond it that are told so at a time."""
_REFUSAL_S: Final = 2.0
_LOGIN_S: Final = 2.0
"""For a client to log in where others wait for its place."""
_LINES_PER_MINUTE: Final = 10
_BACKLOG: Final = 64
_PATH_BYTES_MAX: Final = 107  # sockaddr_un, unix(7)
_CONNECT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class UnixPeer:
    """Who is at the other end of a unix socket, as the kernel says.

    Attributes:
        uid: User ID: our own, or root's.
        gid: Group ID.
        pid: Process ID, when it connected.
    """

    uid: int
    gid: int
    pid: int


def _peer_of(sock: socket.socket) -> UnixPeer:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return UnixPeer(uid=uid, gid=gid, pid=pid)


def _trusted(peer: UnixPeer) -> bool:
    return peer.uid in (os.geteuid(), 0)


@contextlib.asynccontextmanager
async def serve_unix(
    path: Path,
    bootstrap: Callable[[UnixPeer], Servant | Guarded],
    *,
    limits: RpcLimits = RpcLimits(),  # noqa: B008  # frozen
    connections_max: int = CONNECTIONS_MAX,
    trust_s: float | None = None,
) -> AsyncIterator[None]:
    """Serve on a unix socket (0600) while the context is open.

    `bootstrap` makes the first object of each connection. Peers of other users are refused. With
    `trust_s` (see `serve`), the oldest connection that nobody has trusted makes room for a new one;
    where all are in use, the client hears LimitExceeded. A socket left behind by a dead process is
    replaced. Raises ConfigError "config.listen", or Busy "config.busy.socket" if somebody listens.
    """
    async with kjloop.runtime():
        listener, inode = _listen(path)
        clients = _Clients(bootstrap, limits, connections_max, trust_s)
        accepting = asyncio.create_task(clients.accept(listener), name=f"rpc-{path.name}")
        try:
            yield
        finally:
            await kjloop.finish(_stop(path, inode, listener, accepting, clients.tasks))


async def _stop(
    path: Path,
    inode: int,
    listener: socket.socket,
    accepting: asyncio.Task[None],
    tasks: set[asyncio.Task[None]],
) -> None:
    accepting.cancel()
    await asyncio.wait([accepting])
    ending = tuple(tasks)
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.wait(ending)
    listener.close()
    _unlink(path, inode)


@dataclass(slots=True)
class _Client:
    """One that is served, since when by the loop's clock."""

    since: float
    pipe: SocketPipe

    @property
    def idle(self) -> bool:
        """Whether it has said nothing yet: it holds a place and uses none of it."""
        return self.pipe.transport is not None and not self.pipe.transport.heard

    @property
    def trusted(self) -> bool:
        return self.pipe.transport is not None and self.pipe.transport.trusted


class _Clients:
    """Those of one socket, and who gives way when there are `connections_max`.

    Attributes:
        tasks: One for each, those that are refused included.
    """

    def __init__(
        self,
        bootstrap: Callable[[UnixPeer], Servant | Guarded],
        limits: RpcLimits,
        connections_max: int,
        trust_s: float | None,
    ) -> None:
        self._bootstrap, self._limits = bootstrap, limits
        self._connections_max, self._trust_s = connections_max, trust_s
        self._served: dict[asyncio.Task[None], _Client] = {}  # the oldest first
        self._lines = Throttle(_LINES_PER_MINUTE, 8, time.monotonic)
        self.tasks: set[asyncio.Task[None]] = set()

    async def accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock = await accept(listener)
            except OSError as exc:
                # Out of descriptors, most likely: what we serve goes on, and new clients wait.
                self._warn("rpc.accept_failed", error=exc.strerror)
                await asyncio.sleep(0.1)
                continue
            with contextlib.ExitStack() as held:
                held.callback(sock.close)
                peer = _peer_of(sock)
                if not _trusted(peer):
                    self._warn("rpc.unix_refused", uid=peer.uid, pid=peer.pid, why="another user's")
                elif await self._make_room():
                    self._start(sock, peer)
                    held.pop_all()
                elif len(self.tasks) - len(self._served) < REFUSALS_MAX:
                    self._warn("rpc.unix_refused", uid=peer.uid, pid=peer.pid, why="too many")
                    refused = LimitExceeded(
                        f"{self._connections_max} programs of this machine are logged in to the "
                        "node, and it serves no more",
                        hint="end some of them, e.g. with Ctrl-C",
                    )
                    self._start(sock, peer, refused)
                    held.pop_all()

    def _start(
        self, sock: socket.socket, peer: UnixPeer, refused: LimitExceeded | None = None
    ) -> None:
        """Serve a client, or tell it for a moment why it gets nothing, whatever it calls."""

        def over(task: asyncio.Task[None]) -> None:
            sock.close()  # also where the task was cancelled before it had begun
            self.tasks.discard(task)
            self._served.pop(task, None)

        loop, pipe = asyncio.get_running_loop(), SocketPipe(sock, files=True)
        task = loop.create_task(self._serve(pipe, peer, refused))
        self.tasks.add(task)
        if refused is None:
            self._served[task] = _Client(loop.time(), pipe)
        task.add_done_callback(over)

    def _warn(self, event: str, **fields: object) -> None:
        if (left_out := self._lines.lines(event)) is not None:
            log.warning(event, **fields, unlogged=left_out)

    async def _make_room(self) -> bool:
        """A place for one more; False if all have logged in.

        The oldest that has said nothing makes room, else the oldest that is not logged in yet: that
        one gets `_LOGIN_S` from when it came.
        """
        loop = asyncio.get_running_loop()
        while len(self._served) >= self._connections_max:
            strangers = [item for item in self._served.items() if not item[1].trusted]
            if not strangers:
                return False
            task, client = next((item for item in strangers if item[1].idle), strangers[0])
            left_s = 0.0 if client.idle else client.since + _LOGIN_S - loop.time()
            if left_s <= 0:
                self._warn("rpc.unix_evicted", clients=len(self._served))
                task.cancel()
            await asyncio.wait([task], timeout=min(left_s, 0.1) if left_s > 0 else None)
        return True

    async def _serve(self, pipe: SocketPipe, peer: UnixPeer, refused: LimitExceeded | None) -> None:
        try:
            async with asyncio.timeout(None if refused is None else _REFUSAL_S):
                await serve(
                    pipe,
                    self._bootstrap(peer),
                    self._limits,
                    trust_s=self._trust_s,
                    refused=refused,
                )
        except Exception as exc:  # one connection's failure is not the others'
            if refused is None:
                log.error("rpc.connection_failed", pid=peer.pid, exc_info=exc)  # noqa: TRY400  # an EventLogger


def _unlink(path: Path, inode: int) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_ino == inode:  # not if another node has taken the place
            path.unlink()


def _listen(path: Path) -> tuple[socket.socket, int]:
    """A listening socket at `path`, and the inode that it has there."""
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise ConfigError(
            f"{path}: the path of a unix socket has at most {_PATH_BYTES_MAX} bytes",
            hint="choose a shorter one",
            code="config.listen",
        )
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        sock.bind(str(path))
        path.chmod(0o600)  # before anybody can connect: connecting needs listen()
        inode = path.stat().st_ino
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise ConfigError(
            f"cannot listen on {path}: {exc.strerror}",
            hint="check the folder and its permissions",
            code="config.listen",
        ) from None
    return sock, inode


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(
                f"{path} is there and is not a socket", hint="move it away", code="config.listen"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
        except OSError as exc:
            raise ConfigError(
                f"cannot use {path}: {exc.strerror}",
                hint="check the folder and its permissions",
                code="config.listen",
            ) from None
    raise Busy(
        f"{path}: another process listens there", hint="stop it first", code="config.busy.socket"
    )


async def connect_unix(
    path: Path,
    *,
    limits: RpcLimits = RpcLimits(),  # noqa: B008  # frozen
) -> RpcConnection:
    """Connect to what `serve_unix` serves.

    Raises DialError: nobody listens there, no permission, or the server is another user's.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        try:
            async with asyncio.timeout(_CONNECT_S):
                await loop.sock_connect(sock, str(path))
        except (OSError, TimeoutError) as exc:
            raise _dial_error(path, exc) from None
        peer = _peer_of(sock)
        if not _trusted(peer):
            raise DialError(  # noqa: TRY301  # the socket is closed below
                f"{path} is served by another user (uid {peer.uid})",
                hint="check the path",
                code="overlay.dial.owner",
            )
        return await connect(SocketPipe(sock), limits)
    except BaseException:
        sock.close()
        raise


@contextlib.asynccontextmanager
async def loopback(bootstrap: Servant | Guarded) -> AsyncIterator[RpcConnection]:
    """A connection of this process to itself: its objects as a peer has them, under guards."""
    here, there = socket.socketpair()
    with here, there:
        serving = asyncio.create_task(serve(SocketPipe(there), bootstrap), name="rpc-loopback")
        try:
            async with await connect(SocketPipe(here)) as connection:
                yield connection
        finally:
            serving.cancel()
            await asyncio.wait([serving])


def _dial_error(path: Path, exc: OSError | TimeoutError) -> DialError:
    number = exc.errno if isinstance(exc, OSError) else None
    if number in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.ENOTDIR):
        return DialError(
            f"no node answers at {path}",
            hint="start one with `ww node`",
            code="overlay.dial.no_node",
        )
    if number == errno.EACCES:
        return DialError(f"no permission to connect to {path}", hint="run as the node's user")
    if isinstance(exc, OSError) and number is None and not isinstance(exc, TimeoutError):
        return DialError(f"{path} is too long for a unix socket", hint="choose a shorter path")
    reason = os.strerror(number) if number else f"no answer within {_CONNECT_S:g} s"
    return DialError(f"cannot connect to {path}: {reason}", hint="see the node's log")
