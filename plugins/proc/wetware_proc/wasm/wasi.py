"""WASI preview 1: what a guest's calls mean, all 46 of them.

Here numbers and bytes in a guest's memory become Python's, and back; files.py does what is done to
files. No call costs more than its bounds say, whatever a guest asks for: it gets less, or an error.
Source: https://github.com/WebAssembly/WASI/blob/wasi-0.1/preview1/docs.md
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import anyio

from wetware.base.bounds import TokenBucket
from wetware.base.threads import Threads, to_its_end
from wetware_proc.wasm import files
from wetware_proc.wasm.engine import Exited, Fiber, Imports, Result
from wetware_proc.wasm.errno import Errno, need
from wetware_proc.wasm.files import Directory, File, Quota, Table

if TYPE_CHECKING:
    from wetware_proc.driver import Output, Pipe, Spec

VECTORS_MAX: Final = 1024
"""Pieces of memory, or subscriptions, that one call names."""
IO_BYTES_MAX: Final = 1 << 20
"""That one call moves."""
LIST_BYTES_MAX: Final = 64 << 10
"""Of a directory's names, that one call tells."""

_SET_ATIME, _ATIME_NOW, _SET_MTIME, _MTIME_NOW = 1, 2, 4, 8
_FOLLOW: Final = 1
_CLOCK, _CAN_READ, _CAN_WRITE = 0, 1, 2  # what a subscription waits for
_ABSOLUTE: Final = 1
_HANGUP: Final = 1
_SUBSCRIPTION_BYTES, _EVENT_BYTES = 48, 32
_RANDOM_BYTES: Final = 64 << 10


@dataclass(slots=True, kw_only=True, eq=False)
class Input(files.Descriptor):
    """Standard input."""

    pipe: Pipe


@dataclass(slots=True, kw_only=True, eq=False)
class Sink(files.Descriptor):
    """Standard output or error."""

    output: Output


class Wasi:
    """The world of one guest.

    Args:
        fiber: The guest.
        spec: What it gets.
        tmp: Opens its own directory, and gives a descriptor.
        threads: For what waits for a disk.
    """

    def __init__(self, fiber: Fiber, spec: Spec, tmp: Callable[[], int], threads: Threads) -> None:
        self._fiber, self._memory, self._threads = fiber, fiber.memory, threads
        self._args = [os.fsencode(text) + b"\0" for text in spec.args]
        self._env = [os.fsencode(f"{name}={value}") + b"\0" for name, value in spec.env.items()]
        limits = spec.limits
        self._rate = TokenBucket(limits.output_bytes_s, limits.output_bytes_s)
        self._quota = Quota(limits.tmp_bytes, limits.tmp_files)
        self.table = table = Table(self._quota)
        stream = partial(
            Sink, kind=files.CHARACTER_DEVICE, rights=files.WRITE | files.STAT | files.POLL
        )
        table.add(
            Input(
                kind=files.CHARACTER_DEVICE,
                rights=files.READ | files.STAT | files.POLL,
                pipe=spec.stdin,
            )
        )
        table.add(stream(output=spec.stdout))
        table.add(stream(output=spec.stderr))
        files.give(table, spec, tmp)

    async def close(self) -> None:
        """The guest is gone."""
        await files.let_go(self.table, self._threads)

    # --- arguments and environment ---

    def args_get(self, pointers: int, buffer: int) -> None:
        self._write_texts(self._args, pointers, buffer)

    def args_sizes_get(self, count: int, size: int) -> None:
        self._write_sizes(self._args, count, size)

    def environ_get(self, pointers: int, buffer: int) -> None:
        self._write_texts(self._env, pointers, buffer)

    def environ_sizes_get(self, count: int, size: int) -> None:
        self._write_sizes(self._env, count, size)

    def _write_texts(self, texts: list[bytes], pointers: int, buffer: int) -> None:
        starts = list(accumulate(map(len, texts[:-1]), initial=buffer))[: len(texts)]
        self._memory.pack(pointers, f"<{len(starts)}I", *starts)
        self._memory.write(buffer, b"".join(texts))

    def _write_sizes(self, texts: list[bytes], count: int, size: int) -> None:
        self._memory.pack(count, "<I", len(texts))
        self._memory.pack(size, "<I", sum(map(len, texts)))

    # --- clocks, chance, the end ---

    def clock_res_get(self, clock: int, out: int) -> None:
        self._now(clock)
        self._memory.pack(out, "<Q", 1)

    def clock_time_get(self, clock: int, precision: int, out: int) -> None:
        self._memory.pack(out, "<Q", self._now(clock))

    def _now(self, clock: int) -> int:
        """In ns: the wall clock, a monotonic one, or the time that the guest has computed."""
        need(clock < 4, Errno.INVAL)
        if clock == 0:
            return time.time_ns()
        return time.monotonic_ns() if clock == 1 else self._fiber.cpu_ns

    def random_get(self, at: int, count: int) -> Result:
        view = self._memory.view(at, count)

        async def fill() -> None:
            for start in range(0, count, _RANDOM_BYTES):
                piece = view[start : start + _RANDOM_BYTES]
                piece[:] = os.urandom(len(piece))
                await asyncio.sleep(0)

        if count > _RANDOM_BYTES:
            return fill
        view[:] = os.urandom(count)
        return None

    def sched_yield(self) -> Result:
        return partial(asyncio.sleep, 0)

    def proc_exit(self, code: int) -> None:
        raise Exited(code)

    def proc_raise(self, signal: int) -> None:
        raise Errno.NOSYS.error()

    # --- reading and writing ---

    def fd_read(self, fd: int, vectors: int, count: int, out: int) -> Result:
        node, views = self.table.get(fd, files.READ), self._vectors(vectors, count)
        if isinstance(node, Input):
            return partial(self._read_input, node, views, out)
        self._memory.pack(out, "<I", os.readv(self.table.file(fd).fd, views) if views else 0)
        return None

    def _read_input(self, node: Input, views: list[memoryview], out: int) -> Awaitable[None] | None:
        def take() -> None:
            data = node.pipe.take(sum(map(len, views)))
            left = memoryview(data)
            for view in views:
                piece = left[: len(view)]
                view[: len(piece)] = piece
                left = left[len(piece) :]
            self._memory.pack(out, "<I", len(data))

        async def wait() -> None:
            await node.pipe.wait()
            take()

        if node.pipe.ready or not views:
            take()
            return None
        need(not node.flags & files.NONBLOCK, Errno.AGAIN)
        return wait()

    def fd_write(self, fd: int, vectors: int, count: int, out: int) -> Result:
        node, views = self.table.get(fd, files.WRITE), self._vectors(vectors, count)
        if isinstance(node, Sink):
            return partial(self._write_output, node, b"".join(views), out)
        file = self.table.file(fd)
        at = os.lseek(file.fd, 0, os.SEEK_CUR)
        self._memory.pack(out, "<I", self._writev(file, views, at))
        return None

    def _write_output(self, node: Sink, data: bytes, out: int) -> Awaitable[None] | None:
        async def wait(room: Awaitable[None] | None) -> None:
            if room is not None:
                await room
            await asyncio.sleep(self._rate.wait_s())

        self._memory.pack(out, "<I", len(data))
        room = node.output(data) if data else None
        self._rate.spend(len(data))
        return None if room is None and not self._rate.wait_s() else wait(room)

    def fd_pread(self, fd: int, vectors: int, count: int, at: int, out: int) -> None:
        file, views = self.table.file(fd, files.READ), self._vectors(vectors, count)
        self._memory.pack(out, "<I", os.preadv(file.fd, views, at) if views else 0)

    def fd_pwrite(self, fd: int, vectors: int, count: int, at: int, out: int) -> None:
        file, views = self.table.file(fd, files.WRITE), self._vectors(vectors, count)
        self._memory.pack(out, "<I", self._writev(file, views, at, positioned=True))

    def _writev(
        self, file: File, views: list[memoryview], at: int, *, positioned: bool = False
    ) -> int:
        if not views:
            return 0
        if file.flags & files.APPEND:  # Linux appends then wherever it is told to write
            at = os.fstat(file.fd).st_size
        if self._quota.bytes > files.LOOP_BYTES:
            self._fiber.leave_loop()
        with self._quota.resizing(file.fd, at + sum(map(len, views))):
            return os.pwritev(file.fd, views, at) if positioned else os.writev(file.fd, views)

    def _vectors(self, at: int, count: int) -> list[memoryview]:
        """Pieces of memory, up to IO_BYTES_MAX: with more the guest calls again."""
        need(count <= VECTORS_MAX, Errno.INVAL)
        views, left = [], IO_BYTES_MAX
        for start, size in struct.iter_unpack("<II", self._memory.read(at, 8 * count)):
            if piece := min(size, left):
                views.append(self._memory.view(start, piece))
                left -= piece
        return views

    # --- descriptors ---

    def fd_close(self, fd: int) -> None:
        self.table.close(fd)

    def fd_renumber(self, source: int, target: int) -> None:
        self.table.renumber(source, target)

    def fd_seek(self, fd: int, offset: int, whence: int, out: int) -> None:
        need(whence < 3, Errno.INVAL)
        at = os.lseek(self.table.file(fd).fd, offset - (offset >> 63 << 64), whence)
        self._memory.pack(out, "<Q", at)

    def fd_tell(self, fd: int, out: int) -> None:
        self.fd_seek(fd, 0, os.SEEK_CUR, out)

    def fd_sync(self, fd: int) -> Result:
        return partial(self._in_thread, os.fsync, self.table.on_disk(fd).fd)

    def fd_datasync(self, fd: int) -> Result:
        return partial(self._in_thread, os.fdatasync, self.table.on_disk(fd).fd)

    async def _in_thread(self, function: Callable[..., None], *args: int) -> None:
        await to_its_end(self._threads.run(function, *args))  # the descriptor is closed behind it

    def fd_advise(self, fd: int, at: int, count: int, advice: int) -> None:
        need(advice < 6 and at < 1 << 63 and count < 1 << 63, Errno.INVAL)
        self.table.file(fd)  # what the kernel reads ahead or forgets is not the guest's to say

    def fd_allocate(self, fd: int, at: int, count: int) -> Result:
        file = self.table.file(fd, files.WRITE)

        async def allocate() -> None:
            with self._quota.resizing(file.fd, at + count):
                await self._in_thread(os.posix_fallocate, file.fd, at, count)

        return allocate

    def fd_fdstat_get(self, fd: int, out: int) -> None:
        node = self.table.get(fd)
        self._memory.pack(out, "<BxH4xQQ", node.kind, node.flags, node.rights, node.inheriting)

    def fd_fdstat_set_flags(self, fd: int, flags: int) -> None:
        node = self.table.get(fd)
        settable = files.APPEND | files.NONBLOCK
        need(not flags & ~settable, Errno.INVAL)
        if isinstance(node, File):
            files.set_append(node.fd, bool(flags & files.APPEND))
        node.flags = node.flags & ~settable | flags

    def fd_fdstat_set_rights(self, fd: int, rights: int, inheriting: int) -> None:
        node = self.table.get(fd)
        need(not (rights & ~node.rights or inheriting & ~node.inheriting), Errno.NOTCAPABLE)
        node.rights, node.inheriting = rights, inheriting

    def fd_filestat_get(self, fd: int, out: int) -> None:
        node = self.table.get(fd)
        if isinstance(node, (File, Directory)):
            self._write_stat(out, os.fstat(node.fd))
        else:
            self._memory.pack(out, "<QQB7xQQQQQ", 0, 0, node.kind, 1, 0, 0, 0, 0)

    def _write_stat(self, out: int, found: os.stat_result) -> None:
        self._memory.pack(
            out, "<QQB7xQQQQQ",
            found.st_dev, found.st_ino, files.kind_of(found.st_mode), found.st_nlink, found.st_size,
            found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns,
        )  # fmt: skip

    def fd_filestat_set_size(self, fd: int, size: int) -> None:
        file = self.table.file(fd, files.WRITE)
        with self._quota.resizing(file.fd, size):
            os.ftruncate(file.fd, size)

    def fd_filestat_set_times(self, fd: int, atime: int, mtime: int, which: int) -> None:
        node = self.table.on_disk(fd)
        need(node.writable, Errno.ROFS)
        os.utime(node.fd, ns=_times(atime, mtime, which)(os.fstat(node.fd)))

    def fd_prestat_get(self, fd: int, out: int) -> None:
        self._memory.pack(out, "<B3xI", 0, len(self._given_name(fd)))

    def fd_prestat_dir_name(self, fd: int, at: int, count: int) -> None:
        name = self._given_name(fd)
        need(count >= len(name), Errno.NAMETOOLONG)
        self._memory.write(at, name)

    def _given_name(self, fd: int) -> bytes:
        node = self.table.get(fd)
        if not isinstance(node, Directory) or node.name is None:
            raise Errno.BADF.error()
        return node.name

    def fd_readdir(self, fd: int, at: int, count: int, cookie: int, out: int) -> None:
        directory = self.table.directory(fd)
        self._memory.view(at, count)
        need(count <= LIST_BYTES_MAX, Errno.INVAL)  # fewer would mean that the directory ends there
        data = bytearray()
        for entry in directory.entries(cookie):
            data += struct.pack("<QQIB3x", entry.next, entry.inode, len(entry.name), entry.kind)
            data += entry.name
            if len(data) >= count:
                break
        used = min(len(data), count)
        self._memory.write(at, bytes(data[:used]))
        self._memory.pack(out, "<I", used)

    # --- paths ---

    def path_create_directory(self, fd: int, at: int, count: int) -> None:
        files.make_directory(self.table, self._writable(fd), self._path(at, count))

    def path_remove_directory(self, fd: int, at: int, count: int) -> None:
        files.remove_directory(self.table, self._writable(fd), self._path(at, count))

    def path_unlink_file(self, fd: int, at: int, count: int) -> None:
        files.unlink(self.table, self._writable(fd), self._path(at, count))

    def path_rename(self, fd: int, at: int, count: int, fd_new: int, at_new: int, new: int) -> None:
        old = self._writable(fd), self._path(at, count)
        files.rename(self.table, old, (self._writable(fd_new), self._path(at_new, new)))

    def path_link(
        self, fd: int, lookup: int, at: int, count: int, fd_new: int, at_new: int, new: int
    ) -> None:
        need(not lookup & _FOLLOW, Errno.INVAL)
        old = self._writable(fd), self._path(at, count)
        files.link(self.table, old, (self._writable(fd_new), self._path(at_new, new)))

    def path_symlink(self, target: int, target_count: int, fd: int, at: int, count: int) -> None:
        to = self._path(target, target_count)
        files.make_link(self.table, self._writable(fd), self._path(at, count), to)

    def path_readlink(
        self, fd: int, at: int, count: int, buffer: int, buffer_count: int, out: int
    ) -> None:
        target = files.read_link(self.table.directory(fd), self._path(at, count))[:buffer_count]
        self._memory.write(buffer, target)
        self._memory.pack(out, "<I", len(target))

    def path_filestat_get(self, fd: int, lookup: int, at: int, count: int, out: int) -> None:
        directory, path = self.table.directory(fd), self._path(at, count)
        follow = bool(lookup & _FOLLOW)
        self._write_stat(out, files.stat_of(directory, path, follow=follow))

    def path_filestat_set_times(
        self, fd: int, lookup: int, at: int, count: int, atime: int, mtime: int, which: int
    ) -> None:
        directory, path = self._writable(fd), self._path(at, count)
        times = _times(atime, mtime, which)
        files.set_times(directory, path, times, follow=bool(lookup & _FOLLOW))

    def path_open(
        self,
        fd: int, lookup: int, at: int, count: int, how: int,
        rights: int, inheriting: int, flags: int, out: int,
    ) -> None:  # fmt: skip
        directory, path = self.table.directory(fd), self._path(at, count)
        self._memory.view(out, 4)
        need(not flags & ~files.FLAGS, Errno.INVAL)
        number = files.open_path(
            self.table, directory, path,
            follow=bool(lookup & _FOLLOW), how=how, rights=rights, flags=flags,
        )  # fmt: skip
        self._memory.pack(out, "<I", number)

    def _writable(self, fd: int) -> Directory:
        return self.table.directory(fd, writing=True)

    def _path(self, at: int, count: int) -> bytes:
        need(count <= files.PATH_BYTES_MAX, Errno.NAMETOOLONG)
        path = self._memory.read(at, count)
        path.decode()  # raises what the guest is told
        need(path, Errno.NOENT)
        need(b"\0" not in path, Errno.INVAL)
        return path

    # --- waiting ---

    def poll_oneoff(self, subscriptions: int, events: int, count: int, out: int) -> Result:
        need(0 < count <= VECTORS_MAX, Errno.INVAL)
        raw = self._memory.read(subscriptions, _SUBSCRIPTION_BYTES * count)
        self._memory.view(events, _EVENT_BYTES * count)
        waiting = [self._subscription(*each) for each in _SUBSCRIPTION.iter_unpack(raw)]
        return partial(self._wait_for, waiting, events, out)

    def _subscription(
        self, user_data: int, kind: int, target: int, time_ns: int, precision_ns: int, flags: int
    ) -> _Waiting:
        if kind == _CLOCK:
            if flags & _ABSOLUTE:
                time_ns = max(0, time_ns - self._now(target))
            return _Waiting(user_data, kind, until_ns=time_ns + time.monotonic_ns())
        node = self.table.find(target)
        if node is None or kind > _CAN_WRITE:
            return _Waiting(user_data, kind, failed=Errno.BADF)
        if kind == _CAN_READ and isinstance(node, Input):
            return _Waiting(user_data, kind, pipe=node.pipe)
        ready = IO_BYTES_MAX  # a write may wait itself; a file is always ready
        if kind == _CAN_READ and isinstance(node, File):
            ready = max(0, os.fstat(node.fd).st_size - os.lseek(node.fd, 0, os.SEEK_CUR))
        return _Waiting(user_data, kind, bytes=ready)

    def _wait_for(self, waiting: list[_Waiting], events: int, out: int) -> Awaitable[None] | None:
        def tell() -> bool:
            found = [event for each in waiting if (event := each.event())]
            for place, event in enumerate(found):
                self._memory.pack(events + _EVENT_BYTES * place, "<QHB5xQH6x", *event)
            self._memory.pack(out, "<I", len(found))
            return bool(found)

        pipes = [each.pipe for each in waiting if each.pipe is not None]
        first_ns = min((each.until_ns for each in waiting if each.pipe is None), default=None)

        async def wait() -> None:
            while not tell():
                left_s = None if first_ns is None else max(0, first_ns - time.monotonic_ns()) / 1e9
                with anyio.move_on_after(left_s):
                    await (pipes[0].wait() if pipes else anyio.sleep_forever())

        return None if tell() else wait()

    # --- sockets: there are none ---

    def sock_accept(self, fd: int, *rest: int) -> None:
        self.table.get(fd)
        raise Errno.NOTSOCK.error()

    sock_recv = sock_send = sock_shutdown = sock_accept


_SUBSCRIPTION: Final = struct.Struct("<QB7xI4xQQH6x")


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A subscription: ready when its pipe is, or at a time of the monotonic clock."""

    user_data: int
    kind: int
    until_ns: int = 0
    pipe: Pipe | None = None
    bytes: int = 0
    failed: Errno = Errno.SUCCESS

    def event(self) -> tuple[int, int, int, int, int] | None:
        """User data, error, kind, bytes, flags; None before it is ready."""
        if self.pipe is None:
            ready, available, flags = self.until_ns <= time.monotonic_ns(), self.bytes, 0
        else:
            ready, available = self.pipe.ready, self.pipe.available
            flags = 0 if available else _HANGUP
        return (self.user_data, self.failed, self.kind, available, flags) if ready else None


def _times(atime: int, mtime: int, which: int) -> files.Times:
    both = _SET_ATIME | _ATIME_NOW, _SET_MTIME | _MTIME_NOW
    need(which < 16 and all(which & mask != mask for mask in both), Errno.INVAL)

    def times(found: os.stat_result) -> tuple[int, int]:
        now = time.time_ns()
        return (
            now if which & _ATIME_NOW else atime if which & _SET_ATIME else found.st_atime_ns,
            now if which & _MTIME_NOW else mtime if which & _SET_MTIME else found.st_mtime_ns,
        )

    return times


IMPORTS: Final = Imports(
    "wasi_snapshot_preview1",
    Wasi,
    {
        "args_get": "ii", "args_sizes_get": "ii", "environ_get": "ii", "environ_sizes_get": "ii",
        "clock_res_get": "ii", "clock_time_get": "iIi", "random_get": "ii", "sched_yield": "",
        "proc_exit": "i-", "proc_raise": "i",
        "fd_read": "iiii", "fd_write": "iiii", "fd_pread": "iiiIi", "fd_pwrite": "iiiIi",
        "fd_close": "i", "fd_renumber": "ii", "fd_seek": "iIii", "fd_tell": "ii",
        "fd_sync": "i", "fd_datasync": "i", "fd_advise": "iIIi", "fd_allocate": "iII",
        "fd_fdstat_get": "ii", "fd_fdstat_set_flags": "ii", "fd_fdstat_set_rights": "iII",
        "fd_filestat_get": "ii", "fd_filestat_set_size": "iI", "fd_filestat_set_times": "iIIi",
        "fd_prestat_get": "ii", "fd_prestat_dir_name": "iii", "fd_readdir": "iiiIi",
        "path_create_directory": "iii", "path_remove_directory": "iii", "path_unlink_file": "iii",
        "path_rename": "iiiiii", "path_link": "iiiiiii", "path_symlink": "iiiii",
        "path_readlink": "iiiiii", "path_filestat_get": "iiiii",
        "path_filestat_set_times": "iiiiIIi", "path_open": "iiiiiIIii",
        "poll_oneoff": "iiii",
        "sock_accept": "iii", "sock_recv": "iiiiii", "sock_send": "iiiii", "sock_shutdown": "ii",
    },
)  # fmt: skip
"""All of preview 1."""
