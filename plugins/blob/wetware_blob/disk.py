"""The files of a person: trees that are put are read from them, what is got is written to them.

What is got lies under a temporary name beside its place until it is whole and on disk. Every name
is used with the descriptor of its own directory and follows no link, so that nothing in a tree,
made earlier or by somebody else meanwhile, leads a later write out of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from anyio import EndOfStream
from anyio.abc import ByteReceiveStream
from anyio.to_thread import run_sync

from wetware.base.disk import remedy
from wetware.base.threads import to_its_end
from wetware.errors import InvalidArgument, WetwareError
from wetware_blob.records import Kind, Reader, Writer

CHUNK_BYTES: Final = 1 << 20
"""Of a file, read or written by one call in a thread."""
SYNC_BYTES: Final = 64 << 20
"""Bytes before a multiple of it are on disk before later ones are written: a retry starts there."""
SYNC_RECORDS: Final = 8192
"""Of a tree, beside SYNC_BYTES."""
_NO_LINK: Final = os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | _NO_LINK

T = TypeVar("T")
Told = Callable[[], None]
"""Is called when there are more bytes."""


class DiskError(WetwareError):
    """A file here cannot be written."""

    code = "blob.disk"


async def run(function: Callable[..., T], *args: object) -> T:
    """Call what blocks in a thread.

    Who is cancelled waits for it all the same: it uses descriptors that are closed behind it.
    """
    return await to_its_end(run_sync(function, *args))


def shown(path: str | os.PathLike[str]) -> str:
    """A path as a message has it: nothing in it can control a terminal."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system in the block are about reading `path`."""
    try:
        yield
    except OSError as exc:
        raise InvalidArgument(
            f"cannot read {shown(path)}: {exc.strerror}", code="invalid.unreadable"
        ) from exc


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system in the block are about writing `path`."""
    try:
        yield
    except OSError as exc:
        hint = remedy(exc) or "write it elsewhere: -o OUT"
        raise DiskError(f"cannot write {shown(path)}: {exc.strerror}", hint=hint) from exc


def stays_within(target: bytes, depth: int) -> bool:
    """Whether a link leads into its own tree, from a directory that is `depth` below its top.

    It has to go up before it goes down: behind a name that is a link itself `..` may be anywhere.
    """
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    up = 0
    while up < len(parts) and parts[up] == b"..":
        up += 1
    return not target.startswith(b"/") and up <= depth and b".." not in parts[up:]


def check_link(path: str, target: bytes, depth: int, hint: str) -> None:
    if not stays_within(target, depth):
        raise InvalidArgument(
            f"{shown(path)} is a symbolic link to {shown(os.fsdecode(target))}, which may lead out "
            "of its directory tree",
            hint=hint,
            code="invalid.link",
        )


# --- pipes ---------------------------------------------------------------------------------------


async def in_daemon(function: Callable[..., T], *args: object) -> T:
    """Call what may block for ever, in a thread that does not keep the process from its end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(settled: Callable[[Any], None], value: object) -> None:
        if not done.done():
            settled(value)

    def call() -> None:
        settled: Callable[[Any], None]
        value: object
        try:
            settled, value = done.set_result, function(*args)
        except OSError as exc:
            settled, value = done.set_exception, exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, settled, value)

    threading.Thread(target=call, name="pipe", daemon=True).start()
    return await done


class Pipe(ByteReceiveStream):
    """What comes from a descriptor that may be a pipe or a terminal. It is not closed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    async def receive(self, max_bytes: int = 65536) -> bytes:
        with reading("standard input" if self._fd == 0 else f"/dev/fd/{self._fd}"):
            data = await in_daemon(os.read, self._fd, max_bytes)
        if not data:
            raise EndOfStream
        return data

    async def aclose(self) -> None: ...


# --- reading --------------------------------------------------------------------------------------


def tree_bytes(path: Path) -> int:
    """About how many bytes the files below `path` have; raises OSError."""
    return sum(
        os.lstat(file, dir_fd=fd).st_size for _, _, files, fd in os.fwalk(path) for file in files
    )


async def read_tree(path: Path, writer: Writer) -> None:
    """Write the directory `path` as records, names in the order of their bytes.

    A file that changes meanwhile is what was read of it. Raises InvalidArgument for what cannot be
    read or is no file, directory or link; for a name that is not UTF-8; and for a link that
    `Part` would refuse to write.
    """
    fds: list[int] = []  # directories that are open, and a file
    try:
        await _read_directory(fds, str(path), "", writer)
    finally:
        for fd in fds:
            os.close(fd)


async def _read_directory(fds: list[int], path: str, name: str, writer: Writer) -> None:
    with reading(path):
        entries = await run(_enter, fds, path, name)
    await writer.directory(name)
    for below, kind in entries:
        inner = f"{path}/{below}"
        if kind == "directory":
            await _read_directory(fds, inner, below, writer)
        elif kind == "symlink":
            with reading(inner):
                target = await run(_target, fds, below)
            check_link(inner, target, writer.depth - 1, "tar c DIR | ww blob put -")
            await writer.link(below, target)
        else:
            await _read_file(fds, inner, below, writer)
    await writer.end()
    os.close(fds.pop())


def _enter(fds: list[int], path: str, name: str) -> list[tuple[str, Kind]]:
    """Open a directory; returns what is in it, names and kinds."""
    if fds:
        fds.append(os.open(name, _DIRECTORY, dir_fd=fds[-1]))
    else:
        fds.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    found: list[tuple[bytes, str, Kind]] = []
    with os.scandir(fds[-1]) as entries:
        for entry in entries:
            inner = f"{path}/{entry.name}"
            kind: Kind
            if entry.is_symlink():
                kind = "symlink"
            elif entry.is_dir(follow_symlinks=False):
                kind = "directory"
            elif entry.is_file(follow_symlinks=False):
                kind = "file"
            else:
                raise InvalidArgument(
                    f"{shown(inner)} is a device, a socket or a pipe: it has no content",
                    hint="take it out of the directory",
                    code="invalid.special_file",
                )
            try:
                key = entry.name.encode()
            except UnicodeEncodeError:
                raise InvalidArgument(
                    f"the name of {shown(inner)} is not UTF-8",
                    hint="rename it, or pack the directory: tar c DIR | ww blob put -",
                    code="invalid.name",
                ) from None
            found.append((key, entry.name, kind))
    return [(name, kind) for _, name, kind in sorted(found)]


def _target(fds: list[int], name: str) -> bytes:
    return os.readlink(os.fsencode(name), dir_fd=fds[-1])


async def _read_file(fds: list[int], path: str, name: str, writer: Writer) -> None:
    with reading(path):
        data = await run(_open_file, fds, name)
    await writer.file(name)
    while data:
        await writer.piece(data)
        with reading(path):
            # A short one was the last: most files take one call in a thread.
            data = await run(os.read, fds[-1], CHUNK_BYTES) if len(data) == CHUNK_BYTES else b""
    await writer.piece(b"")
    os.close(fds.pop())


def _open_file(fds: list[int], name: str) -> bytes:
    """Its first bytes."""
    # What was a file a moment ago may be a pipe by now, which must not keep us waiting.
    fds.append(os.open(name, os.O_RDONLY | os.O_NONBLOCK | _NO_LINK, dir_fd=fds[-1]))
    if not stat.S_ISREG(os.fstat(fds[-1]).st_mode):
        raise OSError(0, "it is not a file any more")
    return os.read(fds[-1], CHUNK_BYTES)


# --- writing --------------------------------------------------------------------------------------


class Part:
    """What is got, under its temporary name until it is whole; close it whatever happens.

    `open`, `publish`, `discard` and `close` block.

    Args:
        path: Its place.
        cid: What it is.
        directory: It is a directory.
        force: Replace a file that is there.
        resume: Go on with what an earlier attempt has left.

    Attributes:
        start: Bytes of a file, or records of a tree, that are on disk from an earlier attempt.
        bytes: Of what is there.
        depth: Of a tree: directories that are open.
    """

    def __init__(
        self, path: Path, cid: str, *, directory: bool, force: bool = False, resume: bool = True
    ) -> None:
        if path.name in ("", ".."):
            raise InvalidArgument(f"{shown(path)!r} names no file", hint="-o OUT")
        if not (cid.isascii() and cid.isalnum() and len(cid) <= 128):
            raise InvalidArgument(f"{cid[:128]!r} is no CID", code="invalid.cid")
        self.path = path
        self.part = path.with_name(f".{path.name[:40]}.{cid}.part")  # at most 255 bytes
        self._directory, self._force, self._resume = directory, force, resume
        self.start = self.bytes = self._synced = 0
        self._beside = self._fd = self._file = -1
        self._open: list[tuple[str, int]] = []  # directories: name, descriptor

    @property
    def depth(self) -> int:
        return len(self._open)

    def open(self) -> None:
        """Take the temporary name.

        Raises DiskError: "blob.exists" where something is in the place, and `force` does not allow
        to replace it; "blob.busy" where another process gets the same.
        """
        with writing(self.path.parent):
            self._beside = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._refuse_existing()
        with writing(self.part):
            (self._begin_directory if self._directory else self._begin_file)()

    def close(self) -> None:
        """Let go of all descriptors. Idempotent."""
        for fd in (*(fd for _, fd in self._open), self._file, self._fd, self._beside):
            if fd >= 0:
                os.close(fd)
        self._open, self._file, self._fd, self._beside = [], -1, -1, -1

    def discard(self) -> None:
        """Remove it, if it was taken."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if self._directory:
                    shutil.rmtree(self.part.name, dir_fd=self._beside)
                else:
                    os.unlink(self.part.name, dir_fd=self._beside)

    @property
    def resumable(self) -> bool:
        """Whether a retry would find something to go on from."""
        return self._fd >= 0 and (self._synced > 0 or self.bytes > SYNC_BYTES)

    def publish(self) -> None:
        """It is whole: all on disk, and then in its place."""
        with writing(self.path):
            (_sync_all if self._directory else os.fsync)(self._fd)
            self._refuse_existing()
            name, above = self.part.name, self._beside
            if self._directory:
                name, above = "tree", self._fd
            os.rename(name, self.path.name, src_dir_fd=above, dst_dir_fd=self._beside)
            os.fsync(self._beside)
        if self._directory:
            self.discard()

    def _refuse_existing(self) -> None:
        try:
            mode = os.lstat(self.path.name, dir_fd=self._beside).st_mode
        except FileNotFoundError:
            return
        replaceable = not self._directory and not stat.S_ISDIR(mode)
        if not (replaceable and self._force):
            raise DiskError(
                f"{shown(self.path)} exists",
                hint="another name: -o OUT" + replaceable * ", or --force to replace it",
                code="blob.exists",
            )

    def _claim(self, fd: int) -> None:
        """Be the only process that writes it, and take nothing that another user has laid here."""
        found = os.fstat(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            now = os.lstat(self.part.name, dir_fd=self._beside)
            free = (now.st_dev, now.st_ino) == (found.st_dev, found.st_ino)
        except (BlockingIOError, FileNotFoundError):
            free = False
        mine = found.st_uid == os.geteuid() and stat.S_IFMT(found.st_mode) == (
            stat.S_IFDIR if self._directory else stat.S_IFREG
        )
        if not (free and mine):
            os.close(fd)
            raise DiskError(
                f"{shown(self.part)} is written by another process, or is not yours",
                hint="another name: -o OUT",
                code="blob.busy",
            )
        self._fd = fd

    # --- a file ---

    def _begin_file(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | _NO_LINK
        self._claim(os.open(self.part.name, flags, 0o666, dir_fd=self._beside))
        size = os.fstat(self._fd).st_size
        if self._resume and size:  # what is behind the last multiple may not be on disk
            self.start = self.bytes = (size - 1) // SYNC_BYTES * SYNC_BYTES
        os.ftruncate(self._fd, self.start)
        os.lseek(self._fd, self.start, os.SEEK_SET)

    async def write_file(self, stream: ByteReceiveStream, size: int | None, told: Told) -> None:
        """Write what comes from `stream` behind `start`; `size` bytes in all, None: any number."""
        async for data in chunks(stream):
            if size is not None and self.bytes + len(data) > size:
                break
            with writing(self.part):
                await run(self._append, data)
            told()
        else:
            if size in (None, self.bytes):
                return
        raise DiskError(f"the node sent another number of bytes than {size}", hint="try again")

    def _append(self, data: bytes) -> None:
        end = self.bytes + len(data)
        first = end // SYNC_BYTES * SYNC_BYTES - self.bytes
        if first > 0:
            write_all(self._fd, data[:first])
            os.fdatasync(self._fd)
            data = data[first:]
        write_all(self._fd, data)
        self.bytes = end

    # --- a tree: `tree` and `state` in a directory of our own ---

    def _begin_directory(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.part.name, 0o700, dir_fd=self._beside)
        self._claim(os.open(self.part.name, _DIRECTORY, dir_fd=self._beside))
        if self._resume:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                self._go_on()
        if not self.start:
            for _, fd in self._open:
                os.close(fd)
            self._open = []
            for name in os.listdir(self._fd):
                if name == "tree":
                    shutil.rmtree(name, dir_fd=self._fd)
                else:
                    os.unlink(name, dir_fd=self._fd)

    def _go_on(self) -> None:
        """Open the directories that were open when the state was written."""
        with open(os.open("state", os.O_RDONLY | _NO_LINK, dir_fd=self._fd), "rb") as file:
            state = json.load(file)
        above = self._fd
        for name in ("", *state["open"]):
            above = os.open(name or "tree", _DIRECTORY, dir_fd=above)
            self._open.append((name, above))
        self.start, self.bytes = int(state["records"]), int(state["bytes"])
        self._synced = self.start

    async def write_tree(self, stream: ByteReceiveStream, told: Told) -> None:
        """Write what comes from `stream` behind the first `start` records of a tree."""
        reader, records, due = Reader(stream, depth=self.depth), self.start, self.bytes
        due += SYNC_BYTES
        while (record := await reader.record()) is not None:
            records += 1
            path = "/".join((*(name for name, _ in self._open), record.name))
            if record.kind == "end":
                os.close(self._open.pop()[1])
            elif record.kind == "directory":
                await self._make(path, self._enter, record.name)
            elif not self._open:
                raise DiskError("the node sent a file in the place of a directory")
            elif record.kind == "symlink":
                target = await reader.target()
                check_link(path, target, self.depth - 1, "ww blob export --car CID")
                await self._make(path, self._link, record.name, target)
            else:
                async for data in _joined(reader.piece):
                    await self._make(path, self._write, record.name, data)
                    told()
                if self._file < 0:
                    await self._make(path, self._write, record.name, b"")
                os.close(self._file)
                self._file = -1
            if self._open and (self.bytes >= due or records - self._synced >= SYNC_RECORDS):
                with writing(self.part):
                    await run(self._checkpoint, records)
                due = self.bytes + SYNC_BYTES

    async def _make(self, path: str, step: Callable[..., None], *args: object) -> None:
        with writing(self.path / path.lstrip("/")):
            try:
                await run(step, *args)
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:
                raise InvalidArgument(
                    f"the name {shown(path)} is there twice, or is the same as another one on this "
                    "file system",
                    hint="ww blob export --car CID",
                    code="invalid.name",
                ) from exc

    def _above(self, name: str) -> int:
        """The innermost directory; what an earlier attempt left there gives way to `name`."""
        above = self._open[-1][1]
        if self.start:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=above)
        return above

    def _enter(self, name: str) -> None:
        above, below = (self._open[-1][1], name) if self._open else (self._fd, "tree")
        try:
            os.mkdir(below, dir_fd=above)
        except FileExistsError:
            if not self.start:
                raise
        self._open.append((name, os.open(below, _DIRECTORY, dir_fd=above)))

    def _link(self, name: str, target: bytes) -> None:
        os.symlink(target, os.fsencode(name), dir_fd=self._above(name))

    def _write(self, name: str, data: bytes) -> None:
        if self._file < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK
            self._file = os.open(name, flags, 0o666, dir_fd=self._above(name))
        write_all(self._file, data)
        self.bytes += len(data)

    def _checkpoint(self, records: int) -> None:
        _sync_all(self._fd)
        names = [name for name, _ in self._open[1:]]
        state = json.dumps({"records": records, "bytes": self.bytes, "open": names})
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_LINK
        with open(os.open("state.new", flags, 0o600, dir_fd=self._fd), "w") as file:
            file.write(state)
            file.flush()
            os.fsync(file.fileno())
        os.rename("state.new", "state", src_dir_fd=self._fd, dst_dir_fd=self._fd)
        self._synced = records


async def chunks(stream: ByteReceiveStream) -> AsyncIterator[bytes]:
    """What comes from a stream, as `_joined`."""

    async def some() -> bytes:
        try:
            return await stream.receive(CHUNK_BYTES)
        except EndOfStream:
            return b""

    async for data in _joined(some):
        yield data


async def _joined(more: Callable[[], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    """What comes until b"", in pieces of about CHUNK_BYTES: a call in a thread costs some time."""
    parts, size = [], 0
    while data := await more():
        parts.append(data)
        size += len(data)
        if size >= CHUNK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    if parts:
        yield b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_all(fd: int) -> None:
    """What was written to the file system of `fd` is on disk: one call, however many files."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
