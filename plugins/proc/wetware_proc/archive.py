"""A directory as a tar archive, and back: packed by who has it, unpacked by a node.

An archive has regular files, directories, each before what is in it, and symbolic links that stay
within. All else is refused: other links, devices, pipes, sparse files, names that are absolute,
have `..` or are there twice, and what is truncated. Files become read-only.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, NoReturn

from wetware.base.disk import remedy
from wetware.errors import InvalidArgument, LimitExceeded

ARCHIVE_BYTES_MAX: Final = 512 << 20
ENTRIES_MAX: Final = 50_000
DEPTH_MAX: Final = 128
NAME_BYTES_MAX: Final = 255
PATH_BYTES_MAX: Final = 2048
BLOCK_BYTES: Final = 4096
"""What an entry counts for, beside its content, which counts in whole blocks."""
_PIECE_BYTES: Final = 1 << 20
_HEADER_BYTES_MAX: Final = 64 << 10
_PLAIN: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class ArchiveRefused(InvalidArgument):
    """What was given is no archive of a directory that would be unpacked."""

    code = "invalid.archive"


# --- packing --------------------------------------------------------------------------------------


def pack(root: Path, file: IO[bytes]) -> None:
    """Write all below `root`, by their names: the same tree is the same archive.

    Raises InvalidArgument for what cannot be read or unpacked, LimitExceeded.
    """
    count = 0
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for above, directories, files in os.walk(root, onerror=_unreadable):
            directories.sort()
            for each in sorted(directories + files):
                path, count = Path(above, each), count + 1
                name = path.relative_to(root).as_posix()
                _check_name(name)
                try:
                    _add(tar, path, name)
                except OSError as exc:
                    _unreadable(exc, path)
                if count > ENTRIES_MAX or file.tell() > ARCHIVE_BYTES_MAX:
                    raise LimitExceeded(
                        f"{root} has more than {ENTRIES_MAX} files, or {ARCHIVE_BYTES_MAX} bytes "
                        "(archive.ENTRIES_MAX, ARCHIVE_BYTES_MAX)"
                    )


def _unreadable(exc: OSError, path: Path | None = None) -> NoReturn:
    what = f"cannot read {path or exc.filename}: {exc.strerror or exc}"
    raise InvalidArgument(what, code="invalid.unreadable") from exc


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    found, info = os.lstat(path), tarfile.TarInfo(name)
    if stat.S_ISLNK(found.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        _check_link(name, info.linkname)
        tar.addfile(info)
    elif stat.S_ISDIR(found.st_mode):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)
    elif stat.S_ISREG(found.st_mode):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as content:
            found = os.fstat(fd)
            info.size, info.mode = found.st_size, 0o755 if found.st_mode & 0o100 else 0o644
            tar.addfile(info, content)  # one that grows is what it was
    else:
        raise InvalidArgument(
            f"{path} is a device, a socket or a pipe: it has no content",
            hint="take it out of the directory",
            code="invalid.special_file",
        )


# --- unpacking ------------------------------------------------------------------------------------


class _Guarded:
    """The file as `tarfile` reads it, which believes any length and keeps all that a header has.

    Attributes:
        left: Bytes that may be read until it is set again.
    """

    left = 0

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        self.left -= count
        if not 0 <= self.left <= _HEADER_BYTES_MAX:
            raise ArchiveRefused(f"one of its headers has more than {_HEADER_BYTES_MAX} bytes")
        return self._file.read(count)


def measure(file: IO[bytes]) -> int:
    """What an archive will count for, once it is unpacked. Raises ArchiveRefused."""
    with _refusing():
        return BLOCK_BYTES + sum(charge for _, _, charge in _members(file))


def unpacked_bytes(directory: Path) -> int:
    """The same, of a directory in which it is."""
    found = (os.lstat(path) for path in directory.rglob("*"))
    return BLOCK_BYTES + sum(_charge(s.st_size if stat.S_ISREG(s.st_mode) else 0) for s in found)


def _charge(size: int) -> int:
    return BLOCK_BYTES + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def unpack(file: IO[bytes], directory: Path) -> None:
    """Make what is in an archive, in a new directory of nobody else's.

    Raises ArchiveRefused, and LimitExceeded where the disk has no room; then some of it is there.
    """
    links: list[tuple[str, str]] = []
    with _refusing():
        directory.chmod(0o755)  # for a program that runs as another user, whatever the node's umask
        for member, name, _ in _members(file):
            if member.isdir():
                (directory / name).mkdir()
                (directory / name).chmod(0o755)
            elif member.issym():
                links.append((name, member.linkname))
            else:
                _copy(file, member, directory / name)
        for name, target in links:  # now that nothing more is written through them
            os.symlink(target, directory / name)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except ArchiveRefused:
        raise
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as exc:
        raise ArchiveRefused(
            f"the name {exc.filename!r} is there twice, or before its directory"
        ) from exc
    except OSError as exc:
        raise LimitExceeded(
            f"it cannot be unpacked: {exc.strerror or exc}", hint=remedy(exc) or "try again"
        ) from exc
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError) as exc:
        raise ArchiveRefused(f"this is no tar archive: {exc}") from exc


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, str, int]]:
    """Each that may be unpacked, its name, and what it counts for."""
    file.seek(0)
    charged = entries = 0
    guarded = _Guarded(file)
    guarded.left = _HEADER_BYTES_MAX
    with tarfile.open(fileobj=guarded, mode="r:") as tar:  # type: ignore[call-overload]  # as it reads
        before = -1
        while (member := tar.next()) is not None:
            if tar.offset <= before or member.size < 0:
                raise ArchiveRefused("it leads back to its own beginning")
            before = tar.offset
            tar.members, guarded.left = [], _HEADER_BYTES_MAX  # it would keep all of them
            charge = _charge(member.size)
            charged, entries = charged + charge, entries + 1
            if entries > ENTRIES_MAX or charged > ENTRIES_MAX * BLOCK_BYTES + ARCHIVE_BYTES_MAX:
                raise ArchiveRefused(f"it has more than {ENTRIES_MAX} entries, or is too large")
            name = member.name.removeprefix("./")
            if name in ("", ".") and member.isdir():
                continue
            _check_name(name)
            if member.issym():
                _check_link(name, member.linkname)
            elif member.sparse or member.type not in _PLAIN:
                raise ArchiveRefused(
                    f"{name!r} is neither a plain file nor a directory nor a symbolic link"
                )
            yield member, name, charge
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ArchiveRefused("it is truncated, or damaged")


def _copy(file: IO[bytes], member: tarfile.TarInfo, path: Path) -> None:
    mode = 0o555 if member.mode & 0o100 else 0o444
    with open(os.open(path, _NEW, mode), "wb", buffering=0) as out:
        os.fchmod(out.fileno(), mode)
        file.seek(member.offset_data)
        left = member.size
        while left:
            if not (data := file.read(min(left, _PIECE_BYTES))):
                raise ArchiveRefused("it is truncated")
            out.write(data)
            left -= len(data)


def _check_name(name: str) -> None:
    """Raise ArchiveRefused for a path that does not lead down from a root."""
    parts = name.split("/")
    if (
        len(parts) > DEPTH_MAX
        or len(os.fsencode(name)) > PATH_BYTES_MAX
        or any(part in ("", ".", "..") or "\0" in part for part in parts)
        or any(len(os.fsencode(part)) > NAME_BYTES_MAX for part in parts)
    ):
        raise ArchiveRefused(f"{name[:200]!r} is no name in a directory")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ArchiveRefused(f"{name[:200]!r} is not UTF-8") from None


def _check_link(name: str, target: str) -> None:
    """Raise ArchiveRefused unless a link stays within, whatever other links are on its way.

    It goes up first, no further than to the root, and then down alone: `..` behind a name may mean
    another directory than it says.
    """
    parts = target.split("/")
    up = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
    down = [part for part in parts[up:] if part != "."]
    depth = name.count("/")
    if up > depth or ".." in down or not target or target.startswith("/") or "\0" in target:
        raise ArchiveRefused(
            f"the symbolic link {name[:200]!r} to {target[:200]!r} may lead out of the directory"
        )
