"""Small files of their owner alone (0600), written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from wetware.errors import KeyFileError


def read_private_file(path: Path, bytes_max: int, *, remedy: str = "") -> bytes:
    """What is in a file that only its owner can read, and at most one byte more than `bytes_max`.

    Raises FileNotFoundError, and KeyFileError where others can read it (`remedy` in place of
    chmod), or nobody.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(bytes_max + 1)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise KeyFileError(f"cannot read {path}: {exc.strerror}") from exc
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileError(
            f"{path} is readable by others (mode {mode:04o})",
            hint=remedy or f"chmod 600 {path}",
            code="key.mode",
        )
    return data


def write_new_private_file(path: Path, data: bytes) -> None:
    """Create `path` (0600) with `data`, fsynced, whole or not at all; FileExistsError if there."""
    _write_private(path, data, lambda temp: os.link(temp, path))


def replace_private_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` (0600), fsynced: after a crash the old or the new content is there."""
    _write_private(path, data, lambda temp: os.replace(temp, path))


def _write_private(path: Path, data: bytes, publish: Callable[[str], None]) -> None:
    fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temp)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
