"""`ww` processes that are forked from one that has imported all that they need; Linux.

Imports are most of the processor time of a command, and of a node that lives for seconds. Tests of
the project start thousands of both. What they get is a process as any other: a child of the test,
with a memory, files and signals of its own. What differs: its modules were imported before, and
`/proc/PID/cmdline` is that of the process it came from.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

MODULE: Final = [sys.executable, "-m", "wetware"]
"""The command whose processes are forked; all others are started as ever."""
_REQUEST_BYTES_MAX: Final = 128 << 10
_ALONE: Final = ("libp2p", "_dht", "testing", "wetware.cli", "__main__", "python.runner")
"""Parts of the names of modules that few processes import, or none in this way."""
_CLI: Final = "wetware.cli"
"""What is run, as by `python -m`: nothing here builds on it."""
_PLAIN: Final = ("HOME", "PATH", "XDG_CACHE_HOME")
_SUBREAPER: Final = 36
_CLONE_NEWNET: Final = 0x40000000


def _matters(env: dict[str, str]) -> dict[str, str]:
    """What a process reads before its first line, or may: then it has to be started as ever."""
    return {
        k: v for k, v in env.items() if k not in _PLAIN and not k.startswith(("WW_", "PYTEST_"))
    }


class _Parent:
    """The process that has imported everything, of one process that runs tests."""

    _one: _Parent | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.env = _matters(env)
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    @classmethod
    def fork(cls, request: dict[str, Any], fds: list[int]) -> int | None:
        """The ID of a new child of this process; None if it has to be started as ever."""
        with cls._lock:
            if cls._one is None or cls._one.process.poll() is not None:
                cls._one = cls()
            return cls._one._fork(request, fds)

    def _fork(self, request: dict[str, Any], fds: list[int]) -> int | None:
        data = json.dumps(request).encode()
        if _matters(request["env"]) != self.env or len(data) > _REQUEST_BYTES_MAX:
            return None
        libc = ctypes.CDLL(None)
        # Tests put threads into networks of their own, and a process is where its starter is.
        network = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        # Its parent ends at once, and then it is ours: for so long are we who takes up orphans.
        libc.prctl(_SUBREAPER, 1)
        try:
            socket.send_fds(self._ours, [data], [*fds, network])
            answer = self._ours.recv(64)
        finally:
            libc.prctl(_SUBREAPER, 0)
            os.close(network)
        return int(answer) if answer else None


def _ignored() -> bool:
    """Whether there is a signal that a process started now would ignore, as under `nohup`."""
    kinds = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    return any(signal.getsignal(kind) is signal.SIG_IGN for kind in kinds)


class Forked(subprocess.Popen[Any]):
    """`subprocess.Popen` for which `MODULE` is forked, wherever that makes no difference."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        _, pass_fds, cwd, env, _, _, shell = rest[:7]
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[7:13]
        start_new_session = rest[18]
        fds = [p2cread, c2pwrite, errwrite]
        plain = not (preexec_fn or pass_fds or shell or executable or _ignored()) and cwd and env
        if plain and list(args[:3]) == MODULE and min(fds) >= 0:
            request = {
                "args": [str(arg) for arg in args[3:]],
                "cwd": str(cwd),
                "env": env,
                "new_session": bool(start_new_session),
            }
            pid = _Parent.fork(request, fds)
            if pid is not None:
                self.pid, self._child_created = pid, True
                self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
                return
        super()._execute_child(args, executable, preexec_fn, *rest)  # type: ignore[misc]


# --- the process that has imported everything -----------------------------------------------------


def _serve(ours: socket.socket) -> list[str]:
    """Fork at each request; returns in the child, with the arguments of its `ww`."""
    importlib.import_module(f"{_CLI}.main").build()  # which imports every command
    _import_all("wetware")
    for point in entry_points(group="wetware.v1"):
        _import_all(point.module.partition(".")[0])
    importlib.import_module("anyio._backends._asyncio")  # which it imports when a loop begins
    assert threading.active_count() == 1, "a fork would lose a thread"
    gc.collect()
    gc.freeze()
    while True:
        data, fds, _, _ = socket.recv_fds(ours, _REQUEST_BYTES_MAX, 4)
        if not data:
            os._exit(0)
        reader, writer = os.pipe()
        if between := os.fork():
            os.close(writer)
            for fd in fds:
                os.close(fd)
            os.waitpid(between, 0)  # the child has another parent now
            ours.send(os.read(reader, 64))
            os.close(reader)
            continue
        if child := os.fork():
            os.write(writer, str(child).encode())
            os._exit(0)
        for fd in (reader, writer):
            os.close(fd)
        ours.close()
        return _become(json.loads(data), fds)


def _import_all(package: str) -> None:
    """A package and all below it."""
    if not any(part in package for part in _ALONE):
        with contextlib.suppress(Exception):  # whoever uses it is told
            for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
                _import_all(f"{package}.{found.name}")


def _channel() -> socket.socket:
    return socket.socket(fileno=int(sys.argv[1]))


def _become(request: dict[str, Any], fds: list[int]) -> list[str]:
    if request["new_session"]:
        os.setsid()
    network = fds.pop()
    if not os.path.sameopenfile(network, own := os.open("/proc/self/ns/net", os.O_RDONLY)):
        assert ctypes.CDLL(None).setns(network, _CLONE_NEWNET) == 0
    os.close(own)
    os.close(network)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)  # and no others: what was imported has some, and closes them at its end
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    args: list[str] = request["args"]
    return args


if __name__ == "__main__":
    # Before the module of that name is there, too. By name: this file is below the command line.
    main = importlib.import_module(_CLI).main

    sys.argv = [str(Path(__file__).parents[1] / "__main__.py"), *_serve(_channel())]
    main()
