"""What the tests of the audit log are made of: a clock, disks that fail, logs."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from wetware.audit import AuditConfig, AuditLog
from wetware.audit.log import _append_to
from wetware.identity import Key

KEY = Key.from_seed(b"node".ljust(32, b"."))
OTHER = Key.from_seed(b"other".ljust(32, b"."))


class Clock:
    """Time that tests set."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class Disk:
    """Opens files; `left` bytes fit on it, None: all.

    What is over is written in part, as a real one does.
    """

    def __init__(self) -> None:
        self.left: int | None = None

    def __call__(self, path: Path) -> Any:
        return _File(self, _append_to(path))


class _File:
    def __init__(self, disk: Disk, file: Any) -> None:
        self._disk, self._file = disk, file

    def write(self, data: Any) -> int:
        disk = self._disk
        if disk.left is None:
            return int(self._file.write(data))
        if not disk.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[: disk.left]
        disk.left -= len(part)
        return int(self._file.write(part))

    def fileno(self) -> int:
        return int(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def open_log(directory: Path, *, key: Key = KEY, **changes: Any) -> AuditLog:
    """A log with a clock of its own."""
    opened = changes.pop("open_file", None)
    clock = changes.pop("clock", None) or Clock()
    config = AuditConfig(**{"interval_s": 0.05, **changes})
    return AuditLog(directory, key, clock=clock, config=config, open_file=opened)


async def write(log: AuditLog, count: int, event: str = "login.granted", **fields: Any) -> int:
    """Append records; returns the number of the last."""
    seq = 0
    for number in range(count):
        seq = await log.append({"event": event, "n": number, **fields})
    return seq
