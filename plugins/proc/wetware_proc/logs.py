"""What a detached program wrote, on disk: the last part of it, and where some was lost.

Nothing is synced but when a file is full and when the program ends. So what a machine that goes
down without warning takes along is the end of the last file: a mark beside it names the boot in
which that was written, and the next one puts a line in place of what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from pathlib import Path
from typing import Final

from wetware.identity import replace_private_file

SEGMENT_BYTES: Final = 512 << 10
SEGMENTS_MAX: Final = 2  # files of a log: when the last one is full, the first one goes
MARK: Final = "unsynced"
LOST: Final = b"\nww: the machine went down: the end of what was written until then is missing\n"


@functools.cache
def boot_id() -> str:
    """Another one each time that the machine starts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Log:
    """What one program wrote; places are counted from its start.

    Its methods block: call them in a thread, in any number of them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._mark, self._lock = directory, directory / MARK, threading.Lock()
        self._marked = False

    def _segments(self) -> list[tuple[int, Path]]:
        """Where each begins, and its file, the oldest first."""
        found = self._directory.glob("log.*")
        return sorted((int(path.suffix[1:]), path) for path in found if path.suffix[1:].isdigit())

    def write(self, data: bytes) -> None:
        """Append; raises OSError."""
        with self._lock:
            if not self._marked:
                replace_private_file(self._mark, boot_id().encode())
                self._marked = True
            while data:
                segments = self._segments()
                at, path = segments[-1] if segments else (0, self._directory / "log.0")
                size = path.stat().st_size if segments else 0
                if size >= SEGMENT_BYTES:
                    _sync(path)
                    at, path, size = at + size, self._begin(at + size), 0
                with path.open("ab") as file:
                    file.write(data[: SEGMENT_BYTES - size])
                data = data[SEGMENT_BYTES - size :]

    def _begin(self, at: int) -> Path:
        """A new file, for what is at this place."""
        path = self._directory / f"log.{at}"
        path.touch()
        _sync(self._directory)
        for _, old in self._segments()[:-SEGMENTS_MAX]:
            old.unlink()
        return path

    def settle(self) -> None:
        """What was written so far is on disk. Raises OSError."""
        with self._lock:
            if self._marked:
                _sync(self._segments()[-1][1])
                self._mark.unlink()
                self._marked = False

    def recover(self) -> None:
        """Say what is missing, where the machine went down since it was written; before all else.

        What follows is behind every place that somebody may have been told of. Raises OSError.
        """
        with contextlib.suppress(FileNotFoundError):
            if self._mark.read_text() == boot_id():
                return
            if segments := self._segments():
                at, path = segments[-1]
                whole = path.read_bytes().rstrip(b"\0")  # which some file systems put there
                os.truncate(path, len(whole))
                self._begin(at + SEGMENT_BYTES).write_bytes(LOST)
            self._mark.unlink()

    def read(self, start: int, nbytes: int) -> tuple[int, bytes]:
        """What begins at `start`, or at the first place that is still there, and that place."""
        with self._lock:
            for at, path in self._segments():
                start = max(start, at)
                with path.open("rb") as file:
                    file.seek(start - at)
                    if data := file.read(nbytes):
                        return start, data
            return start, b""


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
