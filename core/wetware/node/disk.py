"""Whether a node's disk has room, and writes in time: for `ww doctor`."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Final

from wetware.base.finding import Finding, error, ok, size, warning

DISK_FREE_BYTES_MIN: Final = 64 << 20
"""Below this a policy, a certificate or a log may not be written any more: an error."""
DISK_FREE_BYTES_LOW: Final = 1 << 30
"""Below this it is time to clear up: a warning."""
FSYNC_S_MAX: Final = 0.1
"""Of a small durable write. Tickets and policies wait for several in a row."""
FSYNC_BYTES, FSYNC_TRIES = 4096, 5


def check_disk(data_dir: Path) -> list[Finding]:
    """Free space, and how long a small durable write takes. Blocks: for a thread."""
    place = data_dir if data_dir.exists() else next(p for p in data_dir.parents if p.exists())
    info = os.statvfs(place)
    found = judge_space(info.f_bavail * info.f_frsize, place)
    if info.f_favail == 0 and info.f_files:
        text = f"no file can be made on the file system of {place}: its inodes are used up"
        found.append(error("disk", text, f"remove files; `df -i {place}` shows the use"))
    if place == data_dir and os.access(data_dir, os.W_OK | os.X_OK):
        try:
            found += judge_fsync(fsync_s(data_dir), data_dir)
        except OSError as exc:
            text = f"a file of {FSYNC_BYTES} bytes cannot be written in {data_dir}: {exc.strerror}"
            found.append(error("disk", text, f"`df -h {data_dir}`"))
    return found


def judge_space(free_bytes: int, place: Path) -> list[Finding]:
    text = f"{size(free_bytes)} are free on the file system of {place}"
    remedy = f"remove what is not needed there; `df -h {place}`"
    if free_bytes < DISK_FREE_BYTES_MIN:
        return [error("disk", f"{text}; below {size(DISK_FREE_BYTES_MIN)} writes fail", remedy)]
    if free_bytes < DISK_FREE_BYTES_LOW:
        return [warning("disk", f"{text}, less than {size(DISK_FREE_BYTES_LOW)}", remedy)]
    return [ok("disk", text)]


def fsync_s(directory: Path) -> float:
    """The median time of a small durable write, s; raises OSError."""
    times = []
    fd, path = tempfile.mkstemp(dir=directory, prefix=".doctor.")
    try:
        for _ in range(FSYNC_TRIES):
            started = time.perf_counter()
            os.pwrite(fd, os.urandom(FSYNC_BYTES), 0)
            os.fsync(fd)
            times.append(time.perf_counter() - started)
    finally:
        os.close(fd)
        os.unlink(path)
    return sorted(times)[FSYNC_TRIES // 2]


def judge_fsync(seconds: float, place: Path) -> list[Finding]:
    text = f"a durable write in {place} takes {seconds * 1000:.1f} ms"
    if seconds <= FSYNC_S_MAX:
        return [ok("disk", text)]
    return [
        warning(
            "disk",
            f"{text}, more than {FSYNC_S_MAX * 1000:.0f} ms: joining and changes of the policy "
            "wait for several",
            "use a local disk: `ww node --data-dir DIR`; `iostat -x 1` shows what keeps this one "
            "busy",
        )
    ]
