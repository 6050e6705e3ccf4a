"""The pool: what guests leave there is gone before the next one comes, and others live without."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from wasmtime import wat2wasm

from wetware_proc.driver import Exit, Pipe
from wetware_proc.wasm import engine
from wetware_proc.wasm.driver import WasmDriver, wasm_driver

if TYPE_CHECKING:
    from plugins.proc.tests.conftest import Run

Kill = Callable[["asyncio.Task[Exit]"], Awaitable[float]]

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]  # the first builds the C library

IMAGE = 0x0123456789ABCDEF
ENDS = {
    "exited": "",
    "trapped": "unreachable",
    "killed": """(drop (call $write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 32)))
        (loop $more (br $more))""",
}


def leaves(end: str, *, image: bool, looks_again: bool = False) -> bytes:
    """A guest that exits with a number where something is not as new, and changes it all."""
    data = "".join(f"\\{each:02x}" for each in IMAGE.to_bytes(8, "little"))
    return bytes(
        wat2wasm(f"""(module
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (import "wasi_snapshot_preview1" "fd_write"
            (func $write (param i32 i32 i32 i32) (result i32)))
        (memory (export "memory") 2)
        (data (i32.const {0 if image else 1 << 16}) "{data if image else ""}")
        (table $table 600 funcref)
        (elem declare func $look)
        (global $global (mut i64) (i64.const 7))
        (func $zeros (param $at i32)
            (loop $more
                (if (i64.ne (i64.load (local.get $at)) (i64.const 0))
                    (then (call $exit (i32.const 1))))
                (local.set $at (i32.add (local.get $at) (i32.const 8)))
                (br_if $more (i32.lt_u (local.get $at)
                    (i32.mul (memory.size) (i32.const 65536))))))
        (func $look (local $at i32)
            (if (i64.ne (i64.load (i32.const 0)) (i64.const {IMAGE if image else 0}))
                (then (call $exit (i32.const 2))))
            (call $zeros (i32.const 8))
            (drop (memory.grow (i32.const 14)))
            (call $zeros (i32.const 131072))
            (if (i64.ne (global.get $global) (i64.const 7)) (then (call $exit (i32.const 3))))
            (loop $more
                (if (i32.eqz (ref.is_null (table.get $table (local.get $at))))
                    (then (call $exit (i32.const 4))))
                (local.set $at (i32.add (local.get $at) (i32.const 1)))
                (br_if $more (i32.lt_u (local.get $at) (table.size $table)))))
        (func (export "_start")
            (call $look)
            (memory.fill (i32.const 0) (i32.const 165) (i32.mul (memory.size) (i32.const 65536)))
            (global.set $global (i64.const 8))
            (drop (table.grow $table (ref.func $look) (i32.const 600)))
            (table.fill $table (i32.const 0) (ref.func $look) (table.size $table))
            {"(call $look)" if looks_again else ""}
            (i64.store (i32.const 16) (i64.const 0x1_0000_0000))
            {ENDS[end]}))""")
    )


@pytest.fixture
def places_max() -> int:
    return 1


@pytest.fixture
async def driver(
    data_dir: Path, anyio_backend: str, monkeypatch: pytest.MonkeyPatch, places_max: int
) -> AsyncIterator[WasmDriver]:
    """With a pool of so many places."""
    monkeypatch.setattr(engine, "POOLED_MAX", places_max)
    async with wasm_driver(data_dir) as made:
        yield made


def free(driver: WasmDriver) -> int:
    places = driver._runtimes[0]._places
    assert places is not None
    return places._value


async def test_nothing_of_a_guest_is_there_for_the_next(
    run: Run, kill: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory, what it grew by, a table and a global; each lives where the last one has died."""
    monkeypatch.setattr(
        run.driver._runtimes[-1], "take", lambda: pytest.fail("it is not in the pool")
    )
    looks = await run(leaves("exited", image=False, looks_again=True))
    assert (looks.kind, looks.code) == ("exited", 2), "what is there would be seen"
    rng = random.Random(7)
    guests = [(end, leaves(end, image=image)) for end in ENDS for image in (True, False)]
    for _ in range(300):
        end, code = rng.choice(guests)
        await run.until(lambda: free(run.driver))
        if end == "killed":
            written: list[bytes] = []
            running = asyncio.ensure_future(run(code, stdout=written.append))
            await run.until(partial(len, written))
            await kill(running)
        else:
            found = await run(code)
            assert (found.kind, max(found.code, 0)) == (end, 0)


@pytest.mark.parametrize("places_max", [2])
async def test_guests_beyond_the_pool_live_without_it(run: Run, kill: Kill) -> None:
    """And their places are free again, however they end; also of who has much to free."""
    for _ in range(3):
        waiting = [asyncio.ensure_future(run("cat", "ready", stdin=Pipe())) for _ in range(4)]
        await run.until(lambda: len(run.err) or free(run.driver) == 0)
        assert (await run("hello")).code == 0
        assert (free(run.driver), run.out) == (0, b"hello\n")
        for each in waiting:
            await kill(each)
        await run.until(lambda: free(run.driver) == 2)
        assert (await run("hostile", "abort")).kind == "trapped"
        assert (await run("hostile", "memory", limits={"memory_bytes": 16 << 20})).code == 0
        await run.until(lambda: free(run.driver) == 2)


async def test_a_module_that_does_not_fit_the_pool_lives_without_it(run: Run) -> None:
    code = wat2wasm('(module (table 1 funcref) (table 1 funcref) (func (export "_start")))')
    image = await run.driver.load(bytes(code))
    assert [program.runtime for program in image._programs] == run.driver._runtimes[1:]
    assert (await run(bytes(code))).code == 0


async def test_a_machine_without_room_for_the_pool_does_without_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "POOLED_MAX", 1 << 20)
    with caplog.at_level("INFO"):
        async with wasm_driver(tmp_path / "small") as run.driver:
            assert (await run("hello")).code == 0
            assert len(run.driver._runtimes) == 1
    (said,) = [each for each in caplog.records if each.getMessage() == "pool.absent"]
    assert "Cannot allocate memory" in str(vars(said))


def test_a_pool_for_which_there_is_no_room_never_ends_the_process() -> None:
    """As the engine would: with each limit of address space, from too little to enough."""
    script = """if True:
        import resource
        from wetware_proc.wasm import engine
        engine.POOLED_MAX = 16
        made = []
        for gib in range(20, 220, 4):
            resource.setrlimit(resource.RLIMIT_AS, (gib << 30, -1))
            try:
                engine.new_engine(pooled=True).close()
                made.append(True)
            except OSError:
                made.append(False)
        print(made[0], made[-1], sorted(made) == made)
    """
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["False", "True", "True"]
