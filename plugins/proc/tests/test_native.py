"""Native programs: what they can do, what they cannot, and that nothing of them is left.

Where the tests run as root everything is tried twice: by a node that is root, and by one of a user.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGKILL, SIGSTOP, SIGTERM, SIGUSR1
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import Disconnected, InvalidArgument, Revoked, WetwareError
from wetware_proc.driver import CodeRefused, DriverUnavailable, Exit, Limits, Pipe, Spec
from wetware_proc.native import cgroup, sandbox, starter
from wetware_proc.native.driver import NativeImage, probe
from wetware_proc.native.sandbox import Sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
MIB = 1 << 20
UNLIMITED = Limits(memory_bytes=0, cpu_s=0, wall_s=60)
USER = 12345
WHO = ("root", "user") if os.getuid() == 0 else ("user",)


@pytest.fixture(scope="module", autouse=True)
def _bubblewrap() -> None:
    """It has to be there, and the kernel has to let it work."""
    try:
        path = sandbox.bwrap()
    except DriverUnavailable as exc:
        pytest.skip(f"{exc.message}: {exc.hint}")
    tried = subprocess.run(
        [
            path,
            "--unshare-all",
            "--unshare-user",
            "--disable-userns",
            "--ro-bind",
            "/",
            "/",
            "true",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        pytest.skip(f"bubblewrap does not work here: {tried.stderr.strip()}")


class Ran:
    def __init__(self, end: Exit, out: str, err: str) -> None:
        self.exit, self.cpu_s, self.out, self.err = replace(end, cpu_s=0), end.cpu_s, out, err


Run = Callable[..., Any]


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A directory that every user can enter, with a bubblewrap that every user can run."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made)
        path.chmod(0o755)
        bwrap = Path(sandbox.bwrap())
        shutil.copytree(bwrap.parents[1], path / bwrap.parents[1].name)
        libraries = bwrap.parents[1].with_suffix(".libs")
        if libraries.is_dir():
            shutil.copytree(libraries, path / libraries.name)
        yield path


@pytest.fixture(params=WHO)
def begin(request: pytest.FixtureRequest, public: Path) -> Run:
    """Run a program in a process of its own, of root or of a user."""
    bwrap = Path(sandbox.bwrap())
    theirs = public / bwrap.relative_to(bwrap.parents[2])
    uid = USER if request.param == "user" and os.getuid() == 0 else 0

    async def begun(
        *command: str,
        dirs: dict[str, str] | None = None,
        group: Path | None = None,
        **limits: float,
    ) -> asyncio.subprocess.Process:
        asked = {
            "bwrap": str(theirs if uid else bwrap),
            "command": command,
            "limits": {"wall_s": 60, **limits},
            "dirs": dirs or {},
        }
        into = ""
        if group:  # as systemd and a container start a node, and start it again
            leaf = group / "node" if (group / "node").is_dir() else group
            into = f"echo $$ > {leaf}/cgroup.procs && "
        script = Path(__file__).with_name("as_user.py")
        child = await asyncio.create_subprocess_exec(
            "sh", "-c", into + 'exec "$0" "$@"', sys.executable, script, str(uid),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert child.stdin is not None
        child.stdin.write(json.dumps(asked).encode())
        child.stdin.close()
        return child

    return begun


@pytest.fixture
def run(begin: Run) -> Run:
    """Run a program to its end; see `begin`."""

    async def ran(*command: str, **options: Any) -> Ran:
        child = await begin(*command, **options)
        told, _ = await child.communicate()
        assert child.returncode == 0
        found = json.loads(told)
        if "exit" not in found:
            raise WetwareError(found["message"], code=found["code"])
        return Ran(Exit(**found["exit"]), found["out"], found["err"])

    return ran


async def here(*command: str, **spec: Any) -> Ran:
    """The same in this process, with more of a spec."""
    out, err = bytearray(), bytearray()
    given = {"stdout": out.extend, "stderr": err.extend, "limits": UNLIMITED, **spec}
    end = await NativeImage().run(Spec(args=("it", *command), **given))
    return Ran(end, out.decode(), err.decode())


def shell(script: str) -> tuple[str, str, str]:
    return ("sh", "-c", script)


# --- what it can do -------------------------------------------------------------------------------


async def test_hello(run: Run) -> None:
    ran = await run(*shell('echo hello "$0" "$@"; echo there >&2'), "a", "b c")
    assert (ran.exit, ran.out, ran.err) == (Exit("exited", 0), "hello a b c\n", "there\n")


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -9 $$", 137)]
)
async def test_its_exit_code(script: str, code: int) -> None:
    assert (await here(*shell(script))).exit == Exit("exited", code)


async def test_a_program_that_is_not_there_is_said() -> None:
    err = bytearray()
    with pytest.raises(CodeRefused, match="'nosuch' could not be started"):
        await here("nosuch", stderr=err.extend)
    assert b"nosuch" in err


async def test_its_streams_carry_all_that_comes_and_wait_for_who_is_slow() -> None:
    data, got = os.urandom(3 * MIB), bytearray()

    async def slowly(piece: bytes) -> None:
        got.extend(piece)
        await asyncio.sleep(0)

    stdin = Pipe()
    running = asyncio.ensure_future(here("cat", stdin=stdin, stdout=slowly))
    await stdin.write(data)
    stdin.close()
    assert (await running).exit == Exit("exited", 0)
    assert got == data


async def test_a_reader_that_stops_ends_the_writer() -> None:
    taken = bytearray()

    def some(data: bytes) -> None:
        if taken:
            raise BrokenPipeError
        taken.extend(data)

    ran = await here("yes", stdout=some)
    assert ran.exit == Exit("exited", 128 + 13)  # SIGPIPE


async def test_it_has_its_environment_and_none_of_the_node_s(monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET_OF_THE_NODE", "x")
    ran = await here("env", env={"A": "1=2", "HOME": "/home/x"})
    names = dict(line.split("=", 1) for line in ran.out.splitlines())
    assert names.pop("A") == "1=2"
    assert names.pop("HOME") == "/home/x"
    assert names.keys() <= {"PATH", "LANG", "WW_FD", "PWD", "SHLVL", "_"}


@pytest.fixture
def given(public: Path) -> Path:
    """A directory with a file, that everybody can read."""
    made = public / "given"
    made.mkdir(exist_ok=True)
    (made / "data").write_text("of the node\n")
    return made


async def test_it_sees_a_directory_that_it_is_given_and_cannot_write_there(
    run: Run, given: Path
) -> None:
    look = shell("cat /given/data; touch /given/x || echo no >&2")
    ran = await run(*look, dirs={"/given": str(given)})
    assert ran.out == "of the node\n"
    assert ran.err.endswith("no\n")


@pytest.fixture
def hidden(public: Path, given: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That directory, and bubblewrap, below one that only root can enter."""
    bwrap = Path(sandbox.bwrap())
    there = public / bwrap.relative_to(bwrap.parents[2])
    monkeypatch.setattr(sandbox, "bwrap", lambda: str(there))
    public.chmod(0o700)
    yield given
    public.chmod(0o755)


@pytest.mark.skipif(os.getuid() != 0, reason="what only root can enter is made by root")
async def test_a_node_of_root_gives_what_only_root_can_walk_to(hidden: Path) -> None:
    ran = await here("cat", "/given/data", dirs={"/given": (hidden, False)})
    assert (ran.out, ran.err) == ("of the node\n", "")


@pytest.fixture
def tree(public: Path) -> Path:
    """A root directory with a shell in it, and nothing else."""
    root = public / "tree"
    told = subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True, check=True).stdout
    files = [word for word in told.split() if word.startswith("/")]
    for file in ("/bin/sh", *files):
        copy = root / file.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return root


async def test_a_directory_can_be_all_that_it_sees(run: Run, tree: Path) -> None:
    ran = await run("/bin/sh", "-c", "echo /*", dirs={"/": str(tree)})
    names = {f"/{name}" for name in (*os.listdir(tree), "dev", "proc", "tmp")}
    assert set(ran.out.split()) == names


# --- what binds it --------------------------------------------------------------------------------


@contextlib.contextmanager
def control_group() -> Iterator[Path]:
    """One of this machine, with the controllers that there are."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(path) for _, path, kind, *_ in mounts if kind == "cgroup2"), None)
    if root is None or not os.access(root / "cgroup.subtree_control", os.W_OK):
        pytest.skip(
            "a control group of version 2 can be made by root only, and where it is mounted"
        )
    for controller in (root / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):
            (root / "cgroup.subtree_control").write_text(f"+{controller}")
    made = root / f"wetware-test-{secrets.token_hex(8)}"
    made.mkdir()
    try:
        yield made
    finally:
        (made / "cgroup.kill").write_text("1")
        for each in (*made.glob("*/"), made):
            each.rmdir()


@pytest.fixture
def delegated() -> Iterator[Path]:
    """One that is delegated to the user and to root, as systemd does it."""
    with control_group() as made:
        for each in (".", "cgroup.procs", "cgroup.subtree_control"):
            os.chown(made / each, USER, -1)
        os.setxattr(made, "user.delegate", b"1")
        yield made


def below(group: Path) -> list[str]:
    return [each.name for each in group.glob("*/")]


@pytest.fixture
def delegated_memory(delegated: Path) -> Path:
    if "memory" not in (delegated / "cgroup.controllers").read_text().split():
        pytest.skip("the controller `memory` is not of version 2 on this machine")
    return delegated


@pytest.mark.machine
@pytest.mark.parametrize("limit", ["memory_bytes", "cpu_s"])
async def test_a_limit_that_cannot_be_enforced_is_refused(run: Run, limit: str) -> None:
    with control_group() as not_delegated:
        with pytest.raises(WetwareError, match="cannot be enforced") as refused:
            await run("true", group=not_delegated, **{limit: 64 * MIB})
        assert refused.value.code == "unsupported.limit"
        assert not below(not_delegated)


@pytest.mark.machine
@pytest.mark.parametrize("count", [1, 8])
async def test_its_time_of_a_processor_ends_it(run: Run, delegated: Path, count: int) -> None:
    """Of all its processes together, however short each of them is."""
    spin = "while :; do (exit 0); done" if count == 1 else "while :; do :; done"
    ran = await run(*shell(f"({spin}) & " * count + "wait"), cpu_s=0.5, group=delegated)
    assert (ran.exit.kind, ran.exit.why) == ("limit", "cpu_s")
    assert 0.5 <= ran.cpu_s < 1.5
    ran = await run("true", cpu_s=60, group=delegated)
    assert (ran.exit.kind, ran.exit.code) == ("exited", 0)
    assert 0 < ran.cpu_s < 1
    assert below(delegated) == ["node"]


@pytest.mark.machine
async def test_the_kernel_is_told_all_of_its_limits(run: Run, delegated_memory: Path) -> None:
    def told(name: str) -> str:
        return "".join(each.read_text() for each in delegated_memory.glob(f"program-*/{name}"))

    running = asyncio.ensure_future(
        run("sleep", "1000", memory_bytes=64 * MIB, wall_s=5, group=delegated_memory)
    )
    while not told("cgroup.procs") and not running.done():  # noqa: ASYNC110  # no event tells of it
        await asyncio.sleep(0.01)
    asked = {"memory.max": f"{64 * MIB}\n", "memory.oom.group": "1\n", "pids.max": "512\n"}
    assert {name: told(name) for name in asked} == asked
    assert (await running).exit.why == "wall_s"


EATERS = {
    "one process": "x = b'x' * (200 << 20)",
    "several processes": "import os, time\n"
    "for _ in range(8):\n"
    "    if os.fork() == 0:\n"
    "        x = b'x' * (16 << 20)\n"
    "        time.sleep(60)\n"
    "time.sleep(60)",
    "its files": "for path in ('/tmp/x', '/dev/shm/x'):\n"  # its own
    "    open(path, 'wb').write(b'x' * (40 << 20))",
}


@pytest.mark.machine
@pytest.mark.parametrize("eater", EATERS)
async def test_its_memory_ends_it(run: Run, delegated_memory: Path, eater: str) -> None:
    """All of it, with its files in memory."""
    command = ("python3", "-c", EATERS[eater] + "\nprint('unlimited')")
    ran = await run(*command, memory_bytes=64 * MIB, group=delegated_memory)
    assert (ran.exit.kind, ran.exit.why, ran.out) == ("limit", "memory_bytes", "")
    assert below(delegated_memory) == ["node"]
    if eater == "one process":
        ran = await run(*command, memory_bytes=1024 * MIB, group=delegated_memory)
        assert (ran.exit.code, ran.out) == (0, "unlimited\n")


async def test_its_time_ends_it(run: Run) -> None:
    before = time.monotonic()
    ran = await run(*shell("echo begun; sleep 1000 & sleep 1000"), wall_s=1)
    assert (ran.exit.kind, ran.exit.why, ran.out) == ("limit", "wall_s", "begun\n")
    assert time.monotonic() - before < 50


async def test_a_fork_bomb_meets_its_limit(run: Run) -> None:
    bomb = "i=0; while [ $i -lt 2000 ]; do sleep 100 & i=$((i+1)); done; echo unlimited"
    ran = await run(*shell(bomb), wall_s=30)
    assert "unlimited" not in ran.out
    assert "fork" in ran.err.lower()


async def test_its_tmp_is_its_own_and_limited(run: Run) -> None:
    ran = await run(
        *shell("head -c 3000000 /dev/zero > /tmp/x; wc -c < /tmp/x; ls -A /dev/shm"),
        tmp_bytes=1 * MIB,
    )
    assert int(ran.out) <= 1 * MIB
    assert "No space" in ran.err
    again = await run(*shell("ls -A /tmp"))
    assert again.out == ""


async def test_it_writes_nowhere_else(run: Run) -> None:
    places = "/ /usr /usr/bin /dev /proc /proc/sys/kernel /etc /root /var"
    ran = await run(*shell(f"for p in {places}; do touch $p/x && echo wrote $p; done; exit 0"))
    assert ran.out == ""


# --- what it looks for ----------------------------------------------------------------------------


async def test_it_finds_no_network(run: Run) -> None:
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as named:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        named.bind(f"\0wetware-test-{os.getpid()}")
        named.listen()
        ran = await run(
            "python3", "-c",
            "import os, socket, sys\n"
            "for family, where in ((socket.AF_INET, ('127.0.0.1', int(sys.argv[1]))),\n"
            "                      (socket.AF_INET, ('1.1.1.1', 53)),\n"
            "                      (socket.AF_UNIX, chr(0) + sys.argv[2])):\n"
            "    try:\n"
            "        socket.socket(family).connect(where)\n"
            "        print('connected', where)\n"
            "    except OSError as exc:\n"
            "        print(exc.strerror)\n"
            "print(sorted(name for _, name in socket.if_nameindex()))\n",
            str(listener.getsockname()[1]), f"wetware-test-{os.getpid()}",
        )  # fmt: skip
    assert ran.out.splitlines() == [
        "Connection refused",
        "Network is unreachable",
        "Connection refused",
        "['lo']",
    ]


async def test_it_finds_no_file_of_the_node(run: Run, tmp_path: Path) -> None:
    key = tmp_path / "node.key"
    key.write_text("the node's key")
    looked = [str(key), str(Path(__file__)), "/etc/passwd", "/etc/shadow", "/root", "/home", "/var"]
    ran = await run(*shell(f"for f in {' '.join(looked)} /proc/1/root/etc/passwd "
                           f"/proc/1/cwd/etc/passwd /proc/self/fd/*/../etc; do "
                           "[ -e $f ] && echo found $f; done; ls -A / | tr '\\n' ' '"))  # fmt: skip
    assert "found" not in ran.out
    assert set(ran.out.split()) <= {
        "bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "sbin", "tmp", "usr",
    }  # fmt: skip


async def test_it_has_no_descriptor_but_its_streams_and_the_way_out(run: Run) -> None:
    ran = await run(*shell('ls -l /proc/self/fd | grep -v "pipe:" ; echo "$WW_FD"'))
    links = [line for line in ran.out.splitlines() if " -> " in line]
    assert len([line for line in links if "socket:" in line]) == 1
    assert len([line for line in links if "socket:" not in line]) == 1  # the directory itself
    assert f" {ran.out.splitlines()[-1]} -> socket:" in ran.out


async def test_its_environment_is_not_in_a_command_line() -> None:
    secret, up = secrets.token_hex(16), asyncio.Event()
    program = shell('echo "$SECRET"; sleep 1000')
    running = asyncio.ensure_future(
        here(*program, env={"SECRET": secret}, stdout=lambda data: up.set())
    )
    await asyncio.wait_for(up.wait(), 60)
    assert marked(program[-1])
    assert not marked(secret)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.skipif(os.getuid() != 0, reason="a node of a user gives it no other user")
async def test_at_a_node_of_root_it_is_a_user_that_nobody_else_is() -> None:
    up = asyncio.Event()
    program = shell(f"echo up; sleep 1000 # {secrets.token_hex(16)}")
    running = asyncio.ensure_future(here(*program, stdout=lambda data: up.set()))
    await asyncio.wait_for(up.wait(), 60)
    found = set()
    for pid in marked(program[-1]):
        lines = status(pid)
        assert lines["Groups"].strip() == ""
        found |= {*lines["Uid"].split(), *lines["Gid"].split()}
    (uid,) = found
    assert int(uid) in sandbox.UIDS
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.skipif(os.getuid() != 0, reason="a node of a user gives it no other user")
def test_nodes_of_one_machine_give_no_user_twice() -> None:
    source = (
        "import contextlib, sys\n"
        "from wetware_proc.native.sandbox import own_uid\n"
        "with contextlib.ExitStack() as held:\n"
        "    print(own_uid(held), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", source]
    with (
        contextlib.ExitStack() as held,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
    ):
        assert other.stdout is not None
        theirs = int(other.stdout.readline())
        mine = {sandbox.own_uid(held) for _ in range(3)}
        assert len(mine) == 3
        assert theirs not in mine
        other.communicate()


async def test_it_sees_no_other_process_and_can_signal_none(run: Run) -> None:
    bystander = await asyncio.create_subprocess_exec("sleep", "1000")
    look = f"kill -9 {bystander.pid} && echo killed; ls /proc | grep '^[0-9]'; kill -9 -1"
    ran = await run(*shell(look))
    assert bystander.returncode is None
    assert "killed" not in ran.out
    assert all(int(pid) < 100 for pid in ran.out.split())
    bystander.kill()
    assert await bystander.wait() == -9


async def test_it_gets_no_namespace_no_mount_no_trace_and_no_keyring(run: Run) -> None:
    ran = await run(
        "python3", "-c",
        "import ctypes, os, platform\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "arm = platform.machine() == 'aarch64'\n"
        "def call(name, *args):\n"
        "    result = getattr(libc, name)(*args)\n"
        "    print(name, result, os.strerror(ctypes.get_errno()))\n"
        "call('unshare', 0x10000000)\n"
        "call('unshare', 0x00020000)\n"
        "call('mount', b'none', b'/tmp', b'tmpfs', 0, None)\n"
        "call('umount2', b'/usr', 2)\n"
        "call('ptrace', 0, 0, 0, 0)\n"
        "call('syscall', 219 if arm else 250, 0, -3, 0)\n"
        "call('syscall', 425, 8, 0)\n"
        "print([x for x in open('/proc/self/status') if 'CapEff' in x or 'NoNew' in x])\n",
    )  # fmt: skip
    *calls, status = ran.out.splitlines()
    assert len(calls) == 7
    assert all(line.endswith("-1 Operation not permitted") for line in calls)
    assert status == "['CapEff:\\t0000000000000000\\n', 'NoNewPrivs:\\t1\\n']"


async def test_it_makes_no_user_namespace_by_clone_either(run: Run) -> None:
    ran = await run(
        "python3", "-c",
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "number = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]\n"
        "pid = libc.syscall(number, 0x10000000 | 17, 0, 0, 0, 0)\n"
        "if pid == 0: os._exit(0)\n"
        "print(pid, ctypes.get_errno() in (1, 28))\n",
    )  # fmt: skip
    assert ran.out == "-1 True\n"


REACH = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(name, call):
    try:
        call()
        print(name, "reached")
    except OSError as exc:
        print(name, exc.strerror)
def trace():
    if libc.ptrace(0x4206, int(sys.argv[1]), 0, 0):  # PTRACE_SEIZE
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
tried("signal", lambda: os.kill(int(sys.argv[1]), 0))
tried("trace", trace)
tried("socket", lambda: socket.socket(socket.AF_UNIX).connect(chr(0) + sys.argv[2]))
"""


@pytest.fixture
def abstract() -> Iterator[str]:
    """The name of an abstract socket of this process that listens."""
    name = f"wetware-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        yield name


@pytest.fixture
def bystander() -> Iterator[str]:
    """The PID of a process that is no parent of what the test starts."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield str(process.pid)
        process.kill()


landlock = pytest.mark.skipif(
    not starter.landlocked(), reason="Landlock of this kernel has no scopes"
)


@landlock
def test_landlock_stands_where_there_is_no_namespace(bystander: str, abstract: str) -> None:
    """Whoever is root, or the same user, reaches all of these without it."""
    command = [sys.executable, "-c", REACH, bystander, abstract]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with starter.start(command, None, stdout=subprocess.PIPE) as behind:
        told = behind.communicate()[0].decode()
    assert plain.splitlines() == ["signal reached", "trace reached", "socket reached"]
    assert told.splitlines() == [
        f"{each} Operation not permitted" for each in ("signal", "trace", "socket")
    ]


@landlock
async def test_a_program_is_behind_landlock(
    monkeypatch: pytest.MonkeyPatch, bystander: str, abstract: str
) -> None:
    """Seen by what only Landlock refuses, in the network of the machine."""
    world = sandbox._world

    def shared(*args: Any) -> Iterator[tuple[str, ...]]:
        yield from world(*args)
        yield ("--share-net",)

    monkeypatch.setattr(sandbox, "_world", shared)
    ran = await here("python3", "-c", REACH, bystander, abstract)
    assert ran.out.splitlines()[-1] == "socket Operation not permitted"


# --- what it is given -----------------------------------------------------------------------------


class Store(rpc.Servant, interface=rpc.WW.Source):
    """Bytes, and who asked for them."""

    def __init__(self) -> None:
        self.data, self.asked = os.urandom(2 * MIB), 0

    async def stat(self) -> dict[str, Any]:
        self.asked += 1
        return {"size": len(self.data)}

    async def read(self, start: int, end: int) -> dict[str, Any]:
        stream = rpc.ByteStream()

        async def send() -> None:
            await stream.send(self.data[start:end])
            await stream.send_eof()
            await stream.aclose()

        self.sending = asyncio.ensure_future(send())
        return {"stream": stream.servant}


class Grant:
    """Allows all calls until it is revoked."""

    ended: WetwareError | None = None
    payer, metered = None, False

    def __init__(self) -> None:
        self._callbacks: list[Callable[[WetwareError], None]] = []

    @property
    def blocked(self) -> WetwareError | None:
        return self.ended

    def enter(self, *_: object) -> None: ...

    def charge(self, *_: object) -> None: ...

    def leave(self, *_: object) -> None: ...

    def onward(self, *_: object) -> Grant:
        return self

    def on_end(self, callback: Callable[[WetwareError], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def exported(self) -> None: ...

    def unexported(self) -> bool:
        return False

    def let_go(self) -> None: ...

    def revoke(self) -> None:
        self.ended = Revoked("it was revoked")
        for callback in list(self._callbacks):
            callback(self.ended)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[tuple[Store, rpc.Ref]]:
    served = Store()
    path = tmp_path / "s"
    async with rpc.serve_unix(path, lambda _: served), await rpc.connect_unix(path) as connection:
        yield served, connection.bootstrap(rpc.WW.Source)


def python(source: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """A command that runs Python with this library, and what it needs of a spec."""
    paths = [each for each in (sys.base_prefix, *sys.path) if os.path.isdir(each)]
    dirs = {each: (Path(each), False) for each in paths if not each.startswith("/usr/")}
    dirs.pop("/usr", None)
    program = f"{sys.base_prefix}/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    libraries = f"{sys.base_prefix}/lib"
    env = {"PYTHONPATH": ":".join(paths[1:]), "LD_LIBRARY_PATH": libraries}
    return (program, "-c", source), {"dirs": dirs, "env": env}


INSIDE = """
import asyncio, hashlib, os, sys
import wetware
from wetware import rpc
from wetware.errors import WetwareError
async def main():
    async with wetware.connect() as session:
        print([(each.name, each.interface) for each in await session.services()])
        source = await session.open("in")
        size = (await source.stat())["size"]
        stream = rpc.ByteStream((await source.read(start=0, end=size))["stream"])
        data = b"".join([piece async for piece in stream])
        print(hashlib.sha256(data).hexdigest())
        for name in ("out", "pubsub", "cluster", "grants"):
            try:
                await session.open(name, rpc.WW.Source)
            except WetwareError as exc:
                print(exc.code)
        await session.export("back", source)
        print("offered", flush=True)
        sys.stdin.read()
        try:
            print((await source.stat())["size"])
        except WetwareError as exc:
            print(exc.code)
asyncio.run(main())
"""


async def test_it_finds_exactly_what_it_was_given_and_offers_something_back(
    store: tuple[Store, rpc.Ref],
) -> None:
    served, unguarded = store
    grant = Grant()
    ref = unguarded.under(grant)
    command, spec = python(INSIDE)
    offered: dict[str, Any] = {}
    up, stdin, out = asyncio.Event(), Pipe(), bytearray()

    def told(data: bytes) -> None:
        out.extend(data)
        if b"offered" in out:
            up.set()

    running = asyncio.ensure_future(
        here(
            *command,
            grants={"in": ref},
            offer=offered.__setitem__,
            stdin=stdin,
            stdout=told,
            **spec,
        )
    )
    waiting = asyncio.ensure_future(up.wait())
    await asyncio.wait([running, waiting], timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert up.is_set(), vars(await running)
    lines = out.decode().splitlines()
    assert lines[0] == "[('in', 'Source')]"
    assert lines[1] == hashlib.sha256(served.data).hexdigest()
    assert lines[2:6] == ["not_found.grant"] * 4
    back = offered["back"]
    assert await back.call("stat") == {"size": len(served.data)}
    grant.revoke()
    asked = served.asked
    stdin.close()
    ran = await running
    assert ran.exit == Exit("exited", 0), ran.err
    assert out.decode().splitlines()[-1] == "capability.revoked"
    assert served.asked == asked
    with pytest.raises(WetwareError):  # the end of the program is the end of what it offers
        await back.call("stat")


async def test_the_way_out_is_no_way_in_once_it_has_ended(
    store: tuple[Store, rpc.Ref], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the descriptor still, has nothing."""
    kept: list[socket.socket] = []
    begin = Sandbox.__init__

    def watched(self: Sandbox, *args: Any, way_out: socket.socket, **kwargs: Any) -> None:
        kept.append(way_out.dup())
        begin(self, *args, way_out=way_out, **kwargs)

    monkeypatch.setattr(Sandbox, "__init__", watched)
    served, ref = store
    assert (await here("true", grants={"in": ref})).exit.code == 0
    async with await rpc.connect(rpc.SocketPipe(kept[0])) as connection:
        given = connection.bootstrap(rpc.WW.Granted)
        with pytest.raises(Disconnected):
            await given.call("open", name="in")
    assert served.asked == 0


# --- its end --------------------------------------------------------------------------------------


def left(namespace: str) -> list[str]:
    """Processes of a PID namespace."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                found.append(pid)
        except OSError:
            continue
    return found


def marked(mark: str) -> list[str]:
    """Processes that were started with this in their arguments, bubblewrap's own included."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def status(pid: str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


TREE = "trap '' TERM HUP INT; (setsid sh -c 'sleep 1000 & exec sleep 1000' &) ; sleep 1000 & "


async def test_a_kill_ends_the_whole_tree_and_nothing_is_left(
    kill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sandbox] = []
    begin = Sandbox.__init__

    def watched(self: Sandbox, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Sandbox, "__init__", watched)
    up = asyncio.Event()
    running = asyncio.ensure_future(
        here(*shell(TREE + "echo up; wait"), stdout=lambda data: up.set())
    )
    await asyncio.wait_for(up.wait(), 60)
    namespace = os.readlink(f"/proc/{made[0].pid}/ns/pid")
    assert len(left(namespace)) >= 4
    assert await kill(running) < 5
    assert left(namespace) == []


async def test_it_is_sent_signals_in_turn_and_what_it_has_started_is_not() -> None:
    signals, up, seen = Pipe(), asyncio.Event(), bytearray()

    def take(data: bytes) -> None:
        seen.extend(data)
        up.set()

    script = (
        "trap 'echo usr' USR1; trap 'echo hup' HUP; sleep 1000 & echo up; while :; do wait; done"
    )
    running = asyncio.ensure_future(here(*shell(script), signals=signals, stdout=take))
    for number, said in ((None, b"up\n"), (SIGUSR1, b"usr\n"), (SIGHUP, b"hup\n")):
        if number is not None:
            await signals.write(bytes([number]))
        await asyncio.wait_for(up.wait(), 60)
        up.clear()
        assert seen.endswith(said)
    await signals.write(bytes([SIGSTOP, SIGUSR1, SIGCONT]))
    await asyncio.wait_for(up.wait(), 60)
    await signals.write(bytes([SIGTERM]))
    assert (await running).exit == Exit("exited", 128 + SIGTERM)
    assert seen == b"up\nusr\nhup\nusr\n"


async def test_a_signal_that_comes_before_the_program_waits_for_it() -> None:
    signals = Pipe()
    await signals.write(bytes([SIGKILL]))
    assert (await here("sleep", "1000", signals=signals)).exit == Exit("exited", 128 + SIGKILL)


async def test_a_kill_of_the_node_leaves_nothing(begin: Run) -> None:
    mark = secrets.token_hex(16)
    node = await begin(*shell(TREE + "wait"), mark)
    async with asyncio.timeout(60):
        while len(marked(mark)) < 3:  # noqa: ASYNC110  # no event tells of it
            await asyncio.sleep(0.01)
        node.kill()
        await node.wait()
        while marked(mark):  # noqa: ASYNC110  # no event tells of it
            await asyncio.sleep(0.01)


async def test_what_it_leaves_behind_ends_with_it() -> None:
    ran = await here(*shell(TREE + "echo up"))
    assert (ran.exit, ran.out) == (Exit("exited", 0), "up\n")  # its pipes have ended, too


@pytest.mark.parametrize("after", range(12))
async def test_a_kill_at_any_moment_leaves_nothing(kill: Any, after: int) -> None:
    """Also before it has begun: descriptors, users and processes are as before."""
    await here("true")  # what is made once
    before = sorted(os.listdir("/proc/self/fd"))
    mark = secrets.token_hex(16)
    running = asyncio.ensure_future(here(*shell(TREE + "wait"), mark))
    for _ in range(after):
        await asyncio.sleep(0.001)
    await kill(running)
    async with asyncio.timeout(60):
        while marked(mark):  # noqa: ASYNC110  # no event tells of it
            await asyncio.sleep(0.01)
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_what_names_no_program_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no program is named"):
        NativeImage().check(Spec(args=("it",), limits=UNLIMITED))


# --- what is said of the machine ------------------------------------------------------------------


async def test_the_doctor_says_what_can_be_limited() -> None:
    works, *limits = await probe()
    assert works.level == "ok"
    for field, name in (("memory_bytes", "memory"), ("cpu_s", "processor time")):
        enforced = field in cgroup.enforced()
        assert (name in works.text) == enforced
        assert any(name in each.text for each in limits) == (not enforced)
    assert [each.level for each in limits] == ["warning"] * (len(cgroup.enforced()) < 2)


@pytest.mark.parametrize("broken", ["missing", "refused"])
async def test_a_machine_that_lets_no_sandbox_be_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    def missing() -> str:
        raise DriverUnavailable("native programs need bubblewrap", hint="install it")

    def refused() -> str:
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create namespace' >&2; exit 1\n")
        fake.chmod(0o755)
        for each in tmp_path.parents[:2]:
            each.chmod(0o755)
        return str(fake)

    monkeypatch.setattr(sandbox, "bwrap", {"missing": missing, "refused": refused}[broken])
    with pytest.raises(WetwareError) as exc:
        await here("true")
    assert exc.value.code == "unsupported.driver"
    (finding,) = await probe()
    assert finding.level == "error"
    assert finding.remedy
