"""Python programs: what they can do, and what they cannot."""

from __future__ import annotations

import asyncio
import io
import time
import zipfile
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest
from wasmtime.component._types import FuncType

from wetware.base import cbor
from wetware.errors import InternalError, LimitExceeded, Revoked
from wetware_proc.driver import CodeRefused, DriverUnavailable, Exit, Limits, Pipe, Spec
from wetware_proc.python import build, driver
from wetware_proc.python.component import Function, Runner
from wetware_proc.python.driver import PythonDriver, PythonImage
from wetware_proc.python.world import OFFERED, RESOURCES
from wetware_proc.wasm.compile import Cache
from wetware_proc.wasm.driver import WasmDriver

if TYPE_CHECKING:
    from plugins.proc.tests.conftest import Lag, Run

Kill = Callable[["asyncio.Task[Exit]"], Awaitable[float]]

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]  # the first builds the runner

LAG_P99_S = 0.025


def source(text: str) -> bytes:
    return dedent(text).encode()


def archive(**files: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as made:
        for name, text in files.items():
            made.writestr(name.replace("__slash__", "/") + ".py", dedent(text))
    return data.getvalue()


async def test_what_the_runner_imports_is_offered_and_nothing_else(python: Run) -> None:
    """But for sockets, of which nothing can be had: what is missing there is never reached."""
    runner = await python.driver._runner()  # type: ignore[attr-defined]  # of the other kind
    imported: dict[str, set[str]] = {}
    for name, found in runner.component.type.imports(runner.runtime.engine).items():
        exported = found.ty.exports(runner.runtime.engine).items()
        imported[name.partition("@")[0]] = {
            name for name, each in exported if isinstance(each.ty, FuncType)
        }
    for name, functions in imported.items():
        if not name.startswith("wasi:sockets/"):
            assert functions == set(OFFERED.get(name, {})), name
    assert set(OFFERED) <= set(imported)


async def test_a_program_has_its_arguments_environment_streams_and_exit_code(python: Run) -> None:
    program = source(
        """
        import os, sys
        print(sys.argv, dict(os.environ), sys.stdin.read(), __name__)
        print("said", file=sys.stderr)
        sys.exit(7)
        """
    )
    end = await python(program, "a", "b c", env={"HOME": "/"}, stdin=Pipe(b"in", closed=True))
    assert (end.kind, end.code) == ("exited", 7)
    assert python.out == b"['guest', 'a', 'b c'] {'HOME': '/'} in __main__\n"
    assert python.err == b"said\n"


async def test_an_exception_is_told_with_its_own_lines_alone(python: Run) -> None:
    assert (await python(b"def f():\n    1 / 0\n\nf()\n")).code == 1
    lines = python.err.decode().splitlines()
    assert lines[:2] == [
        "Traceback (most recent call last):",
        '  File "guest", line 4, in <module>',
    ]
    assert "    1 / 0" in lines
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert (await python(b"import sys; sys.exit('no')")).code == 1
    assert python.err == b"no\n"
    assert (await python(b"x = (")).code == 1
    assert b"SyntaxError" in python.err


async def test_an_archive_has_modules(python: Run) -> None:
    program = archive(
        __main__="""
            import sys
            import alone
            from package.inner import deep
            import package, pkgutil
            print(alone.VALUE, deep(), package.__file__)
            print(pkgutil.get_data("package", "inner.py")[:3])
            deep(True)
        """,
        alone="VALUE = 1",
        package__slash____init__="from . import inner",
        package__slash__inner="def deep(bad=False):\n    return 1 / 0 if bad else 'deep'\n",
    )
    assert (await python(program)).code == 1
    assert python.lines == ["1 deep package/__init__.py", "b'def'"]
    assert 'File "package/inner.py", line 2, in deep\n    return 1 / 0' in python.err.decode()
    assert (await python(archive(other="1"))).code == 1
    assert b"the archive has no __main__.py" in python.err


async def test_instances_share_nothing(python: Run) -> None:
    program = b"import json, os, random, secrets\njson.mark = getattr(json, 'mark', 0) + 1\n"
    program += b"print(json.mark, random.random(), os.urandom(8).hex(), secrets.token_hex(4))"
    said = []
    for _ in range(2):
        await python(program)
        said.append(python.out.decode().split())
    assert [each[0] for each in said] == ["1", "1"]
    for one, other in zip(said[0][1:], said[1][1:], strict=True):
        assert one != other


async def test_instances_that_wait_are_few_and_serve_one_guest_each(python: Run) -> None:
    program = b"import json\nassert not hasattr(json, 'mark')\njson.mark = 1"
    made: PythonDriver = python.driver  # type: ignore[assignment]  # of another kind
    for _ in range(3):
        ends = await asyncio.gather(*(python(program) for _ in range(5)))
        assert {end.code for end in ends} == {0}
        await python.until(lambda: len(made._ready) == driver.READY_MAX)
        waiting = set(made._ready)
        assert (await python(program)).code == 0
        assert len(waiting & set(made._ready)) == driver.READY_MAX - 1


async def test_a_large_program_comes_whole(python: Run) -> None:
    """In pieces."""
    text = b"ab" * (1 << 20)
    assert (
        await python(b"x = '" + text + b"'\nprint(x == 'ab' * (len(x) // 2), len(x))")
    ).code == 0
    assert python.lines == [f"True {len(text)}"]


async def test_a_short_function_calls_its_host_seldom(python: Run) -> None:
    """Each call takes the host fifty microseconds of Python, and the guest as long."""
    made: PythonDriver = python.driver  # type: ignore[assignment]  # of another kind
    called: list[str] = []

    def counted(name: str, function: Function) -> Function:
        def call(*args: object) -> object:
            called.append(name)
            return function(*args)

        return call

    offered = {
        interface: {name: counted(name, each) for name, each in functions.items()}
        for interface, functions in OFFERED.items()
    }
    path = await build.built(made._cache, made._threads)
    runner = Runner((await made._runner()).runtime, path, offered, RESOURCES)
    out = bytearray()
    limits = Limits(memory_bytes=driver.USUAL.memory_bytes - 65536)  # not one that waits already
    code = b"def f(x):\n    return x\n\n__import__('ww')._serve(f)\n"
    image = PythonImage("", code, runner, made)
    stdin = Pipe(cbor.encode([1]), closed=True)
    assert (
        await image.run(Spec(args=("f",), stdin=stdin, stdout=out.extend, limits=limits))
    ).code == 0
    assert cbor.decode(bytes(out), bytes_max=100, depth_max=4) == [True, 1]
    assert called.count("given") == called.count("[method]input-stream.read") == 1
    assert not {"code", "get-random-bytes"} & set(called)
    assert len(called) <= 9


async def test_time_passes_and_a_sleep_holds_nobody_up(python: Run) -> None:
    program = b"import time\na = time.monotonic()\ntime.sleep(0.2)\nprint(time.monotonic() - a)\n"
    program += b"print(time.time())"
    before = time.perf_counter()
    ends = [python(program) for _ in range(20)]
    assert {end.code for end in await asyncio.gather(*ends)} == {0}
    assert time.perf_counter() - before < 10 * 0.2
    slept, now = map(float, python.lines[-2:])
    assert 0.2 <= slept < 2
    assert abs(now - time.time()) < 5


async def test_stdin_comes_as_it_is_written(python: Run) -> None:
    stdin, heard = Pipe(), asyncio.Queue[bytes]()
    program = b"import sys\nfor line in sys.stdin:\n    print(line.upper(), end='', flush=True)"
    running = asyncio.ensure_future(python(program, stdin=stdin, stdout=heard.put_nowait))
    for word in (b"one\n", b"two\n"):
        await stdin.write(word)
        async with asyncio.timeout(60):
            assert await heard.get() == word.upper()
    stdin.close()
    assert (await running).code == 0


async def test_much_goes_in_and_out(python: Run) -> None:
    data = bytes(range(256)) * 4096 * 8
    program = b"import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())"
    assert (await python(program, stdin=Pipe(data, closed=True))).code == 0
    assert python.out == data


# --- capabilities ---


async def test_a_grant_is_an_object_with_methods(python: Run) -> None:
    async def say(data: bytes) -> bytes:
        await asyncio.sleep(0.01)
        return b"ack " + data

    program = source(
        """
        import ww
        out = ww.grant("out")
        print(out.say(data=b"one"), out.another().say(data=b"two"))
        print(out.hand_on(to=out, data=b"three"))
        """
    )
    assert (await python(program, grants={"out": say})).code == 0, python.err
    assert python.lines == ["b'ack one' b'1: ack two'", "b'ack three'"]


async def test_what_fails_is_an_error_with_its_code(python: Run) -> None:
    async def refuse(data: bytes) -> bytes:
        raise Revoked("it was revoked")

    program = source(
        """
        import ww
        for act in (
            lambda: ww.grant("other"),
            lambda: ww.grant("out").say(data=b""),
            lambda: ww.grant("out").nothing(),
            lambda: ww.grant("out").say(wrong=1),
            lambda: ww.grant("out").say(data=object()),
            lambda: ww.grant("out").say(data=2 ** 70),
            lambda: [ww.grant("out") for _ in range(9)],
        ):
            try:
                act()
            except Exception as exc:
                print(type(exc).__name__, getattr(exc, "code", ""))
        """
    )
    end = await python(program, grants={"out": refuse}, limits={"handles_max": 8})
    assert end.code == 0, python.err
    assert python.lines == [
        "Error not_found.grant",
        "Error capability.revoked",
        "Error unsupported",
        "Error invalid",
        "TypeError ",
        "ValueError ",
        "Error limit.handles",
    ]


async def test_it_offers_what_it_holds_to_its_spawner(python: Run) -> None:
    async def say(data: bytes) -> bytes:
        return data

    offered = {}
    program = source(
        """
        import ww
        out = ww.grant("out")
        ww.offer("given", out)
        ww.offer("made", out.another())
        """
    )
    end = await python(program, grants={"out": say}, offer=offered.__setitem__)
    assert end.code == 0, python.err
    assert sorted(offered) == ["given", "made"]


async def test_a_capability_that_nobody_holds_is_let_go(python: Run, servant: type) -> None:
    async def say(data: bytes) -> bytes:
        return data

    root = servant(say)
    program = b"import ww\nout = ww.grant('out')\nfor _ in range(100):\n    out.another()\n"
    end = await python(program, grants={"out": root}, limits={"handles_max": 3})
    assert end.code == 0, python.err
    await python.until(lambda: not root.alive)


# --- files ---

TRY = """
import os, sys
def tell(what, act):
    try:
        print(what, act())
    except OSError as exc:
        print(what, os.strerror(exc.errno) if exc.errno else exc)
"""


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A directory that is given to a program; `secret` is beside it."""
    inner = tmp_path / "given"
    (inner / "sub").mkdir(parents=True)
    (inner / "a.txt").write_text("of a")
    (inner / "sub" / "b").write_bytes(bytes(range(256)) * 1024)
    (inner / "in").symlink_to("sub/b")
    (tmp_path / "secret").write_text("secret")
    (inner / "out").symlink_to("../secret")
    (inner / "etc").symlink_to("/etc")
    return inner


async def test_it_reads_its_directories_and_cannot_change_them(python: Run, given: Path) -> None:
    program = TRY + dedent(
        """
        tell("read", lambda: open("/d/a.txt").read())
        tell("link", lambda: open("/d/in", "rb").read() == bytes(range(256)) * 1024)
        tell("seek", lambda: (lambda f: (f.seek(255), f.read(2)))(open("/d/sub/b", "rb")))
        tell("list", lambda: sorted(os.listdir("/d")))
        tell("scan", lambda: sorted(e.name for e in os.scandir("/d") if not e.is_symlink()))
        tell("stat", lambda: (os.stat("/d/a.txt").st_size, int(os.stat("/d/a.txt").st_mtime)))
        tell("readlink", lambda: os.readlink("/d/in"))
        tell("same", lambda: os.path.samefile("/d/a.txt", "/d/sub/../a.txt"))
        print("--")
        acts = {
            "write": lambda: open("/d/a.txt", "w"),
            "append": lambda: open("/d/a.txt", "a"),
            "update": lambda: open("/d/a.txt", "r+"),
            "create": lambda: open("/d/new", "x"),
            "mkdir": lambda: os.mkdir("/d/new"),
            "unlink": lambda: os.unlink("/d/a.txt"),
            "rmdir": lambda: os.rmdir("/d/sub"),
            "rename": lambda: os.rename("/d/a.txt", "/d/c"),
            "out": lambda: os.rename("/d/a.txt", "/tmp/c"),
            "in": lambda: (open("/tmp/c", "w").close(), os.rename("/tmp/c", "/d/c")),
            "hard": lambda: os.link("/d/a.txt", "/tmp/hard"),
            "symlink": lambda: os.symlink("a.txt", "/d/s"),
            "truncate": lambda: os.truncate("/d/a.txt", 0),
            "times": lambda: os.utime("/d/a.txt", (1, 1)),
        }
        for name, act in acts.items():
            tell(name, act)
        """
    )
    mtime = int((given / "a.txt").stat().st_mtime)
    end = await python(program.encode(), dirs={"/d": (given, False)})
    assert end.code == 0, python.err
    read, refused = python.out.decode().split("--\n")
    assert read.splitlines() == [
        "read of a",
        "link True",
        r"seek (255, b'\xff\x00')",
        "list ['a.txt', 'etc', 'in', 'out', 'sub']",
        "scan ['a.txt', 'sub']",
        f"stat (4, {mtime})",
        "readlink sub/b",
        "same True",
    ]
    for line in refused.splitlines():
        assert line.partition(" ")[2] in ("Read-only file system", "Bad file descriptor"), line
    assert len(refused.splitlines()) == 14
    assert (given / "a.txt").read_text() == "of a"
    assert int((given / "a.txt").stat().st_mtime) == mtime


async def test_no_path_leads_out_of_what_it_has(python: Run, given: Path) -> None:
    program = TRY + dedent(
        """
        os.symlink("../../../../etc", "/tmp/up")
        os.mkdir("/tmp/deep")
        for path in ("/d/out", "/d/etc/passwd", "/d/../secret", "/d/sub/../../secret",
                     "/tmp/up/passwd", "/tmp/../given/a.txt", "/etc/passwd", "/proc/self/environ"):
            tell(path, lambda: open(path).read())
        tell("absolute", lambda: os.symlink("/etc", "/tmp/abs"))
        tell("rename", lambda: os.rename("/tmp/deep", "/tmp/../deep"))
        tell("list", lambda: os.listdir("/d/.."))
        here = os.open("/tmp/deep", os.O_RDONLY | os.O_DIRECTORY)
        tell("at", lambda: os.open("../../../etc/passwd", os.O_RDONLY, dir_fd=here))
        """
    )
    assert (await python(program.encode(), dirs={"/d": (given, False)})).code == 0, python.err
    assert len(python.lines) == 12
    for line in python.lines:
        assert line.endswith(("Operation not permitted", "No such file or directory")), line


async def test_its_tmp_is_its_own_and_bounded_and_goes(python: Run, data_dir: Path) -> None:
    program = TRY + dedent(
        """
        import shutil, tempfile
        print(sorted(os.listdir("/tmp")))
        with tempfile.TemporaryFile() as file:
            file.write(b"some")
            file.seek(0)
            print(file.read())
        os.makedirs("/tmp/a/b")
        for mode in ("w", "a"):
            print(open("/tmp/a/f", mode).write("x" * 10))
        os.rename("/tmp/a/f", "/tmp/g")
        os.link("/tmp/g", "/tmp/h")
        os.truncate("/tmp/g", 5)
        os.utime("/tmp/g", (1, 2))
        print(os.stat("/tmp/h").st_atime)
        print(open("/tmp/h").read(), os.stat("/tmp/h").st_mtime)
        with open("/tmp/g", "r+b") as file:
            file.seek(2)
            file.write(b"yy")
        print(open("/tmp/g").read())
        shutil.rmtree("/tmp/a")
        os.unlink("/tmp/h")
        print(os.listdir("/tmp"))
        def fill():
            with open("/tmp/big", "wb") as file:
                for _ in range(40):
                    file.write(bytes(65536))
        tell("bytes", fill)
        print(os.path.getsize("/tmp/big") <= 1 << 20)
        tell("grow", lambda: os.truncate("/tmp/big", 1 << 40))
        os.unlink("/tmp/big")
        tell("names", lambda: [open(f"/tmp/n{i}", "x").close() for i in range(100)])
        tell("open", lambda: [open("/tmp/n1") for _ in range(300)])
        """
    )
    for _ in range(2):
        end = await python(program.encode(), limits={"tmp_bytes": 1 << 20, "tmp_files": 20})
        assert end.code == 0, python.err
        assert python.lines == [
            "[]",
            "b'some'",
            "10",
            "10",
            "1.0",
            "xxxxx 2.0",
            "xxyyx",
            "['g']",
            "bytes I/O error",
            "True",
            "grow Quota exceeded",
            "names Quota exceeded",
            "open Out of memory",
        ]
        assert list((data_dir / "tmp").iterdir()) == []


async def test_who_is_killed_leaves_no_files(python: Run, kill: Kill, data_dir: Path) -> None:
    program = b"import time\nfile = open('/tmp/x', 'wb')\nfile.write(bytes(20 << 20))\nprint(1)\n"
    running = asyncio.ensure_future(python(program + b"input()", stdin=Pipe()))
    await python.until(lambda: python.out)
    await kill(running)
    assert list((data_dir / "tmp").iterdir()) == []


async def test_files_that_never_end_hold_nobody_up(
    python: Run, lag: type[Lag], kill: Kill, given: Path
) -> None:
    for act in ("os.listdir('/d')", "open('/tmp/x', 'wb').write(bytes(1 << 20))", "os.stat('/d')"):
        program = f"import os\nwhile True: {act}".encode()
        running = asyncio.ensure_future(python(program, dirs={"/d": (given, False)}))
        await asyncio.sleep(0.1)
        async with lag() as measured:
            await asyncio.sleep(1.0)
            assert not running.done()
        assert measured.p99() < LAG_P99_S, act
        assert await kill(running) < 0.5


# --- hostile ones ---


SPINS = {
    "loop": b"while True: pass",
    "clock": b"import time\nwhile True: time.time()",
    "sleep": b"import time\nwhile True: time.sleep(0)",
    "print": b"while True: print('x' * 60000)",
    "regex": b"import re\nwhile True: re.match('(a*)*b', 'a' * 30)",
    "int": b"x = 3\nwhile True: x = pow(x, 3, 1 << 40000)",
    "fill": b"while True: bytes(24 << 20)",
}


@pytest.mark.parametrize("how", SPINS)
async def test_one_that_never_ends_holds_nobody_up_and_can_be_killed(
    python: Run, lag: type[Lag], kill: Kill, how: str
) -> None:
    running = asyncio.ensure_future(python(SPINS[how], stdout=lambda data: None))
    await asyncio.sleep(0.1)
    async with lag() as measured:
        await asyncio.sleep(1.0)
        assert not running.done()
    assert measured.p99() < LAG_P99_S
    assert await kill(running) < 0.5


async def test_many_starts_hold_nobody_up(python: Run, lag: type[Lag]) -> None:
    async with lag() as measured:
        for _ in range(10):
            ends = await asyncio.gather(*(python(b"print(1)") for _ in range(10)))
            assert {end.code for end in ends} == {0}
    assert measured.p99() < LAG_P99_S


@pytest.mark.parametrize(("limit", "why"), [({"cpu_s": 0.1}, "cpu_s"), ({"wall_s": 0.3}, "wall_s")])
async def test_a_loop_ends_at_its_limit(python: Run, limit: dict[str, float], why: str) -> None:
    end = await python(b"while True: pass", limits=limit)
    assert (end.kind, end.why) == ("limit", why)


async def test_who_waits_can_be_killed(python: Run, kill: Kill) -> None:
    for program in (b"input()", b"import time\ntime.sleep(3600)"):
        running = asyncio.ensure_future(python(program, stdin=Pipe()))
        await asyncio.sleep(0.1)
        assert await kill(running) < 0.5


async def test_memory_ends_at_its_limit(python: Run) -> None:
    program = b"x = []\ntry:\n    while True: x.append(bytearray(1 << 20))\n"
    program += b"except MemoryError: print(len(x))"
    assert (await python(program, limits={"memory_bytes": 64 << 20})).code == 0
    assert 16 < int(python.out) < 64
    end = await python(b"pass", limits={"memory_bytes": 8 << 20})
    assert (end.kind, end.why) == ("limit", "memory_bytes")


DEEP = {
    "call": b"def f(): f()\nf()",
    "hook": b"class A:\n    def __getattr__(self, n): return getattr(self, n)\nA().x",
    "parser": b"eval('(' * 5000 + ')' * 5000)",
    "regex": b"import re\nre.compile('(' * 5000 + ')' * 5000)",
    "json": b"import json\njson.loads('[' * 100000)",
    "repr": b"x = []\nfor _ in range(100000): x = [x]\nrepr(x)",
    "free": b"x = []\nfor _ in range(1000000): x = [x]\ndel x",
    "raised": b"import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
}


@pytest.mark.parametrize("how", DEEP)
async def test_deep_recursion_ends_the_program_and_nothing_else(python: Run, how: str) -> None:
    end = await python(DEEP[how])
    if end.kind == "exited":
        assert how == "free" or b"RecursionError" in python.err or b"MemoryError" in python.err
    else:
        assert (end.kind, end.why) == ("limit", "stack") or end.kind == "trapped"
    assert (await python(b"print('still here')")).code == 0


async def test_there_is_nothing_beside_the_grants(python: Run) -> None:
    program = source(
        """
        import os, socket, subprocess, threading, urllib.request
        acts = {
            "open": lambda: open("/etc/passwd"),
            "write": lambda: open("/x", "w"),
            "out of tmp": lambda: open("/tmp/../x", "w"),
            "relative": lambda: open("../x"),
            "list": lambda: os.listdir("/"),
            "stat": lambda: os.stat("/proc/self"),
            "connect": lambda: socket.create_connection(("127.0.0.1", 22)),
            "resolve": lambda: socket.getaddrinfo("example.org", 80),
            "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "listen": lambda: socket.create_server(("127.0.0.1", 0)),
            "get": lambda: urllib.request.urlopen("http://127.0.0.1/"),
            "run": lambda: subprocess.run(["true"]),
            "fork": lambda: os.fork(),
            "thread": lambda: threading.Thread(target=print).start(),
            "kill": lambda: os.kill(1, 9),
            "ctypes": lambda: __import__("ctypes"),
            "fd": lambda: os.read(3, 1),
        }
        for name, act in acts.items():
            try:
                act()
            except (OSError, AttributeError, RuntimeError, ImportError) as exc:
                pass
            else:
                print("did", name)
        print("done", dict(os.environ))
        """
    )
    assert (await python(program)).code == 0, python.err
    assert python.lines == ["done {}"]


async def test_output_is_not_faster_than_its_limit(python: Run) -> None:
    program = b"import sys\nfor _ in range(48): sys.stdout.write('x' * 65536)"
    before = time.monotonic()
    assert (await python(program, limits={"output_bytes_s": 1 << 20})).code == 0
    assert time.monotonic() - before > 1.5  # 3 MiB, of which the first second's are free


async def test_a_reader_who_has_gone_is_a_broken_pipe(python: Run) -> None:
    def gone(data: bytes) -> None:
        raise BrokenPipeError

    assert (await python(b"while True: print('x' * 9000)", stdout=gone)).code == 1
    assert b"BrokenPipeError" in python.err or b"Errno" in python.err


# --- the driver ---


async def test_what_is_too_large_is_refused(python: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CodeRefused, match=str(driver.CODE_BYTES_MAX)):
        await python.driver.load(bytes(driver.CODE_BYTES_MAX + 1))
    monkeypatch.setattr(driver, "CODES_BYTES_MAX", 1000)
    kept = await python.driver.load(b"#" * 900)
    with pytest.raises(LimitExceeded, match="at most 1000"):
        await python.driver.load(b"#" * 101)
    del kept
    await python.driver.load(b"#" * 101)


async def test_a_node_without_the_package_says_so_and_keeps_the_rest(
    driver: WasmDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_PACKAGE", "no_such_package")
    async with aclosing(PythonDriver(tmp_path, driver)) as made:
        with pytest.raises(DriverUnavailable, match="componentize-py") as refused:
            await made.load(b"pass")
    assert refused.value.hint == "pip install 'wetware[proc]' there"


async def test_a_build_that_failed_is_tried_again_later(
    driver: WasmDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wetware_proc.python import driver as module

    builds = []

    async def built(cache: Cache, threads: object) -> Path:
        builds.append(cache)
        raise InternalError("it fails")

    monkeypatch.setattr(module, "built", built)
    async with aclosing(PythonDriver(tmp_path, driver)) as made:
        for _ in range(3):
            with pytest.raises(InternalError):
                await made.load(b"pass")
        assert len(builds) == 1
        monkeypatch.setattr(module, "RETRY_S", 0.0)
        with pytest.raises(InternalError):
            await made.load(b"pass")
        assert len(builds) == 2


async def test_the_first_calls_of_a_function_may_be_made_by_several_threads(
    python: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each guest computes first, so that workers poll it, and asks for the time at last."""
    from wetware_proc.python import component

    class Slow:
        """A type that others ask for as well while it is found out."""

        @staticmethod
        def _from_ptr(*args: object, **kwargs: object) -> object:
            time.sleep(0.01)
            return found(*args, **kwargs)

    found = component.FuncType._from_ptr
    monkeypatch.setattr(component, "FuncType", Slow)
    program = b"x = [i * i for i in range(100000)]\nimport time\ntime.time()\ntime.monotonic()"
    ends = await asyncio.gather(*(python(program) for _ in range(8)))
    assert {end.code for end in ends} == {0}, python.err
    assert (await python(b"import time\nprint(time.time() > 0)")).code == 0
