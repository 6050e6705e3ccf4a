"""Control groups of programs, below the group that is delegated to the node: cgroups(7), version 2.

One is delegated where systemd says so (`Delegate=yes`, since its version 251), and where it is the
root of what the node sees, as in a container that has one of its own. What runs in it is moved to
the group `node` below it: the kernel limits no group that is below one with processes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from pathlib import Path
from typing import Final

from wetware_proc.native.sandbox import TASKS_MAX

_CONTROLLERS: Final = frozenset({"cpu", "memory", "pids"})  # `cpu` shares out by group
_NODE: Final = "node"
_PREFIX: Final = "program-"
_DELEGATE: Final = ("user.delegate", "trusted.delegate")  # attributes that systemd sets


@functools.cache
def delegated() -> Path | None:
    """The group below which programs get theirs; None where there is none."""
    with contextlib.suppress(OSError):
        top = _top()
        if top is None or not all(os.access(top / each, os.W_OK) for each in (".", "cgroup.procs")):
            return None
        if (top / "cgroup.type").exists():  # the root of a machine has none, and may have processes
            (top / _NODE).mkdir(exist_ok=True)
            for pid in _words(top / "cgroup.procs"):
                with contextlib.suppress(ProcessLookupError):
                    (top / _NODE / "cgroup.procs").write_text(pid)
        for controller in _CONTROLLERS.intersection(_words(top / "cgroup.controllers")):
            with contextlib.suppress(OSError):  # `enforced` looks what came of it
                (top / "cgroup.subtree_control").write_text(f"+{controller}")
        return top
    return None


def _top() -> Path | None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(path) for _, path, kind, *_ in mounts if kind == "cgroup2"), None)
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in groups if line.startswith("0::/")), None)
    if root is None or own is None:
        return None
    top = root / own
    if top.name == _NODE:  # where a node has run before, or systemd has put it (DelegateSubgroup=)
        top = top.parent
    said = [os.getxattr(top, each) for each in os.listxattr(top) if each in _DELEGATE]
    return top if top == root or b"1" in said else None


def _words(path: Path) -> list[str]:
    return path.read_text().split()


def enforced() -> frozenset[str]:
    """The fields of `Limits` that a `Group` enforces here."""
    if (top := delegated()) is None:
        return frozenset()
    memory = "memory" in _words(top / "cgroup.subtree_control")
    return frozenset({"cpu_s", "memory_bytes"} if memory else {"cpu_s"})


class Group:
    """The group of one program. Make it where `enforced` has what is asked of it.

    Args:
        memory_bytes: Of all its processes, their files in memory included, and without swap. At
            more it is killed as a whole. 0: not limited.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=delegated()))
        try:
            if (self._path / "pids.max").exists():
                self._write("pids.max", TASKS_MAX)
            if memory_bytes:
                self._write("memory.max", memory_bytes)
                self._write("memory.oom.group", 1)
                if (self._path / "memory.swap.max").exists():  # the kernel has swap
                    self._write("memory.swap.max", 0)
        except BaseException:
            self.close()
            raise

    def add(self, pid: int) -> None:
        """Put a process into it, and so what it starts from then on."""
        self._write("cgroup.procs", pid)

    @property
    def cpu_s(self) -> float:
        """Of a processor, by all that was in it."""
        return self._number("cpu.stat", "usage_usec") / 1e6

    @property
    def out_of_memory(self) -> bool:
        """Whether it was killed for that."""
        events = self._path / "memory.events"
        return events.exists() and self._number(events.name, "oom_kill") > 0

    def close(self) -> None:
        """End what is in it, and remove it."""
        with contextlib.suppress(OSError):  # who delegates removes what is left
            self._write("cgroup.kill", 1)
            self._path.rmdir()

    def _write(self, name: str, value: int) -> None:
        (self._path / name).write_text(str(value))

    def _number(self, name: str, field: str) -> int:
        words = _words(self._path / name)
        return int(words[words.index(field) + 1])
