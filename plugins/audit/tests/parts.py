"""What the tests of the audit log are made of: a clock, disks that fail, logs."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from wetware.base.threads import Threads
from wetware.broker.records import Records
from wetware.identity import Key
from wetware_audit.chain import CHECKPOINT_DOMAIN
from wetware_audit.config import AuditConfig
from wetware_audit.log import AuditLog, _append_to
from wetware_audit.recorder import AuditRecorder

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


def signer(key: Key = KEY) -> Callable[[bytes], bytes]:
    """Signs checkpoints, as a node lets its recorder."""
    return lambda data: key.sign(CHECKPOINT_DOMAIN + data)


def recorder_on(log: AuditLog, **given: Any) -> AuditRecorder:
    """A recorder of an open log."""
    ctx: Any = SimpleNamespace(evicted=lambda _: False, run_sync=Threads().run)
    recorder = AuditRecorder(ctx, signer(), **given)
    recorder.use(log)
    return recorder


def records_to(log: AuditLog, clock: Any = None, **given: Any) -> Records:
    """What a broker records to."""
    return Records(clock or Clock(), recorder_on(log, **given))


def open_log(directory: Path, *, key: Key = KEY, **changes: Any) -> AuditLog:
    """A log with a clock of its own."""
    opened = changes.pop("open_file", None)
    clock = changes.pop("clock", None) or Clock()
    config = AuditConfig(**{"interval_s": 0.05, **changes})
    return AuditLog(
        directory, key.peer_id, signer(key), clock=clock, config=config, open_file=opened
    )


async def write(log: AuditLog, count: int, event: str = "login.granted", **fields: Any) -> int:
    """Append records; returns the number of the last."""
    seq = 0
    for number in range(count):
        seq = await log.append({"event": event, "n": number, **fields})
    return seq


async def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # no one event tells of it
            await asyncio.sleep(0.005)
