"""Guests in C, compiled once, and a driver to run them with."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from wetware_proc.driver import Exit, Limits, Spec
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


class Run:
    """Runs guests; `out` and `err` are what the last one wrote."""

    def __init__(self, driver: WasmDriver, guests: Guests, data_dir: Path) -> None:
        self.driver, self._guests, self._data_dir = driver, guests, data_dir
        self.out, self.err = bytearray(), bytearray()

    async def __call__(self, guest: str | bytes, *args: str, **spec: object) -> Exit:
        code = self._guests(guest) if isinstance(guest, str) else guest
        name = guest if isinstance(guest, str) else "guest"
        self.out, self.err = out, err = bytearray(), bytearray()
        given = {"stdout": out.extend, "stderr": err.extend, **spec}
        limits = given.pop("limits", {})
        assert isinstance(limits, dict)
        image = await self.driver.load(code)
        whole = Spec(args=(name, *args), limits=Limits(**{"wall_s": 60.0, **limits}), **given)  # type: ignore[arg-type]  # what a test gives
        return await self.driver.run(image, whole)

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
def run(driver: WasmDriver, guests: Guests, data_dir: Path) -> Run:
    return Run(driver, guests, data_dir)


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
