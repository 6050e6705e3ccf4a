"""Which names and links the trees of files have, for all who read, write or build them."""

from __future__ import annotations

import os
from typing import Final

from wetware.errors import InvalidArgument

NAME_BYTES_MAX: Final = 255
"""As the file systems of Linux."""
DEPTH_MAX: Final = 256
"""Directories within each other: who writes them to a disk holds a descriptor of each."""
TARGET_BYTES_MAX: Final = 4095
"""Of a symbolic link: PATH_MAX of Linux, which counts a zero at the end."""
_ARCHIVE: Final = "pack it: tar c DIR | ww blob put -, ww blob export --car CID"


def shown(path: str | os.PathLike[str]) -> str:
    """A path or name in one line of a message: nothing in it can control a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in os.fspath(path))


def name_bytes(name: str, path: str = "") -> bytes:
    """The name of a file in one directory in UTF-8; raises InvalidArgument "invalid.name".

    `path` is where it is, from the top of its tree.
    """
    try:
        data = name.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(
            f"the name of {shown(path or name)} is not UTF-8",
            hint=f"rename it, or {_ARCHIVE}",
            code="invalid.name",
        ) from None
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(data) > NAME_BYTES_MAX:
        raise InvalidArgument(
            f"{name[:NAME_BYTES_MAX]!r} cannot be the name of a file",
            hint="read what is beside it by its path: ww blob ls CID, ww blob get CID/PATH",
            code="invalid.name",
        )
    if path.count("/") >= DEPTH_MAX:
        raise InvalidArgument(
            f"more than {DEPTH_MAX} directories are within each other",
            hint="put what is below as a tree of its own",
            code="invalid.name",
        )
    return data


def check_target(target: bytes) -> None:
    """Refuse what no symbolic link leads to: InvalidArgument "invalid.link"."""
    if not 0 < len(target) <= TARGET_BYTES_MAX or b"\0" in target:
        raise InvalidArgument(
            f"a symbolic link leads to 1 to {TARGET_BYTES_MAX} bytes without a NUL",
            code="invalid.link",
        )


def stays_within(target: bytes, depth: int) -> bool:
    """Whether a link leads into its own tree, from a directory that is `depth` below its top.

    It has to go up before it goes down: behind a name that is a link itself `..` may be anywhere.
    """
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    up = 0
    while up < len(parts) and parts[up] == b"..":
        up += 1
    return not target.startswith(b"/") and up <= depth and b".." not in parts[up:]


def check_link(path: str, target: bytes) -> None:
    """Refuse a link that may lead out of the tree, below whose top it is at `path`."""
    check_target(target)
    if not stays_within(target, path.count("/")):
        raise InvalidArgument(
            f"{shown(path)} is a symbolic link to {shown(os.fsdecode(target))}, which may lead out "
            "of its directory tree",
            hint=_ARCHIVE,
            code="invalid.link",
        )
