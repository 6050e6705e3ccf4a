"""WASI 0.2's files for a Python guest: its types, for what wasm/files.py does.

Source: https://github.com/WebAssembly/WASI/tree/v0.2.9/wasip2/filesystem
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

from wetware_proc.python.component import Failed, Own, Variant
from wetware_proc.wasm import files
from wetware_proc.wasm.errno import Errno, WasiError, errno_of, need
from wetware_proc.wasm.files import Directory, Table

if TYPE_CHECKING:
    from wetware_proc.driver import Spec
    from wetware_proc.python.component import Function, PythonFiber

IO_BYTES_MAX: Final = 64 << 10  # that one call moves
_CODES: Final = {
    Errno.ACCES: "access",
    Errno.BADF: "bad-descriptor",
    Errno.BUSY: "busy",
    Errno.DQUOT: "quota",
    Errno.EXIST: "exist",
    Errno.FBIG: "file-too-large",
    Errno.ILSEQ: "illegal-byte-sequence",
    Errno.INVAL: "invalid",
    Errno.ISDIR: "is-directory",
    Errno.LOOP: "loop",
    Errno.MFILE: "insufficient-memory",  # there is none that is nearer
    Errno.MLINK: "too-many-links",
    Errno.NAMETOOLONG: "name-too-long",
    Errno.NOENT: "no-entry",
    Errno.NOSPC: "insufficient-space",
    Errno.NOTDIR: "not-directory",
    Errno.NOTEMPTY: "not-empty",
    Errno.PERM: "not-permitted",
    Errno.ROFS: "read-only",
    Errno.SPIPE: "invalid-seek",
    Errno.TXTBSY: "text-file-busy",
}
_TYPES: Final = {
    files.DIRECTORY: "directory",
    files.REGULAR: "regular-file",
    files.LINK: "symbolic-link",
    files.BLOCK_DEVICE: "block-device",
    files.CHARACTER_DEVICE: "character-device",
}
_HOW: Final = ("create", "directory", "exclusive", "truncate")  # the bits of preview 1
_FOLLOW: Final = "symlink-follow"


@dataclass(slots=True, kw_only=True, eq=False)
class _Names(files.Descriptor):
    """What a directory is read by."""

    listing: files.Listing
    entries: Iterator[files.Entry]

    def close(self) -> None:
        self.listing.close()


class Node:
    """A number of the guest's table, which is closed with its resource."""

    def __init__(self, table: Table, number: int) -> None:
        self._table, self.number = table, number

    def close(self) -> None:
        self._table.close(self.number)


class Reader:
    """A file from a place on, in the form of a `driver.Pipe`."""

    ready = True

    def __init__(self, world: Files, node: Node, at: int) -> None:
        self._world, self._node, self._at = world, node, at

    def take(self, bytes_max: int) -> bytes:
        try:
            data = self._world.get(self._node, bytes_max, self._at)
        except (OSError, WasiError):  # a damaged disk, or the guest has closed it: it ends there
            return b""
        self._at += len(data)
        return data

    async def wait(self) -> None: ...


class Writer:
    """A file from a place on; from its end on where that is None."""

    def __init__(self, world: Files, node: Node, at: int | None) -> None:
        self._world, self._node, self._at = world, node, at

    def write(self, data: bytes) -> Failed | None:
        try:
            at = self._world.put(self._node, data, self._at)
        except Exception as exc:
            return Failed(Own("error", _code(exc)))
        if self._at is not None:
            self._at = at
        return None


class Files:
    """The files of one guest; `tmp` opens its own directory, and gives a descriptor."""

    def __init__(self, fiber: PythonFiber, spec: Spec, tmp: Callable[[], int]) -> None:
        self._leave_loop = fiber.leave_loop
        self.table = Table(files.Quota(spec.limits.tmp_bytes, spec.limits.tmp_files))
        files.give(self.table, spec, tmp)

    def directories(self) -> list[tuple[Own, str]]:
        found = []
        for number in range(files.DESCRIPTORS_MAX):
            node = self.table.find(number)
            if isinstance(node, Directory) and node.name is not None:
                found.append((self._own(number), os.fsdecode(node.name)))
        return found

    def _own(self, number: int) -> Own:
        return Own("descriptor", Node(self.table, number))

    def _directory(self, node: Node, *, writing: bool = False) -> Directory:
        return self.table.directory(node.number, writing=writing)

    # --- a descriptor ---

    def get(self, node: Node, count: int, at: int) -> bytes:
        """Some bytes of a file."""
        file = self.table.file(node.number, files.READ)
        return os.pread(file.fd, min(count, IO_BYTES_MAX), at)

    def put(self, node: Node, data: bytes, at: int | None) -> int:
        """Write them all at a place, or to the end; returns the place behind them."""
        fd = self.table.file(node.number, files.WRITE).fd
        if at is None:
            at = os.fstat(fd).st_size
        if self.table.quota.bytes > files.LOOP_BYTES:
            self._leave_loop()
        with self.table.quota.resizing(fd, at + len(data)):
            while data:
                count = os.pwrite(fd, data, at)
                data, at = data[count:], at + count
        return at

    def read(self, node: Node, count: int, at: int) -> tuple[bytes, bool]:
        data = self.get(node, count, at)
        return data, not data and count > 0

    def write(self, node: Node, data: bytes, at: int) -> int:
        return self.put(node, data, at) - at

    def read_via_stream(self, node: Node, at: int) -> Own:
        self.table.file(node.number, files.READ)
        return Own("input-stream", Reader(self, node, at))

    def write_via_stream(self, node: Node, at: int) -> Own:
        self.table.file(node.number, files.WRITE)
        return Own("output-stream", Writer(self, node, at))

    def append_via_stream(self, node: Node) -> Own:
        self.table.file(node.number, files.WRITE)
        return Own("output-stream", Writer(self, node, None))

    def sync(self, node: Node, *_: object) -> None:
        """Does nothing: to be on disk is of no use to files that go with their guest."""
        self.table.on_disk(node.number)

    sync_data = advise = sync

    def get_flags(self, node: Node) -> set[str]:
        rights = self.table.get(node.number).rights
        named = (("read", files.READ | files.READDIR), ("write", files.WRITE))
        return {name for name, bits in named if rights & bits}

    def set_size(self, node: Node, size: int) -> None:
        fd = self.table.file(node.number, files.WRITE).fd
        with self.table.quota.resizing(fd, size):
            os.ftruncate(fd, size)

    def set_times(self, node: Node, *times: Variant) -> None:
        found = self.table.on_disk(node.number)
        need(found.writable, Errno.ROFS)
        os.utime(found.fd, ns=_times(times)(os.fstat(found.fd)))

    def stat(self, node: Node) -> Any:
        return _stat(os.fstat(self.table.on_disk(node.number).fd))

    def metadata_hash(self, node: Node) -> Any:
        return _hash(os.fstat(self.table.on_disk(node.number).fd))

    def read_directory(self, node: Node) -> Own:
        self.table.free()
        listing = files.Listing(self._directory(node).fd)
        names = _Names(kind=files.UNKNOWN, rights=0, listing=listing, entries=listing.entries(2))
        return Own("directory-entry-stream", Node(self.table, self.table.add(names)))

    def next_entry(self, node: Node) -> Any:
        names = self.table.get(node.number)
        assert isinstance(names, _Names)  # noqa: S101 - of its resource type
        if (entry := next(names.entries, None)) is None:
            return None
        return {"type": _TYPES.get(entry.kind, "unknown"), "name": entry.name.decode()}

    # --- below a directory ---

    def open_at(
        self, node: Node, follow: set[str], path: str, how: set[str], flags: set[str]
    ) -> Own:
        above = self._directory(node)
        rights = above.rights
        rights |= files.READ if "read" in flags else 0
        rights |= files.WRITE | files.ALLOCATE | files.TRUNCATE if "write" in flags else 0
        number = files.open_path(
            self.table, above, _path(path), follow=_FOLLOW in follow,
            how=sum(1 << bit for bit, name in enumerate(_HOW) if name in how),
            rights=rights, flags=0,
        )  # fmt: skip
        return self._own(number)

    def create_directory_at(self, node: Node, path: str) -> None:
        files.make_directory(self.table, self._directory(node, writing=True), _path(path))

    def remove_directory_at(self, node: Node, path: str) -> None:
        files.remove_directory(self.table, self._directory(node, writing=True), _path(path))

    def unlink_file_at(self, node: Node, path: str) -> None:
        files.unlink(self.table, self._directory(node, writing=True), _path(path))

    def rename_at(self, node: Node, path: str, to: Node, new: str) -> None:
        old = self._directory(node, writing=True), _path(path)
        files.rename(self.table, old, (self._directory(to, writing=True), _path(new)))

    def link_at(self, node: Node, follow: set[str], path: str, to: Node, new: str) -> None:
        need(_FOLLOW not in follow, Errno.INVAL)
        old = self._directory(node, writing=True), _path(path)
        files.link(self.table, old, (self._directory(to, writing=True), _path(new)))

    def symlink_at(self, node: Node, target: str, path: str) -> None:
        directory = self._directory(node, writing=True)
        files.make_link(self.table, directory, _path(path), _path(target))

    def readlink_at(self, node: Node, path: str) -> str:
        return files.read_link(self._directory(node), _path(path)).decode()

    def stat_at(self, node: Node, follow: set[str], path: str) -> Any:
        return _stat(self._found(node, follow, path))

    def metadata_hash_at(self, node: Node, follow: set[str], path: str) -> Any:
        return _hash(self._found(node, follow, path))

    def set_times_at(self, node: Node, follow: set[str], path: str, *times: Variant) -> None:
        directory = self._directory(node, writing=True)
        files.set_times(directory, _path(path), _times(times), follow=_FOLLOW in follow)

    def _found(self, node: Node, follow: set[str], path: str) -> os.stat_result:
        return files.stat_of(self._directory(node), _path(path), follow=_FOLLOW in follow)


def _path(text: str) -> bytes:
    path = text.encode()
    need(len(path) <= files.PATH_BYTES_MAX, Errno.NAMETOOLONG)
    need(path, Errno.NOENT)
    need(b"\0" not in path, Errno.INVAL)
    return path


def _times(given: tuple[Variant, ...]) -> files.Times:
    def ns(new: Variant, old: int) -> int:
        if new.tag == "timestamp":
            at: Any = new.payload
            return int(at.seconds * 10**9 + at.nanoseconds)
        return time.time_ns() if new.tag == "now" else old

    return lambda found: (ns(given[0], found.st_atime_ns), ns(given[1], found.st_mtime_ns))


def datetime(ns: int) -> dict[str, int]:
    seconds, nanoseconds = divmod(max(0, ns), 10**9)
    return {"seconds": seconds, "nanoseconds": nanoseconds}


def _stat(found: os.stat_result) -> dict[str, Any]:
    return {
        "type": _TYPES.get(files.kind_of(found.st_mode), "unknown"),
        "link-count": found.st_nlink,
        "size": found.st_size,
        "data-access-timestamp": datetime(found.st_atime_ns),
        "data-modification-timestamp": datetime(found.st_mtime_ns),
        "status-change-timestamp": datetime(found.st_ctime_ns),
    }


def _hash(found: os.stat_result) -> dict[str, int]:
    digest = hashlib.sha256(f"{found.st_dev} {found.st_ino}".encode()).digest()
    return {"lower": int.from_bytes(digest[:8]), "upper": int.from_bytes(digest[8:16])}


def _code(exc: Exception) -> str:
    """What a guest is told of an exception. Raises a defect again, which is not the guest's."""
    if (number := errno_of(exc)) is None:
        raise exc
    return _CODES.get(Errno(number), "io")


def _told(function: Callable[..., Any]) -> Function:
    @wraps(function)
    def told(world: Any, *args: Any) -> Any:
        try:
            return function(world.files, *args)
        except Exception as exc:
            return Failed(_code(exc))

    return told


_OF_DESCRIPTOR: Final = (
    "advise", "append_via_stream", "create_directory_at", "get_flags", "link_at",
    "metadata_hash", "metadata_hash_at", "open_at", "read",
    "read_directory", "read_via_stream", "readlink_at", "remove_directory_at", "rename_at",
    "set_size", "set_times", "set_times_at", "stat", "stat_at", "symlink_at", "sync", "sync_data",
    "unlink_file_at", "write", "write_via_stream",
)  # fmt: skip
OFFERED: Final[Mapping[str, Mapping[str, Function]]] = {
    "wasi:filesystem/preopens": {"get-directories": lambda world: world.files.directories()},
    "wasi:filesystem/types": {
        **{
            f"[method]descriptor.{name.replace('_', '-')}": _told(getattr(Files, name))
            for name in _OF_DESCRIPTOR
        },
        "[method]directory-entry-stream.read-directory-entry": _told(Files.next_entry),
    },
}
"""Interface → function."""
