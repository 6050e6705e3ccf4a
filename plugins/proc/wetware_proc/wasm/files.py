"""What a guest can reach of files: descriptors, and trees that no path leads out of.

Each path is opened by the kernel itself below its directory (openat2, RESOLVE_BENEATH; Linux 5.6),
whatever `..` or links say. Only regular files and directories are opened: a FIFO would hold the
loop up. What a guest adds is charged to its Quota.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wetware.base.threads import Threads, to_its_end
from wetware_proc.driver import DriverUnavailable
from wetware_proc.wasm.errno import Errno, need

if TYPE_CHECKING:
    from wetware_proc.driver import Spec

DESCRIPTORS_MAX: Final = 256  # open at a time, of one guest
PATH_BYTES_MAX: Final = 4096
SKIPPED_MAX: Final = 4096
"""Names of a directory that one call passes over, to where the guest wants to go on."""
LOOP_BYTES: Final = 8 << 20
"""Who has added more to files does not do it on the loop: to free them takes a while."""

# Kinds of files, as WASI numbers them.
UNKNOWN, BLOCK_DEVICE, CHARACTER_DEVICE, DIRECTORY, REGULAR, LINK = 0, 1, 2, 3, 4, 7

# Rights, as WASI numbers them.
DATASYNC, READ, WRITE, ALLOCATE = 1 << 0, 1 << 1, 1 << 6, 1 << 8
READDIR, TRUNCATE_PATH, STAT, TRUNCATE, POLL = 1 << 14, 1 << 19, 1 << 21, 1 << 22, 1 << 27
OF_FILE: Final = 0x8E001FF
OF_DIRECTORY: Final = 0x7BFFE18
_WRITING: Final = (
    WRITE | ALLOCATE | 7 << 9 | 1 << 12 | 3 << 16 | 3 << 19 | 3 << 22 | 7 << 24
)  # to make, link, rename, remove and truncate, and to set times
OF_READER: Final = ~_WRITING

# Flags of descriptors, as WASI numbers them.
APPEND, DSYNC, NONBLOCK, RSYNC, SYNC = 1, 2, 4, 8, 16
_CREATE, _OPEN_DIRECTORY, _EXCLUSIVE, _TRUNCATE = 1, 2, 4, 8  # how a path is opened
FLAGS: Final = APPEND | DSYNC | NONBLOCK | RSYNC | SYNC

_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPENAT2: Final = 437
_BENEATH: Final = 0x08 | 0x02  # RESOLVE_BENEATH, and no link of /proc
_RACES_MAX: Final = 8

_libc = ctypes.CDLL(None, use_errno=True)


def beneath(directory: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open a path below a directory; raises OSError: EXDEV where it leads out."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, _BENEATH)
    number = 0
    for _ in range(_RACES_MAX):  # EAGAIN: somebody renames a directory on the way
        fd: int = _libc.syscall(_OPENAT2, directory, path or b".", how, len(how))
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number != errno.EAGAIN:
            break
    raise OSError(number, os.strerror(number))


def check_kernel() -> None:
    root = os.open("/", _DIRECTORY_FLAGS)
    try:
        os.close(beneath(root, b".", os.O_PATH))
    except OSError as exc:
        raise DriverUnavailable(
            f"guests' paths cannot be confined here: openat2: {exc.strerror}",
            hint="Linux 5.6 or later has it",
        ) from exc
    finally:
        os.close(root)


_KINDS: Final = {
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFREG: REGULAR,
    stat.S_IFLNK: LINK,
    stat.S_IFCHR: CHARACTER_DEVICE,
    stat.S_IFBLK: BLOCK_DEVICE,
}


def kind_of(mode: int) -> int:
    """The kind of a file of this `st_mode`."""
    return _KINDS.get(stat.S_IFMT(mode), UNKNOWN)


# --- what a guest adds ---------------------------------------------------------------------------

_File = tuple[int, int]  # device, inode


class Quota:
    """Bytes and names that one guest may add to the directories in which it may write.

    A file counts from its first byte, holes included, until its last name and its last descriptor
    are gone.
    """

    def __init__(self, bytes_max: int, names_max: int) -> None:
        self._bytes_max, self._names_max = bytes_max, names_max
        self.bytes = self._names = 0
        self._added: dict[_File, int] = {}
        self._nameless: set[_File] = set()

    @contextlib.contextmanager
    def resizing(self, fd: int, end: int) -> Iterator[None]:
        """In the block a file becomes `end` bytes long, if it is not longer. Raises DQUOT."""
        before = os.fstat(fd)
        need(end < 1 << 63, Errno.INVAL)
        need(self.bytes + max(0, end - before.st_size) <= self._bytes_max, Errno.DQUOT)
        try:
            yield
        finally:
            self._charge(_file(before), os.fstat(fd).st_size - before.st_size)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """In the block a name is added. Raises DQUOT."""
        need(self._names < self._names_max, Errno.DQUOT)
        yield
        self._names += 1

    @contextlib.contextmanager
    def removing(self, directory: int, name: bytes, table: Table) -> Iterator[None]:
        """In the block a name is removed, or another file takes its place."""
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        yield
        self._names = max(0, self._names - 1)
        if found.st_nlink == 1 and not stat.S_ISDIR(found.st_mode):
            self._nameless.add(_file(found))
            self.closed(_file(found), table)

    def closed(self, file: _File, table: Table) -> None:
        """A descriptor of a file was closed: without a name it is gone with the last one."""
        if file in self._nameless and not table.has(file):
            self._nameless.discard(file)
            self.bytes -= self._added.pop(file, 0)

    def _charge(self, file: _File, growth: int) -> None:
        before = self._added.get(file, 0)
        added = max(0, before + growth)  # what was there before is not given back
        self.bytes += added - before
        if added:
            self._added[file] = added
        else:
            self._added.pop(file, None)


def _file(found: os.stat_result) -> _File:
    return found.st_dev, found.st_ino


# --- descriptors ---------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class Descriptor:
    """What a number of the guest stands for."""

    kind: int
    rights: int  # what may be done with it
    inheriting: int = 0  # what may be done with what is opened below it
    flags: int = 0  # those of WASI that are not the system's

    def close(self) -> None:
        pass


@dataclass(slots=True, kw_only=True, eq=False)
class File(Descriptor):
    """A regular file."""

    kind: int = REGULAR
    fd: int
    file: _File
    writable: bool

    def close(self) -> None:
        os.close(self.fd)


@dataclass(slots=True, kw_only=True, eq=False)
class Directory(Descriptor):
    """A directory; one that was given, rather than opened, has a name.

    `opened` is asked for its descriptor when the guest first uses it.
    """

    kind: int = DIRECTORY
    writable: bool
    opened: Callable[[], int]
    name: bytes | None = None
    _fd: int = -1
    _listing: Listing | None = None

    @property
    def fd(self) -> int:
        if self._fd < 0:
            self._fd = self.opened()
        return self._fd

    def entries(self, cookie: int) -> Iterator[Entry]:
        """Those from number `cookie` on; 0 starts afresh."""
        listing = self._listing
        if listing is None or cookie < listing.first or cookie == 0:
            if listing is not None:
                listing.close()
            listing = self._listing = Listing(self.fd)
        need(cookie <= listing.count + SKIPPED_MAX, Errno.INVAL)
        return listing.entries(cookie)

    def close(self) -> None:
        if self._listing is not None:
            self._listing.close()
        if self._fd >= 0:
            os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory; `next` is the number of the one behind it."""

    next: int
    name: bytes
    inode: int
    kind: int


class Listing:
    """The names of a directory, read as they are asked for; those given last are remembered.

    Attributes:
        count: That were read.
    """

    def __init__(self, directory: int) -> None:
        self._fd = os.open(".", _DIRECTORY_FLAGS, dir_fd=directory)
        try:
            self._scan = os.scandir(self._fd)
            inode = os.fstat(self._fd).st_ino
        except BaseException:
            os.close(self._fd)
            raise
        self.count = 2
        self._known = [Entry(1, b".", inode, DIRECTORY), Entry(2, b"..", inode, DIRECTORY)]

    @property
    def first(self) -> int:
        return self.count - len(self._known)

    def close(self) -> None:
        self._scan.close()
        os.close(self._fd)

    def entries(self, cookie: int) -> Iterator[Entry]:
        """Those from number `cookie` on, which is not below `first`."""
        self._known = [entry for entry in self._known if entry.next > cookie]
        yield from tuple(self._known)
        for found in self._scan:
            self.count += 1
            kind = (
                LINK if found.is_symlink()
                else DIRECTORY if found.is_dir(follow_symlinks=False)
                else REGULAR if found.is_file(follow_symlinks=False)
                else UNKNOWN
            )  # fmt: skip
            entry = Entry(self.count, os.fsencode(found.name), found.inode(), kind)
            if entry.next > cookie:
                self._known.append(entry)
                yield entry


class Table:
    """The descriptors of one guest, at most DESCRIPTORS_MAX."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self._nodes: dict[int, Descriptor] = {}

    def get(self, number: int, rights: int = 0) -> Descriptor:
        """Raises WasiError BADF where it is not open, or lacks a right."""
        node = self._nodes.get(number)
        if node is None or node.rights & rights != rights:
            raise Errno.BADF.error()
        return node

    def find(self, number: int) -> Descriptor | None:
        return self._nodes.get(number)

    def file(self, number: int, rights: int = 0) -> File:
        """Raises BADF for a directory as well, and SPIPE for what is no file at all."""
        node = self.get(number, rights)
        need(isinstance(node, (File, Directory)), Errno.SPIPE)
        if not isinstance(node, File):
            raise Errno.BADF.error()
        return node

    def on_disk(self, number: int) -> File | Directory:
        node = self.get(number)
        if not isinstance(node, (File, Directory)):
            raise Errno.SPIPE.error()
        return node

    def directory(self, number: int, *, writing: bool = False) -> Directory:
        node = self.get(number)
        if not isinstance(node, Directory):
            raise Errno.NOTDIR.error()
        need(node.writable or not writing, Errno.ROFS)
        return node

    def has(self, file: _File) -> bool:
        """Whether there is a descriptor of it."""
        return any(isinstance(node, File) and node.file == file for node in self._nodes.values())

    def free(self) -> int:
        """The lowest free number; raises MFILE."""
        for number in range(DESCRIPTORS_MAX):
            if number not in self._nodes:
                return number
        raise Errno.MFILE.error()

    def add(self, node: Descriptor) -> int:
        number = self.free()
        self._nodes[number] = node
        return number

    def close(self, number: int) -> None:
        self.get(number)
        self._gone(self._nodes.pop(number))

    def renumber(self, source: int, target: int) -> None:
        """`target`, which is open, becomes what `source` is; `source` is closed."""
        node, replaced = self.get(source), self.get(target)
        if source != target:
            self._nodes[target] = self._nodes.pop(source)
            assert node is not replaced  # noqa: S101 - each has one number
            self._gone(replaced)

    def close_all(self) -> None:
        nodes, self._nodes = self._nodes, {}
        for node in nodes.values():
            node.close()

    def _gone(self, node: Descriptor) -> None:
        node.close()
        if isinstance(node, File):
            self.quota.closed(node.file, self)


def given(name: bytes, writable: bool, opened: Callable[[], int]) -> Directory:
    """A directory that a guest has from its start, under a name."""
    mask = -1 if writable else OF_READER
    return Directory(
        rights=OF_DIRECTORY & mask,
        inheriting=OF_DIRECTORY | OF_FILE,  # so that who opens for writing is told that it cannot
        writable=writable,
        opened=opened,
        name=name,
    )


def give(table: Table, spec: Spec, tmp: Callable[[], int]) -> None:
    """What a guest has from its start: its directories, and a /tmp that `tmp` opens."""
    for name, (path, writable) in spec.dirs.items():
        table.add(given(os.fsencode(name), writable, opening(path)))
    if spec.limits.tmp_files:
        table.add(given(b"/tmp", True, tmp))


async def let_go(table: Table, threads: Threads) -> None:
    """The guest is gone."""
    if table.quota.bytes > LOOP_BYTES:  # the last descriptor of a file frees it
        await to_its_end(threads.run(table.close_all))
    else:
        table.close_all()


def opening(path: Path) -> Callable[[], int]:
    return lambda: os.open(path, _DIRECTORY_FLAGS)


def set_append(fd: int, append: bool) -> None:
    """Whether what is written to a file goes to its end."""
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | (os.O_APPEND if append else 0))


# --- paths ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def parent(directory: Directory, path: bytes) -> Iterator[tuple[int, bytes]]:
    """The directory that holds the last name of a path, and that name, which is not followed."""
    bare = path.rstrip(b"/")
    above, _, last = bare.rpartition(b"/")
    need(bare and not path.startswith(b"/") and last != b"..", Errno.PERM)
    need(last != b".", Errno.INVAL)
    fd = beneath(directory.fd, above, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd, last + path[len(bare) :]
    finally:
        os.close(fd)


def make_directory(table: Table, directory: Directory, path: bytes) -> None:
    with parent(directory, path) as (fd, name), table.quota.naming():
        os.mkdir(name, 0o755, dir_fd=fd)


def make_link(table: Table, directory: Directory, path: bytes, target: bytes) -> None:
    need(not target.startswith(b"/"), Errno.PERM)
    with parent(directory, path) as (fd, name), table.quota.naming():
        os.symlink(target, name, dir_fd=fd)


def link(table: Table, old: tuple[Directory, bytes], new: tuple[Directory, bytes]) -> None:
    """Another name for a file. Both directories are writable: the file can be written by either."""
    with parent(*old) as (fd, name), parent(*new) as (fd_new, name_new), table.quota.naming():
        os.link(name, name_new, src_dir_fd=fd, dst_dir_fd=fd_new, follow_symlinks=False)


def rename(table: Table, old: tuple[Directory, bytes], new: tuple[Directory, bytes]) -> None:
    with parent(*old) as (fd, name), parent(*new) as (fd_new, name_new):
        replaces: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(name_new, dir_fd=fd_new, follow_symlinks=False)
            if _file(there) != _file(os.stat(name, dir_fd=fd, follow_symlinks=False)):
                replaces = table.quota.removing(fd_new, name_new, table)
        with replaces:
            os.rename(name, name_new, src_dir_fd=fd, dst_dir_fd=fd_new)


def unlink(table: Table, directory: Directory, path: bytes) -> None:
    with parent(directory, path) as (fd, name), table.quota.removing(fd, name, table):
        os.unlink(name, dir_fd=fd)


def remove_directory(table: Table, directory: Directory, path: bytes) -> None:
    with parent(directory, path) as (fd, name), table.quota.removing(fd, name, table):
        os.rmdir(name, dir_fd=fd)


def read_link(directory: Directory, path: bytes) -> bytes:
    with parent(directory, path) as (fd, name):
        return os.readlink(name, dir_fd=fd)


@contextlib.contextmanager
def _looked_at(directory: Directory, path: bytes, follow: bool) -> Iterator[int]:
    fd = beneath(directory.fd, path, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
    try:
        yield fd
    finally:
        os.close(fd)


def stat_of(directory: Directory, path: bytes, *, follow: bool) -> os.stat_result:
    with _looked_at(directory, path, follow) as fd:
        return os.fstat(fd)


Times = Callable[[os.stat_result], tuple[int, int]]
"""What a file's times become, in ns since 1970: last read, last written."""


def set_times(directory: Directory, path: bytes, times: Times, *, follow: bool) -> None:
    with _looked_at(directory, path, follow) as fd:
        found = os.fstat(fd)
        if not stat.S_ISLNK(found.st_mode):
            os.utime(f"/proc/self/fd/{fd}", ns=times(found))
            return
        with parent(directory, path) as (above, name):
            os.utime(name, ns=times(found), dir_fd=above, follow_symlinks=False)


def open_path(
    table: Table, above: Directory, path: bytes, *, follow: bool, how: int, rights: int, flags: int
) -> int:
    """Returns the number of the new descriptor; `how`, `rights` and `flags` are WASI's."""
    create, directory, truncate = how & _CREATE, how & _OPEN_DIRECTORY, how & _TRUNCATE
    writes = rights & (WRITE | DATASYNC | ALLOCATE | TRUNCATE) or truncate
    need(above.writable or not (writes or create), Errno.ROFS)
    need(not truncate or above.rights & TRUNCATE_PATH, Errno.PERM)
    need(not (directory and (create or truncate)), Errno.INVAL)
    need(not (directory and rights & WRITE), Errno.ISDIR)
    table.free()
    # A FIFO is not waited for. Truncating comes once it is known what was opened.
    system = os.O_NONBLOCK | os.O_NOCTTY
    for wanted, bits in (
        (not follow, os.O_NOFOLLOW),
        (directory, os.O_DIRECTORY),
        (flags & APPEND, os.O_APPEND),
        (flags & DSYNC, os.O_DSYNC),
        (flags & (RSYNC | SYNC), os.O_SYNC),
        (writes and not directory, os.O_RDWR if rights & (READ | READDIR) else os.O_WRONLY),
    ):
        system |= bits if wanted else 0
    fd = _open_or_create(table.quota, above.fd, path, system, how)
    try:
        found = os.fstat(fd)
        kind = kind_of(found.st_mode)
        need(kind in (REGULAR, DIRECTORY), Errno.ACCES)  # no FIFO, device or socket
        if truncate and kind == REGULAR:
            with table.quota.resizing(fd, 0):
                os.ftruncate(fd, 0)
        mask = -1 if above.writable else OF_READER
        node: Descriptor
        if kind == REGULAR:
            node = File(
                rights=rights & OF_FILE & mask, flags=flags,
                fd=fd, file=_file(found), writable=above.writable,
            )  # fmt: skip
        else:
            rights = (rights or above.rights) & above.inheriting & OF_DIRECTORY & mask
            node = Directory(
                rights=rights | READDIR, inheriting=above.inheriting,
                writable=above.writable, opened=lambda: fd, _fd=fd,
            )  # fmt: skip
        return table.add(node)
    except BaseException:
        os.close(fd)
        raise


def _open_or_create(quota: Quota, above: int, path: bytes, flags: int, how: int) -> int:
    create, exclusive = how & _CREATE, how & _EXCLUSIVE
    if not (create and exclusive):
        try:
            return beneath(above, path, flags)
        except FileNotFoundError:
            if not create:
                raise
    with quota.naming():
        flags |= os.O_CREAT | (os.O_EXCL if exclusive else 0)
        return beneath(above, path, flags, 0o644)


# --- the guest's own directory -------------------------------------------------------------------


def remove_tree(path: Path) -> None:
    """Remove a directory of a guest, however deep it was made: nothing here recurses. Blocks."""
    top = os.open(path, _DIRECTORY_FLAGS | os.O_NOFOLLOW)
    prefix, count = secrets.token_hex(8), 0  # names that the guest could not take before
    try:
        while names := os.listdir(top):
            for name in names:
                try:
                    os.unlink(name, dir_fd=top)
                except IsADirectoryError:
                    inner = os.open(name, _DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=top)
                    try:
                        for below in os.listdir(inner):
                            count += 1
                            os.rename(below, f"{prefix}{count}", src_dir_fd=inner, dst_dir_fd=top)
                    finally:
                        os.close(inner)
                    os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(path)
