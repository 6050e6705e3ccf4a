"""The byte streams under an RPC connection: a socket, or a stream of the link."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from array import array
from typing import TYPE_CHECKING, Final

from wetware.rpc.handed import FILES_MAX, Handed

if TYPE_CHECKING:
    from collections.abc import Collection

    from wetware.rpc.transport import RpcTransport

_READ_BYTES: Final = 120 << 10
"""Below what malloc maps and unmaps each time (128 KiB), which costs more than the call itself."""
_READ_BYTES_MAX: Final = 512 << 10
"""Where as much comes as is read: with each turn of the loop that is saved a stream is faster."""
_KERNEL_BYTES: Final = 1 << 20
"""Written and not read yet, as far as the system allows: with its 208 KiB the two ends of a stream
take turns, and wake each other for every piece."""
_PIECES_MAX: Final = 64
"""In one system call; Linux takes 1,024."""


class SocketPipe:
    """A connected stream socket, read and written on the loop.

    Args:
        sock: Belongs to the pipe from here on.
        files: The other end may hand in files while a stream waits for one. Otherwise the kernel
            closes what comes.
    """

    def __init__(self, sock: socket.socket, *, files: bool = False) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_BYTES)
        self._sock = sock
        self._fd = sock.fileno()
        self._takes_files = files
        self._handed: list[Handed] = []  # they leave with what is written next
        self._loop = asyncio.get_running_loop()
        self.transport: RpcTransport | None = None  # once it has started
        self._reading = False
        self._writing = False
        self._read_bytes = _READ_BYTES

    @property
    def peer(self) -> str:
        """Where the bytes come from, for the log."""
        return "local"

    def start(self, transport: RpcTransport) -> None:
        self.transport = transport
        transport.takes_files, transport.hand = self._takes_files, self._handed.append
        self.resume()

    def _readable(self) -> None:
        transport = self.transport
        assert transport is not None  # noqa: S101  # set by start
        try:
            if transport.files_due:
                data = self._receive_files(transport)
            else:
                data = self._sock.recv(self._read_bytes)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self.pause()
            transport.feed_error(exc)
            return
        if data:
            self._read_bytes = _READ_BYTES_MAX if len(data) >= _READ_BYTES else _READ_BYTES
            transport.feed(data)
        else:
            self.pause()
            transport.feed_eof()

    def _receive_files(self, transport: RpcTransport) -> bytes:
        flags = socket.MSG_CMSG_CLOEXEC
        data, fds, found, _ = socket.recv_fds(self._sock, self._read_bytes, FILES_MAX, flags)
        transport.feed_files([Handed(fd) for fd in fds], whole=not found & socket.MSG_CTRUNC)
        return data

    def write(self, pieces: Collection[memoryview]) -> int:
        rights: list[tuple[int, int, array[int]]] = []
        if self._handed:
            fds = array("i", [file.fd for file in self._handed])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
        try:
            count = self._sock.sendmsg(itertools.islice(pieces, _PIECES_MAX), rights)
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._writable)
            return 0
        self._handed.clear()
        return count

    def flush(self) -> None:
        """What was taken is in the kernel already."""

    def _writable(self) -> None:
        self._writing = False
        self._loop.remove_writer(self._fd)
        if self.transport is not None:
            self.transport.writable()

    def pause(self) -> None:
        """Stop reading: the kernel's buffer fills and the peer waits."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def resume(self) -> None:
        if not self._reading and self._sock.fileno() >= 0:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """What was taken is in the kernel already."""
        self.abort()

    def abort(self) -> None:
        self.pause()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        self._handed.clear()
        with contextlib.suppress(OSError):
            self._sock.close()
