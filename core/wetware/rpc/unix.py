"""RPC over a unix socket, for programs of the same user on the same machine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wetware.errors import Busy, ConfigError, DialError
from wetware.log import get_logger
from wetware.rpc import kjloop as _runtime
from wetware.rpc.connection import RpcConnection, open_client, run_server
from wetware.rpc.limits import RpcLimits
from wetware.rpc.pipes import SocketPipe

if TYPE_CHECKING:
    from wetware.rpc.servant import Guarded, Servant

log = get_logger("rpc")

CONNECTIONS_MAX: Final = 64
"""Clients on one unix socket: command lines and applications of one user."""
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
) -> AsyncIterator[None]:
    """Serve on a unix socket (0600) while the context is open.

    `bootstrap` makes the first object of each connection. Peers of other users are refused. A
    socket left behind by a dead process is replaced. Raises ConfigError "config.listen", or Busy
    "config.busy.socket" if somebody listens there.
    """
    await _runtime.acquire()
    try:
        listener, inode = _listen(path)
    except BaseException:
        await _runtime.release()
        raise
    tasks: set[asyncio.Task[None]] = set()
    accepting = asyncio.create_task(
        _accept(listener, bootstrap, limits, connections_max, tasks), name=f"rpc-{path.name}"
    )
    try:
        yield
    finally:
        await _runtime.finish(_stop(path, inode, listener, accepting, tasks))


async def _stop(
    path: Path,
    inode: int,
    listener: socket.socket,
    accepting: asyncio.Task[None],
    tasks: set[asyncio.Task[None]],
) -> None:
    accepting.cancel()
    for task in tasks:
        task.cancel()
    await asyncio.wait([accepting, *tasks])
    listener.close()
    _unlink(path, inode)
    await _runtime.release()


async def _accept(
    listener: socket.socket,
    bootstrap: Callable[[UnixPeer], Servant | Guarded],
    limits: RpcLimits,
    connections_max: int,
    tasks: set[asyncio.Task[None]],
) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock, _ = await loop.sock_accept(listener)
        except OSError as exc:
            # Out of descriptors, most likely: what we serve goes on, and new clients wait.
            log.warning("rpc.accept_failed", error=exc.strerror)
            await asyncio.sleep(0.1)
            continue
        peer = _peer_of(sock)
        if not _trusted(peer) or len(tasks) >= connections_max:
            log.warning("rpc.unix_refused", uid=peer.uid, pid=peer.pid, connections=len(tasks))
            sock.close()
            continue
        task = loop.create_task(_serve_one(sock, peer, bootstrap, limits))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _serve_one(
    sock: socket.socket,
    peer: UnixPeer,
    bootstrap: Callable[[UnixPeer], Servant | Guarded],
    limits: RpcLimits,
) -> None:
    with sock:
        try:
            await run_server(SocketPipe(sock), bootstrap(peer), limits)
        except Exception as exc:  # one connection's failure is not the others'
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
        return await open_client(SocketPipe(sock), limits)
    except BaseException:
        sock.close()
        raise


def _dial_error(path: Path, exc: OSError | TimeoutError) -> DialError:
    number = exc.errno if isinstance(exc, OSError) else None
    if number in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.ENOTDIR):
        return DialError(f"nobody listens on {path}", hint="start a node: `ww node`")
    if number == errno.EACCES:
        return DialError(f"no permission to connect to {path}", hint="run as the node's user")
    if isinstance(exc, OSError) and number is None and not isinstance(exc, TimeoutError):
        return DialError(f"{path} is too long for a unix socket", hint="choose a shorter path")
    reason = os.strerror(number) if number else f"no answer within {_CONNECT_S:g} s"
    return DialError(f"cannot connect to {path}: {reason}", hint="see the node's log")
