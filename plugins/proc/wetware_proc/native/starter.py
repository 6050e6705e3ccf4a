"""Starts bubblewrap behind Landlock and, at a node that is root, with mounts of its own.

Both are done to a thread, and what the thread starts has them, too: so nothing of ours runs between
fork and exec, where a process of many threads can do next to nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

STAGE: Final = "/tmp"  # noqa: S108  # of a mount namespace in which nobody else is
_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _BIND, _REC, _PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000  # sched.h, mount.h
_NO_NEW_PRIVS = 38  # prctl.h
_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # system calls, of all architectures
_VERSION, _SCOPES_SINCE = 1, 6  # landlock.h
_ABSTRACT_UNIX_SOCKET, _SIGNAL = 1, 2


@functools.cache
def landlocked() -> bool:
    """Whether the kernel has what `start` wants of Landlock: scopes, of Linux 6.12."""
    version: int = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    return version >= _SCOPES_SINCE


def start(
    command: list[str], staged: Mapping[str, Path] | None, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a command, which may want to die with its parent: the thread lives as long.

    Args:
        command: A program, with its arguments.
        staged: What is mounted in STAGE by these names, for a user who may not walk to it
            otherwise. No other process sees it there, nor what is there else. None: not at all.
        options: Of subprocess.Popen.

    Raises OSError, where this machine does not let the node do that, too.
    """
    started: Future[subprocess.Popen[bytes]] = Future()

    def live() -> None:
        try:
            if staged is not None:
                _stage(staged)
            if landlocked():
                _restrict()
            process = subprocess.Popen(command, **options)  # noqa: S603  # that is what it is for
        except BaseException as exc:
            started.set_exception(exc)
            return
        started.set_result(process)
        with contextlib.suppress(ChildProcessError):  # reaped by who waits for it
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    threading.Thread(target=live, name="native", daemon=True).start()
    return started.result()


def _stage(staged: Mapping[str, Path]) -> None:
    _call("unshare", _NEWNS)
    _call("mount", None, b"/", None, _REC | _PRIVATE, None)
    with contextlib.ExitStack() as opened:
        sources = {}
        for name, path in staged.items():
            sources[name] = os.open(path, os.O_PATH | os.O_CLOEXEC)
            opened.callback(os.close, sources[name])
        _call("mount", b"tmpfs", STAGE.encode(), b"tmpfs", 0, b"mode=755,size=1m")
        for name, source in sources.items():
            place, link = Path(STAGE, name), f"/proc/self/fd/{source}"
            if os.path.isdir(source):
                place.mkdir()
            else:
                place.touch()
            _call("mount", link.encode(), bytes(place), None, _BIND | _REC, None)


def _restrict() -> None:
    """Let no signal, no trace and no connection to an abstract socket lead out from here."""
    attributes = struct.pack("=QQQ", 0, 0, _ABSTRACT_UNIX_SOCKET | _SIGNAL)
    size = ctypes.c_size_t(len(attributes))
    ruleset = _call("syscall", _CREATE_RULESET, attributes, size, 0)
    try:
        _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
        _call("syscall", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _call(name: str, *args: Any) -> int:
    result: int = getattr(_libc, name)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
