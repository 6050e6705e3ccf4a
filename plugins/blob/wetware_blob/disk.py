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
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from anyio.to_thread import run_sync

from wetware.base import writeback
from wetware.base.disk import remedy, write_all
from wetware.base.threads import to_its_end
from wetware.errors import InvalidArgument, OverlayError, WetwareError
from wetware_blob.format import car
from wetware_blob.format.build import Entry, FileTree, Profile, Root, directory, leaf, symlink
from wetware_blob.format.cid import BadBlock, Block, Cid
from wetware_blob.format.read import Get, Step, tree
from wetware_blob.names import check_link, name_bytes, shown
from wetware_blob.pieces import CHUNK_BYTES, batches, pieces

if TYPE_CHECKING:
    from wetware.rpc import ByteStream

SYNC_BYTES: Final = 64 << 20
"""Of what is got; then it is synced, and a retry starts there."""
SYNC_FILES: Final = 4096
"""Of a tree, beside SYNC_BYTES."""
_STEP_BYTES: Final = 4096
"""What a step counts for, beside its data."""
_NO_LINK: Final = os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | _NO_LINK
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


class DiskError(WetwareError):
    """A file here cannot be written."""

    code = "blob.disk"


async def run(function: Callable[..., T], *args: object) -> T:
    """Call what blocks in a thread.

    Who is cancelled waits for it all the same: it uses descriptors that are closed behind it.
    """
    return await to_its_end(run_sync(function, *args))


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


# --- reading --------------------------------------------------------------------------------------


def tree_bytes(path: Path) -> int:
    """About how many bytes the files below `path` have; raises OSError."""
    return sum(
        os.lstat(file, dir_fd=fd).st_size for _, _, files, fd in os.fwalk(path) for file in files
    )


def sections(blocks: Iterator[Block]) -> bytes:
    """The next blocks as a part of a CAR, of CHUNK_BYTES or a block more; b"" behind the last."""
    parts, size = [], 0
    for block in blocks:
        parts.append(car.section(block))
        size += len(parts[-1])
        if size >= CHUNK_BYTES:
            break
    return b"".join(parts)


def blocks_of(
    top: str, profile: Profile, inner: str = "", above: int | None = None
) -> Generator[Block, None, Root]:
    """The blocks of the directory `top`, names in the order of their bytes, its own block last.

    A file that changes meanwhile is what was read of it. Raises InvalidArgument for what cannot be
    read or is no file, directory or link; for a name that is not UTF-8; and for a link that may
    lead out of it.
    """
    with reading(f"{top}/{inner}" if inner else top):
        if above is None:
            fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            fd = os.open(os.path.basename(inner), _DIRECTORY, dir_fd=above)
        try:
            entries = []
            with os.scandir(fd) as found:
                there = sorted(found, key=lambda entry: os.fsencode(entry.name))
            for each in there:
                path = f"{inner}/{each.name}" if inner else each.name
                name_bytes(each.name, path)
                with reading(f"{top}/{path}"):
                    if each.is_dir(follow_symlinks=False):
                        root = yield from blocks_of(top, profile, path, fd)
                    elif each.is_symlink():
                        target = os.readlink(os.fsencode(each.name), dir_fd=fd)
                        check_link(path, target)
                        root, block = symlink(target, profile)
                        yield block
                    elif each.is_file(follow_symlinks=False):
                        root = yield from _file(each.name, fd, profile)
                    else:
                        raise InvalidArgument(
                            f"{shown(top)}/{shown(path)} is a device, a socket or a pipe: it has "
                            "no content",
                            hint="take it out of the directory",
                            code="invalid.special_file",
                        )
                entries.append(Entry(each.name, root.cid, root.tsize))
            root, blocks = directory(entries, profile)
            yield from blocks
            return root
        finally:
            os.close(fd)


def _file(name: str, above: int, profile: Profile) -> Generator[Block, None, Root]:
    # What was a file a moment ago may be a pipe by now, which must not keep us waiting.
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _NO_LINK, dir_fd=above)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "it is not a file any more")
        tree, size = FileTree(profile), profile.chunk_bytes
        chunk = file.read(size)
        while True:
            block = leaf(profile, chunk)
            yield block
            yield from tree.add(block.cid, len(chunk), len(block.data))
            if len(chunk) < size or not (chunk := file.read(size)):
                break
        root, blocks = tree.finish()
        yield from blocks
        return root


# --- writing --------------------------------------------------------------------------------------


class Part:
    """What is got: `content` in a directory of our own, until it is whole and gets its place.

    A retry goes on from what `state`, beside it, says to be on disk.

    Args:
        path: Its place.
        cid: What it is.
        directory: It is a directory.
        size: How many bytes it has; None: any number.
        force: Replace a file that is there.
        resume: Go on with what an earlier attempt has left.
        told: Is called when there are more bytes, with how many there are.

    Attributes:
        start: Files and links of a tree, or bytes of a file, that an earlier attempt has left.
    """

    def __init__(
        self,
        path: Path,
        cid: str,
        *,
        directory: bool,
        size: int | None = None,
        force: bool = False,
        resume: bool = True,
        told: Callable[[int], object] = lambda _: None,
    ) -> None:
        if path.name in ("", ".."):
            raise InvalidArgument(f"{shown(path)!r} names no file", hint="-o OUT")
        self.path, self._cid = path, Cid.parse(cid)
        self.part = path.with_name(f".{path.name[:40]}.{cid}.part")  # at most 255 bytes
        self._directory, self._size, self._force = directory, size, force
        self._resume, self._told = resume, told
        self.start = self._bytes = self._files = 0
        self._synced = 0, 0  # bytes and files of the state
        self._beside = self._fd = self._file = -1
        self._open: list[tuple[str, int]] = []  # directories: name, descriptor; the first is all

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Have the temporary name, and in the end the place.

        Nothing stays if the block is cancelled, or raises InvalidArgument or BadBlock for what has
        come; if it fails otherwise, what a retry can go on from. Raises DiskError: "blob.exists"
        where something is in the place, and `force` does not allow to replace it; "blob.busy" where
        another process gets the same.
        """
        try:
            await run(self._begin)
            self._told(self._bytes)
            yield
            await run(self._publish)
        except BaseException as exc:
            refused = isinstance(exc, asyncio.CancelledError | InvalidArgument | BadBlock)
            if refused or self._synced == (0, 0):
                await run(self._discard)
            elif isinstance(exc, OverlayError):
                exc.hint = "the same again: it goes on from what has come"
            raise
        finally:
            self._let_go()
            for fd in (self._fd, self._beside):
                if fd >= 0:
                    os.close(fd)

    async def write(self, stream: ByteStream) -> None:
        """Write the file, or the tree, that comes from `stream` behind `start`."""
        if self._directory:
            steps = tree(self._cid, blocks_from(stream), skip=self.start)
        else:
            steps = (("piece", "", data) async for data in pieces(stream))
        async for batch in batches(steps, CHUNK_BYTES, lambda step: _STEP_BYTES + len(step[2])):
            await run(self._do, batch)
            self._told(self._bytes)
        if self._size not in (None, self._bytes):
            raise DiskError(f"the node sent fewer bytes than {self._size}", hint="try again")

    # --- what blocks ---

    def _begin(self) -> None:
        with writing(self.path.parent):
            self._beside = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with writing(self.path):
            self._refuse_existing()
        with writing(self.part):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.part.name, 0o700, dir_fd=self._beside)
            self._claim(os.open(self.part.name, _DIRECTORY, dir_fd=self._beside))
            if not (self._resume and self._go_on()):
                self._begin_anew()

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
            free = os.path.samestat(now, found) and found.st_uid == os.geteuid()
        except (BlockingIOError, FileNotFoundError):
            free = False
        if not free:
            os.close(fd)
            raise DiskError(
                f"{shown(self.part)} is written by another process, or is not yours",
                hint="another name: -o OUT",
                code="blob.busy",
            )
        self._fd = fd

    def _go_on(self) -> bool:
        """Be where the state says, if there is one; it may have come with somebody's archive."""
        try:
            with open(os.open("state", os.O_RDONLY | _NO_LINK, dir_fd=self._fd), "rb") as file:
                state = json.load(file)
            files, size = int(state["files"]), int(state["bytes"])
            if files < 0:
                return False
            if self._directory:
                self._enter("content")
            else:
                self._file = os.open("content", os.O_WRONLY | _NO_LINK, dir_fd=self._fd)
                found = os.fstat(self._file)
                if found.st_size < size or found.st_nlink != 1:
                    return False
                os.ftruncate(self._file, os.lseek(self._file, size, os.SEEK_SET))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False
        self._bytes, self._files = self._synced = size, files
        self.start = files if self._directory else size
        return True

    def _begin_anew(self) -> None:
        self._let_go()
        for name in os.listdir(self._fd):
            if stat.S_ISDIR(os.lstat(name, dir_fd=self._fd).st_mode):
                shutil.rmtree(name, dir_fd=self._fd)
            else:
                os.unlink(name, dir_fd=self._fd)
        if self._directory:
            os.mkdir("content", dir_fd=self._fd)
            self._enter("content")
        else:
            self._file = os.open("content", _NEW, 0o666, dir_fd=self._fd)

    def _let_go(self) -> None:
        for fd in (*(fd for _, fd in self._open), self._file):
            if fd >= 0:
                os.close(fd)
        self._open, self._file = [], -1

    def _do(self, batch: list[Step]) -> None:
        for kind, name, data in batch:
            path = "/".join((*(name for name, _ in self._open[1:]), name))
            with writing(self.path / path):
                try:
                    self._lay(kind, name, data)
                except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:
                    raise InvalidArgument(
                        f"the name {shown(path)} is there twice, or is the same as another one on "
                        "this file system",
                        hint="ww blob export --car CID",
                        code="invalid.name",
                    ) from exc
            self._files += kind in ("file", "symlink")
            size, files = self._synced
            if self._bytes - size >= SYNC_BYTES or self._files - files >= SYNC_FILES:
                with writing(self.part):
                    self._checkpoint()
        if self._file >= 0:  # the disk begins with it while more comes, so that a sync is short
            writeback.begin(self._file)

    def _lay(self, kind: str, name: str, data: bytes) -> None:
        if kind == "piece" and data:
            self._bytes += len(data)
            if self._size is not None and self._bytes > self._size:
                raise DiskError(f"the node sent more bytes than {self._size}", hint="try again")
            write_all(self._file, data)
        elif kind == "piece":
            os.close(self._file)
            self._file = -1
        elif kind == "end":
            os.close(self._open.pop()[1])
        elif kind == "directory":
            with contextlib.suppress(*[FileExistsError] * bool(self.start)):
                os.mkdir(name, dir_fd=self._open[-1][1])
            self._enter(name)
        elif kind == "symlink":
            os.symlink(data, os.fsencode(name), dir_fd=self._above(name))
        else:
            self._file = os.open(name, _NEW, 0o666, dir_fd=self._above(name))

    def _above(self, name: str) -> int:
        """The innermost directory; what an earlier attempt left there gives way to `name`."""
        above = self._open[-1][1]
        if self.start:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=above)
        return above

    def _enter(self, name: str) -> None:
        above = self._open[-1][1] if self._open else self._fd
        self._open.append((name, os.open(name, _DIRECTORY, dir_fd=above)))

    def _checkpoint(self) -> None:
        """What is there is on disk, and the state says so; not within a file of a tree."""
        if self._directory and self._file >= 0:
            return
        self._sync()
        self._synced = self._bytes, self._files
        state = {"bytes": self._bytes, "files": self._files}
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_LINK
        with open(os.open("state.new", flags, 0o600, dir_fd=self._fd), "w") as file:
            json.dump(state, file)  # not synced: one that is torn begins anew
        os.rename("state.new", "state", src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def _publish(self) -> None:
        """It is whole: all on disk, and then in its place."""
        with writing(self.path):
            self._sync()
            self._refuse_existing()
            name = self.path.name
            os.rename("content", name, src_dir_fd=self._fd, dst_dir_fd=self._beside)
            os.fsync(self._beside)
        self._discard()

    def _sync(self) -> None:
        if not self._directory:
            os.fsync(self._file)
            return
        if _LIBC.syncfs(self._fd):  # one call, however many files
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _discard(self) -> None:
        """Remove it, if it was taken."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.part.name, dir_fd=self._beside)


def blocks_from(stream: ByteStream) -> Get:
    """The blocks of a CAR as they come: each that is asked for has to be the next one."""
    reader, come = car.Reader(), deque[Block]()

    async def get(cid: Cid) -> bytes:
        while not come:
            data = bytearray(CHUNK_BYTES)
            del data[await stream.receive_into(data) :]
            if not data:
                raise DiskError("the node sent a part of the directory", hint="try again")
            come.extend(await run(reader.feed, data))
        block = come.popleft()
        if block.cid != cid:
            raise BadBlock(f"the node sent block {block.cid} in the place of {cid}")
        return block.data

    return get
