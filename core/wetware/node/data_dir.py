"""The data directory of a node: one process has it, and clients find the node's socket by it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wetware.errors import Busy, ConfigError

SOCKET_PATH_BYTES_MAX = 100
"""The kernel takes 107; a longer path gets its socket in a private directory under the temp dir."""


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for this process; raises Busy if another node has it, ConfigError."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        stat = data_dir.stat()
        # Whoever can write here can plant a policy and be an operator.
        wrong = hint = ""
        if stat.st_uid != os.getuid():
            wrong, hint = f"{data_dir} belongs to another user", "run it as that user"
        elif stat.st_mode & 0o022:
            wrong, hint = f"others can write to {data_dir}", f"chmod go-w {data_dir}"
        if wrong:
            raise ConfigError(
                f"data directory: {wrong}",
                hint=f"{hint}, or choose another with --data-dir",
                code="config.data_dir",
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(data_dir / "lock", flags, 0o600)
    except OSError as exc:
        raise ConfigError(
            f"cannot use the data directory {data_dir}: {exc.strerror}",
            hint="choose another with --data-dir",
        ) from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
            raise Busy(
                f"another node (pid {pid}) is using the data directory {data_dir}",
                hint="stop it, or give this one its own with --data-dir",
                code="config.busy.data_dir",
            ) from None
        with contextlib.suppress(OSError):  # for the message above; in place, on a full disk too
            os.ftruncate(fd, os.pwrite(fd, f"{os.getpid()}\n".encode(), 0))
        yield
    finally:
        os.close(fd)


def holder_pid(data_dir: Path) -> int | None:
    """The process of the node that has this data directory, or None; `locked` writes it.

    It is asked of the kernel: trying to take the lock could keep a node from starting.
    """
    file = data_dir / "lock"
    try:
        info = file.stat()
        pid = int(file.read_bytes()[:20])
        with open("/proc/locks") as locks:
            # "1: FLOCK  ADVISORY  WRITE 26227 fe:00:2285616 0 EOF"
            held = any(
                fields[1] == "FLOCK"
                and fields[4] == str(pid)
                and fields[5].rpartition(":")[2] == str(info.st_ino)
                for fields in (line.split() for line in locks)
                if len(fields) > 5
            )
    except (OSError, ValueError):
        return None
    return pid if held else None


def socket_path(data_dir: Path) -> Path:
    """Where the node's unix socket is: in the data directory unless its path is too long."""
    path = data_dir / "ww.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        return path
    directory = Path(tempfile.gettempdir()) / f"ww-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    stat = directory.lstat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise ConfigError(
            f"{directory} belongs to somebody else or is open to others",
            hint="choose a shorter --data-dir, or set TMPDIR",
        )
    return directory / (hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16] + ".sock")
