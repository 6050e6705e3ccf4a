"""Small files of their owner alone (0600), written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


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
