"""The driver of WebAssembly: `load` compiles or finds machine code; an image runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Literal

from wetware.base.log import get_logger
from wetware.base.threads import Threads, to_its_end
from wetware_proc.driver import CodeRefused, Exit, Image, Spec, digest_of
from wetware_proc.wasm import caps, files, wasi
from wetware_proc.wasm.caps import Caps
from wetware_proc.wasm.compile import Cache, Compiler, clean
from wetware_proc.wasm.engine import Fiber, OverLimit, Program, Runtime, Trapped, Workers
from wetware_proc.wasm.wasi import Wasi

IMAGES_MAX: Final = 64
"""That stay loaded when nobody runs them."""

log = get_logger("proc.wasm")


class WasmImage(Image):
    """A module that is compiled, loaded and linked."""

    def __init__(self, digest: str, programs: Sequence[Program], driver: WasmDriver) -> None:
        super().__init__(digest, "wasm")
        self._programs, self._driver = programs, driver

    async def run(self, spec: Spec) -> Exit:
        """See Image."""
        limits, driver = spec.limits, self._driver
        fiber = Fiber(
            self._programs, memory_bytes=limits.memory_bytes, cpu_s=limits.cpu_s, owner=spec.owner
        )
        async with driver.tmp() as tmp:
            world = Wasi(fiber, spec, tmp, driver.disk)
            handles = Caps(fiber, spec)
            fiber.hosts = (world, handles)
            try:
                return await life(fiber, limits.wall_s, handles.sent.wait)
            finally:
                if handles.sent:
                    await to_its_end(handles.sent.end())
                handles.close()
                await world.close()
                fiber.hosts = ()  # they know each other: this frees them now


@contextlib.asynccontextmanager
async def wasm_driver(data_dir: Path) -> AsyncIterator[WasmDriver]:
    """A driver that keeps machine code and the files of its guests below `data_dir`, alone.

    Leave it when no guest of it runs.
    """
    tmp = data_dir / "tmp"
    tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
    driver = WasmDriver(data_dir)
    try:
        for left in tmp.iterdir():  # by a node that was killed
            await driver.remove(left)
        yield driver
    finally:
        await driver.aclose()


class WasmDriver:
    """See `wasm_driver`, and wetware_proc.driver.Driver."""

    def __init__(self, data_dir: Path) -> None:
        self._threads, self.disk = Threads(), Threads()  # guests' files keep no load waiting
        self.workers = Workers(max(2, os.cpu_count() or 1))
        self._runtimes = _runtimes(self.workers)
        self._compiler = Compiler(Cache(data_dir / "compiled"), self._threads)
        self._tmp = data_dir / "tmp"
        self._images: OrderedDict[str, asyncio.Task[WasmImage]] = OrderedDict()

    async def load(self, code: bytes) -> WasmImage:
        """See Driver. What is being loaded is loaded once. Raises LimitExceeded as well.

        Who calls it bounds how many are loaded at a time.
        """
        files.check_kernel()
        digest = await digest_of(code, self._threads)
        if (task := self._images.get(digest)) is None:
            task = self._images[digest] = asyncio.ensure_future(self._load(code, digest))
            task.add_done_callback(partial(self._loaded, digest))
        self._images.move_to_end(digest)
        return await asyncio.shield(task)

    @contextlib.asynccontextmanager
    async def tmp(self) -> AsyncIterator[Callable[[], int]]:
        """What opens an own directory for a guest, which is made then: most never look there."""
        made: Path | None = None

        def opened() -> int:
            nonlocal made
            if made is None:  # else the last one that was to be opened could not be
                path = self._tmp / secrets.token_hex(16)
                path.mkdir(mode=0o700)
                made = path
            return files.opening(made)()

        try:
            yield opened
        finally:
            if made is not None:
                await self.remove(made)

    async def remove(self, tmp: Path) -> None:
        """Remove a directory of a guest."""
        await to_its_end(self._threads.run(files.remove_tree, tmp))

    async def aclose(self) -> None:
        """Stop compiling, and let go of all."""
        tasks = list(self._images.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._images.clear()
        self.workers.threads.shutdown()  # before what interrupts a guest that was left behind
        for runtime in self._runtimes:
            runtime.close()

    async def _load(self, code: bytes, digest: str) -> WasmImage:
        path = await self._compiler.compiled(code, digest)
        try:
            try:
                programs = await self._threads.run(self._programs, path)
            except LookupError:  # another processor, say: the data directory has moved
                path = await self._compiler.compiled(code, digest, afresh=True)
                programs = await self._threads.run(self._programs, path)
        except ValueError as exc:
            raise CodeRefused(f"this module is no program for wetware: {clean(str(exc))}") from exc
        return WasmImage(digest, programs, self)

    def _programs(self, path: Path) -> list[Program]:
        *pools, last = self._runtimes
        found = [last.load(path)]
        for pool in pools:
            with contextlib.suppress(LookupError):  # it has several tables, say
                found.insert(0, pool.load(path))
        return found

    def _loaded(self, digest: str, done: asyncio.Task[WasmImage]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._images.pop(digest, None)
        loaded = [name for name, each in self._images.items() if each.done()]
        for name in loaded[: max(0, len(loaded) - IMAGES_MAX)]:
            del self._images[name]


def _runtimes(workers: Workers) -> list[Runtime]:
    """A quick one, where this machine has the room, and one that has room for every guest."""
    imports = [wasi.IMPORTS, caps.IMPORTS]
    found = [Runtime(imports, workers)]
    try:
        found.insert(0, Runtime(imports, workers, pooled=True))
    except OSError as exc:
        log.info("pool.absent", why=f"programs start more slowly: {exc.strerror}")
    return found


async def life(fiber: Fiber, wall_s: float, finish: Callable[[], Awaitable[None]]) -> Exit:
    """Run a guest to its end, and then what it has left to be done."""

    def ended(kind: Literal["exited", "trapped", "limit"], code: int = -1, why: str = "") -> Exit:
        return Exit(kind, code, why, fiber.cpu_ns / 1e9)

    timeout = asyncio.timeout(wall_s)
    try:
        async with timeout:
            code = await fiber.run()
            await finish()
    except TimeoutError:
        if not timeout.expired():
            raise
        return ended("limit", why="wall_s")
    except OverLimit as exc:
        return ended("limit", why=str(exc))
    except Trapped as exc:
        return ended("trapped", why=str(exc))
    return ended("exited", code)
