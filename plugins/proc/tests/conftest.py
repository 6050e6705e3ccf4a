"""Guests in C, compiled once, and a driver to run them with."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from wetware import rpc
from wetware_proc.driver import Exit, Limits, Spec
from wetware_proc.python import build
from wetware_proc.python.driver import PythonDriver
from wetware_proc.wasm.compile import Cache
from wetware_proc.wasm.driver import WasmDriver, WasmImage, wasm_driver

SOURCES = Path(__file__).parent / "guests"
FLAGS = ("-target", "wasm32-wasi", "-Os", "-s", "-Wno-unused-result", "-Wl,-z,stack-size=65536")

Guests = Callable[[str], bytes]


@pytest.fixture(scope="session")
def guests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Guests:
    """The module of a source file. The first of all builds the C library, too: about a minute."""
    pytest.importorskip("ziglang", reason="needs the extra: pip install -e '.[dev]'")
    cache = getattr(request.config, "cache", None)
    root = cache.mkdir("proc-guests") if cache is not None else tmp_path_factory.mktemp("guests")
    environment = {
        **os.environ,
        "ZIG_GLOBAL_CACHE_DIR": f"{root}/zig",
        "ZIG_LOCAL_CACHE_DIR": f"{root}/zig",
    }

    def compiled(name: str) -> bytes:
        texts = [path.read_text() for path in sorted(SOURCES.glob("*.h"))]
        texts += [(SOURCES / f"{name}.c").read_text(), *FLAGS, version("ziglang")]
        path = root / f"{name}-{hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}.wasm"
        with (root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                part = path.with_suffix(".part")
                zig = [sys.executable, "-m", "ziglang", "cc", *FLAGS]
                subprocess.run(
                    [*zig, "-o", part, SOURCES / f"{name}.c"], check=True, env=environment
                )
                part.replace(path)
        return path.read_bytes()

    # With the library, before a test has a connection that asks now and then whether it lives.
    compiled("hello")
    return compiled


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests of this process, one after the other: what is compiled stays compiled."""
    return tmp_path_factory.mktemp("proc")


@pytest.fixture
async def driver(data_dir: Path, anyio_backend: str) -> AsyncIterator[WasmDriver]:
    async with wasm_driver(data_dir) as made:
        yield made
    assert list((data_dir / "tmp").iterdir()) == [], "no guest leaves files behind"


@pytest.fixture(scope="session")
def python_runner(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], None]:
    """Gives a node's data directory of the plugin a runner of Python; built once: a minute."""
    pytest.importorskip("componentize_py", reason="needs the extra: pip install -e '.[dev]'")
    kept = getattr(request.config, "cache", None)
    root = kept.mkdir("proc-python") if kept is not None else tmp_path_factory.mktemp("python")
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache = Cache(root / "compiled")
        if (found := cache.find(build.digest())) is None:
            part = cache.part()
            builder = [sys.executable, "-m", build.__name__, str(os.getpid())]
            with part.open("xb") as out:
                subprocess.run(builder, stdout=out, check=True, timeout=build.WALL_S_MAX)
            found = cache.add(build.digest(), part)

    def give(data_dir: Path) -> None:
        kept = data_dir / "python" / found.name
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, kept)

    return give


@pytest.fixture
async def python(
    data_dir: Path, driver: WasmDriver, python_runner: Callable[[Path], None], tmp_path: Path
) -> AsyncIterator[Run]:
    """Runs Python, as `run` runs modules."""
    python_runner(data_dir)
    async with aclosing(PythonDriver(data_dir, driver)) as made:
        yield Run(made, str.encode, data_dir, tmp_path)  # type: ignore[arg-type]  # of another kind


ECHO = rpc.load(Path(__file__).with_name("echo.capnp")).Echo
Say = Callable[[bytes], Awaitable[bytes]]


class Echo(rpc.Servant, interface=ECHO):
    """Answers with what `say` makes of the data.

    Attributes:
        alive: Those that somebody holds, of a root and all that came of it.
    """

    def __init__(self, say: Say, root: Echo | None = None) -> None:
        self._say = say
        self.alive: set[Echo] = root.alive if root else set()
        if root:
            self.alive.add(self)

    def released(self) -> None:
        self.alive.discard(self)

    async def say(self, data: bytes) -> dict[str, object]:
        return {"data": await self._say(data)}

    async def another(self) -> dict[str, object]:
        number = len(self.alive) + 1

        async def say(data: bytes) -> bytes:
            return b"%d: %s" % (number, await self._say(data))

        return {"echo": Echo(say, self)}

    async def hand_on(self, to: rpc.Ref, data: bytes) -> dict[str, object]:
        reply: dict[str, object] = await to.say(data=data)
        return reply

    async def many(self, count: int) -> dict[str, object]:
        return {"echoes": [Echo(self._say, self) for _ in range(count)]}

    async def untyped(self, named: int) -> dict[str, object]:
        return {"cap": Echo(self._say, self), "interface": named}

    async def stream(self) -> dict[str, object]:
        return {"stream": rpc.ByteStream().servant}


class Run:
    """Runs guests; `out` and `err` are what the last one wrote."""

    def __init__(self, driver: WasmDriver, guests: Guests, data_dir: Path, sockets: Path) -> None:
        self.driver, self._guests, self._data_dir = driver, guests, data_dir
        self._sockets = sockets
        self.out, self.err = bytearray(), bytearray()

    async def __call__(
        self,
        guest: str | bytes,
        *args: str,
        grants: dict[str, Say | Echo] | None = None,
        **spec: object,
    ) -> Exit:
        async with AsyncExitStack() as stack:
            refs = {
                name: await stack.enter_async_context(
                    self.granted(each if isinstance(each, Echo) else Echo(each))
                )
                for name, each in (grants or {}).items()
            }
            return await self.with_refs(guest, *args, grants=refs, **spec)

    @asynccontextmanager
    async def granted(self, servant: rpc.Servant) -> AsyncIterator[rpc.Ref]:
        """A reference to it, as a user's connection gives one."""
        socket = self._sockets / secrets.token_hex(4)
        async with (
            rpc.runtime(),
            rpc.serve_unix(socket, lambda peer: servant),
            await rpc.connect_unix(socket) as connection,
        ):
            yield connection.bootstrap(ECHO)

    async def with_refs(self, guest: str | bytes, *args: str, **spec: object) -> Exit:
        code = self._guests(guest) if isinstance(guest, str) else guest
        name = guest if isinstance(guest, str) else "guest"
        self.out, self.err = out, err = bytearray(), bytearray()
        given = {"stdout": out.extend, "stderr": err.extend, **spec}
        limits = given.pop("limits", {})
        assert isinstance(limits, dict)
        image = await self.driver.load(code)
        whole = Spec(args=(name, *args), limits=Limits(**{"wall_s": 60.0, **limits}), **given)  # type: ignore[arg-type]  # what a test gives
        return await image.run(whole)

    def guest(self, name: str) -> bytes:
        return self._guests(name)

    async def image(self, guest: str) -> WasmImage:
        return await self.driver.load(self._guests(guest))

    def compiled(self) -> list[Path]:
        """The machine code that is kept."""
        return sorted(self._data_dir.glob("compiled/*.cwasm"))

    async def until(self, condition: Callable[[], object]) -> None:
        """Return when the condition is met, which no one event tells of."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.001)

    @property
    def lines(self) -> list[str]:
        return self.out.decode().splitlines()


@pytest.fixture
def run(driver: WasmDriver, guests: Guests, data_dir: Path, tmp_path: Path) -> Run:
    return Run(driver, guests, data_dir, tmp_path)


class Lag:
    """How late a timer of 2 ms is while the block runs, for reasons that are this process's own.

    Where the machine is busy with other things the thread of the loop waits for a core: the kernel
    says for how long, and that is taken off.
    """

    STEP_S = 0.002

    async def __aenter__(self) -> Lag:
        self._late: list[float] = []
        self._task = asyncio.ensure_future(self._measure())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _measure(self) -> None:
        path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        with open(path, "rb", buffering=0) as schedstat:  # noqa: ASYNC230 - the kernel's memory

            def without_a_core_s() -> float:
                schedstat.seek(0)
                return int(schedstat.read().split()[1]) / 1e9

            while True:
                before, waited_s = time.perf_counter(), without_a_core_s()
                await asyncio.sleep(self.STEP_S)
                late_s = time.perf_counter() - before - self.STEP_S
                self._late.append(late_s - (without_a_core_s() - waited_s))

    def p99(self) -> float:
        """In s."""
        return sorted(self._late)[int(0.99 * (len(self._late) - 1))]

    def worst(self) -> float:
        """In s."""
        return max(self._late)


@pytest.fixture
def servant() -> type[Echo]:
    return Echo


@pytest.fixture
def lag() -> type[Lag]:
    return Lag


async def killed(running: asyncio.Task[Exit]) -> float:
    """Kill; returns how long it took, in s."""
    before = time.perf_counter()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    return time.perf_counter() - before


@pytest.fixture
def kill() -> Callable[[asyncio.Task[Exit]], object]:
    return killed
