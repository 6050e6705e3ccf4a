"""The driver of Python: `load` keeps a program, `run` makes an instance of the runner for it."""

from __future__ import annotations

import asyncio
import time
import weakref
from pathlib import Path
from typing import Final

from wetware.base.tasks import Tasks
from wetware.base.threads import Threads
from wetware.errors import LimitExceeded
from wetware_proc.driver import CodeRefused, Exit, Image, Limits, Spec, digest_of
from wetware_proc.python.build import CACHE_BYTES_MAX, STACK_BYTES, built
from wetware_proc.python.component import PythonFiber, Runner
from wetware_proc.python.world import OFFERED, RESOURCES, World
from wetware_proc.wasm.compile import Cache
from wetware_proc.wasm.driver import WasmDriver, life
from wetware_proc.wasm.engine import Runtime

KIND: Final = "python"
CODE_BYTES_MAX: Final = 16 << 20  # of one program
CODES_BYTES_MAX: Final = 256 << 20  # of all that are loaded
READY_MAX: Final = 2  # instances that are made before their guests are there: each serves one guest
USUAL: Final = Limits()
RETRY_S: Final = 60.0  # after a build that failed


class PythonImage(Image):
    """Source, or a zip archive that has a `__main__.py`."""

    def __init__(self, digest: str, code: bytes, runner: Runner, driver: PythonDriver) -> None:
        super().__init__(digest, KIND)
        self.code, self.runner, self._driver = code, runner, driver

    async def run(self, spec: Spec) -> Exit:
        return await self._driver.run(self, spec)


class PythonDriver:
    """See wetware_proc.driver.Driver. Close it when no guest of it runs.

    It keeps its runner below `data_dir`, alone; threads and /tmp are those of another driver.
    """

    def __init__(self, data_dir: Path, wasm: WasmDriver) -> None:
        self._cache = Cache(data_dir / KIND, CACHE_BYTES_MAX)
        self._wasm, self._threads = wasm, Threads()
        self._runtime: Runtime | None = None
        self._making: asyncio.Future[Runner] | None = None
        self._failed_at = 0.0
        self._bytes = self._preparing = 0
        self._ready: list[PythonFiber] = []
        self._tasks = Tasks()

    async def load(self, code: bytes) -> PythonImage:
        """See Driver. Raises LimitExceeded and InternalError as well."""
        size = len(code)
        if size > CODE_BYTES_MAX:
            raise CodeRefused(f"the program has {size} bytes: at most {CODE_BYTES_MAX}")
        if self._bytes + size > CODES_BYTES_MAX:
            raise LimitExceeded(
                f"the Python programs that are loaded have {self._bytes} bytes, and this one has "
                f"{size}: at most {CODES_BYTES_MAX}",
                hint="try again, or at another node",
            )
        digest = await digest_of(code, self._threads)
        image = PythonImage(digest, code, await self._runner(), self)
        self._bytes += size
        weakref.finalize(image, self._forget, size)
        return image

    async def run(self, image: PythonImage, spec: Spec) -> Exit:
        limits = spec.limits
        fiber = self._fiber(image.runner, limits.memory_bytes)
        fiber.take(limits.memory_bytes, limits.cpu_s, spec.owner)
        async with self._wasm.tmp() as tmp:
            world = World(fiber, spec, image.code, tmp)
            fiber.hosts = (world,)
            try:
                return await life(fiber, limits.wall_s, _nothing)
            finally:
                await world.close(self._wasm.disk)
                fiber.hosts = ()
                self._tasks.start(self._prepare(image.runner))

    def _fiber(self, runner: Runner, memory_bytes: int) -> PythonFiber:
        if self._ready and memory_bytes >= USUAL.memory_bytes:
            return self._ready.pop()
        return PythonFiber(runner, memory_bytes=memory_bytes, cpu_s=0.0)

    async def _prepare(self, runner: Runner) -> None:
        if len(self._ready) + self._preparing >= READY_MAX:
            return
        self._preparing += 1
        fiber = PythonFiber(runner, memory_bytes=USUAL.memory_bytes, cpu_s=USUAL.cpu_s)
        fiber.leave_loop()
        try:
            await fiber.prepare()
        except BaseException:
            fiber.close()
            raise
        finally:
            self._preparing -= 1
        self._ready.append(fiber)

    async def aclose(self) -> None:
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)
        await self._tasks.end()
        while self._ready:
            self._ready.pop().close()
        if self._runtime is not None:
            self._runtime.close()

    async def _runner(self) -> Runner:
        again = self._failed_at and time.monotonic() > self._failed_at + RETRY_S
        if self._making is None or again:
            self._failed_at = 0.0
            self._making = asyncio.ensure_future(self._make())
        return await asyncio.shield(self._making)

    async def _make(self) -> Runner:
        try:
            path = await built(self._cache, self._threads)
            if self._runtime is None:
                self._runtime = Runtime([], self._wasm.workers, STACK_BYTES)
            return await self._threads.run(Runner, self._runtime, path, OFFERED, RESOURCES)
        except Exception:
            self._failed_at = time.monotonic()
            raise

    def _forget(self, size: int) -> None:
        self._bytes -= size


async def _nothing() -> None:
    pass
