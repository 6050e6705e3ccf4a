"""Guests that mean harm: each is held to its limits, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from wasmtime import wat2wasm

from wetware_proc.driver import CodeRefused, Exit, Pipe
from wetware_proc.wasm import compile as compiling
from wetware_proc.wasm import engine, files
from wetware_proc.wasm.driver import wasm_driver

if TYPE_CHECKING:
    from plugins.proc.tests.conftest import Echo, Lag, Run

Kill = Callable[["asyncio.Task[Exit]"], Awaitable[float]]

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]  # the first builds the C library

LAG_P99_S = 0.025


async def beside(
    run: Run, lag: type[Lag], kill: Kill, *args: str, **spec: object
) -> tuple[float, float]:
    """p99 of the loop's lag beside a guest that never ends, and how long killing it took, in s."""
    running = asyncio.ensure_future(run("hostile", *args, **spec))
    await asyncio.sleep(0.05)
    async with lag() as measured:
        await asyncio.sleep(1.0)
        assert not running.done()
    return measured.p99(), await kill(running)


@pytest.mark.parametrize(
    "how",
    ["spin", "clock", "yield", "fill", "flood", "drip", "poll", "path",
     ["arguments", *["x" * 200] * 4000]],
    ids=lambda how: how if isinstance(how, str) else how[0],
)  # fmt: skip
async def test_a_guest_that_never_ends_holds_nobody_up_and_can_be_killed(
    run: Run, lag: type[Lag], kill: Kill, how: str | list[str]
) -> None:
    """An infinite loop; loops of calls; one instruction that fills 48 MiB; floods of output."""
    args = [how] if isinstance(how, str) else how
    late_s, killed_s = await beside(run, lag, kill, *args, stdout=lambda data: None)
    assert late_s < LAG_P99_S
    assert killed_s < 0.5


async def test_more_spinners_than_cores_hold_nobody_up(
    run: Run, lag: type[Lag], kill: Kill
) -> None:
    others = [asyncio.ensure_future(run("hostile", "spin")) for _ in range(8)]
    late_s, _ = await beside(run, lag, kill, "spin")
    async with asyncio.timeout(60):
        assert (await run("hello")).code == 0  # a neighbour runs
    for other in others:
        assert await kill(other) < 1
    assert late_s < LAG_P99_S


async def test_who_has_many_spinners_gets_no_more_of_the_processors(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ten of one principal, who are first, and one of another, that needs as much as each."""
    limits = {"cpu_s": 0.3}
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # with more there is one for each
    async with wasm_driver(tmp_path / "two") as run.driver:
        await run("hello")
        many = [
            asyncio.ensure_future(run("hostile", "spin", owner="many", limits=limits))
            for _ in range(10)
        ]
        await asyncio.sleep(0.1)
        assert (await run("hostile", "spin", owner="one", limits=limits)).why == "cpu_s"
        assert not any(each.done() for each in many)
        assert {each.why for each in await asyncio.gather(*many)} == {"cpu_s"}


async def test_a_spinner_ends_at_its_cpu_limit(run: Run) -> None:
    end = await run("hostile", "spin", limits={"cpu_s": 0.1})
    assert (end.kind, end.why) == ("limit", "cpu_s")
    assert 0.1 <= end.cpu_s < 0.2


@pytest.mark.parametrize("how", ["spin", "clock"])
async def test_a_spinner_ends_at_its_wall_limit(run: Run, how: str) -> None:
    end = await run("hostile", how, limits={"wall_s": 0.2})
    assert (end.kind, end.why) == ("limit", "wall_s")


async def test_a_sleeper_ends_at_its_wall_limit(run: Run) -> None:
    before = time.monotonic()
    end = await run("cat", stdin=Pipe(), limits={"wall_s": 0.2})
    assert (end.kind, end.why) == ("limit", "wall_s")
    assert time.monotonic() - before < 5


@pytest.fixture(params=["pooled", "on demand"])
def both(request: pytest.FixtureRequest, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs guests in the pool, and as where that has no room."""
    if request.param == "on demand":
        monkeypatch.setattr(run.driver._runtimes[0], "take", lambda: False)
    return run


async def test_a_memory_bomb_gets_no_more_than_its_limit(both: Run) -> None:
    assert (await both("hostile", "memory", limits={"memory_bytes": 16 << 20})).code == 0
    assert both.out == b"14\n"  # and what it had at its start


async def test_memory_that_is_over_the_limit_from_the_start_is_not_given(both: Run) -> None:
    code = wat2wasm('(module (memory (export "memory") 2000) (func (export "_start")))')
    end = await both(code, limits={"memory_bytes": 64 << 20})
    assert (end.kind, end.why) == ("limit", "memory_bytes")


@pytest.mark.parametrize(("memory", "code"), [('(memory (export "memory") 1)', 44), ("", 21)])
async def test_a_first_call_about_no_bytes_at_all_is_no_defect(
    run: Run, memory: str, code: int
) -> None:
    """Of the grant "", which there is not; without a memory there is no place for a name."""
    end = await run(
        wat2wasm(f"""(module
        (import "ww" "cap" (func $cap (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        {memory}
        (func (export "_start")
            (call $exit (i32.sub (i32.const 0) (call $cap (i32.const 0) (i32.const 0))))))""")
    )
    assert (end.kind, end.code) == ("exited", code)


async def test_a_table_bomb_gets_no_more_than_its_limit(both: Run) -> None:
    code = wat2wasm("""(module
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (table 1 funcref)
        (func (export "_start")
            (loop $more
                (br_if $more (i32.ne
                    (table.grow 0 (ref.null func) (i32.const 10000)) (i32.const -1))))
            (call $exit (i32.div_u (table.size 0) (i32.const 10000)))))""")
    end = await both(code)
    assert (end.kind, end.code) == ("exited", 19)


@pytest.mark.parametrize("tables", ["(table 100000000 funcref)", "(table 1 funcref)" * 9])
async def test_tables_that_are_too_many_from_the_start_are_not_given(run: Run, tables: str) -> None:
    end = await run(wat2wasm(f'(module {tables} (func (export "_start")))'))
    assert (end.kind, end.why) == ("limit", "tables")


async def test_deep_recursion_ends_the_guest_alone(both: Run) -> None:
    """In C, whose stack in its own memory ends first, and without a stack in memory."""
    end = await both("hostile", "recursion")
    assert end.kind in ("trapped", "limit")
    end = await both(wat2wasm('(module (func $deep (export "_start") (call $deep) (nop)))'))
    assert (end.kind, end.why) == ("limit", "stack")


@pytest.mark.parametrize(
    ("how", "why"), [("abort", "unreachable"), ("bounds", "memory out of bounds")]
)
async def test_what_no_program_may_do_traps(run: Run, how: str, why: str) -> None:
    end = await run("hostile", how)
    assert (end.kind, end.why) == ("trapped", why)


async def test_a_call_that_asks_for_too_much_fails(run: Run) -> None:
    await run("hostile", "greedy")
    assert run.out == b"5\n"


async def test_calls_before_there_is_a_memory_fail(run: Run) -> None:
    code = wat2wasm("""(module
        (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_write"
            (func $write (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (func (export "_start")
            (call $exit (i32.add
                (call $random (i32.const 0) (i32.const 1))
                (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 0))))))""")
    assert (await run(code)).code == 2 * 21  # EFAULT


async def test_a_memory_that_is_none_is_no_memory(run: Run) -> None:
    code = wat2wasm("""(module
        (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (global (export "memory") i32 (i32.const 7))
        (func (export "_start") (call $exit (call $random (i32.const 0) (i32.const 1)))))""")
    assert (await run(code)).code == 21  # EFAULT


async def test_a_directory_is_not_read_to_where_the_guest_has_never_been(run: Run) -> None:
    """Nor is much of it told at once: either could take the node's loop as long as it has names."""
    await run("hostile", "far")
    assert run.out == b"3\n"


async def test_what_takes_long_to_free_is_not_freed_on_the_loop(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, and a file whose last descriptor goes with the guest: 12 MiB of each."""
    threads: dict[str, str] = {}

    def noted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            threads[name] = threading.current_thread().name
            return function(*args)

        return call

    monkeypatch.setattr(engine.Store, "_delete", noted("memory", engine.Store._delete))
    monkeypatch.setattr(files.Table, "close_all", noted("files", files.Table.close_all))
    loop = threading.current_thread().name
    await run("hello")
    assert threads == {"memory": loop, "files": loop}, "little is freed at once"
    assert (await run("hostile", "memory", limits={"memory_bytes": 16 << 20})).code == 0
    await run.until(lambda: threads["memory"] != loop)  # behind the report of its end
    assert (await run("hostile", "unlink")).code == 0
    assert threads["files"] != loop


async def test_allocating_waits_for_the_disk_in_a_thread(
    run: Run, lag: type[Lag], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: time.sleep(0.5))
    async with lag() as measured:
        assert (await run("hostile", "allocate")).code == 0
    assert measured.worst() < 0.4


async def test_descriptors_end(run: Run) -> None:
    await run("hostile", "descriptors")
    assert run.out == b"252 1\n"  # beside three streams and /tmp


# --- code ----------------------------------------------------------------------------------------


async def test_truncated_and_forged_modules_are_refused(run: Run) -> None:
    whole = run.guest("hello")
    await run(whole)
    machine_code = run.compiled()[0].read_bytes()
    forged = [b"", b"\0asm", whole[:40], whole[:-1], b"\x7fELF" + whole, bytes(range(100))]
    for code in (*forged, machine_code):
        with pytest.raises(CodeRefused):
            await run(code)


async def test_a_text_is_no_module(run: Run) -> None:
    with pytest.raises(CodeRefused):
        await run(b'(module (func (export "_start")))')


async def test_a_module_that_is_too_large_is_refused(run: Run) -> None:
    with pytest.raises(CodeRefused, match="at most"):
        await run.driver.load(bytes(compiling.CODE_BYTES_MAX + 1))


async def test_a_parser_bomb_costs_a_child_alone(run: Run, lag: type[Lag]) -> None:
    """A million blocks, each in another; a table of contents that promises four billion things."""
    depth = 1 << 20
    nested = _module(b"\0" + b"\x02\x40" * depth + b"\x0b" * depth + b"\x0b")
    promising = b"\0asm\1\0\0\0" + _section(1, b"\xff\xff\xff\xff\x0f")
    async with lag() as measured:
        assert (await run(nested)).code == 0
        with pytest.raises(CodeRefused):
            await run(promising)
    assert measured.p99() < LAG_P99_S


async def test_a_compile_bomb_costs_a_child_alone(
    run: Run, lag: type[Lag], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions that are large and tangled: the child ends by its limits, here smaller ones."""
    monkeypatch.setattr(compiling, "WALL_S_MAX", 1.5)
    one = b"\x20\0\x41\1\x6a\x21\0\x02\x40\x20\0\x0d\0\x0b"  # n + 1; a block that may be left
    code = _module(b"\1\1\x7f" + one * 500_000 + b"\x0b", functions=4)
    async with lag() as measured:
        with pytest.raises(CodeRefused, match="within"):
            await run(code)
    assert measured.p99() < LAG_P99_S
    assert (await run("hello")).code == 0


def test_the_child_that_compiles_cannot_take_more_than_its_limits(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import os, resource; from wetware_proc.wasm.compile import limit_self;"
        "limit_self(os.getppid());"
        "print([resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU,"
        " resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)])"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    limits = [
        compiling.MEMORY_BYTES_MAX, compiling.CPU_S_MAX, compiling.COMPILED_BYTES_MAX, 0,
    ]  # fmt: skip
    assert told.stdout.strip() == str(limits)


async def test_damaged_machine_code_is_compiled_again(run: Run) -> None:
    await run("hello")
    for path in run.compiled():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    run.driver._images.clear()
    assert (await run("hello")).code == 0
    assert run.out == b"hello\n"


async def test_machine_code_of_another_engine_is_compiled_again(run: Run) -> None:
    """Its name and its hash are right; the engine itself says that it does not fit."""
    await run("hello")
    digest = (await run.image("hello")).digest
    (path,) = (each for each in run.compiled() if each.name.startswith(digest))
    data = bytearray(path.read_bytes().replace(b"50.0.1", b"49.0.1"))
    path.write_bytes(data)
    path.rename(
        path.with_name(f"{path.name[: -len(path.suffix) - 32]}{compiling._hash(path)}.cwasm")
    )
    run.driver._images.clear()
    assert (await run("hello")).code == 0


def test_the_cache_is_private_and_bounded(tmp_path: Path) -> None:
    cache = compiling.Cache(tmp_path / "cache", bytes_max=250)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    for number, digest in enumerate(("aa", "bb", "cc", "dd")):
        part = cache.part()
        part.write_bytes(bytes([number]) * 100)
        os.utime(cache.add(digest, part), (number, number))
        if digest == "bb":
            assert cache.find("aa") is not None  # used again: bb is older now
    assert [cache.find(digest) is not None for digest in ("aa", "bb", "cc", "dd")] == [
        True, False, False, True,
    ]  # fmt: skip


def _leb(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _module(body: bytes, functions: int = 1) -> bytes:
    """One whose `_start`, and further functions, have this body."""
    code = _leb(functions) + (_leb(len(body)) + body) * functions
    return (
        b"\0asm\1\0\0\0"
        + _section(1, b"\1\x60\0\0")
        + _section(3, _leb(functions) + bytes(functions))
        + _section(7, b"\1\6_start\0\0")
        + _section(10, code)
    )


def _section(number: int, data: bytes) -> bytes:
    return bytes([number]) + _leb(len(data)) + data


# --- the end -------------------------------------------------------------------------------------


async def test_killing_a_guest_that_waits_for_input(run: Run, kill: Kill) -> None:
    running = asyncio.ensure_future(run("cat", "ready", stdin=Pipe()))
    await run.until(lambda: run.err)
    assert await kill(running) < 0.5


@pytest.mark.parametrize("how", ["loop", "send"])
async def test_killing_in_the_middle_of_a_call_that_writes(
    run: Run, kill: Kill, servant: type[Echo], how: str
) -> None:
    """Neither does it go on, once it has heard of that, nor do those that were sent behind it."""
    writes = begun = cut = 0

    async def write(data: bytes) -> bytes:
        nonlocal writes, begun, cut
        begun += 1
        try:
            for _ in range(500):
                writes += 1
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            cut += 1
            raise
        return b""

    async with run.granted(servant(write)) as ref:
        running = asyncio.ensure_future(run.with_refs("caps", how, grants={"echo": ref}))
        await run.until(lambda: writes > 3)
        await kill(running)
        await run.until(lambda: cut == begun)  # it is told by way of a socket
        seen = writes
        await asyncio.sleep(0.3)
        assert writes == seen


async def test_killing_while_output_is_taken(run: Run, kill: Kill) -> None:
    taken: list[bytes] = []

    async def slowly(data: bytes) -> None:
        await asyncio.sleep(0.01)
        taken.append(data)

    running = asyncio.ensure_future(run("hostile", "drip", stdout=slowly))
    await run.until(lambda: len(taken) >= 3)
    await kill(running)
    count = len(taken)
    await asyncio.sleep(0.1)
    assert len(taken) == count


async def test_killing_while_a_file_is_written(run: Run, kill: Kill, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for pause_s in (0.02, 0.1, 0.3):
        running = asyncio.ensure_future(
            run("hostile", "file", dirs={"/out": (tmp_path, True)}, limits={"tmp_bytes": 1 << 30})
        )
        await run.until(file.exists)
        await asyncio.sleep(pause_s)
        await kill(running)
        size = os.stat(file).st_size
        await asyncio.sleep(0.1)
        assert os.stat(file).st_size == size


async def test_killing_at_any_moment(run: Run) -> None:
    """Hundreds of guests, each killed at another moment of its life, from its load on."""
    rng = random.Random(7)
    for _ in range(150):
        how = rng.choice(["spin", "clock", "yield", "drip", "flood", "memory"])
        running = asyncio.ensure_future(run("hostile", how, stdout=lambda data: None))
        await asyncio.sleep(rng.choice([0, 0.0005, 0.002, 0.005, 0.02]))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert (await run("hello")).code == 0
